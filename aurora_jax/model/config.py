"""What a model of the StarCoder family is: one frozen config, its presets, and its Hugging Face form in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from aurora_jax.errors import InputError

Activation = Literal["gelu", "gelu_tanh"]

HF_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

# GPTBigCode settings that change the function a model computes, with the only value that we implement. The two softmax flags of the
# Hugging Face config say where its softmax runs in fp32; ours always does, so either value is accepted and `true` is written.
HF_REQUIRED = {"scale_attn_weights": True, "add_cross_attention": False, "tie_word_embeddings": True}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder of the GPTBigCode family (pre-LayerNorm, learned positions, tied head).

    It holds what is true of the weights; how they are run (precision, attention implementation, rematerialisation) is `ComputeConfig`.
    """

    vocabulary_size: int
    """Rows of the token embedding, which is also the head (V)."""
    max_positions: int
    """Rows of the learned position embedding: the longest sequence that the model can read (P)."""
    width: int
    """Size of the residual stream (D)."""
    layers: int
    """Decoder layers (N)."""
    heads: int
    """Query heads (H); the head dimension C is width / heads."""
    mlp_width: int
    """Hidden size of the feed-forward block (F)."""
    multi_query: bool = True
    """One key/value head shared by all query heads (Shazeer 2019, arXiv 1911.02150); otherwise one a query head."""
    activation: Activation = "gelu"
    """GELU, exact (erf) or with the tanh approximation: both occur in the family."""
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of random initial weights; residual projections get it divided by sqrt(2 N)."""
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "max_positions", "width", "layers", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise InputError(f"ModelConfig.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.width % self.heads:
            raise InputError(f"ModelConfig.width {self.width} is not divisible by heads {self.heads}.")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        return 1 if self.multi_query else self.heads

    def with_dropout(self, rate: float) -> "ModelConfig":
        """The same model with one dropout rate in all three places."""
        return replace(self, embedding_dropout=rate, attention_dropout=rate, residual_dropout=rate)


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a Hugging Face `config.json` of a GPTBigCode model.

    Raises:
        InputError: another architecture, a missing key, or a setting that this project does not implement.
    """
    kind = hf.get("model_type")
    if kind != "gpt_bigcode":
        raise InputError(
            f"config.json: model_type is {kind!r} (architectures {hf.get('architectures')}); only 'gpt_bigcode' (StarCoder) can be read."
        )
    for key, required in HF_REQUIRED.items():
        if hf.get(key, required) != required:
            raise InputError(f"config.json: {key} is {hf[key]!r}; only {required!r} is implemented.")
    activation = hf.get("activation_function", "gelu_pytorch_tanh")
    if activation not in HF_ACTIVATIONS:
        raise InputError(f"config.json: activation_function is {activation!r}; implemented are {', '.join(HF_ACTIVATIONS)}.")
    eos = hf.get("eos_token_id")
    if isinstance(eos, list):
        raise InputError(f"config.json: eos_token_id is the list {eos}; one id (or null) is expected.")
    try:
        return ModelConfig(
            vocabulary_size=hf["vocab_size"],
            max_positions=hf["n_positions"],
            width=hf["n_embd"],
            layers=hf["n_layer"],
            heads=hf["n_head"],
            mlp_width=hf.get("n_inner") or 4 * hf["n_embd"],
            multi_query=hf.get("multi_query", True),
            activation=HF_ACTIVATIONS[activation],
            layer_norm_epsilon=hf.get("layer_norm_epsilon", 1e-5),
            initializer_range=hf.get("initializer_range", 0.02),
            embedding_dropout=hf.get("embd_pdrop", 0.1),
            attention_dropout=hf.get("attn_pdrop", 0.1),
            residual_dropout=hf.get("resid_pdrop", 0.1),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=eos,
            pad_token_id=hf.get("pad_token_id"),
        )
    except KeyError as missing:
        raise InputError(f"config.json: the key {missing} is missing; a gpt_bigcode config must have it.") from None


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of `config.json` for `transformers.GPTBigCodeForCausalLM`: the exact inverse of `from_hf_config`."""
    return {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "vocab_size": config.vocabulary_size,
        "n_positions": config.max_positions,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "multi_query": config.multi_query,
        "activation_function": next(hf for hf, ours in HF_ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        **HF_REQUIRED,
    }


_STARCODER_15B = ModelConfig(vocabulary_size=49_152, max_positions=8_192, width=6_144, layers=40, heads=48, mlp_width=24_576)

PRESETS: dict[str, ModelConfig] = {
    "starcoderbase-1b": ModelConfig(49_152, 8_192, 2_048, 24, 16, 8_192, activation="gelu_tanh"),
    "starcoderbase-3b": ModelConfig(49_152, 8_192, 2_816, 36, 22, 11_264),
    "starcoderbase-7b": ModelConfig(49_152, 8_192, 4_096, 42, 32, 16_384),
    "starcoderbase-15b": _STARCODER_15B,
    "starcoder": _STARCODER_15B,
    "starcoderplus": _STARCODER_15B,
    "aurora-m": replace(_STARCODER_15B, max_positions=2_048, pad_token_id=0),
    "aurora-m-8k": replace(_STARCODER_15B, pad_token_id=0),
    "tiny_starcoder_py": ModelConfig(49_152, 8_192, 768, 20, 12, 3_072, activation="gelu_tanh"),
    "santacoder": ModelConfig(49_280, 2_048, 2_048, 24, 16, 8_192, activation="gelu_tanh", bos_token_id=49_152, eos_token_id=49_152),
}
"""Published models of the family. `aurora-m` has the 2,048 positions of the released weights, `aurora-m-8k` those before its trim."""


@dataclass(frozen=True)
class ComputeConfig:
    """How a model is run: nothing here changes what its weights mean."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the operands of matrix products; their sums, softmax and LayerNorm statistics are fp32, parameters keep their own."""
    activation_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of what is kept between products (residual stream, GELU); bf16 halves memory traffic on TPU, fp32 is faster on CPU."""
    attention: Literal["xla", "flash", "flash_interpreted"] = "xla"
    """Attention implementation: `flash` (Pallas kernels) on TPU, `xla` on CPU; `flash_interpreted` is slow and meant for tests. The choice
    is explicit and never falls back to another."""
    rematerialisation: Literal["nothing", "products", "projections", "attention", "full", "offload"] = "nothing"
    """What a layer's backward pass does not compute again, from most memory to least: nothing is computed again; matrix products and the
    attention's output are kept; the same without the wide product of the feed-forward block; the attention's output only; nothing is kept
    but layer inputs (full). `offload` keeps matrix products in the host's memory."""
    separate_activation: bool = False
    """Compute GELU and its slope once, where its input is made, not inside the products that follow: faster where the vector unit is slow
    compared with the matrix unit (v6e), slower where it is not (v5p)."""
    row_major_residual: bool = False
    """Keep the residual stream's features next to each other in memory; otherwise the TPU compiler transposes it, and copies it back in
    places: 2 % faster on v5p, 10 % slower on v6e, where sums along a row cost more than copies."""
    compiler_options: tuple[tuple[str, str], ...] = ()
    """Options for the TPU compiler's training step, as pairs: (("xla_tpu_scoped_vmem_limit_kib", "98304"),)."""
    unroll_layers: bool = False
    """Compile each layer on its own instead of one scanned body: faster on CPU, slower to compile (time grows with depth)."""
