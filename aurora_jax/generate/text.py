"""Text in, text out: a checkpoint's model with the tokenizer that it carries."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from aurora_jax.checkpoints.format import read_files, read_metadata
from aurora_jax.data.text.tokenizer import Tokenizer, tokenizer_from, tokenizer_of
from aurora_jax.data.text.tokenizer_files import tokenizer_sha256
from aurora_jax.errors import InputError
from aurora_jax.generate.end_of_text import end_of_text_ids
from aurora_jax.generate.generator import (
    GREEDY,
    FinishReason,
    Generator,
    check_prompts,
    make_inference_mesh,
    prompt_slots,
)
from aurora_jax.generate.prompts import Prompt
from aurora_jax.generate.sampling import Sampling
from aurora_jax.generate.streaming import TextStream
from aurora_jax.model.config import ComputeConfig

STREAMED_STEPS, BATCHED_STEPS = 1, 32
"""Steps on the device between two looks at the text."""

DEFAULT_NEW_TOKENS = 256

SORTED_BATCHES = 16
"""Batches whose prompts are brought together by their lengths; completions come in the order of the prompts."""


@dataclass(frozen=True)
class TextSettings:
    """How prompts are continued. Raises InputError for a negative seed."""

    max_new_tokens: int | None = None
    """Most tokens of a completion; without it DEFAULT_NEW_TOKENS, or as many as the model has positions for behind a
    prompt."""
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they are not part of it."""
    seed: int = 0
    """Of the draws. Those of a prompt depend on the seed and its number alone, not on batch size or devices."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed}: it must be 0 or more.")

    def seeds(self, numbers: Sequence[int]) -> list[int]:
        """Of the draws of prompts, by their numbers; below 2^32."""
        return [int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]) for number in numbers]


@dataclass(frozen=True)
class TextCompletion:
    """What a prompt was continued with."""

    text: str
    """Up to the end-of-text token or the stop string."""
    finish_reason: FinishReason
    new_tokens: int
    """Tokens that the text is made of; one that a stop string cuts in two counts."""


class TextGenerator:
    """Continues prompts with a checkpoint's model.

    What is wrong with the checkpoint's metadata and tokenizer is found at once; weights are read when the first
    prompt comes.

    Args:
        checkpoint: a converted checkpoint, a stage of a run, or a run (its newest step).
        tokenizer: tokenizer.json, or its folder, or a SentencePiece model, for a checkpoint that carries none.
        allow_other_tokenizer: take `tokenizer` although the checkpoint carries another.
        dtype: precision of weights, activations and cache; that of the checkpoint without it.
        attention: of the prompt; flash kernels on TPU and xla elsewhere without it.
        tensor: devices that share one copy of the model: see `make_inference_mesh`.

    Raises:
        InputError: not a checkpoint, one without a tokenizer, or one that carries another than the given.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        tokenizer: Path | None = None,
        allow_other_tokenizer: bool = False,
        dtype: Literal["float32", "bfloat16"] | None = None,
        attention: Literal["xla", "flash"] | None = None,
        tensor: int | None = None,
    ):
        self._checkpoint = checkpoint
        self._metadata = read_metadata(checkpoint)
        self.config = self._metadata.config
        files = read_files(checkpoint)
        self.tokenizer = _tokenizer(files, checkpoint, tokenizer, allow_other_tokenizer)
        self._eos_ids = end_of_text_ids(self._metadata, files, self.tokenizer, checkpoint)
        self._dtype, self._attention, self._tensor = dtype, attention, tensor

    def limit(self, prompt: Prompt, max_new_tokens: int | None) -> int:
        """Most new tokens of a prompt: by what was asked and by its own length, whatever stands beside it."""
        if max_new_tokens is not None:
            return max_new_tokens
        return max(1, int(min(DEFAULT_NEW_TOKENS, self.config.longest_sequence - len(prompt.tokens))))

    def check(self, prompt: Prompt, max_new_tokens: int | None) -> None:
        """Raises InputError unless the model can continue the prompt by so many tokens; reads no weights."""
        check_prompts(self.config, [prompt.tokens], [self.limit(prompt, max_new_tokens)])

    def load(self) -> None:
        """Reads the weights, if they are not here yet. Raises InputError if they are damaged, or the devices cannot
        share the model."""
        _ = self._generator

    def stream(self, prompt: Prompt, settings: TextSettings, show: Callable[[str], object]) -> None:
        """Continues one prompt; `show` gets the text as it comes, in whole characters.

        Raises:
            InputError: more tokens than the model has positions.
        """
        stream = TextStream(self.tokenizer, settings.stop, prompt.context)

        def hear(_: int, tokens: list[int]) -> bool:
            show(stream.add(tokens))
            return stream.stopped

        self._generator(
            [prompt.tokens],
            self.limit(prompt, settings.max_new_tokens),
            sampling=settings.sampling,
            seeds=settings.seeds([0]),
            eos_ids=self._eos_ids,
            excluded_ids=self._lacking,
            listener=hear,
            every=STREAMED_STEPS,
        )
        show(stream.rest())

    def complete(
        self,
        prompts: Sequence[Prompt],
        settings: TextSettings,
        *,
        batch_size: int,
        first: int = 0,
        advance: Callable[[int], object] = lambda count: None,
    ) -> Iterator[list[TextCompletion]]:
        """Continues prompts, those that are about as long together.

        Args:
            batch_size: prompts at a time. A completion follows its own prompt, its number, the settings and this.
            first: number of the prompt to begin with; those before it have been done.
            advance: is called with a number of prompts that are done.

        Yields:
            Completions of SORTED_BATCHES batches at a time, in the order of the prompts.

        Raises:
            InputError: more tokens than the model has positions.
        """
        for start in range(first, len(prompts), SORTED_BATCHES * batch_size):
            group = range(start, min(start + SORTED_BATCHES * batch_size, len(prompts)))
            done: dict[int, TextCompletion] = {}
            for numbers in _batches(prompts, group, batch_size):
                done |= zip(numbers, self._batch(prompts, numbers, settings, batch_size), strict=True)
                advance(len(numbers))
            yield [done[number] for number in group]

    def _batch(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], settings: TextSettings, batch_size: int
    ) -> Iterator[TextCompletion]:
        batch = [prompts[number] for number in numbers]
        streams = [TextStream(self.tokenizer, settings.stop, prompt.context) for prompt in batch]

        def hear(row: int, tokens: list[int]) -> bool:
            streams[row].add(tokens)
            return streams[row].stopped

        completions = self._generator(
            [prompt.tokens for prompt in batch],
            [self.limit(prompt, settings.max_new_tokens) for prompt in batch],
            sampling=settings.sampling,
            seeds=settings.seeds(numbers),
            eos_ids=self._eos_ids,
            excluded_ids=self._lacking,
            new_tokens=settings.max_new_tokens or DEFAULT_NEW_TOKENS,
            batch_size=batch_size,
            listener=hear,
            every=BATCHED_STEPS,
        )
        for completion, stream in zip(completions, streams, strict=True):
            yield TextCompletion(stream.text, completion.finish_reason, stream.tokens)

    @cached_property
    def _lacking(self) -> list[int]:
        """Rows of a model that no token belongs to: its vocabulary was padded, or is another's."""
        ids = range(self.config.vocabulary_size)
        return [i for i in ids if not self.tokenizer.has(i) and i not in self._eos_ids]

    @cached_property
    def _generator(self) -> Generator:
        attention = self._attention or ("flash" if jax.default_backend() == "tpu" else "xla")
        dtype = self._dtype or self._metadata.parameter_dtype
        compute = ComputeConfig(dtype, dtype, attention)  # type: ignore[arg-type]
        mesh = make_inference_mesh(self.config, jax.devices(), self._tensor)
        return Generator.from_checkpoint(self._checkpoint, compute, mesh)


def _tokenizer(
    files: Mapping[str, bytes], checkpoint: Path, given: Path | None, allow_other_tokenizer: bool
) -> Tokenizer:
    own = tokenizer_sha256(files, checkpoint)
    if given is None:
        if own is None:
            raise InputError(f"{checkpoint} has no tokenizer: name one with --tokenizer.")
        return tokenizer_of(files, checkpoint)
    tokenizer = tokenizer_from(given)
    if own not in (None, tokenizer.sha256) and not allow_other_tokenizer:
        raise InputError(
            f"{checkpoint} carries the tokenizer {own[:12]}, but {given} is {tokenizer.sha256[:12]}: its ids are "
            "not those that the weights have learned. Leave out --tokenizer, or say --allow-other-tokenizer."
        )
    return tokenizer


def _batches(prompts: Sequence[Prompt], group: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    """Numbers of prompts of one program, the longest first: if memory does not suffice, it shows at once.

    A batch's prompts take as many slots each, so that the program of a prompt depends on itself: beside a longer one,
    its sums would be rounded in another order.
    """
    slots = {number: prompt_slots(prompts[number].tokens) for number in group}
    for _, alike in itertools.groupby(sorted(group, key=lambda number: -slots[number]), key=slots.__getitem__):
        numbers = list(alike)
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]
