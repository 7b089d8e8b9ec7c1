"""What the forward and the backward kernel share: the static facts of a call, which keys a tile of queries
visits, and which it masks.

A tile has R = heads x queries rows: `heads` query heads that share a key/value head, at `queries` consecutive
places; row h queries + l is head h at place l. Its keys are chunks of `keys`, which are whole and wholly
visible, and behind them one tail of 1 to a few blocks of `queries` keys, whose last blocks alone the diagonal
(or the end of the keys) crosses: masking work is done there and nowhere else. The tail is visited first:
nearly every tile has one, and what it finds need not be added to sums that were set to zero before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LOG2_E = 1.4426950408889634
LANES = 128


@dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel's tiles; `blocks.py` chooses them."""

    heads: int
    """Query heads of one key/value head that are folded into the rows of a tile."""
    queries: int
    """Places of a tile (a multiple of 128): the step at which causal work follows the diagonal."""
    keys: int
    """Keys of a chunk, a multiple of `queries`."""
    rows_at_once: int
    """Rows of one matrix product; a chunk is computed as a pipeline of such products."""
    keys_at_once: int
    """Keys of one matrix product, at most `keys`."""
    resident_keys: int
    """Keys and values that are in VMEM at a time, a multiple of `keys`; they are copied once for all the
    tiles of a key/value head."""
    vmem_limit: int
    """Bytes of VMEM that the compiler may use."""
    wide_matrix_unit: bool
    """The matrix unit has 256 columns (v6e). Products with only 128 columns then leave half of it idle: the
    forward kernel lets that half sum the rows, the backward kernel transposes the key and value gradients so
    that it is not idle."""

    @property
    def rows(self) -> int:
        return self.heads * self.queries


@dataclass(frozen=True)
class Call:
    """The facts of a call that are known when it is compiled."""

    causal: bool
    scale: float
    length: int
    """True number of keys, before padding to whole blocks."""
    aligned: bool
    """The queries' offset is known to be a multiple of `Blocks.queries`: the diagonal crosses one block of
    keys, otherwise two."""
    precision: jax.lax.Precision
    segments: bool
    alibi: bool
    blocks: Blocks
    interpret: Any

    def dot(self, left: jax.Array, right: jax.Array, dimensions: jax.lax.DotDimensionNumbers) -> jax.Array:
        """A product with sums in fp32."""
        if self.interpret:
            # XLA for CPUs has no small products of bf16 with fp32 sums. In fp32 the same products are exact.
            left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        return jax.lax.dot_general(
            left, right, dimensions, preferred_element_type=jnp.float32, precision=self.precision
        )

    @property
    def diagonal(self) -> int:
        """Blocks of `queries` keys at the end of the visible ones that need a mask."""
        if self.causal:
            return 1 if self.aligned else 2
        return 1 if self.length % self.blocks.queries else 0


def visit_chunks(
    call: Call,
    first_query: jax.Array,
    first_key: jax.Array | int,
    start_sums: Callable[[], None],
    chunk: Callable,
    segment_relation: Callable | None,
    *,
    parts: int = 1,
) -> None:
    """Runs `chunk` for every chunk of the resident keys that a tile sees, the tail before the others.

    Args:
        first_query: place of the tile's first query.
        first_key: place of the first resident key.
        start_sums: what a tile starts with, for one that has no tail.
        chunk: chunk(start, width, masked, by_segment, is_first): `width` keys from the resident key `start`,
            the last `masked` of which need a mask; by_segment says whether segments must be compared,
            is_first that it is the tile's first.
        parts: of which the resident keys are one; of several, each adds to the sums of those before.
        segment_relation: segment_relation(j) -> (some pair of chunk j is of one segment, all pairs are); None
            without segments.
    """
    blocks = call.blocks
    step, per_chunk, resident = blocks.queries, blocks.keys // blocks.queries, blocks.resident_keys // blocks.queries
    reach = jnp.asarray(-(-call.length // step) * step - first_key)
    if call.causal:
        reach = jnp.minimum(reach, first_query - first_key + step + (0 if call.aligned else step - 1))
    visible = jnp.minimum(jax.lax.div(jnp.maximum(reach, 0), jnp.int32(step)), resident)
    whole = jax.lax.div(jnp.maximum(visible - call.diagonal, 0), jnp.int32(per_chunk))
    tail = visible - whole * per_chunk

    if parts > 1:
        pl.when(first_key == 0)(start_sums)
    tail_start = pl.multiple_of(whole * blocks.keys, blocks.keys)
    for count in range(1, per_chunk + call.diagonal):
        if count > resident:
            break
        pl.when(tail == count)(
            partial(chunk, tail_start, count * step, min(count, call.diagonal) * step, call.segments, parts == 1)
        )

    if parts == 1:
        pl.when(tail == 0)(start_sums)

    @pl.loop(0, whole)
    def _(j):
        start = pl.multiple_of(j * blocks.keys, blocks.keys)
        if segment_relation is None:
            chunk(start, blocks.keys, 0, False, False)
        else:
            some, every = segment_relation(j)
            pl.when(every)(partial(chunk, start, blocks.keys, 0, False, False))
            pl.when(some & ~every)(partial(chunk, start, blocks.keys, 0, True, False))


def products(blocks: Blocks, width: int) -> list[tuple[int, int, int]]:
    """(first row, first key, keys) of the products of a chunk, ordered so that neighbours share no rows where
    there are several."""
    starts = range(0, width, blocks.keys_at_once)
    return [
        (row, key, min(blocks.keys_at_once, width - key))
        for key in starts
        for row in range(0, blocks.rows, blocks.rows_at_once)
    ]


@dataclass(frozen=True)
class Segments:
    """Segment ids [B, L] and [B, M] with the span of ids of each tile of queries and each chunk of keys.

    Spans that do not meet have no pair of equal ids, and their chunk is not visited; two spans of one and the
    same id need no mask. Ids below zero are padding: they meet nothing, themselves included.
    """

    queries_BL: jax.Array
    keys_BM: jax.Array

    @classmethod
    def of(cls, queries_BL: jax.Array, keys_BM: jax.Array) -> "Segments":
        return cls(
            jnp.where(queries_BL < 0, -1, queries_BL).astype(jnp.int32),
            jnp.where(keys_BM < 0, -2, keys_BM).astype(jnp.int32),
        )

    def spans(self, blocks: Blocks) -> list[jax.Array]:
        """Lowest and highest id of each tile of queries, then of each chunk of keys, each [B times tiles or chunks]."""
        return [
            extreme(ids.reshape(ids.shape[0], -1, size), axis=2).reshape(-1)
            for ids, size in ((self.queries_BL, blocks.queries), (self.keys_BM, blocks.keys))
            for extreme in (jnp.min, jnp.max)
        ]


def in_lanes(ids_BX: jax.Array) -> jax.Array:
    """[B, 1, X]: a place a lane."""
    return ids_BX[:, None, :]


def in_sublanes(ids_BX: jax.Array) -> jax.Array:
    """[B, X, 128]: a place a sublane, repeated over the lanes."""
    return jnp.broadcast_to(ids_BX[:, :, None], (*ids_BX.shape, LANES))


def segment_relation(
    span_refs: list, batch: jax.Array, batches: int, tile: jax.Array, first_chunk: jax.Array | int
) -> Callable:
    """The `segment_relation` that `visit_chunks` asks for, read from the spans in scalar memory."""
    q_low_ref, q_high_ref, k_low_ref, k_high_ref = span_refs
    q_place = batch * (q_low_ref.shape[0] // batches) + tile
    k_place = batch * (k_low_ref.shape[0] // batches) + first_chunk
    q_low, q_high = q_low_ref[q_place], q_high_ref[q_place]

    def relation(j):
        k_low, k_high = k_low_ref[k_place + j], k_high_ref[k_place + j]
        some = (q_low <= k_high) & (k_low <= q_high)
        return some, some & (q_low == q_high) & (k_low == k_high)

    return relation


def slopes_by_lane(slopes_KG: jax.Array) -> jax.Array:
    """[K, G, 1, 128]: ALiBi slopes for base-2 scores, repeated over the lanes."""
    return jnp.broadcast_to((slopes_KG.astype(jnp.float32) * LOG2_E)[:, :, None, None], (*slopes_KG.shape, 1, LANES))


def alibi_of_places(slopes_H1L: jax.Array, queries: int) -> jax.Array:
    """[heads, 1, queries]: the base-2 ALiBi of a tile's places with respect to its first.

    The kernels measure distances from the tile's first query, which is the same for a whole product; softmax
    does not notice, the logsumexp does, by this much.
    """
    places = jax.lax.broadcasted_iota(jnp.int32, (slopes_H1L.shape[0], 1, queries), 2).astype(jnp.float32)
    return jnp.tile(slopes_H1L, (1, 1, queries // LANES)) * places


def rows_of(ref: Any, row: int, count: int) -> jax.Array:
    """Rows row .. row + count of a tile, [count, C], from its block [1, 1, heads, queries, C]."""
    queries = ref.shape[3]
    if count <= queries:
        return ref[0, 0, row // queries, pl.ds(row % queries, count)]
    return ref[0, 0, pl.ds(row // queries, count // queries)].reshape(count, ref.shape[4])
