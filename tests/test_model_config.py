"""ModelConfig: published sizes, and exact inverses between ours and Hugging Face's config."""

from dataclasses import replace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurora_jax.errors import InputError
from aurora_jax.model.config import BLOOM, HF_ACTIVATIONS, PRESETS, ModelConfig, from_hf_config, to_hf_config
from aurora_jax.model.sharding import parameter_count

# Derived from the shapes of the published checkpoints; the tied head is counted once.
PARAMETERS = {
    "starcoderbase-1b": 1_137_207_296,
    "starcoderbase-3b": 3_043_311_104,
    "starcoderbase-7b": 7_327_263_232,
    "starcoderbase-15b": 15_517_456_384,
    "starcoder": 15_517_456_384,
    "starcoderplus": 15_517_456_384,
    "aurora-m": 15_479_707_648,
    "aurora-m-8k": 15_517_456_384,
    "tiny_starcoder_py": 164_144_128,
    "santacoder": 1_124_886_528,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom": 176_247_271_424,
}

gpt_bigcode_configs = st.builds(
    lambda heads, head_dim, **fields: ModelConfig(heads=heads, width=heads * head_dim, **fields),
    heads=st.integers(1, 9),
    head_dim=st.integers(1, 9),
    vocabulary_size=st.integers(1, 60_000),
    max_positions=st.integers(1, 9_000),
    layers=st.integers(1, 50),
    mlp_width=st.integers(1, 30_000),
    multi_query=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_tanh"]),
    layer_norm_epsilon=st.sampled_from([1e-5, 1e-6]),
    initializer_range=st.floats(0.001, 1),
    embedding_dropout=st.floats(0, 0.9),
    attention_dropout=st.floats(0, 0.9),
    residual_dropout=st.floats(0, 0.9),
    bos_token_id=st.none() | st.integers(0, 9),
    eos_token_id=st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    pad_token_id=st.none() | st.integers(0, 9),
)
bloom_configs = gpt_bigcode_configs.map(
    lambda config: replace(config, mlp_width=4 * config.width, embedding_dropout=0.0, **BLOOM)
)
configs = gpt_bigcode_configs | bloom_configs


def test_presets_have_the_published_sizes():
    assert {name: parameter_count(config) for name, config in PRESETS.items()} == PARAMETERS


@given(configs)
def test_from_hf_inverts_to_hf(config):
    assert from_hf_config(to_hf_config(config)) == config


@given(configs)
def test_to_hf_inverts_from_hf_through_transformers(config):
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoConfig.for_model(**to_hf_config(config)).to_dict()
    ours = to_hf_config(config)
    assert to_hf_config(from_hf_config(hf)) == ours
    assert all(hf[key] == value for key, value in ours.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"activation_function": "relu"}, "relu"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"activation_function": "gelu_10"}, "gelu_10.*gelu_new"),
        ({"activation_function": ["gelu"]}, "gelu"),
        ({"eos_token_id": []}, "eos_token_id is \\[\\]"),
        ({"eos_token_id": [0, "1"]}, "eos_token_id is .*'1'"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"pad_token_id": [0, 1]}, "pad_token_id is .0, 1"),
        ({"bos_token_id": "0"}, "bos_token_id is '0'"),
        ({"n_head": 7}, "heads 7"),
        ({"n_layer": 0}, "layers"),
    ],
)
def test_what_is_not_implemented_is_named(change, said):
    with pytest.raises(InputError, match=said):
        from_hf_config(to_hf_config(PRESETS["starcoderplus"]) | change)


def test_names_of_activations_are_those_of_transformers():
    """Every name of `transformers` that computes one of our two functions is accepted for it, and no other."""
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    ours = {
        "gelu": jax.nn.gelu(x.numpy().astype("float32"), approximate=False),
        "gelu_tanh": jax.nn.gelu(x.numpy().astype("float32")),
    }
    found = {}
    for name in activations.ACT2FN:
        if name == "prelu":  # it has a parameter
            continue
        values = activations.ACT2FN[name](x.float()).detach().numpy()
        near = [kind for kind, expected in ours.items() if abs(values - expected).max() < 4e-6]
        assert len(near) < 2
        if near:
            found[name] = near[0]
    assert found == HF_ACTIVATIONS


@pytest.mark.parametrize("name", HF_ACTIVATIONS)
def test_an_activation_by_any_name_is_read(name):
    hf = to_hf_config(PRESETS["starcoderplus"]) | {"activation_function": name}
    assert from_hf_config(hf) == replace(PRESETS["starcoderplus"], activation=HF_ACTIVATIONS[name])


def test_blooms_own_config_is_read():
    """`config.json` of bigscience/bloom-560m as published, in the names of its time."""
    hf = {
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": 250880,
    }
    assert from_hf_config(hf) == PRESETS["bloom-560m"]
    with pytest.raises(InputError, match="apply_residual_connection_post_layernorm"):
        from_hf_config(hf | {"apply_residual_connection_post_layernorm": True})


def test_what_no_hugging_face_architecture_computes_is_not_written():
    between = replace(PRESETS["starcoderplus"], positions="alibi")
    with pytest.raises(InputError, match=r"embedding_norm = True.*found multi_query = True.*embedding_norm = False"):
        to_hf_config(between)


@pytest.mark.parametrize(
    ("preset", "key"),
    [
        *(("starcoderplus", key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")),
        *(("bloom", key) for key in ("vocab_size", "hidden_size", "n_layer", "n_head")),
    ],
)
def test_a_missing_key_is_named(preset, key):
    hf = to_hf_config(PRESETS[preset])
    del hf[key]
    with pytest.raises(InputError, match=key):
        from_hf_config(hf)
