"""`aurora generate`: text from a checkpoint, to the terminal as it comes or for a file of prompts."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aurora_jax.checkpoints.format import read_metadata
from aurora_jax.errors import InputError
from aurora_jax.generate import prompts as prompts_of
from aurora_jax.generate.prompts import Prompt
from aurora_jax.generate.sampling import Sampling
from aurora_jax.generate.text import TextGenerator, TextSettings
from aurora_jax.storage import json_lines

RESULT = ("completion", "finish_reason", "new_tokens")
"""What a record gets."""


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
    """Text to continue, taken as it is (a backslash is a backslash); - reads it from standard input."""
    instruct: str | None = None
    """An instruction, taken as it is and put into Aurora-M's template (### Instruction: ... ### Response:)."""
    prefix: str | None = None
    """Infilling: the code before the gap, taken as it is."""
    suffix: str | None = None
    """Infilling: the code after the gap, taken as it is."""
    input: Path | None = None
    """JSONL: each record has prompt, or prefix and suffix, or instruction, and what else you like."""
    output: Path | None = None
    """JSONL to be made: the records, with completion, finish_reason (eos, length or stop) and new_tokens
    (those that the completion is made of: neither the end-of-text token nor what follows a stop string)."""
    result_prefix: str = ""
    """Stands before the names of these three fields, for records that have fields of such names: with b_ they are
    b_completion ..."""
    resume: bool = False
    """Go on behind the records that the output holds already, with the same settings as before."""
    max_new_tokens: int | None = None
    """Most tokens of a completion; it ends earlier at the end-of-text token or a stop string. Without it 256,
    or as many as the model has positions for behind a record's own prompt."""
    stop: tuple[str, ...] = ()
    r"""Strings that end a completion; they are not part of it. Written with \n, \r, \t, \xHH, \uHHHH,
    \UHHHHHHHH, and \\ for a backslash: "\n\n" is an empty line."""
    temperature: float = 0.0
    """0 always takes the best token (greedy); 1 draws from the model's own distribution."""
    top_k: int = 0
    """Draw among the k best tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw among the best tokens that hold this much probability together."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have occurred become less likely."""
    seed: int = 0
    """Of the draws, 0 or more. A record's depend on the seed and its line alone, not on batch size or devices."""
    batch_size: int = 16
    """Records at a time, with --input, whose prompts are about as long."""
    tokenizer: Path | None = None
    """tokenizer.json, or its folder, or a SentencePiece model, for a checkpoint that carries none."""
    allow_other_tokenizer: bool = False
    """Take `tokenizer` although the checkpoint carries another, for one that was recorded wrongly."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of weights, activations and cache; that of the checkpoint without it."""
    attention: Literal["xla", "flash"] | None = None
    """Of the prompt: flash kernels on TPU and xla elsewhere, unless you choose."""
    tensor: int | None = None
    """Devices that share one copy of the model; as many as its heads can be divided over without it. The
    others take rows."""

    def run(self) -> None:
        """Raises InputError before anything is compiled or loaded, if it can be known then."""
        read_metadata(self.checkpoint)
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        settings = TextSettings(self.max_new_tokens, sampling, tuple(map(prompts_of.stop_string, self.stop)), self.seed)
        if self.batch_size < 1:
            raise InputError(f"--batch-size is {self.batch_size}: it must be at least 1.")
        generator = TextGenerator(
            self.checkpoint,
            tokenizer=self.tokenizer,
            allow_other_tokenizer=self.allow_other_tokenizer,
            dtype=self.dtype,
            attention=self.attention,
            tensor=self.tensor,
        )
        if self.input:
            work = self._records(generator)
            generator.load()
            self._file(generator, settings, work)
        else:
            prompt = self._one(generator)
            generator.stream(prompt, settings, lambda text: print(text, end="", flush=True))
            print()

    def _one(self, generator: TextGenerator) -> Prompt:
        tokenizer = generator.tokenizer
        infill = self.prefix is not None or self.suffix is not None
        if [self.prompt is not None, self.instruct is not None, infill].count(True) != 1 or self.output or self.resume:
            raise InputError(
                "Give one prompt, or --instruct TEXT, or --prefix TEXT and --suffix TEXT; or --input FILE "
                "with --output FILE. "
                "`aurora generate --help` has examples."
            )
        if infill:
            prompt = prompts_of.infilling(tokenizer, self.prefix or "", self.suffix or "")
        elif self.instruct is not None:
            prompt = prompts_of.instruction(tokenizer, self.instruct)
        else:
            prompt = prompts_of.continuation(tokenizer, _standard_input() if self.prompt == "-" else self.prompt or "")
        generator.check(prompt, self.max_new_tokens)
        return prompt

    def _records(self, generator: TextGenerator) -> "_Records":
        assert self.input is not None
        if self.output is None or any(
            given is not None for given in (self.prompt, self.instruct, self.prefix, self.suffix)
        ):
            raise InputError("--input FILE needs --output FILE, and no other prompt beside it.")
        done = _done(self.output, self.resume, self._result_names)
        records, prompts = [], []
        for number, record in _objects(self.input):
            try:
                self._check_fields(record)
                prompt = prompts_of.of_record(generator.tokenizer, record)
                generator.check(prompt, self.max_new_tokens)
            except InputError as error:
                raise InputError(f"{self.input}, line {number}: {error}") from error
            records.append(record)
            prompts.append(prompt)
        if not records:
            raise InputError(f"{self.input} holds no records.")
        for number, (before, record) in enumerate(zip(done, records, strict=False), 1):
            # As lines: NaN is no number's equal, its own neither.
            if json_lines.line_of({**before, **record}) != json_lines.line_of(before):
                raise InputError(
                    f"{self.output}, line {number}, is not of the record in {self.input}: it was made of another file."
                )
        if len(done) > len(records):
            raise InputError(
                f"{self.output} has {len(done)} records, {self.input} only {len(records)}: it was made of another file."
            )
        return _Records(records, prompts, len(done))

    @property
    def _result_names(self) -> list[str]:
        return [self.result_prefix + name for name in RESULT]

    def _check_fields(self, record: dict[str, Any]) -> None:
        """Raises InputError for what could not be generated from, or would be lost."""
        for name in self._result_names:
            if name in record:
                raise InputError(
                    f"the record has a field {name!r} of its own, which the result's would replace: rename "
                    "it, or give the result's "
                    "fields other names with --result-prefix, such as --result-prefix new_."
                )
        for name in prompts_of.NAMES:
            if isinstance(record.get(name), str) and json_lines.has_half_a_character(record[name]):
                raise InputError(
                    f"its {name!r} holds half of a surrogate pair ({ascii(record[name])[:80]}), which is no text."
                )

    def _file(self, generator: TextGenerator, settings: TextSettings, work: "_Records") -> None:
        assert self.output is not None
        json_lines.mend_log(self.output)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with (
            Progress(*columns, console=Console(stderr=True)) as progress,
            self.output.open("ab") as output,
        ):
            task = progress.add_task(f"{self.input} -> {self.output}", total=len(work.records), completed=work.done)
            rest = iter(work.records[work.done :])
            for completions in generator.complete(
                work.prompts,
                settings,
                batch_size=self.batch_size,
                first=work.done,
                advance=lambda count: progress.advance(task, count),
            ):
                for completion in completions:
                    result = (completion.text, completion.finish_reason, completion.new_tokens)
                    output.write(
                        json_lines.line_of({**next(rest), **dict(zip(self._result_names, result, strict=True))})
                    )
                output.flush()
                os.fsync(output.fileno())


@dataclass(frozen=True)
class _Records:
    records: list[dict[str, Any]]
    prompts: list[Prompt]
    done: int
    """Records that the output holds already."""


def _standard_input() -> str:
    if sys.stdin is None:
        raise InputError("The prompt is -, but standard input is closed.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input cannot be read as UTF-8 text: {error}.") from error


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
