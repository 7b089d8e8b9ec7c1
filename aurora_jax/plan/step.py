"""The training step for a mesh of TPUs that is not there: shapes and shardings of everything that it takes, nothing allocated.

B batch, L sequence.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.data.loader import Batch
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import structure_of
from aurora_jax.model.division import Division
from aurora_jax.model.sharding import BATCH_AXES, SEQUENCE_AXIS, nest, parameter_shapes, rows_of
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.optimizer import adamw
from aurora_jax.train.step import TrainState, initial_state, make_gradient, make_loss, make_train_step


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The state of a run as shapes with shardings: parameters by the table, moments like their parameters, scalars everywhere."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    def everywhere(shape):
        return placed(shape, replicated)

    shardings = nest({path: NamedSharding(mesh, row.partition) for path, row in rows_of(model).items()})
    parameters = jax.tree.map(placed, nest(parameter_shapes(model)), shardings)
    state = jax.eval_shape(partial(initial_state, optimizer=optimizer), parameters)
    moments = optax.tree_map_params(adamw(optimizer), placed, state.moments, shardings, transform_non_params=everywhere)
    return TrainState(parameters, moments, *(everywhere(scalar) for scalar in state[2:]))


def abstract_batch(batch_size: int, length: int, mesh: Mesh) -> Batch:
    """A global batch as shapes, its rows over data and fsdp, its places over `sequence`."""

    def struct(dtype, *shape):
        partition = PartitionSpec(BATCH_AXES, SEQUENCE_AXIS) if len(shape) == 2 else PartitionSpec(BATCH_AXES)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition))

    grid = (batch_size, length)
    return Batch(
        tokens_BL=struct(jnp.int32, *grid),
        targets_BL=struct(jnp.int32, *grid),
        loss_weights_BL=struct(jnp.float32, *grid),
        segment_ids_BL=struct(jnp.int32, *grid),
        positions_BL=struct(jnp.int32, *grid),
        task_ids_B=struct(jnp.int32, batch_size),
    )


def lower_train_step(
    model: ModelConfig,
    compute: ComputeConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    length: int,
    isolate_documents: bool = False,
    gather: Literal["layer", "step"] = "layer",
    tasks: int = 1,
) -> jax.stages.Lowered:
    """The step that `train` runs, lowered for a mesh; `.compile()` asks the TPU compiler.

    Args:
        batch_size: sequences of the global batch (B).
        length: tokens of a sequence (L).
        gather: as in `MeshConfig`.
        tasks: of the mixture, for the metrics.
    """
    division = Division.of(mesh)
    structure = structure_of(model, compute, division)
    loss = make_loss(structure, compute, z_loss=optimizer.z_loss, isolate_documents=isolate_documents, division=division)
    gradient = make_gradient(loss, optimizer.micro_batches, mesh, gathered_once=compute.compute_dtype if gather == "step" else None)
    step = make_train_step(gradient, optimizer, lambda step: 1e-4, dropout=False, seed=0, tasks=tasks)
    # Outside the mesh's context: optax makes a small array on the way, which no absent TPU can hold.
    arguments = abstract_state(model, optimizer, mesh), abstract_batch(batch_size, length, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(*arguments)
