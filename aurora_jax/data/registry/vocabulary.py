"""Our tokenizers as SeqIO vocabularies that keep token 0.

StarCoder's `<|endoftext|>` is id 0, which SeqIO takes for padding. Text never becomes a special token here
(see `tokenizer.py`), and `decode` keeps SeqIO's contract (up to and including the first EOS, so at most that
one id 0); `decode_all` decodes every id.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from aurora_jax.data.text.tokenizer import Tokenizer, tokenizer_from


class Vocabulary(seqio.Vocabulary):
    """A tokenizer as a SeqIO vocabulary. Equal where their tokenizers' files have the same bytes."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the tokenizer's file."""
        return self.tokenizer.sha256

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> int | None:
        """None for byte-level vocabularies, which can spell every text."""
        return self.tokenizer.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts on all cores, without EOS. Returns one int32 array [tokens] a text."""
        return self.tokenizer.encode_batch(texts)

    def decode_all(self, ids: Iterable[int]) -> str:
        """Decodes every id, also those after an EOS."""
        return self.tokenizer.decode(ids)

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(content: Any) -> np.ndarray:  # bytes in a graph, a scalar array of bytes outside
            return self.tokenizer.encode_batch([np.asarray(content, dtype=object).item().decode("utf-8")])[0]

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
        return isinstance(other, Vocabulary) and self.tokenizer == other.tokenizer

    def __hash__(self) -> int:
        return hash(self.tokenizer)

    def __str__(self) -> str:
        return str(self.tokenizer)


def vocabulary_from(path: str | Path) -> Vocabulary:
    """The vocabulary at `path`: see `tokenizer_from`. Raises InputError if the tokenizer is missing or malformed."""
    return Vocabulary(tokenizer_from(path))
