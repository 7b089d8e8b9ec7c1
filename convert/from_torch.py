"""PyTorch (Hugging Face) weights into our checkpoint, block by block."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

from aurora_jax.errors import InputError
from aurora_jax.model.checkpoint import TOKENIZER_FILES, CheckpointMetadata, require_free, tokenizer_sha256, write_checkpoint
from aurora_jax.model.config import family_of
from aurora_jax.model.sharding import TABLE, nest, parameter_shapes
from convert.progress import byte_progress
from convert.source import HuggingFaceFolder, StoredTensor, read_folder
from convert.streaming import StreamedArray, streamed_handler
from convert.weight_map import TIED_HEAD, Row, hf_tensors, token_embedding, weight_map

ParameterDtype = Literal["float32", "bfloat16"]
DTYPES: dict[ParameterDtype, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def from_torch(source: str | os.PathLike[str], destination: str | os.PathLike[str], dtype: ParameterDtype | None = None) -> None:
    """Converts a Hugging Face folder to a checkpoint; memory stays at some blocks of CHUNK_BYTES whatever the model's size.

    Args:
        source: folder with config.json and safetensors or .bin weights, one file or sharded.
        destination: the checkpoint to be made; must not exist. It appears only when it is complete.
        dtype: of the parameters; by default that of the source (float32 for float16 or for a mix).

    Raises:
        InputError: anything wrong with the source or the destination, naming the file and the tensor.
    """
    path = require_free(destination)
    folder = read_folder(source)
    check_tensors(folder)
    _check_tied_head(folder)
    parameter_dtype = dtype or source_dtype(folder)
    tokenizer = _read_tokenizer_files(folder.path)
    metadata = CheckpointMetadata(
        config=folder.config,
        parameter_dtype=parameter_dtype,
        hf_config=folder.hf_config,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        source={"path": str(folder.path.absolute()), "files": {file.name: file.stat().st_size for file in folder.files}},
    )
    total = sum(tensor.nbytes for name, tensor in folder.tensors.items() if name != TIED_HEAD)
    with byte_progress(f"{folder.path} -> {destination}", total) as advance:
        arrays = {row.ours: _streamed(row, folder, DTYPES[parameter_dtype], advance) for row in weight_map(folder.config)}
        write_checkpoint(path, streamed_handler(), ocp.args.PyTreeSave(nest(arrays)), metadata, tokenizer)


def print_mapping(source: str | os.PathLike[str], dtype: ParameterDtype | None = None, console: Console | None = None) -> None:
    """Prints what `from_torch` would do, a line for each tensor, and writes nothing. Raises InputError as `from_torch` does."""
    folder = read_folder(source)
    check_tensors(folder)
    parameter_dtype = dtype or source_dtype(folder)
    shapes = parameter_shapes(folder.config)
    table = Table("Hugging Face tensor", "shape", "dtype", "our parameter", "shape", "dtype", "partition", title=f"{folder.path}")
    for name, parts in hf_tensors(folder.config).items():
        stored = folder.tensors[name]
        for row, layer in parts:
            path = f"{row.ours}[{layer}]" if row.stacked else row.ours
            ours = (path, str(list(shapes[row.ours].shape)), parameter_dtype, str(tuple(TABLE[row.ours].partition)))
            table.add_row(name, str(list(stored.shape)), stored.dtype.name, *(cell.replace("[", "\\[") for cell in ours))
    if TIED_HEAD in folder.tensors:
        table.add_row(TIED_HEAD, str(list(folder.tensors[TIED_HEAD].shape)), folder.tensors[TIED_HEAD].dtype.name, "tied: not stored")
    # A pipe has no width: rich would cut the names at 80 columns.
    (console or Console(width=None if os.isatty(1) else 240)).print(table)


def source_dtype(folder: HuggingFaceFolder) -> ParameterDtype:
    """bfloat16 if every weight is; else float32, which holds float16 exactly."""
    return "bfloat16" if {tensor.dtype for tensor in folder.tensors.values()} == {DTYPES["bfloat16"]} else "float32"


def check_tensors(folder: HuggingFaceFolder) -> None:
    """Raises InputError unless the folder has exactly the tensors that its config asks for, each of its shape."""
    config = folder.config
    expected = {name: parts[0][0].hf_shape(config) for name, parts in hf_tensors(config).items()}
    for name, shape in expected.items():
        if name not in folder.tensors:
            raise InputError(f"{folder.path}: the tensor {name} {list(shape)} is missing from the weights ({_names(folder)}).")
    embedding, family = token_embedding(config).hf, family_of(config)
    for name, tensor in folder.tensors.items():
        wanted = expected[embedding] if name == TIED_HEAD else expected.get(name)
        if wanted is None:
            raise InputError(f"{tensor.file}: the tensor {name} {list(tensor.shape)} is unexpected: a {family} model has no such weight.")
        if tensor.shape != wanted:
            reason = f"config.json has vocab_size {config.vocabulary_size}" if name in (embedding, TIED_HEAD) else "config.json asks"
            raise InputError(f"{tensor.file}: the tensor {name} has the shape {list(tensor.shape)}; {reason}, that is {list(wanted)}.")


def _check_tied_head(folder: HuggingFaceFolder) -> None:
    row = token_embedding(folder.config)
    head, embedding = folder.tensors.get(TIED_HEAD), folder.tensors[row.hf]
    if head is None or head == embedding:  # the same bytes of a .bin file
        return
    for start, stop in row.blocks(folder.config, np.dtype(np.float32).itemsize):
        if not np.array_equal(head.read_rows([(start, stop)]), embedding.read_rows([(start, stop)])):
            raise InputError(
                f"{head.file}: {TIED_HEAD} differs from {row.hf} in the rows {start} to {stop - 1}; only models whose head is "
                "the token embedding can be converted."
            )


def _streamed(row: Row, folder: HuggingFaceFolder, dtype: np.dtype, advance: Callable[[int], None]) -> StreamedArray:
    config = folder.config

    def blocks() -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
        for layer in range(config.layers if row.stacked else 1):
            tensor: StoredTensor = folder.tensors[row.hf_name(layer)]
            for start, stop in row.blocks(config, dtype.itemsize):
                rows = tensor.read_rows(row.spans(config, start, stop))
                yield row.index(layer, start, stop), row.to_ours(rows.astype(dtype, copy=False), config)
                advance(rows.nbytes)

    return StreamedArray(parameter_shapes(config)[row.ours].shape, dtype, row.chunk_shape(config, dtype.itemsize), blocks)


def _read_tokenizer_files(folder: Path) -> dict[str, str]:
    try:
        return {name: (folder / name).read_text(encoding="utf-8") for name in TOKENIZER_FILES if (folder / name).is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}: a tokenizer file cannot be read: {error}.") from error


def _names(folder: HuggingFaceFolder) -> str:
    return ", ".join(file.name for file in folder.files)
