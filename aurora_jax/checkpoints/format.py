"""One checkpoint format for converted weights and for training: an Orbax composite directory that needs
nothing beside it.

params      the nested dictionary of the decoder, layers stacked (`TABLE` in `sharding.py`)
tokenizer   JSON, file name to text, or to {"base64": ...} where a file is not text: all files that travel with a model
metadata    JSON, `CheckpointMetadata`: what the model is, and what every item is held to
optimizer   only in checkpoints of a training run (written by `aurora_jax/train/checkpoint.py`)
run         JSON, the facts of the run (`aurora_jax/train/facts.py`); in its checkpoints, and in those of its
            stages' ends

Whatever is read is compared with the metadata's checksums: what differs raises `Damaged` and names the array or
the item. A checkpoint of format 1, of versions until 2026-11-25, has none; it is read, and that is said.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from aurora_jax.checkpoints.metadata import FORMAT_VERSION, CheckpointMetadata
from aurora_jax.errors import Damaged, InputError
from aurora_jax.storage.carried_files import decode_files
from aurora_jax.storage.places import Location, Place, absolute
from aurora_jax.storage.records import json_sha256

PARTIAL_SUFFIX = ".partial"
"""Of folders whose contents are still being written; see `convert/partial.py`."""

PARAMETERS, OPTIMIZER, FILES, METADATA, RUN = "params", "optimizer", "tokenizer", "metadata", "run"
COMMIT_MARKER = "_CHECKPOINT_METADATA"
"""Orbax writes it first, and the time of the commit into it last."""

COMMIT_MARK_IN_BUCKET = "commit_success.txt"
"""Orbax writes it beside the marker where folders cannot be renamed, and takes no checkpoint for one without it."""
COMMITTED = "commit_timestamp_nsecs"
TEMPORARY = "orbax-checkpoint-tmp"
"""In the names of folders that Orbax has not finished."""


def is_checkpoint(path: Location) -> bool:
    """Whether the directory is a complete checkpoint: Orbax and conversions rename or mark a directory only
    when all of it is written."""
    directory = absolute(path)
    if directory.parent.suffix == PARTIAL_SUFFIX or TEMPORARY in directory.name:
        return False
    return not missing_items(directory)


def missing_items(directory: epath.Path) -> list[str]:
    """What a checkpoint lacks to be complete: its commit marker, its metadata, or an item that the metadata names."""
    needed = [COMMIT_MARKER, METADATA, PARAMETERS]
    if (missing := [name for name in needed if not (directory / name).exists()]) or not directory.is_dir():
        return missing
    if not is_committed(directory):
        return [f"a time of commit in {COMMIT_MARKER}"]
    try:
        contents = read_metadata_of(directory).contents
    except InputError:  # said when it is read
        return []
    return sorted(name for name in (contents.items if contents else ()) if not (directory / name).exists())


def is_committed(directory: Place) -> bool:
    """Whether a folder's writer came to its end, whatever has become of it since. On a file system nothing else has a
    checkpoint's name; in a bucket, where folders cannot be renamed, what a save that was cut off has left has."""
    try:
        said = json.loads((directory / COMMIT_MARKER).read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:  # damaged: that was written
        return True
    return not isinstance(said, dict) or said.get(COMMITTED, "") is not None


def resolve(path: Location) -> epath.Path:
    """The checkpoint that a path means: itself, or the newest complete step of a run directory
    (`RUN/checkpoints/<step>`).

    A named checkpoint of a stage is a checkpoint at `RUN/stages/<name>`.

    Raises:
        InputError: there is none; the message lists what was found.
    """
    directory = absolute(path)
    if is_checkpoint(directory):
        return directory
    if not directory.is_dir():
        raise InputError(f"{directory}: no such checkpoint directory.")
    folders = [folder for folder in (directory, directory / "checkpoints", directory / "stages") if folder.is_dir()]
    found = [entry for folder in folders for entry in folder.iterdir()]
    complete = [
        step for step in found if step.name.isdigit() and step.parent.name == "checkpoints" and is_checkpoint(step)
    ]
    if complete:
        newest = max(complete, key=lambda step: int(step.name))
        for step in found:
            if step.parent == newest.parent and step.name.isdigit() and int(step.name) > int(newest.name):
                lacking = ", ".join(missing_items(step))
                print(f"{step} is incomplete (without {lacking}): {newest} is taken", file=sys.stderr)
        return newest
    if (directory / "config.json").exists():
        raise InputError(
            f"{directory} is a Hugging Face folder: make a checkpoint of it with `python -m convert "
            f"from-torch {path} DST`."
        )
    names = sorted(str(entry.relative_to(directory)) for entry in found)
    raise InputError(
        f"{directory}: neither a checkpoint (a directory with {PARAMETERS}/ and {METADATA}/) nor a run with a "
        "complete step in "
        f"checkpoints/; found {', '.join(names[:20]) or 'nothing'}."
    )


def read_metadata(path: Location) -> CheckpointMetadata:
    """The metadata of a checkpoint (or of the newest one of a run). Raises InputError."""
    return read_metadata_of(resolve(path))


def read_metadata_of(directory: epath.Path) -> CheckpointMetadata:
    """The metadata of a checkpoint, complete or not. Raises InputError; Damaged if it is not what was written."""
    metadata = CheckpointMetadata.from_json(_read_json(directory / METADATA), directory)
    if metadata.contents is None:
        if metadata.format_version == FORMAT_VERSION:
            raise Damaged(f"{directory}: metadata does not say what the items hold: it was never finished.")
        _say_unproved(str(directory))
    return metadata


@cache
def _say_unproved(directory: str) -> None:
    """Once a checkpoint."""
    print(f"{directory}: of a version without checksums (until 2026-11-25): damage cannot be seen", file=sys.stderr)


def problem_of(directory: Location) -> str | None:
    """What is wrong with a checkpoint, as far as that can be known without its arrays; None if nothing is."""
    folder = absolute(directory)
    if missing := missing_items(folder):
        return f"{folder}: the checkpoint is incomplete: without {', '.join(missing)}"
    try:
        read_metadata_of(folder)
        for item in (FILES, RUN):
            _read_proved_json(folder, item)
    except Damaged as error:
        return str(error)
    return None


def read_files(path: Location) -> dict[str, bytes]:
    """The files that travel with the model, its tokenizer, generation config, licence, ...: contents by name.

    Raises:
        InputError: not a checkpoint, or files that are damaged or would be written elsewhere.
    """
    directory = resolve(path)
    return decode_files(_read_proved_json(directory, FILES) or {}, directory / FILES)


def read_run(path: Location) -> dict[str, Any] | None:
    """The facts of the run that wrote a checkpoint; None if none did, or one of a version that left them out.
    Raises InputError."""
    return _read_proved_json(resolve(path), RUN)


def _read_proved_json(directory: epath.Path, item: str) -> dict[str, Any] | None:
    """None if the checkpoint has no such item. Raises Damaged if it is not what was written."""
    contents = read_metadata_of(directory).contents
    if not (directory / item).exists():
        if contents and item in contents.items:
            raise Damaged(f"{directory}: the checkpoint is damaged: {item} is missing")
        return None
    values = dict(_read_json(directory / item))
    if contents and contents.sha256.get(item) != json_sha256(values):
        raise Damaged(f"{directory / item}: the checkpoint is damaged: it is not what was written")
    return values


def _read_json(item: epath.Path) -> dict[str, Any]:
    with closing(ocp.JsonCheckpointHandler()) as handler, damage_named(item):
        values = handler.restore(item)
    if not isinstance(values, dict):
        raise Damaged(f"{item}: the checkpoint is damaged: a JSON object is expected")
    return values


UNREACHABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")
"""Codes in TensorStore's messages that say nothing of the files."""


@contextmanager
def damage_named(item: epath.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise about unreadable files into a message that names the checkpoint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = f"{error.__cause__ or error}"
        if isinstance(error, PermissionError) or any(word in said for word in UNREACHABLE):
            raise InputError(f"{item} cannot be read: {said}") from error
        # Orbax, TensorStore and the codecs have no class in common for what damaged bytes make them raise.
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            raise
        raise Damaged(f"{item}: the checkpoint is damaged or incomplete: {said}") from error
