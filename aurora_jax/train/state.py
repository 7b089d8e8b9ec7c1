"""What a run carries from step to step, and how it comes to be on a mesh: made or restored in parts, never
whole on one device."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.model.config import ModelConfig
from aurora_jax.model.decoder import initial_parameters
from aurora_jax.model.sharding import nest, parameter_shapes, parameter_shardings
from aurora_jax.train.config import OptimizerConfig
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
    norm_average: jax.Array
    """Running average of accepted gradient norms, fp32."""


def initial_state(parameters: dict, optimizer: OptimizerConfig) -> TrainState:
    """A fresh optimizer around the given parameters."""
    step, accepted = (jnp.zeros((), jnp.int32) for _ in range(2))
    return TrainState(
        parameters, adamw(optimizer).init(parameters), step, accepted, norm_average=jnp.zeros((), jnp.float32)
    )


def state_shapes(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The state of a run as shapes with shardings: parameters by the table, moments like their parameters,
    scalars everywhere."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def everywhere(shape):
        return placed(shape, replicated)

    shardings = parameter_shardings(model, mesh)
    parameters = jax.tree.map(placed, nest(parameter_shapes(model)), shardings)
    state = jax.eval_shape(partial(initial_state, optimizer=optimizer), parameters)
    moments = optax.tree_map_params(adamw(optimizer), placed, state.moments, shardings, transform_non_params=everywhere)
    return TrainState(parameters, moments, *(everywhere(scalar) for scalar in state[2:]))


def shardings_of(shapes: TrainState) -> TrainState:
    """Where each array of a state lies."""
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def make_random_state(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, seed: int) -> jax.stages.Wrapped:
    """The program, without arguments, of a state with random weights: each device draws its own part."""

    def random_state() -> TrainState:
        return initial_state(initial_parameters(model, seed), optimizer)

    return jax.jit(random_state, out_shardings=shardings_of(state_shapes(model, optimizer, mesh)))


def make_state_around(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """The program of `initial_state` around weights that lie on the mesh already; it takes their memory over.

    Without stated shardings the compiler makes the moments, which are zeros and depend on nothing, whole on
    every device.
    """
    shardings = shardings_of(state_shapes(model, optimizer, mesh))
    return jax.jit(partial(initial_state, optimizer=optimizer), out_shardings=shardings, donate_argnums=0)
