"""The token store: a SeqIO task, tokenized once, as flat arrays that any host reads at any place.

A store is a folder: a local path, or a URL of a TensorStore key-value store (`file://`, `gs://`, `memory://`).

    tokens      uint16 (vocabularies up to 65,536) or uint32 [tokens]: the documents one after the other, each with its EOS if the task
                appends one
    ends        bool [tokens]: true on the last token of each document. A window knows its documents from this alone, whatever the token
                values are
    offsets     uint64 [documents + 1]: where each document begins, and the end of the last
    store.json  `StoreInfo`; written last, so that its presence means: complete

The arrays are zarr3, sharded, compressed, with checksums. Reading takes memory for what is asked and a small chunk cache, whatever the size
of the store.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts
from rich.progress import Progress, TimeElapsedColumn

from aurora_jax.errors import InputError

if TYPE_CHECKING:
    import seqio

ARRAYS = ("tokens", "ends", "offsets")
FORMAT = 1  # part of the fingerprint: raise it when the arrays change meaning
SHARD_ELEMENTS = 1 << 22  # one object in the bucket
CHUNK_ELEMENTS = 1 << 14  # what a read decodes at least
CACHE_BYTES = 64 << 20
DOCUMENTS_AT_ONCE = 64  # out of tf.data
BYTES_AT_ONCE = 2 << 20  # of text, into the tokenizer


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds and what made it (the contents of `store.json`).

    Attributes:
        task: name of the SeqIO task.
        split: its split.
        fingerprint: digest of source files, preprocessors, tokenizer and format; see `task_fingerprint`.
        tokenizer_sha256: digest of the tokenizer file.
        vocab_size: number of token ids.
        eos_id: the id that ends every document; None if the task appends none.
        language: of the documents; "mul" if they differ, "und" if they do not say.
        documents: number of documents.
        tokens: number of tokens, every EOS included.
        text_bytes: UTF-8 bytes of the documents' text, the denominator of bits per byte.
    """

    task: str
    split: str
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    language: str
    documents: int
    tokens: int
    text_bytes: int


class TokenStore:
    """A complete store, open for reading; safe to share between threads."""

    def __init__(self, directory: str, info: StoreInfo, arrays: Mapping[str, ts.TensorStore]):
        self.directory = directory
        self.info = info
        self._arrays = arrays

    @classmethod
    def open(cls, directory: str | Path, expected_fingerprint: str | None = None) -> "TokenStore":
        """Opens the store in `directory`.

        Raises:
            InputError: there is no complete store, its description is malformed, or its fingerprint is not the expected one.
        """
        info = read_info(directory)
        if info is None:
            raise InputError(f"{directory}: no complete token store (store.json is missing); build it with `aurora data build`")
        if expected_fingerprint is not None and info.fingerprint != expected_fingerprint:
            raise InputError(_mismatch(directory, info.fingerprint, expected_fingerprint))
        kvstore = _kvstore(directory)
        try:
            pending = {name: ts.open(_spec(kvstore, name), open=True, context=_context()) for name in ARRAYS}
            arrays = {name: future.result() for name, future in pending.items()}
        except ValueError as error:
            raise InputError(f"{directory}: a damaged token store: {error}; delete the folder and build it again") from error
        return cls(str(directory), info, arrays)

    def __len__(self) -> int:
        """The number of tokens."""
        return self.info.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop); int32 [stop - start]. Raises IndexError outside [0, tokens]."""
        return self._read_range("tokens", start, stop).astype(np.int32)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, with its EOS; int32 [tokens of the document]. Raises IndexError outside [0, documents)."""
        start, stop = self._read_range("offsets", index, index + 2).tolist()
        return self.read(start, stop)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each of starts [windows]; int32 [windows, length], zeros beyond the end of the store."""
        return self._read_windows("tokens", starts, length).astype(np.int32)

    def window_ends(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of `windows(starts, length)` are the last of their document; bool [windows, length]."""
        return self._read_windows("ends", starts, length)

    def _read_range(self, name: str, start: int, stop: int) -> np.ndarray:
        array = self._arrays[name]
        if not 0 <= start <= stop <= array.shape[0]:
            raise IndexError(f"{self.directory}: [{start}, {stop}) is outside {name} [0, {array.shape[0]})")
        return array[start:stop].read().result()

    def _read_windows(self, name: str, starts: np.ndarray, length: int) -> np.ndarray:
        array = self._arrays[name]
        size = array.shape[0]
        windows = np.zeros((len(starts), length), dtype=array.dtype.numpy_dtype)
        reads = [array[start : min(start + length, size)].read() for start in np.asarray(starts).tolist()]  # all of them in flight at once
        for row, read in zip(windows, reads, strict=True):
            values = read.result()
            row[: len(values)] = values
        return windows


class StoreWriter:
    """Writes a store document by document, in bounded memory. Leaving the `with` block before `finish` leaves nothing behind.

    What a killed process leaves has no `store.json`, is not taken for a store, and is overwritten by the next writer.

    Raises:
        InputError: `directory` holds a complete store already.
    """

    def __init__(self, directory: str | Path, vocab_size: int):
        if read_info(directory) is not None:
            raise InputError(f"{directory}: holds a complete token store; choose another folder, or delete it first")
        self._kvstore = _kvstore(directory)
        self._vocab_size = vocab_size
        self._token_type = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self._tokens = _Appender(self._kvstore, "tokens", self._token_type)
        self._ends = _Appender(self._kvstore, "ends", np.dtype(bool))
        self._offsets = _Appender(self._kvstore, "offsets", np.dtype(np.uint64))
        self._offsets.append(np.zeros(1, dtype=np.uint64))
        self._finished = False

    def append(self, documents: Sequence[np.ndarray]) -> None:
        """Adds documents, integers [tokens of the document] each. One without any token (an empty text without EOS) leaves no document."""
        lengths = np.array([len(ids) for ids in documents if len(ids)], dtype=np.int64)
        if not len(lengths):
            return
        stops = np.cumsum(lengths)
        ends = np.zeros(stops[-1], dtype=bool)
        ends[stops - 1] = True
        self._offsets.append((self._tokens.size + stops).astype(np.uint64))
        self._tokens.append(np.concatenate(documents).astype(self._token_type))
        self._ends.append(ends)

    def finish(
        self, *, task: str, split: str, fingerprint: str, tokenizer_sha256: str, eos_id: int | None, language: str, text_bytes: int
    ) -> None:
        """Writes what is left and then `store.json`; the arguments are those of `StoreInfo`."""
        for array in (self._tokens, self._ends, self._offsets):
            array.close()
        info = StoreInfo(
            task=task,
            split=split,
            fingerprint=fingerprint,
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self._vocab_size,
            eos_id=eos_id,
            language=language,
            documents=self._offsets.size - 1,
            tokens=self._tokens.size,
            text_bytes=text_bytes,
        )
        self._kvstore.write(b"store.json", json.dumps(asdict(info), indent=2).encode()).result()
        self._finished = True

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._finished:
            for name in ARRAYS:
                self._kvstore.delete_range(ts.KvStore.KeyRange(f"{name}/", f"{name}0")).result()  # "0" is the character after "/"


def read_info(directory: str | Path) -> StoreInfo | None:
    """What the store in `directory` holds; None if there is no complete store. Raises InputError if its description is malformed."""
    content = _kvstore(directory).read(b"store.json").result()
    if content.state == "missing":
        return None
    try:
        return StoreInfo(**json.loads(content.value))
    except (ValueError, TypeError) as error:
        raise InputError(f"{directory}: store.json is not a store's description: {error}; delete the folder and build it again") from error


def build_store(task_name: str, split: str, directory: str | Path, *, show_progress: bool = True) -> TokenStore:
    """Tokenizes a split of a registered SeqIO task into a store, in bounded memory; a store with the same fingerprint is opened instead.

    The task's preprocessors must be steps on text, then `seqio.preprocessors.tokenize`, then (optional) `append_eos`: the text goes through
    SeqIO, and the tokenizer is called on large batches, which is what makes it fast.

    Raises:
        InputError: no such task or split, other preprocessors, a malformed source, or a store with another fingerprint in `directory`.
    """
    import seqio

    fingerprint = task_fingerprint(task_name, split)
    existing = read_info(directory)
    if existing is not None:
        if existing.fingerprint != fingerprint:
            raise InputError(_mismatch(directory, existing.fingerprint, fingerprint))
        return TokenStore.open(directory, fingerprint)

    task = _task(task_name, split)
    feature = task.output_features["targets"]
    vocabulary = feature.vocabulary
    eos_id = vocabulary.eos_id if feature.add_eos and seqio.preprocessors.append_eos in task.preprocessors else None
    suffix = np.array([] if eos_id is None else [eos_id], dtype=np.int32)
    text_bytes = 0
    languages: set[str] = set()
    progress = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), disable=not show_progress)
    with StoreWriter(directory, vocabulary.vocab_size) as writer, progress:
        bar = progress.add_task(f"tokenize {task_name}/{split}", total=task.num_input_examples(split))
        for texts, languages_here in _text_batches(task, split):
            writer.append([np.concatenate([ids, suffix]) for ids in vocabulary.encode_batch([text.decode() for text in texts])])
            text_bytes += sum(map(len, texts))
            languages |= languages_here
            progress.advance(bar, len(texts))
        writer.finish(
            task=task_name,
            split=split,
            fingerprint=fingerprint,
            tokenizer_sha256=vocabulary.sha256,
            eos_id=eos_id,
            language=languages.pop() if len(languages) == 1 else "mul" if languages else "und",
            text_bytes=text_bytes,
        )
    return TokenStore.open(directory, fingerprint)


def build_mixture_stores(mixture_name: str, root: str | Path, split: str = "train", *, show_progress: bool = True) -> dict[str, TokenStore]:
    """Builds (or opens) the store of every task of a mixture, in root/<task>/<split>/. Raises InputError as `build_store` does."""
    from aurora_jax.data.tasks import mixture_rates

    root = str(root).rstrip("/")
    return {
        task: build_store(task, split, f"{root}/{task}/{split}", show_progress=show_progress) for task, _ in mixture_rates(mixture_name)
    }


def task_fingerprint(task_name: str, split: str) -> str:
    """Hexadecimal digest of all that decides the tokens of a task's split.

    These are the names and contents of the source files, the code and arguments of the preprocessors, and the tokenizer. The folder of the
    files does not count, so that a corpus may move. Reads every source file once.

    Raises:
        InputError: no such task or split, or its source has no files.
    """
    import tensorflow as tf

    task = _task(task_name, split)
    feature = task.output_features["targets"]
    parts: list[Any] = [FORMAT, split, feature.vocabulary.sha256, feature.add_eos]
    for path in task.source.list_shards(split):
        if not tf.io.gfile.exists(path):
            raise InputError(
                f"task {task_name}, split {split}: {path} is not a file; a token store needs files as sources, to see when they change"
            )
        digest = hashlib.sha256()
        with tf.io.gfile.GFile(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        parts.append((Path(path).name, digest.hexdigest()))
    parts.append(type(task.source).__qualname__)
    parts.extend(_describe(preprocessor) for preprocessor in _preprocessors(task))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _describe(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Name, code and bound arguments of a preprocessor."""
    if isinstance(function, partial):
        return (*_describe(function.func), function.args, sorted(function.keywords.items()))
    function = inspect.unwrap(function)
    try:
        return (function.__module__, function.__qualname__, inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise InputError(
            f"preprocessor {function!r}: its source text cannot be read, so changes would pass unnoticed; make it a function in a file"
        ) from error


def _preprocessors(task: "seqio.Task") -> list[Callable[..., Any]]:
    """Without the marker of SeqIO's own cache, which the store replaces."""
    import seqio

    return [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]


def _task(task_name: str, split: str) -> "seqio.Task":
    import seqio

    if task_name not in seqio.TaskRegistry.names():
        raise InputError(f"no SeqIO task is named {task_name!r}; registered are: {', '.join(sorted(seqio.TaskRegistry.names())) or 'none'}")
    task = seqio.TaskRegistry.get(task_name)
    if split not in task.splits:
        raise InputError(f"task {task_name} has no split {split!r}; it has: {', '.join(task.splits)}")
    vocabulary = task.output_features["targets"].vocabulary
    if not hasattr(vocabulary, "sha256"):
        raise InputError(
            f"task {task_name}: its vocabulary, a {type(vocabulary).__name__}, has no digest; make it with vocabulary_from(path)"
        )
    return task


def _text_batches(task: "seqio.Task", split: str) -> Iterator[tuple[list[bytes], set[str]]]:
    """The texts of a task as `tokenize` would get them, in batches of about BYTES_AT_ONCE, with the languages that they name."""
    import seqio
    import tensorflow as tf

    from aurora_jax.data.tasks import input_error_in

    steps = _preprocessors(task)
    tokenize, append_eos = seqio.preprocessors.tokenize, seqio.preprocessors.append_eos
    position = steps.index(tokenize) if tokenize in steps else len(steps)
    if steps[position:] not in ([tokenize], [tokenize, append_eos]):
        raise InputError(
            f"task {task.name}: a token store needs preprocessors that end with seqio.preprocessors.tokenize and, if wanted, append_eos; "
            f"these are {[getattr(step, '__name__', repr(step)) for step in steps]}"
        )
    text_feature = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.string, rank=0)
    text_task = task.replace(preprocessors=steps[:position], output_features={"targets": text_feature})
    dataset = text_task.get_dataset(sequence_length=None, split=split, shuffle=False, try_in_mem_cache=False)
    texts: list[bytes] = []
    languages: set[str] = set()
    size = 0
    try:
        for batch in dataset.batch(DOCUMENTS_AT_ONCE).as_numpy_iterator():
            texts.extend(batch["targets"])
            languages.update(language.decode() for language in set(batch.get("language", [b"und"])))
            size += sum(map(len, batch["targets"]))
            if size >= BYTES_AT_ONCE:
                yield texts, languages
                texts, languages, size = [], set(), 0
    except tf.errors.OpError as error:
        raise input_error_in(error) or error from error
    yield texts, languages


class _Appender:
    """Writes a one-dimensional array of unknown length, shard by shard."""

    def __init__(self, kvstore: ts.KvStore, name: str, dtype: np.dtype):
        self.size = 0
        self._buffer = [np.zeros(0, dtype=dtype)]
        self._buffered = 0
        codecs = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 3}},
            {"name": "crc32c"},
        ]
        if dtype.itemsize == 1:
            codecs[0] = {"name": "bytes"}
        metadata = {
            "shape": [1 << 60],  # cut to the true length at the end: one write of the metadata, where object stores limit them
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_ELEMENTS]}},
            "codecs": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [CHUNK_ELEMENTS], "codecs": codecs}}],
        }
        spec = _spec(kvstore, name) | {"metadata": metadata}
        self._array = ts.open(spec, create=True, delete_existing=True, context=_context()).result()

    def append(self, values: np.ndarray) -> None:
        self._buffer.append(values)
        self._buffered += len(values)
        self.size += len(values)
        if self._buffered >= SHARD_ELEMENTS:
            self._flush(self._buffered // SHARD_ELEMENTS * SHARD_ELEMENTS)

    def close(self) -> None:
        self._flush(self._buffered)
        self._array.resize(exclusive_max=[self.size], resize_metadata_only=True).result()

    def _flush(self, count: int) -> None:
        values = np.concatenate(self._buffer)
        start = self.size - self._buffered
        self._array[start : start + count].write(values[:count]).result()
        self._buffer, self._buffered = [values[count:]], self._buffered - count


@cache
def _context() -> ts.Context:
    """One cache of decoded chunks and one `memory://` for the process."""
    return ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _kvstore(directory: str | Path) -> ts.KvStore:
    directory = str(directory).rstrip("/")
    spec: Any = f"{directory}/" if "://" in directory else {"driver": "file", "path": f"{Path(directory).absolute()}/"}
    try:
        return ts.KvStore.open(spec, context=_context()).result()
    except ValueError as error:
        raise InputError(f"{directory}: not a place that TensorStore can open: {error}") from error


def _spec(kvstore: ts.KvStore, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": (kvstore / f"{name}/").spec().to_json()}


def _mismatch(directory: str | Path, found: str, expected: str) -> str:
    return (
        f"{directory}: this token store was made from other sources, preprocessors or tokenizer: "
        f"its fingerprint is {found[:16]}, expected is {expected[:16]}; "
        "choose another folder, or delete this one to build it again"
    )
