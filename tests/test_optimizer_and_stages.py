"""AdamW against PyTorch's, learning rates against closed forms."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.decoder import initial_parameters
from aurora_jax.model.sharding import TABLE, flatten, nest
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.optimizer import adamw, clip, decays
from aurora_jax.train.stages import LearningRate, Stage, learning_rate_schedule

torch = pytest.importorskip("torch")

CONFIG = ModelConfig(vocabulary_size=11, max_positions=7, width=6, layers=2, heads=2, mlp_width=10)


def test_ten_updates_equal_pytorchs_adamw():
    config = OptimizerConfig(beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.2, clip_norm=0.7)
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(lambda p: p + 0.1, initial_parameters(CONFIG, 0))
    theirs = {path: torch.nn.Parameter(torch.tensor(np.asarray(array))) for path, array in flatten(parameters).items()}
    groups = [
        {"params": [p for path, p in theirs.items() if decays(path)], "weight_decay": 0.2},
        {"params": [p for path, p in theirs.items() if not decays(path)], "weight_decay": 0.0},
    ]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
    transform = adamw(config)
    state = transform.init(parameters)
    for scale in (0.01, 1, 3, 0.1, 1, 1, 1, 1, 1, 1):
        gradients = nest(
            {
                path: jnp.asarray(rng.normal(size=array.shape, scale=scale), jnp.float32)
                for path, array in flatten(parameters).items()
            }
        )
        norm = optax.tree.norm(gradients)
        direction, state = transform.update(clip(gradients, norm, config.clip_norm), state, parameters)
        parameters = jax.tree.map(lambda p, d: p - 1e-2 * d, parameters, direction)
        for path, gradient in flatten(gradients).items():
            theirs[path].grad = torch.tensor(np.asarray(gradient))
        assert float(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)) == pytest.approx(float(norm), rel=1e-5)
        peer.step()
    for path, array in flatten(parameters).items():
        np.testing.assert_allclose(array, theirs[path].detach().numpy(), atol=1e-6, rtol=1e-5, err_msg=path)


def test_moments_in_bf16_follow_those_in_fp32():
    """Each step rounds the moments by 2^-9 at most; over their memory of 20 steps that adds up to a few per
    cent of an update."""
    rng = np.random.default_rng(0)
    parameters = initial_parameters(CONFIG, 0)
    exact, rounded = (
        adamw(OptimizerConfig(moments_dtype=dtype, weight_decay=0.0)) for dtype in ("float32", "bfloat16")
    )
    state, state_rounded = exact.init(parameters), rounded.init(parameters)
    assert {leaf.dtype for leaf in jax.tree.leaves(state_rounded[0].mu)} == {jnp.dtype("bfloat16")}
    for _ in range(60):
        gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), parameters)
        direction, state = exact.update(gradients, state, parameters)
        found, state_rounded = rounded.update(gradients, state_rounded, parameters)
    for path, array in flatten(direction).items():
        error = np.linalg.norm(flatten(found)[path] - array) / np.linalg.norm(array)
        assert 0 < error < 0.03, (path, error)
        assert flatten(found)[path].dtype == jnp.float32


def test_moments_that_would_stand_still_in_bf16_are_refused():
    with pytest.raises(InputError, match="stand still"):
        OptimizerConfig(beta2=0.999, moments_dtype="bfloat16")


def test_biases_and_layer_norms_do_not_decay():
    assert {path for path in TABLE if decays(path)} == {
        "token_embedding.embedding",
        "position_embedding.embedding",
        "layers.attention.query.kernel",
        "layers.attention.key_value.kernel",
        "layers.attention.output.kernel",
        "layers.mlp.up.kernel",
        "layers.mlp.down.kernel",
    }


def rates(*stages: Stage) -> list[float]:
    schedule = jax.jit(learning_rate_schedule(stages))
    return [float(schedule(step)) for step in range(sum(stage.steps for stage in stages))]


def test_warm_up_and_cosine():
    found = rates(Stage("one", "m", 20, LearningRate(peak=1.0, warmup_steps=5, final=0.1)))
    warm_up = [(step + 1) / 5 for step in range(5)]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    np.testing.assert_allclose(found, warm_up + cosine, rtol=1e-5)


def test_warm_up_stable_decay():
    found = rates(
        Stage(
            "one",
            "m",
            20,
            LearningRate(peak=2.0, warmup_steps=4, shape="warmup_stable_decay", final=0.5, decay_steps=6),
        )
    )
    expected = [0.5, 1.0, 1.5, 2.0] + [2.0] * 10 + [2.0 - 1.5 * step / 6 for step in range(6)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_stage_warms_up_again():
    one = Stage("one", "m", 10, LearningRate(peak=1.0, warmup_steps=2))
    two = Stage("two", "m", 10, LearningRate(peak=0.5, warmup_steps=5))
    found = rates(one, two)
    np.testing.assert_allclose(found[10:15], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-5)
    np.testing.assert_allclose(found[:10], rates(one), rtol=1e-6)


def test_a_stage_without_a_schedule_rides_on_the_one_before():
    """As Aurora-M's second stage went on along the tail of the first one's cosine."""
    long = LearningRate(peak=1.0, warmup_steps=3, final=0.1, decay_steps=27)
    np.testing.assert_allclose(
        rates(Stage("one", "m", 20, long), Stage("two", "m", 10)), rates(Stage("all", "m", 30, long)), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((Stage("one", "m", 10),), "'one'"),
        ((Stage("one", "m", 5, LearningRate(peak=1.0, warmup_steps=5)),), "5 steps"),
        (
            (Stage("one", "m", 9, LearningRate(peak=1.0, warmup_steps=5, shape="warmup_stable_decay", decay_steps=5)),),
            "9 steps",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(stages, said):
    with pytest.raises(InputError, match=said):
        learning_rate_schedule(stages)


COSINE = LearningRate(peak=1.0, warmup_steps=2)
SHORT = LearningRate(peak=1.0, warmup_steps=2, decay_steps=12)
STABLE = LearningRate(peak=1.0, warmup_steps=2, shape="warmup_stable_decay", decay_steps=3)


@pytest.mark.parametrize(
    ("stages", "at_zero", "said"),
    [
        (
            (Stage("one", "m", 10, COSINE), Stage("two", "m", 5)),
            5,
            "5 of the 5 steps of stage 'two'.*'one'.*decay_steps=13",
        ),
        (
            (Stage("one", "m", 10, COSINE), Stage("two", "m", 5, COSINE), Stage("three", "m", 3)),
            3,
            "'three'.*'two'.*decay_steps=6",
        ),
        ((Stage("one", "m", 10, SHORT), Stage("two", "m", 9)), 5, "5 of the 9 steps of stage 'two'.*decay_steps=17"),
        (
            (Stage("one", "m", 10, SHORT), Stage("two", "m", 4), Stage("three", "m", 1)),
            1,
            "1 of the 1 steps of stage 'three'",
        ),
        ((Stage("one", "m", 20, SHORT),), 6, "6 of the 20 steps of stage 'one'.*decay_steps=18"),
        ((Stage("one", "m", 10, STABLE), Stage("two", "m", 2)), 2, "2 of the 2 steps of stage 'two'.*final=RATE"),
    ],
)
def test_steps_at_a_rate_of_zero_are_refused(stages, at_zero, said):
    """As many as optax's own schedules give; what the message says to write is then taken, and trains every step."""
    owner = max((stage for stage in stages if stage.learning_rate), key=stages.index)
    decay = owner.learning_rate.schedule(owner.steps)
    reach = sum(stage.steps for stage in stages[stages.index(owner) :])
    assert sum(float(decay(step)) == 0 for step in range(reach)) == at_zero
    with pytest.raises(InputError, match=said) as refused:
        learning_rate_schedule(stages)
    advice = re.search(r"decay_steps=(\d+)", str(refused.value))
    written = {"decay_steps": int(advice[1])} if advice else {"final": 0.1}
    mended = replace(owner, learning_rate=replace(owner.learning_rate, **written))
    found = rates(*(mended if stage is owner else stage for stage in stages))
    assert min(found) > 0
    if advice:
        assert found[-1] < 0.1  # the decay ends with the steps, not long after


@pytest.mark.parametrize("shape", ["cosine", "warmup_stable_decay"])
def test_a_stage_may_ride_at_a_final_rate(shape):
    """And a cosine that ends with its stage is not one that ends before: its last steps are small, not 0."""
    rate = LearningRate(peak=1.0, warmup_steps=2, shape=shape, final=0.25)
    assert rates(Stage("one", "m", 10, rate), Stage("two", "m", 3))[-3:] == [0.25] * 3
    assert min(rates(Stage("one", "m", 12, SHORT), Stage("two", "m", 2))) > 0
    learning_rate_schedule(
        [Stage("long", "m", 120_000, LearningRate(peak=1e-4, warmup_steps=2_000))]
    )  # the last round to 0 in fp32


@pytest.mark.parametrize(
    "wrong", [{"peak": 0.0}, {"peak": -1.0}, {"final": -0.1}, {"warmup_steps": -1}, {"decay_steps": 0}]
)
def test_rates_that_are_none_are_refused(wrong):
    with pytest.raises(InputError, match="learning rate"):
        LearningRate(**{"peak": 1.0, **wrong})
