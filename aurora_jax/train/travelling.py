"""What a run's checkpoints carry beside the weights: its data's tokenizer, and the other files of the model
that it starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from aurora_jax.data.text.tokenizer import Tokenizer, tokenizer_of
from aurora_jax.data.text.tokenizer_files import Files, is_tokenizer_file, read_tokenizer_files, tokenizer_sha256
from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig
from aurora_jax.storage.places import Place
from aurora_jax.train.config import DataConfig


@dataclass(frozen=True)
class RunFiles:
    """The files that a run carries into its checkpoints, its stages and their exports."""

    contents: Files
    tokenizer: Tokenizer
    """What some of them are, and what the run's stores are made with."""
    tokenizer_from: Place
    """Where that was read."""
    replaced: bool = False
    """Whether it took the place of the checkpoint's own."""


def files_of_run(data: DataConfig, checkpoint: Place | None, carried: Mapping[str, bytes]) -> RunFiles:
    """Compares the tokenizer of the data with that of the checkpoint.

    Args:
        data: its `tokenizer`, if given, is the data's; otherwise the checkpoint's is.
        checkpoint: that the run starts from or goes on from; None for random weights.
        carried: the files of that checkpoint.

    Raises:
        InputError: there is no tokenizer, or there are two that differ and `allow_other_tokenizer` is False.
    """
    own = None if checkpoint is None else tokenizer_sha256(carried, checkpoint)
    if data.tokenizer is None:
        if checkpoint is None or own is None:
            raise InputError(
                f"There is no tokenizer{f' in {checkpoint}' if checkpoint else ''}: give --data.tokenizer (a "
                "tokenizer.json, a "
                "SentencePiece model, a folder, or the word bytes)."
            )
        return RunFiles(dict(carried), tokenizer_of(carried, checkpoint), checkpoint)
    given = read_tokenizer_files(data.tokenizer)
    tokenizer = tokenizer_of(given, data.tokenizer)
    if own == tokenizer.sha256:
        return RunFiles(dict(carried), tokenizer, data.tokenizer)
    if own is not None and not data.allow_other_tokenizer:
        raise InputError(
            f"{checkpoint} carries the tokenizer {own[:12]}, but that of the data, {data.tokenizer}, is "
            f"{tokenizer.sha256[:12]}: its ids are not those that the weights have learned. Leave out "
            "--data.tokenizer to take "
            "the checkpoint's; or, where an old model gets a new vocabulary, say --data.allow-other-tokenizer."
        )
    replaced = own is not None
    # Of a tokenizer that goes, no part stays; nor does what names tokens by the ids of its vocabulary.
    stays = {name: content for name, content in carried.items() if not is_tokenizer_file(name)}
    if replaced:
        stays.pop("generation_config.json", None)
    if gone := sorted({*carried} - {*stays, *given}):
        which = f"{data.tokenizer} ({tokenizer.sha256[:12]})"
        print(f"tokenizer: {which}; not carried on from {checkpoint}: {', '.join(gone)}", flush=True)
    return RunFiles({**stays, **given}, tokenizer, data.tokenizer, replaced)


def with_end_of(tokenizer: Tokenizer, model: ModelConfig, where: str | Place, *, new: bool) -> ModelConfig:
    """The model with the end-of-text token with which the stores close their documents.

    Args:
        tokenizer: of the data.
        model: whose config names the token or tokens that end a text.
        where: the config is from, for messages.
        new: the vocabulary is new to the weights: theirs is then the tokenizer's end of text and no other.
            Otherwise the config stays as it came, and a difference is said.
    """
    ids, eos = model.eos_token_ids, tokenizer.eos_id
    if ids == (eos,) or (eos in ids and not new):
        return model
    said = f"eos: documents of the data end with the token {eos}; {where} has eos_token_id {model.eos_token_id}"
    if new:
        print(f"{said}: the run's checkpoints say {eos}", flush=True)
        return replace(model, eos_token_id=eos, bos_token_id=None, pad_token_id=None)
    print(f"{said}: `aurora generate` stops at either, an export at what it has", flush=True)
    return model
