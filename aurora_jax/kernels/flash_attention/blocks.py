"""Sizes of the kernels' tiles, by TPU generation, direction, dtype, head dimension and length.

The table was chosen by `benchmarks/flash_attention_blocks.py`, which compiles candidates and counts the
cycles of a causal layer in the compiler's own schedule; other dtypes, head dimensions, groups and lengths
follow from it by the rules of `blocks_for`, within the VMEM of a core. Nothing is read from the environment.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from aurora_jax.chips import CHIPS, MIB
from aurora_jax.kernels.flash_attention.tiles import LANES, Blocks

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Sizes:
    """Rows of a tile, keys of a chunk, and rows and keys of one matrix product: upper bounds, see `Blocks`."""

    rows: int
    keys: int
    rows_at_once: int
    keys_at_once: int


# By direction and columns of the matrix unit, for bf16 and a head dimension of 128. Wider heads and fp32 take
# half the rows and keys. A chunk costs some 300 cycles beside its products, until the matrix units are full
# and while they run dry: v6e, whose products are fast, takes many rows at a time, though that compiles
# longer.
SIZES: dict[tuple[Direction, int], Sizes] = {
    ("forward", 128): Sizes(rows=2048, keys=512, rows_at_once=512, keys_at_once=512),
    ("forward", 256): Sizes(rows=6144, keys=512, rows_at_once=512, keys_at_once=512),
    ("backward", 128): Sizes(rows=1024, keys=512, rows_at_once=1024, keys_at_once=256),
    ("backward", 256): Sizes(rows=1024, keys=512, rows_at_once=256, keys_at_once=512),
}


def blocks_for(
    direction: Direction,
    generation: str,
    dtype: Any,
    head_dim: int,
    group: int,
    queries: int,
    keys: int,
    sizes: Sizes | None = None,
) -> Blocks:
    """Tile sizes for a call.

    Args:
        head_dim: padded to a multiple of 128.
        group: query heads that share a key/value head.
        queries: places of queries (L).
        keys: places of keys (M).
        sizes: instead of those of `SIZES`, for the script that compares them.

    Raises:
        ValueError: an unknown generation.
    """
    if generation not in CHIPS:
        raise ValueError(f"No tile sizes for TPU generation {generation!r}; there are {', '.join(CHIPS)}.")
    facts = CHIPS[generation]
    sizes = sizes or SIZES[direction, facts.matrix_columns]
    bytes_each = jnp.dtype(dtype).itemsize
    if bytes_each * head_dim > 2 * LANES:
        sizes = replace(
            sizes, rows=sizes.rows // 2, keys=max(sizes.keys // 2, 256), keys_at_once=min(sizes.keys_at_once, 256)
        )
    if generation == "v4":
        sizes = replace(sizes, rows=min(sizes.rows, 1024), keys=min(sizes.keys, 512))
    length = -(-queries // LANES) * LANES
    heads = max(count for count in range(1, group + 1) if group % count == 0 and count * LANES <= sizes.rows)
    step = max(
        places
        for places in (LANES, 2 * LANES)
        if places == LANES
        or (length % places == 0 and heads * places <= min(sizes.rows, 2048) and places <= sizes.keys // 2)
    )
    chunk = min(sizes.keys, -(-keys // step) * step)
    chunk -= chunk % step
    rows = heads * step
    divisor = max(
        (count for count in range(1, heads + 1) if heads % count == 0 and count * step <= sizes.rows_at_once), default=0
    )
    at_once = divisor * step or sizes.rows_at_once
    fixed, per_key = _vmem(direction, rows, head_dim, bytes_each, facts.cores)
    room = facts.vmem * 7 // 8 - fixed
    resident = max(min(-(-keys // chunk), room // per_key // chunk), 1) * chunk
    limit = min(facts.vmem * 15 // 16, fixed + resident * per_key + 8 * MIB)
    return Blocks(
        heads=heads,
        queries=step,
        keys=chunk,
        rows_at_once=at_once,
        keys_at_once=min(sizes.keys_at_once, chunk),
        resident_keys=resident,
        vmem_limit=limit,
        wide_matrix_unit=facts.matrix_columns == 256 and head_dim == LANES,
    )


def _vmem(direction: Direction, rows: int, head_dim: int, bytes_each: int, cores: int) -> tuple[int, int]:
    """Bytes of VMEM for a tile's rows, spilled scores included, and for each resident key; what is copied is
    there twice."""
    if direction == "forward":
        per_row = head_dim * (2 * bytes_each + 2 * bytes_each + bytes_each + 4) + 2 * 4 * LANES
        return rows * per_row + 4 * MIB, 2 * 2 * head_dim * bytes_each + 8
    per_row = head_dim * (3 * 2 * bytes_each + bytes_each + 4)
    gradient = 4 if cores > 1 else bytes_each
    per_key = head_dim * (2 * 2 * bytes_each + bytes_each + 2 * 4 + 2 * 2 * gradient) + 2 * 4 * LANES
    return rows * per_row + 5 * MIB, per_key


def cores_of(generation: str) -> int:
    return CHIPS[generation].cores


def current_generation(*, interpreted: bool) -> str:
    """Generation of the TPU that a function is being compiled for: the current mesh's devices, or the default one.

    Raises:
        ValueError: that is no TPU, and the kernels are not interpreted.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    for generation, chip in CHIPS.items():
        if kind in chip.device_kinds:
            return generation
    if interpreted:
        return "v5e"
    raise ValueError(
        f"Flash attention has tiles for TPU {', '.join(CHIPS)}, and the device is {kind!r}. Elsewhere choose "
        "the attention "
        "implementation 'xla' (or 'flash_interpreted', which is slow and meant for tests)."
    )
