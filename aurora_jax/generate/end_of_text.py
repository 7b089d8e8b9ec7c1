"""The tokens at which a completion ends."""

from collections.abc import Mapping

from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.data.text.tokenizer import Tokenizer
from aurora_jax.model.config import eos_token_id
from aurora_jax.storage.places import Location
from aurora_jax.storage.records import object_in

GENERATION_CONFIG = "generation_config.json"


def end_of_text_ids(
    metadata: CheckpointMetadata, files: Mapping[str, bytes], tokenizer: Tokenizer, where: Location = "checkpoint"
) -> tuple[int, ...]:
    """Every token that ends a text, as `transformers` reads it: `eos_token_id` of generation_config.json
    where there is that file, else of config.json; an id or a list of ids.

    To these comes the tokenizer's own end of text for weights that were trained here, on documents that end
    with it, and where the files name none.

    Raises:
        InputError: generation_config.json is malformed; `where` names the checkpoint.
    """
    ids = metadata.config.eos_token_ids
    if GENERATION_CONFIG in files:
        values = object_in(files[GENERATION_CONFIG], f"{where}: {GENERATION_CONFIG}")
        value = eos_token_id(values, f"{where}: {GENERATION_CONFIG}")
        ids = () if value is None else value if isinstance(value, tuple) else (value,)
    if metadata.data_fingerprints or not ids:
        ids = (*ids, tokenizer.eos_id)
    return tuple(sorted({*ids}))
