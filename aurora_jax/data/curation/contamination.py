"""Which documents hold text of an evaluation set, and which item of it.

An item is hit where a run of 13 of its words stands in a document (Brown et al., 2020, appendix C), or of 50
characters where no spaces are written. Fields shorter than that must stand there whole, and count only from 8
words or 20 characters on: shorter ones are phrases that anybody writes. Case, width of characters and
punctuation do not count.

Legend: U units of a text, G n-grams of units.
"""

from __future__ import annotations

import csv
import functools
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aurora_jax.data.curation.units import hash_ngrams, hash_units, is_unspaced, normalize, split_units
from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines


@dataclass(frozen=True)
class Window:
    """How much of a field must be found: `full` units of a long one, all of a short one that has at least `least`."""

    full: int
    least: int


WORDS = Window(full=13, least=8)
CHARACTERS = Window(full=50, least=20)


@dataclass(frozen=True)
class Hit:
    """An item of an evaluation file whose text stands in a document: `item` is its number from 0, `text` the
    units that were found."""

    file: str
    item: int
    text: str


@dataclass
class EvaluationIndex:
    """The runs of units of all items of the evaluation files.

    Attributes:
      items: file -> (items, items that are long enough to look for).
    """

    items: dict[str, tuple[int, int]] = field(default_factory=dict)
    _runs: dict[Window, dict[int, set[tuple[str, int]]]] = field(
        default_factory=lambda: {window: {} for window in (WORDS, CHARACTERS)}
    )
    # The first units of a short field -> the whole fields that begin so.
    _short: dict[Window, dict[int, set[tuple[int, int, str, int]]]] = field(
        default_factory=lambda: {window: defaultdict(set) for window in (WORDS, CHARACTERS)}
    )

    def add(self, file: str, items: list[list[str]]) -> None:
        """Add the items of a file, each the list of its fields."""
        looked_for = 0
        for number, fields in enumerate(items):
            added = [self._add_field(file, number, text) for text in fields]
            looked_for += any(added)
        self.items[file] = (len(items), looked_for)
        self.__dict__.pop("_sorted", None)

    def _add_field(self, file: str, item: int, text: str) -> bool:
        units = split_units(normalize(text))
        window = CHARACTERS if sum(map(is_unspaced, units)) > len(units) / 2 else WORDS
        if len(units) < window.least:
            return False
        unit_U = hash_units(units)
        if len(units) < window.full:
            start = int(hash_ngrams(unit_U[: window.least], window.least)[0])
            self._short[window][start].add((len(units), int(hash_ngrams(unit_U, len(units))[0]), file, item))
        for run in hash_ngrams(unit_U, window.full).tolist():
            self._runs[window].setdefault(run, set()).add((file, item))
        return True

    @functools.cached_property
    def _sorted(self) -> dict[Window, tuple[np.ndarray, np.ndarray]]:
        """The runs and the beginnings of short fields as sorted arrays, for a quick first look; uint64 [G] each."""
        return {
            window: tuple(np.array(sorted(table[window]), dtype=np.uint64) for table in (self._runs, self._short))  # type: ignore[misc]
            for window in (WORDS, CHARACTERS)
        }

    def hits(self, units: list[str], unit_U: np.ndarray) -> list[Hit]:
        """The items that stand in a document of these units (and their hashes), in order, each once, with the
        text that was found first."""
        found: dict[tuple[str, int], tuple[int, int]] = {}
        for window, (run_G, start_G) in self._sorted.items():
            for position, value in _present(hash_ngrams(unit_U, window.full), run_G):
                for owner in self._runs[window][value]:
                    found.setdefault(owner, (position, position + window.full))
            for position, value in _present(hash_ngrams(unit_U, window.least), start_G):
                for length, whole, file, item in self._short[window][value]:
                    rest = hash_ngrams(unit_U[position : position + length], length)
                    if len(rest) and int(rest[0]) == whole:
                        found.setdefault((file, item), (position, position + length))
        return [Hit(file, item, _joined(units[start:end])) for (file, item), (start, end) in sorted(found.items())]


def _present(hash_G: np.ndarray, wanted_G: np.ndarray) -> Iterator[tuple[int, int]]:
    """(position, value) of each hash that is among those wanted, which are sorted."""
    if not len(wanted_G) or not len(hash_G):
        return
    place = np.minimum(np.searchsorted(wanted_G, hash_G), len(wanted_G) - 1)
    for position in np.flatnonzero(wanted_G[place] == hash_G).tolist():
        yield position, int(hash_G[position])


def _joined(units: list[str]) -> str:
    return ("" if sum(map(is_unspaced, units)) > len(units) / 2 else " ").join(units)


def read_items(path: str, content: bytes) -> list[list[str]]:
    """The items of an evaluation file, each the list of its texts: JSON lines, a JSON list, tab- or
    comma-separated, or a line each.

    Text is UTF-8; a byte-order mark at the beginning is no part of it, and lines end at line feeds alone.

    Raises:
      InputError: the content is not of the kind that the file's name says.
    """
    name = path.lower()
    if name.endswith((".jsonl", ".ndjson")):
        return _read_lines(path, content)
    if name.endswith(".json"):
        return _read_json(path, content)
    try:
        text = content.decode("utf-8-sig")
        if name.endswith((".tsv", ".csv")):
            # Tab-separated benchmarks do not quote: a quotation mark is a quotation mark.
            dialect: Mapping[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
            csv.field_size_limit(1 << 24)
            return [row for row in csv.reader(io.StringIO(text, newline=""), **dialect) if row]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: the evaluation file cannot be read ({error}).") from None
    return [[line] for line in text.split("\n") if line.strip()]


def _read_lines(path: str, content: bytes) -> list[list[str]]:
    return [list(_texts(value)) for _, value in json_lines.values(content, path)]


def _read_json(path: str, content: bytes) -> list[list[str]]:
    """A list of items, or one on each line: both are found under the name .json. An object of lists gives the
    items of all its lists."""
    try:
        value = json_lines.value_of(content)
    except json_lines.BadLine as whole:
        try:
            return _read_lines(path, content)
        except InputError as error:
            raise InputError(f"{error}; nor is the whole file a JSON list ({whole})") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = [item for inner in lists for item in inner] if lists else value
    return [list(_texts(item)) for item in (value if isinstance(value, list) else [value])]


def _texts(value: Any) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
