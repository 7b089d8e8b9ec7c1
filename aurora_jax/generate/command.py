"""`aurora generate`: text from a checkpoint, to the terminal as it comes or for a file of prompts."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aurora_jax.data.tokenizer import Tokenizer, tokenizer_from
from aurora_jax.errors import InputError
from aurora_jax.generate import prompts as prompts_of
from aurora_jax.generate.generator import Generator, check_prompts, make_inference_mesh
from aurora_jax.generate.sampling import Sampling
from aurora_jax.generate.streaming import TextStream
from aurora_jax.model.checkpoint import CheckpointMetadata, read_metadata, read_tokenizer
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.storage import json_lines

RESULT = ("completion", "finish_reason", "new_tokens")
"""What a record gets."""

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
    result_prefix: str = ""
    """Stands before the names of these three fields, for records that have fields of such names: with b_ they are b_completion ..."""
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
    """tokenizer.json, or its folder, or a SentencePiece model; that of the checkpoint without it."""
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
        tokenizer = self._tokenizer()
        work = self._records(tokenizer, metadata.config) if self.input else self._one(tokenizer, metadata.config)
        generator = self._generator(metadata)
        eos_ids = sorted({tokenizer.eos_id} | ({eos} if (eos := metadata.config.eos_token_id) is not None else set()))
        if isinstance(work, list):
            self._stream(generator, tokenizer, work, sampling, eos_ids)
        else:
            self._file(generator, tokenizer, work, sampling, eos_ids)

    def _new_tokens(self, config: ModelConfig, longest_prompt: int) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return max(1, int(min(DEFAULT_NEW_TOKENS, config.longest_sequence - longest_prompt)))

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is not None:
            return tokenizer_from(self.tokenizer)
        files = read_tokenizer(self.checkpoint)
        if "tokenizer.json" not in files:
            raise InputError(f"{self.checkpoint} has no tokenizer: name one with --tokenizer.")
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                Path(folder, name).write_text(text, encoding="utf-8")
            return tokenizer_from(folder)

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
        done = _done(self.output, self.resume, self._result_names)
        records, prompts = [], []
        for number, record in _objects(self.input):
            try:
                self._check_fields(record)
                prompt = prompts_of.of_record(tokenizer, record)
                check_prompts(config, [prompt], self._new_tokens(config, len(prompt)))
            except InputError as error:
                raise InputError(f"{self.input}, line {number}: {error}") from error
            records.append(record)
            prompts.append(prompt)
        if not records:
            raise InputError(f"{self.input} holds no records.")
        for number, (before, record) in enumerate(zip(done, records, strict=False), 1):
            # As lines: NaN is no number's equal, its own neither.
            if json_lines.line_of({**before, **record}) != json_lines.line_of(before):
                raise InputError(f"{self.output}, line {number}, is not of the record in {self.input}: it was made of another file.")
        if len(done) > len(records):
            raise InputError(f"{self.output} has {len(done)} records, {self.input} only {len(records)}: it was made of another file.")
        return _Records(records, prompts, len(done))

    @property
    def _result_names(self) -> list[str]:
        return [self.result_prefix + name for name in RESULT]

    def _check_fields(self, record: dict[str, Any]) -> None:
        """Raises InputError for what could not be generated from, or would be lost."""
        for name in self._result_names:
            if name in record:
                raise InputError(
                    f"the record has a field {name!r} of its own, which the result's would replace: rename it, or give the result's "
                    "fields other names with --result-prefix, such as --result-prefix new_."
                )
        for name in prompts_of.NAMES:
            if isinstance(record.get(name), str) and json_lines.has_half_a_character(record[name]):
                raise InputError(f"its {name!r} holds half of a surrogate pair ({ascii(record[name])[:80]}), which is no text.")

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
        json_lines.mend_log(self.output)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=Console(stderr=True)) as progress,
            self.output.open("ab") as output,
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
                        result = (stream.text, completion.finish_reason, len(completion.tokens))
                        results[number] = dict(zip(self._result_names, result, strict=True))
                    progress.advance(task, len(numbers))
                for number in sorted(group):
                    output.write(json_lines.line_of({**work.records[number], **results[number]}))
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


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    return json_lines.objects(content, file)


def _done(output: Path, resume: bool, names: Sequence[str]) -> list[dict[str, Any]]:
    """The records of an output that is gone on with; a line that was cut off when a process died does not count.

    Raises:
        InputError: the output exists and was not to be resumed, or it cannot be written.
    """
    if output.exists() and not resume:
        raise InputError(f"{output} exists already: add --resume to go on with it, or give another --output.")
    if not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}.")
    if not output.exists():
        return []
    done = json_lines.read_log(output)
    for number, record in enumerate(done, 1):
        lacks = next((name for name in names if name not in record), None)
        if lacks is not None:
            raise InputError(f"{output}, line {number}, is not what this command writes: it has no field {lacks!r}.")
    return done
