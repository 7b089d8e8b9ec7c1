"""Bits per byte against a direct computation from full logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stores import write_store

from aurora_jax.data.store import TokenStore
from aurora_jax.evaluate.bits_per_byte import Evaluator
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters, merge, structure_of

CONFIG = ModelConfig(vocabulary_size=31, max_positions=16, width=16, layers=2, heads=2, mlp_width=24, initializer_range=0.5)
FP32 = ComputeConfig("float32", "float32")
L = 16


def make_store(directory, documents: list[np.ndarray], text_bytes: int) -> TokenStore:
    return write_store(directory, documents, vocab_size=31, split="validation", text_bytes=text_bytes)


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # Token 0 stands inside documents too: only the last of each is its end.
    return [np.append(rng.integers(31, size=length), 0) for length in (5, 30, 1, 22)]


def direct(structure, parameters, documents) -> tuple[float, int]:
    """Sum of nll over the text's tokens, window by window, in numpy."""
    stream = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents]) - 1
    nll, tokens = 0.0, 0
    for start in range(0, len(stream) - 1, L):
        window = stream[start : start + L + 1]
        decoder = merge(structure, parameters)
        logits = np.asarray(decoder.logits(decoder(jnp.asarray(window[None, :-1])))[0], np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for place, target in enumerate(window[1:]):
            if start + place + 1 not in ends:
                nll -= log_probabilities[place, target]
                tokens += 1
    return nll, tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_bits_per_byte(tmp_path, documents, batch_size):
    structure, parameters = structure_of(CONFIG, FP32), initial_parameters(CONFIG, 0)
    store = make_store(tmp_path / "store", documents, text_bytes=123)
    nll, tokens = direct(structure, parameters, documents)
    score = Evaluator(structure, FP32, {"t": store}, batch_size=batch_size, sequence_length=L)(parameters)["t"]
    assert score.tokens == tokens == 57
    assert score.loss == pytest.approx(nll / tokens, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / 123, rel=1e-5)


def test_a_quick_evaluation_reads_a_part(tmp_path, documents):
    structure, parameters = structure_of(CONFIG, FP32), initial_parameters(CONFIG, 0)
    store = make_store(tmp_path / "store", documents, text_bytes=123)
    evaluator = Evaluator(structure, FP32, {"t": store}, batch_size=1, sequence_length=L)
    quick, complete = evaluator(parameters, windows=2)["t"], evaluator(parameters)["t"]
    assert quick.tokens == 2 * L - 1  # one document ends inside
    assert quick.bits_per_byte == pytest.approx(quick.loss / math.log(2) * 58 / 123, rel=1e-5)
    assert complete.tokens > quick.tokens


def test_a_better_model_needs_fewer_bits(tmp_path):
    """Uniform logits cost log2(31) bits a token; a head that knows the only token costs next to none."""
    store = make_store(tmp_path / "store", [np.append(np.full(40, 7), 0)], text_bytes=40)
    structure, parameters = structure_of(CONFIG, FP32), jax.tree.map(jnp.zeros_like, initial_parameters(CONFIG, 0))
    evaluator = Evaluator(structure, FP32, {"t": store}, batch_size=4, sequence_length=L)
    assert evaluator(parameters)["t"].loss == pytest.approx(math.log(31), rel=1e-6)
    parameters["final_norm"]["bias"] = jnp.ones(16)
    parameters["token_embedding"]["embedding"] = parameters["token_embedding"]["embedding"].at[7].set(2.0)
    assert evaluator(parameters)["t"].loss < 1e-6
