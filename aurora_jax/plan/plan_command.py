"""`aurora plan`: does a config fit a TPU topology, how fast can it go, what does it cost."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.chips import CHIPS, GIB
from aurora_jax.errors import InputError
from aurora_jax.model.config import PRESETS, ModelConfig
from aurora_jax.train.config import TrainConfig


@dataclass(frozen=True)
class PlanOptions:
    """Compiles the step that `aurora train` would run, for chips that are not there, and says what it needs.
    Nothing is allocated."""

    topology: str = "v5p:4x4x4"
    """Chips to plan for, such as v5p:4x4x4, v5e:16x16 or v6e:16x16; `--list` shows them all."""
    slices: int = 1
    """Such slices, joined by the data-center network: the mesh's `data` axis runs over them."""
    model: str | None = None
    """Preset of the architecture, for a config that starts from a checkpoint that is not here."""
    tokens: float = 435e9
    """Tokens of the run, for its time and cost."""
    price: float | None = None
    """US dollars a chip-hour; the on-demand list price without it."""
    picture: Path | None = None
    """Draw the memory and time bars to this file (.png or .svg)."""
    json: Path | None = None
    """Write everything found to this file."""
    search: bool = False
    """Compile many ways to run the config (mesh, rematerialisation, micro-batches, when weights are gathered,
    precision of the moments) and rank them; stop and start again as you like."""
    budget: int = 12
    """Candidates that a search compiles, minutes each."""
    search_log: Path = Path("plan_search.jsonl")
    """Where a search keeps what it has found."""
    write: Path | None = None
    """Write the best of a search as a config to this file."""
    suggest: bool = True
    """If it does not fit, look for the smallest change that does (compiles again, minutes each)."""


def list_topologies(console: Console) -> None:
    """A table of chips and the topologies they come in."""
    table = Table(
        title="chips",
        caption="peak: bf16 TFLOP/s; bandwidths: GB/s a chip; price: US dollars a chip-hour, on demand, from memory",
    )
    for column in ("chip", "HBM", "peak", "memory", "interconnect", "price", "topologies"):
        table.add_column(column, no_wrap=column != "topologies")
    for name, chip in CHIPS.items():
        facts = (
            f"{chip.hbm // GIB} GiB",
            f"{chip.peak / 1e12:.0f}",
            f"{chip.hbm_bandwidth / 1e9:.0f}",
            f"{chip.interconnect / 1e9:.0f}",
        )
        table.add_row(name, *facts, f"{chip.price:.2f}", " ".join(f"{name}:{size}" for size in chip.sizes))
    console.print(table)


def run(config: TrainConfig, options: PlanOptions, console: Console) -> None:
    """Plans and prints. Raises InputError if the config cannot be planned, or does not fit."""
    from aurora_jax.plan.estimate import DoesNotFit, described, make_plan, plan_evaluation, smallest_change

    model = model_of(config, options.model)
    if options.search:
        from aurora_jax.plan.search import print_ranking, search, write_config

        found = search(
            config, model, options.topology, options.slices, options.search_log, console, budget=options.budget
        )
        print_ranking(found, console)
        if options.write is not None:
            write_config(found[0][0].apply(config), found[0][1], options.write)
            console.print(f"written to {options.write}")
        return
    with console.status(f"compiling the step for {options.slices} x {options.topology}: a few minutes"):
        try:
            plan = make_plan(config, model, options.topology, options.slices)
        except DoesNotFit as error:
            change = smallest_change(config, model, options.topology, options.slices) if options.suggest else None
            hint = (
                f" Smallest change that fits: {change[0]} (peak {change[1].memory_peak / GIB:.1f} GiB)."
                if change
                else ""
            )
            raise InputError(f"{options.topology}: {error}{hint}") from None
        if config.evaluation.tasks:
            plan = replace(plan, evaluation=plan_evaluation(config, model, options.topology, options.slices))
    for part in described(plan, options.tokens, options.price):
        console.print(part)
    if options.picture is not None:
        from aurora_jax.plan.picture import draw

        draw(plan, options.picture)
        console.print(f"picture: {options.picture}")
    if options.json is not None:
        options.json.write_text(json.dumps(plan.as_dict(), indent=1) + "\n")


def model_of(config: TrainConfig, preset: str | None) -> ModelConfig:
    """Architecture of a config: its own, a preset's, or that of its checkpoint. Raises InputError if none is known."""
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"--model {preset!r} is no preset; there are {', '.join(PRESETS)}.")
        return PRESETS[preset]
    if config.model is not None:
        return config.model
    from aurora_jax.checkpoints.format import read_metadata

    assert config.initial_checkpoint is not None  # TrainConfig checks it
    if not config.initial_checkpoint.exists():
        raise InputError(
            f"{config.initial_checkpoint} is not here, and the architecture is in it: name a preset, --model "
            "starcoderplus "
            f"({', '.join(PRESETS)})."
        )
    return read_metadata(config.initial_checkpoint).config


@dataclass(frozen=True)
class PlanCommand:
    """Does a config fit a TPU topology, how fast can it go, what does it cost."""

    plan: tyro.conf.OmitArgPrefixes[PlanOptions]
    config: TrainConfig


def main(config: TrainConfig, arguments: list[str], prog: str) -> None:
    """Reads the options, those of the plan and of the config, and runs."""
    command = tyro.cli(PlanCommand, default=PlanCommand(PlanOptions(), config), args=arguments, prog=prog)
    run(command.config, command.plan, Console())
