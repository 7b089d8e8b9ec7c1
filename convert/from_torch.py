"""PyTorch (Hugging Face) weights into our checkpoint, block by block."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from rich.console import Console
from rich.table import Table

from aurora_jax.checkpoints.checksums import Checksum, of_part, sum_of
from aurora_jax.checkpoints.format import PARAMETERS
from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.checkpoints.writing import finish_metadata, proved_by, texts_of, write_checkpoint
from aurora_jax.data.text.tokenizer_files import tokenizer_sha256
from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig, family_of
from aurora_jax.model.sharding import TABLE, nest, parameter_shapes
from aurora_jax.storage.carried_files import encode_files
from convert.partial import partial_output
from convert.progress import byte_progress
from convert.source import HuggingFaceFolder, is_index, read_folder
from convert.streaming import Scratch, UnwrittenArray, for_each, open_for_writing, row_major, unwritten_handler
from convert.travelling import travelling_files
from convert.weight_map import TIED_HEAD, Row, hf_tensors, token_embedding, weight_map

ParameterDtype = Literal["float32", "bfloat16"]
DTYPES: dict[ParameterDtype, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
"""How names of files are printed."""


class Block(NamedTuple):
    """Units start .. stop - 1 of one layer of one of our parameters."""

    row: Row
    layer: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.row.ours} {self.layer} {self.start}"


def from_torch(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: ParameterDtype | None = None,
    *,
    vocabulary_divisible_by: int = 1,
    weights: str | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> None:
    """Converts a Hugging Face folder to a checkpoint; memory stays at some blocks of CHUNK_BYTES whatever the
    model's size.

    Args:
        source: folder with config.json and safetensors or .bin weights, one file or sharded.
        destination: the checkpoint to be made; must not exist. It appears only when it is complete: see
            `partial_output` for what an interrupted conversion leaves.
        dtype: of the parameters; by default that of the source (float32 for float16 or for a mix).
        vocabulary_divisible_by: see `ModelConfig`.
        weights: the weight file, or index of shards, where the folder has several: see `choose_weights`.
        resume: continue what an interrupted conversion of the same files left, if it left anything.
        console: where it is said what stays behind; standard error by default.

    Raises:
        InputError: anything wrong with the source or the destination, naming the file and the tensor.
    """
    folder = read_folder(source, weights)
    check_tensors(folder)
    config = replace(folder.config, vocabulary_divisible_by=vocabulary_divisible_by)
    parameter_dtype = dtype or source_dtype(folder)
    files = _travelling(folder, console or Console(stderr=True))
    metadata = CheckpointMetadata(
        config=config,
        parameter_dtype=parameter_dtype,
        hf_config=folder.hf_config,
        tokenizer_sha256=tokenizer_sha256(files, folder.path),
        source={
            "path": str(folder.path.absolute()),
            "files": {file.name: file.stat().st_size for file in folder.files},
        },
    )
    array_dtype = DTYPES[parameter_dtype]
    shapes = parameter_shapes(config)
    blocks = list(_blocks(config, array_dtype))
    with partial_output(destination, _job(folder, metadata, files), resume) as partial:
        if partial.complete:
            return
        if not partial.output.exists():
            check_tied_head(folder)
            arrays = {
                row.ours: UnwrittenArray(
                    shapes[row.ours].shape, array_dtype, row.chunk_shape(config, array_dtype.itemsize)
                )
                for row in weight_map(config)
            }
            write_checkpoint(partial.output, unwritten_handler(), ocp.args.PyTreeSave(nest(arrays)), metadata, files)
        stores = {row.ours: open_for_writing(partial.output / PARAMETERS / row.ours) for row in weight_map(config)}
        rest = [block for block in blocks if str(block) not in partial.done]
        total, remaining = (sum(_source_bytes(folder, block) for block in some) for some in (blocks, rest))
        scratch = Scratch()
        with byte_progress(f"{folder.path} -> {destination}", total, total - remaining) as advance:

            def convert(block: Block) -> None:
                written = _convert(block, folder, config, array_dtype, stores[block.row.ours], scratch)
                partial.finish(str(block), str(written))
                advance(_source_bytes(folder, block))

            for_each(rest, convert)
        of_blocks: dict[str, list[Checksum]] = {row.ours: [] for row in weight_map(config)}
        for block in blocks:
            of_blocks[block.row.ours].append(Checksum.parse(partial.done[str(block)]))
        sums = {name: str(sum_of(written)) for name, written in of_blocks.items()}
        size = sum(math.prod(shapes[name].shape) for name in sums) * array_dtype.itemsize
        finish_metadata(
            partial.output, proved_by(metadata, {PARAMETERS: sums}, {PARAMETERS: size}, texts_of(files, None))
        )


def print_mapping(
    source: str | os.PathLike[str],
    dtype: ParameterDtype | None = None,
    *,
    vocabulary_divisible_by: int = 1,
    weights: str | None = None,
    console: Console | None = None,
) -> None:
    """Prints what `from_torch` would do, a line for each tensor, and writes nothing. Raises InputError as
    `from_torch` does."""
    folder = read_folder(source, weights)
    check_tensors(folder)
    check_tied_head(folder)
    parameter_dtype = dtype or source_dtype(folder)
    shapes = parameter_shapes(replace(folder.config, vocabulary_divisible_by=vocabulary_divisible_by))
    table = Table(
        "Hugging Face tensor", "shape", "dtype", "our parameter", "shape", "dtype", "partition", title=f"{folder.path}"
    )
    for name, parts in hf_tensors(folder.config).items():
        stored = folder.tensors[name]
        for row, layer in parts:
            path = f"{row.ours}[{layer}]" if row.stacked else row.ours
            ours = (path, str(list(shapes[row.ours].shape)), parameter_dtype, str(tuple(TABLE[row.ours].partition)))
            table.add_row(
                name, str(list(stored.shape)), stored.dtype.name, *(cell.replace("[", "\\[") for cell in ours)
            )
    if TIED_HEAD in folder.tensors:
        table.add_row(
            TIED_HEAD,
            str(list(folder.tensors[TIED_HEAD].shape)),
            folder.tensors[TIED_HEAD].dtype.name,
            "tied: not stored",
        )
    # A pipe has no width: rich would cut the names at 80 columns.
    console = console or Console(width=None if os.isatty(1) else 240)
    console.print(table)
    console.print(f"files that travel with it: {', '.join(_travelling(folder, console)) or 'none'}", **PLAIN)


def source_dtype(folder: HuggingFaceFolder) -> ParameterDtype:
    """bfloat16 if every weight is; else float32, which holds float16 exactly."""
    return "bfloat16" if {tensor.dtype for tensor in folder.tensors.values()} == {DTYPES["bfloat16"]} else "float32"


def check_tensors(folder: HuggingFaceFolder) -> None:
    """Raises InputError unless the folder has exactly the tensors that its config asks for, each of its shape."""
    config = folder.config
    expected = {name: parts[0][0].hf_shape(config) for name, parts in hf_tensors(config).items()}
    for name, shape in expected.items():
        if name not in folder.tensors:
            near = next(
                (
                    f"; there is {other}, whose prefix is unknown"
                    for other in folder.tensors
                    if other.endswith(f".{name}")
                ),
                "",
            )
            raise InputError(
                f"{folder.path}: the tensor {name} {list(shape)} is missing from the weights ({_names(folder)}){near}."
            )
    embedding, family = token_embedding(config).hf, family_of(config)
    for name, tensor in folder.tensors.items():
        wanted = expected[embedding] if name == TIED_HEAD else expected.get(name)
        if wanted is None:
            raise InputError(
                f"{tensor.file}: the tensor {tensor.name} {list(tensor.shape)} is unexpected: a {family} "
                "model has no such weight."
            )
        if tensor.shape != wanted:
            reason = (
                f"config.json has vocab_size {config.vocabulary_size}"
                if name in (embedding, TIED_HEAD)
                else "config.json asks"
            )
            raise InputError(
                f"{tensor.file}: the tensor {tensor.name} has the shape {list(tensor.shape)}; {reason}, that "
                f"is {list(wanted)}."
            )


def check_tied_head(folder: HuggingFaceFolder) -> None:
    """Raises InputError where a folder has the head beside the token embedding, and they differ."""
    row = token_embedding(folder.config)
    head, embedding = folder.tensors.get(TIED_HEAD), folder.tensors[row.hf]
    if head is None or head == embedding:  # the same bytes of a .bin file
        return
    for start, stop in row.blocks(folder.config, np.dtype(np.float32).itemsize):
        spans = row.spans(folder.config, start, stop)
        if not np.array_equal(head.read_rows(spans), embedding.read_rows(spans)):
            raise InputError(
                f"{head.file}: {TIED_HEAD} differs from {row.hf} in the rows {start} to {stop - 1}; only "
                "models whose head is "
                "the token embedding can be converted."
            )


def _blocks(config: ModelConfig, dtype: np.dtype) -> Iterator[Block]:
    for row in weight_map(config):
        for layer in range(config.layers if row.stacked else 1):
            for start, stop in row.blocks(config, dtype.itemsize):
                yield Block(row, layer, start, stop)


def _source_bytes(folder: HuggingFaceFolder, block: Block) -> int:
    tensor = folder.tensors[block.row.hf_name(block.layer)]
    rows = sum(last - first for first, last in block.row.spans(folder.config, block.start, block.stop))
    return rows * tensor.nbytes // tensor.shape[0]


def _convert(
    block: Block,
    folder: HuggingFaceFolder,
    config: ModelConfig,
    dtype: np.dtype,
    store: ts.TensorStore,
    scratch: Scratch,
) -> Checksum:
    """Returns the checksum of what was written, as a part of its array."""
    row, layer, start, stop = block
    read = folder.tensors[row.hf_name(layer)].read_rows(row.spans(config, start, stop), scratch)
    rows = read
    if read.dtype != dtype:
        rows = scratch.array("cast", read.shape, dtype)
        np.copyto(rows, read, casting="unsafe")
    ours = row_major(row.to_ours(rows, config))
    if padding := stop - start - ours.shape[row.unit_axis]:  # rows that pad the vocabulary
        ours = np.pad(ours, [(0, padding if axis == row.unit_axis else 0) for axis in range(ours.ndim)])
    checksum = of_part(ours[np.newaxis] if row.stacked else ours, row.origin(layer, start), store.shape)
    try:
        store[row.index(layer, start, stop)].write(ours).result()
    except ValueError as error:  # TensorStore's name for a full disk
        raise OSError(str(error)) from error
    return checksum


def _travelling(folder: HuggingFaceFolder, console: Console) -> dict[str, bytes]:
    """The files that travel with the model; what does not, and is not what was converted, is said."""
    files, left_behind = travelling_files(folder.path)
    read = {str(file.relative_to(folder.path)) for file in folder.files}
    read.update(folder.passed_over, filter(is_index, left_behind))
    left_behind = {name: reason for name, reason in left_behind.items() if name not in read}
    if folder.passed_over:
        others = ", ".join(folder.passed_over)
        chooses = f"--weights {folder.passed_over[0]} takes that"
        console.print(f"weights: {_names(folder)}; not read: {others} ({chooses})", **PLAIN)
    for reason in dict.fromkeys(left_behind.values()):
        names = ", ".join(name for name, why in left_behind.items() if why == reason)
        console.print(f"left behind: {names} ({reason})", **PLAIN)
    return files


def _job(folder: HuggingFaceFolder, metadata: CheckpointMetadata, files: dict[str, bytes]) -> dict[str, Any]:
    """What an interrupted conversion must have in common with the one that continues it."""
    texts = json.dumps([folder.hf_config, encode_files(files)], sort_keys=True)
    return {
        "command": "from-torch",
        "source": str(folder.path.absolute()),
        **{
            file.name: f"{file.stat().st_size} bytes, modified at {file.stat().st_mtime_ns} ns" for file in folder.files
        },
        "dtype": metadata.parameter_dtype,
        "vocabulary_divisible_by": metadata.config.vocabulary_divisible_by,
        "config and tokenizer": hashlib.sha256(texts.encode()).hexdigest(),
    }


def _names(folder: HuggingFaceFolder) -> str:
    return ", ".join(file.name for file in folder.files)
