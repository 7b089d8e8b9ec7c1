"""Cycles of our flash attention, of tokamax's and JAX's splash attention and of JAX's flash attention, by the
TPU compiler's schedules.

    python benchmarks/flash_attention.py [--generations v5e v5p v6e] [--lengths 2048 8192] [--json FILE]
    python benchmarks/flash_attention.py --tokamax-python PYTHON      # tokamax compiled anew, not taken from the table

One causal layer of StarCoder: 48 query heads, one key/value head, head dimension 128, bf16, one sequence, one
TensorCore. No TPU is needed:
`libtpu` compiles each kernel and dumps its final bundles. A basic block counts its bundles, a cycle each, or
what its products take at the published peak of the matrix units, whichever is more; "floor" is the latter
alone. What runs how often is counted from the kernels' grids (each function below says how). Left out, for
all alike: stalls on DMA, and what XLA does around the kernels.

The peers take the best of several tile sizes, for each generation, length and direction by itself: candidates
are compiled at the shortest length, the best again at the others. JAX's flash attention refuses multi-query
attention and gets keys and values repeated 48 times. PYTHON is an interpreter with tokamax==0.0.12 and
jax[tpu]==0.10.2. Takes about a quarter of an hour on two cores, with tokamax half an hour.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

import tyro
from flash_attention_kernels import HEAD_DIM, HEADS, ROOT, Job, our_blocks
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(ROOT))

from aurora_jax.plan.attention_cycles import causal_cycles, tile_cycles
from aurora_jax.plan.schedule import BasicBlock

SPLASH_TILES = ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024), (2048, 1024, 512), (1024, 2048, 512))
TOKAMAX_TILES = ((512, 512, 512), (512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024), (1024, 2048, 512))
TOKAMAX_OPTIONS = {
    "forward": (
        (),
        ("scheduler",),
        ("scheduler", "k_layout"),
        ("scheduler", "v_layout"),
        ("scheduler", "k_layout", "v_layout"),
    ),
    "backward": ((),),
}
"""Its scheduler is of its forward kernel."""
FLASH_TILES = (512, 1024)
TARGETS = {"v5e": 1.0, "v5p": 1.0, "v6e": 0.8}
"""Of splash attention."""
TOKAMAX_TARGETS = {"forward": 0.9, "backward": 1.0}
FLOOR_TARGET = 1.12
"""Of the floor, forward on v6e."""
SQUARE = 1024
KEYS_ONCE = 2 * HEAD_DIM * 2
"""Bytes of a key and a value."""


@dataclass(frozen=True)
class Cycles:
    """Cycles of 1,024 x 1,024 scores of a head, far from the diagonal and on it, and of the layer; bytes to
    and from HBM."""

    full: float
    diagonal: float
    layer: float
    key_bytes: float
    """Of keys and values, read."""
    all_bytes: float
    """Read and written by the kernel, statistics of rows left out."""
    bundles: float = 0.0
    """Of the layer: without the time of products."""
    floor: float = 0.0
    """Of the layer: products alone, at the published peak."""


RECORDED: dict[tuple[str, int, str], tuple[tuple[int, ...], tuple[str, ...], Cycles]] = {
    ("v5e", 2048, "forward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=4756.0,
            diagonal=4952,
            layer=819696,
            key_bytes=50331648,
            all_bytes=100663296,
            bundles=819696,
            floor=589824,
        ),
    ),
    ("v5e", 2048, "backward"): (
        (512, 512, 512),
        (),
        Cycles(
            full=10240.0,
            diagonal=7680,
            layer=1387828,
            key_bytes=1048576,
            all_bytes=228589568,
            bundles=1311124,
            floor=1228800,
        ),
    ),
    ("v5e", 8192, "forward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=4756.0,
            diagonal=4952,
            layer=8802816,
            key_bytes=880803840,
            all_bytes=1082130432,
            bundles=8802816,
            floor=7077888,
        ),
    ),
    ("v5e", 8192, "backward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=10240.0,
            diagonal=10240,
            layer=19086432,
            key_bytes=4194304,
            all_bytes=1719664640,
            bundles=17498592,
            floor=17694720,
        ),
    ),
    ("v5p", 2048, "forward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=4725.0,
            diagonal=4923,
            layer=827184,
            key_bytes=50331648,
            all_bytes=100663296,
            bundles=827184,
            floor=589824,
        ),
    ),
    ("v5p", 2048, "backward"): (
        (512, 512, 512),
        (),
        Cycles(
            full=10240.0,
            diagonal=7680,
            layer=1456180,
            key_bytes=1048576,
            all_bytes=228589568,
            bundles=1365940,
            floor=1228800,
        ),
    ),
    ("v5p", 8192, "forward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=4725.0,
            diagonal=4923,
            layer=8873280,
            key_bytes=880803840,
            all_bytes=1082130432,
            bundles=8873280,
            floor=7077888,
        ),
    ),
    ("v5p", 8192, "backward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=10240.0,
            diagonal=10240,
            layer=19200096,
            key_bytes=4194304,
            all_bytes=1719664640,
            bundles=17545248,
            floor=17694720,
        ),
    ),
    ("v6e", 2048, "forward"): (
        (1024, 1024, 512),
        ("scheduler", "k_layout", "v_layout"),
        Cycles(
            full=2502.0,
            diagonal=2681,
            layer=462192,
            key_bytes=50331648,
            all_bytes=100663296,
            bundles=462192,
            floor=294912,
        ),
    ),
    ("v6e", 2048, "backward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=5470.0,
            diagonal=5614,
            layer=854008,
            key_bytes=1048576,
            all_bytes=127926272,
            bundles=854008,
            floor=737280,
        ),
    ),
    ("v6e", 8192, "forward"): (
        (1024, 1024, 512),
        ("scheduler", "k_layout"),
        Cycles(
            full=2501.0,
            diagonal=2690,
            layer=4809600,
            key_bytes=880803840,
            all_bytes=1082130432,
            bundles=4809600,
            floor=3538944,
        ),
    ),
    ("v6e", 8192, "backward"): (
        (1024, 1024, 512),
        (),
        Cycles(
            full=5470.0,
            diagonal=5614,
            layer=10532320,
            key_bytes=4194304,
            all_bytes=1719664640,
            bundles=10532320,
            floor=8847360,
        ),
    ),
}
"""Tokamax 0.0.12 at its best tiles and options, as `--tokamax-python` found them on 2026-11-25 with jax
0.10.2 and libtpu 0.0.42.1."""


# ------------------------------------------------------------------------------------------------ How often
# each block runs

Measure = Callable[[BasicBlock], int]


def count_ours(job: Job, length: int, kernels: dict[str, list[BasicBlock]], measure: Measure) -> Cycles:
    """As `aurora_jax.plan.attention_cycles` counts."""
    sizes = our_blocks(replace(job, length=length), job.direction)
    blocks = kernels[next(name for name in kernels if f"flash_attention_{job.direction}" in name)]
    whole, tails, *_ = tile_cycles(blocks, sizes, job.direction, measure)
    per_chunk = sizes.keys // sizes.queries

    def visit(keys: int) -> int:
        chunks = (keys // sizes.queries - 1) // per_chunk
        return chunks * whole + tails[keys // sizes.queries - chunks * per_chunk - 1]

    corner = sum(visit(keys) for keys in range(sizes.queries, SQUARE + 1, sizes.queries)) / sizes.heads
    assert sizes.resident_keys >= length, "keys that are read in parts are not counted here"
    # Keys and values stay in VMEM for all tiles of their head.
    full = whole * SQUARE**2 / (sizes.rows * sizes.keys)
    layer = causal_cycles(blocks, sizes, job.direction, HEADS, length, measure)
    return Cycles(
        full, corner, layer, KEYS_ONCE * length, bytes_of(job, length, queries=length, keys=length, gradients=length)
    )


def count_splash(job: Job, length: int, kernels: dict[str, list[BasicBlock]], measure: Measure) -> Cycles:
    """Blocks with products run for each tile that the mask does not skip; guarded ones once a tile of
    outputs, others each grid step.

    Tokamax has a block for tiles that need no mask and one for those that do, and forward a grid without the
    tiles that are skipped.
    """
    queries, keys, _ = job.tiles
    blocks = kernels[next(name for name in kernels if ("fwd" if job.direction == "forward" else "dkv") in name)]
    *unmasked, masked = [measure(block) for block in blocks if block.products]
    assert len(unmasked) == (job.side == "tokamax"), "a splash attention kernel of another structure"
    tile = unmasked[0] if unmasked else masked
    others = [block for block in blocks if not block.products and block.depth]
    guarded = sum(measure(block) for block in others if block.guards >= 2)
    each = sum(map(measure, others)) - guarded
    rows, columns = length // queries, length // keys
    visited = sum(-(-(row + 1) * queries // keys) for row in range(rows))
    crossed = visited - sum(row * queries // keys for row in range(rows))
    steps = visited if job.side == "tokamax" and job.direction == "forward" else rows * columns
    # Forward: an output tile is a head's tile of queries. Backward: the heads' sums for a tile of keys.
    outputs = HEADS * rows if job.direction == "forward" else columns
    layer = HEADS * ((visited - crossed) * tile + crossed * masked + steps * each) + outputs * guarded
    scaled, diagonal = tile * SQUARE**2 / (queries * keys), corner(job, tile, masked)
    if job.direction == "forward":
        read = HEADS * copies(rows, queries, keys) * keys
        return Cycles(
            scaled, diagonal, layer, KEYS_ONCE * read, bytes_of(job, length, queries=length, keys=read, gradients=0)
        )
    # Backward: tiles of keys are outermost, so that each is read once; queries are read, and a part of their
    # gradient written, for each.
    everything = bytes_of(job, length, queries=visited * queries, keys=length, gradients=columns * length)
    return Cycles(scaled, diagonal, layer, KEYS_ONCE * length, everything)


def corner(job: Job, tile: int, masked: int) -> float:
    """Cycles of the square on the diagonal: of its tiles that the mask does not skip."""
    queries, keys, _ = job.tiles
    if max(queries, keys) > SQUARE:
        return masked * SQUARE**2 / (queries * keys)
    rows = range(SQUARE // queries)
    visited, whole = sum(-(-(row + 1) * queries // keys) for row in rows), sum(row * queries // keys for row in rows)
    return whole * tile + (visited - whole) * masked


def copies(rows: int, queries: int, keys: int) -> int:
    """Tiles of keys that are copied for a head: one that the step before used already is not copied again."""
    visits = [column for row in range(rows) for column in range(-(-(row + 1) * queries // keys))]
    return max(sum(visits[place] != visits[place - 1] for place in range(len(visits))), 1)


def bytes_of(job: Job, length: int, *, queries: int, keys: int, gradients: int) -> float:
    """Bytes to and from HBM, given the places of queries, keys and query gradients that are copied (for each
    head but the keys)."""
    row = HEADS * HEAD_DIM * 2
    if job.direction == "forward":
        return row * (queries + length) + KEYS_ONCE * keys
    return row * (2 * queries + gradients) + KEYS_ONCE * (keys + length)


def count_flash(job: Job, length: int, kernels: dict[str, list[BasicBlock]], measure: Measure) -> Cycles:
    """Tiles are square; each kernel's blocks with products run once a tile at or below the diagonal, the
    others each grid step."""
    queries, keys, _ = job.tiles
    wanted = [blocks for name, blocks in kernels.items() if ("bwd" in name) == (job.direction == "backward")]
    tile = sum(measure(block) for blocks in wanted for block in blocks if block.products)
    others = [block for blocks in wanted for block in blocks if not block.products and block.depth]
    guarded = sum(measure(block) for block in others if block.guards >= 2)
    each = sum(map(measure, others)) - guarded
    rows, columns = length // queries, length // keys
    visited = sum(-(-(row + 1) * queries // keys) for row in range(rows))
    scaled = tile * SQUARE**2 / (queries * keys)
    layer = HEADS * (visited * tile + rows * columns * each + rows * guarded)
    # Backward: its first kernel reads keys as the forward one does, its second reads each once a head.
    read = HEADS * (copies(rows, queries, keys) * keys + (length if job.direction == "backward" else 0))
    return Cycles(scaled, corner(job, tile, tile), layer, KEYS_ONCE * read, float("nan"))


COUNT = {"ours": count_ours, "tokamax": count_splash, "splash": count_splash, "JAX flash": count_flash}


def count(job: Job, length: int, kernels: dict[str, list[BasicBlock]]) -> Cycles:
    """What a job's kernels take at a length: every block its bundles or its products, whichever is more."""
    found, bundles, floor = (
        COUNT[job.side](job, length, kernels, attrgetter(name)) for name in ("cycles", "bundles", "matrix_cycles")
    )
    assert found.layer >= max(bundles.layer, floor.layer)
    assert found.full >= floor.full
    return replace(found, bundles=bundles.layer, floor=floor.layer)


# ------------------------------------------------------------------------------------------------ Compiling
# and printing


def compiled(jobs: list[Job], python: Path) -> list[dict[str, list[BasicBlock]] | None]:
    """The kernels of each job, None where the compiler refuses its tiles (VMEM)."""
    script = Path(__file__).with_name("flash_attention_kernels.py")
    done = subprocess.run(
        [python, script, json.dumps([asdict(job) for job in jobs])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{jobs}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "null"))]
    return [
        line and {name: [BasicBlock(**block) for block in blocks] for name, blocks in line.items()}
        for line in lines[-len(jobs) :]
    ]


def measure(job: Job) -> Cycles | None:
    """Cycles of a job at its own length; None if the compiler refuses its tiles."""
    (kernels,) = compiled([job], Path(sys.executable))
    return kernels and count(job, job.length, kernels)


@dataclass(frozen=True)
class Benchmark:
    """Cycles of flash attention kernels, ours, tokamax's and JAX's, side by side."""

    generations: tuple[str, ...] = ("v5e", "v5p", "v6e")
    """Of TPU: v5e, v5p, v6e."""
    lengths: tuple[int, ...] = (2048, 8192)
    """Sequence lengths."""
    tokamax_python: Path | None = None
    """An interpreter with tokamax, to compile its kernels; without it, its figures are those of the table in
    this script."""
    json: Path | None = None
    """Write every figure that has a target to this file."""


Case = tuple[str, int, str]
Found = dict[str, tuple[Job, Cycles]]


def candidates(side: str, case: Case, benchmark: Benchmark) -> list[Job]:
    """What a side is tried with for a case, if it fits its length."""
    _, length, direction = case
    if side == "ours":
        return [Job(side, *case)]
    if side == "JAX flash":
        return [Job(side, *case, (size, size, size)) for size in FLASH_TILES]
    if side == "splash":
        return [Job(side, *case, tiles) for tiles in SPLASH_TILES if max(tiles) <= length]
    if benchmark.tokamax_python is None:
        return []
    return [
        Job(side, *case, tiles, options)
        for tiles in TOKAMAX_TILES
        if max(tiles) <= length
        for options in TOKAMAX_OPTIONS[direction]
    ]


def all_found(benchmark: Benchmark, cases: list[Case]) -> dict[Case, Found]:
    """The best of every side for every case."""
    shortest = min(benchmark.lengths)
    kernels: dict[Job, dict[str, list[BasicBlock]] | None] = {}

    def compile_all(jobs: list[Job]) -> None:
        batches = []
        for side in COUNT:
            own = [job for job in dict.fromkeys(jobs) if job.side == side and job not in kernels]
            batches += [own[place : place + 6] for place in range(0, len(own), 6)]

        def run(batch: list[Job]):
            return compiled(
                batch, (benchmark.tokamax_python if batch[0].side == "tokamax" else None) or Path(sys.executable)
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for batch, found in zip(
                batches, track(pool.map(run, batches), total=len(batches), description="compiling"), strict=True
            ):
                kernels.update(zip(batch, found, strict=True))

    tried = {(case, side): candidates(side, case, benchmark) for case in cases for side in COUNT}
    compile_all([replace(job, length=shortest) if job.tiles else job for jobs in tried.values() for job in jobs])
    best: dict[Case, Found] = {case: {} for case in cases}
    for (case, side), jobs in tried.items():
        counted = [(job, kernels[replace(job, length=shortest) if job.tiles else job]) for job in jobs]
        fitting = [(job, count(job, case[1], found)) for job, found in counted if found]
        if fitting:
            best[case][side] = min(fitting, key=lambda each: each[1].layer)
    again = [job for found in best.values() for job, _ in found.values() if job not in kernels]
    compile_all(again)
    for case, found in best.items():
        for side, (job, _) in found.items():
            own = kernels[job]
            assert own is not None, f"{job} fits at {shortest} and not at its own length"
            found[side] = job, count(job, case[1], own)
        if "tokamax" not in found and case in RECORDED:
            tiles, options, cycles = RECORDED[case]
            found["tokamax"] = Job("tokamax", *case, tiles, options), cycles
    return best


def figures_of(case: Case, found: Found) -> list[dict]:
    """Every figure that has a target."""
    figures = []

    def figure(what: str, unit: str, ours: float, peer: float, target: float) -> None:
        name, ratio = f"flash attention {' '.join(map(str, case))} {what}", ours / peer
        figures.append(
            {
                "name": name,
                "ours": ours,
                "peer": peer,
                "unit": unit,
                "ratio": ratio,
                "target": target,
                "met": ratio <= target,
            }
        )

    ours, splash = found["ours"][1], found["splash"][1]
    for what in ("full", "diagonal", "layer"):
        figure(f"{what} of splash", "cycles", getattr(ours, what), getattr(splash, what), TARGETS[case[0]])
    figure("key bytes of splash", "bytes", ours.key_bytes, splash.key_bytes, 1 / 6)
    figure("all bytes of splash", "bytes", ours.all_bytes, splash.all_bytes, 1.0)
    if "tokamax" in found:
        figure("layer of tokamax", "cycles", ours.layer, found["tokamax"][1].layer, TOKAMAX_TARGETS[case[2]])
    if case[0] == "v6e" and case[2] == "forward":
        figure("layer of the floor", "cycles", ours.layer, ours.floor, FLOOR_TARGET)
    return figures


def main(benchmark: Benchmark) -> None:
    directions = ("forward", "backward")
    cases = [
        (name, length, direction)
        for name in benchmark.generations
        for length in benchmark.lengths
        for direction in directions
    ]
    best = all_found(benchmark, cases)
    table = Table(
        title="cycles: 1,024 x 1,024 scores of a head, and a layer",
        caption="tiles of the peers: queries/keys/keys of a product",
    )
    columns = (
        "case",
        "kernel",
        "full tile",
        "diagonal",
        "layer",
        "bundles",
        "floor",
        "of floor",
        "of splash",
        "of tokamax",
        "K/V read",
        "all bytes",
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    figures = []
    for case, found in best.items():
        for side in [side for side in COUNT if side in found]:
            job, cycles = found[side]
            ratios = [
                f"{cycles.layer / found[peer][1].layer:.2f}x" if peer in found else "" for peer in ("splash", "tokamax")
            ]
            table.add_row(
                " ".join(map(str, case)) if side == "ours" else "",
                " ".join([side, "/".join(map(str, job.tiles)), *job.options]),
                f"{cycles.full:,.0f}",
                f"{cycles.diagonal:,.0f}",
                *(f"{value / 1e6:,.3f} M" for value in (cycles.layer, cycles.bundles, cycles.floor)),
                f"{cycles.layer / cycles.floor:.2f}x",
                *ratios,
                f"{cycles.key_bytes / 2**20:,.0f} MiB",
                "" if math.isnan(cycles.all_bytes) else f"{cycles.all_bytes / 2**20:,.0f} MiB",
            )
        figures += figures_of(case, found)
        table.add_section()
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table)
    missed = [figure["name"] for figure in figures if not figure["met"]]
    console.print(
        f"{len(figures) - len(missed)} of {len(figures)} targets met"
        + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    if benchmark.tokamax_python is not None:
        console.print("tokamax, for RECORDED in this script:")
        for case, found in best.items():
            job, cycles = found["tokamax"]
            print(f"    {case!r}: ({job.tiles!r}, {job.options!r}, {cycles!r}),")
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
