"""Tokenizers without TensorFlow: what the workers of `aurora data build` run. `vocabulary.py` hands the same
ones to SeqIO.

Text is only text: a literal "<|endoftext|>" in a document is spelled out in ordinary tokens and never becomes
the special token. Special
tokens are put in by their ids (`special_id`), or parsed by `encode_with_special_tokens` out of prompts that
we wrote ourselves.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from aurora_jax.data.text.spelling import Spelling, behind_other_text
from aurora_jax.data.text.tokenizer_files import (
    BYTES_SHA256,
    gpt2_tokenizer_json,
    kind_of,
    no_tokenizer,
    read_tokenizer_files,
    tokenizer_sha256,
)
from aurora_jax.errors import InputError

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>")


class Tokenizer(ABC):
    """Text to ids and back. Two tokenizers are equal when their files have the same bytes; instances can be
    pickled and shared by threads.

    Attributes:
        path: the file it was read from, for messages.
        sha256: hexadecimal digest of the file's bytes.
        vocab_size: number of ids.
        eos_id: the id that ends a document.
        unk_id: the id of what cannot be spelled; None where everything can be.
    """

    path: Path
    sha256: str
    vocab_size: int
    eos_id: int
    unk_id: int | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts, without EOS; special tokens in them are plain text. Returns one int32 array [tokens]
        a text."""

    @property
    @abstractmethod
    def cuts_freely(self) -> bool:
        """Whether pieces of a text, each encoded for itself, decode to the text when they are put together."""

    @abstractmethod
    def has(self, i: int) -> bool:
        """Whether there is a token of this id: `vocab_size` may count gaps, and a model may have more rows."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decodes every id, also those after an EOS; bytes that are no whole character to U+FFFD.

        Raises:
            InputError: there is no token of such an id.
        """

    def decode_behind(self, context: Sequence[int], ids: Iterable[int]) -> str:
        """The text that `ids` add to that of `context`: decode(context + ids) without decode(context).

        The context ends in a whole character, as every encoded text does. Raises InputError as `decode` does.
        """
        before, whole = self.decode(context), self.decode([*context, *ids])
        return whole[_common(before, whole) :]

    @abstractmethod
    def special_id(self, name: str) -> int:
        """The id of a special token such as "<fim_prefix>". Raises InputError if there is none of that name."""

    @abstractmethod
    def special_name(self, i: int) -> str | None:
        """The name of the special token with this id; None for ordinary tokens."""

    @abstractmethod
    def token_bytes(self, i: int) -> bytes:
        """The bytes that a token stands for behind others, which need not be whole characters. Raises
        InputError as `decode` does."""

    def encode(self, text: str) -> list[int]:
        """Encodes one text, without EOS."""
        return self.encode_batch([text])[0].tolist()

    def encode_pieces(self, pieces: Sequence[str], begins: bool = True) -> list[np.ndarray]:
        """Encodes a text that was cut into pieces, without EOS; special tokens in them are plain text.

        The pieces' ids, in this order, decode to what the ids of the whole text decode to: the text itself,
        or what tokenizers that normalise (NFKC, runs of spaces) make of it. Cuts are counted in what the text
        before them is normalised to; one inside of a token that cannot be spelled in two (an unknown one)
        moves to its beginning. Tokenizers that put a space before a text ("▁The") put it before the first
        piece alone.

        Args:
            pieces: the text, in its order; pieces may be empty.
            begins: whether the first piece begins the text; False if all of them go on behind text that is not here.

        Returns:
            One int32 array [tokens] a piece.

        Raises:
            InputError: this tokenizer cannot put the text together again.
        """
        if self.cuts_freely:
            return self.encode_batch(pieces)
        if not begins:
            return self._encode_behind(pieces)
        if sum(map(bool, pieces)) < 2:
            return self.encode_batch(pieces) if any(pieces) else [np.zeros(0, np.int32) for _ in pieces]
        ids, raw, lead, spelled = self._normalised("".join(pieces))
        places = [lead]
        for number in range(1, len(pieces)):
            _, before, its_lead, _ = self._normalised("".join(pieces[:number]))
            places.append(min(max(lead + len(before) - its_lead, places[-1]), len(raw)))
        parts = [raw[start:end] for start, end in zip(places, [*places[1:], len(raw)], strict=True)]
        first = next((number for number, part in enumerate(parts) if part), 0)
        parts[first] = raw[:lead] + parts[first]
        encoded = self._encode_behind(parts)
        if self.decode(np.concatenate(encoded)) == self.decode(ids):
            return encoded
        # A cut fell into what cannot be spelled in two, such as an unknown token: the whole text's tokens are divided.
        ends = np.cumsum([0, *map(len, spelled)])
        whole = [number for number, end in enumerate(ends) if _is_whole(raw.encode(), end)]
        offsets = [len(raw[:place].encode()) for place in places[1:]]
        return np.split(
            np.asarray(ids, np.int32), [max(number for number in whole if ends[number] <= offset) for offset in offsets]
        )

    @abstractmethod
    def _encode_behind(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts as what goes on behind other text: nothing is put before them, nothing at their ends
        dropped."""

    @abstractmethod
    def _normalised(self, text: str) -> tuple[Sequence[int], str, int, list[bytes]]:
        """A text's ids, and what they spell: the text as it is normalised, with unknown tokens as they were written.

        Returns:
            ids, the text, the number of characters at its beginning that decoding drops, and the bytes of each id.
        """

    def _own(self, ids: Iterable[int]) -> list[int]:
        """The ids, as ints. Raises InputError for one that there is no token of."""
        own = [int(i) for i in ids]
        lacking = next((i for i in own if not self.has(i)), None)
        if lacking is not None:
            raise InputError(
                f"{self.path}: the tokenizer has no token {lacking}, only {self.vocab_size}; is it another "
                "model's tokenizer?"
            )
        return own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __str__(self) -> str:
        return f"{type(self).__name__}(path={self.path}, size={self.vocab_size}, sha256={self.sha256[:12]})"

    def _no_special_token(self, name: str) -> InputError:
        return InputError(
            f"{self.path}: the tokenizer has no special token {name!r}; use StarCoder's tokenizer, or leave "
            "out what needs it"
        )


def _common(a: str, b: str) -> int:
    """Characters at the beginning in which two texts agree."""
    return next(
        (place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b))
    )


def _is_whole(text: bytes, end: int) -> bool:
    """Whether so many bytes of UTF-8 are whole characters."""
    return end >= len(text) or text[end] & 0xC0 != 0x80


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library (StarCoder's, BLOOM's), encoding on all cores.

    Raises:
        InputError: the file is missing, is not a tokenizer, or has no token named `<|endoftext|>` or `</s>`.
    """

    def __init__(self, path: str | Path):
        """Takes the path of a `tokenizer.json`, or of a folder that holds one."""
        path = Path(path)
        self.path = path / "tokenizer.json" if path.is_dir() else path
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.path}: the tokenizer cannot be read ({error.strerror}); give a tokenizer.json or its folder"
            ) from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._load(content.decode("utf-8", errors="replace"))

    def _load(self, content: str) -> None:
        try:
            self._plain = tokenizers.Tokenizer.from_str(content)
            self._special = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{self.path}: not a tokenizer.json of the `tokenizers` library: {error}") from error
        for tokenizer in (self._plain, self._special):
            # A tokenizer.json may carry the truncation and padding of whoever saved it.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True  # the library's name for: special tokens in a text are encoded as text
        ids = [i for i in map(self._plain.token_to_id, END_OF_TEXT_NAMES) if i is not None]
        if not ids:
            raise InputError(
                f"{self.path}: no end-of-text token; one of {', '.join(END_OF_TEXT_NAMES)} must be in the vocabulary"
            )
        self.eos_id = ids[0]
        definition = json.loads(content)
        self._spelling = Spelling(self._plain, byte_fallback=definition["model"].get("byte_fallback", False))
        unknown = definition["model"].get("unk_token")
        self.unk_id = self._plain.token_to_id(unknown) if isinstance(unknown, str) else None
        self._ids = frozenset(self._plain.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self._ids) + 1
        self._special_ids = {
            token.content: i for i, token in self._plain.get_added_tokens_decoder().items() if token.special
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer._unpickled, (self.path, self.sha256, self._special.to_str())

    @staticmethod
    @lru_cache(maxsize=4)
    def _unpickled(path: Path, sha256: str, content: str) -> "HuggingFaceTokenizer":
        # Parsed once a process: every stage of a pipeline brings its own copy, and StarCoder's takes half a second.
        tokenizer = HuggingFaceTokenizer.__new__(HuggingFaceTokenizer)
        tokenizer.path, tokenizer.sha256 = path, sha256
        tokenizer._load(content)
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Encodes a trusted text in which names such as "<fim_prefix>" stand for the special tokens."""
        return self._special.encode(text, add_special_tokens=False).ids

    @property
    def cuts_freely(self) -> bool:
        return self._spelling.cuts_freely

    def has(self, i: int) -> bool:
        return i in self._ids

    def decode(self, ids: Iterable[int]) -> str:
        ids = self._own(ids)
        if not self._spelling.known:
            return self._plain.decode(ids, skip_special_tokens=False)
        text = b"".join(map(self._spelling.token_bytes, ids)).decode(errors="replace")
        return text[self._dropped(ids, text) :]

    def decode_behind(self, context: Sequence[int], ids: Iterable[int]) -> str:
        if not context or not self._spelling.known:
            return super().decode_behind(context, ids)
        return b"".join(map(self._spelling.token_bytes, self._own(ids))).decode(errors="replace")

    def _dropped(self, ids: Sequence[int], text: str) -> int:
        """Characters at the beginning of a text that decoding drops: of the lead, as many as the text has."""
        if not ids or self._spelling.is_added(ids[0]):
            return 0
        return _common(text, self._spelling.lead)

    @cached_property
    def _behind(self) -> tokenizers.Tokenizer:
        return behind_other_text(self._plain)

    def _encode_behind(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._behind.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _normalised(self, text: str) -> tuple[Sequence[int], str, int, list[bytes]]:
        if not self._spelling.known:
            raise InputError(
                f"{self.path}: its decoder does not spell tokens one by one, so that no text can be cut into pieces"
            )
        encoding = self._plain.encode(text, add_special_tokens=False)
        spelled = [
            text[start:end].encode() if i == self.unk_id else self._spelling.token_bytes(i)
            for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
        raw = b"".join(spelled).decode(errors="replace")
        return encoding.ids, raw, self._dropped(encoding.ids, raw), spelled

    def special_id(self, name: str) -> int:
        if name not in self._special_ids:
            raise self._no_special_token(name)
        return self._special_ids[name]

    @property
    def special_names(self) -> tuple[str, ...]:
        """Of all special tokens."""
        return tuple(self._special_ids)

    def special_name(self, i: int) -> str | None:
        return next((name for name, special in self._special_ids.items() if special == i), None)

    def token_bytes(self, i: int) -> bytes:
        (i,) = self._own([i])
        return self._spelling.token_bytes(i) if self._spelling.known else self.decode([i]).encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. Most normalise text (NFKC, runs of spaces): decoding gives the normalised
    text back, not the original.

    Raises:
        InputError: the file is missing, is not a model, or has no `</s>`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path}: no such SentencePiece model")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._load(content)

    def _load(self, content: bytes) -> None:
        self._content = content
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise InputError(f"{self.path}: not a SentencePiece model: {error}") from error
        self.eos_id, self.unk_id = self._processor.eos_id(), self._processor.unk_id()
        self.vocab_size = self._processor.get_piece_size()
        if self.eos_id < 0:
            raise InputError(f"{self.path}: the SentencePiece model has no </s>; train it with --eos_id set")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256, "content": self._content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.sha256 = state["path"], state["sha256"]
        self._load(state["content"])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._processor.encode(list(texts), out_type=int)]

    @property
    def cuts_freely(self) -> bool:
        return False  # what a model normalises cannot be asked for

    def has(self, i: int) -> bool:
        return 0 <= i < self.vocab_size

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes every id, also those after an EOS; control symbols decode to nothing. Raises InputError for
        others."""
        return self._processor.decode(self._own(ids))

    def decode_behind(self, context: Sequence[int], ids: Iterable[int]) -> str:
        # Spaces are dropped until there is text.
        return self._behind.decode(self._own(ids)) if self.decode(context) else self.decode([*context, *ids])

    @cached_property
    def _behind(self) -> sentencepiece.SentencePieceProcessor:
        behind = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        behind.override_normalizer_spec(add_dummy_prefix=False, remove_extra_whitespaces=False)
        return behind

    def _encode_behind(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._behind.encode(list(texts), out_type=int)]

    def _normalised(self, text: str) -> tuple[Sequence[int], str, int, list[bytes]]:
        ids, pieces = self._processor.encode(text), self._processor.encode(text, out_type=str)
        spelled = [
            piece.replace("\u2581", " ").encode() if i == self.unk_id else self.token_bytes(i)
            for i, piece in zip(ids, pieces, strict=True)
        ]
        raw = b"".join(spelled).decode(errors="replace")
        return ids, raw, len(self._behind.decode(ids)) - len(self._processor.decode(ids)), spelled

    def special_id(self, name: str) -> int:
        i = self._processor.piece_to_id(name)
        if i == self.unk_id or not self._processor.is_control(i):
            raise self._no_special_token(name)
        return i

    def special_name(self, i: int) -> str | None:
        return self._processor.id_to_piece(i) if self._processor.is_control(i) or i == self.unk_id else None

    def token_bytes(self, i: int) -> bytes:
        (i,) = self._own([i])
        piece = self._processor.id_to_piece(i)
        return bytes([int(piece[1:-1], 16)]) if self._processor.is_byte(i) else piece.replace("\u2581", " ").encode()


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, as ByT5 numbers them (Xue et al. 2022, arXiv 2105.13626): 0 padding, 1 `</s>`, 2 unknown,
    then the 256 bytes."""

    FIRST = 3
    path = Path("bytes")
    sha256 = BYTES_SHA256
    vocab_size = 256 + FIRST
    eos_id = 1
    unk_id = 2

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + self.FIRST for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes every byte; special ids decode to nothing. Raises InputError for an id it lacks."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def decode_behind(self, context: Sequence[int], ids: Iterable[int]) -> str:
        return self.decode(ids)

    @property
    def cuts_freely(self) -> bool:
        return True

    def has(self, i: int) -> bool:
        return 0 <= i < self.vocab_size

    def _encode_behind(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.encode_batch(texts)

    def _normalised(self, text: str) -> tuple[Sequence[int], str, int, list[bytes]]:
        return self.encode(text), text, 0, [self.token_bytes(i) for i in self.encode(text)]

    def special_id(self, name: str) -> int:
        if name != "</s>":
            raise self._no_special_token(name)
        return self.eos_id

    def special_name(self, i: int) -> str | None:
        return {0: "<pad>", self.eos_id: "</s>", self.unk_id: "<unk>"}.get(i)

    def token_bytes(self, i: int) -> bytes:
        (i,) = self._own([i])
        return bytes([i - self.FIRST]) if i >= self.FIRST else b""


def tokenizer_from(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a `tokenizer.json`, a SentencePiece `.model`, a folder or checkpoint (see
    `tokenizer_files.py`), or the word "bytes".

    Raises:
        InputError: the file is missing, malformed, or has no end-of-text token.
    """
    path = Path(path)
    if path.is_dir() or path == ByteTokenizer.path:
        return tokenizer_of(read_tokenizer_files(path), path)
    return SentencePieceTokenizer(path) if path.suffix == ".model" else HuggingFaceTokenizer(path)


def tokenizer_of(files: Mapping[str, bytes], where: str | Path) -> Tokenizer:
    """The tokenizer that some files are: those of a folder, or those that a checkpoint carries.

    Args:
        files: contents by name.
        where: the folder or checkpoint, for messages.

    Raises:
        InputError: none of them is a tokenizer, or the one that is is malformed or has no end-of-text token.
    """
    kind, sha256 = kind_of(files, where), tokenizer_sha256(files, where)
    if kind is None or sha256 is None:
        raise no_tokenizer(where)
    if kind == "bytes":
        return ByteTokenizer()
    path = Path(where, kind)
    if kind == "tokenizer.model":
        sentencepiece_tokenizer = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
        sentencepiece_tokenizer.__setstate__({"path": path, "sha256": sha256, "content": files[kind]})
        return sentencepiece_tokenizer
    content = (
        gpt2_tokenizer_json(files, where) if kind == "vocab.json" else files[kind].decode("utf-8", errors="replace")
    )
    return HuggingFaceTokenizer._unpickled(path, sha256, content)
