"""The decoding step of `aurora generate`, compiled for a TPU topology without a TPU: what a token costs in
bytes and cycles.

B batch.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from aurora_jax.chips import CHIPS, Chip
from aurora_jax.generate.generator import ROWS_AXIS, GenerationSettings, Programs, make_inference_mesh, unstacked_shapes
from aurora_jax.generate.sampling import Sampling
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.plan.estimate import bytes_a_chip
from aurora_jax.plan.program import Module, array_bytes
from aurora_jax.plan.topology import tpu_topology

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[su]\d+|f\d+|bf16)\[([\d,]*)\](?:\{([^}]*)\})?")
_READ_NOTHING = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "copy-done",
    "slice-done",
    "async-done",
    "constant",
)
_LOOKUPS = ("dynamic-slice", "gather", "slice")
_FETCHES = ("copy-start", "slice-start")


@dataclass(frozen=True)
class DecodingPlan:
    """One token of every row, on one chip."""

    weight_bytes: int
    """The chip's part of the parameters."""
    cache_bytes: int
    """Its part of the keys and values, whole."""
    read_bytes: int
    """Out of HBM."""
    cycles: int
    """The compiler's estimate, without collectives."""
    peak_bytes: int
    """Of HBM."""
    seconds: float
    """The longer of cycles and reading: what a token takes at least, its collectives left out."""


def plan_decoding(
    config: ModelConfig, topology: str, *, batch_size: int, prompt_slots: int, new_tokens: int
) -> DecodingPlan:
    """Compiles the loop that draws tokens, in bf16, for the chips of a topology such as v5e:2x4.

    Raises:
        InputError: libtpu is not installed, or the topology is unknown.
    """
    mesh = make_inference_mesh(config, list(tpu_topology(topology).devices))
    programs = Programs(config, ComputeConfig(attention="flash"), mesh)
    settings = GenerationSettings(prompt_slots, new_tokens, Sampling(), config.eos_token_ids or (0,))

    def placed(shapes, partitions):
        return jax.tree.map(
            lambda shape, partition: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=NamedSharding(mesh, partition)
            ),
            shapes,
            partitions,
        )

    B = batch_size
    parameters = placed(unstacked_shapes(config, jnp.bfloat16), programs.parameters_spec())
    rows = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((B, prompt_slots), "int32"),
            ((B,), "int32"),
            ((B,), "uint32"),
            ((B,), "int32"),
            ((B,), "bool"),
        )
    ]
    arguments = [placed(row, PartitionSpec(ROWS_AXIS)) for row in rows]
    state = placed(
        jax.eval_shape(programs.prefill(settings), parameters, *arguments), programs.state_spec(settings.sampling)
    )
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    compiled = programs.decode(settings).lower(parameters, state, steps).compile()

    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    chip = CHIPS[topology.partition(":")[0]]
    read, cycles = one_trip(text, chip)
    return DecodingPlan(
        weight_bytes=bytes_a_chip(parameters),
        cache_bytes=bytes_a_chip((state.keys, state.values)),
        read_bytes=read,
        cycles=cycles,
        peak_bytes=memory.peak_memory_in_bytes,
        seconds=max(cycles / chip.clock, read / chip.hbm_bandwidth),
    )


def one_trip(text: str, chip: Chip) -> tuple[int, int]:
    """Bytes that one trip of a program's only loop reads from HBM, and its estimated cycles.

    An operand that is in fast memory is not counted, what is fetched into it is; of an array that is only
    looked up, the rows are.
    """
    module = Module(text, chip)
    computations = module.computations
    (loop,) = (line for line in computations[module.entry] if " while(" in line)
    found = re.search(r"body=%?([\w.\-]+)", loop)
    assert found is not None
    body = found[1]
    here = _instructions(computations[body])
    read = sum(_read_bytes(computations, here, instruction) for instruction in here.values())
    return read, sum(module.cycles(body))


@dataclass(frozen=True)
class _Instruction:
    operation: str
    result: list[tuple[str, str, str]]
    """(dtype, dimensions, layout) of its arrays."""
    operands: list[str]
    line: str

    @property
    def hbm_bytes(self) -> int:
        """Of the result, where it is in HBM; fast memory is written S(1)."""
        return sum(array_bytes((dtype, dimensions)) for dtype, dimensions, layout in self.result if "S(" not in layout)


def _instructions(lines: Iterable[str]) -> dict[str, _Instruction]:
    found = {}
    for line in lines:
        parts = _INSTRUCTION.match(line)
        operation = _OPERATION.search(parts[2]) if parts else None
        if parts is None or operation is None:
            continue
        before, after = parts[2][: operation.start()], parts[2][operation.end() :]
        operands = re.findall(r"%([\w.\-]+)", after[: after.index(")")])
        found[parts[1]] = _Instruction(operation[1], _ARRAY.findall(before), operands, line)
    return found


def _read_bytes(computations: dict[str, list[str]], here: dict[str, _Instruction], instruction: _Instruction) -> int:
    """Bytes that one instruction reads from HBM."""
    if instruction.operation in _READ_NOTHING:
        return 0
    sources = [
        here[name].hbm_bytes if name in here and len(here[name].result) == 1 else 0 for name in instruction.operands
    ]
    if instruction.operation in _FETCHES:
        # The result is a tuple: source, destination, a flag. What is fetched is as large as the destination.
        return array_bytes(instruction.result[1][:2]) if sources[0] else 0
    if instruction.operation in _LOOKUPS:
        return min(sources[0], array_bytes(instruction.result[0][:2]))
    called = re.search(r"calls=%?([\w.\-]+)", instruction.line)
    if instruction.operation == "fusion" and called:
        inside = _instructions(computations[called[1]])
        return sum(min(size, _used_bytes(inside, place)) for place, size in enumerate(sources) if size)
    return sum(sources)


def _used_bytes(inside: dict[str, _Instruction], place: int) -> int:
    """Bytes of a fusion's operand that are read: all of it, unless it is only looked up or written to."""
    name = next(
        name for name, each in inside.items() if each.operation == "parameter" and f" parameter({place})" in each.line
    )
    names, used = {name}, 0
    whole = array_bytes(inside[name].result[0][:2])
    for user, each in inside.items():
        if not names.intersection(each.operands):
            continue
        if each.operation == "bitcast":
            names.add(user)
        elif each.operation in _LOOKUPS and each.operands[0] in names:
            used += array_bytes(each.result[0][:2])
        elif not (each.operation == "dynamic-update-slice" and each.operands[0] in names):
            return whole
    return used
