"""Recipes: all that makes the tokens of a task's split, in a form that workers get and fingerprints are made
of; no TensorFlow."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from aurora_jax.data.text.documents import Document, DocumentStep, Piece, Rejected
from aurora_jax.data.text.readers import EXCERPT, Part
from aurora_jax.data.text.sources import Bad
from aurora_jax.data.text.tokenizer import Tokenizer
from aurora_jax.errors import InputError
from aurora_jax.storage.files import File

FORMAT = 3
"""Part of every fingerprint: raised when tokens or arrays change meaning. 3: texts without anything but white
space are dropped, and files lose a byte-order mark."""
READABLE_FORMATS = (3, 2)
"""Stores of these are opened."""
PIECES = "pieces 2"
"""Part of it where a step cuts texts whose pieces the tokenizer cannot encode apart, which is what was done before."""
MOVED = {
    "aurora_jax.data.text.documents": "aurora_jax.data.documents",
    "aurora_jax.data.text.reshaping": "aurora_jax.data.reshaping",
    "aurora_jax.data.registry.tasks": "aurora_jax.data.tasks",
}
"""Where steps and sources are, and the name by which fingerprints know the place: stores outlive the layout
of files."""
BATCH_BYTES = 2 << 20  # of text, into the tokenizer at once
EMPTY = "empty"
"""Why documents are dropped that hold nothing but white space: they would teach to end a text that has not begun."""


class Reader(Protocol):
    """Where documents come from: a `Source`, or any data source of SeqIO."""

    def files(self, split: str) -> list[File]: ...
    def parts(self, file: File) -> list[Part]: ...
    def read(self, part: Part) -> Iterator[Document | Bad]: ...
    def described(self) -> tuple[Any, ...]: ...


class Dropped(NamedTuple):
    """A document that a step did not want, and why."""

    reason: str
    language: str


class Tokenized(NamedTuple):
    """A document as tokens.

    Attributes:
        ids: int32 [tokens], with its EOS if the recipe appends one.
        learn: bool [tokens], which of them are to be predicted; None for all.
        text_bytes: UTF-8 bytes of its text.
        language: what the document says.
    """

    ids: np.ndarray
    learn: np.ndarray | None
    text_bytes: int
    language: str


Outcome = Tokenized | Dropped | Bad


@dataclass(frozen=True)
class Preparation:
    """From documents to tokens: steps, tokenizer, and whether each document ends with EOS."""

    steps: tuple[DocumentStep, ...]
    tokenizer: Tokenizer
    append_eos: bool

    def outcomes(self, documents: Iterable[Document | Bad], batch_bytes: int = BATCH_BYTES) -> Iterator[Outcome]:
        """What becomes of documents, in order; they are tokenized in batches of about so many bytes."""
        for batch in _batches(map(self._prepared, documents), batch_bytes):
            yield from self._tokenized(batch)

    def _prepared(self, document: Document | Bad) -> Document | Bad | Dropped:
        if isinstance(document, Bad):
            return document
        prepared = document
        for step in self.steps:
            try:
                prepared = step(prepared)
            except Rejected as rejected:
                return Dropped(f"{type(step).__name__}: {rejected}", document.fields.get("language", "und"))
            except KeyError as error:
                return Bad(document.where, f"{type(step).__name__}: no field {error}", document.text[:EXCERPT])
            except Exception as error:  # one record must not end a build of a terabyte
                return Bad(
                    document.where,
                    f"{type(step).__name__}: {type(error).__name__}: {error}"[:EXCERPT],
                    document.text[:EXCERPT],
                )
        if not prepared.text.strip():
            return Dropped(EMPTY, document.fields.get("language", "und"))
        return prepared

    def _tokenized(self, batch: Sequence[Document | Bad | Dropped]) -> Iterator[Outcome]:
        documents = [document for document in batch if isinstance(document, Document)]
        try:
            encoded = iter(self._encoded(documents))
        except Exception as error:  # of whatever kind the library has
            if len(batch) > 1:
                for one in batch:
                    yield from self._tokenized([one])
                return
            yield Bad(
                documents[0].where,
                f"the tokenizer failed: {type(error).__name__}: {error}"[:EXCERPT],
                documents[0].text[:EXCERPT],
            )
            return
        for document in batch:
            yield self._joined(document, encoded) if isinstance(document, Document) else document

    def _encoded(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The ids of every piece of text, as the pieces stand."""
        texts = [[piece for piece in document.pieces if not piece.special] for document in documents]
        apart = [self.tokenizer.cuts_freely or len(pieces) == 1 for pieces in texts]
        batch = [piece.text for pieces, each in zip(texts, apart, strict=True) if each for piece in pieces]
        encoded = iter(self.tokenizer.encode_batch(batch))
        ids: list[np.ndarray] = []
        for pieces, each in zip(texts, apart, strict=True):
            ids += [next(encoded) for _ in pieces] if each else self._encoded_in_order(pieces)
        return ids

    def _encoded_in_order(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        order = sorted(range(len(pieces)), key=lambda number: pieces[number].order)
        encoded = self.tokenizer.encode_pieces([pieces[number].text for number in order])
        return [ids for _, ids in sorted(zip(order, encoded, strict=True), key=lambda pair: pair[0])]

    def _joined(self, document: Document, encoded: Iterator[np.ndarray]) -> Outcome:
        ids: list[np.ndarray] = []
        learn: list[bool] = []
        for piece in document.pieces:
            ids.append(np.array([self.tokenizer.special_id(piece.text)], np.int32) if piece.special else next(encoded))
            learn.append(piece.learn)
        language = document.fields.get("language", "und")
        if not sum(map(len, ids)):  # a tokenizer may leave out characters
            return Dropped(EMPTY, language)
        if self.append_eos:
            ids.append(np.array([self.tokenizer.eos_id], np.int32))
            learn.append(True)
        mask = None if all(learn) else np.repeat(learn, [len(part) for part in ids])
        return Tokenized(np.concatenate(ids), mask, len(document.text.encode()), language)


@dataclass(frozen=True)
class Recipe:
    """A task's split: source, steps, tokenizer.

    Attributes:
        task: name of the SeqIO task.
        split: its split.
        reader: the source.
        steps: steps on documents.
        tokenizer: the vocabulary's.
        append_eos: whether each document ends with EOS.
    """

    task: str
    split: str
    reader: Reader
    steps: tuple[DocumentStep, ...]
    tokenizer: Tokenizer
    append_eos: bool

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of steps, tokenizer, reading and format: what a run must agree on with the
        stores that it reads.

        The place of the files does not count, so that a corpus may move; their contents are digested by the
        build (`StoreInfo.sources`).

        Raises:
            InputError: the source text of a preprocessor cannot be read.
        """
        return self.fingerprints[0]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """`fingerprint`, and what it was in earlier formats whose stores can still be read."""
        what = [self.split, self.tokenizer.sha256, self.append_eos, self.reader.described(), *map(describe, self.steps)]
        if not self.tokenizer.cuts_freely and any(getattr(step, "cuts", True) for step in self.steps):
            what.append(PIECES)
        return tuple(hashlib.sha256(repr([format, *what]).encode()).hexdigest() for format in READABLE_FORMATS)

    def outcomes(self, part: Part, digest: "hashlib._Hash") -> Iterator[Outcome]:
        """What becomes of each record of a part, in order; `digest` is fed with the records as they are read."""
        return Preparation(self.steps, self.tokenizer, self.append_eos).outcomes(self.read(part, digest))

    def read(self, part: Part, digest: "hashlib._Hash") -> Iterator[Document | Bad]:
        """The records of a part before any step; `digest` is fed with them."""
        return _digested(self.reader.read(part), digest)


def _digested(documents: Iterable[Document | Bad], digest: "hashlib._Hash") -> Iterator[Document | Bad]:
    for document in documents:
        record = document if isinstance(document, Bad) else (document.text, sorted(document.fields.items()))
        digest.update(repr(record[1:] if isinstance(record, Bad) else record).encode(errors="surrogatepass"))
        yield document


def _batches(
    documents: Iterable[Document | Bad | Dropped], batch_bytes: int
) -> Iterator[list[Document | Bad | Dropped]]:
    batch: list[Document | Bad | Dropped] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) if isinstance(document, Document) else 0
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def describe(step: Callable[..., Any]) -> tuple[Any, ...]:
    """Name, version and fields of a document step; name, code and bound arguments of any other function."""
    if isinstance(step, DocumentStep):
        return (*class_name(step), type(step).version, repr(step))
    if isinstance(step, partial):
        return (*describe(step.func), step.args, sorted(step.keywords.items()))
    function = inspect.unwrap(step)
    try:
        return (function.__module__, function.__qualname__, inspect.getsource(function))
    except (OSError, TypeError, AttributeError) as error:
        raise InputError(
            f"preprocessor {step!r}: its source text cannot be read, so changes would pass unnoticed; make it "
            "a function in a file"
        ) from error


def class_name(thing: object) -> tuple[str, str]:
    """Module and name of an object's class, as fingerprints have them."""
    module = type(thing).__module__
    return MOVED.get(module, module), type(thing).__qualname__
