"""A conversion that survives its process: what it has written waits beside the destination, with a journal,
until it is complete.

For a destination `NAME` there is, while it is being written and after it was interrupted, the folder
`.NAME.partial` with

journal     a line of JSON that says what is converted and how; then a line for each block that is finished
output      what becomes `NAME`, by one rename, when all of it is there

A block is noted when its data has reached the disk: neither a killed process nor a power cut leaves a note
without its block.
"""

import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aurora_jax.checkpoints.format import PARTIAL_SUFFIX
from aurora_jax.errors import InputError

NOTE = "\t"


class Partial:
    """The folder of one conversion, held by this process alone."""

    def __init__(self, destination: Path, journal: int, done: dict[str, str]):
        self.destination = destination
        self.output = folder_of(destination) / "output"
        """What becomes the destination. Whoever writes the first block makes it."""
        self.done = done
        """Blocks that are finished, and what was noted of each."""
        self.complete = False
        """Whether an earlier process died after the rename: there is nothing left to do."""
        self._journal = journal
        self._lock = threading.Lock()

    def finish(self, block: str, note: str) -> None:
        """Notes that a block is on the disk, with a word on what it holds. Any thread may call it."""
        with self._lock:
            os.write(self._journal, f"{block}{NOTE}{note}\n".encode())
            self.done[block] = note


def folder_of(destination: Path) -> Path:
    """Where a conversion waits until it is complete."""
    return destination.with_name(f".{destination.name}{PARTIAL_SUFFIX}")


@contextmanager
def partial_output(destination: str | os.PathLike[str], job: Mapping[str, Any], resume: bool) -> Iterator[Partial]:
    """Yields the folder that the block fills; renames its `output` to the destination at the end.

    After Ctrl-C, or when nothing more can be written (a full disk), finished blocks stay for `resume`; after
    any other error, or where no block was finished, nothing stays.

    Args:
        destination: must not exist.
        job: what is converted and how, as JSON values. Only the same job continues.
        resume: continue what an earlier process left, if it left anything.

    Raises:
        InputError: the destination exists or cannot be written, another process is at work on it, or an
            earlier one left something and `resume` is False or the job is another one.
    """
    path = Path(destination).absolute()
    if re.match(r"\w+:/", os.fspath(destination)):
        raise InputError(
            f"{destination}: a conversion is written to a local disk; copy it from there (gcloud storage cp -r)."
        )
    folder = folder_of(path)
    if path.exists() and not (resume and folder.exists() and not (folder / "output").exists()):
        raise InputError(f"{path} exists already: remove it, or give another destination.")
    try:
        if folder.exists() and not resume:
            _require_idle(folder)
            raise InputError(f"{folder} holds an interrupted conversion: continue it with --resume, or delete it.")
        folder.mkdir(parents=True, exist_ok=True)
        journal = os.open(folder / "journal", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}.") from error
    try:
        partial = _opened(path, journal, json.loads(json.dumps(job)))
        if path.exists():
            if not partial.done:
                raise InputError(f"{path} exists already: remove it, or give another destination.")
            partial.complete = True
        yield partial
        if not partial.complete:
            partial.output.rename(path)
        shutil.rmtree(folder)
    except BaseException as error:
        unfinished = _abandoned(folder, journal, error)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(unfinished) from error
        if isinstance(error, OSError):
            raise InputError(f"{path} cannot be written: {error}; {unfinished}.") from error
        raise
    finally:
        os.close(journal)


def _opened(path: Path, journal: int, job: dict[str, Any]) -> Partial:
    """Takes the folder for this process and reads its journal; begins one where there is none."""
    folder = folder_of(path)
    _lock(journal, folder)
    text = os.read(journal, os.fstat(journal).st_size)
    text = text[: text.rfind(b"\n") + 1]  # a killed process may leave half a line
    os.ftruncate(journal, len(text))
    os.lseek(journal, 0, os.SEEK_END)
    for entry in folder.iterdir():
        if entry.name != "journal" and not (entry.name == "output" and text):
            shutil.rmtree(entry)  # directories that Orbax had not finished
    if not text:
        os.write(journal, json.dumps(job).encode() + b"\n")
        return Partial(path, journal, {})
    header, *lines = text.decode().splitlines()
    try:
        before = json.loads(header)
    except ValueError:
        raise _AnotherJob(
            f"{folder}/journal is not one of a conversion: delete the folder, or give another destination."
        ) from None
    for name in {**before, **job}:
        if before.get(name) != job.get(name):
            raise _AnotherJob(
                f"{folder} was begun with {name} = {before.get(name)}, this command has {name} = "
                f"{job.get(name)}: repeat that command to "
                "continue, or delete the folder."
            )
    return Partial(path, journal, dict(line.split(NOTE, 1) for line in lines))


class _AnotherJob(InputError):
    """What is in the folder belongs to somebody else."""


def _lock(journal: int, folder: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _AnotherJob(f"{folder}: another process is converting to it at this moment.") from None


def _require_idle(folder: Path) -> None:
    if (folder / "journal").exists():
        with (folder / "journal").open() as journal:
            _lock(journal.fileno(), folder)


def _abandoned(folder: Path, journal: int, error: BaseException) -> str:
    """Removes what cannot be continued; says what became of it."""
    if isinstance(error, _AnotherJob):
        return ""
    os.lseek(journal, 0, os.SEEK_SET)
    finished = os.read(journal, os.fstat(journal).st_size).count(b"\n") - 1
    if finished > 0 and isinstance(error, KeyboardInterrupt | OSError):
        return f"what was converted is kept in {folder}: continue with --resume, or delete it"
    shutil.rmtree(folder, ignore_errors=True)
    return "nothing was written"
