"""Bits per byte of held-out text, language by language: a number that can be compared across tokenizers and scripts.

What is measured is what training optimises: the same windows, the same masks. The text of a figure are the tokens that
the model is asked for, and nothing else, above and below the fraction: a store's very first token, and the first of
every isolated document, are asked of nobody, so their bytes are not counted either.

B batch, L sequence, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from aurora_jax.data.batches.loader import evaluation_batches, spread_windows, window_count
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.text.tokenizer import Tokenizer
from aurora_jax.errors import InputError
from aurora_jax.model.likelihood import Likelihood
from aurora_jax.model.mesh import place

READ_TOKENS = 1 << 22
"""Of a store, at once."""


@dataclass(frozen=True)
class Score:
    """How well one task's held-out text is predicted."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    bits_per_byte: float
    """Bits to encode a byte of the predicted text: loss * tokens / ln 2 / bytes."""
    tokens: int
    """Tokens of text that were predicted; the EOS of a document is none."""
    bytes: float
    """UTF-8 bytes of these tokens: the bytes of the store's text, shared out by the bytes that the tokenizer gives each
    token. Exact where these add up to the text, as in byte-level vocabularies; special tokens have none."""
    windows: int
    """Sequences that were read."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How figures were measured. Only figures of equal settings may be compared, or share a curve."""

    sequence_length: int
    """Tokens of a window."""
    attend_across_documents: bool
    """As in `DataConfig`."""
    tokenizer_sha256: str
    compute_dtype: str
    activation_dtype: str
    windows: int | None
    """Windows a task, evenly drawn from its held-out text; None: all of it."""
    texts: dict[str, str]
    """Task to the beginning of its records' digest (the `sources` of its store)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Evaluator:
    """Evaluates parameters on token stores, by one likelihood.

    Args:
        likelihood: of the model, on the mesh where the parameters lie, with the masks of the run that they are of.
        stores: held-out stores by task name.
        tokenizer: that of the stores, which knows how many bytes a token stands for.
        batch_size: sequences that are read at once.
        sequence_length: tokens of a window.

    Raises:
        InputError: a store was made with another tokenizer, or has no text to predict.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        stores: Mapping[str, TokenStore],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        sequence_length: int,
    ):
        for store in stores.values():
            if store.info.tokenizer_sha256 != tokenizer.sha256:
                raise InputError(
                    f"{store.directory}: held-out text made with the tokenizer {store.info.tokenizer_sha256[:12]}, "
                    f"the model reads {tokenizer.sha256[:12]} ({tokenizer.path}): build it with that one, in another "
                    "folder."
                )
        self._likelihood = likelihood
        self._stores = stores
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._across = not likelihood.isolate_documents
        self._tokenizer = tokenizer
        self._bytes_V = {task: _bytes_of_tokens(store, tokenizer) for task, store in stores.items()}

    def settings(self, windows: int | None = None) -> EvaluationSettings:
        """How `self(parameters, windows)` measures."""
        return EvaluationSettings(
            sequence_length=self._sequence_length,
            attend_across_documents=self._across,
            tokenizer_sha256=self._tokenizer.sha256,
            compute_dtype=self._likelihood.compute.compute_dtype,
            activation_dtype=self._likelihood.compute.activation_dtype,
            windows=windows,
            texts={task: store.info.sources[:16] for task, store in self._stores.items()},
        )

    def __call__(self, parameters: dict, windows: int | None = None) -> dict[str, Score]:
        """Scores of every task: over all held-out text, or over so many of its windows, evenly drawn and the same ones
        each time.

        Raises:
            InputError: these windows hold no text to predict.
        """
        return {task: self._score(parameters, task, store, windows) for task, store in self._stores.items()}

    def _score(self, parameters: dict, task: str, store: TokenStore, windows: int | None) -> Score:
        count = window_count(store, self._sequence_length)
        numbers = spread_windows(count, count if windows is None else windows)
        text_bytes, sums = 0.0, []
        for batch in evaluation_batches(
            store, self._batch_size, self._sequence_length, attend_across_documents=self._across, windows=numbers
        ):
            text_bytes += float((self._bytes_V[task][batch.targets_BL] * batch.loss_weights_BL).sum())
            found = self._likelihood(parameters, place(self._likelihood.mesh, batch))
            sums.append((found.nll, found.weight))
        nll, tokens = np.asarray(jax.device_get(sums), dtype=np.float64).reshape(-1, 2).sum(axis=0)
        if not tokens or not text_bytes:
            raise InputError(
                f"{store.directory}: no text to predict in {len(numbers)} of {count} windows of "
                f"{self._sequence_length} tokens"
                f"{'' if self._across else ' (the first token of an isolated document is not predicted)'}; "
                "give more or longer documents"
                f"{'' if windows is None else ', or more windows (evaluation.quick_windows)'}."
            )
        bits = nll / math.log(2) / text_bytes
        return Score(
            loss=float(nll / tokens),
            bits_per_byte=float(bits),
            tokens=int(tokens),
            bytes=text_bytes,
            windows=len(numbers),
        )


def _bytes_of_tokens(store: TokenStore, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes that a token of each id stands for, scaled so that the text of the store has those that the build has
    counted; fp64 [V].

    The scale is 1 for byte-level vocabularies. SentencePiece's pieces are of the normalised text, with a space before
    the first word.
    """
    counts_V = np.zeros(store.info.vocab_size, np.int64)
    for start in range(0, len(store), READ_TOKENS):
        stop = min(start + READ_TOKENS, len(store))
        tokens = store.read(start, stop)
        if store.info.eos_id is not None:
            tokens = tokens[~store.window_ends(np.array([start]), stop - start)[0]]
        counts_V += np.bincount(tokens, minlength=len(counts_V))
    bytes_V = np.zeros(len(counts_V))
    for token in np.flatnonzero(counts_V).tolist():
        if tokenizer.special_name(token) is None:
            bytes_V[token] = len(tokenizer.token_bytes(token))
    total = counts_V @ bytes_V
    return bytes_V * (store.info.text_bytes / total) if total else bytes_V
