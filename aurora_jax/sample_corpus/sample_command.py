"""`python -m aurora_jax data sample DIR`: fetch the packages, build beside the destination, then rename."""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from aurora_jax.errors import InputError
from aurora_jax.languages import LANGUAGES
from aurora_jax.sample_corpus import code, debian, pypi
from aurora_jax.sample_corpus.build import VERSION, CorpusManifest, build
from aurora_jax.sample_corpus.packages import Package
from aurora_jax.sample_corpus.packages_table import DEBIAN, PYPI, Collection
from aurora_jax.storage.atomic import new_folder

Registry = Literal["debian", "pypi", "auto"]


@dataclass(frozen=True)
class SampleCommand:
    """Build a real corpus in English, Finnish, Hindi, Japanese, Vietnamese and code from packages of Debian or PyPI."""

    directory: tyro.conf.Positional[Path]
    """The corpus to write: train/, heldout/, clean/ and manifest.json."""
    sources: Registry = "auto"
    """Where the text comes from: Debian packages through apt, the smaller PyPI corpus, or the first of them
    that is there."""
    cache: Path | None = None
    """A folder that keeps downloaded packages (default: ~/.cache/aurora-jax/packages)."""
    force: bool = False
    """Build anew even if the corpus is there already."""

    def run(self) -> None:
        """Build the corpus and print its table."""
        manifest = build_sample_corpus(self.directory, sources=self.sources, cache=self.cache, force=self.force)
        Console().print(_table(manifest))


def build_sample_corpus(
    directory: Path | str, *, sources: Registry = "auto", cache: Path | None = None, force: bool = False
) -> CorpusManifest:
    """Build the corpus into `directory`, which appears complete or not at all; a complete one of this
    builder's version is reused.

    Args:
      directory: where to; must not exist, be empty, or be a sample corpus.
      sources: "debian", "pypi", or "auto" for Debian where apt is there and PyPI elsewhere.
      cache: keeps the downloaded packages; default ~/.cache/aurora-jax/packages.
      force: build anew even if the corpus is there.

    Raises:
      InputError: the destination is something else, a download failed, or the text that was found is too little.
    """
    console = Console()
    directory = Path(os.path.abspath(directory))
    existing = CorpusManifest.read(directory)
    if existing is not None and not force:
        stale = existing.version != VERSION or sources not in ("auto", existing.registry)
        if stale or not all((directory / name).is_file() for name in existing.sha256):
            raise InputError(
                f"{directory} holds a sample corpus that is incomplete, of another version or of other "
                "sources; give --force to rebuild it."
            )
        console.print(
            f"{directory} is complete already (built from {existing.registry}); reusing it. --force rebuilds."
        )
        return existing
    if existing is None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not a sample corpus; choose another folder or remove it.")

    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aurora-jax" / "packages"
    with _progress(console) as progress, new_folder(directory) as unfinished:
        registry, collection, packages = _fetch(sources, cache, progress)
        return build(
            unfinished, registry, collection, packages, itertools.chain(code.standard_library(), code.npm()), progress
        )


def _fetch(sources: Registry, cache: Path, progress: Progress) -> tuple[str, Collection, list[Package]]:
    if sources != "pypi":
        found = _fetch_debian(cache, progress)
        if found is not None:
            return found
        absent = "apt is not here, or its package lists are absent and only root can fetch them (`apt-get update`)"
        if sources == "debian":
            raise InputError(f"{absent}; run it, or use --sources pypi.")
        progress.console.print(f"{absent}: building the smaller corpus from PyPI instead.")
    task = progress.add_task("downloading", total=len(PYPI.packages))
    packages = pypi.fetch(PYPI.packages, cache, lambda count: progress.update(task, completed=count))
    return "pypi", PYPI, packages


def _fetch_debian(cache: Path, progress: Progress) -> tuple[str, Collection, list[Package]] | None:
    records = debian.available(DEBIAN.packages)
    if len(records) < len(DEBIAN.packages) and debian.update_lists():
        records = debian.available(DEBIAN.packages)
    if not records:
        return None
    for name in DEBIAN.packages:
        if name not in records:
            progress.console.print(f"[yellow]{name} is not in this release's package lists: skipped[/yellow]")
    task = progress.add_task("downloading", total=sum(record.size for record in records.values()))

    def report(size: int) -> None:
        progress.update(task, completed=size)

    try:
        packages = debian.fetch(records.values(), cache, report)
    except InputError:
        # Versions move: stale lists name archives that are gone.
        if not debian.update_lists():
            raise
        packages = debian.fetch(debian.available(DEBIAN.packages).values(), cache, report)
    if DEBIAN.aligned.package in records:
        return "debian", DEBIAN, packages
    # Ubuntu ships Chromium as a snap; the held-out text then comes from the one PyPI package that is aligned too.
    aligned = PYPI.aligned
    progress.console.print(f"held-out text from {aligned.package} (PyPI) instead of {DEBIAN.aligned.package}")
    collection = dataclasses.replace(DEBIAN, train=(*DEBIAN.train, aligned), aligned=aligned)
    return "debian", collection, packages + pypi.fetch([aligned.package], cache, lambda count: None)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _table(manifest: CorpusManifest) -> Table:
    table = Table(
        title=f"sample corpus from {manifest.registry}", caption="manifest.json lists the sources and their licences"
    )
    table.add_column("language")
    for name in ("documents", "lines", "train MB", "held-out MB", "clean MB", "sources"):
        table.add_column(name, justify="right")
    for part in LANGUAGES:
        train = manifest.totals["train"][part]
        megabytes = (f"{manifest.totals[split][part]['bytes'] / 1e6:.2f}" for split in ("train", "heldout", "clean"))
        sources = {entry.package for entry in manifest.sources if entry.split == "train" and part in entry.languages}
        table.add_row(part, f"{train['documents']:,}", f"{train['lines']:,}", *megabytes, str(len(sources)))
    return table
