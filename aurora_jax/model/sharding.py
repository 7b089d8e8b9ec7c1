"""The sharding table: every parameter that a decoder can have, its shape in letters, and the mesh axes that split it.

N layers, D model, H query heads, K key/value heads, C head dim, F feed-forward, V vocabulary, P positions; 2
is key and value. Mesh axes: `data` (across slices), `fsdp` and `fsdp_inner` (weights are stored in parts
along both; two axes that follow the torus let the TPU compiler reduce-scatter gradients), `sequence`,
`tensor`. Keys and values are replicated over `tensor`,
biases and LayerNorms over fsdp.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.errors import InputError
from aurora_jax.model.config import PADDING_HINT, ModelConfig

FSDP_AXES = ("fsdp", "fsdp_inner")
BATCH_AXES = ("data", *FSDP_AXES)
SEQUENCE_AXIS = "sequence"
TENSOR_AXIS = "tensor"
MESH_AXES = (*BATCH_AXES, SEQUENCE_AXIS, TENSOR_AXIS)


@dataclass(frozen=True)
class ParameterRow:
    """One row of the table."""

    letters: str
    """Shape, a letter a dimension, in the order of the array."""
    partition: PartitionSpec
    """Mesh axis of each dimension."""


TABLE: dict[str, ParameterRow] = {
    "token_embedding.embedding": ParameterRow("VD", PartitionSpec("tensor", FSDP_AXES)),
    "position_embedding.embedding": ParameterRow("PD", PartitionSpec(None, FSDP_AXES)),
    "embedding_norm.scale": ParameterRow("D", PartitionSpec(None)),
    "embedding_norm.bias": ParameterRow("D", PartitionSpec(None)),
    "layers.attention_norm.scale": ParameterRow("ND", PartitionSpec(None, None)),
    "layers.attention_norm.bias": ParameterRow("ND", PartitionSpec(None, None)),
    "layers.attention.query.kernel": ParameterRow("NDHC", PartitionSpec(None, FSDP_AXES, "tensor", None)),
    "layers.attention.query.bias": ParameterRow("NHC", PartitionSpec(None, "tensor", None)),
    "layers.attention.key_value.kernel": ParameterRow("ND2KC", PartitionSpec(None, FSDP_AXES, None, None, None)),
    "layers.attention.key_value.bias": ParameterRow("N2KC", PartitionSpec(None, None, None, None)),
    "layers.attention.output.kernel": ParameterRow("NHCD", PartitionSpec(None, "tensor", None, FSDP_AXES)),
    "layers.attention.output.bias": ParameterRow("ND", PartitionSpec(None, None)),
    "layers.mlp_norm.scale": ParameterRow("ND", PartitionSpec(None, None)),
    "layers.mlp_norm.bias": ParameterRow("ND", PartitionSpec(None, None)),
    "layers.mlp.up.kernel": ParameterRow("NDF", PartitionSpec(None, FSDP_AXES, "tensor")),
    "layers.mlp.up.bias": ParameterRow("NF", PartitionSpec(None, "tensor")),
    "layers.mlp.down.kernel": ParameterRow("NFD", PartitionSpec(None, ("tensor", *FSDP_AXES), None)),
    "layers.mlp.down.bias": ParameterRow("ND", PartitionSpec(None, None)),
    "final_norm.scale": ParameterRow("D", PartitionSpec(None)),
    "final_norm.bias": ParameterRow("D", PartitionSpec(None)),
}

OPTIONAL: dict[str, Callable[[ModelConfig], bool]] = {
    "position_embedding": lambda config: config.positions == "learned",
    "embedding_norm": lambda config: config.embedding_norm,
}
"""Modules that only some models have, by the first part of their paths."""

TENSOR_PARTIAL = ("layers.attention.key_value.kernel", "layers.attention.key_value.bias")
"""Parameters that are replicated over `tensor` but used by each device for its own heads: their gradients are
summed over it."""


def rows_of(config: ModelConfig) -> dict[str, ParameterRow]:
    """The rows of the table whose parameters one model has."""
    return {
        path: row for path, row in TABLE.items() if OPTIONAL.get(path.partition(".")[0], lambda config: True)(config)
    }


SIZES = {"D": "width", "H": "heads", "F": "mlp_width", "V": "vocabulary_size"}
"""Names in `ModelConfig` of the letters that a mesh divides."""


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Size of each letter of the table for one model."""
    return {
        "N": config.layers,
        "D": config.width,
        "H": config.heads,
        "K": config.kv_heads,
        "C": config.head_dim,
        "F": config.mlp_width,
        "V": config.padded_vocabulary_size,
        "P": config.max_positions,
        "2": 2,
    }


def parameter_shapes(config: ModelConfig, dtype: jnp.dtype | str = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape of every parameter by its dotted path, in the order of the table; nothing is allocated."""
    sizes = dimensions(config)
    shapes = {path: tuple(sizes[letter] for letter in row.letters) for path, row in rows_of(config).items()}
    return {path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in shapes.items()}


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """Where each parameter lies on a mesh, by the table; nested like the parameters."""
    return nest({path: NamedSharding(mesh, row.partition) for path, row in rows_of(config).items()})


def require_divisible(config: ModelConfig, mesh: Mesh) -> None:
    """Can every parameter be divided over a mesh as the table says?

    Raises:
        InputError: naming the first size that cannot.
    """
    sizes = dimensions(config)
    for row in rows_of(config).values():
        for letter, entry in zip(row.letters, row.partition, strict=True):
            axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if sizes[letter] % parts:
                several = " x ".join(axis for axis in axes if mesh.shape[axis] > 1)
                hint = f" {PADDING_HINT}" if letter == "V" else ""
                raise InputError(
                    f"The model's {SIZES[letter]} {sizes[letter]} cannot be divided over mesh axis {several} of size "
                    f"{parts}.{hint}"
                )


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters; the tied head is counted once, rows that pad the vocabulary are counted too."""
    return sum(math.prod(shape.shape) for shape in parameter_shapes(config).values())


def nest(flat: Mapping[str, object]) -> dict:
    """Dotted paths to the nested dictionary that checkpoints and `nnx` states use."""
    return unflatten_dict(dict(flat), sep=".")


def flatten(tree: Mapping) -> dict:
    """Nested dictionary to dotted paths; the inverse of `nest`."""
    return flatten_dict(dict(tree), sep=".")
