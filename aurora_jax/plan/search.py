"""`aurora plan --search`: the fastest way to run a config on a topology, over meshes, rematerialisation,
micro-batches, and what is kept of weights and moments.

Arithmetic orders the candidates and drops those that cannot fit or cannot win; the rest are compiled, one
after the other, and every result is written at once, so that a search that was stopped goes on where it was.
"""

import hashlib
import json
import math
import pprint
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aurora_jax.chips import CHIPS, GIB, Chip
from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.flops import flops_per_token
from aurora_jax.model.sharding import parameter_count
from aurora_jax.plan.estimate import Plan, make_plan
from aurora_jax.storage import json_lines
from aurora_jax.train.config import MeshConfig, TrainConfig

REMATERIALISATIONS = ("nothing", "products", "projections", "attention", "full")


@dataclass(frozen=True)
class Candidate:
    """One way to run a config."""

    fsdp: int
    fsdp_inner: int
    sequence: int
    tensor: int
    rematerialisation: str
    micro_batches: int
    gather: str = "layer"
    moments_dtype: str = "float32"

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The config with this candidate's choices, and batches of the evaluation that its mesh divides; the data axis
        stays."""
        mesh = MeshConfig(config.mesh.data, self.fsdp, self.fsdp_inner, self.sequence, self.tensor, self.gather)  # type: ignore[arg-type]
        compute = replace(config.compute, rematerialisation=self.rematerialisation)  # type: ignore[arg-type]
        optimizer = replace(config.optimizer, micro_batches=self.micro_batches, moments_dtype=self.moments_dtype)  # type: ignore[arg-type]
        rows = config.mesh.data * self.fsdp * self.fsdp_inner
        batch_size = -(-config.evaluation.batch_size // rows) * rows
        evaluation = replace(config.evaluation, batch_size=batch_size)
        return replace(config, mesh=mesh, compute=compute, optimizer=optimizer, evaluation=evaluation)

    @property
    def flags(self) -> str:
        """As options of `aurora train`."""
        return (
            f"--mesh.fsdp {self.fsdp} --mesh.fsdp-inner {self.fsdp_inner} --mesh.sequence {self.sequence} "
            f"--mesh.tensor {self.tensor} "
            f"--mesh.gather {self.gather} --compute.rematerialisation {self.rematerialisation} "
            f"--optimizer.micro-batches {self.micro_batches} --optimizer.moments-dtype {self.moments_dtype}"
        )


def candidates(config: TrainConfig, model: ModelConfig, chips: int) -> Iterator[Candidate]:
    """Every candidate whose sizes divide, for the chips of one slice."""
    powers = [2**power for power in range(chips.bit_length())]
    for tensor in (size for size in powers if size <= 8 and model.heads % size == 0 and model.mlp_width % size == 0):
        for sequence in (size for size in powers if size <= 8 and config.data.sequence_length % (128 * size) == 0):
            shards, rest = divmod(chips, tensor * sequence)
            if rest or model.width % shards:
                continue
            for inner in (
                size for size in powers if size * size >= shards > 1 and shards % size == 0 and size < shards
            ):
                for micro_batches in powers[:6]:
                    if config.data.batch_size % (config.mesh.data * shards * micro_batches) == 0:
                        for kept, gather, moments in product(
                            REMATERIALISATIONS, ("layer", "step"), ("float32", "bfloat16")
                        ):
                            yield Candidate(
                                shards // inner, inner, sequence, tensor, kept, micro_batches, gather, moments
                            )


def least_memory(candidate: Candidate, config: TrainConfig, model: ModelConfig) -> float:
    """Bytes a chip by arithmetic: parameters and gradients in fp32, moments as asked for, and in bf16 what is
    kept of each layer and the weights that are gathered once. A lower bound."""
    shards = candidate.fsdp * candidate.fsdp_inner
    tokens = (
        config.data.batch_size
        * config.data.sequence_length
        / (config.mesh.data * shards * candidate.sequence * candidate.micro_batches)
    )
    attention = model.width / candidate.tensor
    projections = 2 * attention + 2 * model.kv_heads * model.head_dim + model.width
    products = projections + model.mlp_width / candidate.tensor
    kept = {
        "full": 0.0,
        "attention": attention,
        "projections": projections,
        "products": products,
        "nothing": products + model.width + model.mlp_width / candidate.tensor,
    }
    parameters = parameter_count(model) / candidate.tensor
    state = parameters * (16 if candidate.moments_dtype == "float32" else 12) / shards + (
        2 * parameters if candidate.gather == "step" else 0
    )
    return state + 2 * tokens * model.layers * (model.width + kept[candidate.rematerialisation])


def least_seconds(candidate: Candidate, config: TrainConfig, model: ModelConfig, chip: Chip, chips: int) -> float:
    """Seconds of a step by arithmetic: matrix products at the peak, with those that are computed again (never
    the last of a layer)."""
    tokens = config.data.batch_size * config.data.sequence_length
    passes = {"full": 6 / 5, "attention": 6 / 5, "projections": 17 / 15}.get(candidate.rematerialisation, 1.0)
    return (
        flops_per_token(model, config.data.sequence_length) * passes * tokens / (chips * config.mesh.data * chip.peak)
    )


def search(
    config: TrainConfig,
    model: ModelConfig,
    topology: str,
    slices: int,
    log: Path,
    console: Console,
    *,
    budget: int,
    planner: Callable[..., Plan] = make_plan,
) -> list[tuple[Candidate, dict]]:
    """Compiles up to `budget` candidates, the most promising first, and returns those that fit, fastest first.

    Args:
        log: JSON lines, one a candidate; those that it holds already, for this topology and batch, are not
            compiled again.

    Raises:
        InputError: no candidate divides or can fit.
    """
    chip = CHIPS[topology.partition(":")[0]]
    chips = math.prod(int(size) for size in topology.partition(":")[2].split("x"))
    possible = [
        each for each in candidates(config, model, chips) if least_memory(each, config, model) < 0.95 * chip.hbm
    ]
    if not possible:
        raise InputError(f"No mesh over {chips} chips of {topology} divides this config and can hold it.")

    # Fewer collectives win among equals: little tensor and sequence parallelism, few gathers and scatters,
    # two axes of like sizes. Moments in bf16 save memory, not time.
    def promise(each: Candidate) -> tuple:
        seconds = least_seconds(each, config, model, chip, chips) * (1 + 0.05 * math.log2(each.tensor * each.sequence))
        gathers = 1 if each.gather == "step" else each.micro_batches * (1 if each.rematerialisation == "nothing" else 2)
        seconds += (gathers + each.micro_batches) * 2 * parameter_count(model) / each.tensor / chip.interconnect
        return seconds, each.moments_dtype == "bfloat16", abs(each.fsdp_inner - each.fsdp)

    possible.sort(key=promise)
    searched = replace(config, output=Path(), mesh=MeshConfig(config.mesh.data))
    fingerprint = hashlib.sha256(repr((Candidate(1, 1, 1, 1, "full", 1).apply(searched), model)).encode()).hexdigest()[
        :16
    ]
    key = {"topology": topology, "slices": slices, "config": fingerprint}
    lines = json_lines.read_log(log) if log.exists() else []
    json_lines.mend_log(log)
    known = {Candidate(**line["candidate"]): line["plan"] for line in lines if line["key"] == key}
    todo = [each for each in possible if each not in known][: max(budget - len(known), 0)]
    console.print(f"{len(possible)} candidates can fit, {len(known)} are known from {log}, {len(todo)} to compile")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress, log.open("ab") as file:
        for each in progress.track(todo, description="compiling"):
            fastest = min((plan["step_seconds"] for plan in known.values() if plan), default=math.inf)
            if least_seconds(each, config, model, chip, chips) > fastest:
                continue
            try:
                plan = json.loads(json.dumps(planner(each.apply(config), model, topology, slices).as_dict()))
            except InputError as error:
                console.print(f"{each.flags}: {error}")
                plan = None
            known[each] = plan
            file.write(json_lines.line_of({"key": key, "candidate": each.__dict__, "plan": plan}))
            file.flush()
    return sorted(((each, plan) for each, plan in known.items() if plan), key=lambda found: found[1]["step_seconds"])


def print_ranking(found: list[tuple[Candidate, dict]], console: Console) -> None:
    """The candidates that fit, fastest first, and the options of the best."""
    if not found:
        raise InputError("Nothing that was compiled fits: give a larger --budget, a smaller batch or more chips.")
    columns = (
        "fsdp",
        "sequence",
        "tensor",
        "gathered",
        "kept",
        "micro-batches",
        "moments",
        "s a step",
        "MFU at most",
        "HBM, GiB",
    )
    table = Table(*columns, title="fastest first")
    for each, plan in found:
        shape = (
            f"{each.fsdp} x {each.fsdp_inner}",
            str(each.sequence),
            str(each.tensor),
            f"by {each.gather}",
            each.rematerialisation,
        )
        figures = f"{plan['step_seconds']:.2f}", f"{plan['mfu']:.1%}", f"{plan['memory_peak'] / GIB:.1f}"
        table.add_row(*shape, str(each.micro_batches), each.moments_dtype, *figures)
    console.print(table)
    console.print(f"the best, as options of `aurora train`:\n  {found[0][0].flags}", soft_wrap=True)


CONFIG_FILE = '''"""Found by `aurora plan --search` for {slices} x {topology}.

Estimated: {step_seconds:.2f} s a step, MFU at most {mfu:.1%}, {memory:.1f} of {capacity:.0f} GiB of HBM a chip.
"""

from pathlib import Path

from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, MeshConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage


def config() -> TrainConfig:
    return {config}
'''


def write_config(config: TrainConfig, plan: dict, path: Path) -> None:
    """A config file that `aurora train` and `aurora plan` read, with the plan's figures in its docstring."""
    text = pprint.pformat(config, width=120).replace("PosixPath(", "Path(").replace("\n", "\n" + " " * 11)
    sizes = {"memory": plan["memory_peak"] / GIB, "capacity": plan["memory_capacity"] / GIB}
    path.write_text(
        CONFIG_FILE.format(
            config=text, **sizes, **{name: plan[name] for name in ("slices", "topology", "step_seconds", "mfu")}
        )
    )
