"""LayerNorm whose arithmetic and gradients are fp32, whatever precision its input and output have.

B batch, L sequence, D model.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """LayerNorm (Ba et al. 2016, arXiv 1607.06450) over the last axis, with scale and bias.

    Flax's own rounds scale and bias to the activations' dtype, so that their gradients are bf16 sums over all
    tokens; here they are fp32.
    """

    def __init__(self, width: int, *, epsilon: float, dtype: jnp.dtype):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, inputs_BLD: jax.Array) -> jax.Array:
        """Normalised inputs, rounded to `dtype`."""
        x_BLD = inputs_BLD.astype(jnp.float32)
        mean_BL1 = x_BLD.mean(axis=-1, keepdims=True)
        if inputs_BLD.dtype == jnp.float32:
            variance_BL1 = jnp.square(x_BLD - mean_BL1).mean(axis=-1, keepdims=True)
        else:
            # Both sums in one pass over memory. What cancels here is far below the rounding that the inputs
            # have gone through.
            variance_BL1 = jnp.maximum(jnp.square(x_BLD).mean(axis=-1, keepdims=True) - jnp.square(mean_BL1), 0.0)
        normal_BLD = (x_BLD - mean_BL1) * jax.lax.rsqrt(variance_BL1 + self.epsilon)
        scale_11D, bias_11D = (
            jnp.expand_dims(each[...], tuple(range(inputs_BLD.ndim - 1))) for each in (self.scale, self.bias)
        )
        return (normal_BLD * scale_11D + bias_11D).astype(self.dtype)
