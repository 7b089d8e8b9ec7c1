"""`aurora data curate OUT NAME=FILES ...`: check what was given, run the pipeline beside the destination,
then rename."""

import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from aurora_jax.data.build import beam_runner
from aurora_jax.data.build.beam_runner import Runner
from aurora_jax.data.curation import pipeline, report
from aurora_jax.data.curation.documents import JSON_LINES, InputPart
from aurora_jax.data.curation.hooks import load_word_lists, parse_classifier, parse_quality
from aurora_jax.data.curation.thresholds import load_thresholds
from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines
from aurora_jax.storage.atomic import new_folder
from aurora_jax.storage.files import File, below, find_each
from aurora_jax.storage.kvstore import kvstore_at

_INPUT = re.compile(r"(?P<name>[\w.-]+)=(?P<pattern>.+)")
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class CurateCommand:
    """Filter, redact, deduplicate and decontaminate documents, and report what went, why, and with examples.

    Documents are JSON lines with `text`, `language` and, as you like, `source`, `id` and more. A document
    passes, in this order: language identification, heuristics (thresholds by language), your classifiers,
    decontamination, redaction of e-mail addresses, telephone numbers, IP addresses and keys, and removal of
    exact and near duplicates across all inputs.

        aurora data curate curated 'sample=corpus/train/*.jsonl' --evaluation benchmarks/*

    writes curated/train/{language}.jsonl, report.md and report.json, rejected/{filter}.jsonl with samples for
    people to look at, contamination.jsonl and quarantine/. The same input gives the same bytes, whatever the
    number of workers.
    """

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The folder to write; must not exist. It appears complete or not at all; on an object store report.json
    comes last."""
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FILES")]
    """A name for the report, and a path or pattern of JSON-lines files (.gz, .bz2 and .zst too)."""
    evaluation: tuple[str, ...] = ()
    """Files of evaluation sets, or patterns of them (.jsonl, .json, .tsv, .csv, or one text a line):
    documents that hold their text go."""
    thresholds: Path | None = None
    """A JSON file {language: {threshold: number}} that changes limits or adds languages; report.json lists
    all thresholds."""
    word_lists: Path | None = None
    """A folder with lists of flagged words or phrases, one file a language (fi.txt), one a line."""
    quality: tuple[str, ...] = ()
    """LANGUAGE=MODEL.bin,label=LABEL,min=NUMBER: documents of the language to which the fastText model gives
    less than that go."""
    classifier: tuple[str, ...] = ()
    """NAME=MODULE:FUNCTION,max=NUMBER (or min, or both; language=xx for one language): a function list[str]
    -> list[float] of yours."""
    similarity: float = 0.8
    """Jaccard similarity of shingles from which two documents are near duplicates."""
    samples: int = 20
    """Rejected documents to keep for each filter and language."""
    shards: int = 1
    """Output files for each language; a worker sorts one in memory."""
    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Processes of the direct runner, which keeps the corpus in memory; beyond some gigabytes use another runner."""
    runner: Runner = "direct"
    """Beam's runner; direct is this machine."""
    beam_options: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the runner, as --beam-options=--project=P; may be given many times (Dataflow: project,
    region, temp_location)."""

    def run(self) -> None:
        """Curate, and print the table."""
        curated = curate(self)
        console = Console()
        console.print(curated.to_table(self.output))
        for file, counts in curated.contamination.items():
            console.print(
                f"{file}: {counts.found} of {counts.items - counts.too_short} items found, in "
                f"{counts.documents} documents"
            )
        bad = sum(sum(reasons.values()) for reasons in curated.quarantined.values())
        if bad:
            console.print(f"[yellow]{bad:,} lines are no documents: quarantine/ holds them with the reason[/yellow]")
        console.print(f"Samples of what went: {self.output}/rejected/. Please look at them.")


def curate(command: CurateCommand) -> report.Report:
    """Run a curation; see CurateCommand.

    Raises:
      InputError: something that was given is wrong, or the output exists.
    """
    settings = _settings(command)
    files = _files(command.inputs)
    items = pipeline.load_index(settings.evaluation).items
    filters = report.filter_order(
        [hook.name for hook in settings.hooks], bool(settings.evaluation), bool(settings.word_lists)
    )
    taken = next((hook.name for hook in settings.hooks if filters.count(hook.name) > 1), None)
    if taken:
        raise InputError(f"{taken}: a filter of ours has this name; give the classifier another.")
    for hook in settings.hooks:
        hook.load()  # what cannot be loaded is found out here, and not on a worker an hour later

    with _destination(command.output) as unfinished:
        _run(command, files, settings, unfinished)
        counts = _take(unfinished, pipeline.COUNTS_FILE)
        metrics = _take(unfinished, pipeline.METRICS_FILE)
        hits = _lines(unfinished, pipeline.CONTAMINATION_FILE)
        curated = report.compose(counts, metrics, hits, items, filters, _described(settings))
        for name, text in (("report.md", curated.to_markdown()), ("report.json", curated.to_json())):
            kvstore_at(unfinished).write(name.encode(), text.encode()).result()
    return curated


def _settings(command: CurateCommand) -> pipeline.CurationSettings:
    if not 0.1 <= command.similarity <= 1:
        raise InputError(f"--similarity {command.similarity}: must lie between 0.1 and 1.")
    for name, value in (("samples", command.samples), ("shards", command.shards), ("workers", command.workers)):
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    hooks = (*map(parse_quality, command.quality), *map(parse_classifier, command.classifier))
    thresholds = load_thresholds(command.thresholds)
    word_lists = load_word_lists(command.word_lists)
    for what, language in (
        *(("word list", name) for name in word_lists),
        *(("filter", hook.language) for hook in hooks if hook.language),
    ):
        if language not in thresholds:
            raise InputError(
                f"there is a {what} for {language!r}, but no thresholds; there are {', '.join(thresholds)}."
            )
    evaluation = sorted(file.url for files in _matches(command.evaluation) for file in files)
    names = [path.rpartition("/")[2] for path in evaluation]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(
            f"{twice}: two evaluation files have this name; rename one, so that the report can tell them apart."
        )
    return pipeline.CurationSettings(
        thresholds, word_lists, hooks, tuple(evaluation), command.similarity, command.samples, command.shards
    )


def _files(inputs: tuple[str, ...]) -> list[InputPart]:
    if not inputs:
        raise InputError("no inputs; give one or more as NAME=FILES, such as 'sample=corpus/train/*.jsonl'.")
    patterns: dict[str, str] = {}
    for input in inputs:
        match = _INPUT.fullmatch(input)
        if match is None:
            raise InputError(f"{input}: an input is written NAME=FILES, such as 'sample=corpus/train/*.jsonl'.")
        name, pattern = match["name"], match["pattern"]
        if name in patterns:
            raise InputError(f"{name}: two inputs have this name; every input needs its own.")
        patterns[name] = pattern
    return [
        InputPart(name, below(pattern, file), part)
        for (name, pattern), files in zip(patterns.items(), _matches(tuple(patterns.values())), strict=True)
        for file in files
        for part in JSON_LINES.parts(file)
    ]


def _matches(patterns: Sequence[str]) -> list[list[File]]:
    """The files of each pattern, by address. Raises InputError if one has none, or a file is found twice."""
    found = find_each(patterns)
    for pattern, files in zip(patterns, found, strict=True):
        if not files:
            raise InputError(f"{pattern}: there is no such file.")
    return found


@contextmanager
def _destination(output: str) -> Iterator[str]:
    """The folder to write into: beside a local destination, to be renamed at the end; an object store's
    destination itself."""
    if "://" in output:
        if kvstore_at(output).list().result():
            raise InputError(f"{output} exists already; remove it or choose another folder.")
        yield output
        return
    destination = Path(os.path.abspath(output))
    if destination.exists():
        raise InputError(f"{output} exists already; remove it or choose another folder.")
    with new_folder(destination) as unfinished:
        yield str(unfinished)


def _run(command: CurateCommand, files: list[InputPart], settings: pipeline.CurationSettings, output: str) -> None:
    if command.runner != "direct":
        add = functools.partial(pipeline.build, files=files, settings=settings, output=output, progress=None)
        beam_runner.run(add, command.runner, command.workers, command.beam_options)
        return
    with tempfile.TemporaryDirectory() as done, _progress(Path(done), len(files)):
        add = functools.partial(pipeline.build, files=files, settings=settings, output=output, progress=done)
        beam_runner.run(add, command.runner, command.workers, command.beam_options)


@contextmanager
def _progress(done: Path, parts: int) -> Iterator[None]:
    """Shows how many of the parts have been read and filtered; what follows, from duplicates to writing, is
    short and unmeasured."""
    columns = TextColumn("{task.description:30}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading and filtering", total=parts)

        def look() -> None:
            count = sum(1 for _ in done.iterdir())
            description = "reading and filtering" if count < parts else "removing duplicates, writing"
            progress.update(task, completed=count, description=description)

        with beam_runner.watched(look, _POLL_SECONDS):
            yield


def _lines(output: str, file: str) -> list[Any]:
    content = kvstore_at(output).read(file.encode()).result()
    return [value for _, value in json_lines.values(content.value, file)] if content.state == "value" else []


def _take(output: str, file: str) -> list[Any]:
    """The lines of a file that was only for the report; the file goes, and its folder once it is empty."""
    lines = _lines(output, file)
    kvstore_at(output).write(file.encode(), None).result()
    folder = Path(output, file).parent
    if "://" not in output and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return lines


def _described(settings: pipeline.CurationSettings) -> dict[str, Any]:
    """The settings as JSON, without paths of this machine."""
    return {
        "thresholds": {
            language: {
                name: None if value == float("inf") else value for name, value in dataclasses.asdict(row).items()
            }
            for language, row in sorted(settings.thresholds.items())
        },
        "word_lists": {language: len(words) for language, words in sorted(settings.word_lists.items())},
        "hooks": [f"{hook.name}: {Path(hook.target).name if hook.label else hook.target}" for hook in settings.hooks],
        "similarity": settings.similarity,
    }
