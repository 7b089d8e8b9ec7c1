"""The decoder against transformers' GPTBigCode and BLOOM: logits, the gradient of every parameter, greedy decoding.

B batch, L sequence, V vocabulary.
"""

import copy
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.errors import InputError
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import gelu, initial_parameters, merge, structure_of
from aurora_jax.model.loss import cross_entropy
from aurora_jax.model.norm import LayerNorm
from aurora_jax.model.sharding import flatten
from convert.__main__ import main as convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FP32 = ComputeConfig("float32", "float32")
# Odd on purpose: a prime vocabulary, n_inner not 4 x, 3 heads, and sequences that end inside the second block
# of 128 queries.
SIZES = {
    "vocab_size": 199,
    "n_positions": 211,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 3,
    "n_inner": 91,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Six heads: no power of two, so that ALiBi's slopes are of both kinds.
BLOOM_SIZES = {"vocab_size": 199, "seq_length": 211, "hidden_size": 48, "n_layer": 3, "n_head": 6}
BLOOM_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
B, L = 2, 177


def gpt_bigcode(multi_query: bool, activation: str):
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPTBigCodeConfig(**SIZES, **dropouts, multi_query=multi_query, activation_function=activation)
    return transformers.GPTBigCodeForCausalLM(config)


def bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM_SIZES, **BLOOM_TOKENS))


CASES = {
    "mqa-gelu": partial(gpt_bigcode, True, "gelu"),
    "mqa-gelu_pytorch_tanh": partial(gpt_bigcode, True, "gelu_pytorch_tanh"),
    "mha-gelu": partial(gpt_bigcode, False, "gelu"),
    "mha-gelu_pytorch_tanh": partial(gpt_bigcode, False, "gelu_pytorch_tanh"),
    "bloom": bloom,
}


def random_hf_model(case: str):
    """Weights large enough that attention is far from uniform; dropout off."""
    torch.manual_seed(0)
    model = CASES[case]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = ("ln_" in name or "layernorm" in name) and name.endswith("weight")
            parameter.normal_(1 if is_scale else 0, 0.15)
    return model


def to_ours(model, folder: Path) -> tuple[ModelConfig, dict]:
    """Config and parameters by way of the converter."""
    model.save_pretrained(folder / "hf")
    assert convert(["from-torch", str(folder / "hf"), str(folder / "ours")]) == 0
    return checkpoint.read_metadata(folder / "ours").config, restore_parameters(folder / "ours")


def with_values(model, values: list):
    """A copy of the model whose parameters are the given tensors: how gradients go through the converter."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A transformers model, our structure and our parameters of the same model."""
    model = random_hf_model(request.param)
    config, parameters = to_ours(model, tmp_path_factory.mktemp("model"))
    return model, structure_of(config, FP32), parameters


def tokens_BL(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(SIZES["vocab_size"], size=(B, L))


def our_logits(structure, parameters, tokens, attention: str = "xla", **inputs) -> np.ndarray:
    config = merge(structure, parameters).config

    @jax.jit
    def logits(parameters, tokens, inputs):
        decoder = merge(structure_of(config, replace(FP32, attention=attention)), parameters)
        return decoder.logits(decoder(tokens, **inputs))

    return np.asarray(logits(parameters, jnp.asarray(tokens), inputs))


IMPLEMENTATIONS = ("xla", "flash_interpreted")
BOTH_FAMILIES = list(itertools.product(("mqa-gelu", "bloom"), IMPLEMENTATIONS))
EVERY_CASE = [*itertools.product(CASES, ("xla",)), *(each for each in BOTH_FAMILIES if each[1] != "xla")]
of_every_case = pytest.mark.parametrize(("pair", "attention"), EVERY_CASE, indirect=["pair"])
of_both_families = pytest.mark.parametrize(("pair", "attention"), BOTH_FAMILIES, indirect=["pair"])


@of_every_case
def test_logits(pair, attention):
    model, structure, parameters = pair
    with torch.inference_mode():
        expected = model(torch.tensor(tokens_BL())).logits.numpy()
    assert np.std(expected) > 1  # not a trivial model
    np.testing.assert_allclose(our_logits(structure, parameters, tokens_BL(), attention), expected, atol=1e-4, rtol=0)


def test_given_positions(pair):
    model, structure, parameters = pair
    if model.config.model_type == "bloom":
        pytest.skip("BLOOM has no position ids")
    positions_BL = np.random.default_rng(1).integers(SIZES["n_positions"], size=(B, L))
    with torch.inference_mode():
        # An explicit mask of ones: without one, transformers takes a jump in position_ids for the start of
        # another packed document.
        expected = model(
            torch.tensor(tokens_BL()), position_ids=torch.tensor(positions_BL), attention_mask=torch.ones(B, L)
        ).logits.numpy()
    ours = our_logits(structure, parameters, tokens_BL(), positions_BL=jnp.asarray(positions_BL))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


@of_every_case
def test_left_padding(pair, attention):
    model, structure, parameters = pair
    real_BL = np.arange(L)[None, :] >= np.array([[0], [23]])
    positions_BL = np.maximum(np.cumsum(real_BL, axis=1) - 1, 0)
    their_positions = {} if model.config.model_type == "bloom" else {"position_ids": torch.tensor(positions_BL)}
    with torch.inference_mode():
        expected = model(
            torch.tensor(tokens_BL()), attention_mask=torch.tensor(real_BL).long(), **their_positions
        ).logits.numpy()
    inputs = {"positions_BL": jnp.asarray(positions_BL), "segment_ids_BL": jnp.asarray(real_BL.astype(np.int32))}
    ours = our_logits(structure, parameters, tokens_BL(), attention, **inputs)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[real_BL], expected[real_BL], atol=1e-4, rtol=0)
    alone = our_logits(structure, parameters, tokens_BL()[1:, 23:], attention)
    np.testing.assert_allclose(ours[1:, 23:], alone, atol=1e-5 * np.abs(alone).max(), rtol=0)


@of_both_families
def test_documents_in_one_row_are_as_each_alone(pair, attention):
    _, structure, parameters = pair
    lengths = (40, 110, 27)
    positions_L = np.concatenate([np.arange(length) for length in lengths])
    segments_L = np.repeat(np.arange(3, dtype=np.int32), lengths)
    inputs = {"positions_BL": jnp.asarray(positions_L)[None], "segment_ids_BL": jnp.asarray(segments_L)[None]}
    packed_LV = our_logits(structure, parameters, tokens_BL()[:1], attention, **inputs)[0]
    for document in range(3):
        here = segments_L == document
        alone_LV = our_logits(structure, parameters, tokens_BL()[:1, here], attention)[0]
        np.testing.assert_allclose(packed_LV[here], alone_LV, atol=1e-5 * np.abs(alone_LV).max(), rtol=0)


@of_both_families
def test_a_row_never_changes_another(pair, attention):
    """Other tokens and other padding beside a row leave its every bit (reported of BLOOM in bf16:
    transformers#18809)."""
    _, structure, parameters = pair
    tokens, changed = tokens_BL(), tokens_BL()
    changed[1] = tokens_BL(1)[1]
    segments_BL, others_BL = np.ones((B, L), np.int32), np.ones((B, L), np.int32)
    others_BL[1, :50] = 0
    before = our_logits(structure, parameters, tokens, attention, segment_ids_BL=jnp.asarray(segments_BL))
    after = our_logits(structure, parameters, changed, attention, segment_ids_BL=jnp.asarray(others_BL))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 1


def test_gradient_of_every_parameter(pair, tmp_path):
    model, structure, parameters = pair
    tokens = tokens_BL()
    model.zero_grad()
    expected_loss = model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    expected_loss.backward()
    _, expected = to_ours(with_values(model, [parameter.grad for parameter in model.parameters()]), tmp_path)

    def loss(parameters):
        decoder = merge(structure, parameters)
        weights_BL = jnp.ones((B, L)).at[:, -1].set(0)
        targets_BL = jnp.roll(jnp.asarray(tokens), -1, axis=1)
        hidden_BLD = decoder(jnp.asarray(tokens))
        embedding_VD = decoder.token_embedding.embedding[...]
        return cross_entropy(hidden_BLD, embedding_VD, targets_BL, weights_BL, weights_BL.sum(), dtype=jnp.float32)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(parameters)
    assert float(value) == pytest.approx(expected_loss.item(), rel=1e-5)
    expected, gradients = flatten(expected), flatten(gradients)
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected[path]) / np.linalg.norm(expected[path])
        assert error < 1e-4, (path, error)


def test_64_greedy_tokens(pair):
    model, structure, parameters = pair
    prompt = tokens_BL(2)[:, :30]
    inputs = {"attention_mask": torch.ones(B, 30, dtype=torch.long), "pad_token_id": 0}
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor(prompt), **inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False
        ).numpy()

    @jax.jit
    def next_token(tokens_BL, length):
        decoder = merge(structure, parameters)
        logits_B1V = decoder.logits(jax.lax.dynamic_slice_in_dim(decoder(tokens_BL), length - 1, 1, axis=1))
        # min_new_tokens forbids the end of text.
        return jnp.argmax(logits_B1V[:, 0].at[:, model.config.eos_token_id].set(-jnp.inf), axis=-1)

    tokens = np.zeros((B, 94), np.int32)
    tokens[:, :30] = prompt
    for length in range(30, 94):
        tokens[:, length] = next_token(tokens, length)
    np.testing.assert_array_equal(tokens, expected)


def test_learned_positions_end_and_alibi_does_not(pair):
    model, structure, parameters = pair
    tokens = np.random.default_rng(5).integers(SIZES["vocab_size"], size=(1, 300))
    if model.config.model_type != "bloom":
        with pytest.raises(InputError, match=r"212 tokens.*211 positions"):
            merge(structure, parameters)(jnp.asarray(tokens[:, :212]))
        return
    with torch.inference_mode():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(structure, parameters, tokens), expected, atol=1e-4, rtol=0)


CONFIG = ModelConfig(vocabulary_size=61, max_positions=150, width=24, layers=3, heads=3, mlp_width=40)


def value_and_gradients(compute: ComputeConfig):
    structure = structure_of(CONFIG, compute)
    tokens = np.random.default_rng(3).integers(CONFIG.vocabulary_size, size=(B, 150))

    def loss(parameters):
        decoder = merge(structure, parameters)
        return (decoder.logits(decoder(jnp.asarray(tokens))) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(initial_parameters(CONFIG, 0))


@pytest.mark.parametrize(
    "compute",
    [
        ComputeConfig("float32", "float32", unroll_layers=True),
        ComputeConfig("float32", "float32", rematerialisation="full"),
        ComputeConfig("float32", "float32", rematerialisation="attention"),
        ComputeConfig("float32", "float32", rematerialisation="projections"),
        ComputeConfig("float32", "float32", rematerialisation="products"),
        ComputeConfig("float32", "float32", rematerialisation="offload"),
        ComputeConfig("float32", "float32", separate_activation=True),
    ],
    ids=[
        "unrolled",
        "remat-full",
        "remat-attention",
        "remat-projections",
        "remat-products",
        "remat-offload",
        "separate-activation",
    ],
)
def test_how_it_is_run_does_not_change_what_it_computes(compute):
    value, gradients = value_and_gradients(compute)
    expected_value, expected = value_and_gradients(FP32)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    for path, gradient in flatten(gradients).items():
        np.testing.assert_allclose(
            gradient, flatten(expected)[path], atol=1e-6 * float(jnp.abs(gradient).max()), rtol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("activation_dtype", ["float32", "bfloat16"])
def test_bf16_products_stay_close_to_fp32(activation_dtype):
    """bf16 keeps 8 bits: a relative error of 2^-8 for each rounding, some dozens of which lie on a path
    through three layers."""
    value, gradients = value_and_gradients(ComputeConfig("bfloat16", activation_dtype))
    expected_value, expected = value_and_gradients(FP32)
    assert float(value) == pytest.approx(float(expected_value), rel=2e-2)
    assert {gradient.dtype for gradient in flatten(gradients).values()} == {jnp.dtype("float32")}
    for path, gradient in flatten(gradients).items():
        error = np.linalg.norm(gradient - flatten(expected)[path]) / np.linalg.norm(flatten(expected)[path])
        assert error < 5e-2, (path, error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_is_pytorchs_and_its_gradients_are_fp32(dtype):
    """Inputs far from zero, as a residual stream's are; PyTorch computes in fp64 from the same rounded inputs."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(3, 50, 64)) + 2, dtype)
    cotangent = jnp.asarray(rng.normal(size=inputs.shape), dtype)
    norm = LayerNorm(64, epsilon=1e-5, dtype=jnp.dtype(dtype))
    norm.scale[...], norm.bias[...] = (jnp.asarray(rng.normal(size=64), jnp.float32) for _ in range(2))
    structure, parameters = nnx.split(norm)
    output, backward = jax.vjp(lambda parameters, inputs: nnx.merge(structure, parameters)(inputs), parameters, inputs)
    of_parameters, of_inputs = backward(cotangent)

    peer = torch.nn.LayerNorm(64, eps=1e-5, dtype=torch.float64)
    for name, array in (("weight", norm.scale), ("bias", norm.bias)):
        getattr(peer, name).data = torch.tensor(np.asarray(array[...], np.float64))
    theirs = torch.tensor(np.asarray(inputs, np.float64), requires_grad=True)
    result = peer(theirs)
    result.backward(torch.tensor(np.asarray(cotangent, np.float64)))
    rounding = 1e-6 if dtype == "float32" else 2**-8
    for ours, expected, relative in (
        (output, result, rounding),
        (of_inputs, theirs.grad, rounding),
        (of_parameters["scale"][...], peer.weight.grad, 1e-5),
        (of_parameters["bias"][...], peer.bias.grad, 1e-5),
    ):
        expected = expected.detach().numpy()
        assert np.abs(np.asarray(ours, np.float64) - expected).max() <= relative * np.abs(expected).max()
    assert {gradient.dtype for gradient in jax.tree.leaves(of_parameters)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_gelu_and_its_slope_are_pytorchs(approximate, separate):
    """XLA's tanh in fp32 is good to 5e-7, which the slope of the tanh form multiplies by up to nine (at |x| = 5)."""
    x = np.linspace(-9, 9, 2001).astype(np.float32)
    value, backward = jax.vjp(lambda x: gelu(x, approximate, separate), jnp.asarray(x))
    theirs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    result = torch.nn.functional.gelu(theirs, approximate="tanh" if approximate else "none")
    result.sum().backward()
    np.testing.assert_allclose(value, result.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(backward(jnp.ones_like(x))[0], theirs.grad.numpy(), atol=5e-6 if approximate else 2e-6)


def test_initial_weights_are_gpt2s():
    parameters = flatten(initial_parameters(ModelConfig(997, 101, 64, 5, 4, 200, initializer_range=0.1), 0))
    for path, array in parameters.items():
        if path.endswith("bias"):
            assert not np.any(array)
        elif path.endswith("scale"):
            assert np.all(array == 1)
        else:
            expected = 0.1 / np.sqrt(10) if "output" in path or "down" in path else 0.1
            assert np.std(array) == pytest.approx(expected, rel=0.05), path
    kernels = parameters["layers.mlp.up.kernel"]
    assert np.any(kernels[0] != kernels[1])  # every layer has its own


def test_dropout_is_a_function_of_its_key():
    structure = structure_of(CONFIG.with_dropout(0.3), FP32)
    parameters = initial_parameters(CONFIG, 0)
    tokens = np.random.default_rng(3).integers(CONFIG.vocabulary_size, size=(1, 140))

    @jax.jit
    def hidden(key):
        return merge(structure, parameters)(jnp.asarray(tokens), dropout_key=key)

    one, again, other = hidden(jax.random.key(1)), hidden(jax.random.key(1)), hidden(jax.random.key(2))
    plain = merge(structure, parameters)(jnp.asarray(tokens))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - plain).max() > 0.1


def test_structure_allocates_nothing():
    """The 15.5B model's structure: 62 GB if anything were allocated."""
    from aurora_jax.model.config import PRESETS

    structure = structure_of(PRESETS["starcoderplus"], ComputeConfig())
    assert isinstance(structure, nnx.GraphDef)
