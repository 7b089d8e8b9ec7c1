"""The token store: a SeqIO task, tokenized once, as flat arrays that any host reads at any place.

A store is a folder: a local path, or a URL of a TensorStore key-value store (`file://`, `gs://`, `memory://`).

    tokens      uint16 (vocabularies up to 65,536) or uint32 [tokens]: the documents one after the other, each with
                its EOS if the task appends one
    ends        bool [tokens]: true on the last token of each document. A window knows its documents from this
                alone, whatever the token values are
    learn       bool [tokens]: true on tokens that are to be predicted; only where a task leaves some out (the
                questions of instructions)
    offsets     uint64 [documents + 1]: where each document begins, and the end of the last
    report.json what the build read, kept and left out; see `build/pipeline.py`
    store.json  `StoreInfo`; written last, so that its presence means: complete

The arrays are zarr3, sharded, compressed, with checksums. Every chunk is stored, those of zeros too, so that
one that is not there is lost: opening asks for the names of all shards, and a read of what is missing or
damaged is an error. (Formats before 3 left out what is all zeros or false; there the other arrays tell
whether a shard may be missing.) Reading takes memory for what is asked and a small chunk cache, whatever the
size of the store.
"""

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from aurora_jax.errors import InputError
from aurora_jax.storage.kvstore import context, kvstore_at
from aurora_jax.storage.records import described, with_digest, without_digest

ARRAYS = ("tokens", "ends", "offsets")
TYPES = {"ends": np.dtype(bool), "learn": np.dtype(bool), "offsets": np.dtype(np.uint64)}
SHARD_ELEMENTS = 1 << 22  # one object in the bucket
CHUNK_ELEMENTS = 1 << 14  # what a read decodes at least
FORMAT = 3
"""Of the arrays. 3: chunks of zeros are stored."""
CACHE_BYTES = 32 << 20  # of the chunks that windows are cut from

_COUNTER = itertools.count()


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds and what made it (the contents of `store.json`).

    Attributes:
        task: name of the SeqIO task.
        split: its split.
        fingerprint: digest of preprocessors, tokenizer and format; see `Recipe.fingerprint`.
        sources: digest of the records that were read.
        tokenizer_sha256: digest of the tokenizer file.
        vocab_size: number of token ids.
        eos_id: the id that ends every document; None if the task appends none.
        language: of the documents; "mul" if they differ, "und" if they do not say.
        documents: number of documents.
        tokens: number of tokens, every EOS included.
        text_bytes: UTF-8 bytes of the documents' text, the denominator of bits per byte.
        masked: whether some tokens are not to be predicted (array `learn`).
        format: of the arrays; 2 where a store does not say.
    """

    task: str
    split: str
    fingerprint: str
    sources: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    language: str
    documents: int
    tokens: int
    text_bytes: int
    masked: bool = False
    format: int = 2


class TokenStore:
    """A complete store, open for reading; safe to share between threads."""

    def __init__(self, directory: str, info: StoreInfo, arrays: Mapping[str, ts.TensorStore]):
        self.directory = directory
        self.info = info
        self._arrays = arrays
        # Not the directory: another store may be built there later.
        self._arrays_id = next(_COUNTER)

    @classmethod
    def open(cls, directory: str | Path, *expected_fingerprints: str) -> "TokenStore":
        """Opens the store in `directory`, whose fingerprint is to be one of those given, if any are; the
        first is the one of today.

        Raises:
            InputError: there is no complete store, its description is malformed, a shard is missing, or its
                fingerprint is another.
        """
        info = read_info(directory)
        if info is None:
            raise InputError(
                f"{directory}: no complete token store (store.json is missing); build it with `aurora data build`"
            )
        if expected_fingerprints and info.fingerprint not in expected_fingerprints:
            raise InputError(_mismatch(directory, info.fingerprint, expected_fingerprints[0]))
        kvstore = kvstore_at(directory)
        strict = {"fill_missing_data_reads": info.format < FORMAT}
        with _damage_named(directory):
            pending = {
                name: ts.open(_spec(kvstore, name) | strict, open=True, read=True, context=context())
                for name in (*ARRAYS, *(["learn"] if info.masked else []))
            }
            store = cls(str(directory), info, {name: future.result() for name, future in pending.items()})
            store._check_shards(kvstore)
        return store

    def _check_shards(self, kvstore: ts.KvStore) -> None:
        """Raises InputError if the folder's list lacks a shard, naming it. Who may read but not list finds
        out when reading."""
        try:
            there = set(kvstore.list().result())
        except ValueError as error:
            if str(error).startswith(_NO_RIGHT):
                return
            raise
        missing = [
            (name, shard)
            for name, array in self._arrays.items()
            for shard in range(-(-array.shape[0] // _shard_size(array)))
            if f"{name}/c/{shard}".encode() not in there
        ]
        if self.info.format < FORMAT:
            offsets = [(name, shard) for name, shard in missing if name == "offsets"]
            missing = offsets or [(name, shard) for name, shard in missing if not self._may_be_zeros(name, shard)]
        if missing:
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise InputError(
                f"{self.directory}: a damaged token store: the file {missing[0][0]}/c/{missing[0][1]}{more} "
                "is missing; bring it back, or "
                "delete the folder and build it again"
            )

    def _may_be_zeros(self, name: str, shard: int) -> bool:
        """Whether a shard of tokens, ends or the mask may be all zeros or false, by the documents that
        `offsets` say are in it."""
        size = _shard_size(self._arrays[name])
        start, stop = shard * size, min((shard + 1) * size, len(self))
        ends = self._arrays["offsets"].read().result().astype(np.int64)[1:] - 1
        last = int(np.count_nonzero((ends >= start) & (ends < stop)))
        if name == "tokens":  # texts have no token 0; end-of-text tokens alone are documents without a text
            return self.info.eos_id == 0 and last == stop - start
        return last == 0  # every document has its last token, and is to learn it

    def __len__(self) -> int:
        """The number of tokens."""
        return self.info.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop); int32 [stop - start]. Raises IndexError outside [0, tokens]."""
        return self._read_range("tokens", start, stop).astype(np.int32)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, with its EOS; int32 [tokens of the document]. Raises IndexError outside [0,
        documents)."""
        start, stop = self._read_range("offsets", index, index + 2).tolist()
        return self.read(start, stop)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each of starts [windows]; int32 [windows, length], zeros beyond
        the end of the store."""
        return self._read_windows("tokens", starts, length).astype(np.int32)

    def window_ends(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of `windows(starts, length)` are the last of their document; bool [windows, length]."""
        return self._read_windows("ends", starts, length)

    def window_learn(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of `windows(starts, length)` are to be predicted; bool [windows, length]."""
        if not self.info.masked:
            return np.ones((len(starts), length), dtype=bool)
        return self._read_windows("learn", starts, length)

    def _read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        array = self._arrays[name]
        if not 0 <= start <= stop <= array.shape[0]:
            raise IndexError(f"{self.directory}: [{start}, {stop}) is outside {name} [0, {array.shape[0]})")
        with _damage_named(self.directory):
            return array[start:stop].read().result()

    def _read_windows(self, name: str, starts: np.ndarray, length: int) -> np.ndarray:
        array = self._arrays[name]
        size = array.shape[0]
        windows = np.zeros((len(starts), length), dtype=array.dtype.numpy_dtype)
        spans = [(start, min(start + length, size)) for start in np.asarray(starts).tolist()]
        numbers = {
            number for start, stop in spans for number in range(start // CHUNK_ELEMENTS, -(-stop // CHUNK_ELEMENTS))
        }
        cached = {number: _CHUNKS.get((self._arrays_id, name, number)) for number in numbers}
        chunks = {number: chunk for number, chunk in cached.items() if chunk is not None}
        missing = numbers - chunks.keys()
        # All of them in flight at once.
        reads = {
            number: array[number * CHUNK_ELEMENTS : min((number + 1) * CHUNK_ELEMENTS, size)].read()
            for number in missing
        }
        for number, read in reads.items():
            with _damage_named(self.directory):
                chunks[number] = read.result()
            _CHUNKS.put((self._arrays_id, name, number), chunks[number])
        for row, (start, stop) in zip(windows, spans, strict=True):
            place = start
            while place < stop:
                number, offset = divmod(place, CHUNK_ELEMENTS)
                values = chunks[number][offset : offset + stop - place]
                row[place - start : place - start + len(values)] = values
                place += len(values)
        return windows


class _ChunkCache:
    """The chunks read last, up to a size, by all stores of the process: a read of TensorStore's costs 50
    times a look here."""

    def __init__(self, limit: int):
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._chunks: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    def get(self, key: Hashable) -> np.ndarray | None:
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def put(self, key: Hashable, chunk: np.ndarray) -> None:
        with self._lock:
            if key in self._chunks:
                return
            self._chunks[key] = chunk
            self._size += chunk.nbytes
            while self._size > self._limit:
                self._size -= self._chunks.popitem(last=False)[1].nbytes


_CHUNKS = _ChunkCache(CACHE_BYTES)


def _shard_size(array: ts.TensorStore) -> int:
    return int(array.chunk_layout.write_chunk.shape[0])  # type: ignore[index, arg-type]


@contextmanager
def _damage_named(directory: str | Path) -> Iterator[None]:
    """Says of a store that its files are damaged or missing; errors of the network stay what they are."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        if str(error).startswith(_NO_RIGHT):
            raise InputError(f"{directory}: this token store may not be read: {error}") from error
        if not str(error).startswith(_DAMAGE):
            raise
        raise InputError(
            f"{directory}: a damaged token store: {error}; delete the folder and build it again"
        ) from error


_NO_RIGHT = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_DAMAGE = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")
"""What TensorStore calls files that are missing, cut short or of other bits: those of a store never change."""


def create_arrays(directory: str | Path, vocab_size: int, tokens: int, documents: int, masked: bool) -> None:
    """Makes the empty arrays of a store; the same ones again, as a second try finds them, are left as they are."""
    kvstore = kvstore_at(directory)
    lengths = {"tokens": tokens, "ends": tokens, "offsets": documents + 1} | ({"learn": tokens} if masked else {})
    for name, length in lengths.items():
        spec = _spec(kvstore, name) | {
            "metadata": _metadata(token_type(vocab_size) if name == "tokens" else TYPES[name], length)
        }
        try:
            ts.open(spec, create=True, open=True, context=context()).result()
        except ValueError:  # left by a build of something else
            ts.open(spec, create=True, delete_existing=True, context=context()).result()


def write_range(directory: str | Path, name: str, start: int, values: np.ndarray) -> None:
    """Writes values [n] into an array from `start`, which is a shard's beginning: shards may be written in
    any order, by many workers."""
    spec = _spec(kvstore_at(directory), name) | {"store_data_equal_to_fill_value": True}
    array = ts.open(spec, open=True, write=True, context=context()).result()
    array[start : start + len(values)].write(values).result()


def finish(directory: str | Path, info: "StoreInfo") -> None:
    """Declares a store complete, all of its arrays being written."""
    kvstore_at(directory).write(b"store.json", json.dumps(with_digest(asdict(info)), indent=2).encode()).result()


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds the ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _metadata(dtype: np.dtype, length: int) -> dict[str, Any]:
    codecs: list[dict[str, Any]] = [
        {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},
    ]
    return {
        "shape": [length],
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_ELEMENTS]}},
        "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [CHUNK_ELEMENTS], "codecs": codecs}}],
    }


def store_directory(root: str | Path, task: str, split: str) -> str:
    """Where a task's store lies under a folder of stores."""
    return f"{str(root).rstrip('/')}/{task}/{split}"


def read_info(directory: str | Path) -> StoreInfo | None:
    """What the store in `directory` holds; None if there is no complete store. Raises InputError if its
    description is malformed."""
    content = kvstore_at(directory).read(b"store.json").result()
    if content.state == "missing":
        return None
    try:
        where = f"{directory}: store.json is not a store's description"
        values, _ = without_digest(described(content.value, dict, where), f"{directory}: store.json")
        return described(values, StoreInfo, where)
    except InputError as error:
        raise InputError(f"{error}; delete the folder and build it again") from error


def _spec(kvstore: ts.KvStore, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": (kvstore / f"{name}/").spec().to_json()}


def _mismatch(directory: str | Path, found: str, expected: str) -> str:
    return (
        f"{directory}: this token store was made with other preprocessors or another tokenizer: "
        f"its fingerprint is {found[:16]}, expected is {expected[:16]}; "
        "choose another folder, or delete this one to build it again"
    )
