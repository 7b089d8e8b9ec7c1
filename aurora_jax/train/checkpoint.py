"""Checkpoints of a run, and where a run starts from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from aurora_jax.errors import InputError
from aurora_jax.model import checkpoint as format
from aurora_jax.model.checkpoint import CheckpointMetadata
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.revision import revision_fact
from aurora_jax.train.state import TrainState

OPTIMIZER, RUN = "optimizer", "run"


@dataclass(frozen=True)
class Start:
    """Where a run's first state comes from."""

    kind: Literal["resume", "checkpoint", "random"]
    path: Path | None = None


def choose_start(config: TrainConfig) -> Start:
    """The order in which a run looks for its state.

    1. Its own newest complete checkpoint: the same command again, after a preemption or a crash, goes on where it was.
    2. The checkpoint or run that it was told to start from: weights only, the optimizer is fresh. Converted weights are of this kind.
    3. Random weights.

    Raises:
        InputError: the checkpoint to start from is not one.
    """
    if (newest := RunCheckpoints.newest_step(config.output)) is not None:
        return Start("resume", config.output / "checkpoints" / str(newest))
    if config.initial_checkpoint is not None:
        return Start("checkpoint", Path(format.resolve(config.initial_checkpoint)))
    return Start("random")


def run_facts(config: TrainConfig, data_fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same when a run is resumed, so that its steps are those of a run that was never stopped; JSON values."""
    return {
        "seed": config.seed,
        "dropout": config.dropout,
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "attend_across_documents": config.data.attend_across_documents,
        "optimizer": asdict(config.optimizer),
        "stages": [asdict(stage) for stage in config.stages],
        "data": dict(data_fingerprints),
    }


def require_same_run(saved: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> None:
    """Raises InputError, with both values, where a checkpoint's facts differ from the run's. New stages at the end are welcome."""
    for name, value in ours.items():
        before = saved.get(name)
        if name == "stages":
            value = value[: len(before or [])]
        if name == "data":
            value = {task: fingerprint for task, fingerprint in value.items() if task in (before or {})}
        if before != value:
            raise InputError(
                f"{where} was written by a run with {name} = {before}, this run has {name} = {value}. "
                "Resuming would not continue it: restore the setting, or start a new run (another --output) from that checkpoint."
            )


class RunCheckpoints:
    """The checkpoints of one run: written in the background, complete or not there at all.

    Args:
        config: the run; its newest `checkpoint.keep` checkpoints stay.
        metadata: of the run's model; step and stage are filled in at each save.
        tokenizer: files that make a checkpoint self-contained.
        facts: see `run_facts`.
    """

    def __init__(self, config: TrainConfig, metadata: CheckpointMetadata, tokenizer: Mapping[str, str], facts: Mapping[str, Any]):
        self._output = config.output.absolute()
        self._metadata = metadata
        self._tokenizer = dict(tokenizer)
        self._facts = dict(facts)
        self._manager = ocp.CheckpointManager(
            self._output / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.checkpoint.keep,
                # With directories made in the background, a save that fails (a full disk) would hang for minutes.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    @staticmethod
    def newest_step(output: Path) -> int | None:
        """The newest complete checkpoint of a run folder; what was being written when a process died does not count."""
        folder = output.absolute() / "checkpoints"
        steps = (
            [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and format.is_checkpoint(entry)]
            if folder.is_dir()
            else []
        )
        return max(steps, default=None)

    def save(self, state: TrainState, stage: str) -> None:
        """Starts to write a checkpoint of the state; returns when the arrays have been copied from the devices."""
        step = int(jax.device_get(state.step))
        metadata = replace(self._metadata, step=step, stage=stage)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    format.PARAMETERS: ocp.args.StandardSave(state.parameters, format.save_args(state.parameters)),
                    OPTIMIZER: ocp.args.StandardSave(_without_parameters(state)),
                    format.TOKENIZER: ocp.args.JsonSave(self._tokenizer),
                    format.METADATA: ocp.args.JsonSave(metadata.to_json()),
                    RUN: ocp.args.JsonSave({**self._facts, **revision_fact()}),
                }
            ),
        )

    def save_stage(self, state: TrainState, stage: str) -> Path:
        """Keeps the weights at a stage's end as OUTPUT/stages/NAME, with the lineage up to it; what is there already stays."""
        path = self._output / "stages" / stage
        step = int(jax.device_get(state.step))
        entry = {"stage": stage, "step": step, "run": str(self._output)}
        if entry not in self._metadata.lineage:
            self._metadata = replace(self._metadata, lineage=[*self._metadata.lineage, entry])
        if not format.is_checkpoint(path):
            format.save_checkpoint(path, state.parameters, replace(self._metadata, step=step, stage=stage), self._tokenizer)
        return path

    def restore(self, like: TrainState) -> TrainState:
        """The newest complete state, in the shardings of `like` (`state.state_shapes`): each device reads its own part.

        Raises:
            InputError: it was written by a run with other settings or another model.
        """
        step = self.newest_step(self._output)
        where = self._output / "checkpoints" / str(step)
        found = format.read_metadata(where)
        format.require_same_architecture(found.config, self._metadata.config, where, "this run's model")
        self._metadata = replace(self._metadata, lineage=found.lineage)
        with format.damage_named(where):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        format.PARAMETERS: ocp.args.StandardRestore(like.parameters),
                        OPTIMIZER: ocp.args.StandardRestore(_without_parameters(like)),
                        RUN: ocp.args.JsonRestore(),
                    }
                ),
            )
        require_same_run(restored[RUN], self._facts, where)
        rest = restored[OPTIMIZER]
        return TrainState(restored[format.PARAMETERS], **rest)

    def close(self) -> None:
        """Waits for what is being written; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.close()


def _without_parameters(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in state._asdict().items() if name != "parameters"}
