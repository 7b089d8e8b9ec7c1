"""`aurora data describe MIXTURE`: what a mixture is made of, what of it is there, and how often a planned run
would read it.

Needs neither files nor stores nor a tokenizer, and TensorFlow only for mixtures that are not ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aurora_jax.data.corpora.catalogue import absolute
from aurora_jax.data.look.inventory import UNKNOWN, TaskRow, rate_text, rates_of, shares, task_rows
from aurora_jax.errors import InputError
from aurora_jax.storage.files import patterns_text


@dataclass(frozen=True)
class DescribeCommand:
    """Show what a mixture is made of: tasks, rates, licences, files, stores, and epochs over a planned run."""

    mixture: tyro.conf.Positional[str]
    """A mixture or task: nano_base, nano_cap, nano_cat (sample corpus), aurora_m_cap, aurora_m_cat, or one of
    --modules."""
    data_root: str = "corpus"
    """Folder of the sources, as for `aurora data build`."""
    stores: str = "stores"
    """Folder of the token stores."""
    modules: tuple[str, ...] = ()
    """Python modules that register further tasks and mixtures with SeqIO."""
    steps: int | None = None
    """Steps of the planned run, for epochs."""
    tokens: float | None = None
    """Tokens of the planned run, such as 377e9, in place of its steps."""
    batch_size: int = 2048
    """Sequences a step of the planned run; Aurora-M's are 2,048."""
    sequence_length: int = 2048
    """Tokens a sequence of the planned run; Aurora-M's are 2,048."""
    picture: Path | None = None
    """Write the chart there, as PNG or SVG."""
    markdown: Path | None = None
    """Write the table of tasks there, as Markdown."""

    def run(self) -> None:
        """Raises InputError: no such mixture, a place that cannot be reached, or both --steps and --tokens."""
        if self.steps is not None and self.tokens is not None:
            raise InputError("give --steps or --tokens of the planned run, not both")
        rates = rates_of(self.mixture, self.data_root, self.modules)
        sequences = None if self.steps is None else self.steps * self.batch_size
        if self.tokens is not None:
            sequences = round(self.tokens / self.sequence_length)
        rows = task_rows(rates, self.data_root, self.stores, sequences, self.sequence_length)
        console = Console()
        console.print(tasks_table(rows))
        console.print(sources_text(rows, self.data_root), soft_wrap=True)
        console.print(shares_table(rows))
        console.print(summary(self.mixture, rows, sequences, self.sequence_length), highlight=False, markup=False)
        if self.picture is not None:
            from aurora_jax.data.look.describe_chart import draw

            draw(self.mixture, rows, self.picture)
            console.print(f"chart: {self.picture}", highlight=False)
        if self.markdown is not None:
            self.markdown.write_text(markdown(rows))


def tasks_table(rows: Sequence[TaskRow]) -> Table:
    """Tasks with their rates, files, stores and epochs."""
    table = Table(title="tasks", title_justify="left")
    for name in ("task", "language", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("rate", "files", "tokens", "documents", "epochs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            row.language,
            row.kind,
            rate_text(row.rate),
            _files_text(row),
            f"{row.store.tokens:,}" if row.store else UNKNOWN,
            f"{row.store.documents:,}" if row.store else UNKNOWN,
            UNKNOWN if row.epochs is None else f"{row.epochs:.3g}",
        )
    return table


def sources_text(rows: Sequence[TaskRow], data_root: str) -> Text:
    """Where the files of each task are expected, and under which licence; paths are whole, so that they can
    be copied."""
    folder = absolute(data_root)
    text = Text(f"expected under {folder}\n", style="italic")
    for row in rows:
        paths = [pattern.removeprefix(f"{folder}/") for pattern in row.expected]
        text.append(f"  {row.name}  ", style="not italic")
        text.append(patterns_text(paths) or f"by {row.origin}", style="not italic bold" if row.found else "not italic")
        text.append(f"  [{row.license}]\n", style="not italic dim")
    return text


def shares_table(rows: Sequence[TaskRow]) -> Table:
    """Shares of the mixture by language and by kind."""
    table = Table(title="shares", title_justify="left")
    for by in ("language", "kind"):
        table.add_column(f"by {by}")
        table.add_column("", justify="right")
    sides = [list(shares(rows, by).items()) for by in ("language", "kind")]
    for number in range(max(map(len, sides))):
        cells = []
        for side in sides:
            cells += [side[number][0], f"{side[number][1]:.2%}"] if number < len(side) else ["", ""]
        table.add_row(*cells)
    return table


def summary(mixture: str, rows: Sequence[TaskRow], sequences: int | None, sequence_length: int) -> str:
    """A sentence or two: how much of the mixture can be built, is built, and would be read."""
    there = sum(row.rate for row in rows if row.found)
    built = sum(row.rate for row in rows if row.store)
    tokens = sum(row.store.tokens for row in rows if row.store)
    text = (
        f"{mixture}: {len(rows)} tasks; files of {sum(bool(row.found) for row in rows)} are there "
        f"({there:.1%} of the mixture), "
        f"stores of {sum(row.store is not None for row in rows)} ({built:.1%}; {tokens:,} tokens)."
    )
    if sequences is not None:
        most = max((row for row in rows if row.epochs is not None), key=lambda row: row.epochs or 0, default=None)
        text += f" The planned run reads {sequences:,} sequences, {sequences * sequence_length:,} tokens"
        text += f"; most often {most.name}, {most.epochs:.3g} times." if most else "."
    return text


def markdown(rows: Sequence[TaskRow]) -> str:
    """The table of tasks for a document: folders are shown below the data root."""
    lines = [
        "| task | language | kind | rate | licence | under the data root | note |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        folder = f"{row.origin}/"
        files = [pattern[pattern.index(folder) :] if folder in pattern else pattern for pattern in row.expected]
        cells = (
            row.name,
            row.language,
            row.kind,
            rate_text(row.rate),
            row.license,
            f"`{patterns_text(files)}`",
            row.note,
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _files_text(row: TaskRow) -> str:
    if row.found is None:
        return UNKNOWN
    if not row.found:
        return "missing"
    return f"{len(row.found):,} ({_size_text(sum(file.size for file in row.found))})"


def _size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
