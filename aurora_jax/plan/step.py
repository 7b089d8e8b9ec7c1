"""The training step for a mesh of TPUs that is not there, from shapes alone: nothing is allocated.

B batch, L sequence.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.data.batches.loader import Batch
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.sharding import BATCH_AXES, SEQUENCE_AXIS
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.state import state_shapes
from aurora_jax.train.step import train_step_on_mesh


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
    dropout: float = 0.0,
) -> jax.stages.Lowered:
    """The step that `train` runs, lowered for a mesh; `.compile()` asks the TPU compiler.

    Args:
        batch_size: sequences of the global batch (B).
        length: tokens of a sequence (L).
        gather: as in `MeshConfig`.
        dropout: rate, in place of the model's own.
    """
    step = train_step_on_mesh(
        model,
        compute,
        optimizer,
        mesh,
        lambda step: 1e-4,
        isolate_documents=isolate_documents,
        gather=gather,
        dropout=dropout,
    )
    # Outside the mesh's context: optax makes a small array on the way, which no absent TPU can hold.
    arguments = state_shapes(model, optimizer, mesh), abstract_batch(batch_size, length, mesh)
    with jax.set_mesh(mesh):
        return step.lower(*arguments)
