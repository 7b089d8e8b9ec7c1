"""Cycles of our flash attention and of JAX's splash attention and flash attention, in the schedules of the real TPU compiler.

    python benchmarks/flash_attention.py [--generations v5e v5p v6e] [--lengths 2048 8192] [--json FILE]

One causal layer of StarCoder: 48 query heads, one key/value head, head dimension 128, bf16, one sequence, one TensorCore. No TPU is needed:
`libtpu` compiles each kernel and dumps its final bundles; a bundle is a cycle. What runs how often is counted from the kernels' grids (each
function below says how). Left out, for all alike: stalls on DMA and on busy matrix units, and what XLA does around the kernels.

Splash attention takes the best of several tile sizes, for each generation, length and direction by itself. JAX's flash attention refuses
multi-query attention and gets keys and values repeated 48 times. Takes about a quarter of an hour on two cores.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
HEADS, HEAD_DIM = 48, 128
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SPLASH_TILES = ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024), (2048, 1024, 512), (1024, 2048, 512))
FLASH_TILES = (512, 1024)
TARGETS = {"v5e": 1.0, "v5p": 1.0, "v6e": 0.8}
SQUARE = 1024
KEYS_ONCE = 2 * HEAD_DIM * 2
"""Bytes of a key and a value."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: `tiles` are (queries, keys, keys of a product) of a peer; of ours, `blocks.Sizes`, or those of its table."""

    side: str
    generation: str
    length: int
    direction: str
    tiles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cycles:
    """Cycles of 1,024 x 1,024 scores of a head, far from the diagonal and on it, and of the layer; bytes to and from HBM."""

    full: float
    diagonal: float
    layer: float
    key_bytes: float
    """Of keys and values, read."""
    all_bytes: float
    """Read and written by the kernel, statistics of rows left out."""


# ------------------------------------------------------------------------------------------------ What is compiled, in a process of its own


def program(job: Job):
    """(function, arguments) of a job, for one chip."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from aurora_jax.plan.topology import tpu_topology

    mesh = Mesh(np.array(tpu_topology(TOPOLOGIES[job.generation]).devices)[:1], ("x",))
    L, C = job.length, HEAD_DIM

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def run(function, *arguments):
        function = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        if job.direction == "backward":
            forward = function
            places = tuple(range(len(arguments)))

            def function(*arguments):
                return jax.grad(lambda *inner: forward(*inner).astype(jnp.float32).sum(), places)(*arguments)

        return function, arguments

    if job.side == "ours":
        from aurora_jax.kernels.flash_attention import flash_attention

        blocks = our_blocks(job, "forward"), our_blocks(job, "backward")

        def ours(q, k, v):
            return flash_attention(q, k, v, generation=job.generation, blocks=blocks)

        return run(ours, struct(1, HEADS, L, C), struct(1, 1, L, C), struct(1, 1, L, C))

    queries, keys, at_once = job.tiles
    if job.side == "splash":
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        sizes = splash_attention_kernel.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=at_once,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=at_once,
            use_fused_bwd_kernel=True,
        )
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L, L))] * HEADS)
        splash = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
        return run(splash, struct(HEADS, L, C), struct(L, C), struct(L, C))

    from jax.experimental.pallas.ops.tpu import flash_attention as peer

    sizes = peer.BlockSizes(
        block_q=queries,
        block_k_major=keys,
        block_k=at_once,
        block_b=1,
        block_q_major_dkv=queries,
        block_k_major_dkv=keys,
        block_k_dkv=at_once,
        block_q_dkv=queries,
        block_k_major_dq=keys,
        block_k_dq=at_once,
        block_q_dq=queries,
    )

    def flash(q, k, v):
        return peer.flash_attention(q, k, v, causal=True, sm_scale=C**-0.5, block_sizes=sizes)

    return run(flash, *[struct(1, HEADS, L, C)] * 3)


def our_blocks(job: Job, direction: str):
    """Sizes of our kernel's tiles: the job's own for its direction, if it has any."""
    import jax.numpy as jnp

    from aurora_jax.kernels.flash_attention.blocks import Sizes, blocks_for

    sizes = Sizes(*job.tiles) if job.tiles and direction == job.direction else None
    return blocks_for(direction, job.generation, jnp.bfloat16, HEAD_DIM, HEADS, job.length, job.length, sizes)


def worker(job: Job) -> None:
    """Compiles one job and prints the basic blocks of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true")
        import jax

        from aurora_jax.kernels.schedule import dumped_kernels

        function, arguments = program(job)
        jax.jit(function).lower(*arguments).compile()
        print(json.dumps({name: [asdict(block) for block in blocks] for name, blocks in dumped_kernels(Path(folder)).items()}))


# ------------------------------------------------------------------------------------------------ How often each block runs


def count_ours(job: Job, kernels: dict) -> Cycles:
    """As `aurora_jax.plan.attention_cycles` counts."""
    from aurora_jax.plan.attention_cycles import causal_cycles, tile_cycles

    sizes = our_blocks(job, job.direction)
    blocks = kernels[next(name for name in kernels if f"flash_attention_{job.direction}" in name)]
    whole, tails, *_ = tile_cycles(blocks, sizes, job.direction)
    per_chunk = sizes.keys // sizes.queries

    def visit(keys: int) -> int:
        chunks = (keys // sizes.queries - 1) // per_chunk
        return chunks * whole + tails[keys // sizes.queries - chunks * per_chunk - 1]

    corner = sum(visit(keys) for keys in range(sizes.queries, SQUARE + 1, sizes.queries)) / sizes.heads
    assert sizes.resident_keys >= job.length, "keys that are read in parts are not counted here"
    # Keys and values stay in VMEM for all tiles of their head.
    full = whole * SQUARE**2 / (sizes.rows * sizes.keys)
    layer = causal_cycles(blocks, sizes, job.direction, HEADS, job.length)
    return Cycles(full, corner, layer, KEYS_ONCE * job.length, bytes_of(job, queries=job.length, keys=job.length, gradients=job.length))


def count_splash(job: Job, kernels: dict) -> Cycles:
    """Blocks with products run for each tile that the mask does not skip; guarded ones once a tile of outputs, others each grid step."""
    queries, keys, _ = job.tiles
    blocks = kernels[next(name for name in kernels if ("fwd" if job.direction == "forward" else "dkv") in name)]
    tile = sum(block.bundles for block in blocks if block.products)
    others = [block for block in blocks if not block.products and block.depth]
    guarded = sum(block.bundles for block in others if block.guards >= 2)
    each = sum(block.bundles for block in others) - guarded
    rows, columns = job.length // queries, job.length // keys
    visited = sum(-(-(row + 1) * queries // keys) for row in range(rows))
    # Forward: an output tile is a head's tile of queries. Backward: the heads' sums for a tile of keys.
    outputs = HEADS * rows if job.direction == "forward" else columns
    layer = HEADS * (visited * tile + rows * columns * each) + outputs * guarded
    scaled = tile * SQUARE**2 / (queries * keys)
    if job.direction == "forward":
        read = HEADS * copies(rows, queries, keys) * keys
        return Cycles(scaled, corner(job, tile), layer, KEYS_ONCE * read, bytes_of(job, queries=job.length, keys=read, gradients=0))
    # Backward: tiles of keys are outermost, so that each is read once; queries are read, and a part of their gradient written, for each.
    written = columns * job.length
    return Cycles(
        scaled,
        corner(job, tile),
        layer,
        KEYS_ONCE * job.length,
        bytes_of(job, queries=visited * queries, keys=job.length, gradients=written),
    )


def corner(job: Job, tile: int) -> float:
    """Cycles of the square on the diagonal: of its tiles that the mask does not skip."""
    queries, keys, _ = job.tiles
    if max(queries, keys) > SQUARE:
        return tile * SQUARE**2 / (queries * keys)
    return tile * sum(-(-(row + 1) * queries // keys) for row in range(SQUARE // queries))


def copies(rows: int, queries: int, keys: int) -> int:
    """Tiles of keys that are copied for a head: one that the step before used already is not copied again."""
    visits = [column for row in range(rows) for column in range(-(-(row + 1) * queries // keys))]
    return max(sum(visits[place] != visits[place - 1] for place in range(len(visits))), 1)


def bytes_of(job: Job, *, queries: int, keys: int, gradients: int) -> float:
    """Bytes to and from HBM, given the places of queries, keys and query gradients that are copied (for each head but the keys)."""
    row = HEADS * HEAD_DIM * 2
    if job.direction == "forward":
        return row * (queries + job.length) + KEYS_ONCE * keys
    return row * (2 * queries + gradients) + KEYS_ONCE * (keys + job.length)


def count_flash(job: Job, kernels: dict) -> Cycles:
    """Tiles are square; each kernel's blocks with products run once a tile at or below the diagonal, the others each grid step."""
    queries, keys, _ = job.tiles
    wanted = [blocks for name, blocks in kernels.items() if ("bwd" in name) == (job.direction == "backward")]
    tile = sum(block.bundles for blocks in wanted for block in blocks if block.products)
    others = [block for blocks in wanted for block in blocks if not block.products and block.depth]
    guarded = sum(block.bundles for block in others if block.guards >= 2)
    each = sum(block.bundles for block in others) - guarded
    rows, columns = job.length // queries, job.length // keys
    visited = sum(-(-(row + 1) * queries // keys) for row in range(rows))
    scaled = tile * SQUARE**2 / (queries * keys)
    layer = HEADS * (visited * tile + rows * columns * each + rows * guarded)
    # Backward: its first kernel reads keys as the forward one does, its second reads each once a head.
    read = HEADS * (copies(rows, queries, keys) * keys + (job.length if job.direction == "backward" else 0))
    return Cycles(scaled, corner(job, tile), layer, KEYS_ONCE * read, float("nan"))


COUNT = {"ours": count_ours, "splash": count_splash, "JAX flash": count_flash}


def measure(job: Job) -> Cycles | None:
    """Cycles of a job; None if the compiler refuses its tiles (VMEM)."""
    done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(asdict(job))], capture_output=True, text=True, check=False)
    if done.returncode:
        if job.side == "ours" and not job.tiles:
            raise RuntimeError(f"{job}: {done.stderr[-2000:]}")
        return None
    from aurora_jax.kernels.schedule import BasicBlock

    kernels = {name: [BasicBlock(**block) for block in blocks] for name, blocks in json.loads(done.stdout.splitlines()[-1]).items()}
    return COUNT[job.side](job, kernels)


@dataclass(frozen=True)
class Benchmark:
    """Cycles of flash attention kernels, ours and JAX's, side by side."""

    generations: tuple[str, ...] = ("v5e", "v5p", "v6e")
    """Of TPU: v5e, v5p, v6e."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Sequence lengths."""
    json: Path | None = None
    """Write every figure that has a target to this file."""


def main(benchmark: Benchmark) -> None:
    cases = [
        (generation, length, direction)
        for generation in benchmark.generations
        for length in benchmark.lengths
        for direction in ("forward", "backward")
    ]
    jobs = []
    for case in cases:
        jobs.append(Job("ours", *case))
        jobs += [Job("splash", *case, tiles) for tiles in SPLASH_TILES if max(tiles) <= case[1]]
        jobs += [Job("JAX flash", *case, (size, size, size)) for size in FLASH_TILES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(jobs, track(pool.map(measure, jobs), total=len(jobs), description="compiling"), strict=True))

    table = Table(title="cycles: 1,024 x 1,024 scores of a head, and a layer", caption="tiles of the peers: queries/keys/keys of a product")
    for column in ("case", "kernel", "full tile", "diagonal", "layer", "of splash", "K/V read", "all bytes"):
        table.add_column(column, no_wrap=True)
    figures = []
    for case in cases:
        best = {}
        for side in COUNT:
            candidates = [
                (cycles.layer, job.tiles, cycles)
                for job, cycles in found.items()
                if job.side == side and (job.generation, job.length, job.direction) == case and cycles
            ]
            if candidates:
                best[side] = min(candidates, key=lambda candidate: candidate[0])
        for side, (_, tiles, cycles) in best.items():
            ratio = cycles.layer / best["splash"][0]
            table.add_row(
                " ".join(map(str, case)) if side == "ours" else "",
                side + (f" {'/'.join(map(str, tiles))}" if tiles else ""),
                f"{cycles.full:,.0f}",
                f"{cycles.diagonal:,.0f}",
                f"{cycles.layer / 1e6:,.3f} M",
                f"{ratio:.2f}x",
                f"{cycles.key_bytes / 2**20:,.0f} MiB",
                "" if math.isnan(cycles.all_bytes) else f"{cycles.all_bytes / 2**20:,.0f} MiB",
            )
        ours, splash = best["ours"][2], best["splash"][2]
        limit = TARGETS[case[0]]
        for what, unit, target in (
            ("full", "cycles", limit),
            ("diagonal", "cycles", limit),
            ("layer", "cycles", limit),
            ("key_bytes", "bytes", 1 / 6),
            ("all_bytes", "bytes", 1.0),
        ):
            mine, theirs = getattr(ours, what), getattr(splash, what)
            ratio = mine / theirs
            name = f"flash attention {' '.join(map(str, case))} {what}"
            figures.append(
                {"name": name, "ours": mine, "peer": theirs, "unit": unit, "ratio": ratio, "target": target, "met": ratio <= target}
            )
        table.add_section()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    missed = [figure["name"] for figure in figures if not figure["met"]]
    console.print(f"{len(figures) - len(missed)} of {len(figures)} targets met" + (f"; missed: {', '.join(missed)}" if missed else ""))
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Job(**{name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(sys.argv[2]).items()}))
    else:
        main(tyro.cli(Benchmark))
