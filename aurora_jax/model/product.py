"""Matrix products with low-precision operands and fp32 accumulation, forward and backward.

B, L, T and other letters in docstrings are free: an einsum names its own dimensions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.division import WHOLE, Division


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(equation: str, left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`jnp.einsum` of two arrays: operands rounded to `dtype`, sums kept in fp32, result in fp32.

    Its two gradient products do the same. Plain autodiff would multiply the fp32 cotangent as it is, which
    leaves the bf16 matrix units, or round the gradient of a parameter to bf16; here a parameter's gradient is
    an fp32 sum of bf16 products.
    """
    return _fp32_sums(equation, left.astype(dtype), right.astype(dtype))


def _einsum_forward(equation, left, right, dtype):
    # The operands are kept rounded: half the memory, and what the gradient products take anyway. Zero-size
    # arrays carry the dtypes.
    left_rounded, right_rounded = left.astype(dtype), right.astype(dtype)
    output = _fp32_sums(equation, left_rounded, right_rounded)
    return output, (left_rounded, right_rounded, jnp.zeros(0, left.dtype), jnp.zeros(0, right.dtype))


def _einsum_backward(equation, dtype, residuals, cotangent):
    left, right, left_like, right_like = residuals
    operands, result = equation.split("->")
    left_letters, right_letters = operands.split(",")
    cotangent = cotangent.astype(dtype)
    left_gradient = _einsum_smaller_first(result, right_letters, left_letters, cotangent, right)
    right_gradient = _einsum_smaller_first(left_letters, result, right_letters, left, cotangent)
    return left_gradient.astype(left_like.dtype), right_gradient.astype(right_like.dtype)


def _einsum_smaller_first(one_letters, other_letters, result_letters, one, other):
    # A gradient product sums over leading axes, for which XLA's CPU backend transposes its first operand: let
    # that be the smaller one.
    if one.size > other.size:
        one_letters, other_letters, one, other = other_letters, one_letters, other, one
    return _fp32_sums(f"{one_letters},{other_letters}->{result_letters}", one, other)


def _fp32_sums(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # jnp.einsum contracts letters in alphabetical order: "blhc,hcd->bld" would be a product over c, h, for
    # which XLA's CPU backend transposes both operands. Renamed in the order in which they stand, they are
    # contracted as they lie in memory.
    letters = dict.fromkeys(letter for letter in equation if letter.isalpha())
    names = {ord(letter): chr(ord("a") + place) for place, letter in enumerate(letters)}
    return jnp.einsum(equation.translate(names), left, right, preferred_element_type=jnp.float32)


einsum.defvjp(_einsum_forward, _einsum_backward)


class Linear(nnx.Module):
    """Affine map from the last axes of its input, given as an einsum: `Linear("bld,dhc->blhc", (D, H, C), (H,
    C), ...)`.

    Rematerialisation policies know its result by `name`. With `sums`, what it contracts is divided over the
    tensor axis, and the parts are added up before the bias. With `row_major` its last axis is contiguous in
    memory.
    """

    def __init__(
        self,
        equation: str,
        kernel_shape: tuple[int, ...],
        bias_shape: tuple[int, ...],
        *,
        name: str,
        kernel_init: nnx.Initializer,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
        sums: Division = WHOLE,
        row_major: bool = False,
    ):
        self.equation = equation
        self.name = name
        self.sums = sums
        self.row_major = row_major
        self.product_dtype = jnp.dtype(compute.compute_dtype)
        self.output_dtype = jnp.dtype(compute.activation_dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), kernel_shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(bias_shape, jnp.float32))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps `inputs`; the bias is added in fp32, before the one rounding to the activations' dtype."""
        outputs = einsum(self.equation, inputs, self.kernel[...], self.product_dtype)
        if self.sums.tensor is not None:
            outputs = self.sums.leave(outputs.astype(self.output_dtype))
        bias = jnp.expand_dims(self.bias[...], tuple(range(outputs.ndim - self.bias.ndim)))
        outputs = (outputs + bias).astype(self.output_dtype)
        if self.row_major:
            outputs = with_layout_constraint(outputs, Layout(tuple(range(outputs.ndim))))
        # Named after rounding, so that a rematerialisation policy that keeps products keeps the smaller array.
        return checkpoint_name(outputs, self.name)
