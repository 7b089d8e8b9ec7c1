"""Checksums of arrays, which a checkpoint is held to when it is read.

Of the elements' bits w_0, w_1, ... in row-major order, as unsigned integers, two sums modulo 2^32: of w_i, and
of (2 i + 1) w_i (after J. G. Fletcher, "An arithmetic checksum for serial transmissions", IEEE Trans. Commun.
30, 1982). One flipped bit changes both, since 2 i + 1 is odd; elements or chunks that change places change the
second. They are sums over elements: those of parts add up, so that neither the mesh, nor the processes, nor
the cut into blocks and files matters, and each device sums what it holds.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

WORDS = {2: np.uint16, 4: np.uint32}
"""Unsigned integers of as many bytes as an element."""
MODULUS = 2**32
PIECE_BYTES = 16 << 20


class Checksum(NamedTuple):
    """The two sums of an array, or of a part of it."""

    plain: int = 0
    weighted: int = 0

    def __add__(self, other: "Checksum") -> "Checksum":  # type: ignore[override]
        return Checksum((self.plain + other.plain) % MODULUS, (self.weighted + other.weighted) % MODULUS)

    def __str__(self) -> str:
        return f"{self.plain:08x}{self.weighted:08x}"

    @classmethod
    def parse(cls, text: str) -> "Checksum":
        """The inverse of `str`. Raises ValueError."""
        return cls(int(text[:8], 16), int(text[8:], 16))


def of_part(part: np.ndarray, origin: Sequence[int], shape: Sequence[int]) -> Checksum:
    """The sums over a part of an array on the host, which begins at `origin` of the whole `shape`.

    Rows and columns are summed without their weights, and the sums weighted: the part is read twice, and nothing of
    its size is made.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    columns = part.shape[-1] if part.ndim else 1
    words = np.ascontiguousarray(part).view(WORDS[part.itemsize]).reshape(-1, columns)
    of_rows = words.sum(axis=1, dtype=np.uint32).astype(np.uint64)
    of_columns = words.sum(axis=0, dtype=np.uint32).astype(np.uint64)
    places = np.zeros(part.shape[:-1], np.uint64)
    for axis in range(part.ndim - 1):
        along = (np.arange(part.shape[axis], dtype=np.uint64) + np.uint64(origin[axis])) * np.uint64(strides[axis])
        places += along.reshape([-1 if other == axis else 1 for other in range(part.ndim - 1)])
    if part.ndim:
        places += np.uint64(origin[-1])
    factors = (2 * places.reshape(-1) + 1) % MODULUS
    # Products of two numbers below 2^32 fit 64 bits; their sum may wrap around at 2^64, a multiple of the modulus.
    weighted = int((factors * of_rows).sum()) + int((2 * np.arange(columns, dtype=np.uint64) * of_columns).sum())
    return Checksum(int(of_rows.sum()) % MODULUS, weighted % MODULUS)


def paths_of(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def of_arrays(tree: Any) -> dict[str, Checksum]:
    """The checksums of a tree's arrays by dotted path, computed where they lie; a collective over their processes."""
    leaves = paths_of(tree)
    if not leaves:
        return {}
    on_host = all(device.platform == "cpu" for leaf in leaves.values() for device in leaf.sharding.device_set)
    sums = _on_hosts([*leaves.values()]) if on_host else on_devices([*leaves.values()])
    return {name: Checksum(int(plain), int(weighted)) for name, (plain, weighted) in zip(leaves, sums, strict=True)}


def _on_hosts(arrays: Sequence[jax.Array]) -> np.ndarray:
    """As `on_devices`, where the devices' memory is the host's: NumPy is ten times as fast there as XLA's integers.

    Of copies of a part, one is counted.
    """
    parts = [
        (number, array.shape, [axis.start or 0 for axis in shard.index], jax.device_get(shard.data))
        for number, array in enumerate(arrays)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    own = [Checksum()] * len(arrays)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pieces = [piece for part in parts for piece in _pieces(*part)]
        for (number, *_), found in zip(pieces, pool.map(lambda piece: of_part(*piece[1:]), pieces), strict=True):
            own[number] += found
    table = np.array(own, np.uint32)
    if jax.process_count() == 1:
        return table
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(table).sum(axis=0, dtype=np.uint32)


def _pieces(
    number: int, shape: tuple[int, ...], origin: list[int], values: np.ndarray
) -> Iterator[tuple[int, np.ndarray, list[int], tuple[int, ...]]]:
    """A part cut along its first dimension into pieces of PIECE_BYTES or a little more, for `of_part`."""
    rows = max(1, len(values) * PIECE_BYTES // max(1, values.nbytes)) if values.ndim > 1 else 0
    for start in range(0, len(values), rows) if rows else (0,):
        piece = values[start : start + rows] if rows else values
        yield number, piece, [origin[0] + start, *origin[1:]] if rows else origin, shape


def on_devices(arrays: Sequence[jax.Array]) -> np.ndarray:
    """The sums of each array, [arrays, 2] uint32: one program, in which each device sums what it holds."""
    sharding = arrays[0].sharding
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    everywhere = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_get(_program(everywhere)([*arrays]))


@cache
def _program(everywhere: jax.sharding.Sharding | None) -> jax.stages.Wrapped:
    return jax.jit(lambda arrays: jnp.stack([_sums(array) for array in arrays]), out_shardings=everywhere)


def _sums(array: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(array, WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    places = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = math.prod(array.shape[axis + 1 :]) % MODULUS
        places += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride)
    return jnp.stack([words.sum(dtype=jnp.uint32), ((2 * places + 1) * words).sum(dtype=jnp.uint32)])


def changed(found: Mapping[str, Checksum], expected: Mapping[str, str]) -> list[str]:
    """What differs, in words that name the arrays; nothing if nothing does."""
    return [
        f"{name} has the checksum {found[name]}, {expected.get(name, 'none')} was written"
        for name in found
        if str(found[name]) != expected.get(name)
    ]


def sum_of(parts: Iterable[Checksum]) -> Checksum:
    """The checksum of an array whose parts have these."""
    summed = Checksum()
    for part in parts:
        summed += part
    return summed
