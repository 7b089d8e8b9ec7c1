"""One checkpoint format for converted weights and for training: an Orbax composite directory that needs
nothing beside it.

params      the nested dictionary of the decoder, layers stacked (`TABLE` in `sharding.py`)
tokenizer   JSON, file name to text, or to {"base64": ...} where a file is not text: all files that travel with a model
metadata    JSON, `CheckpointMetadata`
optimizer   only in checkpoints of a training run (written by `aurora_jax/train/checkpoint.py`)
run         JSON, the facts of the run (`aurora_jax/train/facts.py`); in its checkpoints, and in those of its
            stages' ends
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from aurora_jax.errors import InputError
from aurora_jax.model.config import PADDING_HINT, ModelConfig, from_hf_config
from aurora_jax.model.decoder import check_parameters
from aurora_jax.model.sharding import TABLE, flatten, nest
from aurora_jax.storage.carried_files import decode_files, encode_files
from aurora_jax.storage.records import described

FORMAT_VERSION = 1
CHUNK_BYTES = 8 * 2**20
"""Stored chunks are at most this large: enough for object stores, and small enough that buffers of it leave
memory flat. Only key and value of one head, which conversion does not part, may be larger: 14 MiB in BLOOM
176B."""

PARTIAL_SUFFIX = ".partial"
"""Of folders whose contents are still being written; see `convert/partial.py`."""

PARAMETERS, FILES, METADATA, RUN = "params", "tokenizer", "metadata", "run"

ARCHITECTURE = (
    "vocabulary_size",
    "padded_vocabulary_size",
    "max_positions",
    "width",
    "layers",
    "heads",
    "mlp_width",
    "multi_query",
    "activation",
    "positions",
    "embedding_norm",
    "layer_norm_epsilon",
)
"""Fields of ModelConfig that the weights depend on; the others (dropout, token ids, ...) may differ between a
checkpoint and its use, and so may `max_positions` where positions are not learned."""

Location: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says about itself."""

    config: ModelConfig
    parameter_dtype: str
    """Name of the dtype of every parameter: float32 or bfloat16."""
    hf_config: dict[str, Any] | None = None
    """The source's `config.json`, verbatim, so that an export keeps keys which are none of our business."""
    tokenizer_sha256: str | None = None
    """What tells its tokenizer apart: see `aurora_jax/data/text/tokenizer_files.py`."""
    source: dict[str, Any] | None = None
    """Where the weights came from: {"path": ..., "files": {name: bytes}}."""
    step: int = 0
    stage: str | None = None
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """Stages that the weights went through, the oldest first."""
    layer_stacking: str = "stacked"
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes; the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: Location = "metadata") -> "CheckpointMetadata":
        """Reads and checks what `to_json` wrote; `where` names the checkpoint in messages.

        Raises:
            InputError: a missing or unknown key, a value of a wrong type, another format version or layout,
                or a source `config.json` which describes another model than the config.
        """
        if values.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{where}: checkpoint format {values.get('format_version')!r}; this version reads format "
                f"{FORMAT_VERSION}."
            )
        metadata = described(values, cls, f"{where}: metadata")
        if metadata.layer_stacking != "stacked":
            raise InputError(f"{where}: layer_stacking is {metadata.layer_stacking!r}; only 'stacked' can be read.")
        if metadata.hf_config is not None:
            unpadded = replace(metadata.config, vocabulary_divisible_by=1)
            require_same_architecture(
                unpadded, from_hf_config(metadata.hf_config), f"{where}: metadata 'config'", "its 'hf_config'"
            )
        return metadata


def require_same_architecture(
    found: ModelConfig, expected: ModelConfig, found_in: Location, expected_in: Location
) -> None:
    """Raises InputError, with both values, unless the two configs describe the same weights."""
    for name in ARCHITECTURE:
        if name == "max_positions" and found.positions == expected.positions != "learned":
            continue
        if getattr(found, name) != getattr(expected, name):
            raise InputError(
                f"{found_in} has {name} = {getattr(found, name)!r}, but {expected_in} has {name} = "
                f"{getattr(expected, name)!r}."
            )


def is_checkpoint(path: Location) -> bool:
    """Whether the directory is a complete checkpoint: Orbax and conversions rename or mark a directory only
    when all of it is written."""
    directory = _absolute(path)
    if directory.parent.suffix == PARTIAL_SUFFIX:
        return False
    items = [directory / PARAMETERS, directory / METADATA, directory / "_CHECKPOINT_METADATA"]
    return "orbax-checkpoint-tmp" not in directory.name and all(item.exists() for item in items)


def resolve(path: Location) -> epath.Path:
    """The checkpoint that a path means: itself, or the newest complete step of a run directory
    (`RUN/checkpoints/<step>`).

    A named checkpoint of a stage is a checkpoint at `RUN/stages/<name>`.

    Raises:
        InputError: there is none; the message lists what was found.
    """
    directory = _absolute(path)
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
        return max(complete, key=lambda step: int(step.name))
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
    directory = resolve(path)
    return CheckpointMetadata.from_json(_read_json(directory / METADATA), directory)


def read_files(path: Location) -> dict[str, bytes]:
    """The files that travel with the model, its tokenizer, generation config, licence, ...: contents by name.

    Raises:
        InputError: not a checkpoint, or files that are damaged or would be written elsewhere.
    """
    item = resolve(path) / FILES
    return decode_files(_read_json(item), item) if item.exists() else {}


def read_run(path: Location) -> dict[str, Any] | None:
    """The facts of the run that wrote a checkpoint; None if none did, or one of a version that left them out.
    Raises InputError."""
    item = resolve(path) / RUN
    return dict(_read_json(item)) if item.exists() else None


def restore_parameters(
    path: Location, *, dtype: jnp.dtype | str | None = None, shardings: Mapping[str, Any] | None = None
) -> dict:
    """The decoder's parameters, each read straight into its shards: a process reads those of its own devices,
    some at a time.

    Args:
        path: a checkpoint, or a run (its newest complete step).
        dtype: dtype of the arrays; that of the checkpoint without it.
        shardings: nested dictionary with a `jax.sharding.Sharding` for each parameter; without it, everything
            is on the first device.

    Returns:
        Nested dictionary of `jax.Array`, layers stacked: what `decoder.merge` takes.

    Raises:
        InputError: not a checkpoint, parameters that do not fit its config or that the shardings cannot
            divide, or files that are missing or damaged.
    """
    directory = resolve(path)
    config = read_metadata(directory).config
    described = _described_parameters(directory)
    stored = {name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for name, leaf in described.items()}
    check_parameters(config, nest(stored))
    _require_chunks(directory / PARAMETERS, described)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding_of = flatten(shardings) if shardings is not None else dict.fromkeys(stored, one_device)
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or leaf.dtype), sharding=sharding_of[name])
        for name, leaf in stored.items()
    }
    # Without a limit Orbax reads all shards at once, and holds everything twice.
    gigabytes = 1 + max(_bytes_to_read(name, leaf, sharding_of[name]) for name, leaf in described.items()) // 10**9
    with closing(ocp.StandardCheckpointHandler(restore_concurrent_gb=gigabytes)) as handler, damage_named(directory):
        return handler.restore(directory / PARAMETERS, args=ocp.args.StandardRestore(nest(targets)))


def stored_parameters(path: Location) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array in a checkpoint's `params`, by dotted path; no array is read. Raises
    InputError."""
    return {
        name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
        for name, leaf in _described_parameters(resolve(path)).items()
    }


def _described_parameters(directory: epath.Path) -> dict[str, Any]:
    """Orbax's metadata of every array: shape, dtype, chunks."""
    item = directory / PARAMETERS
    with closing(ocp.StandardCheckpointHandler()) as handler, damage_named(item):
        return flatten(handler.metadata(item).tree)


def _bytes_to_read(name: str, leaf: Any, sharding: jax.sharding.Sharding) -> int:
    """Upper bound of the bytes of one device's shard and of the chunks that it cuts across. Raises InputError
    if there is no such shard."""
    try:
        shard = sharding.shard_shape(tuple(leaf.shape))
    except ValueError as error:
        hint = f" {PADDING_HINT}" if TABLE[name].letters.startswith("V") else ""
        raise InputError(f"{name} {tuple(leaf.shape)} cannot be divided over the mesh: {error}.{hint}") from None
    elements = 1
    for whole, part, chunk in zip(leaf.shape, shard, leaf.storage.chunk_shape, strict=True):
        chunks = -(-whole // chunk)
        elements *= chunk * min(chunks, part // chunk if part % chunk == 0 else part // chunk + 2)
    return elements * leaf.dtype.itemsize


def open_parameters(path: Location, cache_bytes: int = 0) -> dict[str, ts.TensorStore]:
    """Every array of a checkpoint's `params` by dotted path, open for reading slices; nothing is loaded.

    Args:
        path: a checkpoint, or a run (its newest complete step).
        cache_bytes: decoded chunks that are kept, for readers whose slices cut across the stored chunks.

    Raises:
        InputError: not a checkpoint, or parameters that do not fit its config.
    """
    item = resolve(path) / PARAMETERS
    stored = stored_parameters(path)
    check_parameters(read_metadata(path).config, nest(stored))
    _require_chunks(item, _described_parameters(item.parent))
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    stores = {}
    with damage_named(item):
        for name in stored:
            spec = {"driver": "zarr", "kvstore": _location(item, f"{name}/"), "fill_missing_data_reads": False}
            stores[name] = ts.open(spec, read=True, context=context)
        return {name: store.result() for name, store in stores.items()}


def _location(item: epath.Path, folder: str = "") -> Any:
    """TensorStore's name for a folder of an item: its files, or its part of Orbax's database."""

    def files(path: str) -> Any:  # a path as it is: in an address TensorStore would read %41 as A
        return path if "://" in path else {"driver": "file", "path": path}

    if (item / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": files(f"{item}/"), "path": folder}
    return files(f"{item}/{folder}")


def _require_chunks(item: epath.Path, described: Mapping[str, Any]) -> None:
    """Raises InputError, naming it, if a chunk of an array is missing: all are written, also those of zeros."""
    with damage_named(item):
        there = set(ts.KvStore.open(_location(item)).result().list().result())
    for name, leaf in described.items():
        grid = [range(-(-size // chunk)) for size, chunk in zip(leaf.shape, leaf.storage.chunk_shape, strict=True)]
        for place in product(*grid):
            key = f"{name}/{'.'.join(map(str, place)) or '0'}"
            if key.encode() not in there:
                raise InputError(f"{item}: the checkpoint is damaged or incomplete: the chunk {key} is missing")


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
    for name, leaf in flatten(parameters).items():
        if leaf.dtype != jnp.dtype(metadata.parameter_dtype):
            raise InputError(
                f"{name} is {leaf.dtype}; the metadata of {path} says parameter_dtype {metadata.parameter_dtype}."
            )
    write_checkpoint(
        path,
        ocp.StandardCheckpointHandler(),
        ocp.args.StandardSave(parameters, save_args(parameters)),
        metadata,
        files or {},
        run,
    )


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
    texts = {FILES: encode_files(files), METADATA: metadata.to_json()} | ({} if run is None else {RUN: dict(run)})
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
        if isinstance(error, OSError):
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
    destination = _absolute(path)
    if not fnmatchcase(str(destination), str(destination)):
        raise InputError(
            f"{destination}: Orbax cannot write checkpoints where a folder has brackets in its name; choose "
            "one without [ ]."
        )
    return destination


def _absolute(path: Location) -> epath.Path:
    """Orbax takes absolute paths only; a URL such as gs://... is one."""
    location = epath.Path(path)
    return location if "://" in os.fspath(path) else epath.Path(Path(location).absolute())


def _read_json(item: epath.Path) -> dict[str, Any]:
    with closing(ocp.JsonCheckpointHandler()) as handler, damage_named(item):
        return handler.restore(item)


@contextmanager
def damage_named(item: epath.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise about unreadable files into a message that names the checkpoint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Orbax has no class of its own for what TensorStore said of an array.
        if not isinstance(error, OSError | ValueError | KeyError) and type(error) is not Exception:
            raise
        raise InputError(f"{item}: the checkpoint is damaged or incomplete: {error.__cause__ or error}") from error
