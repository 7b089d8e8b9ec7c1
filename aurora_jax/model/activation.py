"""The activation of the feed-forward layers, with a gradient that keeps one array."""

import math
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gelu(x: jax.Array, approximate: bool, separate: bool = False) -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415): x times the normal distribution function at x, exact
    or by its tanh approximation.

    Computed in fp32. The exact form goes through erf as PyTorch's does; `jax.nn.gelu` takes erfc, which costs
    three times as much on CPU.

    Args:
        separate: keep value and slope out of the products that take them; the compiler otherwise computes
            them again in each tile.
    """
    return _gelu_forward(x, approximate, separate)[0]


def _gelu_forward(x, approximate, separate):
    x_fp32 = x.astype(jnp.float32)
    if approximate:
        value, slope_times = jax.vjp(partial(jax.nn.gelu, approximate=True), x_fp32)
        (slope,) = slope_times(jnp.ones_like(x_fp32))
    else:
        distribution = 0.5 * (1 + jax.lax.erf(x_fp32 * math.sqrt(0.5)))
        value = x_fp32 * distribution
        slope = distribution + x_fp32 * jnp.exp(-0.5 * x_fp32 * x_fp32) * (1 / math.sqrt(2 * math.pi))
    value, slope = value.astype(x.dtype), slope.astype(x.dtype)
    return (jax.lax.optimization_barrier(value), jax.lax.optimization_barrier(slope)) if separate else (value, slope)


gelu.defvjp(_gelu_forward, lambda approximate, separate, slope, cotangent: (cotangent * slope,))
