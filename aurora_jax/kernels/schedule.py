"""Cycles of Pallas TPU kernels, read from the bundles that the TPU compiler schedules, on a machine without a TPU.

A TensorCore issues one VLIW bundle a cycle, so that the bundles of a basic block, times how often it runs, are its cycles as the compiler
plans them. Stalls on DMA and on a matrix unit that is still busy are left out: it is a lower bound, good for comparing kernels.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*([> ]*)\{(.*)")
_BRANCH = re.compile(r"sbr\.rel \((!?)%\w+\) target = \$region(\d+)")
_REGION_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_OPERATION = re.compile(r"(?:^|= |;;  |\{ )(v[a-z]+[0-9]*)\b")


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

    @property
    def products(self) -> int:
        return self.operations.get("vmatmul", 0)


def basic_blocks(path: Path) -> list[BasicBlock]:
    """Basic blocks, in order, of one `*final_bundles.txt` as dumped with `--xla_jf_dump_to` and `--xla_jf_dump_llo_text`."""
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
        blocks.append(BasicBlock(end - start, depth, guards, operations))
    return blocks


def dumped_kernels(folder: Path) -> dict[str, list[BasicBlock]]:
    """The basic blocks of every kernel whose bundles were dumped into a folder, by the kernel's name."""
    kernels = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        blocks = basic_blocks(path)
        if any(block.products for block in blocks):
            kernels[re.sub(r"^\d+-|\.\d+-\d+-final_bundles\.txt$", "", path.name)] = blocks
    return kernels
