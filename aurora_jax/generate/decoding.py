"""Prefill and decoding with a cache of keys and values: the two programs that `Generator` compiles.

Prompts are padded on the left, so that all rows write the same slot of the cache; a token's position is its
slot less its row's padding. Parameters come as a list of layers: slices of stacked arrays would be copied at
every token.

B batch, L slots of the prompt, S slots of the cache, T new tokens, D model, H query heads, K key/value heads,
G = H / K, C head dim, Z = B K independent streams, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aurora_jax.generate.sampling import Sampling, choose
from aurora_jax.model.decoder import Decoder, Layer, merge_unstacked


class DecodingState(NamedTuple):
    """What a decoding step changes."""

    tokens_BT: jax.Array
    """New tokens, int32; what follows a row's end means nothing."""
    drawn: jax.Array
    """Tokens drawn so far, int32: of each row that has not ended."""
    lengths_B: jax.Array
    """Tokens of each row before its end-of-text token, int32."""
    limits_B: jax.Array
    """Most tokens of each row, int32."""
    finished_B: jax.Array
    """Rows that have ended: by the end-of-text token, at their limit, or by the caller."""
    unfinished: jax.Array
    """Whether any row, on any device, has not ended."""
    padding_B: jax.Array
    """Slots left of each prompt, int32."""
    seeds_B: jax.Array
    """uint32; see `sampling.choose`."""
    seen_BV: jax.Array | None
    """Tokens that have occurred, if the repetition is penalised."""
    keys: tuple[jax.Array, ...]
    """Of each layer, [Z, C, S]: as the products take them, so that the update of a slot is in place. Were
    their first two axes to be joined after it, XLA's CPU backend would make the update twice, and copy each
    cache four times a token."""
    values: tuple[jax.Array, ...]
    """Of each layer, [Z, S, C]."""


def prefill(
    structure: nnx.GraphDef,
    parameters: dict,
    tokens_BL: jax.Array,
    padding_B: jax.Array,
    seeds_B: jax.Array,
    limits_B: jax.Array,
    finished_B: jax.Array,
    *,
    slots: int,
    new_tokens: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    excluded_ids: tuple[int, ...] = (),
    batch_axes: tuple[str, ...] = (),
) -> DecodingState:
    """Reads the prompts and draws the first token.

    Args:
        structure: of the decoder (`decoder.structure_of`).
        parameters: as `unstacked` gives them.
        tokens_BL: prompts, padded on the left by `padding_B`.
        limits_B: most tokens of each row, at most `new_tokens`.
        finished_B: rows that nobody wants: they only fill the batch.
        slots: size of the cache, at least L + new_tokens - 1.
        eos_ids: tokens that end a row.
        excluded_ids: tokens that are never drawn.
        batch_axes: inside `shard_map`, the mesh axes over which rows are divided.
    """
    decoder, layers = merge_unstacked(structure, parameters)
    hidden_BLD, keys, values = read(decoder, layers, tokens_BL, padding_B)
    logits_BV = last_logits(decoder, hidden_BLD[:, -1:])
    seen_BV = None
    if sampling.repetition_penalty != 1:
        seen_BV = _occurring(tokens_BL, padding_B, logits_BV.shape[1])
    grown = partial(_grown, slots=slots)
    B = tokens_BL.shape[0]
    state = DecodingState(
        tokens_BT=jnp.zeros((B, new_tokens), jnp.int32),
        drawn=jnp.zeros((), jnp.int32),
        lengths_B=jnp.zeros(B, jnp.int32),
        limits_B=limits_B,
        finished_B=finished_B,
        unfinished=jnp.ones((), bool),
        padding_B=padding_B,
        seeds_B=seeds_B,
        seen_BV=seen_BV,
        keys=tuple(grown(cache, axis=2) for cache in keys),
        values=tuple(grown(cache, axis=1) for cache in values),
    )
    return _drawn(state, logits_BV, sampling, eos_ids, excluded_ids, batch_axes)


def decode(
    structure: nnx.GraphDef,
    parameters: dict,
    state: DecodingState,
    steps: jax.Array,
    *,
    prompt_slots: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    excluded_ids: tuple[int, ...] = (),
    batch_axes: tuple[str, ...] = (),
) -> DecodingState:
    """Draws up to `steps` more tokens of every row (int32 scalar), fewer if all rows end or T is reached. One
    loop on the device.

    Other arguments as those of `prefill`; `prompt_slots` is its L.
    """
    decoder, layers = merge_unstacked(structure, parameters)
    end = jnp.minimum(state.drawn + steps, state.tokens_BT.shape[1])

    def step(state: DecodingState) -> DecodingState:
        previous_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BT, state.drawn - 1, 1, axis=1)
        hidden_B1D, keys, values = advance(
            decoder, layers, previous_B1, state.padding_B, state.keys, state.values, slot=prompt_slots + state.drawn - 1
        )
        state = state._replace(keys=keys, values=values)
        return _drawn(state, last_logits(decoder, hidden_B1D), sampling, eos_ids, excluded_ids, batch_axes)

    return jax.lax.while_loop(lambda state: (state.drawn < end) & state.unfinished, step, state)


def read(
    decoder: Decoder, layers: list[Layer], tokens_BL: jax.Array, padding_B: jax.Array
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Whole prompts through all layers: final hidden states [B, L, D], keys [Z, C, L] and values [Z, L, C] of
    each layer."""
    slots_L = jnp.arange(tokens_BL.shape[1])
    positions_BL = jnp.maximum(slots_L[None] - padding_B[:, None], 0)
    segment_ids_BL = (slots_L[None] >= padding_B[:, None]).astype(jnp.int32)
    hidden_BLD = decoder.embed(tokens_BL, positions_BL)
    keys, values = [], []
    for layer in layers:

        def attend(query_BLHC, key_BLKC, value_BLKC, layer=layer):
            keys.append(_key_streams(key_BLKC))
            values.append(_value_streams(value_BLKC))
            return layer.attention.attend(query_BLHC, key_BLKC, value_BLKC, segment_ids_BL)

        hidden_BLD = layer(hidden_BLD, attend)
    return hidden_BLD, keys, values


def advance(
    decoder: Decoder,
    layers: list[Layer],
    tokens_B1: jax.Array,
    padding_B: jax.Array,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    *,
    slot: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """One token of each row through all layers: hidden states [B, 1, D], and the caches with this token in
    their slot."""
    # A row that ended at its limit goes on, unheard, behind the last position that the model knows.
    positions_B = (
        jnp.minimum(slot - padding_B, decoder.config.max_positions - 1)
        if decoder.config.positions == "learned"
        else slot - padding_B
    )
    hidden_B1D = decoder.embed(tokens_B1, positions_B[:, None])
    slots_S = jnp.arange(keys[0].shape[2])
    visible_BS = (slots_S[None] >= padding_B[:, None]) & (slots_S <= slot)[None]
    dtype = jnp.dtype(decoder.compute.compute_dtype)
    new_keys, new_values = [], []
    for layer, keys_ZCS, values_ZSC in zip(layers, keys, values, strict=True):

        def attend(query_B1HC, key_B1KC, value_B1KC, layer=layer, keys_ZCS=keys_ZCS, values_ZSC=values_ZSC):
            key_ZC1, value_Z1C = (
                _key_streams(key_B1KC).astype(keys_ZCS.dtype),
                _value_streams(value_B1KC).astype(values_ZSC.dtype),
            )
            keys_ZCS = jax.lax.dynamic_update_slice_in_dim(keys_ZCS, key_ZC1, slot, axis=2)
            values_ZSC = jax.lax.dynamic_update_slice_in_dim(values_ZSC, value_Z1C, slot, axis=1)
            new_keys.append(keys_ZCS)
            new_values.append(values_ZSC)
            bias_HS = None
            if layer.attention.alibi:
                bias_HS = layer.attention.alibi_slopes()[:, None] * (slots_S - slot).astype(jnp.float32)[None]
            return cached_attention(query_B1HC, keys_ZCS, values_ZSC, visible_BS, bias_HS, dtype)

        hidden_B1D = layer(hidden_B1D, attend)
    return hidden_B1D, tuple(new_keys), tuple(new_values)


def cached_attention(
    query_B1HC: jax.Array,
    keys_ZCS: jax.Array,
    values_ZSC: jax.Array,
    visible_BS: jax.Array,
    bias_HS: jax.Array | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """softmax(q k^T / sqrt(C) + bias) v of one query a row, over the visible slots of the cache; [B, 1, H, C]
    in the query's dtype.

    Operands of the two products are rounded to `dtype`; sums and softmax are fp32.
    """
    B, _, H, C = query_B1HC.shape
    Z, _, S = keys_ZCS.shape
    K = Z // B
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    query_ZGC = query_B1HC.reshape(Z, H // K, C).astype(dtype)
    scores_ZGS = product(query_ZGC, keys_ZCS.astype(dtype)) * C**-0.5
    if bias_HS is not None:
        scores_ZGS += jnp.tile(bias_HS.reshape(K, H // K, S), (B, 1, 1))
    visible_ZS = jnp.repeat(visible_BS, K, axis=0)
    scores_ZGS = jnp.where(visible_ZS[:, None], scores_ZGS, jnp.finfo(jnp.float32).min)
    weights_ZGS = jnp.exp(scores_ZGS - scores_ZGS.max(axis=-1, keepdims=True))
    context_ZGC = product(weights_ZGS.astype(dtype), values_ZSC.astype(dtype))
    context_ZGC /= weights_ZGS.sum(axis=-1, keepdims=True)
    return context_ZGC.reshape(B, 1, H, C).astype(query_B1HC.dtype)


def last_logits(decoder: Decoder, hidden_B1D: jax.Array) -> jax.Array:
    """Scores of the whole vocabulary after the last layer [B, V], fp32."""
    return decoder.division.whole_vocabulary(decoder.logits(decoder.final_norm(hidden_B1D)))[:, 0]


def unstacked(parameters: dict) -> dict:
    """The decoder's parameters with `layers` a list, one dictionary of a layer's own arrays each; inputs are
    freed one by one."""
    layers: list[dict] = [{} for _ in range(len(jax.tree.leaves(parameters["layers"])[0]))]
    outside = {name: tree for name, tree in parameters.items() if name != "layers"}
    return {**outside, "layers": _unstacked_into(layers, parameters["layers"])}


def _unstacked_into(layers: list[dict], tree: dict) -> list[dict]:
    for name, branch in tree.items():
        if isinstance(branch, dict):
            for layer, inner in zip(layers, _unstacked_into([{} for _ in layers], branch), strict=True):
                layer[name] = inner
        else:
            for layer, array in zip(layers, _split(branch), strict=True):
                layer[name] = array
            branch.delete()
    return layers


@jax.jit
def _split(stacked: jax.Array) -> list[jax.Array]:
    return [stacked[index] for index in range(stacked.shape[0])]


def _key_streams(key_BLKC: jax.Array) -> jax.Array:
    """[Z, C, L]."""
    B, L, K, C = key_BLKC.shape
    return jnp.moveaxis(key_BLKC, 1, 3).reshape(B * K, C, L)


def _value_streams(value_BLKC: jax.Array) -> jax.Array:
    """[Z, L, C]."""
    B, L, K, C = value_BLKC.shape
    return jnp.moveaxis(value_BLKC, 1, 2).reshape(B * K, L, C)


def _grown(cache: jax.Array, slots: int, axis: int) -> jax.Array:
    return jnp.pad(cache, [(0, slots - cache.shape[axis] if each == axis else 0) for each in range(cache.ndim)])


def _occurring(tokens_BL: jax.Array, padding_B: jax.Array, vocabulary_size: int) -> jax.Array:
    B, L = tokens_BL.shape
    real_BL = jnp.arange(L)[None] >= padding_B[:, None]
    return jnp.zeros((B, vocabulary_size), bool).at[jnp.arange(B)[:, None], tokens_BL].max(real_BL)


def _drawn(
    state: DecodingState,
    logits_BV: jax.Array,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    excluded_ids: tuple[int, ...],
    batch_axes: tuple[str, ...],
) -> DecodingState:
    """The state with one more token."""
    if excluded_ids:
        drawable_V = np.ones(logits_BV.shape[1], bool)
        drawable_V[list(excluded_ids)] = False
        logits_BV = jnp.where(drawable_V[None], logits_BV, -jnp.inf)
    token_B = choose(logits_BV, state.seen_BV, state.seeds_B, state.drawn, sampling)
    ended_B = state.finished_B
    for eos in eos_ids:
        ended_B |= token_B == eos
    lengths_B = state.lengths_B + ~ended_B
    ended_B |= lengths_B == state.limits_B
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)
    unfinished = ~ended_B.all()
    if batch_axes:
        unfinished = jax.lax.pmax(unfinished.astype(jnp.int32), batch_axes) > 0
    return state._replace(
        tokens_BT=jax.lax.dynamic_update_slice_in_dim(state.tokens_BT, token_B[:, None], state.drawn, axis=1),
        drawn=state.drawn + 1,
        lengths_B=lengths_B,
        finished_B=ended_B,
        unfinished=unfinished,
        seen_BV=seen_BV,
    )
