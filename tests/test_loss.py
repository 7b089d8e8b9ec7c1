"""The chunked cross-entropy against optax and plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aurora_jax.model import loss as loss_module
from aurora_jax.model.loss import cross_entropy


def inputs(B: int, L: int, D: int, V: int):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
    embedding = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(V, size=(B, L)), jnp.int32)
    weights = jnp.asarray(rng.random((B, L)) < 0.8, jnp.float32)
    return hidden, embedding, targets, weights


def plain(hidden, embedding, targets, weights, total, z_loss):
    logits = hidden @ embedding.T
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return ((nll + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2) * weights).sum() / total


@pytest.mark.parametrize("chunk", [7, 16, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradients(monkeypatch, chunk, z_loss):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    hidden, embedding, targets, weights = inputs(3, 11, 8, 37)

    def ours(hidden, embedding):
        return (
            2 * cross_entropy(hidden, embedding, targets, weights, jnp.float32(17), dtype=jnp.float32, z_loss=z_loss)[0]
        )

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, embedding)
    expected_value, expected = jax.value_and_grad(lambda h, e: 2 * plain(h, e, targets, weights, 17.0, z_loss), (0, 1))(
        hidden, embedding
    )
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    assert float(ours(hidden, embedding)) == pytest.approx(
        float(value), rel=1e-6
    )  # without the gradient's forward pass
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


def test_nll_of_every_token_without_gradient():
    hidden, embedding, targets, weights = inputs(2, 9, 8, 37)
    _, nll_BL = cross_entropy(hidden, embedding, targets, weights, jnp.float32(1), dtype=jnp.float32)
    np.testing.assert_allclose(
        nll_BL, optax.softmax_cross_entropy_with_integer_labels(hidden @ embedding.T, targets), rtol=1e-5, atol=1e-5
    )
    gradient = jax.grad(
        lambda h: cross_entropy(h, embedding, targets, weights, jnp.float32(1), dtype=jnp.float32)[1].sum()
    )(hidden)
    assert not np.any(gradient)


def test_token_0_counts_like_any_other():
    hidden, embedding, targets, weights = inputs(1, 5, 8, 37)
    zeros = jnp.zeros_like(targets)
    value, nll_BL = cross_entropy(hidden, embedding, zeros, jnp.ones_like(weights), jnp.float32(5), dtype=jnp.float32)
    assert float(value) == pytest.approx(float(nll_BL.mean()), rel=1e-6)
    assert np.all(nll_BL > 0)


def test_parts_add_up_to_the_whole():
    hidden, embedding, targets, weights = inputs(4, 13, 8, 37)
    total = weights.sum()
    whole, _ = cross_entropy(hidden, embedding, targets, weights, total, dtype=jnp.float32)
    parts = [
        cross_entropy(hidden[i : i + 1], embedding, targets[i : i + 1], weights[i : i + 1], total, dtype=jnp.float32)[0]
        for i in range(4)
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_bf16_gradients_are_kept_in_the_inputs_dtypes():
    hidden, embedding, targets, weights = inputs(2, 9, 8, 37)

    def ours(hidden, embedding):
        return cross_entropy(hidden, embedding, targets, weights, weights.sum(), dtype=jnp.bfloat16)[0]

    d_hidden, d_embedding = jax.grad(ours, (0, 1))(hidden.astype(jnp.bfloat16), embedding)
    assert (d_hidden.dtype, d_embedding.dtype) == (jnp.bfloat16, jnp.float32)
