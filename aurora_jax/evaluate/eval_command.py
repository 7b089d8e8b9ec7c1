"""`aurora eval`: bits per byte of a checkpoint on held-out text, and tasks of the harness."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from aurora_jax.checkpoints.format import read_run
from aurora_jax.errors import InputError
from aurora_jax.evaluate.evaluations import described
from aurora_jax.evaluate.held_out import FP32, evaluate_checkpoint
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.mesh import MeshConfig
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Location

HARNESS_ALONE = ("include_path", "task_data", "limit", "shots", "answers", "output")
HELD_OUT_ALONE = ("modules", "tasks", "sequence_length", "attend_across_documents", "json")
"""Options of the one kind of evaluation that say nothing to the other."""
AsCheckpoint = Callable[[Path], AbstractContextManager[Location]]


@dataclass(frozen=True)
class EvalCommand:
    """Prints loss and bits per byte of held-out text, task by task: of what the run that wrote the checkpoint is judged
    on, or of --tasks. With --harness, scores of tasks of EleutherAI's lm-evaluation-harness, of one model or several.

    The text is read as the run that wrote the checkpoint reads it: windows of its length, documents that attend to each
    other or do not. A checkpoint that was not written by a run is read in windows of its longest sequence, at most
    2,048 tokens, across documents.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A converted checkpoint, a stage of a run (RUN/stages/NAME), or a run (its newest step)."""
    corpus: str = "corpus"
    """Folder of the sources, as for `aurora data build`; not needed where the stores are."""
    stores: str = "stores"
    """Folder of the token stores; those that are missing are built."""
    modules: tuple[str, ...] = ()
    """Python modules that register further tasks with SeqIO."""
    tasks: tuple[str, ...] = ()
    """Tasks whose validation split is read, in place of those that the run is judged on."""
    batch_size: int = 16
    """Sequences that are read at once."""
    sequence_length: int | None = None
    """Tokens a window, in place of the run's."""
    attend_across_documents: bool | None = None
    """Whether documents of a window see each other, in place of what the run does."""
    harness: tuple[str, ...] = ()
    """Tasks, groups or tags of the harness (`pip install -e '.[eval]'`); those of local files are called
    aurora_..., and --task-data says where the files are. suite_en, suite_ja, suite_hi and suite_vi are those of
    Aurora-M's evaluation with its number of examples."""
    include_path: Path | None = None
    """Of --harness: folder with task files of your own."""
    task_data: Path | None = None
    """Of --harness: folder with the files that the aurora_... tasks read."""
    limit: int | None = None
    """Of --harness: documents a task, for a first look."""
    shots: int | None = None
    """Of --harness: examples before each document, in place of what the task says."""
    batch_tokens: int = 8_192
    """Of --harness: tokens that are read at once, padding included."""
    answers: Path | None = None
    """Of --harness: folder that keeps answers as they come; the same command goes on after an interruption."""
    output: Path | None = None
    """Of --harness: file for the results. Of one model in the harness's own layout, samples included; of several a
    table; .html for a page with the table."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """All devices, along fsdp unless told otherwise."""
    compute: ComputeConfig = FP32
    json: Path | None = None
    """Write the scores and how they were measured there too."""
    others: tyro.conf.Positional[tuple[Path, ...]] = ()
    """With --harness: further models, which are compared with the first. Any of them may be a PyTorch folder of Hugging
    Face's, which is converted first, into a folder that goes at the end."""

    def run(self, as_checkpoint: AsCheckpoint = nullcontext) -> None:
        """Runs it.

        Args:
            as_checkpoint: makes a checkpoint of a model of --harness, for as long as it is entered.

        Raises:
            InputError: as `evaluate_checkpoint` and `run_tasks`.
        """
        without = HELD_OUT_ALONE if self.harness else HARNESS_ALONE
        defaults = {each.name: each.default for each in fields(self)}
        if given := [name for name in without if getattr(self, name) != defaults[name]]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{flags} {'do not go with' if self.harness else 'only go with'} --harness.")
        if self.harness:
            self._run_harness(as_checkpoint)
            return
        if self.others:
            raise InputError("Several models are compared by --harness TASK [TASK ...]; for bits per byte give one.")
        row = evaluate_checkpoint(
            self.checkpoint,
            corpus=self.corpus,
            stores=self.stores,
            tasks=self.tasks,
            modules=self.modules,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            attend_across_documents=self.attend_across_documents,
            mesh=self.mesh,
            compute=self.compute,
        )
        table = Table(
            "task", "bits per byte", "nats per token", "tokens", "bytes", "windows", title=str(self.checkpoint)
        )
        for task, score in row["evaluation"].items():
            counts = (f"{score['tokens']:,}", f"{score['bytes']:,.0f}", f"{score['windows']:,}")
            table.add_row(task, f"{score['bits_per_byte']:.4f}", f"{score['loss']:.4f}", *counts)
        console = Console()
        console.print(table)
        console.print(described(row), highlight=False)
        run = read_run(self.checkpoint) or {}
        ours = {name: row["settings"][name] for name in ("sequence_length", "attend_across_documents")}
        theirs = {name: run[name] for name in ours if name in run}
        if not theirs:
            console.print(
                "The checkpoint does not say how a run has read text: length and masks are the default's or yours."
            )
        elif theirs != ours:
            console.print(f"These are not comparable with the run's own figures: it has {theirs}.", highlight=False)
        for task, text in row["settings"]["texts"].items():
            if not run.get("held_out", {}).get(task, {}).get("sources", text).startswith(text):
                console.print(f"{task}: this is other text than the run's own figures are of.", highlight=False)
        if self.json is not None:
            self.json.write_text(json.dumps(row, indent=1) + "\n")

    def _run_harness(self, as_checkpoint: AsCheckpoint) -> None:
        from aurora_jax.evaluate.harness.run import require_harness, run_tasks, table_of, to_json

        require_harness()
        models = (self.checkpoint, *self.others)
        if len(set(map(str, models))) < len(models):
            raise InputError(f"A model is named twice: {', '.join(map(str, models))}.")
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise InputError(f"--output {self.output}: there is no such folder.")
        results = {}
        for path in models:
            with as_checkpoint(path) as checkpoint:
                results[str(path)] = run_tasks(
                    checkpoint,
                    self.harness,
                    include_path=self.include_path,
                    task_data=self.task_data,
                    limit=self.limit,
                    shots=self.shots,
                    batch_tokens=self.batch_tokens,
                    compute=self.compute,
                    mesh=self.mesh,
                    answers=self.answers,
                )
        table = table_of(results)
        console = Console(record=True, width=None if sys.stdout.isatty() else 160)
        for each in _tables(table):
            console.print(each)
        if self.output is None:
            return
        if self.output.suffix == ".html":
            write_file(self.output, console.export_html(inline_styles=True))
        else:
            write_file(self.output, to_json(results[str(models[0])] if len(models) == 1 else table))
        print(f"wrote {self.output}")


def _tables(table: dict[str, Any]) -> Iterator[Table]:
    """Scores of each model, and their differences to the first."""
    base = table["base"]
    for name, model in table["models"].items():
        shown = Table("task", "metric", "score", "95 % interval", "documents", "detectable", title=name)
        for column in ("difference", "95 % interval", "detectable", "0 to 1", "1 to 0") if name != base else ():
            shown.add_column(column)
        for task, score in model["scores"].items():
            row = [task, score["metric"], f"{score['value']:.4f}", f"{score['low']:.4f} to {score['high']:.4f}"]
            row += [f"{score['documents']:,}", f"{score['detectable']:.4f}"]
            if against := score.get("against_base"):
                difference = against["difference"]
                row += [f"{difference['value']:+.4f}", f"{difference['low']:+.4f} to {difference['high']:+.4f}"]
                row += [f"{against['detectable']:.4f}"]
                for kind in ("gained", "lost"):
                    row.append("" if against[kind] is None else f"{against[kind]} ({against[f'{kind}_by_chance']:.0f})")
            shown.add_row(*row)
        shown.caption = "detectable: the smallest difference that so many documents show at 80 % power" + (
            "" if name == base else f"; differences are to {base}, on the same documents; in brackets: by chance"
        )
        yield shown
