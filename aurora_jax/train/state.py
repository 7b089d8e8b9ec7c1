"""What a run carries from step to step, and how it comes to be on a mesh: made or restored in parts, never
whole on one device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.guard import Statistics, no_statistics
from aurora_jax.train.optimizer import adamw


class TrainState(NamedTuple):
    """Everything that a step changes."""

    parameters: dict
    moments: Any
    """State of `optimizer.adamw`: two trees like the parameters', and a count."""
    step: jax.Array
    """Steps done, int32; batches and learning rates follow it."""
    accepted: jax.Array
    """Updates applied, int32."""
    statistics: Statistics
    """Of accepted updates, by which the guard judges the next."""


def initial_state(parameters: dict, optimizer: OptimizerConfig) -> TrainState:
    """A fresh optimizer around the given parameters."""
    step, accepted = (jnp.zeros((), jnp.int32) for _ in range(2))
    return TrainState(parameters, adamw(optimizer).init(parameters), step, accepted, no_statistics())
