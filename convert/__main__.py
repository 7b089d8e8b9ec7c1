"""`python -m convert from-torch | to-torch | verify`: PyTorch weights in, PyTorch weights out, and the proof
that they are the same."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from aurora_jax.errors import InputError
from convert.from_torch import ParameterDtype, from_torch, print_mapping
from convert.to_torch import to_torch
from convert.verify import verify

AGREED, DISAGREED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class FromTorch:
    """Convert a Hugging Face folder (safetensors or .bin) to a checkpoint of ours, in constant memory.

    DST appears only when it is complete. Until then everything is in the folder .NAME.partial beside it.
    Whatever ends a conversion before its time (Ctrl-C, a full disk, a killed process), the same command with
    --resume continues it, and does not repeat finished blocks.
    """

    source: tyro.conf.Positional[Path]
    """Folder with config.json and the weights, one file or sharded."""
    destination: tyro.conf.Positional[Path]
    """Checkpoint to be made. It must not exist, and appears only when it is complete."""
    dtype: ParameterDtype | None = None
    """Of the parameters. Default: that of the source, float32 for float16. bfloat16 halves the disk, and what
    a mesh has to read."""
    vocabulary_divisible_by: int = 1
    """Pad the rows of the token embedding to a multiple of this, so that a mesh whose tensor axis has n
    devices can divide them: n, or 128 for every power of two up to it (Megatron-LM's
    make-vocab-size-divisible-by). Needed for vocabularies such as 49,153. to-torch leaves the padding out."""
    weights: str | None = None
    """Name of the weight file in the folder, or of the index of its shards; needed where several could be the
    model. Without it safetensors come before .bin, as in transformers."""
    resume: bool = False
    """Continue an interrupted conversion of the same files with the same options; begin one if there is none."""
    dry_run: bool = False
    """Print the whole mapping (name, shape, dtype -> name, shape, partition) and write nothing."""

    def run(self) -> int:
        divisor, weights = self.vocabulary_divisible_by, self.weights
        if self.dry_run:
            print_mapping(self.source, self.dtype, vocabulary_divisible_by=divisor, weights=weights)
        else:
            from_torch(
                self.source,
                self.destination,
                self.dtype,
                vocabulary_divisible_by=divisor,
                weights=weights,
                resume=self.resume,
            )
        return AGREED


@dataclass(frozen=True)
class ToTorch:
    """Convert a checkpoint of ours to a Hugging Face folder that transformers and vLLM load, in constant memory.

    Rows that pad the vocabulary are left out. DST appears only when it is complete; --resume continues an
    interrupted conversion, tensor by tensor.
    """

    source: tyro.conf.Positional[Path]
    """Checkpoint, or run directory (its newest complete step)."""
    destination: tyro.conf.Positional[Path]
    """Folder to be made. It must not exist, and appears only when it is complete."""
    dtype: ParameterDtype | None = None
    """Of the written weights. Default: that of the checkpoint."""
    max_shard_size: str = "5GB"
    """Largest weight file, such as 5GB or 500MB."""
    resume: bool = False
    """Continue an interrupted conversion of the same checkpoint with the same options; begin one if there is none."""

    def run(self) -> int:
        to_torch(self.source, self.destination, self.dtype, self.max_shard_size, resume=self.resume)
        return AGREED


@dataclass(frozen=True)
class Verify:
    """Run two models on a text, in fp32, and compare their predictions. Exit status 1 if they disagree.

    Each is a Hugging Face folder or a checkpoint of ours. Both are in memory at once, in fp32.
    """

    a: tyro.conf.Positional[Path]
    """The reference model."""
    b: tyro.conf.Positional[Path]
    """The model that is judged."""
    text: Path | None = None
    """UTF-8 text to run them on. Default: a built-in text in five languages and Python."""
    weights_a: str | None = None
    """Name of A's weight file or index, where its folder has several."""
    weights_b: str | None = None
    """The same of B."""
    max_kl: float = 1e-4
    """They agree if KL(A || B) is at most this, in nats, at every token. 1e-4 fits fp32 weights; rounding to
    bfloat16 costs more."""

    def run(self) -> int:
        return (
            AGREED
            if verify(self.a, self.b, self.text, self.max_kl, weights=(self.weights_a, self.weights_b))
            else DISAGREED
        )


Command = (
    Annotated[FromTorch, tyro.conf.subcommand("from-torch")]
    | Annotated[ToTorch, tyro.conf.subcommand("to-torch")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 the models disagree, 2 bad input."""
    command: FromTorch | ToTorch | Verify = tyro.cli(Command, prog="python -m convert", args=arguments)
    # Conversion moves bytes and comparison wants true fp32: neither should occupy an accelerator.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of metadata that plain arrays do not have
    try:
        return command.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt or 'nothing was written'}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
