"""What a model is: one frozen config for both families (GPTBigCode: StarCoder; BLOOM), its presets, and its
Hugging Face form both ways."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_type_hints

from aurora_jax.errors import InputError

Activation = Literal["gelu", "gelu_tanh"]
Family = Literal["gpt_bigcode", "bloom"]
"""`model_type` of the Hugging Face architectures that we read and write."""

HF_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Names of `transformers.activations.ACT2FN` that are our functions, however they are computed there; the
first of each is the one that we write for a model of our own."""

# Settings that change the function a model computes, with the only value that we implement. Flags that say
# where a softmax runs in fp32 (GPTBigCode's two, BLOOM's one) are not among them: ours always does, so either
# value is accepted and `true`
# is written.
HF_REQUIRED: dict[Family, dict[str, bool]] = {
    "gpt_bigcode": {"scale_attn_weights": True, "add_cross_attention": False, "tie_word_embeddings": True},
    "bloom": {"apply_residual_connection_post_layernorm": False, "tie_word_embeddings": True},
}

# What every BLOOM has in common: its `config.json` does not say it.
BLOOM: dict[str, Any] = {"multi_query": False, "activation": "gelu_tanh", "positions": "alibi", "embedding_norm": True}
PADDING_HINT = (
    "Pad the vocabulary: `python -m convert from-torch --vocabulary-divisible-by N`, or "
    "vocabulary_divisible_by = N in the ModelConfig."
)
"""What to do about a vocabulary that a mesh cannot divide."""

NUMBERS: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}
LARGEST = {"layers": 10_000}
"""What is looped over before anything of that size has been seen."""

BLOOM_LENGTH = 2_048
"""Tokens of the sequences that BLOOM was trained on; some published configs do not have them (`seq_length`)."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder (pre-LayerNorm, biases everywhere, tied head): GPTBigCode, BLOOM, or what
    lies between them.

    It holds what is true of the weights; how they are run (precision, attention implementation,
    rematerialisation) is `ComputeConfig`.
    """

    vocabulary_size: int
    """Tokens that there are. The token embedding, which is also the head, has a row for each, and perhaps
    some more: see `vocabulary_divisible_by`."""
    max_positions: int
    """Rows of the learned position embedding: the longest sequence that the model can read (P). With ALiBi
    the length of the sequences it was trained on, which bounds nothing."""
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
    positions: Literal["learned", "alibi"] = "learned"
    """How a token's place is told: by a learned embedding, or by a penalty on attention that grows with
    distance, at a rate of each head's own (ALiBi: Press et al. 2022, arXiv 2108.12409)."""
    embedding_norm: bool = False
    """A LayerNorm after the token embedding (BLOOM: Le Scao et al. 2022, arXiv 2211.05100)."""
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of random initial weights; residual projections get it divided by sqrt(2 N)."""
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0
    """The token that ends a text, or several: any of them does."""
    pad_token_id: int | None = None
    vocabulary_divisible_by: int = 1
    """The token embedding's rows (V) are padded to a multiple of this, so that a mesh can divide them (Megatron-LM's
    `make-vocab-size-divisible-by`). Rows of padding are zeros: no token reads them, they get neither
    probability nor gradient, and an export leaves them out."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(ModelConfig).items():
            value = getattr(self, name)
            if kind in NUMBERS and (type(value) not in NUMBERS[kind] or abs(value) > LARGEST.get(name, 2**31)):
                raise InputError(
                    f"ModelConfig.{name} is {value!r:.100}: {kind.__name__} of a model's size is expected."
                )
        for name in (
            "vocabulary_size",
            "max_positions",
            "width",
            "layers",
            "heads",
            "mlp_width",
            "vocabulary_divisible_by",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"ModelConfig.{name} is {getattr(self, name)}: it must be at least 1.")
        if self.width % self.heads:
            raise InputError(f"ModelConfig.width {self.width} is not divisible by heads {self.heads}.")
        if not all(type(i) is int for i in self.eos_token_ids):
            raise InputError(
                f"ModelConfig.eos_token_id is {self.eos_token_id!r}: a token's id, several of them, or None "
                "is expected."
            )

    @property
    def padded_vocabulary_size(self) -> int:
        """Rows of the token embedding (V)."""
        return math.ceil(self.vocabulary_size / self.vocabulary_divisible_by) * self.vocabulary_divisible_by

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        return 1 if self.multi_query else self.heads

    @property
    def longest_sequence(self) -> float:
        """Tokens of the longest sequence that the model can read: learned positions do not extrapolate, ALiBi
        has no end."""
        return self.max_positions if self.positions == "learned" else math.inf

    def with_dropout(self, rate: float) -> "ModelConfig":
        """The same model with one dropout rate in all three places."""
        return replace(self, embedding_dropout=rate, attention_dropout=rate, residual_dropout=rate)


def family_of(config: ModelConfig) -> Family:
    """The Hugging Face architecture that computes what the config says.

    Raises:
        InputError: there is none. Such a model can be trained here, but not converted.
    """
    if config.positions == "learned" and not config.embedding_norm:
        return "gpt_bigcode"
    found = {**{name: getattr(config, name) for name in BLOOM}, "mlp_width": config.mlp_width}
    required = {**BLOOM, "mlp_width": 4 * config.width}
    if found != required:
        raise InputError(
            "No Hugging Face architecture has this config: GPTBigCode has positions = 'learned' and "
            "embedding_norm = False, "
            f"BLOOM has {_listed(required)}; found {_listed(found)}."
        )
    return "bloom"


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a Hugging Face `config.json` of a GPTBigCode or BLOOM model.

    Raises:
        InputError: another architecture, a missing key, or a setting that this project does not implement.
    """
    kind = hf.get("model_type")
    if kind not in HF_REQUIRED:
        raise InputError(
            f"config.json: model_type is {kind!r} (architectures {hf.get('architectures')}); only "
            "'gpt_bigcode' (StarCoder) and 'bloom' "
            "can be read."
        )
    for key, required in HF_REQUIRED[kind].items():
        if hf.get(key, required) != required:
            raise InputError(f"config.json: {key} is {hf[key]!r}; only {required!r} is implemented.")
    return _from_gpt_bigcode(hf) if kind == "gpt_bigcode" else _from_bloom(hf)


def _from_gpt_bigcode(hf: Mapping[str, Any]) -> ModelConfig:
    activation = hf.get("activation_function", "gelu_pytorch_tanh")
    if not isinstance(activation, str) or activation not in HF_ACTIVATIONS:
        raise InputError(
            f"config.json: activation_function is {activation!r}; implemented are {', '.join(HF_ACTIVATIONS)}."
        )
    width = _required(hf, "n_embd")
    return ModelConfig(
        max_positions=_required(hf, "n_positions"),
        width=width,
        mlp_width=hf.get("n_inner") or 4 * width,
        multi_query=hf.get("multi_query", True),
        activation=HF_ACTIVATIONS[activation],
        embedding_dropout=hf.get("embd_pdrop", 0.1),
        attention_dropout=hf.get("attn_pdrop", 0.1),
        residual_dropout=hf.get("resid_pdrop", 0.1),
        **_common(hf),
    )


def _from_bloom(hf: Mapping[str, Any]) -> ModelConfig:
    width = _required(hf, "n_embed", "hidden_size")
    return ModelConfig(
        max_positions=hf.get("seq_length") or BLOOM_LENGTH,
        width=width,
        mlp_width=4 * width,
        embedding_dropout=0.0,
        attention_dropout=hf.get("attention_dropout", 0.0),
        residual_dropout=hf.get("hidden_dropout", 0.0),
        **BLOOM,
        **_common(hf),
    )


def _common(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that both families name alike."""
    return {
        "vocabulary_size": _required(hf, "vocab_size"),
        "layers": _required(hf, "n_layer", "num_hidden_layers"),
        "heads": _required(hf, "n_head", "num_attention_heads"),
        "layer_norm_epsilon": hf.get("layer_norm_epsilon", 1e-5),
        "initializer_range": hf.get("initializer_range", 0.02),
        "bos_token_id": _token_id(hf, "bos_token_id"),
        "eos_token_id": eos_token_id(hf, "config.json"),
        "pad_token_id": _token_id(hf, "pad_token_id"),
    }


def eos_token_id(hf: Mapping[str, Any], where: str) -> int | tuple[int, ...] | None:
    """The token or tokens that end a text, as config.json or generation_config.json says it: an id, a list of
    ids, or nothing.

    Raises:
        InputError: it is something else; `where` names the file.
    """
    value = hf.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or not all(type(i) is int for i in ids):
        raise InputError(f"{where}: eos_token_id is {value!r}; a token's id, a list of them or null is expected.")
    return tuple(ids) if isinstance(value, list) else value


def _token_id(hf: Mapping[str, Any], name: str) -> int | None:
    value = hf.get(name)
    if value is not None and type(value) is not int:
        raise InputError(f"config.json: {name} is {value!r}; one token's id or null is expected.")
    return value


def _required(hf: Mapping[str, Any], *names: str) -> int:
    """The value of the first of these names that the config has: BLOOM's were renamed over time."""
    for name in names:
        if hf.get(name) is not None:
            return hf[name]
    raise InputError(
        f"config.json: the key {' or '.join(map(repr, names))} is missing; a {hf['model_type']} config must have it."
    )


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in fields.items())


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The contents of `config.json` for `transformers`: the exact inverse of `from_hf_config`.

    BLOOM has no dropout after the embedding: `embedding_dropout` is not written there.

    Raises:
        InputError: no Hugging Face architecture computes what the config says.
    """
    family = family_of(config)
    common = {
        "model_type": family,
        "vocab_size": config.vocabulary_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "attention_softmax_in_fp32": True,
        **HF_REQUIRED[family],
    }
    if family == "bloom":
        return {
            "architectures": ["BloomForCausalLM"],
            **common,
            "hidden_size": config.width,
            "seq_length": config.max_positions,
            "attention_dropout": config.attention_dropout,
            "hidden_dropout": config.residual_dropout,
        }
    return {
        "architectures": ["GPTBigCodeForCausalLM"],
        **common,
        "n_positions": config.max_positions,
        "n_embd": config.width,
        "n_inner": config.mlp_width,
        "multi_query": config.multi_query,
        "num_key_value_heads": config.kv_heads,
        "activation_function": next(hf for hf, ours in HF_ACTIVATIONS.items() if ours == config.activation),
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
        "scale_attention_softmax_in_fp32": True,
    }


_STARCODER_15B = ModelConfig(
    vocabulary_size=49_152, max_positions=8_192, width=6_144, layers=40, heads=48, mlp_width=24_576
)


def _bloom(width: int, layers: int, heads: int) -> ModelConfig:
    config = ModelConfig(250_880, BLOOM_LENGTH, width, layers, heads, 4 * width, **BLOOM)
    return replace(config.with_dropout(0.0), bos_token_id=1, eos_token_id=2, pad_token_id=3)


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
    "santacoder": ModelConfig(
        49_280, 2_048, 2_048, 24, 16, 8_192, activation="gelu_tanh", bos_token_id=49_152, eos_token_id=49_152
    ),
    "bloom-560m": _bloom(1_024, 24, 16),
    "bloom-1b1": _bloom(1_536, 24, 16),
    "bloom-1b7": _bloom(2_048, 24, 16),
    "bloom-3b": _bloom(2_560, 30, 32),
    "bloom-7b1": _bloom(4_096, 30, 32),
    "bloom": _bloom(14_336, 70, 112),
}
"""Published models of both families. `aurora-m` has the 2,048 positions of the released weights,
`aurora-m-8k` those before its trim."""


@dataclass(frozen=True)
class ComputeConfig:
    """How a model is run: nothing here changes what its weights mean."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the operands of matrix products; their sums, softmax and LayerNorm statistics are fp32,
    parameters keep their own."""
    activation_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of what is kept between products (residual stream, GELU); bf16 halves memory traffic on TPU,
    fp32 is faster on CPU."""
    attention: Literal["xla", "flash", "flash_interpreted"] = "xla"
    """Attention implementation: `flash` (Pallas kernels) on TPU, `xla` on CPU; `flash_interpreted` is slow
    and meant for tests. The choice is explicit and never falls back to another."""
    rematerialisation: Literal["nothing", "products", "projections", "attention", "full", "offload"] = "nothing"
    """What a layer's backward pass does not compute again, from most memory to least: nothing is computed
    again; matrix products and the attention's output are kept; the same without the wide product of the
    feed-forward block; the attention's output only; nothing is kept but layer inputs (full). `offload` keeps
    matrix products in the host's
    memory."""
    separate_activation: bool = False
    """Compute GELU and its slope once, where its input is made, not inside the products that follow: faster
    where the vector unit is slow compared with the matrix unit (v6e), slower where it is not (v5p)."""
    row_major_residual: bool = False
    """Keep the residual stream's features next to each other in memory; otherwise the TPU compiler transposes
    it, and copies it back in
    places: 2 % faster on v5p, 10 % slower on v6e, where sums along a row cost more than copies."""
    compiler_options: tuple[tuple[str, str], ...] = ()
    """Options for the TPU compiler's training step, as pairs: (("xla_tpu_scoped_vmem_limit_kib", "98304"),)."""
    unroll_layers: bool = False
    """Compile each layer on its own instead of one scanned body: faster on CPU, slower to compile (time grows
    with depth)."""
