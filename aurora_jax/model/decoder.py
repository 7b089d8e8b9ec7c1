"""The decoder: GPTBigCode and BLOOM in Flax NNX, its layers stacked on a leading axis and scanned.

B batch, L sequence, D model, H query heads, K key/value heads, C head dim, F feed-forward, V vocabulary, N layers.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from aurora_jax.errors import InputError
from aurora_jax.model.activation import gelu
from aurora_jax.model.attention import alibi_slopes, attention
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.division import WHOLE, Division
from aurora_jax.model.norm import LayerNorm
from aurora_jax.model.product import Linear, einsum
from aurora_jax.model.sharding import TABLE, flatten, parameter_shapes

ATTENTION = ("attention_context", "attention_logsumexp")
PROJECTIONS = (*ATTENTION, "query", "key_value", "attention_output")
REMATERIALISATION = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION),
    "projections": jax.checkpoint_policies.save_only_these_names(*PROJECTIONS),
    "products": jax.checkpoint_policies.save_only_these_names(*PROJECTIONS, "feed_forward"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(ATTENTION),
        names_which_can_be_offloaded=["query", "key_value", "attention_output", "feed_forward"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


Attend = Callable[..., jax.Array]
"""`attend(query_BLHC, key_BLKC, value_BLKC) -> context_BLHC`, with `dropout_key=` where there is dropout."""


class Attention(nnx.Module):
    """Multi-head or multi-query self-attention with learned biases everywhere, and ALiBi where the config
    asks for it."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, division: Division, rngs: nnx.Rngs):
        self.compute = compute
        self.division = division
        self.dropout_rate = config.attention_dropout
        self.alibi = config.positions == "alibi"
        self.heads = config.heads
        D, H, K, C = config.width, config.heads, config.kv_heads, config.head_dim
        linear = partial(Linear, compute=compute, rngs=rngs)
        init = nnx.initializers.normal(config.initializer_range)
        self.query = linear("bld,dhc->blhc", (D, H, C), (H, C), name="query", kernel_init=init)
        self.key_value = linear("bld,dzkc->blzkc", (D, 2, K, C), (2, K, C), name="key_value", kernel_init=init)
        residual = partial(
            linear, kernel_init=_residual_init(config), sums=division, row_major=compute.row_major_residual
        )
        self.output = residual("blhc,hcd->bld", (H, C, D), (D,), name="attention_output")

    def __call__(self, hidden_BLD: jax.Array, attend: Attend, dropout_key: jax.Array | None) -> jax.Array:
        if self.division.tensor is not None and dropout_key is not None:
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(self.division.tensor))
        dropout = {} if dropout_key is None else {"dropout_key": dropout_key}
        return self.output(attend(*self.project(hidden_BLD), **dropout))

    def project(self, hidden_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, H, C], keys and values [B, L, K, C]; of this device's own heads where they are divided."""
        hidden_BLD = self.division.enter(hidden_BLD)
        query_BLHC, key_value_BL2KC = self.query(hidden_BLD), self.key_value(hidden_BLD)
        if self.division.tensor is not None:
            key_value_BL2KC = self.division.own_heads(key_value_BL2KC, axis=3)
        return query_BLHC, key_value_BL2KC[:, :, 0], key_value_BL2KC[:, :, 1]

    def attend(
        self,
        query_BLHC: jax.Array,
        key_BLKC: jax.Array,
        value_BLKC: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """What each query finds at its own place and before [B, L, H, C], of what `project` gave."""
        return attention(
            self.compute.attention,
            query_BLHC,
            key_BLKC,
            value_BLKC,
            segment_ids_BL=segment_ids_BL,
            alibi_slopes_H=self.alibi_slopes(),
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
            product_dtype=jnp.dtype(self.compute.compute_dtype),
            sequence_axis=self.division.sequence,
        )

    def alibi_slopes(self) -> jax.Array | None:
        """Of this device's own heads [H], fp32; None without ALiBi."""
        return self.division.own_heads(jnp.asarray(alibi_slopes(self.heads)), axis=0) if self.alibi else None


class MLP(nnx.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, division: Division, rngs: nnx.Rngs):
        self.division = division
        self.approximate = config.activation == "gelu_tanh"
        self.separate = compute.separate_activation
        linear = partial(Linear, compute=compute, rngs=rngs)
        D, F = config.width, config.mlp_width
        init = nnx.initializers.normal(config.initializer_range)
        self.up = linear("bld,df->blf", (D, F), (F,), name="feed_forward", kernel_init=init)
        residual = partial(
            linear, kernel_init=_residual_init(config), sums=division, row_major=compute.row_major_residual
        )
        self.down = residual("blf,fd->bld", (F, D), (D,), name="feed_forward_output")

    def __call__(self, hidden_BLD: jax.Array) -> jax.Array:
        return self.down(gelu(self.up(self.division.enter(hidden_BLD)), self.approximate, self.separate))


class Layer(nnx.Module):
    """Pre-LayerNorm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, division: Division, rngs: nnx.Rngs):
        norm = partial(
            LayerNorm, config.width, epsilon=config.layer_norm_epsilon, dtype=jnp.dtype(compute.activation_dtype)
        )
        self.attention_norm = norm()
        self.attention = Attention(config, compute, division, rngs)
        self.mlp_norm = norm()
        self.mlp = MLP(config, compute, division, rngs)
        self.dropout = nnx.Dropout(config.residual_dropout)

    def __call__(self, hidden_BLD: jax.Array, attend: Attend, dropout_key: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, L, D] after the layer.

        Args:
            attend: what queries find, of what `Attention.project` gives: `self.attention.attend` with its segments, or,
                in decoding, one that keeps keys and values.
            dropout_key: dropout is applied if a key is given; `attend` gets it as a keyword.
        """
        in_attention, after_attention, after_mlp = (
            (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        )
        drop = partial(self.dropout, deterministic=dropout_key is None)
        hidden_BLD += drop(self.attention(self.attention_norm(hidden_BLD), attend, in_attention), rngs=after_attention)
        return hidden_BLD + drop(self.mlp(self.mlp_norm(hidden_BLD)), rngs=after_mlp)


class Decoder(nnx.Module):
    """The whole model. Parameters are fp32 unless loaded otherwise; see `TABLE` in `sharding.py` for their
    paths and shapes."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rngs: nnx.Rngs, division: Division = WHOLE):
        self.config = config
        self.compute = compute
        self.division = division
        dtype = jnp.dtype(compute.activation_dtype)
        embed = partial(nnx.Embed, features=config.width, dtype=dtype, rngs=rngs)
        embedding_init = nnx.initializers.normal(config.initializer_range)
        self.token_embedding = embed(config.padded_vocabulary_size, embedding_init=_padded_init(embedding_init, config))
        norm = partial(LayerNorm, config.width, epsilon=config.layer_norm_epsilon, dtype=dtype)
        if config.positions == "learned":
            self.position_embedding = embed(config.max_positions, embedding_init=embedding_init)
        if config.embedding_norm:
            self.embedding_norm = norm()
        self.dropout = nnx.Dropout(config.embedding_dropout)
        self.layers = nnx.vmap(lambda rngs: Layer(config, compute, division, rngs))(rngs.split(config.layers))
        self.final_norm = norm()

    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        gathered_layers: dict | None = None,
    ) -> jax.Array:
        """Final hidden states [B, L, D], after the last LayerNorm; `logits` maps them to the vocabulary.

        Args:
            tokens_BL: token ids.
            positions_BL: row of the position embedding for each token; 0 .. L-1 without it. Values are the
                caller's promise to be below `max_positions`: they are data, and cannot be checked in a
                compiled program. ALiBi does
                    not need them: its distances
                are those of places in the row, which within a segment are the same.
            segment_ids_BL: tokens attend within their own segment only. Left padding is a segment of its own.
            dropout_key: dropout is applied if a key is given.
            gathered_layers: the layers' stacked parameters as `Division.gather` gives them, so that they are
                not gathered here.

        Raises:
            InputError: L is greater than `max_positions`, where positions are learned: they do not extrapolate.
        """
        L = tokens_BL.shape[1]
        whole_L = L if self.division.sequence is None else L * jax.lax.axis_size(self.division.sequence)
        if self.config.longest_sequence < whole_L:
            raise InputError(
                f"The sequence has {whole_L} tokens; this model has learned only {self.config.max_positions} positions."
            )
        embedding_key, layers_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        hidden_BLD = self.embed(tokens_BL, positions_BL)
        hidden_BLD = self.dropout(hidden_BLD, deterministic=dropout_key is None, rngs=embedding_key)

        structure, stacked = nnx.split(self.layers)
        product_dtype = jnp.dtype(self.compute.compute_dtype)

        def apply_layer(hidden_BLD, of_layer):
            parameters, gathered, index = of_layer
            whole = self.division.of_layer(nnx.to_pure_dict(parameters), gathered, dtype=product_dtype)
            layer = nnx.merge(structure, _state(whole))
            attend = partial(layer.attention.attend, segment_ids_BL=segment_ids_BL)
            key = None if layers_key is None else jax.random.fold_in(layers_key, index)
            return layer(hidden_BLD, attend, key), None

        if self.compute.rematerialisation != "nothing":
            apply_layer = jax.checkpoint(
                apply_layer, policy=REMATERIALISATION[self.compute.rematerialisation], prevent_cse=False
            )
        N = self.config.layers
        hidden_BLD, _ = jax.lax.scan(
            apply_layer,
            hidden_BLD,
            (stacked, gathered_layers, jnp.arange(N)),
            unroll=N if self.compute.unroll_layers else 1,
        )
        return self.final_norm(hidden_BLD)

    def embed(self, tokens_BL: jax.Array, positions_BL: jax.Array | None) -> jax.Array:
        """What goes into the first layer [B, L, D]; arguments as those of `__call__`."""
        B, L = tokens_BL.shape
        dtype = jnp.dtype(self.compute.activation_dtype)
        hidden_BLD = self.division.embed(self.token_embedding.embedding[...], tokens_BL).astype(dtype)
        if self.config.positions == "learned":
            if positions_BL is None:
                positions_BL = jnp.broadcast_to(jnp.arange(L) + self.division.place(L), (B, L))
            hidden_BLD += jnp.take(self.position_embedding.embedding[...], positions_BL, axis=0).astype(dtype)
        return self.embedding_norm(hidden_BLD) if self.config.embedding_norm else hidden_BLD

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """Scores of the vocabulary [B, L, V] by the tied head, accumulated and returned in fp32; -inf for
        rows of padding.

        On a mesh whose `tensor` axis divides the vocabulary: of this device's rows.
        """
        embedding_VD = self.token_embedding.embedding[...]
        logits_BLV = einsum("bld,vd->blv", hidden_BLD, embedding_VD, jnp.dtype(self.compute.compute_dtype))
        if self.config.padded_vocabulary_size == self.config.vocabulary_size:
            return logits_BLV
        tokens_V = jnp.arange(embedding_VD.shape[0]) + self.division.first_token(embedding_VD.shape[0])
        return jnp.where(tokens_V < self.config.vocabulary_size, logits_BLV, -jnp.inf)


def initial_parameters(config: ModelConfig, seed: int) -> dict:
    """Random parameters as a nested dictionary: GPT-2's scheme (Radford et al. 2019), reproducible from the seed."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, ComputeConfig(), rngs=nnx.Rngs(seed)), nnx.Param))


def structure_of(config: ModelConfig, compute: ComputeConfig, division: Division = WHOLE) -> nnx.GraphDef:
    """The decoder without its parameters; nothing is allocated. `merge` joins the two."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, compute, rngs=nnx.Rngs(0), division=division)))[0]


def merge(structure: nnx.GraphDef, parameters: dict) -> Decoder:
    """A decoder that uses the given parameters (nested dictionary of arrays, traced ones included)."""
    return nnx.merge(structure, _state(parameters))


def merge_unstacked(structure: nnx.GraphDef, parameters: dict) -> tuple[Decoder, list[Layer]]:
    """As `merge`, of parameters whose `layers` is a list: the decoder, to embed, normalise and score with,
    and its layers one by one."""
    decoder = merge(structure, {**parameters, "layers": parameters["layers"][0]})
    layer_structure, _ = nnx.split(decoder.layers)
    return decoder, [nnx.merge(layer_structure, _state(layer)) for layer in parameters["layers"]]


def check_parameters(config: ModelConfig, parameters: dict) -> None:
    """Raises InputError unless the tree has exactly the parameters of this config, each of its shape."""
    expected, found = parameter_shapes(config), flatten(parameters)
    for path in [*expected, *found]:
        if path not in found:
            raise InputError(f"The checkpoint lacks the parameter {path} {expected[path].shape}.")
        if path not in expected:
            raise InputError(f"The checkpoint holds {path} {found[path].shape}, which the model does not have.")
        if expected[path].shape != found[path].shape:
            raise InputError(
                f"{path} has the shape {found[path].shape}; the config asks for {expected[path].shape} "
                f"({TABLE[path].letters})."
            )


def _state(parameters: dict) -> nnx.State:
    return nnx.State(jax.tree.map(nnx.Param, parameters))


def _padded_init(init: nnx.Initializer, config: ModelConfig) -> nnx.Initializer:
    """The token embedding's: tokens get what they would get without padding, and rows of padding are zeros."""
    padding = config.padded_vocabulary_size - config.vocabulary_size
    if not padding:
        return init
    return lambda key, shape, dtype: jnp.pad(
        init(key, (config.vocabulary_size, *shape[1:]), dtype), ((0, padding), (0, 0))
    )


def _residual_init(config: ModelConfig) -> nnx.Initializer:
    return nnx.initializers.normal(config.initializer_range / math.sqrt(2 * config.layers))
