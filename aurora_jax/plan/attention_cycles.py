"""Cycles of the flash-attention kernels, from the schedules of the TPU compiler; in a process of its own, since
libtpu dumps only what it was told to dump when it started.

    python -m aurora_jax.plan.attention_cycles '{"generation": "v5p", "heads": 48, "kv_heads": 1, "head_dim":
    128, "length": 8192}'

prints the cycles of a kernel's call for one causal sequence on one TensorCore, forward and backward, and those of their
products alone at the published peak ("forward floor").
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from aurora_jax.chips import smallest_topology
from aurora_jax.errors import InputError
from aurora_jax.kernels.flash_attention.tiles import Blocks
from aurora_jax.plan.schedule import BasicBlock, dumped_kernels

Measure = Callable[[BasicBlock], int]
"""What is added up: `BasicBlock.cycles`, or its products alone, or its bundles alone."""
FLOOR: Measure = attrgetter("matrix_cycles")
_CYCLES: Measure = attrgetter("cycles")


def tile_cycles(
    blocks: list[BasicBlock], sizes: Blocks, direction: str, measure: Measure = _CYCLES
) -> tuple[int, list[int], int, int]:
    """Cycles of a whole chunk, of tails of 1, 2 ... blocks of queries, of the rest of a tile, and of what
    runs once a key/value head.

    The first basic blocks with products are the tails, the one in a loop is a whole chunk
    (`tiles.visit_chunks`); what stores between them is for tiles without a tail, of which a causal sequence
    has none. Other blocks run once a tile, except for the long guarded ones of the backward kernel, which
    start and finish the sums over all tiles.
    """
    places = [place for place, block in enumerate(blocks) if block.products]
    tails, loop = places[: sizes.keys // sizes.queries], max(places, key=lambda place: blocks[place].depth)
    others = [
        block
        for place, block in enumerate(blocks)
        if block.depth and not block.products and not (tails[-1] < place < loop and "vst" in block.operations)
    ]
    a_tile = sum(
        measure(block) for block in others if direction == "forward" or block.guards < 2 or block.bundles < 100
    )
    return (
        measure(blocks[loop]),
        [measure(blocks[place]) for place in tails],
        a_tile,
        sum(map(measure, others)) - a_tile,
    )


def causal_cycles(
    blocks: list[BasicBlock], sizes: Blocks, direction: str, heads: int, length: int, measure: Measure = _CYCLES
) -> int:
    """Cycles of one causal sequence: all tiles of `heads` query heads that share a key/value head.

    Keys that are not all resident are visited part by part, each part's tiles from the diagonal on.
    """
    whole, tails, a_tile, once = tile_cycles(blocks, sizes, direction, measure)
    per_chunk = sizes.keys // sizes.queries
    total = 0
    for first_key in range(0, length, sizes.resident_keys):
        for end in range(sizes.queries, length + sizes.queries, sizes.queries):
            visible = min(max(end - first_key, 0), sizes.resident_keys) // sizes.queries
            chunks = max(visible - 1, 0) // per_chunk
            tail = visible - chunks * per_chunk
            total += a_tile + chunks * whole + (tails[tail - 1] if tail else 0)
    return total * heads // sizes.heads + once * -(-length // sizes.resident_keys)


@functools.cache
def attention_cycles(
    generation: str, heads: int, kv_heads: int, head_dim: int, length: int, *, alibi: bool = False
) -> dict[str, int]:
    """Cycles of a call for one causal sequence in bf16 on one TensorCore; compiles both kernels (half a minute).

    Keys are "forward" and "backward", and "forward floor" and "backward floor": what their products alone take at the
    published peak. A backward pass is several calls where VMEM does not hold all keys at once (v4).
    """
    given = {
        "generation": generation,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "length": length,
        "alibi": alibi,
    }
    command = [sys.executable, "-m", "aurora_jax.plan.attention_cycles", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"The attention kernels could not be compiled for {given}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(generation: str, heads: int, kv_heads: int, head_dim: int, length: int, alibi: bool = False) -> None:
    """Compiles the kernels and prints their cycles as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        )
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from aurora_jax.kernels.flash_attention import flash_attention
        from aurora_jax.kernels.flash_attention.blocks import blocks_for
        from aurora_jax.plan.topology import tpu_topology

        mesh = Mesh(np.array(tpu_topology(smallest_topology(generation)).devices)[:1], ("x",))

        def struct(heads):
            return jax.ShapeDtypeStruct(
                (1, heads, length, head_dim), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
            )

        def loss(q, k, v):
            slopes_H = jnp.full(heads, 0.5) if alibi else None
            return flash_attention(q, k, v, alibi_slopes=slopes_H, generation=generation).astype(jnp.float32).sum()

        jax.jit(jax.grad(loss, (0, 1, 2))).lower(struct(heads), struct(kv_heads), struct(kv_heads)).compile()
        kernels = dumped_kernels(Path(folder), generation)
        cycles = {}
        for direction in ("forward", "backward"):
            wide = -(-head_dim // 128) * 128
            sizes = blocks_for(direction, generation, jnp.bfloat16, wide, heads // kv_heads, length, length)
            blocks = next(blocks for name, blocks in kernels.items() if f"flash_attention_{direction}" in name)
            # A backward pass is one call for each part of the keys that stays in VMEM (`ops.py`).
            calls = -(-length // sizes.resident_keys) if direction == "backward" else 1
            for name, measure in ((direction, _CYCLES), (f"{direction} floor", FLOOR)):
                cycles[name] = (
                    kv_heads * causal_cycles(blocks, sizes, direction, heads // kv_heads, length, measure) // calls
                )
        print(json.dumps(cycles))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
