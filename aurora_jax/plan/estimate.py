"""What a run needs on a topology: the step that `train` runs, compiled for it, and read.

An estimate, and called one: it leaves out stalls on memory that the compiler does not foresee, contention in
the network and the input.
"""

import html
import io
import re
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from aurora_jax.chips import CHIPS, GIB, Chip
from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.flops import flops_per_token
from aurora_jax.model.mesh import batch_parts, make_mesh
from aurora_jax.model.sharding import FSDP_AXES, MESH_AXES, TENSOR_AXIS, parameter_count, parameter_shapes, rows_of
from aurora_jax.plan.attention_cycles import attention_cycles
from aurora_jax.plan.program import Collective, ProgramCost, read_program
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.program import Program


class DoesNotFit(InputError):
    """The compiler found that the step, or something else, needs more memory than a chip has."""

    def __init__(self, needed: float, available: float, what: str = "a step"):
        self.needed, self.available = needed, available
        super().__init__(
            f"{what} does not fit: a chip would need {needed / GIB:.1f} GiB of {available / GIB:.1f}, "
            f"{(needed - available) / GIB:.1f} GiB over."
        )


class BelowPhysics(InputError):
    """A step was read to compute faster than the chips can."""

    def __init__(self, topology: str, seconds: float, least: float):
        super().__init__(
            f"{topology}: no plan. The compiled step reads as {seconds:.3g} s of computing, and the model's "
            "products alone "
            f"take {least:.3g} s at the chips' published peak: the program is not written as `aurora plan` reads it. "
            "Install the libtpu that requirements.txt pins, or report it."
        )


@dataclass(frozen=True)
class CollectiveRow:
    """One kind of collective over one group of devices, all of a step together."""

    kind: str
    axis: str
    count: int
    gigabytes: float
    """Sent by a chip."""
    seconds: float
    """At the chip's published bandwidth."""
    exposed_seconds: float
    """Of these, not hidden behind computation."""


@dataclass(frozen=True)
class EvaluationPlan:
    """A batch of held-out text, as the run reads it; sizes in bytes a chip, times in seconds a batch."""

    tokens: int
    memory_peak: int
    """With the run's state beside it."""
    compute_seconds: float
    kernel_seconds: float
    exposed_seconds: float
    gigabytes: float
    """Sent by a chip."""
    least_seconds: float
    """The model's products alone, at the chips' published peak."""

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.kernel_seconds + self.exposed_seconds


@dataclass(frozen=True)
class Plan:
    """What was found; sizes in bytes a chip, times in seconds a step."""

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    parameters: int
    tokens: int
    """Of a step, on all chips."""
    memory_capacity: int
    memory_peak: int
    memory_parameters: int
    memory_optimizer: int
    memory_gradients: int
    memory_gathered: int
    """Layers' weights that are gathered once a step and kept, in the precision of the products."""
    memory_activations: int
    """Activations and the compiler's temporaries: what is left of the peak."""
    cycles: int
    """The compiler's, without kernels and collectives; no instruction below what its products take at the peak."""
    compute_seconds: float
    kernel_seconds: float
    exposed_seconds: float
    """Of collectives that nothing hides."""
    collectives: tuple[CollectiveRow, ...]
    mfu: float
    """Model FLOP/s over peak: 6 FLOPs a parameter and token, and attention's products with a causal triangle
    counted once."""
    compile_seconds: float
    evaluation: EvaluationPlan | None = None
    """None where the run evaluates nothing, or it was not asked for."""

    @property
    def memory_parts(self) -> dict[str, int]:
        """What fills the peak, by name."""
        gathered = {"weights gathered once a step": self.memory_gathered} if self.memory_gathered else {}
        return {
            "parameters": self.memory_parameters,
            "optimizer": self.memory_optimizer,
            "gradients": self.memory_gradients,
            **gathered,
            "activations, temporaries": self.memory_activations,
        }

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.kernel_seconds + self.exposed_seconds

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.tokens / self.step_seconds / self.chips

    def __str__(self) -> str:
        """As `aurora plan` prints it."""
        console = Console(file=io.StringIO(), width=100)
        for part in described(self):
            console.print(part)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def as_dict(self) -> dict:
        """All fields and what follows from them, for JSON."""
        return {
            **asdict(self),
            "step_seconds": self.step_seconds,
            "tokens_per_second_per_chip": self.tokens_per_second_per_chip,
        }


def described(plan: Plan, tokens: float = 435e9, price: float | None = None) -> list[RenderableType]:
    """A plan for people: tables and sentences, from top to bottom.

    Args:
        tokens: of the run, for its time and cost.
        price: US dollars a chip-hour; the chip's on-demand list price without it.
    """
    chip = CHIPS[plan.topology.partition(":")[0]]
    price = chip.price if price is None else price
    table = Table(title=f"{plan.slices} x {plan.topology}, {plan.chips} chips, mesh {plan.mesh}", show_header=False)
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("tokens a step", f"{plan.tokens:,}")
    table.add_section()
    free = 1 - plan.memory_peak / plan.memory_capacity
    table.add_row(
        "HBM a chip, peak", f"{plan.memory_peak / GIB:.1f} of {plan.memory_capacity / GIB:.0f} GiB ({free:.0%} free)"
    )
    for name, size in plan.memory_parts.items():
        table.add_row(f"  {name}", f"{size / GIB:.2f} GiB")
    table.add_section()
    table.add_row("time a step, estimated", f"{plan.step_seconds:.2f} s")
    table.add_row("  compute", f"{plan.compute_seconds:.2f} s ({plan.cycles / 1e9:.2f}e9 cycles)")
    table.add_row("  attention kernels", f"{plan.kernel_seconds:.2f} s")
    table.add_row("  collectives that nothing hides", f"{plan.exposed_seconds:.2f} s")
    table.add_row("tokens/s a chip, at most", f"{plan.tokens_per_second_per_chip:,.0f}")
    table.add_row("MFU, at most", f"{plan.mfu:.1%}")
    table.add_section()
    hours = tokens / plan.tokens * plan.step_seconds / 3600
    table.add_row(f"{tokens / 1e9:,.0f}B tokens", f"{hours / 24:,.1f} days, {hours * plan.chips:,.0f} chip-hours")
    table.add_row(f"  at ${price:.2f} a chip-hour", f"${hours * plan.chips * price:,.0f}")
    if (evaluation := plan.evaluation) is not None:
        table.add_section()
        table.add_row("evaluation, a batch", f"{evaluation.tokens:,} tokens in {evaluation.seconds:.2f} s")
        table.add_row("  its products alone, at the peak", f"{evaluation.least_seconds:.2f} s")
        table.add_row("  GB sent by a chip", f"{evaluation.gigabytes:.1f}")
        table.add_row("  HBM a chip, with the state beside it", f"{evaluation.memory_peak / GIB:.1f} GiB")
    collectives = Table(
        "collective", "mesh axis", "a step", "GB sent", "seconds", "exposed", title="collectives of a chip"
    )
    for row in plan.collectives:
        collectives.add_row(
            row.kind,
            row.axis,
            f"{row.count:,}",
            f"{row.gigabytes:.2f}",
            f"{row.seconds:.3f}",
            f"{row.exposed_seconds:.3f}",
        )
    verdict = "Fits." if free >= 0.1 else "Fits, but tightly: less than 10 % of the memory is free."
    basis = (
        f"Compiled in {plan.compile_seconds:.0f} s by the TPU compiler. Times are its estimates: stalls on "
        "memory, contention in the "
        "network and the input are left out. MFU: (6 N + 6 layers H C L) FLOPs a token, attention's triangle "
        "counted once, over the peak."
    )
    return [table, collectives, Text(verdict, style="bold"), basis]


def make_plan(config: TrainConfig, model: ModelConfig, topology: str, slices: int = 1) -> Plan:
    """Compiles a config's step for a topology and reads what it needs.

    Raises:
        InputError: unknown topology, or sizes that the mesh does not divide.
        DoesNotFit: more memory than a chip has.
        BelowPhysics: less time for computing than the model's products take at the chips' peak.
    """
    generation, chip, program = _program_on(config, model, topology, slices)
    mesh = program.mesh
    begun = time.monotonic()
    step = compiled(program.lower_step())
    compile_seconds = time.monotonic() - begun
    cost = read_program(step.as_text() or "", chip, slices)
    of_parameters, of_optimizer = (bytes_a_chip(tree) for tree in (program.shapes.parameters, program.shapes.moments))
    peak = _peak(step)
    gathered = bytes_gathered_once(config, model, mesh)
    tokens = config.data.batch_size * config.data.sequence_length
    rows = collective_rows(cost.collectives, mesh, chip)
    compute = cost.cycles / chip.clock
    sequences = config.data.batch_size // batch_parts(mesh) // config.optimizer.micro_batches
    kernels = _kernel_seconds(cost, program, generation, chip, sequences)
    exposed = sum(row.exposed_seconds for row in rows)
    seconds = compute + kernels + exposed
    # Each part is held to its own products before; this catches a program that was not read as it is meant.
    least = flops_per_token(model, config.data.sequence_length) * tokens / (mesh.size * chip.peak)
    if compute + kernels < least:
        raise BelowPhysics(topology, compute + kernels, least)
    return Plan(
        topology=topology,
        slices=slices,
        chips=mesh.size,
        mesh={axis: mesh.shape[axis] for axis in MESH_AXES},
        parameters=parameter_count(model),
        tokens=tokens,
        memory_capacity=chip.hbm,
        memory_peak=peak,
        memory_parameters=of_parameters,
        memory_optimizer=of_optimizer,
        memory_gradients=of_parameters,
        memory_gathered=gathered,
        memory_activations=max(peak - 2 * of_parameters - of_optimizer - gathered, 0),
        cycles=cost.cycles,
        compute_seconds=compute,
        kernel_seconds=kernels,
        exposed_seconds=exposed,
        collectives=tuple(rows),
        mfu=least / seconds,
        compile_seconds=compile_seconds,
    )


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """By the TPU compiler, which enforces the chips' memory. Raises DoesNotFit."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\(?(\d+(?:\.\d+)?)([MG])\)?", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        needed, available = (float(number) * {"M": 2**20, "G": 2**30}[unit] for number, unit in sizes[:2])
        raise DoesNotFit(needed, available) from None


def smallest_change(config: TrainConfig, model: ModelConfig, topology: str, slices: int = 1) -> tuple[str, Plan] | None:
    """The first of some changes, least costly first, with which a step fits; each is compiled."""
    order = ["nothing", "offload", "products", "projections", "attention", "full"]
    kept = config.compute.rematerialisation
    changes: list[dict[str, Any]] = [{"mesh.gather": "layer"}] if config.mesh.gather == "step" else []
    changes += [{"compute.rematerialisation": each} for each in order[order.index(kept) + 1 :] if each != "offload"]
    changes += [{"optimizer.micro_batches": config.optimizer.micro_batches * factor} for factor in (2, 4)]
    changes += [
        {"compute.rematerialisation": "full", "optimizer.micro_batches": config.optimizer.micro_batches * factor}
        for factor in (2, 4, 8)
    ]
    if config.optimizer.moments_dtype == "float32":
        changes.append({"optimizer.moments_dtype": "bfloat16", "compute.rematerialisation": "full"})
    for change in changes:
        changed = config
        try:
            for path, value in change.items():
                group, name = path.split(".")
                changed = replace(changed, **{group: replace(getattr(changed, group), **{name: value})})
            plan = make_plan(changed, model, topology, slices)
        except InputError:
            continue
        return " ".join(f"--{path.replace('_', '-')} {value}" for path, value in change.items()), plan
    return None


def collective_rows(collectives: list[Collective], mesh: Mesh, chip: Chip) -> list[CollectiveRow]:
    """Collectives of one kind and group added up, with their time at the bandwidth of the links that the
    group spans; longest first."""
    rows: dict[tuple[str, str], CollectiveRow] = {}
    for each in collectives:
        if each.group < 2:
            continue
        axis, bandwidth = ("data", chip.network) if each.network else _axes_of(each.members, mesh, chip)
        seconds = each.wire_bytes / bandwidth
        exposed = max(seconds - each.hidden_cycles / chip.clock, 0.0)
        before = rows.get((each.kind, axis), CollectiveRow(each.kind, axis, 0, 0.0, 0.0, 0.0))
        rows[each.kind, axis] = replace(
            before,
            count=before.count + each.times,
            gigabytes=before.gigabytes + each.wire_bytes * each.times / 1e9,
            seconds=before.seconds + seconds * each.times,
            exposed_seconds=before.exposed_seconds + exposed * each.times,
        )
    return sorted(rows.values(), key=lambda row: -row.seconds)


def _axes_of(members: tuple[int, ...], mesh: Mesh, chip: Chip) -> tuple[str, float]:
    """Mesh axes along which a group's devices lie, and the bandwidth that such a group has: that of the torus
    dimensions it spans."""
    places = np.unravel_index(members, mesh.devices.shape)
    name = " x ".join(axis for axis, column in zip(mesh.axis_names, places, strict=True) if len(set(column)) > 1)
    devices = mesh.devices.ravel()[list(members)]
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return name, chip.network
    spanned = sum(len(set(column)) > 1 for column in zip(*(device.coords for device in devices), strict=True))
    return name, chip.interconnect * max(spanned, 1) / chip.torus_dimensions


def plan_evaluation(config: TrainConfig, model: ModelConfig, topology: str, slices: int = 1) -> EvaluationPlan:
    """Compiles the likelihood of a batch of held-out text, as the run reads it; arguments as those of `make_plan`.

    Raises:
        InputError: unknown topology, or sizes that the mesh does not divide.
        DoesNotFit: the chip has no room for it beside the run's state.
    """
    generation, chip, program = _program_on(config, model, topology, slices)
    mesh = program.mesh
    likelihood = compiled(program.lower_likelihood())
    cost = read_program(likelihood.as_text() or "", chip, slices)
    beside = bytes_a_chip(program.shapes) - bytes_a_chip(program.shapes.parameters)
    peak = _peak(likelihood) + beside
    if peak > chip.hbm:
        raise DoesNotFit(peak, chip.hbm, "an evaluation (evaluation.batch_size)")
    batch_size, length = config.evaluation.batch_size, config.data.sequence_length
    rows = collective_rows(cost.collectives, mesh, chip)
    return EvaluationPlan(
        tokens=batch_size * length,
        memory_peak=peak,
        compute_seconds=cost.cycles / chip.clock,
        kernel_seconds=_kernel_seconds(cost, program, generation, chip, batch_size // batch_parts(mesh)),
        exposed_seconds=sum(row.exposed_seconds for row in rows),
        gigabytes=cost.wire_bytes() / 1e9,
        # A backward pass is two forward passes.
        least_seconds=flops_per_token(program.model, length) / 3 * batch_size * length / (mesh.size * chip.peak),
    )


def _program_on(config: TrainConfig, model: ModelConfig, topology: str, slices: int) -> tuple[str, Chip, Program]:
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise InputError(
            f"Topology {topology!r}: there is no chip {generation!r}; there are {', '.join(CHIPS)} (`aurora "
            "plan --list`)."
        )
    program = Program(config, model, make_mesh(config.mesh, tpu_topology(topology, slices).devices))
    program.check()
    return generation, CHIPS[generation], program


def _peak(program: jax.stages.Compiled) -> int:
    memory = program.memory_analysis()
    assert memory is not None  # the TPU compiler always tells
    return memory.peak_memory_in_bytes


def _kernel_seconds(cost: ProgramCost, program: Program, generation: str, chip: Chip, sequences: int) -> float:
    """Of the kernels, each called for so many sequences."""
    if not cost.kernels:
        return 0.0
    model, mesh = program.model, program.mesh
    cycles = attention_cycles(
        generation,
        model.heads // mesh.shape[TENSOR_AXIS],
        max(model.kv_heads // mesh.shape[TENSOR_AXIS], 1),
        model.head_dim,
        program.config.data.sequence_length,
        alibi=model.positions == "alibi",
    )
    total = sum(times * cycles["forward" if "forward" in name else "backward"] for name, times in cost.kernels.items())
    # A sequence that is divided has fewer queries on each device, of which the last see all keys: an even
    # share, roughly.
    return total * sequences / mesh.shape["sequence"] / chip.cores / chip.clock


def bytes_gathered_once(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> int:
    """What the layers' weights take on a chip when they are gathered along fsdp for the whole step; 0 where
    each layer gathers its own."""
    if config.mesh.gather != "step":
        return 0
    shapes, total = parameter_shapes(model, config.compute.compute_dtype), 0
    for path, row in rows_of(model).items():
        axes = [axis for entry in row.partition for axis in (entry if isinstance(entry, tuple) else (entry,))]
        if path.startswith("layers.") and set(FSDP_AXES).intersection(axes):
            total += (
                shapes[path].size
                * shapes[path].dtype.itemsize
                // (mesh.shape[TENSOR_AXIS] if TENSOR_AXIS in axes else 1)
            )
    return total


def bytes_a_chip(tree: object) -> int:
    """What a tree of arrays, or of their shapes with shardings, takes on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
