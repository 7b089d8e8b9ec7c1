"""Bits per byte of held-out text, language by language: a number that can be compared across tokenizers and scripts.

B batch, L sequence.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_jax.data.loader import Batch, evaluation_batches
from aurora_jax.data.store import TokenStore
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.decoder import merge
from aurora_jax.model.loss import cross_entropy


@dataclass(frozen=True)
class Score:
    """How well one task's held-out text is predicted."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    bits_per_byte: float
    """Bits to encode a byte of text: loss * tokens / ln 2 / bytes. The bytes of a part of a store are estimated from the whole's ratio."""
    tokens: int


def make_sums(structure: nnx.GraphDef, compute: ComputeConfig) -> Callable[[dict, Any], tuple[jax.Array, jax.Array]]:
    """The program of an evaluation: `sums(parameters, batch) -> (nll in nats, tokens)`, fp32 scalars; the batch is traced."""

    def sums(parameters: dict, batch: Any) -> tuple[jax.Array, jax.Array]:
        decoder = merge(structure, parameters)
        loss, _ = cross_entropy(
            decoder(batch.tokens_BL),
            decoder.token_embedding.embedding[...],
            batch.targets_BL,
            batch.loss_weights_BL,
            jnp.ones((), jnp.float32),
            dtype=jnp.dtype(compute.compute_dtype),
            vocabulary_size=decoder.config.vocabulary_size,
        )
        return loss, batch.loss_weights_BL.sum()

    return sums


class Evaluator:
    """Evaluates parameters on token stores; compiled once.

    Args:
        structure: the decoder without parameters (`decoder.structure_of`).
        stores: held-out stores by task name.
        place: puts a batch on the mesh.
    """

    def __init__(
        self,
        structure: nnx.GraphDef,
        compute: ComputeConfig,
        stores: Mapping[str, TokenStore],
        *,
        batch_size: int,
        sequence_length: int,
        place: Callable[[Batch], Batch] = jax.device_put,
    ):
        self._stores = stores
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._place = place

        self._sums = jax.jit(make_sums(structure, compute))

    def __call__(self, parameters: dict, windows: int | None = None) -> dict[str, Score]:
        """Scores of every task: over all held-out text, or over about its first `windows` sequences."""
        return {task: self._score(parameters, store, windows) for task, store in self._stores.items()}

    def _score(self, parameters: dict, store: TokenStore, windows: int | None) -> Score:
        batches = None if windows is None else max(1, windows // self._batch_size)
        sums = [
            self._sums(parameters, self._place(batch))
            for batch in itertools.islice(evaluation_batches(store, self._batch_size, self._sequence_length), batches)
        ]
        nll, tokens = np.asarray(jax.device_get(sums), dtype=np.float64).sum(axis=0)
        text_tokens = store.info.tokens - store.info.documents
        text_bytes = store.info.text_bytes * tokens / text_tokens if windows is not None else store.info.text_bytes
        return Score(loss=float(nll / tokens), bits_per_byte=float(nll / math.log(2) / text_bytes), tokens=int(tokens))
