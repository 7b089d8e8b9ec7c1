"""Attention: one public function, named implementations, no quiet fall-back from one to another.

B batch, L sequence, H query heads, K key/value heads, G = H / K heads a group, C head dim; Z = B K
independent streams of R = L G rows of queries (or those of a block) over M keys (or those of a tile).
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.chips import CHIPS, chip_of
from aurora_jax.errors import InputError
from aurora_jax.kernels.flash_attention import flash_attention
from aurora_jax.kernels.flash_attention.ops import LARGEST_HEAD

IMPLEMENTATIONS = ("xla", "flash", "flash_interpreted")
QUERY_BLOCK = 128
EVERYONES = -1
"""Segment of keys that later queries of every segment see."""


def attention(
    implementation: str,
    query_BLHC: jax.Array,
    key_BLKC: jax.Array,
    value_BLKC: jax.Array,
    *,
    segment_ids_BL: jax.Array | None = None,
    alibi_slopes_H: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    product_dtype: jnp.dtype = jnp.float32,
    sequence_axis: str | None = None,
) -> jax.Array:
    """Causal softmax(q k^T / sqrt(C) + ALiBi) v, with the softmax in fp32.

    Operands of the two products are rounded to `product_dtype`. A query attends to keys at its own place and
    before, and, where segment ids (0 and above) are given, only to keys of its own segment. `xla` alone knows
    EVERYONES.

    Args:
        alibi_slopes_H: slope x (key place - query place) is added to the scores of each query head (Press et
            al. 2022, arXiv 2108.12409). Places are counted along the row: segments must be contiguous.
            Constants, which get no gradient;
                see `alibi_slopes`.
        implementation: `flash` runs the Pallas kernels for TPU, divided over the current mesh; `xla` is for
            CPU; `flash_interpreted` runs the kernels' program on a CPU, slowly, for tests.
        sequence_axis: inside `shard_map`, the mesh axis over which L is divided: keys and values are gathered along it.

    Returns:
        [B, L, H, C] in the queries' dtype.

    Raises:
        ValueError: unknown implementation, or key/value heads that do not divide the query heads.
        InputError: dropout, which the flash kernels do not have.
    """
    heads, kv_heads = query_BLHC.shape[2], key_BLKC.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads: not divisible.")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"Unknown attention implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}."
        )
    B, L, H, C = query_BLHC.shape
    K, G = kv_heads, heads // kv_heads
    if implementation != "xla":
        if dropout_key is not None and dropout_rate:
            raise InputError(
                f"Attention {implementation!r} has no dropout (rate {dropout_rate}): set it to 0, or choose "
                "attention 'xla'."
            )
        interpret = implementation == "flash_interpreted"
        arrays = query_BLHC, key_BLKC, value_BLKC, segment_ids_BL, alibi_slopes_H
        return _flash(*arrays, product_dtype, sequence_axis, interpret=interpret)
    if sequence_axis is not None:
        # Queries too, for simplicity: this implementation is for CPUs, where a divided sequence is only tested.
        whole_BLHC = attention(
            implementation,
            *(_gathered(array, sequence_axis) for array in (query_BLHC, key_BLKC, value_BLKC)),
            segment_ids_BL=None if segment_ids_BL is None else _gathered(segment_ids_BL, sequence_axis),
            alibi_slopes_H=alibi_slopes_H,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            product_dtype=product_dtype,
        )
        return jax.lax.dynamic_slice_in_dim(whole_BLHC, jax.lax.axis_index(sequence_axis) * L, L, axis=1)
    query_ZRC = jnp.moveaxis(query_BLHC.reshape(B, L, K, G, C), 2, 1).reshape(B * K, L * G, C)
    key_ZMC, value_ZMC = (jnp.moveaxis(array, 2, 1).reshape(B * K, L, C) for array in (key_BLKC, value_BLKC))
    segment_ids_ZM = None if segment_ids_BL is None else jnp.repeat(segment_ids_BL, K, axis=0)
    slopes_ZG = None if alibi_slopes_H is None else jnp.tile(alibi_slopes_H.reshape(K, G), (B, 1))
    dropout = (dropout_rate, dropout_key) if dropout_key is not None and dropout_rate else None
    context_ZRC = _xla(query_ZRC, key_ZMC, value_ZMC, segment_ids_ZM, slopes_ZG, dropout, product_dtype)
    return jnp.moveaxis(context_ZRC.reshape(B, K, L, G, C), 1, 2).reshape(B, L, H, C)


def require_implementation(implementation: str, head_dim: int, device_kind: str) -> None:
    """Raises InputError if the devices, or heads of this dimension, are not what an implementation is made for."""
    if implementation == "flash" and chip_of(device_kind) is None:
        raise InputError(
            f"compute.attention flash runs on TPU {', '.join(CHIPS)}, and the devices here are {device_kind!r}: choose "
            "xla."
        )
    if implementation != "xla" and head_dim > LARGEST_HEAD:
        raise InputError(
            f"compute.attention {implementation} has heads of up to {LARGEST_HEAD} dimensions, and the model's have "
            f"{head_dim}: choose xla."
        )


def alibi_slopes(heads: int) -> np.ndarray:
    """Slope of each query head [H], fp32, as BLOOM has them: 2^(-8/n), 2^(-16/n), ..., 2^-8, with n the power
    of two at or below H.

    Heads beyond the first n take every other slope of a model with 2 n heads, from its first on (Press et al.
    2022, arXiv 2108.12409, and `build_alibi_tensor` of transformers, whose base is rounded to fp32 before it
    is raised to powers; so is this one).
    """
    n = 1 << (heads.bit_length() - 1)
    base, base_between = (np.float64(np.float32(2.0 ** (-8.0 / count))) for count in (n, 2 * n))
    slopes = np.concatenate([base ** np.arange(1, n + 1), base_between ** np.arange(1, 2 * (heads - n), 2)])
    return slopes.astype(np.float32)


def _gathered(array_BL, axis: str):
    return jax.lax.all_gather(array_BL, axis, axis=1, tiled=True)


def _flash(
    query_BLHC, key_BLKC, value_BLKC, segment_ids_BL, alibi_slopes_H, product_dtype, sequence_axis, *, interpret: bool
):
    options: dict = {"segment_ids": segment_ids_BL, "alibi_slopes": alibi_slopes_H, "interpret": interpret}
    if sequence_axis is not None:
        length = query_BLHC.shape[1]
        key_BLKC, value_BLKC = (
            _gathered(array.astype(product_dtype), sequence_axis) for array in (key_BLKC, value_BLKC)
        )
        options |= {"q_offset": jax.lax.axis_index(sequence_axis) * length, "q_offset_multiple": length}
        if segment_ids_BL is not None:
            options["segment_ids"] = segment_ids_BL, _gathered(segment_ids_BL, sequence_axis)
    heads_first = (jnp.moveaxis(array.astype(product_dtype), 2, 1) for array in (query_BLHC, key_BLKC, value_BLKC))
    context_BHLC = flash_attention(*heads_first, **options)
    return jnp.moveaxis(context_BHLC, 1, 2).astype(query_BLHC.dtype)


# The implementation `xla`: blocks of queries, each against the keys up to its own end, so that what lies
# above the diagonal blocks is never computed. The heads that share a key/value head are rows of one matrix
# product (row l G + g is head g of the group at position l), so that keys and values are never repeated. As
# in flash attention (Dao et al. 2022, arXiv 2205.14135) weights are normalised after the second product, and
# the gradient takes the row sums of d_context * context; unlike it, the unnormalised weights are kept, in the
# products' precision, for the
# backward pass.


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _xla(query_ZRC, key_ZMC, value_ZMC, segment_ids_ZM, slopes_ZG, dropout, product_dtype):
    return _xla_forward(query_ZRC, key_ZMC, value_ZMC, segment_ids_ZM, slopes_ZG, dropout, product_dtype)[0]


def _xla_forward(query_ZRC, key_ZMC, value_ZMC, segment_ids_ZM, slopes_ZG, dropout, product_dtype):
    product = partial(_product, dtype=product_dtype)
    scale = query_ZRC.shape[-1] ** -0.5
    contexts, kept = [], []
    for queries, tiles in _blocks(key_ZMC.shape[1]):
        rows = _rows(queries, query_ZRC, key_ZMC)
        scores = []
        for keys in tiles:
            scores_ZRM = product("zrc,zmc->zrm", query_ZRC[:, rows], key_ZMC[:, keys])
            if slopes_ZG is not None:
                scores_ZRM += _alibi(queries, keys, slopes_ZG) / scale
            visible_ZRM = _visible(queries, keys, segment_ids_ZM, group=query_ZRC.shape[1] // key_ZMC.shape[1])
            if visible_ZRM is not None:
                scores_ZRM = jnp.where(visible_ZRM, scores_ZRM, jnp.finfo(jnp.float32).min)
            scores.append(scores_ZRM)
        largest_ZR1 = reduce(jnp.maximum, [tile.max(axis=-1, keepdims=True) for tile in scores])
        weights = [jnp.exp((tile - largest_ZR1) * scale).astype(product_dtype) for tile in scores]
        total_ZR1 = sum(tile.sum(axis=-1, keepdims=True, dtype=jnp.float32) for tile in weights)
        context_ZRC = sum(
            product("zrm,zmc->zrc", _dropped(tile, dropout, queries, keys), value_ZMC[:, keys])
            for tile, keys in zip(weights, tiles, strict=True)
        )
        contexts.append(context_ZRC / total_ZR1)
        kept.append((weights, total_ZR1))
    context_ZRC = jnp.concatenate(contexts, axis=1).astype(query_ZRC.dtype)
    return context_ZRC, (query_ZRC, key_ZMC, value_ZMC, dropout, context_ZRC, kept)


def _xla_backward(product_dtype, residuals, d_context_ZRC):
    query_ZRC, key_ZMC, value_ZMC, dropout, context_ZRC, kept = residuals
    product = partial(_product, dtype=product_dtype)
    scale = query_ZRC.shape[-1] ** -0.5
    d_queries = []
    d_key_ZMC, d_value_ZMC = (jnp.zeros(key_ZMC.shape, jnp.float32) for _ in range(2))
    for (queries, tiles), (weights, total_ZR1) in zip(_blocks(key_ZMC.shape[1]), kept, strict=True):
        rows = _rows(queries, query_ZRC, key_ZMC)
        d_sum_ZRC = d_context_ZRC[:, rows].astype(jnp.float32) / total_ZR1
        mean_ZR1 = (d_sum_ZRC * context_ZRC[:, rows].astype(jnp.float32)).sum(axis=-1, keepdims=True)
        d_query_ZRC = jnp.zeros(d_sum_ZRC.shape, jnp.float32)
        for tile_ZRM, keys in zip(weights, tiles, strict=True):
            d_value = product("zrc,zrm->zmc", d_sum_ZRC, _dropped(tile_ZRM, dropout, queries, keys))
            d_weights_ZRM = _dropped(product("zrc,zmc->zrm", d_sum_ZRC, value_ZMC[:, keys]), dropout, queries, keys)
            d_scores_ZRM = (tile_ZRM * (d_weights_ZRM - mean_ZR1) * scale).astype(product_dtype)
            d_query_ZRC += product("zrm,zmc->zrc", d_scores_ZRM, key_ZMC[:, keys])
            d_key_ZMC = d_key_ZMC.at[:, keys].add(product("zrc,zrm->zmc", query_ZRC[:, rows], d_scores_ZRM))
            d_value_ZMC = d_value_ZMC.at[:, keys].add(d_value)
        d_queries.append(d_query_ZRC)
    d_query_ZRC = jnp.concatenate(d_queries, axis=1).astype(query_ZRC.dtype)
    return d_query_ZRC, d_key_ZMC.astype(key_ZMC.dtype), d_value_ZMC.astype(value_ZMC.dtype), None, None, None


_xla.defvjp(_xla_forward, _xla_backward)


def _product(equation, left, right, dtype):
    return jnp.einsum(equation, left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32)


def _blocks(length: int) -> list[tuple[slice, list[slice]]]:
    """Each block of queries with the tiles of keys that it sees: all before it, and its own, which alone the
    diagonal crosses."""
    starts = range(0, length, QUERY_BLOCK)
    own = [slice(start, min(start + QUERY_BLOCK, length)) for start in starts]
    return [(block, [slice(0, block.start), block] if block.start else [block]) for block in own]


def _rows(queries: slice, query_ZRC, key_ZMC) -> slice:
    group = query_ZRC.shape[1] // key_ZMC.shape[1]
    return slice(queries.start * group, queries.stop * group)


def _visible(queries: slice, keys: slice, segment_ids_ZM, group: int):
    """Which keys of a tile the queries' rows may see, [Z or 1, R, M]; None if all."""
    visible_ZRM = None
    if keys.stop > queries.start:
        place_R = jnp.repeat(jnp.arange(queries.start, queries.stop), group)
        visible_ZRM = (place_R[:, None] >= jnp.arange(keys.start, keys.stop)[None, :])[None]
    if segment_ids_ZM is not None:
        keys_Z1M = segment_ids_ZM[:, None, keys]
        same_ZRM = jnp.repeat(segment_ids_ZM[:, queries], group, axis=1)[:, :, None] == keys_Z1M
        same_ZRM |= keys_Z1M == EVERYONES
        visible_ZRM = same_ZRM if visible_ZRM is None else visible_ZRM & same_ZRM
    return visible_ZRM


def _alibi(queries: slice, keys: slice, slopes_ZG):
    """What ALiBi adds to the scores of a tile [Z, R, M], fp32. By distance, not by the keys' own places:
    those would cost the scores of neighbours, which count most, their last bits."""
    group, length = slopes_ZG.shape[1], queries.stop - queries.start
    place_R = jnp.repeat(jnp.arange(queries.start, queries.stop), group)
    distance_RM = jnp.arange(keys.start, keys.stop)[None, :] - place_R[:, None]
    return jnp.tile(slopes_ZG, (1, length))[:, :, None] * distance_RM.astype(jnp.float32)[None]


def _dropped(tile_ZRM, dropout, queries: slice, keys: slice):
    """A tile with dropout applied; the same elements are dropped whenever the same tile is asked for."""
    if dropout is None:
        return tile_ZRM
    rate, key = dropout
    keep = jax.random.bernoulli(
        jax.random.fold_in(jax.random.fold_in(key, queries.start), keys.start), 1 - rate, tile_ZRM.shape
    )
    return jnp.where(keep, tile_ZRM / (1 - rate), 0).astype(tile_ZRM.dtype)
