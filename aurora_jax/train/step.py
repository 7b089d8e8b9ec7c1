"""One training step: a pure function of the state and the batch, compiled once for the mesh.

B batch, L sequence, A micro-batches, T tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from aurora_jax.data.loader import Batch
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.decoder import merge
from aurora_jax.model.loss import cross_entropy
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.optimizer import adamw, clip

AVERAGE_DECAY = 0.99
SPIKE_WARMUP = 50
"""Accepted updates before the average of gradient norms is trusted to call one a spike."""


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
    return TrainState(parameters, adamw(optimizer).init(parameters), step, accepted, norm_average=jnp.zeros((), jnp.float32))


def make_loss(structure: nnx.GraphDef, compute: ComputeConfig, *, z_loss: float, isolate_documents: bool) -> Callable:
    """`loss(parameters, batch, total_weight, dropout_key) -> (loss, nll_BL)`; see `cross_entropy`. The batch is a traced `Batch`."""

    def loss(parameters: dict, batch: Any, total_weight: jax.Array, dropout_key: jax.Array | None):
        decoder = merge(structure, parameters)
        # Without isolation there is nothing to mask: positions are 0 .. L-1, and padding lies right of all that is causal to it.
        isolation = {"positions_BL": batch.positions_BL, "segment_ids_BL": batch.segment_ids_BL} if isolate_documents else {}
        hidden_BLD = decoder(batch.tokens_BL, dropout_key=dropout_key, **isolation)
        return cross_entropy(
            hidden_BLD,
            decoder.token_embedding.embedding[...],
            batch.targets_BL,
            batch.loss_weights_BL,
            total_weight,
            dtype=jnp.dtype(compute.compute_dtype),
            z_loss=z_loss,
        )

    return loss


def gradient_of(loss: Callable, parameters: dict, batch: Batch, micro_batches: int, dropout_key: jax.Array | None):
    """Loss, per-token nll and gradient of a whole batch, computed in `micro_batches` parts.

    Every part is divided by the number of valid tokens of the whole before its backward pass, so the sum of the parts is the gradient of
    the large batch, however the padding falls.

    Returns:
        (loss fp32 scalar, nll_BL fp32, gradients like the parameters in fp32).
    """
    total_weight = jnp.maximum(batch.loss_weights_BL.sum(), 1.0)
    value_and_gradient = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        (value, nll_BL), gradients = value_and_gradient(parameters, batch, total_weight, dropout_key)
        return value, nll_BL, gradients

    # Rows are dealt out in turn, so that a batch sharded over devices is cut on every device and nothing moves.
    parts = jax.tree.map(lambda a: a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1), batch)

    def accumulate(carry, part):
        value_sum, gradient_sum, index = carry
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        (value, nll), gradients = value_and_gradient(parameters, part, total_weight, key)
        return (value_sum + value, jax.tree.map(jnp.add, gradient_sum, gradients), index + 1), nll

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, parameters), jnp.zeros((), jnp.int32))
    (value, gradients, _), nll = jax.lax.scan(accumulate, start, parts)
    return value, nll.swapaxes(0, 1).reshape(batch.tokens_BL.shape), gradients


def make_train_step(
    loss: Callable, optimizer: OptimizerConfig, schedule: optax.Schedule, *, dropout: bool, seed: int, tasks: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The function to compile: `train_step(state, batch) -> (state, metrics)`.

    An update is decided on before it is made: if the loss or the gradient's norm is not finite, or the norm spikes, parameters and moments
    stay as they are, the step counts, and `metrics["accepted"]` says 0.

    Metrics (fp32 scalars unless noted): loss, gradient_norm, learning_rate, accepted, tokens, skipped (updates so far), task_nll and
    task_tokens ([T]: sums over the batch).
    """
    transform = adamw(optimizer)

    def train_step(state: TrainState, batch: Batch):
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        value, nll_BL, gradients = gradient_of(loss, state.parameters, batch, optimizer.micro_batches, dropout_key)
        norm = optax.tree.norm(gradients)
        accept = jnp.isfinite(value) & jnp.isfinite(norm)
        if optimizer.spike_factor is not None:
            accept &= (state.accepted < SPIKE_WARMUP) | (norm <= optimizer.spike_factor * state.norm_average)

        direction, moments = transform.update(clip(gradients, norm, optimizer.clip_norm), state.moments, state.parameters)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        parameters = jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), state.parameters, direction)
        norm_average = jnp.where(state.accepted == 0, norm, AVERAGE_DECAY * state.norm_average + (1 - AVERAGE_DECAY) * norm)
        updated = TrainState(parameters, moments, state.step, state.accepted + 1, norm_average)
        state = jax.tree.map(lambda new, old: jnp.where(accept, new, old), updated, state)
        state = state._replace(step=state.step + 1)

        weights_B = batch.loss_weights_BL.sum(axis=1)
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "accepted": accept.astype(jnp.float32),
            "tokens": weights_B.sum(),
            "skipped": (state.step - state.accepted).astype(jnp.float32),
            "task_nll": jax.ops.segment_sum((nll_BL * batch.loss_weights_BL).sum(axis=1), batch.task_ids_B, tasks),
            "task_tokens": jax.ops.segment_sum(weights_B, batch.task_ids_B, tasks),
        }
        return state, metrics

    return train_step
