"""The build from end to end: packages -> clean documents -> held-out, train and clean files with their manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from rich.progress import Progress

from aurora_jax.errors import InputError
from aurora_jax.languages import LANGUAGES, NATURAL
from aurora_jax.sample_corpus import extract
from aurora_jax.sample_corpus.clean import Deduplicator, prose
from aurora_jax.sample_corpus.code import CodeFile, is_well_documented
from aurora_jax.sample_corpus.heldout import RULE, select
from aurora_jax.sample_corpus.packages import Package
from aurora_jax.sample_corpus.packages_table import Collection
from aurora_jax.sample_corpus.reading import CATALOGUES, read_aligned, read_documents
from aurora_jax.storage import json_lines
from aurora_jax.storage.records import described

BUILDER = "aurora-jax sample corpus"
VERSION = 2

HELD_OUT_ENGLISH_BYTES = 110_000

_SHORTEST_DOCUMENT = 80
_SHORTEST_CLEAN_DOCUMENT = 240

T = TypeVar("T")
CorpusRecord = dict[str, str]


@dataclass(frozen=True)
class SourceEntry:
    """What one package gave to one split: `bytes` of UTF-8 text, `documents` and `lines`, over its `languages`."""

    split: str
    package: str
    version: str
    license: str
    languages: tuple[str, ...]
    bytes: int
    documents: int
    lines: int


@dataclass(frozen=True)
class CorpusManifest:
    """What lies in a sample corpus and where it comes from; `manifest.json`.

    Attributes:
      builder, version: who built it; another version builds other data.
      registry: "debian" or "pypi".
      held_out: the rule that chose the held-out text.
      totals: split -> language or "code" -> {"bytes", "documents", "lines"}.
      sources: one entry for each split, package and licence.
      sha256: the file's path relative to the corpus -> its SHA-256, in hexadecimal.
    """

    builder: str
    version: int
    registry: str
    held_out: str
    totals: dict[str, dict[str, dict[str, int]]]
    sources: list[SourceEntry]
    sha256: dict[str, str]

    def write(self, directory: Path) -> None:
        """Write `manifest.json`."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (directory / "manifest.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> CorpusManifest | None:
        """The manifest in `directory`, or None where there is none of ours."""
        try:
            file = directory / "manifest.json"
            manifest = described(file.read_bytes(), cls, file)
        except (OSError, InputError):
            return None
        return manifest if manifest.builder == BUILDER else None


def build(
    directory: Path,
    registry: str,
    collection: Collection,
    packages: Sequence[Package],
    code: Iterable[CodeFile],
    progress: Progress,
) -> CorpusManifest:
    """Read the packages and write the corpus into the empty folder `directory`. The same inputs give the same bytes.

    Args:
      directory: an existing folder.
      registry: a name for the manifest.
      collection: which files of the packages to read; sources whose package is not among `packages` are skipped.
      packages: archives on disk. The aligned source's must be among them.
      code: in a fixed order.
      progress: gets a task that counts bytes of packages read.

    Raises:
      InputError: a language falls short of the collection's minimum, or there is no aligned text.
    """
    by_name = {package.name: package for package in packages}
    sources = [source for source in collection.train if source.package in by_name]
    task = progress.add_task("reading", total=sum(by_name[source.package].size for source in sources))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        with _no_main_module():  # processes are started as tasks come
            aligned = pool.submit(read_aligned, by_name[collection.aligned.package].path, collection.aligned)
            readings = [pool.submit(read_documents, by_name[source.package].path, source) for source in sources]
        documents = []
        for source, reading in zip(sources, readings, strict=True):
            documents.append(_outcome(reading, by_name[source.package]))
            progress.advance(task, by_name[source.package].size)
        segments = _outcome(aligned, by_name[collection.aligned.package])
    held_out = select(segments, HELD_OUT_ENGLISH_BYTES)
    if not held_out:
        raise InputError(
            f"{collection.aligned.package}: no messages found that are aligned across {', '.join(NATURAL)}; "
            "use another --sources."
        )

    splits: dict[str, dict[str, list[CorpusRecord]]] = {
        split: {part: [] for part in LANGUAGES} for split in ("train", "heldout", "clean")
    }
    held_out_lines = []
    for language in NATURAL:
        for document in held_out:
            lines = [segment[language] for segment in document]
            held_out_lines += lines
            splits["heldout"][language].append(
                _record(lines, collection.aligned.package, collection.aligned.license, language)
            )

    english_lines: list[str] = []
    for language in NATURAL:  # English first: what is equal to it elsewhere was left untranslated
        duplicates = Deduplicator(barred=[*held_out_lines, *english_lines])
        for source, by_language in zip(sources, documents, strict=True):
            for lines in _unique(by_language.get(language, []), duplicates, grouped=source.kind in CATALOGUES):
                if language == "en":
                    english_lines += lines
                _add(splits["train"], lines, source.package, source.license, language, _SHORTEST_DOCUMENT)
                _add(
                    splits["clean"],
                    prose(lines, language),
                    source.package,
                    source.license,
                    language,
                    _SHORTEST_CLEAN_DOCUMENT,
                )

    projects = _add_code(splits, code)
    for language in NATURAL:
        size = sum(len(record["text"].encode()) for record in splits["train"][language])
        if size < collection.minimum_bytes:
            absent = sorted(set(collection.packages) - set(by_name))
            raise InputError(
                f"only {size:,} bytes of training text in {language!r}, and {collection.minimum_bytes:,} are needed; "
                f"packages that were not found: {', '.join(absent) or 'none'}. Use another --sources."
            )
    versions = {package.name: package.version for package in packages} | projects
    return _write(directory, registry, splits, versions)


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Processes that are spawned in the block do not run the caller's script again, which they need nothing of: it may
    be three lines that begin with this corpus."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _outcome(reading: Future[T], package: Package) -> T:
    try:
        return reading.result()
    except (ValueError, OSError, EOFError, struct.error, tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{package.path} cannot be read ({error}); delete it, so that it is downloaded again."
        ) from error


def _unique(
    documents: Iterable[extract.DocumentLines], duplicates: Deduplicator, grouped: bool
) -> Iterable[extract.DocumentLines]:
    for lines in documents:
        fresh = duplicates.new(lines)
        yield from extract.group(fresh) if grouped else [fresh]


def _add(
    split: Mapping[str, list[CorpusRecord]],
    lines: Sequence[str],
    package: str,
    license: str,
    language: str,
    shortest: int,
) -> None:
    # A character of Japanese says about twice what a Latin letter does.
    weight = 2 if language == "ja" else 1
    if weight * sum(map(len, lines)) >= shortest:
        split[language].append(_record(lines, package, license, language))


def _add_code(splits: Mapping[str, Mapping[str, list[CorpusRecord]]], files: Iterable[CodeFile]) -> dict[str, str]:
    """Add the code to the splits and return project -> version. A text goes in once; one that is held out,
    never into train."""
    rows = list(files)
    seen = set()
    projects = {}
    for file in sorted(
        rows, key=lambda file: not file.held_out
    ):  # stable: the held-out first, so that their copies are dropped
        key = file.text.strip()
        if key in seen:
            continue
        seen.add(key)
        projects[file.project] = file.version
        record = {
            "text": file.text,
            "source": f"{file.project}/{file.path}",
            "license": file.license,
            "language": "code",
        }
        splits["heldout" if file.held_out else "train"]["code"].append(record)
        if not file.held_out and file.path.endswith(".py") and is_well_documented(file.text):
            splits["clean"]["code"].append(record)
    return projects


def _record(lines: Sequence[str], package: str, license: str, language: str) -> CorpusRecord:
    return {"text": "\n".join(lines), "source": package, "license": license, "language": language}


def _write(
    directory: Path, registry: str, splits: Mapping[str, Mapping[str, list[CorpusRecord]]], versions: Mapping[str, str]
) -> CorpusManifest:
    totals: dict[str, dict[str, dict[str, int]]] = {}
    sources: dict[tuple[str, str, str], tuple[Counter[str], set[str]]] = {}
    sha256 = {}
    for split, parts in splits.items():
        (directory / split).mkdir()
        totals[split] = {}
        for part, records in parts.items():
            total: Counter[str] = Counter(bytes=0, documents=0, lines=0)
            for record in records:
                # A file of code names its path after its project; in totals the project counts.
                package = record["source"].partition("/")[0]
                counts, languages = sources.setdefault((split, package, record["license"]), (Counter(), set()))
                size = {"bytes": len(record["text"].encode()), "documents": 1, "lines": record["text"].count("\n") + 1}
                counts.update(size)
                total.update(size)
                languages.add(part)
            totals[split][part] = dict(total)
            content = b"".join(map(json_lines.line_of, records))
            (directory / split / f"{part}.jsonl").write_bytes(content)
            sha256[f"{split}/{part}.jsonl"] = hashlib.sha256(content).hexdigest()
    entries = [
        SourceEntry(
            split,
            package,
            versions[package],
            license,
            tuple(sorted(languages)),
            counts["bytes"],
            counts["documents"],
            counts["lines"],
        )
        for (split, package, license), (counts, languages) in sources.items()
    ]
    manifest = CorpusManifest(BUILDER, VERSION, registry, RULE, totals, entries, sha256)
    manifest.write(directory)
    return manifest
