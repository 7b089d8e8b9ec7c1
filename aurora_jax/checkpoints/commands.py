"""`aurora checkpoints`: what a run has kept, whether it is sound, what can go, and where it came from."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.tree import Tree

from aurora_jax.checkpoints import format, run_folder
from aurora_jax.checkpoints.arrays import prove_arrays
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.errors import Damaged, InputError
from aurora_jax.storage.places import (
    Place,
    absolute,
    absolute_place,
    files_below,
    place_of,
    refused_as,
    remove,
    status_of,
)


def _checkpoints_of(path: Place) -> list[Place]:
    """A checkpoint itself; of a run, its steps in order and then its stages, whatever is in them. Raises InputError."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder.")
    if (path / format.METADATA).exists() or (path / format.PARAMETERS).exists():
        return [absolute_place(path)]
    steps = [run_folder.step_folder(path, step) for step in run_folder.steps_in(path)]
    stages = absolute_place(path) / run_folder.STAGES
    named = [entry for entry in stages.iterdir() if format.TEMPORARY not in entry.name] if stages.is_dir() else []
    if not (found := steps + sorted(named, key=lambda entry: _written(entry))):
        raise InputError(f"{path}: neither a checkpoint nor a run with checkpoints/ or stages/.")
    return found


def _bytes_on_disk(folder: Place) -> int:
    return sum(status_of(file)[0] for file in files_below(folder))


def _written(checkpoint: Place) -> float:
    """Seconds since 1970; 0 for one that was never finished."""
    marker = checkpoint / format.COMMIT_MARKER
    return status_of(marker)[1] if marker.exists() else 0.0


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"


@dataclass(frozen=True)
class ListCommand:
    """Lists the checkpoints of a run: step, stage, size, when and by which code they were written, and whether they are
    complete. Their arrays are not read: that is `aurora checkpoints verify`."""

    folder: tyro.conf.Positional[Path]
    """A run, or one checkpoint."""

    def run(self) -> None:
        """Raises InputError if there is none."""
        table = Table("checkpoint", "step", "stage", "on disk", "written", "code", "state", title=str(self.folder))
        for path in _checkpoints_of(place_of(self.folder)):
            problem = format.problem_of(path)
            try:
                said = format.read_metadata_of(absolute(path))
                step, stage = str(said.step), said.stage or ""
                code = said.made_with.get("revision", "")[:12] or f"jax {said.made_with.get('jax', 'unknown')}"
                state = problem or ("complete" if said.contents else "complete; has no checksums")
            except InputError as error:
                step, stage, code, state = "?", "", "", problem or str(error)
            at = _written(path)
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) if at else "never finished"
            name = f"{path.parent.name}/{path.name}"
            table.add_row(name, step, stage, _gigabytes(_bytes_on_disk(path)), written, code, state)
        # A pipe has no width: rich would cut at 80 columns.
        Console(width=None if sys.stdout.isatty() else 240).print(table)
        aside = absolute_place(place_of(self.folder)) / run_folder.SET_ASIDE
        for path in sorted(aside.iterdir()) if aside.is_dir() else ():
            Console().print(f"set aside: {path} ({_gigabytes(_bytes_on_disk(path))})", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class VerifyCommand:
    """Reads every array of a checkpoint, or of all checkpoints of a run, and compares it with its checksum. Memory
    stays at some megabytes. Exit status 2 if anything is not what was written; nothing is changed or moved."""

    folder: tyro.conf.Positional[Path]
    """A run, or one checkpoint."""

    def run(self) -> None:
        """Raises InputError if anything is damaged, or could not be proved."""
        console, bad = Console(), []
        for path in _checkpoints_of(place_of(self.folder)):
            try:
                said = proved(path)
            except Damaged as error:
                bad.append(path)
                console.print(f"{path}: DAMAGED. {error}", soft_wrap=True, highlight=False, markup=False)
                continue
            if said.contents is None:
                bad.append(path)
                console.print(f"{path}: cannot be proved, it has no checksums", soft_wrap=True, highlight=False)
                continue
            arrays = sum(len(sums) for sums in said.contents.checksums.values())
            size = _gigabytes(sum(said.contents.bytes.values()))
            console.print(f"{path}: sound, {arrays} arrays, {size}", soft_wrap=True, highlight=False)
        if bad:
            raise InputError(f"{len(bad)} of {len(_checkpoints_of(place_of(self.folder)))} checkpoints are not sound.")


def proved(path: Place) -> CheckpointMetadata:
    """Reads all of a checkpoint, with a progress bar on standard error; its metadata.

    Raises:
        Damaged: something is not what was written, or is missing.
    """
    if problem := format.problem_of(path):
        raise Damaged(problem)
    directory = absolute(path)
    metadata = format.read_metadata_of(directory)
    if metadata.contents is None:
        return metadata
    columns = (TextColumn(path.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(metadata.contents.bytes[item] for item in metadata.contents.checksums))
        for item in metadata.contents.checksums:
            prove_arrays(directory, item, lambda count: progress.advance(task, count))
    return metadata


@dataclass(frozen=True)
class PruneCommand:
    """Removes older checkpoints of a run, and says what that frees. Without --yes it only says what would go. The
    newest sound ones stay, as do the ends of stages. Not to be called while the run is at work."""

    folder: tyro.conf.Positional[Path]
    """A run."""
    keep: int = 1
    """Newest complete checkpoints that stay."""
    set_aside: bool = False
    """Remove damaged checkpoints that were set aside, too."""
    yes: bool = False
    """Do it."""

    def run(self) -> None:
        """Raises InputError if there is nothing to keep."""
        if self.keep < 1:
            raise InputError(f"--keep {self.keep}: at least one checkpoint stays; to remove a run, remove its folder.")
        folder = place_of(self.folder)
        steps = run_folder.steps_in(folder)
        sound = [step for step in steps if format.problem_of(run_folder.step_folder(folder, step)) is None]
        if not sound:
            raise InputError(f"{self.folder}: no complete checkpoint, so that none would be left: nothing is removed.")
        oldest_kept = sound[-self.keep :][0]
        go = [run_folder.step_folder(folder, step) for step in steps if step < oldest_kept]
        aside = absolute_place(folder) / run_folder.SET_ASIDE
        if self.set_aside and aside.is_dir():
            go += sorted(aside.iterdir())
        for path in go:
            size = _gigabytes(_bytes_on_disk(path))
            if self.yes:
                remove(path)
            print(f"{'removed' if self.yes else 'would remove'} {path} ({size})")
        print(f"{len(go)} go, {len(steps) - sum(path.parent != aside for path in go)} steps stay" + self._hint(go))

    def _hint(self, go: list[Place]) -> str:
        return "; --yes does it" if go and not self.yes else ""


@dataclass(frozen=True)
class LineageCommand:
    """Prints where a checkpoint, or a run's newest one, came from: the first weights, then each stage with its steps,
    and the data, the tokenizer and the code."""

    folder: tyro.conf.Positional[Path]
    """A run, or one checkpoint."""

    def run(self) -> None:
        """Raises InputError if there is no complete checkpoint."""
        directory = format.resolve(self.folder)
        said = format.read_metadata_of(directory)
        branch = tree = Tree(f"{directory}")
        branch = branch.add(f"first weights: {_first_weights(said.source)}")
        before = 0
        for stage in said.lineage:
            step = stage.get("step", 0)
            branch = branch.add(f"stage {stage.get('stage')}: steps {before + 1} to {step} of {stage.get('run', '?')}")
            before = step
        if said.step != before:
            branch = branch.add(f"stage {said.stage}: steps {before + 1} to {said.step}, where this was written")
        tree.add(f"tokenizer: {said.tokenizer_sha256 or 'none'}")
        data = tree.add("data, fingerprints of the stores" if said.data_fingerprints else "data: none")
        for task, fingerprint in sorted(said.data_fingerprints.items()):
            data.add(f"{task}: {fingerprint}")
        made_with = ", ".join(f"{name} {version}" for name, version in said.made_with.items())
        tree.add(f"made with: {made_with or 'unknown'}")
        Console().print(tree, soft_wrap=True, highlight=False, markup=False)


def _first_weights(source: dict[str, Any] | None) -> str:
    if source is None:
        return "unknown"
    if "random_seed" in source:
        return f"random, seed {source['random_seed']}"
    return str(source.get("path", source))


@dataclass(frozen=True)
class NewestCommand:
    """Prints the newest complete checkpoint of a run as JSON, for programs: its step (null if there is none) and the
    revision of the code that wrote it (null if it does not say)."""

    folder: tyro.conf.Positional[Path]
    """A run."""

    def run(self) -> None:
        """Raises InputError if the folder cannot be read."""
        folder = place_of(self.folder)
        with refused_as(f"{folder} cannot be read"):
            step = run_folder.newest_step(folder)
        said = format.read_metadata_of(absolute(run_folder.step_folder(folder, step))) if step is not None else None
        print(json.dumps({"step": step, "revision": said.made_with.get("revision") if said else None}))


COMMANDS: dict[str, Any] = {
    "ls": ListCommand,
    "verify": VerifyCommand,
    "prune": PruneCommand,
    "lineage": LineageCommand,
    "newest": NewestCommand,
}
