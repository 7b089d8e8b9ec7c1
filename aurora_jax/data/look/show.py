"""`aurora data show MIXTURE|CONFIG.py`: one row of the batch of a step, decoded, as the model will read it.

Shape suffix: L positions of a sequence.

A row of L inputs and L targets is L + 1 tokens in a line. The first one is only read; each of the others is a
target, with loss or without.
"""

import codecs
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from aurora_jax.data.batches.loader import Loader, Place, stage_over
from aurora_jax.data.batches.mixture import left_out
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.look.inventory import rates_of
from aurora_jax.data.look.show_page import harmless, page
from aurora_jax.data.text.tokenizer import Tokenizer, tokenizer_from
from aurora_jax.errors import InputError

PARTIAL = "▯"  # for bytes of a character whose other bytes lie outside the row
PARTIAL_BYTES = "aurora_partial_bytes"
codecs.register_error(PARTIAL_BYTES, lambda error: (PARTIAL, error.end if isinstance(error, UnicodeDecodeError) else 0))
STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red")


class Span(NamedTuple):
    """Tokens that are shown together: one, or several that make up characters only together, or a special one.

    Attributes:
        text: what they decode to; the name of a special token.
        ids: their ids.
        position: of the first, in the row's line of L + 1 tokens.
        document: which document of the row they belong to, from 0.
        loss: whether they are to be predicted, or some of them: the row's first token is not, though a
            character may begin with it.
        special: whether it is a special token.
    """

    text: str
    ids: tuple[int, ...]
    position: int
    document: int
    loss: bool
    special: bool


@dataclass(frozen=True)
class ShownRow:
    """One row of a batch.

    Attributes:
        step: of the run.
        number: of the row in the batch.
        place: where it comes from.
        language: of its task's store.
        spans: its tokens.
        targets: how many positions have a target.
        learnt: how many of the targets have loss.
        padding: positions after the end of the store.
    """

    step: int
    number: int
    place: Place
    language: str
    spans: tuple[Span, ...]
    targets: int
    learnt: int
    padding: int

    def page(self, title: str) -> str:
        """A page of HTML that shows it."""
        return page(f"{title}, step {self.step}, row {self.number}", self.facts, self.spans)

    def _repr_html_(self) -> str:
        """For notebooks."""
        content = html.escape(self.page(self.place.task))
        return f'<iframe srcdoc="{content}" width="100%" height="420"></iframe>'

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """What to say of it, as (name, value) pairs."""
        place = self.place
        documents = len({span.document for span in self.spans})
        epoch = place.epoch + place.turn / place.windows
        return (
            ("step", f"{self.step:,} (step {place.stage_step:,} of stage {place.stage})"),
            ("row", f"{self.number:,}"),
            ("task", f"{place.task} ({self.language})"),
            ("epoch", f"{epoch:.4f} (sequence {place.turn:,} of {place.windows:,} in epoch {place.epoch:,})"),
            (
                "tokens",
                f"[{place.start:,}, {place.start + self.targets + 1:,}) of the store; {documents:,} "
                f"document{'s'[: documents - 1]}",
            ),
            (
                "loss",
                f"{self.learnt:,} of {self.targets:,} targets"
                + (f"; {self.padding:,} places of padding" if self.padding else ""),
            ),
        )


@dataclass(frozen=True)
class ShowCommand:
    """Show one row of the batch of a step as the model reads it: documents in colours, what has no loss dim
    and underlined."""

    what: tyro.conf.Positional[str]
    """A mixture or task; or a config file, whose stages, stores, seed, batch size and so on are then the
    defaults of the flags below."""
    step: int = 0
    """Step of the run, from 0; for a mixture, of a run that reads nothing else."""
    row: int = 0
    """Sequence of the global batch, from 0."""
    stores: str = "stores"
    """Folder of the token stores."""
    tokenizer: Path | None = None
    """tokenizer.json, or its folder, a SentencePiece .model, or the word bytes: that of the stores."""
    seed: int = 0
    """Of the run: it orders the data."""
    batch_size: int = 16
    """Sequences a step, over all devices."""
    sequence_length: int = 512
    """Tokens a sequence."""
    attend_across_documents: bool = True
    """As the run: documents of a sequence see each other, or each is on its own."""
    data_root: str = "corpus"
    """Folder of the sources, where --modules need it."""
    modules: tuple[str, ...] = ()
    """Python modules that register further tasks and mixtures with SeqIO."""
    skip_missing: bool = False
    """Leave out the tasks that have no store, as training does with the same flag."""
    html: Path | None = None
    """Write a page there too."""
    stages: tyro.conf.Suppress[tuple[tuple[str, str, int], ...]] = ()
    """(name, mixture, steps) of a config's stages."""

    def run(self) -> None:
        """Raises InputError as `read` does."""
        console = Console()
        row = self.read(console)
        print_row(row, console)
        if self.html is not None:
            self.html.write_text(row.page(self.what))
            console.print(f"page: {self.html}", highlight=False)

    def read(self, console: Console) -> ShownRow:
        """The row; what a mixture lacks is said on the console.

        Raises:
            InputError: no such mixture, step or row, missing stores, or another tokenizer than that of the stores.
        """
        if self.tokenizer is None:
            raise InputError("give --tokenizer: the tokenizer.json that the stores were made with, or its folder")
        tokenizer = tokenizer_from(self.tokenizer)
        stages = self.stages or ((self.what, self.what, self.step + 1),)
        rates = {mixture: rates_of(mixture, self.data_root, self.modules) for _, mixture, _ in stages}
        stores = _open(
            self.stores, {task for its_rates in rates.values() for task, _ in its_rates}, tokenizer, self.skip_missing
        )
        for mixture, its_rates in rates.items():
            if absent := left_out(mixture, its_rates, stores):
                console.print(absent, style="yellow", highlight=False, markup=False)
        loader = Loader(
            stores,
            [stage_over(stores, name, rates[mixture], steps) for name, mixture, steps in stages],
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            seed=self.seed,
            attend_across_documents=self.attend_across_documents,
        )
        return read_row(loader, stores, tokenizer, self.step, self.row)


def _open(root: str, tasks: set[str], tokenizer: Tokenizer, skip_missing: bool) -> dict[str, TokenStore]:
    from aurora_jax.data.batches.store import read_info, store_directory

    directories = {task: store_directory(root, task, "train") for task in sorted(tasks)}
    there = {task: directory for task, directory in directories.items() if read_info(directory) is not None}
    if len(there) < len(tasks) and not skip_missing:
        raise InputError(
            f"{root}: no complete token store of "
            f"{', '.join(task for task in directories if task not in there)}; build them with "
            "`aurora data build`, or leave them out with --skip-missing"
        )
    stores = {task: TokenStore.open(directory) for task, directory in there.items()}
    for store in stores.values():
        if store.info.tokenizer_sha256 != tokenizer.sha256:
            raise InputError(
                f"{store.directory}: made with the tokenizer {store.info.tokenizer_sha256[:12]}, but "
                f"{tokenizer.path} is "
                f"{tokenizer.sha256[:12]}; give --tokenizer the one that the stores were made with"
            )
    return stores


def read_row(loader: Loader, stores: Mapping[str, TokenStore], tokenizer: Tokenizer, step: int, row: int) -> ShownRow:
    """A row of the loader's batch, decoded. Raises InputError: there is no such step or row."""
    try:
        place = loader.place(step, row)
    except IndexError as error:
        raise InputError(str(error)) from error
    batch = loader.batch(step, slice(row, row + 1))
    store = stores[place.task]
    padding = int((batch.segment_ids_BL[0] == 0).sum())
    length = batch.tokens_BL.shape[1] - padding
    ids = np.concatenate([batch.tokens_BL[0, :1], batch.targets_BL[0, :length]])
    loss = np.concatenate([[False], batch.loss_weights_BL[0, :length] > 0])
    ends = store.window_ends(np.array([place.start]), length + 1)[0]
    documents = np.concatenate([[0], np.cumsum(ends)[:-1]])
    spans = tuple(spans_of(ids.tolist(), loss.tolist(), documents.tolist(), tokenizer))
    return ShownRow(step, row, place, store.info.language, spans, length, int(loss.sum()), padding)


def spans_of(
    ids: Sequence[int], loss: Sequence[bool], documents: Sequence[int], tokenizer: Tokenizer
) -> Iterator[Span]:
    """Tokens in the shortest spans that are whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors=PARTIAL_BYTES)
    first, text = 0, ""  # of the span that has begun

    def span(end: int, special: bool = False) -> Span:
        return Span(text, tuple(ids[first:end]), first, documents[first], any(loss[first:end]), special)

    for place, i in enumerate(ids):
        name = tokenizer.special_name(i)
        if name is not None:
            text += decoder.decode(b"", final=True)
            if place > first:
                yield span(place)
            first, text = place, name
            yield span(place + 1, special=True)
        else:
            text += decoder.decode(tokenizer.token_bytes(i))
            if decoder.getstate()[0]:  # bytes of a character that is not whole yet
                continue
            yield span(place + 1)
        first, text = place + 1, ""
    text += decoder.decode(b"", final=True)
    if first < len(ids):
        yield span(len(ids))


def print_row(row: ShownRow, console: Console) -> None:
    """Prints a row: facts, then its tokens in colours."""
    for name, value in row.facts:
        console.print(f"[bold]{name:>9}[/bold]  ", end="")
        console.print(value, highlight=False, markup=False)
    legend = Text("\n")
    legend.append("documents", style="bold").append(" in ")
    for number, style in enumerate(STYLES):
        legend.append(f"{number} ", style=style)
    legend.append("… ").append("no loss", style="dim underline").append("  ").append("special token", style="reverse")
    console.print(legend)
    text = Text()
    for span in row.spans:
        style = (
            STYLES[span.document % len(STYLES)]
            + ("" if span.loss else " dim underline")
            + (" reverse" if span.special else "")
        )
        text.append(harmless(span.text), style=style)
    console.print(text, soft_wrap=True)
