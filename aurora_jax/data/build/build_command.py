"""`aurora data build MIXTURE ...`: token stores out of sources, with progress and a table at the end."""

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from aurora_jax.data.batches.mixture import left_out
from aurora_jax.data.batches.store import FORMAT, TokenStore, kvstore_at
from aurora_jax.data.build import beam_runner
from aurora_jax.data.build.beam_runner import Runner
from aurora_jax.data.build.pipeline import StoreJob, begin, jobs_for, pipeline, run_here
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.errors import InputError


@dataclass(frozen=True)
class BuildCommand:
    """Tokenize the tasks of mixtures into token stores, OUTPUT/TASK/SPLIT. The same command again goes on
    where it was stopped.

    A store that is complete is checked against its sources and left alone. Records that cannot be used go to
    rejected.jsonl in the store's folder, with the reason.
    """

    mixtures: tyro.conf.Positional[tuple[str, ...]]
    """SeqIO mixtures or tasks: nano_base, nano_cap, nano_cat (sample corpus), aurora_m_cap, aurora_m_cat, or
    one of --modules; or tasks with their rates, sample_fi=0.5,sample_en=0.5."""
    tokenizer: Path
    """tokenizer.json, or its folder (a checkpoint of convert has one), a SentencePiece .model, or the word bytes."""
    output: str = "stores"
    """Folder of the stores: a local path, gs:// or s3://."""
    data_root: str = "corpus"
    """Folder of the sources: a sample corpus, or Aurora-M's (`aurora data describe aurora_m_cap` lists what
    is expected where)."""
    splits: tuple[str, ...] = ("train",)
    """Splits to build; tasks without such a split are passed over unless it is `train`."""
    modules: tuple[str, ...] = ()
    """Python modules that register further tasks and mixtures with SeqIO."""
    skip_missing: bool = False
    """Leave out the tasks whose files are not there; the others' rates are then raised in proportion, here
    and in training."""
    max_bad_fraction: float = 0.001
    """Largest share of bad records in a task (not UTF-8, not JSON, no text field, too long ...); no store is
    made of one with more."""
    runner: Runner = "direct"
    """Beam's runner; direct is this machine."""
    workers: int = os.cpu_count() or 1
    """Processes of the direct runner."""
    beam_options: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the runner, as --beam-options=--project=P; may be given many times (Dataflow: project,
    region, temp_location)."""

    def run(self) -> None:
        """Raises InputError if something given is wrong, or too much of a source is bad."""
        from aurora_jax.data.registry.tasks import mixture_rates, register
        from aurora_jax.data.registry.vocabulary import vocabulary_from

        registry = register(self.data_root, vocabulary_from(self.tokenizer), self.modules)
        if not self.mixtures:
            raise InputError("aurora data build: name at least one mixture or task, such as nano_cap")
        rates = {mixture: mixture_rates(mixture) for mixture in self.mixtures}
        tasks = dict.fromkeys(task for pairs in rates.values() for task, _ in pairs)
        recipes = [
            registry.recipe(task, split)
            for task in tasks
            for split in self.splits
            if split == "train" or split in registry.splits(task)
        ]
        console = Console(width=None if sys.stdout.isatty() else 130)
        stores = build_stores(
            recipes,
            self.output,
            max_bad_fraction=self.max_bad_fraction,
            skip_missing=self.skip_missing,
            runner=self.runner,
            workers=self.workers,
            beam_options=self.beam_options,
            console=console,
        )
        console.print(summary(stores))
        there = {store.info.task for store in stores.values() if store.info.split == "train"}
        for mixture, pairs in rates.items():
            if "train" in self.splits and (absent := left_out(mixture, pairs, there)):
                console.print(absent, style="yellow", highlight=False, markup=False)


def build_stores(
    recipes: Sequence[Recipe],
    output: str | Path,
    *,
    max_bad_fraction: float = 0.001,
    skip_missing: bool = False,
    runner: Runner = "direct",
    workers: int = 1,
    beam_options: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, TokenStore]:
    """Builds the stores that are not there yet and opens all of them.

    Args:
        recipes: what to build; see `tasks.Registry.recipe`.
        output: folder of the stores.
        max_bad_fraction: largest share of bad records of a task.
        skip_missing: leave out tasks whose files are not there.
        runner: Beam's runner.
        workers: processes of the direct runner; with 1, everything is done in this process, without Beam's runner.
        beam_options: further options of the runner.
        console: where progress goes; None for none.

    Returns:
        The stores by "task/split".

    Raises:
        InputError: sources are missing, too much of one is bad, or a store in place does not match; the other
            stores are built. Or the output cannot be written (a full disk).
    """
    jobs, complete, missing = jobs_for(recipes, output, max_bad_fraction=max_bad_fraction, skip_missing=skip_missing)
    if console and missing:
        console.print(f"[yellow]left out, for lack of files:[/yellow] {', '.join(directory for directory in missing)}")
    for job in jobs:
        begin(job.directory)
    if jobs:
        with _progress(jobs, console if runner == "direct" else None):
            if runner == "direct" and workers == 1:
                with beam_runner.errors_named():
                    run_here(jobs)
            else:
                beam_runner.run(lambda root: pipeline(root, jobs), runner, workers, beam_options)
        refused = [reason for job in jobs if (reason := _refusal(job))]
        if refused:
            raise InputError("\n".join(refused))
    directories = [*complete, *(job.directory for job in jobs)]
    stores = {"/".join(directory.split("/")[-2:]): TokenStore.open(directory) for directory in sorted(directories)}
    older = [name for name, store in stores.items() if store.info.format < FORMAT]
    if console and older:
        console.print(
            f"[yellow]of an earlier format, in which documents without a text stay:[/yellow] {', '.join(older)}; "
            "they are opened as they are, and built anew once their folders are deleted"
        )
    return stores


def _refusal(job: StoreJob) -> str:
    content = kvstore_at(job.directory).read(b"report.json").result()
    if content.state != "value":
        return f"{job.directory}: the pipeline left no report; run it again"
    return json.loads(content.value)["refused"]


@contextmanager
def _progress(jobs: Sequence[StoreJob], console: Console | None) -> Iterator[None]:
    """Shows the share of the sources' bytes whose parts are done, by the manifests in the parts' folders meanwhile."""
    if console is None:
        yield
        return
    total = sum(file.size for job in jobs for file in job.files)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    ended = threading.Event()
    interval = 5.0 if "://" in jobs[0].directory else 0.5
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"tokenize {total / 1e6:,.1f} MB of {len(jobs)} sources", total=total)

        def watch() -> None:
            done: dict[tuple[str, bytes], int] = {}
            while not ended.wait(interval):
                for job in jobs:
                    folder = kvstore_at(f"{job.directory}/parts")
                    for key in folder.list().result():
                        if key.endswith(b"manifest.json") and (job.directory, key) not in done:
                            content = folder.read(key).result()
                            done[job.directory, key] = (
                                json.loads(content.value)["weight"] if content.state == "value" else 0
                            )
                progress.update(bar, completed=min(sum(done.values()), total))
                if sum(done.values()) >= total:
                    progress.update(bar, description="write the stores")
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            progress.update(bar, completed=total, description="write the stores")
        finally:
            ended.set()
            watcher.join()


def summary(stores: dict[str, TokenStore]) -> Table:
    """Documents, tokens, bytes a token, and what was left out, by task and language."""
    table = Table("task", "split", "language", "documents", "tokens", "bytes/token", "dropped", "bad")
    table.columns[0].overflow = "fold"
    for column in table.columns[3:]:
        column.justify = "right"
    totals = [0, 0, 0, 0, 0]
    for name, store in stores.items():
        content = kvstore_at(store.directory).read(b"report.json").result()
        report = json.loads(content.value)
        dropped, bad = sum(report["dropped"].values()), sum(report["bad"].values())
        for language, (documents, tokens, text_bytes) in report["kept"].items():
            here = sum(count for reason, count in report["dropped"].items() if reason.endswith(f"\t{language}"))
            counts = (f"{documents:,}", f"{tokens:,}", f"{text_bytes / max(1, tokens):.2f}", f"{here:,}", f"{bad:,}")
            table.add_row(*name.rsplit("/", 1), language, *counts)
        totals = [
            a + b
            for a, b in zip(
                totals, (report["documents"], report["tokens"], report["text_bytes"], dropped, bad), strict=True
            )
        ]
    documents, tokens, text_bytes, dropped, bad = totals
    table.add_section()
    table.add_row(
        "all", "", "", f"{documents:,}", f"{tokens:,}", f"{text_bytes / max(1, tokens):.2f}", f"{dropped:,}", f"{bad:,}"
    )
    return table
