"""A Hugging Face model folder, read by offset: what its files hold is checked first, and no file is ever loaded or mapped whole.

A memory-mapped file counts as resident memory once it is read; `pread` into a block does not, and that is what keeps conversion flat.
"""

import json
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig, from_hf_config
from convert.streaming import Scratch
from convert.weight_map import IGNORED, PREFIX, TIED_HEAD

SAFETENSORS_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAXIMUM_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in row-major order somewhere in a file; nothing of it is in memory."""

    file: Path
    offset: int
    """Bytes from the beginning of the file."""
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_rows(self, spans: list[tuple[int, int]], scratch: Scratch | None = None) -> np.ndarray:
        """The rows of each (first, last + 1), one after the other: [rows, ...], in a buffer of `scratch` if it is given.

        Raises:
            InputError: the file ends before them or cannot be read.
        """
        row_shape = self.shape[1:]
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        shape = (sum(stop - start for start, stop in spans), *row_shape)
        buffer = np.empty(shape, self.dtype) if scratch is None else scratch.array("read", shape, self.dtype)
        into = memoryview(buffer.reshape(-1).view(np.uint8).data)
        try:
            with self.file.open("rb", buffering=0) as file:
                for start, stop in spans:
                    file.seek(self.offset + start * row_bytes)
                    span, into = into[: (stop - start) * row_bytes], into[(stop - start) * row_bytes :]
                    while span:  # one read returns at most 2 GiB on Linux
                        count = file.readinto(span)
                        if not count:
                            raise InputError(
                                f"{self.file} ends before the tensor does: the file changed or is truncated; download it again."
                            )
                        span = span[count:]
        except OSError as error:
            raise InputError(f"{self.file} cannot be read: {error}.") from error
        return buffer


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A checked folder: `config.json` and every tensor of its weight files, buffers that are no weights left out.

    Tensors are named as in a model with a head, `transformer.` first, whether or not the files do so.
    """

    path: Path
    hf_config: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    files: list[Path]
    """Weight files, in the order of their names."""


def read_folder(path: str | os.PathLike[str]) -> HuggingFaceFolder:
    """Opens a model folder and checks all that can be checked without reading the weights.

    Raises:
        InputError: no folder, a missing or foreign `config.json`, no weights, an index that leaves the folder or disagrees with its
            shards, a file that is malformed or truncated.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a Hugging Face model folder is expected.")
    hf_config = _read_json_object(folder / "config.json", "every Hugging Face model folder has it")
    try:
        config = from_hf_config(hf_config)
    except InputError as error:
        raise InputError(f"{folder}/{error}") from None
    tensors, files = _read_weights(folder)
    prefix = "" if any(name.startswith(PREFIX) for name in tensors) else PREFIX
    weights = {name if name == TIED_HEAD else prefix + name: stored for name, stored in tensors.items() if not IGNORED.fullmatch(name)}
    return HuggingFaceFolder(folder, hf_config, config, weights, files)


def _read_weights(folder: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.exists():
            return _read_shards(index)
        if single.exists():
            return _read_file(single), [single]
    found = ", ".join(sorted(entry.name for entry in folder.iterdir()))[:400] or "nothing"
    raise InputError(
        f"{folder}: no weights: model.safetensors, model.safetensors.index.json, pytorch_model.bin or pytorch_model.bin.index.json is "
        f"expected; found {found}."
    )


def _read_shards(index: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: 'weight_map' must map tensor names to file names.")
    for tensor, name in weight_map.items():
        shard = PurePosixPath(name)
        # By name only: in the Hugging Face cache a shard is a symbolic link that leads elsewhere, and rightly so.
        if shard.is_absolute() or ".." in shard.parts or "\\" in name or not name:
            raise InputError(f"{index}: the tensor {tensor} points outside the folder, to {name!r}; refusing to follow it.")
    tensors: dict[str, StoredTensor] = {}
    files = [index.parent / name for name in sorted({*weight_map.values()})]
    for file in files:
        if not file.exists():
            example = next(tensor for tensor, name in weight_map.items() if index.parent / name == file)
            raise InputError(f"{file}: missing shard; {index.name} says that it holds {example} (and perhaps more). Download it again.")
        for tensor, stored in _read_file(file).items():
            listed = weight_map.get(tensor)
            if listed is None and IGNORED.fullmatch(tensor):
                continue
            if listed is None or index.parent / listed != file:
                where = f"in {listed}" if listed else "nowhere"
                raise InputError(f"{file}: it holds the tensor {tensor}, which {index.name} says is {where}: they do not belong together.")
            tensors[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in tensors and not IGNORED.fullmatch(tensor):
            raise InputError(f"{index.parent / name}: the tensor {tensor} is not in it, although {index.name} says so.")
    return tensors, files


def _read_file(file: Path) -> dict[str, StoredTensor]:
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, from its header alone. Raises InputError where the file is not what the format demands."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, MAXIMUM_HEADER_BYTES):
                raise InputError(f"{file}: not a safetensors file, or truncated: its header claims {length} bytes, the file has {size}.")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: the safetensors header is not JSON: {error}.") from None
    if not isinstance(header, dict):
        raise InputError(f"{file}: the safetensors header is not a JSON object.")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, first, last, dtype, shape in sorted(_header_entries(file, header), key=lambda entry: entry[1:3]):
        if first != end:
            raise InputError(f"{file}: the tensor {name} begins at byte {first} of the data, where {end} is expected: a gap or an overlap.")
        if data + last > size:
            raise InputError(
                f"{file}: the tensor {name} ends at byte {data + last}, but the file has {size}: truncated; download it again."
            )
        end = last
        tensors[name] = StoredTensor(file, data + first, shape, dtype)
    if data + end != size:
        raise InputError(f"{file}: {size - data - end} bytes follow the last tensor; the header and the file do not belong together.")
    return tensors


def _header_entries(file: Path, header: dict[str, Any]) -> Iterator[tuple[str, int, int, np.dtype, tuple[int, ...]]]:
    for name, entry in header.items():
        try:
            label, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            valid = all(type(number) is int and number >= 0 for number in (*shape, first, last)) and first <= last
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            raise InputError(f"{file}: the header's entry of the tensor {name} is malformed: {str(entry)[:200]}.")
        if label not in SAFETENSORS_DTYPES:
            if IGNORED.fullmatch(name):  # boolean masks; they still occupy their bytes
                yield name, first, last, np.dtype(np.uint8), (last - first,)
                continue
            raise InputError(f"{file}: the tensor {name} is {label}; readable are {', '.join(SAFETENSORS_DTYPES)}.")
        dtype = SAFETENSORS_DTYPES[label]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{file}: the tensor {name} {label} {list(shape)} cannot have {last - first} bytes.")
        yield name, first, last, dtype, shape


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a `.bin` file. PyTorch reads the structure alone (`weights_only`, fake tensors); the data is read by offset.

    Raises:
        InputError: PyTorch is absent, the file is damaged or not a plain dictionary of tensors.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise InputError(f"{file}: reading .bin files takes PyTorch: pip install 'aurora-jax[torch]'.") from None
    dtypes = {torch.float32: np.dtype(np.float32), torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{file}: its entries are compressed, which PyTorch never does; save it again with torch.save.")
        with FakeTensorMode():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch documents no common type for what a damaged or forbidden file raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file}: not a PyTorch checkpoint of plain weights (torch.save since 1.6), or damaged: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{file}: a dictionary of tensors is expected.")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        if IGNORED.fullmatch(name):
            continue
        if tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise InputError(
                f"{file}: the tensor {name} ({tensor.dtype}, strides {tensor.stride()}) must be contiguous and floating-point."
            )
        dtype = dtypes[tensor.dtype]
        offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * dtype.itemsize
        tensors[name] = StoredTensor(file, offset, tuple(tensor.shape), dtype)
    return tensors


def _read_json_object(file: Path, hint: str = "") -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: missing file{f'; {hint}' if hint else ''}.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: a JSON object is expected.")
    return values
