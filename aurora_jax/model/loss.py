"""Next-token cross-entropy over a tied head, in chunks, so that the [B, L, V] logits never exist.

B batch, L sequence, D model, V vocabulary; T tokens of the whole batch in one row, S chunks, U tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 1024


def cross_entropy(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    total_weight: jax.Array,
    *,
    dtype: jnp.dtype,
    z_loss: float = 0.0,
    vocabulary_axis: str | None = None,
    vocabulary_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted negative log-likelihoods over `total_weight`, plus the z-loss.

    `total_weight` is the number of valid tokens of the *global* batch: dividing each part of a batch (a
    device's, a micro-batch's) by it makes the parts add up to the loss of the whole, whatever their padding.
    The gradient is computed in the forward pass, while the logits of a chunk are at hand, so the head costs
    three matrix products instead of four (as in Liger, arXiv 2410.10989).

    Args:
        dtype: precision of the operands of the head's matrix products; sums and softmax are fp32.
        vocabulary_axis: inside `shard_map`, the mesh axis over which the rows of the embedding are divided.
            The gradient of the hidden states is then this device's part of a sum over it (`Division.enter`).
        vocabulary_size: number of tokens, where the embedding has more rows: those beyond it are padding,
            without probability and without gradient. All rows are tokens without it.

    Returns:
        The loss (fp32 scalar) and the negative log-likelihood of every token, fp32 [B, L], in nats, without
        weights and without gradient.
    """
    B, L, D = hidden_BLD.shape
    tokens = B * L
    padding = -tokens % min(CHUNK_TOKENS, tokens)

    def chunked(array, fill_shape):
        flat = jnp.concatenate([array.reshape(tokens, *fill_shape), jnp.zeros((padding, *fill_shape), array.dtype)])
        return flat.reshape(-1, min(CHUNK_TOKENS, tokens), *fill_shape)

    loss, nll_SU = _chunked_loss(
        chunked(hidden_BLD, (D,)),
        embedding_VD,
        chunked(targets_BL, ()),
        chunked(weights_BL, ()),
        total_weight,
        dtype,
        z_loss,
        vocabulary_axis,
        vocabulary_size,
    )
    return loss, jax.lax.stop_gradient(nll_SU.reshape(-1)[:tokens].reshape(B, L))


def nll_and_prediction(
    hidden_UD: jax.Array,
    embedding_VD: jax.Array,
    targets_U: jax.Array,
    *,
    dtype: jnp.dtype,
    vocabulary_axis: str | None = None,
    vocabulary_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What follows some hidden states: the negative log-likelihood of each target, fp32 [U], in nats, and the token
    that is most likely there, int32 [U] (of several that are, the lowest). Chunk by chunk; arguments as those of
    `cross_entropy`."""
    embedding_VD = embedding_VD.astype(dtype)

    def one(hidden_and_target: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_D, target = hidden_and_target
        hidden_1D, target_1 = hidden_D.astype(dtype)[None], target[None]
        logits_1V, _, _, nll_1 = _chunk_nll(hidden_1D, embedding_VD, target_1, vocabulary_axis, vocabulary_size)
        largest, token = logits_1V[0].max(), logits_1V[0].argmax().astype(jnp.int32)
        if vocabulary_axis is not None:
            token += jax.lax.axis_index(vocabulary_axis) * logits_1V.shape[1]
            is_largest = jax.lax.pmax(largest, vocabulary_axis) == largest
            token = jax.lax.pmin(jnp.where(is_largest, token, jnp.iinfo(jnp.int32).max), vocabulary_axis)
        return nll_1[0], token

    return jax.lax.map(one, (hidden_UD, targets_U), batch_size=CHUNK_TOKENS)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _chunked_loss(
    hidden_SUD, embedding_VD, targets_SU, weights_SU, total_weight, dtype, z_loss, vocabulary_axis, vocabulary_size
):
    embedding_VD = embedding_VD.astype(dtype)

    def one_chunk(loss, chunk):
        hidden_UD, targets_U, weights_U = chunk
        *_, log_z_U, nll_U = _chunk_nll(
            hidden_UD.astype(dtype), embedding_VD, targets_U, vocabulary_axis, vocabulary_size
        )
        return loss + _weighted(nll_U, log_z_U, weights_U, z_loss), nll_U

    loss, nll_SU = jax.lax.scan(one_chunk, jnp.zeros((), jnp.float32), (hidden_SUD, targets_SU, weights_SU))
    return loss / total_weight, nll_SU


def _chunked_loss_forward(
    hidden_SUD, embedding_VD, targets_SU, weights_SU, total_weight, dtype, z_loss, vocabulary_axis, vocabulary_size
):
    rounded_VD = embedding_VD.astype(dtype)

    def one_chunk(carry, chunk):
        loss, gradient_DV = carry
        hidden_UD, targets_U, weights_U = chunk
        hidden_UD = hidden_UD.astype(dtype)
        logits_UV, is_target_UV, log_z_U, nll_U = _chunk_nll(
            hidden_UD, rounded_VD, targets_U, vocabulary_axis, vocabulary_size
        )
        scale_U = weights_U / total_weight
        slope_U = scale_U * (1 + 2 * z_loss * log_z_U)
        d_logits_UV = jnp.exp(logits_UV - log_z_U[:, None]) * slope_U[:, None] - jnp.where(
            is_target_UV, scale_U[:, None], 0
        )
        d_logits_UV = d_logits_UV.astype(dtype)
        # [D, V]: the transposed operand of this product is then the small one (see `_einsum_smaller_first` in
        # `product.py`).
        gradient_DV += jnp.einsum("ud,uv->dv", hidden_UD, d_logits_UV, preferred_element_type=jnp.float32)
        gradient_UD = jnp.einsum("uv,vd->ud", d_logits_UV, rounded_VD, preferred_element_type=jnp.float32)
        return (loss + _weighted(nll_U, log_z_U, weights_U, z_loss), gradient_DV), (
            nll_U,
            gradient_UD.astype(hidden_SUD.dtype),
        )

    start = (jnp.zeros((), jnp.float32), jnp.zeros(embedding_VD.shape[::-1], jnp.float32))
    (loss, gradient_DV), (nll_SU, gradient_SUD) = jax.lax.scan(one_chunk, start, (hidden_SUD, targets_SU, weights_SU))
    return (loss / total_weight, nll_SU), (gradient_SUD, gradient_DV.T.astype(embedding_VD.dtype))


def _chunked_loss_backward(dtype, z_loss, vocabulary_axis, vocabulary_size, gradients, cotangents):
    gradient_SUD, gradient_VD = gradients
    d_loss, _ = cotangents
    return (
        (gradient_SUD * d_loss).astype(gradient_SUD.dtype),
        (gradient_VD * d_loss).astype(gradient_VD.dtype),
        None,
        None,
        None,
    )


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)


def _chunk_nll(hidden_UD, embedding_VD, targets_U, vocabulary_axis, vocabulary_size):
    logits_UV = jnp.einsum("ud,vd->uv", hidden_UD, embedding_VD, preferred_element_type=jnp.float32)
    rows_V = jnp.arange(logits_UV.shape[1])
    if vocabulary_axis is not None:
        rows_V += jax.lax.axis_index(vocabulary_axis) * rows_V.size
    parts = 1 if vocabulary_axis is None else jax.lax.axis_size(vocabulary_axis)
    if vocabulary_size is not None and vocabulary_size < rows_V.size * parts:
        logits_UV = jnp.where(rows_V[None, :] < vocabulary_size, logits_UV, -jnp.inf)
    if vocabulary_axis is None:
        log_z_U = jax.nn.logsumexp(logits_UV, axis=-1)
        target_U = jnp.take_along_axis(logits_UV, targets_U[:, None], axis=1)[:, 0]
        return logits_UV, targets_U[:, None] == rows_V[None, :], log_z_U, log_z_U - target_U
    is_target_UV = targets_U[:, None] == rows_V[None, :]
    largest_U = jax.lax.pmax(logits_UV.max(axis=-1), vocabulary_axis)
    total_U = jax.lax.psum(jnp.exp(logits_UV - largest_U[:, None]).sum(axis=-1), vocabulary_axis)
    target_U = jax.lax.psum(jnp.where(is_target_UV, logits_UV, 0).sum(axis=-1), vocabulary_axis)
    log_z_U = largest_U + jnp.log(total_U)
    return logits_UV, is_target_UV, log_z_U, log_z_U - target_U


def _weighted(nll_U, log_z_U, weights_U, z_loss):
    return ((nll_U + z_loss * log_z_U**2) * weights_U).sum()
