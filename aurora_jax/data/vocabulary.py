"""Vocabularies for SeqIO that keep token 0.

StarCoder's `<|endoftext|>` is id 0, which SeqIO takes for padding. Two rules make that safe here:

* Text is only text. `encode` and `encode_batch` spell a literal "<|endoftext|>" out in ordinary tokens; it never becomes the special token.
  Only
  `encode_with_special_tokens` parses it, for prompts that we wrote ourselves.
* `decode` keeps SeqIO's contract (up to and including the first EOS, so at most that one id 0); `decode_all` decodes every id that it is
  given.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tokenizers

from aurora_jax.errors import InputError

END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>")


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A `tokenizer.json` of the `tokenizers` library as a SeqIO vocabulary.

    Two vocabularies are equal when their `tokenizer.json` has the same bytes, wherever it lies. Instances can be pickled and used in many
    threads.

    Attributes:
        path: the `tokenizer.json`.
        sha256: hexadecimal digest of its bytes.

    Raises:
        InputError: the file is missing, is not a tokenizer, or has no token named `<|endoftext|>` or `</s>`.
    """

    def __init__(self, path: str | Path):
        """Takes the path of a `tokenizer.json`, or of a folder that holds one."""
        super().__init__()
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
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
            self._special_tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{self.path}: not a tokenizer.json of the `tokenizers` library: {error}") from error
        for tokenizer in (self._tokenizer, self._special_tokenizer):
            # A tokenizer.json may carry the truncation and padding of whoever saved it.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the library's name for: special tokens in a text are encoded as text
        ids = [self._tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES]
        if all(i is None for i in ids):
            raise InputError(f"{self.path}: no end-of-text token; one of {', '.join(END_OF_TEXT_NAMES)} must be in the vocabulary")
        self._eos_id = next(i for i in ids if i is not None)
        unknown = json.loads(content)["model"].get("unk_token")
        self._unk_id = self._tokenizer.token_to_id(unknown) if isinstance(unknown, str) else None
        self._size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256, "content": self._special_tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.sha256 = state["path"], state["sha256"]
        self._load(state["content"])

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int:
        return self._eos_id

    @property
    def unk_id(self) -> int | None:
        """None for byte-level vocabularies, which can spell every text."""
        return self._unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self._size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts on all cores, without EOS; special tokens in them are plain text. Returns one int32 array [tokens] a text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Encodes a trusted text in which names such as "<fim_prefix>" stand for the special tokens."""
        return self._special_tokenizer.encode(text, add_special_tokens=False).ids

    def decode_all(self, ids: Iterable[int]) -> str:
        """Decodes every id, also those after an EOS, with special tokens spelled out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Iterable[int]) -> str:
        return self.decode_all(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(content: Any) -> np.ndarray:  # bytes in a graph, a scalar array of bytes outside
            text = np.asarray(content, dtype=object).item().decode("utf-8")
            return np.asarray(self._encode(text), dtype=np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Decodes int32 [..., tokens] to strings [...], each up to and including its first EOS.

        SeqIO's own method writes its padding id over what follows the EOS; here that id would be decoded as more EOS.
        """

        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1]).tolist()]
            return np.array(texts, dtype=object).reshape(rows.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        texts.set_shape(ids.shape[:-1])
        return texts

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return self.decode_tf(ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceVocabulary) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __str__(self) -> str:
        return f"HuggingFaceVocabulary(path={self.path}, size={self._size}, sha256={self.sha256[:12]})"


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """SeqIO's SentencePiece vocabulary with the helpers of `HuggingFaceVocabulary`.

    SentencePiece never reads control symbols such as "</s>" out of a text. Most models normalise text (NFKC, runs of spaces), so that
    decoding gives the normalised text back, not the original.
    """

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal digest of the model file."""
        return hashlib.sha256(self.sp_model).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts, without EOS. Returns one int32 array [tokens] for each text."""
        return [np.asarray(ids, dtype=np.int32) for ids in self.tokenizer.encode(list(texts), out_type=int)]

    def decode_all(self, ids: Iterable[int]) -> str:
        """Decodes every id, also those after an EOS; control symbols decode to nothing."""
        return self.tokenizer.decode([int(i) for i in ids])


Vocabulary = HuggingFaceVocabulary | SentencePieceVocabulary


def vocabulary_from(path: str | Path) -> Vocabulary:
    """The vocabulary at `path`: a `tokenizer.json`, a folder that holds one, or a SentencePiece `.model`.

    Raises:
        InputError: the file is missing, malformed, or has no end-of-text token.
    """
    path = Path(path)
    if path.suffix != ".model":
        return HuggingFaceVocabulary(path)
    if not path.is_file():
        raise InputError(f"{path}: no such SentencePiece model")
    vocabulary = SentencePieceVocabulary(str(path))
    try:
        eos_id = vocabulary.eos_id
    except Exception as error:  # protobuf's DecodeError or SentencePiece's RuntimeError
        raise InputError(f"{path}: not a SentencePiece model: {error}") from error
    if eos_id is None or eos_id < 0:
        raise InputError(f"{path}: the SentencePiece model has no </s>; train it with --eos_id set")
    return vocabulary
