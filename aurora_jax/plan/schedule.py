"""Cycles of Pallas TPU kernels, read from the bundles that the TPU compiler schedules, on a machine without a TPU.

A TensorCore issues one VLIW bundle a cycle, and the compiler issues products faster than the matrix units' published
peak: a basic block takes its bundles or the time of its products at that peak, whichever is more. Stalls on
DMA are left
out: it is a lower bound.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from aurora_jax.chips import CHIPS
from aurora_jax.errors import InputError

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*([> ]*)\{(.*)")
_BRANCH = re.compile(r"sbr\.rel \((!?)%\w+\) target = \$region(\d+)")
_REGION_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_OPERATION = re.compile(r"(?:^|= |;;  |\{ )(v[a-z]+[0-9]*)\b")
_PRODUCT = re.compile(r"\bvmatmul\S*")
_PRODUCT_PARTS = re.compile(r"vmatmul\.(?:(?!lmr)[a-z]+\.)*(bf16|f32|lmr\.bf16)(?:\.[a-z0-9]+)*\.mxu(\d)")
_ROWS = {"bf16": 16, "f32": 8, "lmr.bf16": 8}
"""Of the operand that a vmatmul streams: those of one vector register, 8 sublanes of 32 bits, and half of
that where the operand is transposed on the way (v5e). From products of known shapes."""


@dataclass
class BasicBlock:
    """A run of bundles that is entered at its top and left at its end."""

    bundles: int
    """Its length, in cycles."""
    depth: int
    """Loops around it: 1 in the body of the grid, 2 in a loop of the kernel's own."""
    guards: int
    """Forward branches that can jump over it."""
    operations: dict[str, int]
    """How many of each vector operation (vmatmul, vpow2, vld ...) it has."""
    matrix_cycles: int
    """What its products take at the published peak, in cycles of the matrix unit that has most of them."""

    @property
    def products(self) -> int:
        return self.operations.get("vmatmul", 0)

    @property
    def cycles(self) -> int:
        """What it takes at least: neither its bundles nor its products can be faster."""
        return max(self.bundles, self.matrix_cycles)


def rows_of_products(text: str) -> Counter[str]:
    """Rows that the vmatmuls of some bundles stream through each matrix unit; a product in fp32 is several of them.

    Raises:
        InputError: a vmatmul of a type whose rows are not known here.
    """
    rows: Counter[str] = Counter()
    for operation in _PRODUCT.findall(text):
        parts = _PRODUCT_PARTS.fullmatch(operation)
        if parts is None:
            raise InputError(
                f"The schedule of a kernel has {operation}: how many rows it takes is not known ({__name__})."
            )
        rows[parts[2]] += _ROWS[parts[1]]
    return rows


def basic_blocks(path: Path, generation: str) -> list[BasicBlock]:
    """Basic blocks, in order, of one `*final_bundles.txt` as dumped with `--xla_jf_dump_to` and
    `--xla_jf_dump_llo_text`."""
    lines = [match.groups() for match in map(_BUNDLE.match, path.read_text().splitlines()) if match]
    targets: dict[str, int] = {}
    for place, (_, marker, _, text) in enumerate(lines):
        for region in _REGION_START.findall(text):
            if marker:
                targets.setdefault(region, place)
    jumps = []
    for place, (_, _, _, text) in enumerate(lines):
        for _, region in _BRANCH.findall(text):
            if region in targets:
                jumps.append((place, targets[region]))
    cuts = {0, len(lines)} | {place for place, line in enumerate(lines) if line[1]} | {place + 1 for place, _ in jumps}
    starts = sorted(cuts)
    blocks = []
    for start, end in pairwise(starts):
        operations = dict(Counter(operation for line in lines[start:end] for operation in _OPERATION.findall(line[3])))
        depth = max(line[2].count(">") for line in lines[start:end])
        guards = sum(place < start and end <= target for place, target in jumps)
        rows = rows_of_products("\n".join(line[3] for line in lines[start:end]))
        matrix_cycles = -(-max(rows.values(), default=0) // CHIPS[generation].rows_per_cycle)
        blocks.append(BasicBlock(end - start, depth, guards, operations, matrix_cycles))
    return blocks


def dumped_kernels(folder: Path, generation: str) -> dict[str, list[BasicBlock]]:
    """The basic blocks of every kernel whose bundles were dumped into a folder for a TPU generation, by the
    kernel's name."""
    kernels = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        blocks = basic_blocks(path, generation)
        if any(block.products for block in blocks):
            kernels[re.sub(r"^\d+-|\.\d+-\d+-final_bundles\.txt$", "", path.name)] = blocks
    return kernels
