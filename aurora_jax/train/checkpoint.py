"""Checkpoints of a run, and where a run starts from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from aurora_jax.checkpoints import format
from aurora_jax.checkpoints.format import CheckpointMetadata
from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.carried_files import encode_files
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.facts import require_same_run
from aurora_jax.train.processes import is_first
from aurora_jax.train.revision import revision_fact
from aurora_jax.train.state import TrainState

OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Start:
    """Where a run's first state comes from."""

    kind: Literal["resume", "checkpoint", "random"]
    path: Path | None = None


def choose_start(config: TrainConfig) -> Start:
    """The order in which a run looks for its state.

    1. Its own newest complete checkpoint: the same command again, after a preemption or a crash, goes on where it was.
    2. The checkpoint or run that it was told to start from: weights only, the optimizer is fresh. Converted
    weights are of this kind. 3. Random weights.

    Raises:
        InputError: the checkpoint to start from is not one, or the run would begin where the stages of an earlier one
            are.
    """
    if (newest := RunCheckpoints.newest_step(config.output)) is not None:
        return Start("resume", config.output / "checkpoints" / str(newest))
    stages = config.output.absolute() / "stages"
    kept = sorted(entry for entry in stages.iterdir() if format.is_checkpoint(entry)) if stages.is_dir() else []
    if kept:
        names = ", ".join(f"{entry.name} (step {format.read_metadata(entry).step})" for entry in kept)
        raise InputError(
            f"{stages} has {names} of an earlier run, of which {config.output / 'checkpoints'} has no "
            "checkpoint to go on from: this "
            f"run would begin anew and take them for its own. {_away(config.output)} --initial-checkpoint "
            "takes a stage's weights."
        )
    if config.initial_checkpoint is not None:
        return Start("checkpoint", Path(format.resolve(config.initial_checkpoint)))
    return Start("random")


def _away(output: Path) -> str:
    return f"Give another --output, or move the earlier run away: mv {output} {output}.earlier"


def require_no_earlier_run(output: Path, facts: Mapping[str, Any]) -> None:
    """Of a run that begins: is its folder free of what another run has left there?

    A run that died before its first checkpoint begins again in its folder: its metrics go, as those of steps that are
    done again always do.

    Raises:
        InputError: metrics.jsonl has steps of a run with other facts.
    """
    metrics = output / "metrics.jsonl"
    steps = sum("loss" in row for row in read_metrics(metrics)) if metrics.exists() else 0
    if not steps:
        return
    left = (
        f"{metrics} has {steps} steps of an earlier run, of which {output / 'checkpoints'} has no "
        "checkpoint to go on from."
    )
    kept_facts = output / "run.json"
    if not kept_facts.is_file():
        raise InputError(f"{left} It does not say which run it was. {_away(output)}")
    try:
        require_same_run(json.loads(kept_facts.read_text()), facts, kept_facts)
    except InputError as error:
        raise InputError(f"{left} {error} {_away(output)}") from error


class RunCheckpoints:
    """The checkpoints of one run: written in the background, complete or not there at all.

    Args:
        config: the run; its newest `checkpoint.keep` checkpoints stay.
        metadata: of the run's model; step and stage are filled in at each save.
        files: the tokenizer and what else travels with the model.
        facts: see `facts.run_facts`.
        run: what tells this run from others in the same folder, if it begins; one that is resumed has its own already.
    """

    def __init__(
        self,
        config: TrainConfig,
        metadata: CheckpointMetadata,
        files: Mapping[str, bytes],
        facts: Mapping[str, Any],
        run: str,
    ):
        self._output = config.output.absolute()
        self._ends = config.ends
        self._metadata = metadata
        self._files = dict(files)
        self._facts = {**facts, "run": run}
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
                    format.FILES: ocp.args.JsonSave(encode_files(self._files)),
                    format.METADATA: ocp.args.JsonSave(metadata.to_json()),
                    format.RUN: ocp.args.JsonSave({**self._facts, **revision_fact()}),
                }
            ),
        )

    def save_stage(self, state: TrainState, stage: str) -> Path:
        """Keeps the weights at a stage's end as OUTPUT/stages/NAME, with the lineage up to it; this run's own that are
        there stay.

        Raises:
            InputError: what is there is not this run's.
        """
        path = self._output / "stages" / stage
        step = int(jax.device_get(state.step))
        entry = {"stage": stage, "step": step, "run": str(self._output)}
        if entry not in self._metadata.lineage:
            self._metadata = replace(self._metadata, lineage=[*self._metadata.lineage, entry])
        if format.is_checkpoint(path):
            self._require_own_stage(path, step)
        else:
            # Where a stage is, there is a checkpoint to go on from: one that dies here is not taken for an earlier run.
            self._manager.wait_until_finished()
            metadata = replace(self._metadata, step=step, stage=stage)
            format.save_checkpoint(path, state.parameters, metadata, self._files, {**self._facts, **revision_fact()})
        return path

    def restore(self, like: TrainState) -> TrainState:
        """The newest complete state, in the shardings of `like` (`state.state_shapes`): each device reads its own part.

        Prints what is to be known of the differences to the earlier start.

        Raises:
            InputError: it was written by a run with other settings or another model, or a stage in the folder is of
                another run.
        """
        step = self.newest_step(self._output)
        where = self._output / "checkpoints" / str(step)
        found = format.read_metadata(where)
        format.require_same_architecture(found.config, self._metadata.config, where, "this run's model")
        saved = format.read_run(where)
        if saved is None:
            raise InputError(
                f"{where}: a checkpoint without the facts of its run cannot be resumed; begin from it "
                "(--initial-checkpoint)."
            )
        notes = require_same_run(saved, self._facts, where, step)
        self._facts["run"] = saved.get("run") or self._facts["run"]
        self._metadata = replace(self._metadata, lineage=found.lineage)
        for end, stage in self._ends.items():
            if format.is_checkpoint(self._output / "stages" / stage):
                self._require_own_stage(self._output / "stages" / stage, end)
        for note in notes if is_first() else ():
            print(note, flush=True)
        with format.damage_named(where):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        format.PARAMETERS: ocp.args.StandardRestore(like.parameters),
                        OPTIMIZER: ocp.args.StandardRestore(_without_parameters(like)),
                    }
                ),
            )
        return TrainState(restored[format.PARAMETERS], **restored[OPTIMIZER])

    def describe(self) -> None:
        """Writes OUTPUT/run.json, the facts for people, and for a start that finds no checkpoint."""
        write_file(self._output / "run.json", json.dumps(self._facts, indent=1) + "\n")

    def _require_own_stage(self, path: Path, step: int) -> None:
        """Was it written by this run, at this step? One of a version that did not name its run is compared by what it
        says of its data, its first weights and the stages before it.

        Raises:
            InputError: it was not.
        """
        metadata, facts = format.read_metadata(path), format.read_run(path)
        ours: dict[str, Any] = {"step": step, "run": self._facts["run"]}
        theirs: dict[str, Any] = {"step": metadata.step, "run": (facts or {}).get("run")}
        if theirs["run"] is None:
            common = min(len(metadata.lineage), len(self._metadata.lineage))
            for each, said in ((ours, self._metadata), (theirs, metadata)):
                each["data"] = {task: said.data_fingerprints.get(task) for task in metadata.data_fingerprints}
                each["source"] = said.source
                each["lineage"] = [(entry["stage"], entry["step"]) for entry in said.lineage[:common]]
            del ours["run"], theirs["run"]
        if ours != theirs:
            raise InputError(
                f"{path} was written by another run: {theirs}, where this one has {ours}. It is neither taken "
                "for this run's nor "
                f"overwritten: move it away (mv {path} {path}.earlier), and give the same command again."
            )

    def close(self) -> None:
        """Waits for what is being written; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.close()


def _without_parameters(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in state._asdict().items() if name != "parameters"}
