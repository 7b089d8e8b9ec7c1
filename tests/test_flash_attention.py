"""The flash-attention kernels, interpreted, against the plain reference; isolation and causality by exact equality.

B batch, H query heads, K key/value heads, L queries, M keys, C head dim.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from aurora_jax.chips import CHIPS
from aurora_jax.data.batches.loader import Batch
from aurora_jax.errors import InputError
from aurora_jax.kernels.flash_attention import flash_attention
from aurora_jax.kernels.flash_attention.blocks import blocks_for
from aurora_jax.kernels.flash_attention.reference import reference_attention
from aurora_jax.model.attention import attention
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters, structure_of
from aurora_jax.model.likelihood import make_loss
from aurora_jax.train.config import OptimizerConfig
from aurora_jax.train.state import initial_state
from aurora_jax.train.step import make_gradient, make_train_step

HEADS = [(1, 1), (4, 1), (16, 1), (6, 2), (3, 3)]
SPLASH_LENGTH, SPLASH_HEADS, SPLASH_HEAD_DIM = 512, 4, 128


def arrays(seed: int, B: int, H: int, K: int, L: int, M: int, C: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"q": (B, H, L, C), "k": (B, K, M, C), "v": (B, K, M, C), "d_context": (B, H, L, C), "d_lse": (B, H, L)}
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32 if name == "d_lse" else dtype)
        for name, shape in shapes.items()
    }


def packed(seed: int, B: int, L: int, *, padding: int = 0):
    """Segment ids [B, L] of documents of random lengths, the last `padding` places being padding."""
    ids = np.cumsum(np.random.default_rng(seed).random((B, L)) < 3 / L, axis=1).astype(np.int32)
    ids[:, L - padding :] = -1
    return jnp.asarray(ids)


def results(function, given, **options):
    """Context, logsumexp (0 where a row sees nothing) and the gradients of q, k and v."""

    traced = {name: value for name, value in options.items() if isinstance(jax.tree.leaves(value)[0], jax.Array)}
    function = partial(function, **{name: value for name, value in options.items() if name not in traced})

    @jax.jit
    def run(given, traced):
        (context, lse), pull_back = jax.vjp(
            lambda q, k, v: function(q, k, v, **traced), given["q"], given["k"], given["v"]
        )
        empty = jnp.isneginf(lse)
        gradients = pull_back((given["d_context"].astype(context.dtype), jnp.where(empty, 0, given["d_lse"])))
        return context, jnp.where(empty, 0, lse), *gradients

    return run(given, traced)


def ours(given, **options):
    def interpreted(q, k, v, **options):
        return flash_attention(q, k, v, return_lse=True, interpret=True, **options)

    return results(interpreted, given, **options)


def assert_equal(found, expected, tolerance: float):
    for name, one, other in zip(("context", "lse", "d_q", "d_k", "d_v"), found, expected, strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=tolerance * scale, rtol=0, err_msg=name
        )


ANY = {
    "seed": st.integers(0, 2**16),
    "heads": st.sampled_from(HEADS),
    "length": st.integers(1, 700),
    "C": st.sampled_from([64, 80, 96, 128, 256]),
    "is_packed": st.booleans(),
    "alibi": st.booleans(),
    "generation": st.sampled_from(list(CHIPS)),
    "dtype": st.sampled_from([jnp.float32, jnp.bfloat16]),
    "B": st.integers(1, 2),
}


def agrees(seed, heads, length, C, is_packed, alibi, generation, dtype, B):
    given = arrays(seed, B, *heads, length, length, C, dtype)
    options = {}
    if is_packed:
        options["segment_ids"] = (packed(seed, B, length, padding=length // 7),) * 2
    if alibi:
        options["alibi_slopes"] = jnp.asarray(2.0 ** -np.arange(1, heads[0] + 1), jnp.float32)
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    assert_equal(
        ours(given, generation=generation, **options), results(reference_attention, given, **options), tolerance
    )


@settings(max_examples=8)
@given(**ANY)
@example(seed=0, heads=(1, 1), length=1, C=64, is_packed=False, alibi=False, generation="v5e", dtype=jnp.bfloat16, B=1)
def test_self_attention(**drawn):
    agrees(**drawn)


@pytest.mark.full
@settings(max_examples=60)
@given(**ANY)
def test_self_attention_of_many_shapes(**drawn):
    agrees(**drawn)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.tuples(st.integers(1, 300), st.integers(1, 600)),
    offset=st.sampled_from([0, 128, 37, 256, 300]),
    is_traced=st.booleans(),
    causal=st.booleans(),
    is_packed=st.booleans(),
)
def test_queries_at_an_offset_and_other_keys(seed, lengths, offset, is_traced, causal, is_packed):
    L, M = lengths
    given = arrays(seed, 1, 4, 2, L, M, 64)
    options = {"causal": causal, "q_offset": jnp.int32(offset) if is_traced else offset}
    if is_packed:
        options["segment_ids"] = packed(seed, 1, L), packed(seed + 1, 1, M)
    assert_equal(ours(given, **options), results(reference_attention, given, **options), 2e-5)


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_bf16_is_no_less_accurate_than_splash_attention(generation, is_packed, capsys):
    """Root-mean-square error against fp64, of ours and of JAX's splash attention (whose caller scales the
    queries), on the same inputs."""
    L, H, C = SPLASH_LENGTH, SPLASH_HEADS, SPLASH_HEAD_DIM
    given = arrays(5, 1, H, 1, L, L, C, jnp.bfloat16)
    segments_BL = packed(5, 1, L)
    options = {"segment_ids": (segments_BL, segments_BL)} if is_packed else {}
    sizes = splash_attention_kernel.BlockSizes(
        block_q=128,
        block_kv=128,
        block_kv_compute=128,
        block_q_dkv=128,
        block_kv_dkv=128,
        block_kv_dkv_compute=128,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L, L))] * H)
    splash = splash_attention_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=True)
    ids = splash_attention_kernel.SegmentIds(segments_BL[0], segments_BL[0]) if is_packed else None

    @jax.jit
    def peer(q, k, v, d_context):
        def function(q, k, v):
            return splash((q[0] * C**-0.5).astype(q.dtype), k[0, 0], v[0, 0], segment_ids=ids)[None]

        context, pull_back = jax.vjp(function, q, k, v)
        return context, *pull_back(d_context)

    with jax.numpy_rank_promotion("allow"):
        found_peer = peer(given["q"], given["k"], given["v"], given["d_context"])
    given["d_lse"] = jnp.zeros_like(given["d_lse"])
    context, _, *gradients = ours(given, generation=generation, **options)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(array, np.float64)) for name, array in given.items()}
        context_exact, _, *gradients_exact = results(reference_attention, exact, **options)
    lines = []
    for name, one, other, truth in zip(
        ("context", "d_q", "d_k", "d_v"),
        (context, *gradients),
        found_peer,
        (context_exact, *gradients_exact),
        strict=True,
    ):
        error, error_peer = (float(np.sqrt(np.mean((np.asarray(x, np.float64) - truth) ** 2))) for x in (one, other))
        lines.append((name, error, error_peer))
    with capsys.disabled():
        print(
            f"\nbf16 error, {generation}, packed={is_packed}: "
            + ", ".join(f"{n} ours {a:.2e} splash {b:.2e}" for n, a, b in lines)
        )
    for name, error, error_peer in lines:
        assert error <= error_peer, name


@pytest.mark.parametrize("is_packed", [False, True])
def test_more_keys_than_fit_into_memory(is_packed):
    """Keys that are read part by part: several resident parts a tile forward, several calls whose gradients
    are added backward."""
    given = arrays(6, 1, 8, 1, 1200, 1200, 64)
    options = {"segment_ids": (packed(6, 1, 1200),) * 2} if is_packed else {}
    whole = [blocks_for(direction, "v5e", jnp.float32, 128, 8, 1200, 1200) for direction in ("forward", "backward")]
    parts = tuple(replace(blocks, resident_keys=512) for blocks in whole)
    assert all(blocks.resident_keys > 1200 for blocks in whole)
    assert_equal(ours(given, blocks=parts, **options), results(reference_attention, given, **options), 2e-5)


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_documents_do_not_see_each_other(generation):
    """Changing document 1 leaves document 2's outputs and gradients bit-equal."""
    L, cut = 600, 333
    given = arrays(1, 1, 4, 1, L, L, 64)
    segments_BL = jnp.asarray((np.arange(L) >= cut).astype(np.int32)[None])
    changed = {name: array.at[:, :, :cut].add(1.5) for name, array in given.items()}
    for one, two in zip(
        *(ours(each, segment_ids=(segments_BL, segments_BL), generation=generation) for each in (given, changed)),
        strict=True,
    ):
        np.testing.assert_array_equal(one[:, :, cut:], two[:, :, cut:])
        assert np.any(one[:, :, :cut] != two[:, :, :cut])


@pytest.mark.parametrize("place", [5, 128, 300])
def test_causality_by_gradient(place):
    given = arrays(0, 1, 4, 1, 400, 400, 64)

    def one_output(k, v):
        return flash_attention(given["q"], k, v, interpret=True)[:, :, place].sum()

    for gradient in jax.jit(jax.grad(one_output, (0, 1)))(given["k"], given["v"]):
        assert not np.any(gradient[:, :, place + 1 :])
        assert np.all(np.any(gradient[:, :, : place + 1], axis=(0, 1, 3)))


def test_padding_gives_zeros_everywhere():
    """Rows that are all padding: zeros and zero gradients, whatever they hold."""
    given = arrays(3, 2, 4, 1, 300, 300, 64)
    segments_BL = packed(3, 2, 300, padding=60).at[1].set(-1)
    garbage = jnp.where(segments_BL[:, None, :, None] < 0, 1e15, 0.0)
    given = {name: array + garbage if array.ndim == 4 else array for name, array in given.items()}
    context, _, *gradients = ours(given, segment_ids=(segments_BL, segments_BL))
    for array in (context, *gradients):
        assert np.all(np.isfinite(array))
        np.testing.assert_array_equal(np.moveaxis(np.asarray(array), 1, 2)[np.asarray(segments_BL) < 0], 0)


def test_gradients_of_empty_rows_are_zero_whatever_comes_back_for_their_logsumexp():
    given = arrays(3, 1, 4, 1, 200, 200, 64)
    segments_BL = packed(3, 1, 200, padding=60)

    def loss(q, k, v):
        context, lse = flash_attention(q, k, v, segment_ids=segments_BL, return_lse=True, interpret=True)
        return context.sum() + (lse**2).sum()  # minus infinity squared: its gradient is not finite

    for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(given["q"], given["k"], given["v"]):
        assert np.all(np.isfinite(gradient))
        assert not np.any(gradient[:, :, 140:])


def test_two_cores_add_up():
    """v4 and v5p divide the heads of a single sequence between their two cores."""
    given = arrays(7, 1, 32, 1, 256, 256, 128)
    assert_equal(ours(given, generation="v5p"), results(reference_attention, given), 2e-5)


@pytest.mark.parametrize("is_packed", [False, True])
def test_no_race_and_no_uninitialised_memory(is_packed):
    """Pallas' TPU interpreter, which models copies and memory spaces, with its race detector on and scratch
    memory that starts as NaN."""
    given = arrays(4, 1, 4, 1, 300, 300, 128, jnp.bfloat16)
    segments_BL = packed(4, 1, 300)
    options = {"segment_ids": (segments_BL, segments_BL)} if is_packed else {}
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

    def interpreted(q, k, v, **options):
        return flash_attention(q, k, v, return_lse=True, interpret=interpret, **options)

    found = jax.block_until_ready(results(interpreted, given, **options))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found
    assert_equal(found, results(reference_attention, given, **options), 2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 3, 8, 64), "v": (1, 3, 8, 64)}, "4 query heads cannot share 3"),
        ({"k": (1, 1, 9, 64)}, "of one shape are expected"),
        ({"q": (2, 4, 8, 64)}, "differ in batch"),
        ({"q": (1, 4, 8, 320), "k": (1, 1, 8, 320), "v": (1, 1, 8, 320)}, "320 is above 256"),
        ({"segment_ids": (1, 7)}, "segment ids"),
        ({"k": (1, 1, 0, 64), "v": (1, 1, 0, 64)}, "an empty array"),
        ({"alibi_slopes": (3,)}, "one for each of 4 query heads"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (1, 4, 8, 64), "k": (1, 1, 8, 64), "v": (1, 1, 8, 64)} | change
    q, k, v = (jnp.zeros(shapes.pop(name)) for name in "qkv")
    options = {name: jnp.zeros(shape, jnp.int32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v, interpret=True, **options)


def test_a_cpu_is_told_what_to_do():
    q, k = jnp.zeros((1, 2, 8, 64)), jnp.zeros((1, 1, 8, 64))
    with pytest.raises(ValueError, match="choose the attention implementation 'xla'"):
        flash_attention(q, k, k)
    with pytest.raises(ValueError, match="all bfloat16 or all float32"):
        flash_attention(q, k.astype(jnp.float16), k.astype(jnp.float16), interpret=True)
    with pytest.raises(ValueError, match="generation 'v9'"):
        flash_attention(q, k, k, generation="v9", interpret=True)
    with pytest.raises(InputError, match="no dropout"):
        attention("flash_interpreted", q, q, q, dropout_rate=0.1, dropout_key=jax.random.key(0))


@given(
    direction=st.sampled_from(["forward", "backward"]),
    generation=st.sampled_from(list(CHIPS)),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float32]),
    head_dim=st.sampled_from([128, 256]),
    group=st.integers(1, 128),
    length=st.integers(1, 1 << 17),
)
def test_blocks_fit_together_and_into_memory(direction, generation, dtype, head_dim, group, length):
    blocks = blocks_for(direction, generation, dtype, head_dim, group, length, length)
    assert group % blocks.heads == 0
    assert blocks.queries % 128 == 0
    assert blocks.keys % blocks.queries == 0
    assert blocks.resident_keys % blocks.keys == 0
    assert blocks.rows % blocks.rows_at_once == 0
    assert blocks.rows_at_once % blocks.queries == 0 or blocks.queries % blocks.rows_at_once == 0
    assert blocks.vmem_limit <= CHIPS[generation].vmem


@pytest.mark.parametrize("is_packed", [True, pytest.param(False, marks=pytest.mark.full)])
def test_twenty_steps_of_training_agree_with_xla(is_packed):
    """The losses of a small model trained with the kernels and with `xla` attention."""
    model = ModelConfig(vocabulary_size=64, max_positions=160, width=64, layers=2, heads=2, mlp_width=128).with_dropout(
        0.0
    )
    optimizer = OptimizerConfig()
    rng = np.random.default_rng(0)
    # Sequences that can be learnt: each counts in steps of its own.
    tokens_SBL = (rng.integers(64, size=(20, 4, 1)) + rng.integers(1, 4, size=(20, 4, 1)) * np.arange(161)) % 64
    segments_SBL = np.cumsum(rng.random((20, 4, 160)) < 3 / 160, axis=2)
    losses = {}
    for implementation in ("xla", "flash_interpreted"):
        compute = ComputeConfig("float32", "float32", attention=implementation)
        loss = make_loss(structure_of(model, compute), compute, z_loss=0.0, isolate_documents=is_packed)
        step = jax.jit(
            make_train_step(make_gradient(loss, 1), optimizer, lambda step: 3e-3, dropout=False, seed=0, tasks=1)
        )
        state = initial_state(initial_parameters(model, 0), optimizer)
        losses[implementation] = []
        for tokens_BL, segments_BL in zip(tokens_SBL.astype(np.int32), segments_SBL.astype(np.int32), strict=True):
            places_BL = np.tile(np.arange(160, dtype=np.int32), (4, 1))
            batch = Batch(
                tokens_BL[:, :-1],
                tokens_BL[:, 1:],
                np.ones((4, 160), np.float32),
                segments_BL,
                places_BL,
                np.zeros(4, np.int32),
            )
            state, metrics = step(state, batch)
            losses[implementation].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["flash_interpreted"], losses["xla"], atol=1e-3, rtol=0)
    assert losses["xla"][-1] < losses["xla"][0] - 0.5
