"""`aurora data build MIXTURE ...`: token stores out of sources, with progress and a table at the end."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.data.batches.mixture import left_out
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.build.beam_runner import Runner
from aurora_jax.data.build.stores import build_stores
from aurora_jax.errors import InputError
from aurora_jax.storage.kvstore import kvstore_at


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
