"""Attention against a plain einsum in fp64, causality and isolation by exact equality.

B batch, L sequence, H query heads, K key/value heads, C head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_jax.model.attention import QUERY_BLOCK, alibi_slopes, attention

LENGTHS = [1, 2, 65, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 37]


def inputs(seed: int, B: int, L: int, H: int, K: int, C: int):
    rng = np.random.default_rng(seed)
    query, key, value = (rng.normal(size=(B, L, heads, C), scale=1.5) for heads in (H, K, K))
    segments_BL = np.cumsum(rng.random((B, L)) < 3 / L, axis=1).astype(np.int32)
    return query, key, value, segments_BL, rng.normal(size=query.shape)


def reference(query, key, value, segments_BL, slopes_H, d_context):
    """Context and gradients with respect to query, key and value, in fp64 numpy."""
    B, L, H, C = query.shape
    group = H // key.shape[2]
    key_BLHC, value_BLHC = (np.repeat(array, group, axis=2) for array in (key, value))
    scores = np.einsum("bqhc,bkhc->bhqk", query, key_BLHC) / np.sqrt(C)
    if slopes_H is not None:
        scores += slopes_H[:, None, None] * (np.arange(L)[None, :] - np.arange(L)[:, None])
    visible = np.tril(np.ones((L, L), bool))[None, None]
    if segments_BL is not None:
        visible = visible & (segments_BL[:, None, :, None] == segments_BL[:, None, None, :])
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = np.einsum("bhqk,bkhc->bqhc", weights, value_BLHC)
    d_value = np.einsum("bhqk,bqhc->bkhc", weights, d_context)
    d_weights = np.einsum("bqhc,bkhc->bhqk", d_context, value_BLHC)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(C)
    d_query = np.einsum("bhqk,bkhc->bqhc", d_scores, key_BLHC)
    d_key = np.einsum("bhqk,bqhc->bkhc", d_scores, query)

    def summed(gradient):
        return gradient.reshape(B, L, -1, group, C).sum(axis=3)

    return context, d_query, summed(d_key), summed(d_value)


@jax.jit
def ours(query, key, value, segments_BL, slopes_H, d_context):
    facts = {"segment_ids_BL": segments_BL, "alibi_slopes_H": slopes_H}
    context, pull_back = jax.vjp(lambda q, k, v: attention("xla", q, k, v, **facts), query, key, value)
    return context, *pull_back(d_context)


def as_fp32(*arrays):
    return tuple(
        None if array is None else jnp.asarray(array, jnp.int32 if array.dtype.kind == "i" else jnp.float32)
        for array in arrays
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    length=st.sampled_from(LENGTHS),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 1), (4, 2), (3, 3)]),
    C=st.sampled_from([3, 8, 16]),
    packed=st.booleans(),
    alibi=st.booleans(),
)
def test_values_and_gradients(seed, length, heads, C, packed, alibi):
    query, key, value, segments_BL, d_context = inputs(seed, 2, length, *heads, C)
    segments_BL = segments_BL if packed else None
    slopes_H = alibi_slopes(heads[0]) if alibi else None
    expected = reference(query, key, value, segments_BL, slopes_H, d_context)
    found = ours(*as_fp32(query, key, value, segments_BL, slopes_H, d_context))
    for name, one, other in zip(("context", "d_query", "d_key", "d_value"), found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, np.abs(other).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize("query_place", [5, QUERY_BLOCK, QUERY_BLOCK + 40])
def test_causality_by_gradient(query_place):
    query, key, value, _, _ = as_fp32(*inputs(0, 1, 2 * QUERY_BLOCK + 3, 4, 1, 8))

    def one_output(key, value):
        return attention("xla", query, key, value)[:, query_place].sum()

    for gradient in jax.grad(one_output, (0, 1))(key, value):
        assert not np.any(gradient[:, query_place + 1 :])
        assert np.all(np.any(gradient[:, : query_place + 1], axis=(0, 2, 3)))


def test_documents_do_not_see_each_other():
    """Changing document 1 leaves document 2's outputs and gradients bit-equal."""
    L, cut = 200, 90
    query, key, value, _, d_context = inputs(1, 1, L, 4, 1, 8)
    segments_BL = (np.arange(L) >= cut).astype(np.int32)[None]
    other = [array.copy() for array in (query, key, value, d_context)]
    for array in other:
        array[:, :cut] += np.random.default_rng(2).normal(size=array[:, :cut].shape)
    found = ours(*as_fp32(query, key, value, segments_BL, None, d_context))
    changed = ours(*as_fp32(*other[:3], segments_BL, None, other[3]))
    for one, two in zip(found, changed, strict=True):
        np.testing.assert_array_equal(one[:, cut:], two[:, cut:])
        assert np.any(one[:, :cut] != two[:, :cut])


def test_slopes_are_those_of_transformers():
    """For every number of heads to that of BLOOM 176B and beyond; the last bit is PyTorch's vector unit's business."""
    torch = pytest.importorskip("torch")
    modeling_bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in range(1, 130):
        # The second of two keys has the slope itself for its bias.
        theirs = modeling_bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
        np.testing.assert_array_max_ulp(alibi_slopes(heads), theirs.numpy(), maxulp=1)


def test_gradient_through_dropout_is_that_of_its_forward():
    """Against a numerical derivative with the key fixed, in fp64."""
    with jax.enable_x64(True):
        query, key, value, _, d_context = (jnp.asarray(array) for array in inputs(3, 1, 140, 2, 1, 4))
        dropout = {"dropout_rate": 0.4, "dropout_key": jax.random.key(0)}

        def loss(query, key, value):
            return (attention("xla", query, key, value, product_dtype=jnp.float64, **dropout) * d_context).sum()

        assert (
            abs(
                loss(query, key, value)
                - (attention("xla", query, key, value, product_dtype=jnp.float64) * d_context).sum()
            )
            > 1
        )
        rng = np.random.default_rng(4)
        gradients = jax.grad(loss, (0, 1, 2))(query, key, value)
        for place in range(3):
            direction = jnp.asarray(rng.normal(size=gradients[place].shape))
            arguments = [query, key, value]

            def along(step, place=place, direction=direction, arguments=arguments):
                moved = [array + step * direction if i == place else array for i, array in enumerate(arguments)]
                return loss(*moved)

            numerical = (along(1e-2) - along(-1e-2)) / 2e-2
            # The products are summed in fp32 whatever their operands, which bounds the accuracy of the difference.
            assert float(numerical) == pytest.approx(float((gradients[place] * direction).sum()), rel=1e-3, abs=1e-3)


def test_unknown_implementation_and_indivisible_heads_are_errors():
    query, key, value, _, _ = as_fp32(*inputs(0, 1, 4, 4, 1, 8))
    with pytest.raises(ValueError, match="flesh"):
        attention("flesh", query, key, value)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attention("xla", query, jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 3, 8)))
