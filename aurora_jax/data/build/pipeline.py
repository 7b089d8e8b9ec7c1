"""From sources to token stores: an Apache Beam pipeline, restartable at every part.

    files of all sources -> parts -> tokenize each part -> count -> write each shard of each store -> complete

A part's result is a folder `parts/KEY` beside the store's arrays: chunks of tokens, then a manifest. A part
whose manifest is there is not done again, so a build that was killed goes on where it stood. A shard of the
store is written whole, by one worker, from the chunks that overlap it: any number of workers, and any number
of interruptions, leave the same bytes.

`report.json` of a store holds what was read, kept, dropped and bad, by language; `rejected.jsonl` the bad
records with their reasons.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import tensorstore as ts

from aurora_jax.data.batches import store as store_format
from aurora_jax.data.batches.store import (
    StoreInfo,
    create_arrays,
    finish,
    read_info,
    store_directory,
    token_type,
    write_range,
)
from aurora_jax.data.build.checks import check_sources
from aurora_jax.data.text.readers import Part
from aurora_jax.data.text.recipe import Dropped, Recipe, Tokenized
from aurora_jax.data.text.sources import Bad
from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines
from aurora_jax.storage.files import File, patterns_text
from aurora_jax.storage.kvstore import kvstore_at

CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class StoreJob:
    """A store to be built: its recipe, where to, and the files of its sources in order."""

    recipe: Recipe
    directory: str
    files: tuple[File, ...]
    fingerprint: str
    max_bad_fraction: float

    def key(self, file: File, part: Part) -> str:
        """The name of a part's folder: it follows the recipe, the file as it is now, and the stretch of it."""
        return hashlib.sha256(repr((self.fingerprint, file, part.start, part.stop)).encode()).hexdigest()[:32]


class PartResult(NamedTuple):
    """A part that is done: its place among the store's parts, its folder's name, and its manifest."""

    place: tuple[int, int]
    """(number of its file, where it begins in it)"""
    key: str
    manifest: dict[str, Any]


@dataclass
class PartManifest:
    """What became of a part (`manifest.json` in its folder)."""

    chunks: list[tuple[int, int]] = field(default_factory=list)
    """(tokens, documents) of each."""
    masked: bool = False
    digest: str = ""
    """Of the records that were read."""
    kept: dict[str, list[int]] = field(default_factory=dict)
    """Language -> [documents, tokens, bytes of text]."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason and language, separated by a tab -> documents that a step did not want."""
    bad: dict[str, int] = field(default_factory=dict)
    """Reason -> records."""
    failure: str = ""
    """Why the part could not be read at all."""
    weight: int = 0
    """Bytes of the source, for progress."""


# ---------------------------------------------------------------- Parts


class Divide(beam.DoFn):
    """(store, file) numbers -> (store number, file number, part), for each part of the file."""

    def __init__(self, jobs: Sequence[StoreJob]):
        self.jobs = jobs

    def process(self, element: tuple[int, int]) -> Iterator[tuple[int, int, Part]]:
        number, file_number = element
        job = self.jobs[number]
        file = job.files[file_number]
        try:
            parts = job.recipe.reader.parts(file)
        except InputError:  # said by whoever reads it
            parts = [Part(file.url, 0, -1, file.size)]
        for part in parts:
            yield number, file_number, part


class TokenizePart(beam.DoFn):
    """(store number, file number, part) -> (store number, its result)."""

    def __init__(self, jobs: Sequence[StoreJob]):
        self.jobs = jobs

    def process(self, element: tuple[int, int, Part]) -> Iterator[tuple[int, PartResult]]:
        number, file_number, part = element
        job = self.jobs[number]
        place, key = (file_number, part.start), job.key(job.files[file_number], part)
        folder = kvstore_at(f"{job.directory}/parts/{key}")
        made = folder.read(b"manifest.json").result()
        if made.state == "value":
            yield number, PartResult(place, key, json.loads(made.value))
            return
        try:
            manifest = tokenize_part(job.recipe, part, folder)
        except InputError as error:
            yield number, PartResult(place, key, asdict(PartManifest(failure=str(error))))
            return
        folder.write(b"manifest.json", json.dumps(asdict(manifest)).encode()).result()
        yield number, PartResult(place, key, asdict(manifest))


def tokenize_part(recipe: Recipe, part: Part, folder: ts.KvStore) -> PartManifest:
    """Writes the tokens of a part into `folder`, chunk by chunk. Raises InputError if the file cannot be read."""
    manifest = PartManifest(weight=part.weight)
    digest = hashlib.sha256()
    bad: list[Bad] = []
    chunk: list[Tokenized] = []
    dropped: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    tokens = 0
    for outcome in recipe.outcomes(part, digest):
        if isinstance(outcome, Bad):
            bad.append(outcome)
            reasons[outcome.reason] += 1
        elif isinstance(outcome, Dropped):
            dropped[f"{outcome.reason}\t{outcome.language}"] += 1
        else:
            kept = manifest.kept.setdefault(outcome.language, [0, 0, 0])
            kept[:] = (kept[0] + 1, kept[1] + len(outcome.ids), kept[2] + outcome.text_bytes)
            manifest.masked |= outcome.learn is not None
            chunk.append(outcome)
            tokens += len(outcome.ids)
            if tokens >= CHUNK_TOKENS:
                _write_chunk(folder, manifest, chunk, recipe.tokenizer.vocab_size)
                chunk, tokens = [], 0
    if chunk:
        _write_chunk(folder, manifest, chunk, recipe.tokenizer.vocab_size)
    if bad:
        lines = [json_lines.line_of({"where": one.where, "reason": one.reason, "begins": one.excerpt}) for one in bad]
        folder.write(b"rejected.jsonl", b"".join(lines)).result()
    manifest.digest, manifest.dropped, manifest.bad = (
        digest.hexdigest(),
        dict(sorted(dropped.items())),
        dict(sorted(reasons.items())),
    )
    manifest.kept = dict(sorted(manifest.kept.items()))
    return manifest


def _write_chunk(folder: ts.KvStore, manifest: PartManifest, documents: Sequence[Tokenized], vocab_size: int) -> None:
    arrays = {
        "tokens": np.concatenate([document.ids for document in documents]).astype(token_type(vocab_size)),
        "lengths": np.array([len(document.ids) for document in documents], dtype=np.int64),
    }
    if any(document.learn is not None for document in documents):
        learn = [
            np.ones(len(document.ids), bool) if document.learn is None else document.learn for document in documents
        ]
        arrays["learn"] = np.packbits(np.concatenate(learn))
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    folder.write(f"chunk-{len(manifest.chunks):05}.npz".encode(), content.getvalue()).result()
    manifest.chunks.append((len(arrays["tokens"]), len(documents)))


# ---------------------------------------------------------------- Shards


@dataclass(frozen=True)
class ShardJob:
    """A shard of one array, with the chunks that it overlaps: (part key, chunk number, where its tokens or
    documents begin)."""

    store: int
    array: str
    start: int
    stop: int
    chunks: tuple[tuple[str, int, int], ...]
    chunk_tokens: tuple[int, ...]
    """Where the tokens of each chunk begin: offsets count tokens, but are divided by documents."""


class PlanStore(beam.DoFn):
    """(store number, its parts' manifests) -> the report, and the shards to write. No shard if too much is bad."""

    def __init__(self, jobs: Sequence[StoreJob]):
        self.jobs = jobs

    def process(self, element: tuple[int, Iterable[PartResult]]) -> Iterator[ShardJob]:
        number, results = element
        job = self.jobs[number]
        parts = {
            result.key: PartManifest(**result.manifest) for result in sorted(results, key=lambda result: result.place)
        }
        report = make_report(job, list(parts.values()))
        folder = kvstore_at(job.directory)
        rejected = [
            folder.read(f"parts/{key}/rejected.jsonl").result().value for key, manifest in parts.items() if manifest.bad
        ]
        # None deletes what an earlier try has left.
        folder.write(b"rejected.jsonl", b"".join(rejected) or None).result()
        folder.write(
            b"report.json", json.dumps(report, ensure_ascii=False, indent=1).encode(errors="backslashreplace")
        ).result()
        if report["refused"]:
            return
        tokens, documents = report["tokens"], report["documents"]
        create_arrays(job.directory, job.recipe.tokenizer.vocab_size, tokens, documents, report["masked"])
        chunks: list[tuple[str, int]] = []
        sizes: list[tuple[int, int]] = []
        for key, manifest in parts.items():
            chunks += [(key, chunk) for chunk in range(len(manifest.chunks))]
            sizes += [(tokens_here, documents_here) for tokens_here, documents_here in manifest.chunks]
        begins = np.concatenate(
            [np.zeros((1, 2), np.int64), np.cumsum(np.array(sizes, np.int64).reshape(-1, 2), axis=0)]
        )
        arrays = ["tokens", "ends", "offsets", *(["learn"] if report["masked"] else [])]
        for array in arrays:
            of = 1 if array == "offsets" else 0
            length = documents + 1 if array == "offsets" else tokens
            for start in range(0, length, store_format.SHARD_ELEMENTS):
                stop = min(start + store_format.SHARD_ELEMENTS, length)
                first, last = np.searchsorted(begins[:, of], [start, stop], side="right") - 1
                overlapping = range(min(int(first), len(chunks) - 1), min(int(last) + 1, len(chunks)))
                yield ShardJob(
                    number,
                    array,
                    start,
                    stop,
                    tuple((*chunks[chunk], int(begins[chunk, of])) for chunk in overlapping),
                    tuple(int(begins[chunk, 0]) for chunk in overlapping),
                )


class WriteShard(beam.DoFn):
    """A shard -> its store's number."""

    def __init__(self, jobs: Sequence[StoreJob]):
        self.jobs = jobs

    def process(self, shard: ShardJob) -> Iterator[tuple[int, int]]:
        job = self.jobs[shard.store]
        folder = kvstore_at(f"{job.directory}/parts")
        dtype = (
            token_type(job.recipe.tokenizer.vocab_size) if shard.array == "tokens" else store_format.TYPES[shard.array]
        )
        values = np.zeros(shard.stop - shard.start, dtype)
        if shard.array == "learn":
            values[:] = True
        for (key, chunk, begin), first_token in zip(shard.chunks, shard.chunk_tokens, strict=True):
            with np.load(io.BytesIO(folder.read(f"{key}/chunk-{chunk:05}.npz").result().value)) as arrays:
                here = _values(shard.array, arrays, first_token)
            low, high = max(begin, shard.start), min(begin + len(here), shard.stop)
            if low < high and here.size:
                values[low - shard.start : high - shard.start] = here[low - begin : high - begin]
        write_range(job.directory, shard.array, shard.start, values)
        yield shard.store, 1


def _values(array: str, arrays: Mapping[str, np.ndarray], first_token: int) -> np.ndarray:
    """What a chunk gives to an array of the store."""
    if array == "tokens":
        return arrays["tokens"]
    stops = np.cumsum(arrays["lengths"])
    if array == "offsets":
        # The last one is where the next chunk's first document begins: both write the same value.
        return first_token + np.concatenate([[0], stops]).astype(np.uint64)
    if array == "ends":
        ends = np.zeros(stops[-1], dtype=bool)
        ends[stops - 1] = True
        return ends
    return (
        np.unpackbits(arrays["learn"], count=int(stops[-1])).astype(bool)
        if "learn" in arrays
        else np.ones(stops[-1], bool)
    )


class Complete(beam.DoFn):
    """(store number, its written shards) -> the store's directory; the store is declared complete and the
    parts are deleted."""

    def __init__(self, jobs: Sequence[StoreJob]):
        self.jobs = jobs

    def process(self, element: tuple[int, Iterable[int]]) -> Iterator[str]:
        job = self.jobs[element[0]]
        report = json.loads(kvstore_at(job.directory).read(b"report.json").result().value)
        recipe = job.recipe
        languages = sorted(report["kept"])
        info = StoreInfo(
            task=recipe.task,
            split=recipe.split,
            fingerprint=job.fingerprint,
            sources=report["sources"],
            tokenizer_sha256=recipe.tokenizer.sha256,
            vocab_size=recipe.tokenizer.vocab_size,
            eos_id=recipe.tokenizer.eos_id if recipe.append_eos else None,
            language=languages[0] if len(languages) == 1 else "mul" if languages else "und",
            documents=report["documents"],
            tokens=report["tokens"],
            text_bytes=report["text_bytes"],
            masked=report["masked"],
            format=store_format.FORMAT,
        )
        finish(job.directory, info)
        delete_parts(job.directory)
        yield job.directory


def begin(directory: str) -> None:
    """Writes a first file where a store will be: if that cannot be, it is known at once. Raises InputError then."""
    try:
        kvstore_at(directory).write(b"parts/begun", b"").result()
    except (ValueError, OSError) as error:
        raise InputError(
            f"{directory}: cannot be written: {error}; make the bucket or folder, or choose another --output"
        ) from error


def delete_parts(directory: str) -> None:
    """Takes away what only the build needed."""
    kvstore_at(directory).delete_range(
        ts.KvStore.KeyRange("parts/", "parts0")
    ).result()  # "0" is the character after "/"


def make_report(job: StoreJob, manifests: Sequence[PartManifest]) -> dict[str, Any]:
    """What was read, kept, dropped and bad; `refused` says why no store is made of it, if so."""
    kept: dict[str, list[int]] = {}
    dropped: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for manifest in manifests:
        for language, counts in manifest.kept.items():
            kept[language] = [a + b for a, b in zip(kept.get(language, [0, 0, 0]), counts, strict=True)]
        dropped.update(manifest.dropped)
        bad.update(manifest.bad)
    documents, tokens, text_bytes = (sum(counts[i] for counts in kept.values()) for i in range(3))
    records = documents + sum(dropped.values()) + sum(bad.values())
    failures = [manifest.failure for manifest in manifests if manifest.failure]
    name = f"{job.recipe.task}/{job.recipe.split}"
    refused = ""
    if failures:
        refused = f"{name}: {len(failures)} of {len(manifests)} parts cannot be read; the first: {failures[0]}"
    elif sum(bad.values()) > job.max_bad_fraction * records:
        common = ", ".join(f"{reason} ({count:,})" for reason, count in bad.most_common(3))
        refused = (
            f"{name}: {sum(bad.values()):,} of {records:,} records are bad ({common}), over "
            f"--max-bad-fraction {job.max_bad_fraction:g}; "
            f"they are in {job.directory}/rejected.jsonl"
        )
    elif not tokens:
        refused = f"{name}: no document is left of {records:,} records in {len(job.files)} files"
    return {
        "task": job.recipe.task,
        "split": job.recipe.split,
        "refused": refused,
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
        "masked": any(manifest.masked for manifest in manifests),
        "sources": hashlib.sha256("".join(manifest.digest for manifest in manifests).encode()).hexdigest(),
        "kept": dict(sorted(kept.items())),
        "dropped": dict(sorted(dropped.items())),
        "bad": dict(sorted(bad.items())),
        "files": [(file.name, file.size, file.modified) for file in job.files],
    }


# ---------------------------------------------------------------- The pipeline


def pipeline(root: beam.Pipeline, jobs: Sequence[StoreJob]) -> beam.PCollection:
    """Builds the stores of `jobs`; the result are the directories of those that are complete."""
    return (
        root
        | "files" >> beam.Create(_files_of(jobs))
        | "spread files" >> beam.Reshuffle()
        | "divide" >> beam.ParDo(Divide(jobs))
        | "spread parts" >> beam.Reshuffle()
        | "tokenize" >> beam.ParDo(TokenizePart(jobs))
        | "by store" >> beam.GroupByKey()
        | "plan shards" >> beam.ParDo(PlanStore(jobs))
        | "spread shards" >> beam.Reshuffle()
        | "write shards" >> beam.ParDo(WriteShard(jobs))
        | "wait for shards" >> beam.GroupByKey()
        | "complete" >> beam.ParDo(Complete(jobs))
    )


def run_here(jobs: Sequence[StoreJob]) -> None:
    """The pipeline's steps one after the other in this process, without a runner: Beam's takes seconds for the smallest
    corpus, and in a notebook looks for its own extras."""
    results: dict[int, list[PartResult]] = {}
    for element in _files_of(jobs):
        for part in Divide(jobs).process(element):
            for number, result in TokenizePart(jobs).process(part):
                results.setdefault(number, []).append(result)
    for number, parts in results.items():
        shards = [shard for job in PlanStore(jobs).process((number, parts)) for shard in WriteShard(jobs).process(job)]
        if shards:
            list(Complete(jobs).process((number, [count for _, count in shards])))


def _files_of(jobs: Sequence[StoreJob]) -> list[tuple[int, int]]:
    """(store, file) numbers, the largest first: the last one running should be a small one."""
    work = [(number, file) for number, job in enumerate(jobs) for file in range(len(job.files))]
    return sorted(work, key=lambda element: -jobs[element[0]].files[element[1]].size)


def jobs_for(
    recipes: Iterable[Recipe], root: str | Path, *, max_bad_fraction: float, skip_missing: bool = False
) -> tuple[list[StoreJob], list[str], list[str]]:
    """The stores that are still to be built, those that are there, and those whose sources are missing (directories).

    Raises:
        InputError: sources are missing and are not to be skipped (all of them are named, with the paths
            looked for), or a store in place was made by another recipe or of other records.
    """
    jobs: list[StoreJob] = []
    complete: list[str] = []
    missing: list[tuple[Recipe, str]] = []
    for recipe in recipes:
        directory = store_directory(root, recipe.task, recipe.split)
        files = tuple(recipe.reader.files(recipe.split))
        if read_info(directory) is not None:
            store_format.TokenStore.open(directory, *recipe.fingerprints)
            check_sources(recipe, directory, files)
            delete_parts(directory)
            complete.append(directory)
        elif not files:
            missing.append((recipe, directory))
        else:
            jobs.append(StoreJob(recipe, directory, files, recipe.fingerprint, max_bad_fraction))
    if missing and not skip_missing:
        lines = [f"  {recipe.task}: {looked_for(recipe)}" for recipe, _ in missing]
        raise InputError(
            f"the sources of {len(missing)} of {len(missing) + len(jobs) + len(complete)} tasks are missing; "
            "looked for\n" + "\n".join(lines) + "\nput them there, point --data-root elsewhere, or give --skip-missing"
        )
    empty = [job for job in jobs if not any(file.size for file in job.files)]
    if empty:
        raise InputError(
            f"{empty[0].recipe.task}: its files are empty: {', '.join(file.url for file in empty[0].files[:3])}"
        )
    return jobs, complete, [directory for _, directory in missing]


def looked_for(recipe: Recipe) -> str:
    """Where a recipe's files should be."""
    splits = getattr(recipe.reader, "splits", None)
    return patterns_text(splits[recipe.split]) if splits else str(getattr(recipe.reader, "source", recipe.reader))
