"""Flash attention as a function: checks, padding, gradients, and its division over a mesh.

B batch, H query heads, K key/value heads, G = H / K query heads that share one, L queries, M keys, C head dim.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aurora_jax.kernels.flash_attention.backward import backward
from aurora_jax.kernels.flash_attention.blocks import blocks_for, cores_of, current_generation
from aurora_jax.kernels.flash_attention.forward import forward
from aurora_jax.kernels.flash_attention.tiles import LANES, LOG2_E, Blocks, Call, Segments

DTYPES = (jnp.bfloat16, jnp.float32)
LARGEST_HEAD = 256
"""Dimensions of a head, at most."""


def flash_attention(
    q_BHLC: jax.Array,
    k_BKMC: jax.Array,
    v_BKMC: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    alibi_slopes: jax.Array | None = None,
    scale: float | None = None,
    q_offset: int | jax.Array = 0,
    q_offset_multiple: int = 1,
    return_lse: bool = False,
    generation: str | None = None,
    blocks: tuple[Blocks, Blocks] | None = None,
    interpret: Any = False,
) -> Any:
    """softmax(scale q k^T + ALiBi) v by Pallas TPU kernels, differentiable in q, k and v; fp32 softmax and sums.

    Multi-head, grouped-query and multi-query attention: query heads h G .. h G + G - 1 use key/value head h,
    which is never repeated in memory. Any L and M; C up to 256. Query l is at place q_offset + l, key m at
    place m. See `reference.py` for what is computed.

    Args:
        q_BHLC: queries, bf16 or fp32; k and v are of the same dtype.
        causal: a query sees keys at its own place and before.
        segment_ids: [B, L] for queries and keys alike, or a pair ([B, L], [B, M]): a query sees keys of its
            own segment. Ids below zero are padding, which sees nothing and is not seen: its context is zero,
            and so are its gradients.
        alibi_slopes: [H] fp32; slope x (key place - query place) is added to the scores (Press et al. 2022,
            arXiv 2108.12409). Constants: they get no gradient.
        scale: of the scores, 1 / sqrt(C) without it.
        q_offset: place of the first query; may be traced.
        q_offset_multiple: a traced `q_offset` is known to be a multiple of this; one of 128 or more spares
            masking work.
        return_lse: also return the natural logarithm of the softmax's sum [B, H, L], differentiable; -inf for
            rows that see nothing.
        generation: TPU generation ('v5e' ...) for the sizes of tiles; that of the current device without it.
        blocks: sizes of tiles of the forward and the backward kernel, instead of those of `blocks.py`.
        interpret: True or `pltpu.InterpretParams` to run on a CPU, slowly.

    Returns:
        The context [B, H, L, C] in the inputs' dtype; with `return_lse` a pair of it and the logarithms.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a CPU without `interpret`.
    """
    B, H, L, C = q_BHLC.shape
    K, M = _checked(q_BHLC, k_BKMC, v_BKMC, segment_ids, alibi_slopes)
    G = H // K
    if generation is None:
        generation = current_generation(interpreted=bool(interpret))
    if blocks is None:
        facts = (generation, q_BHLC.dtype, -(-C // LANES) * LANES, G, L, M)
        blocks = blocks_for("forward", *facts), blocks_for("backward", *facts)
    multiple = math.gcd(q_offset, 1 << 20) if isinstance(q_offset, int) else q_offset_multiple
    static = _Static(
        causal=causal,
        scale=C**-0.5 if scale is None else float(scale),
        offset_multiple=multiple,
        blocks=blocks,
        cores=cores_of(generation),
        interpret=interpret,
    )
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = segment_ids, segment_ids
    slopes_KG = None if alibi_slopes is None else alibi_slopes.reshape(K, G)
    offset_1 = jnp.asarray(q_offset, jnp.int32).reshape(1)
    queries_BKGLC = q_BHLC.reshape(B, K, G, L, C)
    context_BKGLC, lse_BKGL = _attend(static, queries_BKGLC, k_BKMC, v_BKMC, offset_1, segment_ids, slopes_KG)
    context_BHLC = context_BKGLC.reshape(B, H, L, C)
    return (context_BHLC, lse_BKGL.reshape(B, H, L)) if return_lse else context_BHLC


@dataclass(frozen=True)
class _Static:
    causal: bool
    scale: float
    offset_multiple: int
    blocks: tuple[Blocks, Blocks]
    cores: int
    interpret: Any

    def call(self, blocks: Blocks, length: int, dtype: Any, segments: bool, alibi: bool) -> Call:
        return Call(
            causal=self.causal,
            scale=self.scale,
            length=length,
            aligned=self.offset_multiple % blocks.queries == 0,
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
            segments=segments,
            alibi=alibi,
            blocks=blocks,
            interpret=self.interpret,
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q_BKGLC, k_BKMC, v_BKMC, offset_1, segment_ids, slopes_KG):
    return _attend_forward(static, q_BKGLC, k_BKMC, v_BKMC, offset_1, segment_ids, slopes_KG)[0]


def _attend_forward(static, q_BKGLC, k_BKMC, v_BKMC, offset_1, segment_ids, slopes_KG):
    (L, C), M = q_BKGLC.shape[3:], k_BKMC.shape[2]
    blocks = static.blocks[0]
    call = static.call(blocks, M, q_BKGLC.dtype, segment_ids is not None, slopes_KG is not None)
    context_BKGLC, logsumexp_BKG1L = forward(
        call,
        _whole_blocks(q_BKGLC, blocks.queries),
        _whole_blocks(k_BKMC, blocks.resident_keys),
        _whole_blocks(v_BKMC, blocks.resident_keys),
        offset_1,
        _padded_segments(segment_ids, blocks.queries, blocks.resident_keys),
        slopes_KG,
    )
    # Named, so that a rematerialisation policy may keep what the backward kernel needs.
    context_BKGLC = checkpoint_name(context_BKGLC[:, :, :, :L, :C], "attention_context")
    logsumexp_BKGL = checkpoint_name(logsumexp_BKG1L[:, :, :, 0, :L], "attention_logsumexp")
    lse_BKGL = jnp.where(jnp.isposinf(logsumexp_BKGL), -jnp.inf, logsumexp_BKGL / LOG2_E)
    residuals = q_BKGLC, k_BKMC, v_BKMC, offset_1, segment_ids, slopes_KG, context_BKGLC, logsumexp_BKGL
    return (context_BKGLC, lse_BKGL), residuals


def _attend_backward(static, residuals, gradients):
    q_BKGLC, k_BKMC, v_BKMC, offset_1, segment_ids, slopes_KG, context_BKGLC, logsumexp_BKGL = residuals
    d_context_BKGLC, d_lse_BKGL = gradients
    B, K, G, L = logsumexp_BKGL.shape
    M, C = k_BKMC.shape[2:]
    blocks = static.blocks[1]
    parts = static.cores if B * K % static.cores and (G // blocks.heads) % static.cores == 0 else 1
    delta_BKGL = (d_context_BKGLC.astype(jnp.float32) * context_BKGLC.astype(jnp.float32)).sum(axis=-1) - d_lse_BKGL
    # A row that sees nothing has no gradient, whatever comes for its logsumexp of minus infinity.
    delta_BKGL = jnp.where(jnp.isposinf(logsumexp_BKGL), 0.0, delta_BKGL)
    starts = range(0, M, blocks.resident_keys)
    d_queries, d_keys, d_values = [], [], []
    for start in starts:
        taken = slice(start, min(start + blocks.resident_keys, M))
        call = static.call(blocks, taken.stop - start, q_BKGLC.dtype, segment_ids is not None, slopes_KG is not None)
        part_of_segments = None if segment_ids is None else (segment_ids[0], segment_ids[1][:, taken])
        d_query_BKGLC, d_key_PBKMC, d_value_PBKMC = backward(
            call,
            parts,
            _whole_blocks(q_BKGLC, blocks.queries),
            _whole_blocks(k_BKMC[:, :, taken], blocks.resident_keys),
            _whole_blocks(v_BKMC[:, :, taken], blocks.resident_keys),
            offset_1 - start,
            _padded_segments(part_of_segments, blocks.queries, blocks.resident_keys),
            slopes_KG,
            _whole_blocks(d_context_BKGLC, blocks.queries),
            _padded(logsumexp_BKGL, 3, blocks.queries, jnp.inf)[:, :, :, None],
            _padded(delta_BKGL, 3, blocks.queries)[:, :, :, None],
            q_gradient_dtype=q_BKGLC.dtype if len(starts) == 1 else jnp.float32,
        )
        d_queries.append(d_query_BKGLC)
        d_keys.append(d_key_PBKMC.sum(axis=0)[:, :, : taken.stop - start, :C].astype(k_BKMC.dtype))
        d_values.append(d_value_PBKMC.sum(axis=0)[:, :, : taken.stop - start, :C].astype(v_BKMC.dtype))
    d_query_BKGLC = sum(d_queries[1:], d_queries[0])[:, :, :, :L, :C].astype(q_BKGLC.dtype)
    return d_query_BKGLC, jnp.concatenate(d_keys, axis=2), jnp.concatenate(d_values, axis=2), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _checked(q_BHLC, k_BKMC, v_BKMC, segment_ids, alibi_slopes) -> tuple[int, int]:
    """Number of key/value heads and of keys, of arguments that fit together; ValueError otherwise."""
    if q_BHLC.ndim != 4 or k_BKMC.ndim != 4 or k_BKMC.shape != v_BKMC.shape:
        raise ValueError(
            "flash attention: q [B, H, L, C] and k, v [B, K, M, C] of one shape are expected, "
            f"not {q_BHLC.shape}, {k_BKMC.shape}, {v_BKMC.shape}."
        )
    B, H, L, C = q_BHLC.shape
    K, M = k_BKMC.shape[1:3]
    if k_BKMC.shape[0] != B or k_BKMC.shape[3] != C:
        raise ValueError(f"flash attention: q {q_BHLC.shape} and k {k_BKMC.shape} differ in batch or head dimension.")
    if H % K:
        raise ValueError(f"flash attention: {H} query heads cannot share {K} key/value heads: not divisible.")
    if C > LARGEST_HEAD:
        raise ValueError(
            f"flash attention: head dimension {C} is above {LARGEST_HEAD}, the largest that there are tiles for."
        )
    if q_BHLC.dtype not in DTYPES or {k_BKMC.dtype, v_BKMC.dtype} != {q_BHLC.dtype}:
        raise ValueError(
            f"flash attention: q, k and v are all bfloat16 or all float32, not {q_BHLC.dtype}, "
            f"{k_BKMC.dtype}, {v_BKMC.dtype}."
        )
    if 0 in (*q_BHLC.shape, *k_BKMC.shape):
        raise ValueError(f"flash attention: an empty array, q {q_BHLC.shape} or k {k_BKMC.shape}.")
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if segment_ids is not None and [ids.shape for ids in pair] != [(B, L), (B, M)]:
        raise ValueError(f"flash attention: segment ids {[ids.shape for ids in pair]} are not [{(B, L)}, {(B, M)}].")
    if segment_ids is not None and not all(jnp.issubdtype(ids.dtype, jnp.integer) for ids in pair):
        raise ValueError(f"flash attention: segment ids are integers, not {pair[0].dtype}.")
    if alibi_slopes is not None and alibi_slopes.shape != (H,):
        raise ValueError(f"flash attention: ALiBi slopes {alibi_slopes.shape} are not one for each of {H} query heads.")
    return K, M


def _padded(array: jax.Array, axis: int, multiple: int, fill: float = 0.0) -> jax.Array:
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=fill)


def _whole_blocks(array_LC: jax.Array, places: int) -> jax.Array:
    """Padded to whole blocks of places, and to whole vectors of 128 lanes."""
    return _padded(_padded(array_LC, array_LC.ndim - 2, places), array_LC.ndim - 1, LANES)


def _padded_segments(segment_ids, queries: int, keys: int) -> Segments | None:
    if segment_ids is None:
        return None
    return Segments.of(_padded(segment_ids[0], 1, queries, -1), _padded(segment_ids[1], 1, keys, -1))
