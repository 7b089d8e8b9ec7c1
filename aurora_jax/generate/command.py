"""`aurora generate`: text from a checkpoint, to the terminal as it comes or for a file of prompts."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aurora_jax.data.tokenizer import Tokenizer, tokenizer_from, tokenizer_of
from aurora_jax.data.tokenizer_files import tokenizer_sha256
from aurora_jax.errors import InputError
from aurora_jax.generate import prompts as prompts_of
from aurora_jax.generate.end_of_text import end_of_text_ids
from aurora_jax.generate.generator import Generator, check_prompts, make_inference_mesh
from aurora_jax.generate.sampling import Sampling
from aurora_jax.generate.streaming import TextStream
from aurora_jax.model.checkpoint import CheckpointMetadata, read_files, read_metadata
from aurora_jax.model.config import ComputeConfig, ModelConfig

STREAMED_STEPS, BATCHED_STEPS = 1, 32
"""Steps on the device between two looks at the text."""

DEFAULT_NEW_TOKENS = 256

SORTED_BATCHES = 16
"""Batches whose records are sorted by length together, so that little is padded; results are written in the file's order."""


@dataclass(frozen=True)
class GenerateCommand:
    """Continues a prompt, fills a gap in code, or answers an instruction; or does so for every record of a JSONL file.

    aurora generate CHECKPOINT "def fibonacci(n):"

    aurora generate CHECKPOINT --prefix "def add(a, b):" --suffix "return total"

    aurora generate CHECKPOINT --instruct "Kirjoita runo kesästä." --temperature 0.8 --top-p 0.95

    aurora generate CHECKPOINT --input prompts.jsonl --output completions.jsonl --batch-size 16
    """

    checkpoint: tyro.conf.Positional[Path]
    """A converted checkpoint, a stage of a run (RUN/stages/NAME), or a run (its newest step)."""
    prompt: tyro.conf.Positional[str | None] = None
    """Text to continue; - reads it from standard input."""
    instruct: str | None = None
    """An instruction, put into Aurora-M's template (### Instruction: ... ### Response:)."""
    prefix: str | None = None
    """Infilling: the code before the gap."""
    suffix: str | None = None
    """Infilling: the code after the gap."""
    input: Path | None = None
    """JSONL: each record has prompt, or prefix and suffix, or instruction, and what else you like."""
    output: Path | None = None
    """JSONL to be made: the records, with completion, finish_reason (eos, length or stop) and new_tokens."""
    resume: bool = False
    """Go on behind the records that the output holds already, with the same settings as before."""
    max_new_tokens: int | None = None
    """Most tokens of a completion; it ends earlier at the end-of-text token or a stop string. 256 without it, or as many as the model has
    positions for."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they are not part of it."""
    temperature: float = 0.0
    """0 always takes the best token (greedy); 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw among the k best tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw among the best tokens that hold this much probability together."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have occurred become less likely."""
    seed: int = 0
    """Of the draws. A record's depend on the seed and its line alone, not on the batch size or the devices."""
    batch_size: int = 16
    """Records at a time, with --input."""
    tokenizer: Path | None = None
    """tokenizer.json, or its folder, or a SentencePiece model, for a checkpoint that carries none."""
    allow_other_tokenizer: bool = False
    """Take `tokenizer` although the checkpoint carries another, for one that was recorded wrongly."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of weights, activations and cache; that of the checkpoint without it."""
    attention: Literal["xla", "flash"] | None = None
    """Of the prompt: flash kernels on TPU and xla elsewhere, unless you choose."""
    tensor: int | None = None
    """Devices that share one copy of the model; as many as its heads can be divided over without it. The others take rows."""

    def run(self) -> None:
        """Raises InputError before anything is compiled or loaded, if it can be known then."""
        metadata = read_metadata(self.checkpoint)
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        if any(not word for word in self.stop):
            raise InputError("A stop string is empty.")
        if self.batch_size < 1:
            raise InputError(f"--batch-size is {self.batch_size}: it must be at least 1.")
        files = read_files(self.checkpoint)
        tokenizer = self._tokenizer(files)
        eos_ids = end_of_text_ids(metadata, files, tokenizer, self.checkpoint)
        work = self._records(tokenizer, metadata.config) if self.input else self._one(tokenizer, metadata.config)
        generator = self._generator(metadata)
        if isinstance(work, list):
            self._stream(generator, tokenizer, work, sampling, eos_ids)
        else:
            self._file(generator, tokenizer, work, sampling, eos_ids)

    def _new_tokens(self, config: ModelConfig, longest_prompt: int) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return max(1, int(min(DEFAULT_NEW_TOKENS, config.longest_sequence - longest_prompt)))

    def _tokenizer(self, files: Mapping[str, bytes]) -> Tokenizer:
        if self.tokenizer is None:
            if tokenizer_sha256(files, self.checkpoint) is None:
                raise InputError(f"{self.checkpoint} has no tokenizer: name one with --tokenizer.")
            return tokenizer_of(files, self.checkpoint)
        given, own = tokenizer_from(self.tokenizer), tokenizer_sha256(files, self.checkpoint)
        if own not in (None, given.sha256) and not self.allow_other_tokenizer:
            raise InputError(
                f"{self.checkpoint} carries the tokenizer {own[:12]}, but {self.tokenizer} is {given.sha256[:12]}: its ids are "
                "not those that the weights have learned. Leave out --tokenizer, or say --allow-other-tokenizer."
            )
        return given

    def _one(self, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
        infill = self.prefix is not None or self.suffix is not None
        if [self.prompt is not None, self.instruct is not None, infill].count(True) != 1 or self.output or self.resume:
            raise InputError(
                "Give one prompt, or --instruct TEXT, or --prefix TEXT and --suffix TEXT; or --input FILE with --output FILE. "
                "`aurora generate --help` has examples."
            )
        if infill:
            tokens = prompts_of.infilling(tokenizer, self.prefix or "", self.suffix or "")
        elif self.instruct is not None:
            tokens = prompts_of.instruction(tokenizer, self.instruct)
        else:
            tokens = prompts_of.continuation(tokenizer, sys.stdin.read() if self.prompt == "-" else self.prompt or "")
        check_prompts(config, [tokens], self._new_tokens(config, len(tokens)))
        return tokens

    def _records(self, tokenizer: Tokenizer, config: ModelConfig) -> "_Records":
        assert self.input is not None
        if self.output is None or any(given is not None for given in (self.prompt, self.instruct, self.prefix, self.suffix)):
            raise InputError("--input FILE needs --output FILE, and no other prompt beside it.")
        done = _done(self.output, self.resume)
        records, prompts = [], []
        for number, line in enumerate(_lines(self.input), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise InputError("a JSON object is expected.")
                prompt = prompts_of.of_record(tokenizer, record)
                check_prompts(config, [prompt], self._new_tokens(config, len(prompt)))
            except json.JSONDecodeError as error:
                raise InputError(f"{self.input}, line {number}: not JSON: {error}.") from error
            except InputError as error:
                raise InputError(f"{self.input}, line {number}: {error}") from error
            records.append(record)
            prompts.append(prompt)
        if not records:
            raise InputError(f"{self.input} holds no records.")
        for number, (before, record) in enumerate(zip(done, records, strict=False), 1):
            if {**before, **record} != before:
                raise InputError(f"{self.output}, line {number}, is not of the record in {self.input}: it was made of another file.")
        if len(done) > len(records):
            raise InputError(f"{self.output} has {len(done)} records, {self.input} only {len(records)}: it was made of another file.")
        return _Records(records, prompts, len(done))

    def _generator(self, metadata: CheckpointMetadata) -> Generator:
        attention = self.attention or ("flash" if jax.default_backend() == "tpu" else "xla")
        dtype = self.dtype or metadata.parameter_dtype
        compute = ComputeConfig(dtype, dtype, attention)  # type: ignore[arg-type]
        mesh = make_inference_mesh(metadata.config, jax.devices(), self.tensor)
        return Generator.from_checkpoint(self.checkpoint, compute, mesh)

    def _stream(self, generator: Generator, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling, eos_ids: Sequence[int]) -> None:
        stream = TextStream(tokenizer, self.stop)

        def show(_: int, tokens: list[int]) -> bool:
            print(stream.add(tokens), end="", flush=True)
            return stream.stopped

        generator(
            [prompt],
            self._new_tokens(generator.config, len(prompt)),
            sampling=sampling,
            seeds=_seeds(self.seed, [0]),
            eos_ids=eos_ids,
            listener=show,
            every=STREAMED_STEPS,
        )
        print(stream.rest())

    def _file(self, generator: Generator, tokenizer: Tokenizer, work: "_Records", sampling: Sampling, eos_ids: Sequence[int]) -> None:
        assert self.output is not None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=Console(stderr=True)) as progress,
            self.output.open("a", encoding="utf-8") as output,
        ):
            new_tokens = self._new_tokens(generator.config, max(map(len, work.prompts)))
            task = progress.add_task(f"{self.input} -> {self.output}", total=len(work.records), completed=work.done)
            for group in _groups(work, self.batch_size):
                results: dict[int, dict[str, Any]] = {}
                for start in range(0, len(group), self.batch_size):
                    numbers = group[start : start + self.batch_size]
                    streams = [TextStream(tokenizer, self.stop) for _ in numbers]

                    def hear(row: int, tokens: list[int], streams: list[TextStream] = streams) -> bool:
                        streams[row].add(tokens)
                        return streams[row].stopped

                    completions = generator(
                        [work.prompts[number] for number in numbers],
                        new_tokens,
                        sampling=sampling,
                        seeds=_seeds(self.seed, numbers),
                        eos_ids=eos_ids,
                        batch_size=self.batch_size,
                        listener=hear,
                        every=BATCHED_STEPS,
                    )
                    for number, completion, stream in zip(numbers, completions, streams, strict=True):
                        results[number] = {
                            "completion": stream.text,
                            "finish_reason": completion.finish_reason,
                            "new_tokens": len(completion.tokens),
                        }
                    progress.advance(task, len(numbers))
                for number in sorted(group):
                    output.write(json.dumps({**work.records[number], **results[number]}, ensure_ascii=False) + "\n")
                output.flush()
                os.fsync(output.fileno())


@dataclass(frozen=True)
class _Records:
    records: list[dict[str, Any]]
    prompts: list[list[int]]
    done: int
    """Records that the output holds already."""


def _groups(work: _Records, batch_size: int) -> Iterator[list[int]]:
    """Numbers of the records of some batches, the longest prompts first: if memory does not suffice, it shows at once."""
    size = SORTED_BATCHES * batch_size
    for start in range(work.done, len(work.records), size):
        yield sorted(range(start, min(start + size, len(work.records))), key=lambda number: -len(work.prompts[number]))


def _seeds(seed: int, numbers: Sequence[int]) -> list[int]:
    return [int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) for number in numbers]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}.") from error


def _done(output: Path, resume: bool) -> list[dict[str, Any]]:
    """The records of an output that is gone on with; a line that was cut off when a process died is removed.

    Raises:
        InputError: the output exists and was not to be resumed, or it cannot be written.
    """
    if output.exists() and not resume:
        raise InputError(f"{output} exists already: add --resume to go on with it, or give another --output.")
    if not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}.")
    if not output.exists():
        return []
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        done = [json.loads(line) for line in whole.decode().splitlines()]
    except ValueError as error:
        raise InputError(f"{output} is not what this command writes: {error}.") from error
    if len(whole) < len(content):
        os.truncate(output, len(whole))
    return done
