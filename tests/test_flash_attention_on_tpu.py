"""The TPU compiler accepts the kernels: libtpu compiles for a topology on a machine that has no TPU.

Short cases run in `make test`; all lengths, features and the sharded training step of the 15.5B model in `make test-full`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from aurora_jax.data.loader import Batch
from aurora_jax.kernels.flash_attention import flash_attention
from aurora_jax.kernels.flash_attention.blocks import GENERATIONS
from aurora_jax.model.config import PRESETS, ComputeConfig
from aurora_jax.model.decoder import structure_of
from aurora_jax.model.sharding import TABLE, nest, parameter_shapes
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.step import TrainState, initial_state, make_loss, make_train_step
from tests.tpu_compiler import topology

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
AXES = ("data", "fsdp", "sequence", "tensor")


def compiled_attention(generation: str, L: int, *, H: int = 48, K: int = 1, C: int = 128, packed: bool, alibi: bool, dtype=jnp.bfloat16):
    """Forward and backward of one layer's attention on one chip, compiled."""
    mesh = Mesh(np.array(topology(TOPOLOGIES[generation]).devices)[:1], ("x",))
    here = NamedSharding(mesh, PartitionSpec())

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def loss(q, k, v, segments, slopes):
        options = {"segment_ids": segments if packed else None, "alibi_slopes": slopes if alibi else None}
        return flash_attention(q, k, v, generation=generation, **options).astype(jnp.float32).sum()

    arguments = struct(1, H, L, C), struct(1, K, L, C), struct(1, K, L, C), struct(1, L, dtype=jnp.int32), struct(H, dtype=jnp.float32)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()


def kernels_in(compiled) -> set[str]:
    text = compiled.as_text()
    return {name for name in ("flash_attention_forward", "flash_attention_backward") if name in text}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_accepted(generation):
    compiled = compiled_attention(generation, 2048, packed=False, alibi=False)
    assert kernels_in(compiled) == {"flash_attention_forward", "flash_attention_backward"}
