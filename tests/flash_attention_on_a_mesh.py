"""Run by test_flash_attention.py in a process with eight CPU devices: the kernels on meshes against the
reference on one device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from aurora_jax.kernels.flash_attention import sharded_flash_attention
from aurora_jax.kernels.flash_attention.reference import reference_attention

AXES = ("data", "fsdp", "fsdp_inner", "sequence", "tensor")


def compare(shape: tuple[int, ...], *, K: int = 1, packed: bool = False, alibi: bool = False) -> None:
    B, H, L, C = 4, 8, 400, 64
    rng = np.random.default_rng(0)
    query, d_context = (jnp.asarray(rng.normal(size=(B, H, L, C)), jnp.float32) for _ in range(2))
    key, value = (jnp.asarray(rng.normal(size=(B, K, L, C)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.cumsum(rng.random((B, L)) < 3 / L, axis=1), jnp.int32) if packed else None
    slopes = jnp.asarray(2.0 ** -np.arange(1, H + 1), jnp.float32) if alibi else None
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 5)

    def ours(*arrays):
        return sharded_flash_attention(*arrays, mesh=mesh, segment_ids=segments, alibi_slopes=slopes, interpret=True)

    def reference(*arrays):
        return reference_attention(
            *arrays, segment_ids=None if segments is None else (segments, segments), alibi_slopes=slopes
        )[0]

    def with_gradients(function):
        context, pull_back = jax.vjp(function, query, key, value)
        return context, *pull_back(d_context)

    for found, expected in zip(jax.jit(lambda: with_gradients(ours))(), with_gradients(reference), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()), rtol=0)
    print(f"{dict(zip(AXES, shape, strict=True))} K={K} packed={packed} alibi={alibi}: equal", flush=True)


compare((2, 2, 1, 1, 2))
compare((1, 1, 2, 1, 4), alibi=True)
compare((1, 1, 1, 4, 2), packed=True)
compare((1, 2, 2, 2, 1), K=8, packed=True, alibi=True)
compare((2, 1, 1, 1, 4), K=4)
