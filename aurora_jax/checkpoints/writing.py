"""Checkpoints are written: whole or not at all, with what proves them."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from aurora_jax.checkpoints import checksums
from aurora_jax.checkpoints.format import (
    FILES,
    METADATA,
    PARAMETERS,
    RUN,
)
from aurora_jax.checkpoints.metadata import FORMAT_VERSION, CheckpointMetadata, Contents
from aurora_jax.checkpoints.provenance import made_with
from aurora_jax.errors import InputError
from aurora_jax.model.decoder import check_parameters
from aurora_jax.model.sharding import TABLE, flatten, nest
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.carried_files import encode_files
from aurora_jax.storage.places import Location, absolute, is_remote
from aurora_jax.storage.records import json_sha256

JSON_FILE = "metadata"
"""Orbax's name of the file of an item that is JSON."""

CHUNK_BYTES = 8 * 2**20
"""Stored chunks are at most this large: enough for object stores, and small enough that buffers of it leave
memory flat. Only key and value of one head, which conversion does not part, may be larger: 14 MiB in BLOOM
176B."""


def save_args(parameters: dict) -> dict:
    """How Orbax should cut parameters into chunks: at most CHUNK_BYTES, and of stacked ones a layer each, so
    that slices can be read alone.

    For anything that has the decoder's nested dictionary: parameters, moments.
    """
    return nest(
        {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=_layer_axes(path)) for path in flatten(parameters)}
    )


def _layer_axes(path: str) -> tuple[int, ...]:
    return (0,) if TABLE[path].letters.startswith("N") else ()


def save_checkpoint(
    path: Location,
    parameters: dict,
    metadata: CheckpointMetadata,
    files: Mapping[str, bytes] | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes a complete checkpoint, or nothing at all; `run` are the facts of the run whose stage it ends.

    Raises:
        InputError: the destination exists or cannot be written, or the parameters do not fit the metadata's
            config or dtype.
    """
    check_parameters(metadata.config, parameters)
    arrays = flatten(parameters)
    for name, leaf in arrays.items():
        if leaf.dtype != jnp.dtype(metadata.parameter_dtype):
            raise InputError(
                f"{name} is {leaf.dtype}; the metadata of {path} says parameter_dtype {metadata.parameter_dtype}."
            )
    write_checkpoint(
        path,
        ocp.StandardCheckpointHandler(),
        ocp.args.StandardSave(parameters, save_args(parameters)),
        sealed(metadata, {PARAMETERS: parameters}, texts_of(files or {}, run)),
        files or {},
        run,
    )


def texts_of(files: Mapping[str, bytes], run: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The items of a checkpoint that are JSON, but for the metadata."""
    return {FILES: encode_files(files)} | ({} if run is None else {RUN: dict(run)})


def sealed(
    metadata: CheckpointMetadata, trees: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]]
) -> CheckpointMetadata:
    """The metadata that hold a checkpoint to its contents: checksums of the arrays of `trees`, by item, computed where
    they lie (a collective over their processes), and digests of `texts`."""
    sums = {item: {name: str(each) for name, each in checksums.of_arrays(tree).items()} for item, tree in trees.items()}
    sizes = {item: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for item, tree in trees.items()}
    return proved_by(metadata, sums, sizes, texts)


def proved_by(
    metadata: CheckpointMetadata,
    sums: Mapping[str, Mapping[str, str]],
    sizes: Mapping[str, int],
    texts: Mapping[str, Mapping[str, Any]],
) -> CheckpointMetadata:
    """`sealed`, of arrays whose checksums and sizes are known."""
    contents = Contents(
        checksums={item: dict(of_arrays) for item, of_arrays in sums.items()},
        sha256={item: json_sha256(text) for item, text in texts.items()},
        bytes={**sizes, **{item: len(json.dumps(text)) for item, text in texts.items()}},
    )
    return replace(metadata, contents=contents, made_with=made_with(), format_version=FORMAT_VERSION)


def finish_metadata(path: Location, metadata: CheckpointMetadata) -> None:
    """Replaces the metadata of a checkpoint on the local disk that nobody reads yet: of one whose arrays were written
    after them."""
    write_file(Path(path) / METADATA / JSON_FILE, json.dumps(metadata.to_json()))


def write_checkpoint(
    path: Location,
    parameters_handler: ocp.CheckpointHandler,
    parameters: ocp.args.CheckpointArgs,
    metadata: CheckpointMetadata,
    files: Mapping[str, bytes],
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint whose parameters come from any Orbax handler; what is half-written is removed if
    anything goes wrong.

    `files` travel with the model: see `read_files`.

    Raises:
        InputError: the destination exists or cannot be written.
    """
    destination = require_free(path)
    # Directories first: a writer that fails while threads still wait for theirs would leave the process
    # hanging for minutes.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    texts = {**texts_of(files, run), METADATA: metadata.to_json()}
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options),
        **{PARAMETERS: parameters_handler, **{name: ocp.JsonCheckpointHandler() for name in texts}},
    )
    items = {PARAMETERS: parameters, **{name: ocp.args.JsonSave(text) for name, text in texts.items()}}
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(destination, ocp.args.Composite(**items))
    except BaseException as error:  # Ctrl-C included: Orbax's temporary directory must not stay behind
        for temporary in (
            destination.parent.glob(f"{destination.name}.orbax-checkpoint-tmp*") if destination.parent.is_dir() else ()
        ):
            temporary.rmtree(missing_ok=True)
        if is_remote(destination):  # Orbax writes to the very place
            with contextlib.suppress(Exception):  # the error that is known already
                destination.rmtree(missing_ok=True)
        if isinstance(error, OSError) or (is_remote(destination) and isinstance(error, Exception)):
            raise InputError(f"{destination} cannot be written: {error}.") from error
        raise


def require_free(path: Location) -> epath.Path:
    """The absolute destination. Raises InputError if it exists (nothing is ever overwritten), or if nothing
    could be read there."""
    destination = require_plain(path)
    if destination.exists():
        raise InputError(f"{destination} exists already: remove it, or give another destination.")
    return destination


def require_plain(path: Location) -> epath.Path:
    """The absolute path of a folder for checkpoints.

    Raises:
        InputError: its name reads as a pattern that it does not match itself, as `a[b]` does: Orbax looks by
            such patterns for what it has written, finds nothing, and leaves a checkpoint without arrays,
            silently.
    """
    destination = absolute(path)
    if not fnmatchcase(str(destination), str(destination)):
        raise InputError(
            f"{destination}: Orbax cannot write checkpoints where a folder has brackets in its name; choose "
            "one without [ ]."
        )
    return destination
