"""What a checkpoint says about itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from aurora_jax.errors import Damaged, InputError
from aurora_jax.model.config import ModelConfig, from_hf_config
from aurora_jax.storage.places import Location
from aurora_jax.storage.records import SHA256, described, with_digest, without_digest

FORMAT_VERSION = 2
UNPROVED = 1
"""The format of versions until 2026-11-25, without checksums: what it holds cannot be held to anything."""

ARCHITECTURE = (
    "vocabulary_size",
    "padded_vocabulary_size",
    "max_positions",
    "width",
    "layers",
    "heads",
    "mlp_width",
    "multi_query",
    "activation",
    "positions",
    "embedding_norm",
    "layer_norm_epsilon",
)
"""Fields of ModelConfig that the weights depend on; the others (dropout, token ids, ...) may differ between a
checkpoint and its use, and so may `max_positions` where positions are not learned."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint's items hold."""

    checksums: dict[str, dict[str, str]]
    """By item, then by the array's dotted path; see `checksums.py`."""
    sha256: dict[str, str]
    """Of the items that are JSON; see `json_sha256`."""
    bytes: dict[str, int]
    """Of every item: of its arrays in memory, of its JSON as text."""

    @property
    def items(self) -> set[str]:
        """Their names."""
        return {*self.bytes}


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says about itself."""

    config: ModelConfig
    parameter_dtype: str
    """Name of the dtype of every parameter: float32 or bfloat16."""
    hf_config: dict[str, Any] | None = None
    """The source's `config.json`, verbatim, so that an export keeps keys which are none of our business."""
    tokenizer_sha256: str | None = None
    """What tells its tokenizer apart: see `aurora_jax/data/text/tokenizer_files.py`."""
    source: dict[str, Any] | None = None
    """Where the weights came from: {"path": ..., "files": {name: bytes}}."""
    step: int = 0
    stage: str | None = None
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """Stages that the weights went through, the oldest first."""
    made_with: dict[str, str] = field(default_factory=dict, compare=False)
    """Revision of the code, versions of jax, libtpu and Orbax."""
    contents: Contents | None = field(default=None, compare=False)
    """What the items are held to; filled in where they are written. None in checkpoints of format 1."""
    layer_stacking: str = "stacked"
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes; the inverse of `from_json`. It carries its own digest."""
        return with_digest(asdict(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: Location = "metadata") -> "CheckpointMetadata":
        """Reads and checks what `to_json` wrote; `where` names the checkpoint in messages.

        Raises:
            InputError: a missing or unknown key, a value of a wrong type, another format version or layout,
                or a source `config.json` which describes another model than the config.
            Damaged: it is not what was written.
        """
        values, has_digest = without_digest(values, f"{where}: metadata")
        version = values.get("format_version")
        if not has_digest and version == FORMAT_VERSION:
            raise Damaged(f"{where}: metadata has no {SHA256}: it is damaged.")
        if version not in (UNPROVED, FORMAT_VERSION):
            raise InputError(
                f"{where}: checkpoint format {version!r}; this version reads {UNPROVED} and {FORMAT_VERSION}."
            )
        metadata = described(values, cls, f"{where}: metadata")
        if metadata.layer_stacking != "stacked":
            raise InputError(f"{where}: layer_stacking is {metadata.layer_stacking!r}; only 'stacked' can be read.")
        if metadata.hf_config is not None:
            unpadded = replace(metadata.config, vocabulary_divisible_by=1)
            require_same_architecture(
                unpadded, from_hf_config(metadata.hf_config), f"{where}: metadata 'config'", "its 'hf_config'"
            )
        return metadata


def require_same_architecture(
    found: ModelConfig, expected: ModelConfig, found_in: Location, expected_in: Location
) -> None:
    """Raises InputError, with both values, unless the two configs describe the same weights."""
    for name in ARCHITECTURE:
        if name == "max_positions" and found.positions == expected.positions != "learned":
            continue
        if getattr(found, name) != getattr(expected, name):
            raise InputError(
                f"{found_in} has {name} = {getattr(found, name)!r}, but {expected_in} has {name} = "
                f"{getattr(expected, name)!r}."
            )
