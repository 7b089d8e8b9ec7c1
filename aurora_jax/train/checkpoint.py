"""Checkpoints of a run, and where a run starts from."""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from aurora_jax.checkpoints import format, run_folder
from aurora_jax.checkpoints.arrays import restore_arrays, stored_arrays
from aurora_jax.checkpoints.metadata import CheckpointMetadata, require_same_architecture
from aurora_jax.checkpoints.provenance import revision_fact
from aurora_jax.checkpoints.writing import save_args, save_checkpoint, sealed, texts_of
from aurora_jax.errors import Damaged, InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.storage import line_log
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place, absolute, absolute_place
from aurora_jax.storage.records import object_in
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.facts import require_same_run
from aurora_jax.train.guard import no_statistics
from aurora_jax.train.processes import is_first, of_first
from aurora_jax.train.state import TrainState

MOST_FAILURES = 5
"""Saves that may fail in a row."""
FIRST_PAUSE = 15.0
"""Seconds from a save that failed to the next try; they double."""
LONGEST_LOOK = 60.0
"""Of several processes: seconds between two agreements on whether a save is due."""
VISIBLE_SECONDS = 60.0
"""How long another host may take to see a checkpoint that the first one sees."""


@dataclass(frozen=True)
class Start:
    """Where a run's first state comes from."""

    kind: Literal["resume", "checkpoint", "random"]
    path: Place | None = None


def choose_start(config: TrainConfig) -> Start:
    """The order in which a run looks for its state.

    1. Its own newest complete checkpoint: the same command again, after a preemption or a crash, goes on where it was.
    2. The checkpoint or run that it was told to start from: weights only, the optimizer is fresh. Converted
    weights are of this kind. 3. Random weights.

    The first process looks, and all do as it says; damaged checkpoints are set aside.

    Raises:
        InputError: the checkpoint to start from is not one, or the run would begin where the stages of an earlier one
            are.
    """
    if (newest := _chosen_step(config.output)) is not None:
        return Start("resume", run_folder.step_folder(config.output, newest))
    stages = absolute_place(config.output) / "stages"
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
        return Start("checkpoint", format.resolve(config.initial_checkpoint))
    return Start("random")


def _chosen_step(output: Place) -> int | None:
    """The checkpoint that all processes go on from, chosen by the first: two hosts may see a folder differently."""
    newest = run_folder.newest_sound_step(output) if is_first() else None
    step = of_first(0 if newest is None else newest + 1) - 1
    if step < 0:
        return None
    end = time.monotonic() + VISIBLE_SECONDS
    while not format.is_checkpoint(run_folder.step_folder(output, step)):
        if time.monotonic() > end:
            raise InputError(
                f"{run_folder.step_folder(output, step)} is what process 0 goes on from, and process "
                f"{jax.process_index()} does not see it: is --output the same storage on all hosts?"
            )
        time.sleep(0.5)
    return step


def _away(output: Place) -> str:
    return f"Give another --output, or move the earlier run away: mv {output} {output}.earlier"


def require_no_earlier_run(output: Place, facts: Mapping[str, Any]) -> None:
    """Of a run that begins: is its folder free of what another run has left there?

    A run that died before its first checkpoint begins again in its folder: its metrics go, as those of steps that are
    done again always do.

    Raises:
        InputError: metrics.jsonl has steps of a run with other facts.
    """
    metrics = output / "metrics.jsonl"
    steps = sum("loss" in row for row in read_metrics(metrics)) if line_log.is_there(metrics) else 0
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
        require_same_run(object_in(kept_facts.read_bytes(), kept_facts), facts, kept_facts)
    except InputError as error:
        raise InputError(f"{left} {error} {_away(output)}") from error


class RunCheckpoints:
    """The checkpoints of one run: written in the background, complete or not there at all.

    A save that fails is said at once, counts as none, and is tried again with pauses that double.

    Args:
        config: the run; see `CheckpointConfig` for which of its checkpoints stay.
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
        self._output = absolute_place(config.output)
        self._ends = config.ends
        self._metadata = metadata
        self._files = dict(files)
        self._facts = {**facts, "run": run}
        self._config = json.loads(json.dumps(asdict(config), default=str))
        self._interval = config.checkpoint.minutes * 60
        policies: list[ocp.checkpoint_managers.PreservationPolicy] = [
            ocp.checkpoint_managers.LatestN(config.checkpoint.keep)
        ]
        if config.checkpoint.keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(config.checkpoint.keep_every))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            single_host_load_and_broadcast=True,
            # With directories made in the background, a save that fails (a full disk) would hang for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax fills pages with a save that fails; we say it
        self._grace, self._saving_since = config.checkpoint.grace_seconds, 0.0
        self._measured = False
        self._manager: ocp.CheckpointManager | None = None
        self._failures, self._failed = 0, False
        self._begun = time.monotonic()
        self._due_at = self._begun + self._interval if self._interval else float("inf")
        self._looked, self._next_look = (0, self._begun), 0

    def save(self, state: TrainState, stage: str) -> None:
        """Starts to write a checkpoint of the state; returns when the arrays have been copied from the devices.

        Raises:
            InputError: MOST_FAILURES saves in a row have failed.
        """
        step = int(jax.device_get(state.step))
        metadata = replace(self._metadata, step=step, stage=stage)
        arrays = {format.PARAMETERS: state.parameters, format.OPTIMIZER: _without_parameters(state)}
        texts = texts_of(self._files, self._run())
        self._due_at = time.monotonic() + self._interval if self._interval else float("inf")
        self._settle()
        self._saving_since = time.monotonic()
        try:
            if self._manager is None:
                with jax.transfer_guard("allow"):  # of several processes the first tells the others what is there
                    self._manager = ocp.CheckpointManager(self._output / run_folder.CHECKPOINTS, options=self._options)
            begun = self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        format.PARAMETERS: ocp.args.StandardSave(state.parameters, save_args(state.parameters)),
                        format.OPTIMIZER: ocp.args.StandardSave(arrays[format.OPTIMIZER]),
                        **{item: ocp.args.JsonSave(text) for item, text in texts.items()},
                        format.METADATA: ocp.args.JsonSave(sealed(metadata, arrays, texts).to_json()),
                    }
                ),
            )
        except Exception as error:  # Orbax raises what its storage does
            self._say_failed(error)
            return
        if not begun:
            raise RuntimeError(f"Orbax has left out the checkpoint of step {step}")
        self._failed = False

    def due(self, done: int) -> bool:
        """After so many steps: is it time for a checkpoint, by the clock or because the last one could not be written?

        Of several processes the first one's clock counts, and a failure of any; they agree at steps that all know.

        Raises:
            InputError: MOST_FAILURES saves in a row have failed.
        """
        if jax.process_count() == 1:
            self._look()
            return time.monotonic() >= self._due_at
        if done < self._next_look:
            return False
        self._look()
        step, then = self._looked
        now = time.monotonic()
        pace = max(1, done - step) / max(now - then, 1e-3)
        ahead = int(min(max(0.0, self._due_at - now), LONGEST_LOOK) * pace)
        with jax.transfer_guard("allow"):
            everyone = multihost_utils.process_allgather(np.array([self._failed, ahead], np.int32)).reshape(-1, 2)
        ahead = int(everyone[0, 1])
        self._looked, self._next_look = (done, now), done + max(1, ahead)
        return ahead == 0 or bool(everyone[:, 0].any())

    def save_stage(self, state: TrainState, stage: str) -> Place:
        """Keeps the weights at a stage's end as OUTPUT/stages/NAME, with the lineage up to it; this run's own that are
        there stay.

        Raises:
            InputError: what is there is not this run's.
        """
        path = self._output / run_folder.STAGES / stage
        step = int(jax.device_get(state.step))
        entry = {"stage": stage, "step": step, "run": str(self._output)}
        if entry not in self._metadata.lineage:
            self._metadata = replace(self._metadata, lineage=[*self._metadata.lineage, entry])
        if format.is_checkpoint(path):
            self._require_own_stage(path, step)
        else:
            # Where a stage is, there is a checkpoint to go on from: one that dies here is not taken for an earlier run.
            self.finish(state, stage)
            metadata = replace(self._metadata, step=step, stage=stage)
            save_checkpoint(path, state.parameters, metadata, self._files, self._run())
        return path

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state of a step, in the shardings and dtypes of `like` (`state.state_shapes`): each device reads its own
        part. Where it is damaged, it is set aside, and the one before it is read.

        Prints what is to be known of the differences to the earlier start.

        Raises:
            InputError: it was written by a run with other settings or another model, a stage in the folder is of
                another run, or no checkpoint is sound.
        """
        chosen: int | None = step
        while chosen is not None:
            try:
                return self._restore(like, chosen)
            except Damaged as error:
                if is_first():
                    run_folder.set_aside(self._output, chosen, str(error))
            chosen = _chosen_step(self._output)
        raise InputError(
            f"{self._output / run_folder.CHECKPOINTS} has no sound checkpoint left to go on from; the damaged ones are "
            f"in {self._output / run_folder.SET_ASIDE}. {_away(self._output)} --initial-checkpoint takes a stage's "
            "weights."
        )

    def _restore(self, like: TrainState, step: int) -> TrainState:
        where = run_folder.step_folder(self._output, step)
        found = format.read_metadata(where)
        require_same_architecture(found.config, self._metadata.config, where, "this run's model")
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
            if format.is_checkpoint(self._output / run_folder.STAGES / stage):
                self._require_own_stage(self._output / run_folder.STAGES / stage, end)
        for note in notes if is_first() else ():
            print(note, flush=True)
        parameters = restore_arrays(absolute(where), format.PARAMETERS, like.parameters)
        wanted = _without_parameters(like)
        if not any(name.startswith("statistics.") for name in stored_arrays(where, format.OPTIMIZER)):
            # Versions until 2026-11-25 kept an average of the norm alone.
            average = wanted.pop("statistics").norm_mean
            rest = restore_arrays(absolute(where), format.OPTIMIZER, {**wanted, "norm_average": average})
            del rest["norm_average"]
            none = jax.jit(no_statistics, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like.statistics))
            return TrainState(parameters, **rest, statistics=none())
        return TrainState(parameters, **restore_arrays(absolute(where), format.OPTIMIZER, wanted))

    def describe(self) -> None:
        """Writes OUTPUT/run.json, the facts for people, and for a start that finds no checkpoint."""
        write_file(self._output / "run.json", json.dumps(self._facts, indent=1) + "\n")

    def finish(self, state: TrainState, stage: str) -> None:
        """Waits for what is being written; what could not be is written again, now.

        Raises:
            InputError: MOST_FAILURES saves in a row have failed.
        """
        while True:
            self._settle()
            if not self._failed:
                return
            time.sleep(max(0.0, self._due_at - time.monotonic()))
            self.save(state, stage)

    def close(self) -> None:
        """Ends the threads; to be called when all is written."""
        if self._manager is not None:
            self._manager.close()

    def _run(self) -> dict[str, Any]:
        return {**self._facts, **revision_fact(), "config": self._config}

    def _settle(self) -> None:
        """Waits for what is being written. What one process could not write, none of them counts as written."""
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
                self._failures = 0
        except Exception as error:
            self._say_failed(error)
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                failed = multihost_utils.process_allgather(np.array([self._failed]))
            if np.any(failed):
                self._failed, self._manager = True, None

    def _look(self) -> None:
        """Has the save in the background failed? Of the first that has ended: is it quick enough?"""
        if self._manager is None:
            return
        try:
            self._manager.check_for_errors()
        except Exception as error:
            self._say_failed(error)
            return
        if not self._measured and not self._manager.is_saving_in_progress():
            self._measured = True
            self._say_if_slow(time.monotonic() - self._saving_since)

    def _say_if_slow(self, seconds: float) -> None:
        """A save that outlasts the notice of a preemption is lost: what is between two of them is what it costs."""
        if seconds > self._grace and is_first():
            bound = f"{self._interval / 60:g} minutes" if self._interval else "the steps"
            print(
                f"a checkpoint takes {seconds:.0f} s, and a preemption gives notice of {self._grace:.0f} s "
                f"(--checkpoint.grace-seconds): one that is cut off costs up to {bound} between two checkpoints; "
                "--checkpoint.minutes bounds that",
                flush=True,
            )

    def _say_failed(self, error: Exception) -> None:
        """Raises InputError when there is no point in trying again."""
        self._failures, self._failed = self._failures + 1, True
        with contextlib.suppress(Exception):  # the error that is known already
            if self._manager is not None:
                self._manager.close()
        self._manager = None
        newest = run_folder.newest_step(self._output)
        there = "there is none yet" if newest is None else f"the newest is of step {newest}, and is sound"
        if self._failures >= MOST_FAILURES:
            raise InputError(
                f"{self._output / run_folder.CHECKPOINTS}: {MOST_FAILURES} checkpoints in a row could not be written: "
                f"{error} ({there}). Make room, or mend what is wrong with the storage; the same command goes on."
            ) from error
        pause = FIRST_PAUSE * 2 ** (self._failures - 1)
        self._due_at = time.monotonic() + pause
        print(f"a checkpoint could not be written: {error}; {there}; next try in {pause:.0f} s", flush=True)

    def _require_own_stage(self, path: Place, step: int) -> None:
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


def _without_parameters(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in state._asdict().items() if name != "parameters"}
