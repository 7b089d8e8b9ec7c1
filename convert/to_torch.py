"""Our checkpoint into a Hugging Face folder that `transformers` and vLLM load, block by block."""

import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from etils import epath

from aurora_jax.checkpoints.arrays import open_parameters, require_parameters
from aurora_jax.checkpoints.checksums import Checksum, of_part, sum_of
from aurora_jax.checkpoints.format import COMMIT_MARKER, damage_named, read_files, read_metadata, resolve
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.errors import InputError
from aurora_jax.model.config import HF_ACTIVATIONS, ModelConfig, to_hf_config
from aurora_jax.storage.carried_files import write_files
from convert.from_torch import DTYPES, ParameterDtype
from convert.partial import Partial, partial_output
from convert.progress import byte_progress
from convert.source import CHOSEN_IN_CONFIG, SAFETENSORS_DTYPES
from convert.streaming import Scratch, for_each, row_major
from convert.weight_map import Row, hf_tensors, weight_map

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, and its tensors in the order in which they lie there."""

    name: str
    tensors: list[str]


def to_torch(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: ParameterDtype | None = None,
    max_shard_size: str = "5GB",
    *,
    resume: bool = False,
) -> None:
    """Writes a checkpoint as safetensors with config.json and, byte for byte, the files that travel with the model.

    The head is the token embedding and is not written twice; `transformers` ties it. Memory: some blocks; for
    checkpoints of training runs also the largest parameter of one layer.

    Args:
        source: a checkpoint, or a run directory (its newest complete step).
        destination: the folder to be made; must not exist. It appears only when it is complete: see
            `partial_output` for what an interrupted conversion leaves.
        dtype: of the written weights; that of the checkpoint by default.
        max_shard_size: largest file, such as 5GB or 500MB (decimal); a single larger tensor is a file of its own.
        resume: continue what an interrupted conversion of the same checkpoint left, if it left anything.

    Raises:
        InputError: not a checkpoint, a damaged one (all that is read is held to its checksums), a model that no
            Hugging Face architecture computes, or a destination that exists or cannot be written.
    """
    limit = parse_size(max_shard_size)
    path = resolve(source)
    metadata = read_metadata(path)
    config = metadata.config
    name: ParameterDtype = dtype or metadata.parameter_dtype  # type: ignore[assignment]
    if name not in DTYPES:
        raise InputError(f"{path}: parameter_dtype is {name!r}; writable are {', '.join(DTYPES)}.")
    rows = weight_map(config)
    stores = open_parameters(path)
    if any(
        stores[row.ours].chunk_layout.read_chunk.shape != row.chunk_shape(config, _itemsize(stores[row.ours]))
        for row in rows
    ):
        # Chunks of a training run follow its mesh, and our blocks cut across them: without a cache each would
        # be read many times.
        stores = open_parameters(
            path, cache_bytes=max(math.prod(row.hf_shape(config)) * 4 for row in rows if row.stacked)
        )
    shards = plan_shards(config, DTYPES[name].itemsize, limit)
    files = _text_files(metadata, name, shards, read_files(path), path)
    job = {
        "command": "to-torch",
        "source": str(path),
        "the checkpoint's times": (path / COMMIT_MARKER).read_bytes().decode(errors="replace"),
        "dtype": name,
        "max_shard_size": limit,
    }
    with partial_output(destination, job, resume) as partial:
        if partial.complete:
            return
        sizes = _sizes(config, DTYPES[name].itemsize)
        partial.output.mkdir(exist_ok=True)
        tensors = [
            tensor
            for shard in shards
            for tensor in _make_shard(partial.output / shard.name, shard, config, DTYPES[name])
        ]
        rest = [tensor for tensor in tensors if tensor.name not in partial.done]
        done = sum(sizes.values()) - sum(sizes[tensor.name] for tensor in rest)
        with byte_progress(f"{source} -> {destination}", sum(sizes.values()), done) as advance:
            _write_tensors(rest, config, DTYPES[name], stores, path, partial, advance)
        read: dict[str, list[Checksum]] = {row.ours: [] for row in rows}
        for tensor in tensors:
            for ours, checksum in json.loads(partial.done[tensor.name]).items():
                read[ours].append(Checksum.parse(checksum))
        require_parameters(path, {ours: sum_of(parts) for ours, parts in read.items()})
        write_files(files, partial.output)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000 (decimal units). Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if size < 1:
        raise InputError(f"{text!r} is no size: write it like 5GB or 500MB.")
    return size


def plan_shards(config: ModelConfig, itemsize: int, limit: int) -> list[Shard]:
    """Fills files with tensors, in order, up to `limit` bytes of data; named as `transformers` names them."""
    groups: list[list[str]] = [[]]
    filled = 0
    for tensor, size in _sizes(config, itemsize).items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


def _sizes(config: ModelConfig, itemsize: int) -> dict[str, int]:
    """Bytes of each Hugging Face tensor."""
    return {tensor: math.prod(parts[0][0].hf_shape(config)) * itemsize for tensor, parts in hf_tensors(config).items()}


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor's place in its file."""

    name: str
    file: Path
    offset: int
    """Bytes from the beginning of the file."""


def _make_shard(file: Path, shard: Shard, config: ModelConfig, dtype: np.dtype) -> list[PlacedTensor]:
    """A file of its full size with its header, and holes for data; one that an earlier process has made stays
    as it is."""
    parts = hf_tensors(config)
    label = next(label for label, known in SAFETENSORS_DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard.tensors:
        shape = parts[tensor][0][0].hf_shape(config)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[tensor] = {"dtype": label, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    data = 8 + len(encoded)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        _write_at(descriptor, np.frombuffer(len(encoded).to_bytes(8, "little") + encoded, np.uint8), 0)
        os.truncate(descriptor, data + end)
    finally:
        os.close(descriptor)
    return [PlacedTensor(tensor, file, data + header[tensor]["data_offsets"][0]) for tensor in shard.tensors]


class TensorPart(NamedTuple):
    """Units start .. stop - 1 of one layer of one of our parameters, on their way into a tensor."""

    tensor: PlacedTensor
    row: Row
    layer: int
    start: int
    stop: int


def _write_tensors(
    tensors: list[PlacedTensor],
    config: ModelConfig,
    dtype: np.dtype,
    stores: dict[str, ts.TensorStore],
    source: epath.Path,
    partial: Partial,
    advance: Callable[[int], None],
) -> None:
    """Fills the files; a tensor is finished when all of it has reached the disk."""
    parts = hf_tensors(config)
    work = [
        TensorPart(tensor, row, layer, start, stop)
        for tensor in tensors
        for row, layer in parts[tensor.name]
        for start, stop in row.blocks(config, _itemsize(stores[row.ours]))
    ]
    missing = Counter(part.tensor.name for part in work)
    read: dict[str, dict[str, Checksum]] = {tensor.name: {} for tensor in tensors}
    lock = threading.Lock()
    scratch = Scratch()

    def write(part: TensorPart) -> None:
        written, checksum = _write_part(part, config, dtype, stores[part.row.ours], source, scratch)
        advance(written)
        with lock:
            sums = read[part.tensor.name]
            sums[part.row.ours] = sums.get(part.row.ours, Checksum()) + checksum
            missing[part.tensor.name] -= 1
            last = not missing[part.tensor.name]
        if last:
            descriptor = os.open(part.tensor.file, os.O_WRONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.finish(part.tensor.name, json.dumps({ours: str(each) for ours, each in sums.items()}))

    for_each(work, write)


def _write_part(
    part: TensorPart, config: ModelConfig, dtype: np.dtype, store: ts.TensorStore, source: epath.Path, scratch: Scratch
) -> tuple[int, Checksum]:
    """Returns the number of bytes of the tensor that were written, and the checksum of what was read for them."""
    tensor, row, layer, start, stop = part
    block = scratch.array("read", row.block_shape(config, stop - start), store.dtype.numpy_dtype)
    with damage_named(source):
        ts.array(block).write(store[row.index(layer, start, stop)]).result()
    checksum = of_part(block[np.newaxis] if row.stacked else block, row.origin(layer, start), store.shape)
    if block.dtype != dtype:
        cast = scratch.array("cast", block.shape, dtype)
        np.copyto(cast, block, casting="unsafe")
        block = cast
    values = row_major(row.to_hf(block, config)).reshape(-1).view(np.uint8)
    row_bytes = math.prod(row.hf_shape(config)[1:]) * dtype.itemsize
    written = 0
    descriptor = os.open(tensor.file, os.O_WRONLY)
    try:
        for first, last in row.spans(config, start, stop):
            span = values[written : written + (last - first) * row_bytes]
            if span.any():  # the file is made of zeros: writing more of them would only fill the disk
                _write_at(descriptor, span, tensor.offset + first * row_bytes)
            written += len(span)
    finally:
        os.close(descriptor)
    return written, checksum


def _itemsize(store: ts.TensorStore) -> int:
    return store.dtype.numpy_dtype.itemsize


def _write_at(descriptor: int, values: np.ndarray, offset: int) -> None:
    remaining = memoryview(values.data)
    while remaining:  # one write moves at most 2 GiB on Linux
        count = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[count:], offset + count


def _text_files(
    metadata: CheckpointMetadata,
    dtype: ParameterDtype,
    shards: list[Shard],
    travelling: dict[str, bytes],
    source: epath.Path,
) -> dict[str, bytes]:
    """Everything but the weights, by name. Raises InputError if a file that travels has the name of one that
    is made."""
    config = metadata.config
    hf_config = {**(metadata.hf_config or {}), **to_hf_config(config), "torch_dtype": dtype}
    hf_config.pop("dtype", None)  # the newer name of torch_dtype, which every version of transformers reads
    hf_config.pop(CHOSEN_IN_CONFIG, None)  # a file that is not made here
    theirs = str((metadata.hf_config or {}).get("activation_function"))
    if "activation_function" in hf_config and HF_ACTIVATIONS.get(theirs) == config.activation:
        hf_config["activation_function"] = theirs  # one of several names of the function
    files = {"config.json": _json(hf_config)}
    if len(shards) > 1:
        itemsize = DTYPES[dtype].itemsize
        weight_map = {tensor: shard.name for shard in shards for tensor in shard.tensors}
        files["model.safetensors.index.json"] = _json(
            {"metadata": {"total_size": sum(_sizes(config, itemsize).values())}, "weight_map": weight_map}
        )
    if taken := {*travelling} & {*files, *(shard.name for shard in shards)}:
        raise InputError(
            f"{source}: it carries a file {min(taken)}, which is made anew: the checkpoint is not one of this "
            "project's."
        )
    generation = {name: to_hf_config(config)[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation_config = _json({key: value for key, value in generation.items() if value is not None})
    return {"generation_config.json": generation_config, **files, **travelling}


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
