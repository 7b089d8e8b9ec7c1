"""One step: micro-batches equal the large batch, and bad updates are refused before they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.data.batches.loader import Batch
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters, structure_of
from aurora_jax.model.likelihood import make_loss
from aurora_jax.model.sharding import flatten
from aurora_jax.train import guard
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.state import initial_state
from aurora_jax.train.step import gradient_of, make_gradient, make_train_step

CONFIG = ModelConfig(vocabulary_size=31, max_positions=16, width=16, layers=2, heads=2, mlp_width=24).with_dropout(0.0)
FP32 = ComputeConfig("float32", "float32")
LOSS = make_loss(structure_of(CONFIG, FP32), FP32, z_loss=0.0, isolate_documents=False)


def make_batch(seed: int = 0, B: int = 8, L: int = 16) -> Batch:
    """Uneven on purpose: row b has 2 b + 1 tokens that count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(31, size=(B, L + 1)).astype(np.int32)
    weights = (np.arange(L)[None, :] < (2 * np.arange(B) + 1)[:, None]).astype(np.float32)
    positions = np.tile(np.arange(L, dtype=np.int32), (B, 1))
    return Batch(
        tokens[:, :-1], tokens[:, 1:], weights, weights.astype(np.int32), positions, (np.arange(B) % 3).astype(np.int32)
    )


def test_micro_batches_equal_the_large_batch():
    parameters = initial_parameters(CONFIG, 0)
    expected_loss, expected_nll, expected = gradient_of(LOSS, parameters, make_batch(), None, micro_batches=1)
    for micro_batches in (2, 4, 8):
        loss, nll_BL, gradients = gradient_of(LOSS, parameters, make_batch(), None, micro_batches=micro_batches)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
        np.testing.assert_allclose(nll_BL, expected_nll, rtol=1e-5, atol=1e-6)
        for path, gradient in flatten(gradients).items():
            one = flatten(expected)[path]
            np.testing.assert_allclose(gradient, one, atol=1e-6 * float(jnp.abs(one).max()), rtol=2e-5, err_msg=path)


def test_isolated_documents_change_the_loss_and_positions_are_used():
    isolating = make_loss(structure_of(CONFIG, FP32), FP32, z_loss=0.0, isolate_documents=True)
    parameters = jax.tree.map(lambda p: 5 * p, initial_parameters(CONFIG, 0))
    batch = make_batch()._replace(segment_ids_BL=np.repeat(np.array([[1] * 8 + [2] * 8], np.int32), 8, axis=0))
    total = jnp.float32(1)
    assert float(LOSS(parameters, batch, total, None)[0]) != pytest.approx(
        float(isolating(parameters, batch, total, None)[0]), rel=1e-4
    )


def jitted_step(optimizer: OptimizerConfig, stage_starts: tuple[int, ...] = ()):
    return jax.jit(
        make_train_step(
            make_gradient(LOSS, optimizer.micro_batches),
            optimizer,
            lambda step: 1e-2 / (step + 1),
            dropout=False,
            seed=0,
            tasks=3,
            stage_starts=stage_starts,
        )
    )


def test_metrics_say_what_happened():
    optimizer = OptimizerConfig()
    batch = make_batch()
    state, metrics = jitted_step(optimizer)(initial_state(initial_parameters(CONFIG, 0), optimizer), batch)
    assert (int(state.step), int(state.accepted), float(metrics["accepted"]), float(metrics["skipped"])) == (1, 1, 1, 0)
    assert float(metrics["tokens"]) == batch.loss_weights_BL.sum()
    assert float(metrics["task_nll"].sum() / metrics["task_tokens"].sum()) == pytest.approx(
        float(metrics["loss"]), rel=1e-6
    )
    np.testing.assert_array_equal(metrics["task_tokens"], [1 + 7 + 13, 3 + 9 + 15, 5 + 11])
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2)


def same(one, other) -> bool:
    return all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_a_non_finite_update_is_not_made():
    optimizer = OptimizerConfig()
    step = jitted_step(optimizer)
    state, _ = step(initial_state(initial_parameters(CONFIG, 0), optimizer), make_batch())
    poison = make_batch(1)._replace(loss_weights_BL=np.full((8, 16), np.inf, np.float32))
    after, metrics = step(state, poison)
    assert float(metrics["accepted"]) == 0
    assert float(metrics["skipped"]) == 1
    assert same(after.parameters, state.parameters)
    assert same(after.moments, state.moments)
    assert (int(after.step), int(after.accepted)) == (2, 1)
    # The next good batch is learnt from, at its own step's learning rate.
    later, metrics = step(after, make_batch(2))
    assert float(metrics["accepted"]) == 1
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2 / 3)
    assert not same(later.parameters, after.parameters)


def test_a_spike_is_not_made_once_the_average_is_known(monkeypatch):
    monkeypatch.setattr(guard, "WARMUP", 3)
    optimizer = OptimizerConfig(spike_sigmas=6.0)
    step = jitted_step(optimizer)
    state = initial_state(initial_parameters(CONFIG, 0), optimizer)
    # Thirtyfold parameters: a finite, but much larger, gradient.
    spiking = jax.tree.map(lambda p: 30 * p, state.parameters)
    _, metrics = step(state._replace(parameters=spiking), make_batch(0))
    assert float(metrics["accepted"]) == 1  # too early to tell
    for seed in range(4):
        state, metrics = step(state, make_batch(seed))
        assert float(metrics["accepted"]) == 1
    usual = float(metrics["gradient_norm"])
    after, metrics = step(state._replace(parameters=spiking), make_batch(5))
    assert float(metrics["gradient_norm"]) > 3 * usual
    assert float(metrics["accepted"]) == 0
    assert same(after.parameters, spiking)
    assert same(after.statistics, state.statistics._replace(skipped=jnp.int32(1)))


def test_statistics_are_those_of_numpy():
    """Of a long series: exponentially weighted mean and variance."""
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(3, 0.5, 300).astype(np.float32), rng.normal(7, 2, 300).astype(np.float32)
    found = guard.no_statistics()
    for loss, norm in zip(losses, norms, strict=True):
        found = guard.updated(found, jnp.float32(loss), jnp.float32(norm))
    assert int(found.updates) == 300
    weights = (1 - guard.DECAY) * guard.DECAY ** np.arange(300)[::-1]
    weights[0] /= 1 - guard.DECAY
    for values, mean, variance in ((losses, *found[1:3]), (norms, *found[3:5])):
        assert float(mean) == pytest.approx(np.average(values, weights=weights), rel=1e-5)
        expected = np.average((values - np.average(values, weights=weights)) ** 2, weights=weights)
        assert float(variance) == pytest.approx(expected, rel=1e-4)


def test_a_stage_begins_without_what_was_usual_before(monkeypatch):
    """Other text has another loss, which is no spike."""
    monkeypatch.setattr(guard, "WARMUP", 3)
    optimizer = OptimizerConfig(spike_sigmas=6.0)
    state = initial_state(initial_parameters(CONFIG, 0), optimizer)
    for starts, accepted in (((), 0), ((5,), 1)):
        step, now = jitted_step(optimizer, stage_starts=starts), state
        for seed in range(5):
            now, _ = step(now, make_batch(seed))
        now = now._replace(parameters=jax.tree.map(lambda p: 30 * p, now.parameters))
        _, metrics = step(now, make_batch(5))
        assert float(metrics["accepted"]) == accepted


def test_dropout_follows_the_step():
    config = CONFIG.with_dropout(0.5)
    loss = make_loss(structure_of(config, FP32), FP32, z_loss=0.0, isolate_documents=False)
    step = jax.jit(
        make_train_step(make_gradient(loss, 1), OptimizerConfig(), lambda step: 0.0, dropout=True, seed=0, tasks=3)
    )
    state = initial_state(initial_parameters(config, 0), OptimizerConfig())
    _, one = step(state, make_batch())
    _, again = step(state, make_batch())
    _, later = step(state._replace(step=jnp.int32(1)), make_batch())
    assert float(one["loss"]) == float(again["loss"])
    assert float(one["loss"]) != float(later["loss"])
