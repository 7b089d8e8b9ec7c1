"""The TPU compiler accepts the kernels: libtpu compiles for chips that are not there.

Short cases run in `make test`; all lengths and features, and the sharded training step of the 15.5B model, in
`make test-full`.
"""

from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.chips import CHIPS, smallest_topology
from aurora_jax.errors import InputError
from aurora_jax.kernels.flash_attention import flash_attention
from aurora_jax.model.config import PRESETS, ComputeConfig
from aurora_jax.model.mesh import make_mesh
from aurora_jax.plan.topology import tpu_topology
from aurora_jax.train.config import DataConfig, MeshConfig, TrainConfig
from aurora_jax.train.program import Program
from aurora_jax.train.stages import LearningRate, Stage

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, exists for Linux on x86-64 only")

KERNELS = {"flash_attention_forward", "flash_attention_backward"}


def kernels_of(
    generation: str, L: int, *, H: int = 48, K: int = 1, C: int = 128, packed: bool, alibi: bool, dtype=jnp.bfloat16
) -> set[str]:
    """Compiles the forward and backward pass of one layer's attention for one chip; the kernels in the executable."""
    mesh = Mesh(np.array(tpu_topology(smallest_topology(generation)).devices)[:1], ("x",))
    here = NamedSharding(mesh, PartitionSpec())

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def gradients(q, k, v, segments, slopes):
        def loss(q, k, v):
            options = {"segment_ids": segments if packed else None, "alibi_slopes": slopes if alibi else None}
            return flash_attention(q, k, v, generation=generation, **options).astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    arguments = (
        struct(1, H, L, C),
        struct(1, K, L, C),
        struct(1, K, L, C),
        struct(1, L, dtype=jnp.int32),
        struct(H, dtype=jnp.float32),
    )
    text = jax.jit(gradients).lower(*arguments).compile().as_text()
    return {name for name in KERNELS if name in text}


@pytest.mark.parametrize("generation", CHIPS)
def test_accepted(generation):
    assert kernels_of(generation, 2048, packed=False, alibi=False) == KERNELS


def test_packed_with_alibi_is_accepted():
    assert kernels_of("v6e", 2048, packed=True, alibi=True) == KERNELS


@pytest.mark.full
@pytest.mark.parametrize(
    ("generation", "L", "packed", "alibi"), list(product(CHIPS, (2048, 8192), (False, True), (False, True)))
)
def test_all_features_are_accepted(generation, L, packed, alibi):
    assert kernels_of(generation, L, packed=packed, alibi=alibi) == KERNELS


@pytest.mark.full
@pytest.mark.parametrize("generation", CHIPS)
@pytest.mark.parametrize(
    ("H", "K", "C"), [(16, 16, 64), (12, 12, 96), (8, 2, 80), (71, 1, 64), (8, 8, 256), (4, 4, 128)]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_other_shapes_are_accepted(generation, H, K, C, dtype):
    assert kernels_of(generation, 1000, H=H, K=K, C=C, packed=True, alibi=K > 1, dtype=dtype) == KERNELS


@pytest.mark.full
@pytest.mark.parametrize(
    ("topology", "fsdp", "tensor", "isolate"),
    [
        ("v5p:4x4x4", 64, 1, False),
        ("v5p:4x4x4", 16, 4, True),
        ("v6e:16x16", 64, 4, False),
        ("v4:4x4x8", 32, 4, True),
        ("v5e:16x16", 64, 4, False),
    ],
)
def test_sharded_step_of_starcoderplus_is_accepted(topology, fsdp, tensor, isolate):
    """The step that `train` runs, 15.5B parameters, with the kernels inside; the compiler enforces the chips'
    memory."""
    config = TrainConfig(
        Path(),
        (Stage("s", "m", 1, LearningRate(1e-4)),),
        DataConfig("", batch_size=fsdp, sequence_length=2048, attend_across_documents=not isolate),
        PRESETS["starcoderplus"],
        compute=ComputeConfig(attention="flash", rematerialisation="full"),
        mesh=MeshConfig(fsdp=fsdp, tensor=tensor),
    )
    mesh = make_mesh(config.mesh, tpu_topology(topology).devices)
    compiled = Program(config, PRESETS["starcoderplus"], mesh).lower_step().compile()
    assert {name for name in KERNELS if name in compiled.as_text()} == KERNELS


def test_unknown_topology_says_how_they_are_named():
    with pytest.raises(InputError, match="named like v5p:4x4x4"):
        tpu_topology("v5p:3x3x3x3")
