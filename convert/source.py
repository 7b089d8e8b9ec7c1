"""A Hugging Face model folder, read by offset: what its files hold is checked first, and no file is ever
loaded or mapped whole.

A memory-mapped file counts as resident memory once it is read; `pread` into a block does not, and that is
what keeps conversion flat.
"""

import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig, from_hf_config
from aurora_jax.storage.records import object_in
from convert.streaming import Scratch
from convert.weight_map import IGNORED, PREFIX, TIED_HEAD, WRAPPERS, token_embedding

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
    name: str = field(compare=False)
    """As the file calls it."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read_rows(self, spans: list[tuple[int, int]], scratch: Scratch | None = None) -> np.ndarray:
        """The rows of each (first, last + 1), one after the other: [rows, ...], in a buffer of `scratch` if
        it is given.

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
                                f"{self.file} ends before the tensor does: the file changed or is truncated; "
                                "download it again."
                            )
                        span = span[count:]
        except OSError as error:
            raise InputError(f"{self.file} cannot be read: {error}.") from error
        return buffer


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A checked folder: `config.json` and every tensor of its weight files, buffers that are no weights left out.

    Tensors are named as in a model with a head that was never wrapped, `transformer.` first, whatever the
    files do; the token embedding is there under its own name, also where a file has it as the head alone.
    """

    path: Path
    hf_config: dict[str, Any]
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    files: list[Path]
    """Weight files, in the order of their names."""
    passed_over: tuple[str, ...] = ()
    """Weights of another format that are there too: names of files, of which nothing was read."""


def read_folder(path: str | os.PathLike[str], weights: str | None = None) -> HuggingFaceFolder:
    """Opens a model folder and checks all that can be checked without reading the weights.

    Args:
        path: the folder.
        weights: the file in it that has the weights, or the index of its shards; needed where there are several.

    Raises:
        InputError: no folder, a missing or foreign `config.json`, no weights or several, an index that leaves
            the folder or disagrees with its shards, a file that is malformed or truncated, names that cannot
            be told apart.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a Hugging Face model folder is expected.")
    hf_config = _read_json_object(folder / "config.json", "every Hugging Face model folder has it")
    try:
        config = from_hf_config(hf_config)
    except InputError as error:
        raise InputError(f"{folder}/{error}") from None
    chosen, passed_over = choose_weights(folder, weights or hf_config.get(CHOSEN_IN_CONFIG))
    tensors, files = _read_shards(chosen) if chosen.suffix == ".json" else (_read_file(chosen), [chosen])
    named = canonical_names(tensors, chosen)
    if (embedding := token_embedding(config).hf) not in named and TIED_HEAD in named:
        # Of the two names of a shared tensor safetensors keeps the first in the alphabet.
        named[embedding] = named.pop(TIED_HEAD)
    return HuggingFaceFolder(folder, hf_config, config, named, files, passed_over)


CHOSEN_IN_CONFIG = "transformers_weights"
"""Key of config.json by which a folder says itself which of its weights are the model; `transformers` obeys it."""

FORMATS = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
"""Formats of weights that are read, the preferred one first (as in `transformers`), with the name that is expected."""


def choose_weights(folder: Path, weights: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """The weight file of a folder, or the index of its shards, and the names of those of another format, passed over.

    `transformers` takes safetensors before `.bin`, and so it is done here; nothing else that is there twice
    is decided by rule.

    Raises:
        InputError: there are none, or several of one format and none was chosen.
    """
    entries = sorted(entry.name for entry in folder.iterdir())
    if weights is not None:
        if not isinstance(weights, str) or Path(weights).name != weights or weights not in entries:
            raise InputError(f"weights {weights}: no such file in {folder}; found {_listed(entries)}.")
        if not (weights.endswith(tuple(FORMATS)) or is_index(weights)):
            raise InputError(
                f"weights {weights}: a {' or '.join(FORMATS)} file or the index of its shards is expected."
            )
        return folder / weights, ()
    candidates: dict[str, list[str]] = {}
    for suffix in FORMATS:
        indexes = [name for name in entries if is_index(name) and suffix in name]
        listed = {shard for index in indexes for shard in _shards_of(folder / index)}
        singles = [
            name for name in entries if name.endswith(suffix) and name not in listed and not NO_WEIGHTS.fullmatch(name)
        ]
        candidates[suffix] = indexes + singles
    for suffix, found in candidates.items():
        if not found:
            continue
        if len(found) == 1 and found[0] in (FORMATS[suffix], f"{FORMATS[suffix]}.index.json"):
            others = [name for other, names in candidates.items() if other != suffix for name in names]
            return folder / found[0], tuple(others)
        problem = "which of them is the model" if len(found) > 1 else f"it is not called {FORMATS[suffix]}"
        raise InputError(
            f"{folder} has the weights {_listed(found)}: {problem}? Choose one with --weights, such as "
            f"--weights {found[0]}."
        )
    raise InputError(
        f"{folder}: no weights: model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        "pytorch_model.bin.index.json is "
        f"expected; found {_listed(entries)}."
    )


NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|random_states_\d+)\.bin")
"""What trainers leave beside the weights under their suffix."""

INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.\w+)?\.json")
"""Indexes of shards; before the last suffix a variant such as fp16."""


def is_index(name: str) -> bool:
    """Whether a file is, by its name, an index of weight files."""
    return INDEX.fullmatch(name) is not None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)[:400] or "nothing"


def canonical_names(tensors: Mapping[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    """The weights under the names that an unwrapped model with a head gives them.

    What PyTorch's wrappers put into a name is left out: before all names (`_orig_mod.`, `module.`, nested
    too) or inside.

    Raises:
        InputError: some tensors carry such a prefix and others do not, or two would have one name.
    """
    stored = dict(tensors)
    while prefix := next(
        (name for name in (*WRAPPERS, "model") if any(each.startswith(f"{name}.") for each in stored)), None
    ):
        if not all(name.startswith(f"{prefix}.") for name in stored):
            bare = next(name for name in stored if not name.startswith(f"{prefix}."))
            wrapped = next(name for name in stored if name.startswith(f"{prefix}."))
            raise InputError(
                f"{where}: the tensor {wrapped} has the prefix {prefix!r} of "
                f"{WRAPPERS.get(prefix, 'a wrapper')}, but {bare} has none: "
                "save the state dictionary of the model itself."
            )
        stored = {name.partition(".")[2]: tensor for name, tensor in stored.items()}
    named: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in named:
            raise InputError(
                f"{where}: the tensors {named[plain].name} and {tensor.name} are both {plain}: which of them counts?"
            )
        named[plain] = tensor
    named = {name: tensor for name, tensor in named.items() if not is_ignored(name)}
    prefix = "" if any(name.startswith(PREFIX) for name in named) else PREFIX
    return {name if name == TIED_HEAD else prefix + name: tensor for name, tensor in named.items()}


def is_ignored(name: str) -> bool:
    """Whether a tensor is a buffer that is no weight, by its name in a file."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return IGNORED.fullmatch(".".join(parts).removeprefix("model.")) is not None


def _shards_of(index: Path) -> dict[str, list[str]]:
    """The files that an index names, each with its tensors. Raises InputError if it is malformed or leads out
    of the folder."""
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: 'weight_map' must map tensor names to file names.")
    shards: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        shard = PurePosixPath(name)
        # By name only: in the Hugging Face cache a shard is a symbolic link that leads elsewhere, and rightly so.
        if shard.is_absolute() or ".." in shard.parts or "\\" in name or not name:
            raise InputError(
                f"{index}: the tensor {tensor} points outside the folder, to {name!r}; refusing to follow it."
            )
        shards.setdefault(str(shard), []).append(tensor)
    return shards


def _read_shards(index: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    shards = _shards_of(index)
    listed_in = {tensor: name for name, its_tensors in shards.items() for tensor in its_tensors}
    tensors: dict[str, StoredTensor] = {}
    files = [index.parent / name for name in sorted(shards)]
    for file in files:
        name = str(file.relative_to(index.parent))
        if not file.exists():
            raise InputError(
                f"{file}: missing shard; {index.name} says that it holds {shards[name][0]} (and perhaps "
                "more). Download it again."
            )
        for tensor, stored in _read_file(file).items():
            listed = listed_in.get(tensor)
            if listed is None and is_ignored(tensor):
                continue
            if listed != name:
                where = f"in {listed}" if listed else "nowhere"
                raise InputError(
                    f"{file}: it holds the tensor {tensor}, which {index.name} says is {where}: they do not "
                    "belong together."
                )
            tensors[tensor] = stored
    for tensor, name in listed_in.items():
        if tensor not in tensors and not is_ignored(tensor):
            raise InputError(f"{index.parent / name}: the tensor {tensor} is not in it, although {index.name} says so.")
    return tensors, files


def _read_file(file: Path) -> dict[str, StoredTensor]:
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, from its header alone. Raises InputError where the file is not what
    the format demands."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, MAXIMUM_HEADER_BYTES):
                raise InputError(
                    f"{file}: not a safetensors file, or truncated: its header claims {length} bytes, the "
                    f"file has {size}."
                )
            header = object_in(opened.read(length), f"{file}: the safetensors header")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    header.pop("__metadata__", None)
    data = 8 + length
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, first, last, dtype, shape in sorted(_header_entries(file, header), key=lambda entry: entry[1:3]):
        if first != end:
            raise InputError(
                f"{file}: the tensor {name} begins at byte {first} of the data, where {end} is expected: a "
                "gap or an overlap."
            )
        if data + last > size:
            raise InputError(
                f"{file}: the tensor {name} ends at byte {data + last}, but the file has {size}: truncated; "
                "download it again."
            )
        end = last
        tensors[name] = StoredTensor(file, data + first, shape, dtype, name)
    if data + end != size:
        raise InputError(
            f"{file}: {size - data - end} bytes follow the last tensor; the header and the file do not belong together."
        )
    return tensors


def _header_entries(file: Path, header: dict[str, Any]) -> Iterator[tuple[str, int, int, np.dtype, tuple[int, ...]]]:
    for name, entry in header.items():
        try:
            label, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
            valid = whole and first <= last and isinstance(label, str)
        except (TypeError, KeyError, ValueError):
            valid = False
        if not valid:
            raise InputError(f"{file}: the header's entry of the tensor {name} is malformed: {str(entry)[:200]}.")
        if label not in SAFETENSORS_DTYPES:
            if is_ignored(name):  # boolean masks; they still occupy their bytes
                yield name, first, last, np.dtype(np.uint8), (last - first,)
                continue
            raise InputError(f"{file}: the tensor {name} is {label}; readable are {', '.join(SAFETENSORS_DTYPES)}.")
        dtype = SAFETENSORS_DTYPES[label]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{file}: the tensor {name} {label} {list(shape)} cannot have {last - first} bytes.")
        yield name, first, last, dtype, shape


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a `.bin` file. PyTorch reads the structure alone (`weights_only`, fake tensors); the
    data is read by offset.

    Raises:
        InputError: PyTorch is absent, the file is damaged or not a plain dictionary of tensors.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise InputError(f"{file}: reading .bin files takes PyTorch: pip install 'aurora-jax[torch]'.") from None
    dtypes = {
        torch.float32: np.dtype(np.float32),
        torch.float16: np.dtype(np.float16),
        torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    }
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(
                    f"{file}: its entries are compressed, which PyTorch never does; save it again with torch.save."
                )
        with FakeTensorMode():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch documents no common type for what a damaged or forbidden file raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{file}: not a PyTorch checkpoint of plain weights (torch.save since 1.6), or damaged: {reason}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{file}: a dictionary of tensors is expected.")
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in state.items():
        if is_ignored(name):
            continue
        if tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise InputError(
                f"{file}: the tensor {name} ({tensor.dtype}, strides {tensor.stride()}) must be contiguous "
                "and floating-point."
            )
        dtype = dtypes[tensor.dtype]
        offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * dtype.itemsize
        tensors[name] = StoredTensor(file, offset, tuple(tensor.shape), dtype, name)
    return tensors


def _read_json_object(file: Path, hint: str = "") -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file}: missing file{f'; {hint}' if hint else ''}.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    return object_in(content, file)
