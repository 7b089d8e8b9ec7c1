"""The pipeline, in Apache Beam: the same on one machine with several workers and on Dataflow, Flink or Spark.

    ranges of files -> documents -> filters, decontamination, redaction -> exact duplicates -> near duplicates
    -> sorted files

Everything that is written is a row: the file it belongs to, its place in it, and its line. Rows meet in a
file and are sorted, so that
the same input gives the same bytes in whatever order workers finish.

Legend: U units of a text, G shingles.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from aurora_jax.data.curation import duplicates, pii
from aurora_jax.data.curation.contamination import EvaluationIndex, read_items
from aurora_jax.data.curation.documents import CuratedDocument, InputPart, read_part
from aurora_jax.data.curation.filters import LANGUAGE, language_rejection, measure
from aurora_jax.data.curation.hooks import Hook
from aurora_jax.data.curation.thresholds import Thresholds
from aurora_jax.data.curation.units import hash_units, normalize, split_units
from aurora_jax.data.text.sources import Bad
from aurora_jax.storage import json_lines
from aurora_jax.storage.files import open_stream
from aurora_jax.storage.kvstore import kvstore_at

CONTAMINATION = "contamination"
EXACT_DUPLICATES = "exact_duplicates"
NEAR_DUPLICATES = "near_duplicates"
READ, KEPT = "read", "kept"

# Files that the report is made of and that do not stay.
COUNTS_FILE = "parts/counts.jsonl"
METRICS_FILE = "parts/metrics.jsonl"
CONTAMINATION_FILE = "contamination.jsonl"

# Percentiles are taken of so many documents a language.
METRICS_SAMPLE = 2000
_SAMPLE_CHARACTERS = 2000
# Of text, into the hooks at once.
BATCH_BYTES = 1 << 21

# (file below the output, place in the file, line)
OutputRow = tuple[str, tuple[str, ...], str]
# What is counted: ("documents", language, filter) or ("redacted", language, kind) or ("quarantined", input, reason).
Counted = tuple[tuple[str, str, str], tuple[int, int]]


@dataclass(frozen=True)
class CurationSettings:
    """What decides which documents stay; workers get it whole.

    Attributes:
      thresholds: language -> limits.
      word_lists: language -> flagged words and phrases.
      hooks: filters by a score, in order.
      evaluation: files of evaluation sets.
      similarity: Jaccard similarity from which two documents are near duplicates.
      samples: rejected documents that are kept for each filter and language.
      shards: output files for each language.
    """

    thresholds: Mapping[str, Thresholds]
    word_lists: Mapping[str, frozenset[str]]
    hooks: tuple[Hook, ...]
    evaluation: tuple[str, ...]
    similarity: float
    samples: int
    shards: int


@dataclass(frozen=True)
class Rejection:
    """A document that a filter turned away, and why."""

    document: CuratedDocument
    filter: str
    why: str


def build(
    pipeline: beam.Pipeline, files: list[InputPart], settings: CurationSettings, output: str, progress: str | None
) -> None:
    """Add the whole pipeline; running it writes all files below `output`.

    Args:
      pipeline: an empty one.
      files: what to read, each part once.
      settings: what decides.
      output: a folder: a local path, gs:// or s3://.
      progress: a local folder that gets one empty file for each part that has been read.
    """
    filtered = (
        pipeline
        | "parts" >> beam.Create(files, reshuffle=False)
        | "spread" >> beam.Reshuffle()
        | "read and filter"
        >> beam.ParDo(_Filter(settings, progress)).with_outputs("rejected", "rows", "counts", "metrics", main="kept")
    )
    unique, exact = _without_exact_duplicates(filtered.kept)
    kept, near = _without_near_duplicates(unique, settings.similarity)

    rejected = (filtered.rejected, exact, near) | "all rejected" >> beam.Flatten()
    counts = (
        (
            filtered.counts,
            rejected | "count rejected" >> beam.Map(lambda rejection: _counted(rejection.document, rejection.filter)),
            kept | "count kept" >> beam.Map(lambda document: _counted(document, KEPT)),
        )
        | "all counts" >> beam.Flatten()
        | "sum counts" >> beam.CombinePerKey(_sum_pairs)
        | "rows of counts" >> beam.MapTuple(_count_row)
    )
    samples = (
        rejected
        | "draw samples"
        >> beam.Map(
            lambda rejection: ((rejection.filter, rejection.document.language), (_draw(rejection.document), rejection))
        )
        | "smallest draws" >> beam.combiners.Top.SmallestPerKey(settings.samples, key=_draw_of)
        | "rows of samples" >> beam.FlatMapTuple(lambda key, drawn: [_sample_row(rejection) for _, rejection in drawn])
    )
    metrics = (
        filtered.metrics
        | "smallest metrics" >> beam.combiners.Top.SmallestPerKey(METRICS_SAMPLE)
        | "rows of metrics"
        >> beam.FlatMapTuple(
            lambda language, drawn: [
                (METRICS_FILE, (language, draw), f'["{language}", {line}]') for draw, line in drawn
            ]
        )
    )
    documents = kept | "rows of documents" >> beam.Map(functools.partial(_document_row, shards=settings.shards))
    (
        (filtered.rows, counts, samples, metrics, documents)
        | "all rows" >> beam.Flatten()
        | "by file" >> beam.Map(lambda row: (row[0], row[1:]))
        | "meet in files" >> beam.GroupByKey()
        | "write" >> beam.MapTuple(functools.partial(_write, output))
    )


@dataclass(frozen=True)
class _Split:
    """A document with its units and their hashes (uint64 [U]), which several filters look at."""

    document: CuratedDocument
    units: list[str]
    unit_U: np.ndarray


class _Filter(beam.DoFn):
    """All that needs one document at a time. Documents go through the hooks some megabytes at a time."""

    def __init__(self, settings: CurationSettings, progress: str | None):
        self._settings = settings
        self._progress = progress

    def setup(self) -> None:
        self._index = load_index(self._settings.evaluation)

    def process(self, file: InputPart) -> Iterator[Any]:
        documents: list[_Split] = []
        size = 0
        for document in read_part(file, self._settings.thresholds):
            if isinstance(document, Bad):
                yield beam.pvalue.TaggedOutput("counts", (("quarantined", file.input, document.reason), (1, 0)))
                fields = {"where": document.where, "reason": document.reason, "begins": document.excerpt}
                yield beam.pvalue.TaggedOutput(
                    "rows", (f"quarantine/{file.input}.jsonl", (document.where,), _json(fields))
                )
                continue
            yield beam.pvalue.TaggedOutput("counts", _counted(document, READ))
            documents += yield from self._measure(document)
            size += document.size
            if size >= BATCH_BYTES:
                yield from self._finish(documents)
                documents, size = [], 0
        yield from self._finish(documents)
        if self._progress is not None:
            Path(self._progress, hashlib.sha256(repr(file).encode()).hexdigest()).touch()

    def _finish(self, documents: list[_Split]) -> Iterator[Any]:
        for hook in self._settings.hooks:
            documents = yield from _score(hook, documents)
        for split in documents:
            yield from self._decontaminate_and_redact(split)

    def _measure(self, document: CuratedDocument) -> Generator[Any, None, list[_Split]]:
        """Rejects a document by language or heuristics, or returns it; gives out its metrics."""
        thresholds = self._settings.thresholds[document.language]
        why = language_rejection(document.text, document.language, thresholds)
        if why is not None:
            yield _rejected(document, LANGUAGE, why)
            return []
        units = split_units(normalize(document.text))
        split = _Split(document, units, hash_units(units))
        word_list = self._settings.word_lists.get(document.language, frozenset())
        metrics = measure(document.text, split.units, split.unit_U, document.language, thresholds, word_list)
        yield beam.pvalue.TaggedOutput("metrics", (document.language, (_draw(document), _json(vars(metrics)))))
        for name, reason in metrics.rejections(thresholds):
            yield _rejected(document, name, reason)
            return []
        return [split]

    def _decontaminate_and_redact(self, split: _Split) -> Iterator[Any]:
        document = split.document
        hits = self._index.hits(split.units, split.unit_U)
        for hit in hits:
            fields = {"file": hit.file, "item": hit.item, "document": document.key, "language": document.language}
            fields |= {"source": document.record["source"], "text": hit.text}
            yield beam.pvalue.TaggedOutput(
                "rows", (CONTAMINATION_FILE, (hit.file, f"{hit.item:09d}", document.key), _json(fields))
            )
        if hits:
            yield _rejected(document, CONTAMINATION, "; ".join(f"{hit.file} item {hit.item}" for hit in hits[:5]))
            return
        text, redacted = pii.redact(document.text, document.language)
        for kind, count in redacted.items():
            yield beam.pvalue.TaggedOutput("counts", (("redacted", document.language, kind), (count, 1)))
        yield CuratedDocument(document.key, document.language, text, document.record)


def _score(hook: Hook, documents: list[_Split]) -> Generator[Any, None, list[_Split]]:
    """Rejects the documents whose score is out of the hook's limits; returns the others."""
    texts = [split.document.text for split in documents if hook.language in (None, split.document.language)]
    scores = iter(hook.scores(texts) if texts else ())
    kept = []
    for split in documents:
        score = next(scores) if hook.language in (None, split.document.language) else None
        if score is None or hook.minimum <= score <= hook.maximum:
            kept.append(split)
            continue
        limit = f"under {hook.minimum:.4g}" if score < hook.minimum else f"over {hook.maximum:.4g}"
        yield _rejected(split.document, hook.name, f"{score:.4g} is {limit}")
    return kept


@functools.cache
def load_index(paths: tuple[str, ...]) -> EvaluationIndex:
    """The index of evaluation files; read once a process. Files are named by the last part of their path.

    Raises:
      InputError: a file is not what its name says.
    """
    index = EvaluationIndex()
    for path in paths:
        with open_stream(path) as stream:
            index.add(path.rpartition("/")[2], read_items(path, stream.read()))
    return index


def _without_exact_duplicates(documents: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
    """(documents whose text occurs once, or that come first of those it occurs in; rejections of the others)."""
    split = (
        documents
        | "hash texts" >> beam.Map(lambda document: (duplicates.text_hash(document.text), document))
        | "equal texts meet" >> beam.GroupByKey()
        | "keep one of equals" >> beam.FlatMapTuple(_keep_one).with_outputs("rejected", main="kept")
    )
    return split.kept, split.rejected


def _keep_one(_: bytes, equals: Iterable[CuratedDocument]) -> Iterator[Any]:
    first, *others = sorted(equals, key=_node)
    yield first
    for document in others:
        yield _rejected(document, EXACT_DUPLICATES, f"equal to {first.key}")


def _without_near_duplicates(
    documents: beam.PCollection, similarity: float
) -> tuple[beam.PCollection, beam.PCollection]:
    """(one document of each component of near duplicates and all others that have none; rejections)."""
    by_key = documents | "by key" >> beam.Map(lambda document: (document.key, document))
    candidates = (
        documents
        | "bands"
        >> beam.FlatMap(
            lambda document: [
                (band, document.key) for band in duplicates.band_hashes(duplicates.shingles(document.text), similarity)
            ]
        )
        | "bands meet" >> beam.GroupByKey()
        | "pairs" >> beam.FlatMapTuple(lambda band, keys: duplicates.pairs(keys))
        | "distinct pairs" >> beam.Distinct()
    )
    edges = (
        {"documents": by_key, "others": candidates}
        | "join first of pair" >> beam.CoGroupByKey()
        | "send to second" >> beam.FlatMapTuple(_send_to_second)
    )
    edges = (
        {"documents": by_key, "others": edges}
        | "join second of pair" >> beam.CoGroupByKey()
        | "compare" >> beam.FlatMapTuple(functools.partial(_compare, similarity=similarity))
    )
    # Components need all edges at once. They are two names each, and only of true near duplicates.
    losers = (
        edges
        | "all edges" >> beam.Map(lambda edge: (None, edge))
        | "edges meet" >> beam.GroupByKey()
        | "components" >> beam.FlatMapTuple(lambda _, edges: duplicates.losers(sorted(edges)))
    )
    split = (
        {"documents": by_key, "losers": losers}
        | "join losers" >> beam.CoGroupByKey()
        | "drop losers" >> beam.FlatMapTuple(_drop_losers).with_outputs("rejected", main="kept")
    )
    return split.kept, split.rejected


def _send_to_second(
    _: str, joined: Mapping[str, Iterable[Any]]
) -> Iterator[tuple[str, tuple[duplicates.ClusterNode, str]]]:
    (document,) = joined["documents"]
    for other in joined["others"]:
        yield other, (_node(document), document.text)


def _compare(
    _: str, joined: Mapping[str, Iterable[Any]], similarity: float
) -> Iterator[tuple[duplicates.ClusterNode, duplicates.ClusterNode]]:
    (document,) = joined["documents"]
    shingle_G = None
    for node, text in joined["others"]:
        shingle_G = duplicates.shingles(document.text) if shingle_G is None else shingle_G
        if duplicates.jaccard(shingle_G, duplicates.shingles(text)) >= similarity:
            yield node, _node(document)


def _drop_losers(_: str, joined: Mapping[str, Iterable[Any]]) -> Iterator[Any]:
    (document,) = joined["documents"]
    stays = list(joined["losers"])
    yield _rejected(document, NEAR_DUPLICATES, f"nearly equal to {stays[0]}") if stays else document


def _node(document: CuratedDocument) -> duplicates.ClusterNode:
    return duplicates.ClusterNode(-len(document.text), document.key)


def _rejected(document: CuratedDocument, filter: str, why: str) -> beam.pvalue.TaggedOutput:
    return beam.pvalue.TaggedOutput("rejected", Rejection(document, filter, why))


def _counted(document: CuratedDocument, filter: str) -> Counted:
    return ("documents", document.language, filter), (1, document.size)


def _sum_pairs(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    documents, size = 0, 0
    for more, bytes_more in pairs:
        documents += more
        size += bytes_more
    return documents, size


def _draw(document: CuratedDocument) -> str:
    """A number drawn for a document, the same in every run and on every worker."""
    return hashlib.sha256(document.key.encode()).hexdigest()


def _draw_of(drawn: tuple[str, Rejection]) -> str:
    return drawn[0]


def _count_row(key: tuple[str, str, str], count: tuple[int, int]) -> OutputRow:
    return COUNTS_FILE, key, _json([*key, *count])


def _sample_row(rejection: Rejection) -> OutputRow:
    """A rejected document for people to look at, without what must not be shown."""
    document = rejection.document
    text, _ = pii.redact(document.text[:_SAMPLE_CHARACTERS], document.language)
    fields = {
        "language": document.language,
        "why": rejection.why,
        "document": document.key,
        "source": document.record["source"],
    }
    fields |= {"characters": len(document.text), "text": text}
    return f"rejected/{rejection.filter}.jsonl", (document.language, document.key), _json(fields)


def _document_row(document: CuratedDocument, shards: int) -> OutputRow:
    """The record with its redacted text. With several shards a document's is drawn, so that each is a fair
    part of the whole."""
    name = document.language
    if shards > 1:
        name += f"-{int(_draw(document)[:16], 16) % shards:05d}-of-{shards:05d}"
    return f"train/{name}.jsonl", (document.key,), _json(document.record | {"text": document.text})


def _write(output: str, file: str, rows: Iterable[tuple[tuple[str, ...], str]]) -> None:
    content = b"".join(line.encode() + b"\n" for _, line in sorted(rows))
    kvstore_at(output).write(file.encode(), content).result()


def _json(value: Any) -> str:
    return json_lines.line_of(value).decode().removesuffix("\n")
