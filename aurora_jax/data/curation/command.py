"""`aurora data curate OUT NAME=FILES ...`: check what was given, run the pipeline beside the destination, then rename."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from aurora_jax.data.curation import report
from aurora_jax.data.curation.documents import FileRange, ranges
from aurora_jax.data.curation.hooks import load_word_lists, parse_classifier, parse_quality
from aurora_jax.data.curation.thresholds import load_thresholds
from aurora_jax.errors import InputError

if TYPE_CHECKING:
    from aurora_jax.data.curation.pipeline import Settings

_INPUT = re.compile(r"(?P<name>[\w.-]+)=(?P<pattern>.+)")
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class CurateCommand:
    """Filter, redact, deduplicate and decontaminate documents, and report what went, why, and with examples.

    Documents are JSON lines with `text`, `language` and, as you like, `source`, `id` and more. A document passes, in this order: language
    identification, heuristics (thresholds by language), your classifiers, decontamination, redaction of e-mail addresses, telephone
    numbers, IP addresses and keys, and removal of exact and near duplicates across all inputs.

        aurora data curate curated 'sample=corpus/train/*.jsonl' --evaluation benchmarks/*

    writes curated/train/{language}.jsonl, report.md and report.json, rejected/{filter}.jsonl with samples for people to look at,
    contamination.jsonl and quarantine/. The same input gives the same bytes, whatever the number of workers.
    """

    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The folder to write; must not exist. It appears complete or not at all; on an object store report.json comes last."""
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FILES")]
    """A name for the report, and a path or pattern of JSON-lines files (.gz, .bz2 and .zst too)."""
    evaluation: tuple[str, ...] = ()
    """Files of evaluation sets, or patterns of them (.jsonl, .json, .tsv, .csv, or one text a line): documents that hold their text go."""
    thresholds: Path | None = None
    """A JSON file {language: {threshold: number}} that changes limits or adds languages; report.json lists all thresholds."""
    word_lists: Path | None = None
    """A folder with lists of flagged words or phrases, one file a language (fi.txt), one a line."""
    quality: tuple[str, ...] = ()
    """LANGUAGE=MODEL.bin,label=LABEL,min=NUMBER: documents of the language to which the fastText model gives less than that go."""
    classifier: tuple[str, ...] = ()
    """NAME=MODULE:FUNCTION,max=NUMBER (or min, or both; language=xx for one language): a function list[str] -> list[float] of yours."""
    similarity: float = 0.8
    """Jaccard similarity of shingles from which two documents are near duplicates."""
    samples: int = 20
    """Rejected documents to keep for each filter and language."""
    shards: int = 1
    """Output files for each language; a worker sorts one in memory."""
    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Processes of the direct runner, which keeps the corpus in memory; beyond some gigabytes use another runner."""
    runner: str = "direct"
    """direct for this machine, or a runner of Apache Beam: DataflowRunner, FlinkRunner, SparkRunner."""
    beam_options: tuple[str, ...] = ()
    """Options of that runner, such as project=P region=R temp_location=gs://B/tmp."""

    def run(self) -> None:
        """Curate, and print the table."""
        curated = curate(self)
        console = Console()
        console.print(curated.to_table(self.output))
        for file, counts in curated.contamination.items():
            console.print(f"{file}: {counts.found} of {counts.items - counts.too_short} items found, in {counts.documents} documents")
        bad = sum(sum(reasons.values()) for reasons in curated.quarantined.values())
        if bad:
            console.print(f"[yellow]{bad:,} lines are no documents: quarantine/ holds them with the reason[/yellow]")
        console.print(f"Samples of what went: {self.output}/rejected/. Please look at them.")


def curate(command: CurateCommand) -> report.Report:
    """Run a curation; see CurateCommand.

    Raises:
      InputError: something that was given is wrong, or the output exists.
    """
    _require_beam()
    from aurora_jax.data.curation import pipeline

    settings = _settings(command)
    files = _files(command.inputs)
    items = pipeline.load_index(settings.evaluation).items
    filters = report.filter_order([hook.name for hook in settings.hooks], bool(settings.evaluation), bool(settings.word_lists))
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
        _write_text(unfinished, "report.md", curated.to_markdown())
        _write_text(unfinished, "report.json", curated.to_json())
    return curated


def _require_beam() -> None:
    try:
        logging.disable(logging.WARNING)  # its import warns of clients of other clouds that are absent
        import apache_beam  # noqa: F401
    except ImportError:
        raise InputError("curation needs Apache Beam, which is not installed; `pip install -c constraints.txt -e '.[beam]'`.") from None
    finally:
        logging.disable(logging.NOTSET)


def _settings(command: CurateCommand) -> Settings:
    from aurora_jax.data.curation.pipeline import Settings

    if not 0.1 <= command.similarity <= 1:
        raise InputError(f"--similarity {command.similarity}: must lie between 0.1 and 1.")
    for name, value in (("samples", command.samples), ("shards", command.shards), ("workers", command.workers)):
        if value < 1:
            raise InputError(f"--{name} {value}: must be at least 1.")
    hooks = (*map(parse_quality, command.quality), *map(parse_classifier, command.classifier))
    thresholds = load_thresholds(command.thresholds)
    word_lists = load_word_lists(command.word_lists)
    for what, language in (*(("word list", name) for name in word_lists), *(("filter", hook.language) for hook in hooks if hook.language)):
        if language not in thresholds:
            raise InputError(f"there is a {what} for {language!r}, but no thresholds; there are {', '.join(thresholds)}.")
    evaluation = sorted(path for pattern in command.evaluation for path, _ in _matches(pattern))
    names = [path.rpartition("/")[2] for path in evaluation]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"{twice}: two evaluation files have this name; rename one, so that the report can tell them apart.")
    return Settings(thresholds, word_lists, hooks, tuple(evaluation), command.similarity, command.samples, command.shards)


def _files(inputs: tuple[str, ...]) -> list[FileRange]:
    from apache_beam.io.filesystem import CompressionTypes

    if not inputs:
        raise InputError("no inputs; give one or more as NAME=FILES, such as 'sample=corpus/train/*.jsonl'.")
    files: list[FileRange] = []
    names: set[str] = set()
    for input in inputs:
        match = _INPUT.fullmatch(input)
        if match is None:
            raise InputError(f"{input}: an input is written NAME=FILES, such as 'sample=corpus/train/*.jsonl'.")
        name, pattern = match["name"], match["pattern"]
        if name in names:
            raise InputError(f"{name}: two inputs have this name; every input needs its own.")
        names.add(name)
        fixed = re.split(r"[*?\[{]", pattern)[0].rpartition("/")[0]
        for path, size in _matches(pattern):
            below = path.rpartition(fixed + "/")[2] if fixed else path.rpartition(os.getcwd() + "/")[2]
            whole = CompressionTypes.detect_compression_type(path) != CompressionTypes.UNCOMPRESSED
            files += ranges(name, path, below, size, splittable=not whole)
    return files


def _matches(pattern: str) -> list[tuple[str, int]]:
    """(path, bytes) of each file of a pattern, by path."""
    from apache_beam.io.filesystem import BeamIOError
    from apache_beam.io.filesystems import FileSystems

    try:
        (result,) = FileSystems.match([pattern])
    except (BeamIOError, ValueError) as error:
        raise InputError(f"{pattern}: cannot be looked up ({error}).") from None
    found = sorted((metadata.path, metadata.size_in_bytes) for metadata in result.metadata_list)
    if not found:
        raise InputError(f"{pattern}: there is no such file.")
    return found


@contextmanager
def _destination(output: str) -> Iterator[str]:
    """The folder to write into: beside a local destination, to be renamed at the end; an object store's destination itself."""
    from apache_beam.io.filesystems import FileSystems

    if "://" in output:
        if FileSystems.match([output.rstrip("/") + "/**"])[0].metadata_list:
            raise InputError(f"{output} exists already; remove it or choose another folder.")
        yield output
        return
    destination = Path(os.path.abspath(output))
    if destination.exists():
        raise InputError(f"{output} exists already; remove it or choose another folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as scratch:
        unfinished = Path(scratch, "curated")
        unfinished.mkdir()
        yield str(unfinished)
        unfinished.rename(destination)


def _run(command: CurateCommand, files: list[FileRange], settings: Settings, output: str) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    from aurora_jax.data.curation.pipeline import build

    options = [f"--{option}" for option in command.beam_options]
    if command.runner != "direct":
        with beam.Pipeline(options=PipelineOptions([f"--runner={command.runner}", *options])) as pipeline:
            build(pipeline, files, settings, output, None)
        return
    with tempfile.TemporaryDirectory() as scratch:
        done = Path(scratch, "done")
        done.mkdir()
        worker = f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main 2>> {shlex.quote(scratch)}/log"
        environment = SubprocessSDKEnvironment.from_command_string(worker) if command.workers > 1 else None
        # By name, because "DirectRunner" may be Prism, which fetches a program over the network.
        runner = FnApiRunner(environment)
        direct = PipelineOptions([f"--direct_num_workers={command.workers}", *options])
        with _input_errors_of_workers(), _quiet(), _progress(done, len(files)), beam.Pipeline(runner, direct) as pipeline:
            build(pipeline, files, settings, output, str(done))


@contextmanager
def _input_errors_of_workers() -> Iterator[None]:
    """An InputError that a worker raised comes back as text inside another error; this raises it as what it was."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        found = re.search(r"InputError: (.+?)(?: \[while running|\n|$)", str(error))
        if found is None:
            raise
        raise InputError(found[1]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Beam's notes on its own workings; an error of a worker is raised here, with its traceback, besides being logged."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _progress(done: Path, ranges: int) -> Iterator[None]:
    """Shows how many of the ranges have been read and filtered; what follows, from duplicates to writing, is short and unmeasured."""
    columns = TextColumn("{task.description:30}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    finished = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading and filtering", total=ranges)

        def watch() -> None:
            while not finished.is_set():
                count = sum(1 for _ in done.iterdir())
                description = "reading and filtering" if count < ranges else "removing duplicates, writing"
                progress.update(task, completed=count, description=description)
                time.sleep(_POLL_SECONDS)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()


def _lines(output: str, file: str) -> list[Any]:
    from apache_beam.io.filesystems import FileSystems

    path = FileSystems.join(output, *file.split("/"))
    if not FileSystems.exists(path):
        return []
    with FileSystems.open(path) as stream:
        return [json.loads(line) for line in stream.read().splitlines()]


def _take(output: str, file: str) -> list[Any]:
    """The lines of a file that was only for the report; the file goes, and its folder once it is empty."""
    from apache_beam.io.filesystems import FileSystems

    lines = _lines(output, file)
    path = FileSystems.join(output, *file.split("/"))
    if lines:
        FileSystems.delete([path])
    folder = Path(path).parent
    if "://" not in output and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return lines


def _write_text(output: str, file: str, text: str) -> None:
    from apache_beam.io.filesystems import FileSystems

    with FileSystems.create(FileSystems.join(output, file), mime_type="text/plain") as stream:
        stream.write(text.encode())


def _described(settings: Settings) -> dict[str, Any]:
    """The settings as JSON, without paths of this machine."""
    return {
        "thresholds": {
            language: {name: None if value == float("inf") else value for name, value in dataclasses.asdict(row).items()}
            for language, row in sorted(settings.thresholds.items())
        },
        "word_lists": {language: len(words) for language, words in sorted(settings.word_lists.items())},
        "hooks": [f"{hook.name}: {Path(hook.target).name if hook.label else hook.target}" for hook in settings.hooks],
        "similarity": settings.similarity,
    }
