"""Chooses the tile sizes of `aurora_jax/kernels/flash_attention/blocks.py`: candidates ranked by the cycles
of a causal layer.

    python benchmarks/flash_attention_blocks.py --generation v6e --direction forward [--length 8192]

Cycles are those of `flash_attention.py`, for 48 query heads on one key/value head. The seconds are those of
compiling, which a user waits for too: of two candidates within a few percent, the table takes the one that
compiles faster. Candidates that do not fit are left out.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Literal

import tyro
from flash_attention import Cycles, measure
from flash_attention_kernels import Job
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aurora_jax.chips import CHIPS
from aurora_jax.kernels.flash_attention.blocks import SIZES, Sizes


@dataclass(frozen=True)
class Search:
    """Ranks tile sizes for one generation and direction."""

    generation: Literal["v5e", "v5p", "v6e"] = "v6e"
    """TPU generation."""
    direction: Literal["forward", "backward"] = "forward"
    """Which kernel."""
    length: int = 8192
    """Sequence length."""
    rows: tuple[int, ...] = (1024, 2048)
    """Candidates for the rows of a tile."""
    keys: tuple[int, ...] = (512, 1024)
    """Candidates for the keys of a chunk."""
    rows_at_once: tuple[int, ...] = (256, 512, 1024)
    """Candidates for the rows of a matrix product."""
    keys_at_once: tuple[int, ...] = (256, 512)
    """Candidates for the keys of a matrix product."""


def main(search: Search) -> None:
    """Compiles every candidate, two at a time on two cores, and prints them, best first."""
    candidates = list(product(search.rows, search.keys, search.rows_at_once, search.keys_at_once))
    candidates = [sizes for sizes in candidates if sizes[2] <= sizes[0] and sizes[3] <= sizes[1]]

    def timed(sizes: tuple[int, ...]) -> tuple[Cycles | None, float]:
        begun = time.monotonic()
        return measure(Job("ours", search.generation, search.length, search.direction, sizes)), time.monotonic() - begun

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(track(pool.map(timed, candidates), total=len(candidates), description="compiling"))
    found = [
        (cycles, seconds, sizes)
        for (cycles, seconds), sizes in zip(results, candidates, strict=True)
        if cycles is not None
    ]
    found.sort(key=lambda each: each[0].layer)
    title = f"{search.direction} on {search.generation}, {search.length} tokens; * is in the table"
    table = Table(
        "rows", "keys", "rows at once", "keys at once", "layer, M cycles", "full tile", "compiling, s", title=title
    )
    chosen = SIZES[search.direction, CHIPS[search.generation].matrix_columns]
    for cycles, seconds, sizes in found:
        mark = "*" if Sizes(*sizes) == chosen else ""
        table.add_row(*map(str, sizes), f"{cycles.layer / 1e6:.3f}{mark}", f"{cycles.full:,.0f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Search))
