"""What flash attention computes, written as plainly as it can be: the whole matrix of scores, in the inputs'
precision or fp32.

B batch, H query heads, K key/value heads, L queries, M keys, C head dim.
"""

import jax
import jax.numpy as jnp


def reference_attention(
    q_BHLC: jax.Array,
    k_BKMC: jax.Array,
    v_BKMC: jax.Array,
    *,
    causal: bool = True,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    alibi_slopes: jax.Array | None = None,
    scale: float | None = None,
    q_offset: int | jax.Array = 0,
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T + bias) v over the visible keys, and the logarithm of the softmax's sum.

    The arguments are those of `ops.flash_attention`. Keys and values are repeated for the query heads that
    share them, and the matrix [B, H, L, M] is built: for tests, not for use.

    Returns:
        context [B, H, L, C] and logsumexp [B, H, L] (natural logarithm), fp32 or fp64 as the inputs are wide;
        a query that sees no key has a context of zeros and a logsumexp of minus infinity.
    """
    wide = jnp.promote_types(q_BHLC.dtype, jnp.float32)
    H, L, C = q_BHLC.shape[1:]
    K, M = k_BKMC.shape[1:3]
    query, key, value = (
        array.astype(wide) for array in (q_BHLC, *(jnp.repeat(array, H // K, axis=1) for array in (k_BKMC, v_BKMC)))
    )
    scores_BHLM = jnp.einsum("bhlc,bhmc->bhlm", query, key, precision="highest") * (C**-0.5 if scale is None else scale)
    query_places_L1, key_places_1M = q_offset + jnp.arange(L)[:, None], jnp.arange(M)[None, :]
    if alibi_slopes is not None:
        distance_LM = (key_places_1M - query_places_L1).astype(wide)
        scores_BHLM += alibi_slopes.astype(wide)[None, :, None, None] * distance_LM[None, None]
    visible_BHLM = jnp.ones((1, 1, L, M), bool)
    if causal:
        visible_BHLM = (key_places_1M <= query_places_L1)[None, None]
    if segment_ids is not None:
        q_segments_BL, k_segments_BM = segment_ids
        same_BLM = (q_segments_BL[:, :, None] == k_segments_BM[:, None, :]) & (q_segments_BL >= 0)[:, :, None]
        visible_BHLM = visible_BHLM & same_BLM[:, None]
    scores_BHLM = jnp.where(visible_BHLM, scores_BHLM, -jnp.inf)
    largest_BHL1 = jnp.maximum(scores_BHLM.max(-1, keepdims=True), jnp.finfo(wide).min)
    weights_BHLM = jnp.exp(scores_BHLM - jax.lax.stop_gradient(largest_BHL1))
    total_BHL1 = weights_BHLM.sum(-1, keepdims=True)
    empty_BHL1 = total_BHL1 == 0
    context_BHLC = jnp.einsum(
        "bhlm,bhmc->bhlc", weights_BHLM / jnp.where(empty_BHL1, 1, total_BHL1), value, precision="highest"
    )
    logsumexp_BHL1 = jnp.where(
        empty_BHL1, -jnp.inf, jnp.log(jnp.where(empty_BHL1, 1, total_BHL1)) + jax.lax.stop_gradient(largest_BHL1)
    )
    return context_BHLC, logsumexp_BHL1[..., 0]
