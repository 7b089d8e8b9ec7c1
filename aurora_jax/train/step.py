"""One training step: a pure function of the state and the batch, compiled once for the mesh.

B batch, L sequence, A micro-batches, T tasks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from aurora_jax.data.batches.loader import Batch
from aurora_jax.model.division import Division
from aurora_jax.model.likelihood import EVERYWHERE, GRID, on_mesh
from aurora_jax.model.sharding import TABLE, TENSOR_AXIS, TENSOR_PARTIAL, flatten, nest
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.guard import is_accepted, no_statistics, updated
from aurora_jax.train.optimizer import adamw, clip
from aurora_jax.train.state import TrainState


def gradient_of(
    loss: Callable,
    parameters: dict,
    batch: Batch,
    dropout_key: jax.Array | None,
    *,
    micro_batches: int,
    total_weight: jax.Array | None = None,
):
    """Loss, per-token nll and gradient of a batch, computed in `micro_batches` parts.

    Every part is divided by the number of valid tokens of the whole before its backward pass, so the sum of
    the parts is the gradient of the large batch, however the padding falls.

    Args:
        total_weight: valid tokens of the whole batch, where this is a part of it.

    Returns:
        (loss fp32 scalar, nll_BL fp32, gradients like the parameters in fp32).
    """
    if total_weight is None:
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


def make_gradient(
    loss: Callable, micro_batches: int, mesh: Mesh | None = None, gathered_once: str | None = None
) -> Callable:
    """`gradient(parameters, batch, dropout_key)`: `gradient_of` global arrays, on a mesh in one `shard_map`.

    Rows are divided over data and fsdp, places over `sequence`. Inside, each device gathers the weights that
    it multiplies with; gradients leave as they came: reduce-scattered along fsdp, added up over the axes
    along which a parameter is not divided.

    Args:
        loss: from `make_loss`, with `Division.of(mesh)`.
        mesh: None, or one device, for the program as it is.
        gathered_once: gather the layers' weights once, in this precision, and keep them for all
            micro-batches; without it each layer gathers its own where it uses them.
    """
    if mesh is None or mesh.size == 1:
        return partial(gradient_of, loss, micro_batches=micro_batches)
    division = Division.of(mesh)

    def local(parameters: dict, batch: Batch, dropout_key: jax.Array | None):
        total_weight = jnp.maximum(jax.lax.psum(batch.loss_weights_BL.sum(), EVERYWHERE), 1.0)
        key = None if dropout_key is None else division.dropout_key(dropout_key)
        loss_here = loss
        if gathered_once is not None:
            loss_here = partial(
                loss,
                gathered_layers=division.gather(parameters["layers"], dtype=jnp.dtype(gathered_once), prefix="layers."),
            )
        value, nll_BL, gradients = gradient_of(
            loss_here, parameters, batch, key, micro_batches=micro_batches, total_weight=total_weight
        )
        flat = {path: jax.lax.psum(gradient, _summed_axes(path)) for path, gradient in flatten(gradients).items()}
        return jax.lax.psum(value, EVERYWHERE), nll_BL, nest(flat)

    return on_mesh(local, mesh, lambda parameters_spec: (PartitionSpec(), GRID, parameters_spec))


def _summed_axes(path: str) -> tuple[str, ...]:
    """Mesh axes over which a parameter's gradient is still to be added up when its layer's backward pass is done."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in TABLE[path].partition)
    scattered = {axis for entry in entries for axis in entry}
    axes = tuple(axis for axis in EVERYWHERE if axis not in scattered)
    return (*axes, TENSOR_AXIS) if path in TENSOR_PARTIAL else axes


def make_train_step(
    gradient: Callable,
    optimizer: OptimizerConfig,
    schedule: optax.Schedule,
    *,
    dropout: bool,
    seed: int,
    tasks: int,
    stage_starts: Sequence[int] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The function to compile: `train_step(state, batch) -> (state, metrics)`.

    An update is decided on before it is made: if the loss or the gradient's norm is not finite, or spikes (`guard.py`),
    parameters and moments stay as they are, the step counts, and `metrics["accepted"]` says 0.

    Args:
        stage_starts: steps at which other text may have another loss: what was usual before is forgotten there.

    Metrics (fp32 scalars unless noted): loss, gradient_norm, learning_rate, accepted, tokens, skipped
    (updates so far), skipped_in_a_row, task_nll and task_tokens ([T]: sums over the batch).
    """
    transform = adamw(optimizer)

    def train_step(state: TrainState, batch: Batch):
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        value, nll_BL, gradients = gradient(state.parameters, batch, dropout_key)
        norm = optax.tree.norm(gradients)
        begins = jnp.isin(state.step, jnp.asarray([*stage_starts, -1], jnp.int32))
        none = no_statistics()._replace(skipped=state.statistics.skipped)
        statistics = jax.tree.map(lambda none, kept: jnp.where(begins, none, kept), none, state.statistics)
        accept = is_accepted(statistics, value, norm, optimizer.spike_sigmas)

        direction, moments = transform.update(
            clip(gradients, norm, optimizer.clip_norm), state.moments, state.parameters
        )
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        parameters = jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), state.parameters, direction)
        after = TrainState(parameters, moments, state.step, state.accepted + 1, updated(statistics, value, norm))
        before = state._replace(statistics=statistics._replace(skipped=statistics.skipped + 1))
        state = jax.tree.map(lambda new, old: jnp.where(accept, new, old), after, before)
        state = state._replace(step=state.step + 1)

        weights_B = batch.loss_weights_BL.sum(axis=1)
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "accepted": accept.astype(jnp.float32),
            "tokens": weights_B.sum(),
            "skipped": (state.step - state.accepted).astype(jnp.float32),
            "skipped_in_a_row": state.statistics.skipped.astype(jnp.float32),
            "task_nll": jax.ops.segment_sum((nll_BL * batch.loss_weights_BL).sum(axis=1), batch.task_ids_B, tasks),
            "task_tokens": jax.ops.segment_sum(weights_B, batch.task_ids_B, tasks),
        }
        return state, metrics

    return train_step
