"""How one model's program is divided over a mesh by hand, inside `shard_map`: which collective stands where,
and its gradient.

Weights are gathered where they are used (fully sharded data parallelism, ZeRO stage 3: Rajbhandari et al.
2020, arXiv 1910.02054), heads and feed-forward columns are split over `tensor` (Shoeybi et al. 2019, arXiv
1909.08053), places over `sequence`.

D model, V vocabulary; other letters as in `sharding.py`.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from aurora_jax.model.sharding import BATCH_AXES, FSDP_AXES, SEQUENCE_AXIS, TABLE, TENSOR_AXIS, flatten, nest


@dataclass(frozen=True)
class Division:
    """The mesh axes that a program is divided over; none of them for a program that sees whole arrays."""

    fsdp: tuple[str, ...] = ()
    """Axes along which weights are stored in parts, outermost first."""
    sequence: str | None = None
    """Axis along which the places of a sequence are divided."""
    tensor: str | None = None
    """Axis along which heads, feed-forward columns and the vocabulary are divided."""

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh) -> "Division":
        """What a mesh divides: its axes of more than one device."""
        several = {axis for axis, size in mesh.shape.items() if size > 1}
        return cls(
            fsdp=tuple(axis for axis in FSDP_AXES if axis in several),
            sequence=SEQUENCE_AXIS if SEQUENCE_AXIS in several else None,
            tensor=TENSOR_AXIS if TENSOR_AXIS in several else None,
        )

    def gather(self, parameters: dict, *, dtype: jnp.dtype, prefix: str = "", stacked: bool = True) -> dict:
        """Parameters as their products need them: rounded to `dtype` and whole along the fsdp axes; their
        gradients are reduce-scattered.

        One axis is gathered after the other: only then does the TPU compiler turn the gradient's sum into
        reduce-scatters. What the table
        does not divide over fsdp is left as it is.

        Args:
            prefix: of the paths in the sharding table.
            stacked: False for the parameters of one layer, whose arrays have no leading layer axis.
        """
        return nest(
            {path: self._gathered(prefix + path, array, dtype, stacked) for path, array in flatten(parameters).items()}
        )

    def _gathered(self, path: str, array: jax.Array, dtype: jnp.dtype, stacked: bool) -> jax.Array:
        partition = TABLE[path].partition[0 if stacked else 1 :]
        sharded = [
            (axis, dimension)
            for dimension, entry in enumerate(partition)
            for axis in (entry if isinstance(entry, tuple) else (entry,))
            if axis in self.fsdp
        ]
        array = array.astype(dtype) if sharded else array
        for axis, dimension in reversed(sharded):
            # Along the leading dimension: gradients of others come out as all-reduces on some meshes.
            leading = jnp.moveaxis(array, dimension, 0)
            array = jnp.moveaxis(jax.lax.all_gather(leading, axis, axis=0, tiled=True), 0, dimension)
        return array

    def of_layer(self, parameters: dict, gathered: dict | None, *, dtype: jnp.dtype) -> dict:
        """Parameters of one layer as its products need them: gathered here, or as they were gathered before."""
        if gathered is not None:
            return self._attached(gathered, parameters, dtype)
        return self.gather(parameters, dtype=dtype, prefix="layers.", stacked=False) if self.fsdp else parameters

    def _attached(self, gathered: dict, parameters: dict, dtype: jnp.dtype) -> dict:
        """Parameters of one layer that were gathered before, as if `gather` did it here: their gradients are
        scattered, to `parameters`."""
        gather = partial(self.gather, dtype=dtype, prefix="layers.", stacked=False)
        shapes = jax.eval_shape(lambda: parameters)

        @jax.custom_vjp
        def attached(parameters, gathered):
            return gathered

        def backward(_, gradients):
            (scattered,) = jax.linear_transpose(gather, shapes)(gradients)
            return scattered, None

        attached.defvjp(lambda parameters, gathered: (gathered, None), backward)
        return attached(parameters, jax.lax.stop_gradient(gathered))

    def enter(self, activations: jax.Array) -> jax.Array:
        """Activations that are the same on all of `tensor`, before each takes its own part of the work:
        gradients are summed here."""
        return activations if self.tensor is None else _enter(activations, self.tensor)

    def leave(self, partial_sums: jax.Array) -> jax.Array:
        """The sum over `tensor` of each one's part of the work."""
        return partial_sums if self.tensor is None else _leave(partial_sums, self.tensor)

    def own_heads(self, array: jax.Array, axis: int) -> jax.Array:
        """This device's part of what each key/value head (or each query head) has; the one head of
        multi-query attention is everybody's."""
        heads = array.shape[axis]
        if self.tensor is None or heads == 1:
            return array
        own = heads // jax.lax.axis_size(self.tensor)
        return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(self.tensor) * own, own, axis=axis)

    def place(self, length: int) -> jax.Array | int:
        """Place of the first token, of `length` tokens here."""
        return 0 if self.sequence is None else jax.lax.axis_index(self.sequence) * length

    def first_token(self, rows: int) -> jax.Array | int:
        """The token whose row of the embedding is the first one here, of `rows` here."""
        return 0 if self.tensor is None else jax.lax.axis_index(self.tensor) * rows

    def embed(self, embedding_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        """Rows of an embedding whose vocabulary is divided over `tensor`."""
        if self.tensor is None:
            return jnp.take(embedding_VD, tokens_BL, axis=0)
        local_BL = tokens_BL - self.first_token(embedding_VD.shape[0])
        mine_BL1 = ((local_BL >= 0) & (local_BL < embedding_VD.shape[0]))[..., None]
        rows_BLD = jnp.take(embedding_VD, jnp.clip(local_BL, 0, embedding_VD.shape[0] - 1), axis=0)
        return self.leave(jnp.where(mine_BL1, rows_BLD, 0))

    def whole_vocabulary(self, logits_BLV: jax.Array) -> jax.Array:
        """Scores of all tokens, of those that each device of `tensor` has."""
        return logits_BLV if self.tensor is None else jax.lax.all_gather(logits_BLV, self.tensor, axis=-1, tiled=True)

    def dropout_key(self, key: jax.Array) -> jax.Array:
        """A key of this device's own rows and places; the same over `tensor`, whose activations are."""
        for axis in (*BATCH_AXES, SEQUENCE_AXIS):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return key


WHOLE = Division()


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(activations, axis):
    return activations


_enter.defvjp(lambda activations, axis: (activations, None), lambda axis, _, gradient: (jax.lax.psum(gradient, axis),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(partial_sums, axis):
    return jax.lax.psum(partial_sums, axis)


_leave.defvjp(
    lambda partial_sums, axis: (jax.lax.psum(partial_sums, axis), None), lambda axis, _, gradient: (gradient,)
)
