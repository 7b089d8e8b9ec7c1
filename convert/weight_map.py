"""The one map between Hugging Face's weights, GPTBigCode's and BLOOM's, and ours. It drives both directions.

N layers, D model, H query heads, K key/value heads, C head dim, F feed-forward, V vocabulary, P positions; 2
is key and value. A Hugging Face tensor is cut into *units* along its rows (a head, a feature, a token): units
are what is read, transposed and written, some megabytes at a time, so that no array and no tensor need be
whole in memory.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from aurora_jax.checkpoints.writing import CHUNK_BYTES
from aurora_jax.model.config import Family, ModelConfig, family_of
from aurora_jax.model.sharding import TABLE, dimensions, rows_of

PIECES = 8
"""A block is stored in up to so many chunks along each dimension that the mesh divides: a device then reads
little but its own part."""

LEAST_CHUNK_BYTES = CHUNK_BYTES // 64

IGNORED = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
"""Causal-mask buffers that old `.bin` files hold; they are not weights."""

PREFIX = "transformer."
"""Of all tensors but the head. Files that were saved without a head, as BLOOM's on the hub were, leave it out."""

TIED_HEAD = "lm_head.weight"

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Components that PyTorch's wrappers put into the names of what they wrap; no tensor of either family has
them itself."""


@dataclass(frozen=True)
class Row:
    """One of our parameters and the rows of the Hugging Face tensor (`nn.Linear`: [out, in]) that hold it."""

    ours: str
    """Dotted path in the sharding table."""
    hf: str
    """Name of the tensor; `{layer}` is the layer's number."""
    letters: str
    """Its dimensions in Hugging Face's order. The first one counts units, and is streamed over."""
    fused: Literal["", "query", "key_value"] = ""
    """Which part of the fused projection, `c_attn` or `query_key_value`.

    For each key/value head in turn, its rows are the queries that share the head, then its key, then its
    value. Multi-query attention (K = 1) thus has all queries, the key, the value; multi-head attention (K =
    H) has a query, a key and a value for each head.
    """

    @property
    def stacked(self) -> bool:
        return TABLE[self.ours].letters.startswith("N")

    @property
    def our_letters(self) -> str:
        """Dimensions of one layer of our parameter."""
        return TABLE[self.ours].letters.removeprefix("N")

    @property
    def unit_axis(self) -> int:
        """The dimension of `our_letters` that units are counted along."""
        return self.our_letters.index(self.letters[0])

    def hf_name(self, layer: int) -> str:
        return self.hf.format(layer=layer)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the whole Hugging Face tensor: [rows] or [rows, columns]. It has no rows that pad the vocabulary."""
        sizes = {**dimensions(config), "V": config.vocabulary_size}
        columns = self._columns(config)
        if self.fused:
            return ((sizes["H"] + 2 * sizes["K"]) * sizes["C"], *columns)
        return (sizes[self.letters[0]], *columns)

    def units(self, config: ModelConfig) -> int:
        """Units of our parameter, those that pad the vocabulary included."""
        return dimensions(config)[self.letters[0]]

    def block_units(self, config: ModelConfig, itemsize: int) -> int:
        """Units in a block, at least one: at most CHUNK_BYTES, if possible in a number of blocks that a mesh
        divides as well."""
        units = self.units(config)
        unit_bytes = math.prod(self._unit_shape(config)) * itemsize
        blocks = math.ceil(units / max(1, CHUNK_BYTES // unit_bytes))
        if blocks > 1:
            parts = math.gcd(units, PIECES)
            fitting = (
                count for count in range(blocks, 2 * blocks + parts) if count % parts == 0 and units % count == 0
            )
            blocks = next(fitting, blocks)
        return math.ceil(units / blocks)

    def blocks(self, config: ModelConfig, itemsize: int) -> Iterator[tuple[int, int]]:
        """(first, last + 1) unit of each block, in order."""
        step = self.block_units(config, itemsize)
        return ((start, min(start + step, self.units(config))) for start in range(0, self.units(config), step))

    def spans(self, config: ModelConfig, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows (first, last + 1) of the Hugging Face tensor that hold units start .. stop - 1, adjacent ones
        joined; none of padding."""
        if not self.fused:
            stop = min(stop, self.hf_shape(config)[0])
            return [(start, stop)] if start < stop else []
        sizes = dimensions(config)
        queries = sizes["H"] // sizes["K"]
        spans: list[tuple[int, int]] = []
        for unit in range(start, stop):
            if self.fused == "query":
                group, within, heads = unit // queries, unit % queries, 1
            else:
                group, within, heads = unit, queries, 2
            first = (group * (queries + 2) + within) * sizes["C"]
            last = first + heads * sizes["C"]
            if spans and spans[-1][1] == first:
                first = spans.pop()[0]
            spans.append((first, last))
        return spans

    def to_ours(self, rows: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Rows of some units [rows, ...] as a view in our order of dimensions."""
        return rows.reshape(-1, *self._unit_shape(config)).transpose(
            [self.letters.index(letter) for letter in self.our_letters]
        )

    def to_hf(self, block: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The inverse of `to_ours`: rows [rows] or [rows, columns]."""
        units_first = block.transpose([self.our_letters.index(letter) for letter in self.letters])
        return units_first.reshape(-1, *self._columns(config))

    def chunk_shape(self, config: ModelConfig, itemsize: int) -> tuple[int, ...]:
        """Shape of the stored chunks of our array, the layer dimension included: a block, or a part of one."""
        shape = list(self.block_shape(config, self.block_units(config, itemsize)))
        partition = TABLE[self.ours].partition[1 if self.stacked else 0 :]
        for axis, mesh_axes in enumerate(partition):
            if mesh_axes is None or axis == self.unit_axis:
                continue
            pieces = math.gcd(shape[axis], PIECES)
            while pieces > 1 and math.prod(shape) * itemsize < pieces * LEAST_CHUNK_BYTES:
                pieces //= 2
            shape[axis] //= pieces
        return (1, *shape) if self.stacked else tuple(shape)

    def block_shape(self, config: ModelConfig, units: int) -> tuple[int, ...]:
        """Shape of so many units of a layer in our order of dimensions."""
        sizes = dimensions(config)
        shape = [sizes[letter] for letter in self.our_letters]
        shape[self.unit_axis] = units
        return tuple(shape)

    def index(self, layer: int, start: int, stop: int) -> tuple[int | slice, ...]:
        """Where units start .. stop - 1 of a layer are in our array."""
        within = (*(slice(None),) * self.unit_axis, slice(start, stop))
        return (layer, *within) if self.stacked else within

    def origin(self, layer: int, start: int) -> tuple[int, ...]:
        """Where the units from `start` of a layer begin in our array."""
        within = tuple(start if axis == self.unit_axis else 0 for axis in range(len(self.our_letters)))
        return (layer, *within) if self.stacked else within

    def _unit_shape(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = dimensions(config)
        return tuple(sizes[letter] for letter in self.letters[1:])

    def _columns(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of a row: one number of columns for a matrix, nothing for a vector."""
        sizes = dimensions(config)
        rows = {"query": 2, "key_value": 3, "": 1}[self.fused]  # letters that count rows: HC, K2C, or one
        columns = self.letters[rows:]
        return (math.prod(sizes[letter] for letter in columns),) if columns else ()


MODULES: dict[Family, dict[str, str]] = {
    "gpt_bigcode": {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "layers.attention_norm": "h.{layer}.ln_1",
        "layers.attention.query": "h.{layer}.attn.c_attn",
        "layers.attention.key_value": "h.{layer}.attn.c_attn",
        "layers.attention.output": "h.{layer}.attn.c_proj",
        "layers.mlp_norm": "h.{layer}.ln_2",
        "layers.mlp.up": "h.{layer}.mlp.c_fc",
        "layers.mlp.down": "h.{layer}.mlp.c_proj",
        "final_norm": "ln_f",
    },
    "bloom": {
        "token_embedding": "word_embeddings",
        "embedding_norm": "word_embeddings_layernorm",
        "layers.attention_norm": "h.{layer}.input_layernorm",
        "layers.attention.query": "h.{layer}.self_attention.query_key_value",
        "layers.attention.key_value": "h.{layer}.self_attention.query_key_value",
        "layers.attention.output": "h.{layer}.self_attention.dense",
        "layers.mlp_norm": "h.{layer}.post_attention_layernorm",
        "layers.mlp.up": "h.{layer}.mlp.dense_h_to_4h",
        "layers.mlp.down": "h.{layer}.mlp.dense_4h_to_h",
        "final_norm": "ln_f",
    },
}
"""Our modules and those of each family: their weight is our kernel, embedding or scale, their bias our bias."""

LETTERS = {
    "token_embedding.embedding": "VD",
    "position_embedding.embedding": "PD",
    "embedding_norm.scale": "D",
    "embedding_norm.bias": "D",
    "layers.attention_norm.scale": "D",
    "layers.attention_norm.bias": "D",
    "layers.attention.query.kernel": "HCD",
    "layers.attention.query.bias": "HC",
    "layers.attention.key_value.kernel": "K2CD",
    "layers.attention.key_value.bias": "K2C",
    "layers.attention.output.kernel": "DHC",
    "layers.attention.output.bias": "D",
    "layers.mlp_norm.scale": "D",
    "layers.mlp_norm.bias": "D",
    "layers.mlp.up.kernel": "FD",
    "layers.mlp.up.bias": "F",
    "layers.mlp.down.kernel": "DF",
    "layers.mlp.down.bias": "D",
    "final_norm.scale": "D",
    "final_norm.bias": "D",
}
"""Each parameter's dimensions in Hugging Face's order: see `Row.letters`."""

FUSED: dict[str, Literal["query", "key_value"]] = {
    "layers.attention.query": "query",
    "layers.attention.key_value": "key_value",
}


def weight_map(config: ModelConfig) -> tuple[Row, ...]:
    """A row for each parameter of the model, named as its family names it.

    Raises:
        InputError: no Hugging Face architecture computes what the config says.
    """
    modules = MODULES[family_of(config)]
    rows = []
    for path in rows_of(config):
        module, _, name = path.rpartition(".")
        hf = f"{PREFIX}{modules[module]}.{'bias' if name == 'bias' else 'weight'}"
        rows.append(Row(path, hf, LETTERS[path], FUSED.get(module, "")))
    return tuple(rows)


def token_embedding(config: ModelConfig) -> Row:
    """The row of the token embedding, which is the tied head as well."""
    return next(row for row in weight_map(config) if row.ours == "token_embedding.embedding")


def hf_tensors(config: ModelConfig) -> dict[str, list[tuple[Row, int]]]:
    """Every Hugging Face tensor of the model, in the order of its layers, with the (row, layer) parts that it
    consists of."""
    tensors: dict[str, list[tuple[Row, int]]] = {}
    rows = weight_map(config)
    before = [row for row in rows if not row.stacked and not row.ours.startswith("final_norm")]
    stacked = [row for row in rows if row.stacked]
    after = [row for row in rows if row.ours.startswith("final_norm")]
    parts = [
        *((row, 0) for row in before),
        *((row, layer) for layer in range(config.layers) for row in stacked),
        *((row, 0) for row in after),
    ]
    for row, layer in parts:
        tensors.setdefault(row.hf_name(layer), []).append((row, layer))
    return tensors
