"""What a compiled TPU program does in one run: cycles, collectives and kernels, read from its optimized HLO
with loop trip counts.

The compiler writes its own estimate of cycles beside each instruction, except for collectives and custom calls. An
estimate can lie below the time that the instruction's matrix products take at the chip's published peak (it does for
one of v6e's): the longer of the two counts. A loop body stands once in the text; here it counts as often as it runs.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from aurora_jax.chips import Chip
from aurora_jax.errors import InputError

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all)(-start)?\("
)
_CALLED = re.compile(r"(?:to_apply|true_computation|false_computation|branch_computations=\{)=?%?([\w.\-]+)")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\]")
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*?/(\w+)/pallas_call"')
_BETWEEN_SLICES = re.compile(
    r' send\(.*_xla_host_transfer_rendezvous="([^"]+)".*_xla_megascale_transfer_type="([A-Z_]+)"'
)
_CONVOLUTION = re.compile(
    r"%?([\w.\-]+) = \S+ convolution\(%?([\w.\-]+), %?([\w.\-]+)\).*dim_labels=(\w+)_(\w+)->(\w+)"
)
_WINDOW = re.compile(r"\b(stride|pad|lhs_dilate|rhs_dilate)=([-\d_x]+)")
_FUSION = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
_UNKNOWN = 1 << 50
"""Estimates above this are the compiler's way of saying that it has none."""


@dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str
    """all-gather, all-reduce, reduce-scatter ..."""
    members: tuple[int, ...]
    """Devices of the first group that takes part together, as places in the mesh."""
    bytes: int
    """Size of the whole array on one device: the result of a gather, the operand of a scatter or reduction."""
    times: int
    """How often it runs in a step."""
    hidden_cycles: int
    """Estimated cycles of what runs between its start and its end, each time, as its share of the links; 0 if
    it is synchronous."""
    operation: str
    """Where in the program it comes from."""
    network: bool = False
    """Between slices, over the data-center network; `members` then counts slices."""

    @property
    def group(self) -> int:
        """Devices of a group."""
        return len(self.members)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a chip sends, each time, by the ring algorithm: (n - 1) / n of the array, twice that for
        an all-reduce."""
        factor = {"all-reduce": 2.0, "collective-permute": self.group / max(self.group - 1, 1)}.get(self.kind, 1.0)
        return factor * self.bytes * (self.group - 1) / self.group


@dataclass
class ProgramCost:
    """The work of one run on one chip."""

    cycles: int = 0
    """The compiler's estimate for everything but collectives and kernels, no instruction below its products' time."""
    collectives: list[Collective] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How often each Pallas kernel runs."""

    def wire_bytes(self, *kinds: str) -> float:
        """Bytes that a chip sends in a step, for some kinds of collectives or all."""
        return sum(each.wire_bytes * each.times for each in self.collectives if not kinds or each.kind in kinds)


class Module:
    """An optimized HLO module (`compiled.as_text()`), compiled for a chip. Raises InputError if it has no entry."""

    def __init__(self, text: str, chip: Chip):
        self.computations: dict[str, list[str]] = {}
        """Lines by the name of the computation."""
        self.entry = name = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name = header[2]
                self.computations[name] = []
                self.entry = name if header[1] else self.entry
            elif name and " = " in line:
                self.computations[name].append(line)
        if not self.entry:
            raise InputError("This is no HLO module: it has no ENTRY computation.")
        self._chip = chip
        self._multiply_adds: dict[str, int] = {}

    def cycles(self, name: str) -> list[int]:
        """Of each instruction of a computation itself, without what it calls.

        The compiler's estimate (0 where it has none), or what its matrix products take at the peak if that is more.
        """
        found = []
        for line in self.computations[name]:
            fused = _FUSION.search(line)
            products = self.multiply_adds(fused[1]) if fused else self._of_convolution(name, line)
            found.append(max(_estimate(line), math.ceil(2 * products / self._chip.flops_per_cycle)))
        return found

    def multiply_adds(self, name: str) -> int:
        """Of a fused computation's matrix products."""
        if name not in self._multiply_adds:
            self._multiply_adds[name] = sum(
                self.multiply_adds(fused[1]) if (fused := _FUSION.search(line)) else self._of_convolution(name, line)
                for line in self.computations[name]
            )
        return self._multiply_adds[name]

    def _of_convolution(self, name: str, line: str) -> int:
        """Multiply-adds of a line that is a convolution, as the TPU compiler writes every matrix product; else 0.

        Heads, groups and batches of a product are dimensions of its window. What falls into padding is not counted.
        Raises InputError for a convolution that is not written as known.
        """
        if " convolution(" not in line:
            return 0
        convolution, lines = _CONVOLUTION.search(line), self.computations[name]
        sizes = [_dimensions(each, lines) for each in convolution.groups()[:3]] if convolution else []
        if convolution is None or not all(sizes):
            raise InputError(f"A matrix product of the compiled program cannot be read: {line.strip()[:120]}")
        left, right, result = (
            dict(zip(*each, strict=True))
            for each in zip(convolution.groups()[3:], (sizes[1], sizes[2], sizes[0]), strict=True)
        )
        window = {what: value.split("x") for what, value in _WINDOW.findall(line)}
        products = result["b"] * result["f"] * right["i"]
        for label in filter(str.isdigit, left):
            stride, dilated, spread = (
                int(window[what][int(label)]) if what in window else 1
                for what in ("stride", "lhs_dilate", "rhs_dilate")
            )
            pad = int(window["pad"][int(label)].split("_")[0]) if "pad" in window else 0
            starts = np.arange(result[label]) * stride - pad
            last = (left[label] - 1) * dilated
            places = (starts + step * spread for step in range(right[label]))
            products *= sum(int(((at >= 0) & (at <= last) & (at % dilated == 0)).sum()) for at in places)
        return products


def read_program(text: str, chip: Chip, slices: int = 1) -> ProgramCost:
    """Reads an optimized HLO module (`compiled.as_text()`).

    Args:
        chip: that it was compiled for.
        slices: that it was compiled for; what they exchange is written as sends to a host.

    Raises:
        InputError: no module, a product that cannot be read, or a loop whose trip count is not a constant of
            its condition.
    """
    module, cost = Module(text, chip), ProgramCost()
    _walk(module, module.entry, 1, cost, slices)
    return cost


def _walk(module: Module, name: str, times: int, cost: ProgramCost, slices: int) -> None:
    computations, lines, cycles = module.computations, module.computations[name], module.cycles(name)
    cost.cycles += times * sum(cycles)
    spans = _merged(computations, lines, times)
    for place, line in enumerate(lines):
        if " while(" in line:
            trips = _trips(computations, line)
            _walk(module, _named(line, "body"), times * trips, cost, slices)
        elif " call-start(" in line:
            # Given to the SparseCores, which work beside the TensorCores.
            for inner in computations[_named(line, "to_apply")]:
                if found := _COLLECTIVE.search(inner):
                    spans.append((place, _end(lines, place, "call-done"), _collective(inner, found, times)))
        elif re.search(r" (call|conditional)\(", line):
            for branch in _CALLED.findall(line):
                _walk(module, branch, times, cost, slices)
        elif kernel := _KERNEL.search(line):
            cost.kernels[kernel[1]] += times
        elif sent := _BETWEEN_SLICES.search(line):
            size = array_bytes(_ARRAY.findall(line.split(" = ", 1)[1])[0])
            kind = sent[2].lower().replace("_", "-")
            spans.append(
                (
                    place,
                    _received(lines, place, sent[1]),
                    Collective(kind, tuple(range(slices)), size, times, 0, sent[1], True),
                )
            )
        elif found := _COLLECTIVE.search(line):
            end = _end(lines, place, f"{found[1]}-done") if found[2] else place
            spans.append((place, end, _collective(line, found, times)))
    cost.collectives += _hide(spans, cycles)


def _merged(computations: dict[str, list[str]], lines: list[str], times: int) -> list[tuple[int, int, Collective]]:
    """Collectives that the compiler merges with computation: they stand in several fusions, from start to
    end, under one channel."""
    places: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for place, line in enumerate(lines):
        called = _FUSION.search(line)
        for inner in computations[called[1]] if called else ():
            if _COLLECTIVE.search(inner) and (channel := re.search(r"channel_id=(\d+)", inner)):
                places[channel[1]].append((place, inner))
    spans = []
    for (first, inner), *_, (last, _) in (found * 2 if len(found) == 1 else found for found in places.values()):
        found = _COLLECTIVE.search(inner)
        assert found is not None
        collective = _collective(inner, found, times)
        if "calls=%all-reduce-scatter" in lines[first]:
            collective = replace(collective, kind="reduce-scatter")  # written as an all-reduce and a slice, run as one
        spans.append((first, last, collective))
    return spans


def _hide(spans: list[tuple[int, int, Collective]], cycles: list[int]) -> list[Collective]:
    """Gives what runs between a collective's start and end to it; several in flight share it by their bytes,
    as they share the links."""
    shares = [0.0] * len(spans)
    for place, own in enumerate(cycles):
        flying = [index for index, (first, last, _) in enumerate(spans) if first < place < last] if own else []
        total = sum(spans[index][2].wire_bytes for index in flying)
        for index in flying:
            shares[index] += own * spans[index][2].wire_bytes / max(total, 1.0)
    return [
        replace(collective, hidden_cycles=int(share)) for (_, _, collective), share in zip(spans, shares, strict=True)
    ]


def _received(lines: list[str], place: int, rendezvous: str) -> int:
    """Where what other slices sent back has arrived."""
    for later in range(len(lines)):
        if " recv(" in lines[later] and f'rendezvous="{rendezvous}"' in lines[later]:
            return max(_end(lines, later, "recv-done"), place)
    return place


def _end(lines: list[str], place: int, done: str) -> int:
    name = lines[place].strip().removeprefix("ROOT ").split(" = ", 1)[0]
    return next((later for later in range(place + 1, len(lines)) if f"{done}({name})" in lines[later]), place)


def _estimate(line: str) -> int:
    """The compiler's estimate for an instruction itself; 0 where it has none."""
    estimate = _ESTIMATE.search(line)
    return int(estimate[1]) if estimate and int(estimate[1]) < _UNKNOWN else 0


def _collective(line: str, found: re.Match, times: int) -> Collective:
    members, kind, is_asynchronous = _members(line), found[1], bool(found[2])
    # The result's arrays stand before the operation's name. Of several, a synchronous collective carries all;
    # the result of a start has its operands first.
    sizes = [array_bytes(array) for array in _ARRAY.findall(line.split(" = ", 1)[1].split(found[0])[0])]
    size = max(sizes) if is_asynchronous else sum(sizes)
    if kind == "reduce-scatter" and not is_asynchronous:
        size *= len(members)
    operation = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, members, size, times, 0, operation[1] if operation else "")


def _members(line: str) -> tuple[int, ...]:
    """Devices of the first group, as places in the order of the program's devices, in any of the three ways
    of writing groups."""
    if listed := _LISTED_GROUPS.search(line):
        return tuple(int(number) for number in listed[1].split(","))
    if iota := _IOTA_GROUPS.search(line):
        groups, size = int(iota[1]), int(iota[2])
        places = np.arange(groups * size).reshape(
            [int(number) for number in (iota[3] or str(groups * size)).split(",")]
        )
        if iota[4]:
            places = places.transpose([int(number) for number in iota[4].split(",")])
        return tuple(int(place) for place in places.reshape(groups, size)[0])
    if mesh := _MESH_GROUPS.search(line):
        axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        places = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
        taken = set(re.findall(r"'([^']+)'", mesh[2]))
        return tuple(
            int(place) for place in places[tuple(slice(None) if name in taken else 0 for name, _ in axes)].ravel()
        )
    return (0,)


def array_bytes(array: tuple[str, str]) -> int:
    """Size of an array that is written as (dtype, dimensions), such as ("bf16", "8,128")."""
    dtype, dimensions = array
    each = _BYTES.get(dtype) or (1 if dtype.startswith("f8") else int(dtype[1:]) // 8)
    count = 1
    for dimension in dimensions.split(","):
        count *= int(dimension) if dimension else 1
    return count * each


def _dimensions(name: str, lines: list[str]) -> tuple[int, ...]:
    """Of the array that an instruction makes; empty if it is not there."""
    written = re.compile(rf"[\s%]{re.escape(name)} = {_ARRAY.pattern}")
    found = next(filter(None, map(written.search, lines)), None)
    return tuple(int(size) for size in found[2].split(",") if size) if found else ()


def _named(line: str, what: str) -> str:
    found = re.search(rf"{what}=%?([\w.\-]+)", line)
    assert found is not None, line
    return found[1]


def _trips(computations: dict[str, list[str]], line: str) -> int:
    """Trip count of a loop that counts from 0 up to the constant that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    constants = [
        int(value)
        for each in computations[_named(line, "condition")]
        for value in re.findall(r" constant\((\d+)\)", each)
    ]
    if len(constants) != 1:
        raise InputError(f"The trip count of a loop is not a constant of its condition: {line[:120]}")
    return constants[0]
