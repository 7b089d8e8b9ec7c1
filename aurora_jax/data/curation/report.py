"""What a run has done: counts by language and filter, percentiles of the metrics, contamination by evaluation set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from aurora_jax.data.curation.filters import LANGUAGE, Metrics
from aurora_jax.data.curation.pii import KINDS
from aurora_jax.languages import in_order

# Where half of the documents lie, and the tails that limits cut.
PERCENTILES = (1, 5, 50, 95, 99)
_HEURISTICS = tuple(field.name for field in dataclasses.fields(Metrics))
DOCUMENTS, BYTES = "documents", "bytes"


@dataclass(frozen=True)
class EvaluationSet:
    """What was looked for and found of one evaluation file: `too_short` items have no field that is long
    enough to tell."""

    items: int
    too_short: int
    found: int
    documents: int


@dataclass(frozen=True)
class Report:
    """A run in numbers; `report.json`.

    Attributes:
      languages: those that were read, in order.
      filters: the filters in the order in which they were applied; a document counts for the first that rejects it.
      read, kept: language -> {"documents", "bytes"}.
      rejected: filter -> language -> {"documents", "bytes"}.
      redacted: kind -> language -> how many.
      quarantined: input -> reason -> lines.
      contamination: evaluation file -> what was found.
      percentiles: language -> metric -> percentile -> value, of the documents that are in their language.
      settings: the thresholds and all else that decided.
    """

    languages: list[str]
    filters: list[str]
    read: dict[str, dict[str, int]]
    kept: dict[str, dict[str, int]]
    rejected: dict[str, dict[str, dict[str, int]]]
    redacted: dict[str, dict[str, int]]
    quarantined: dict[str, dict[str, int]]
    contamination: dict[str, EvaluationSet]
    percentiles: dict[str, dict[str, dict[str, float]]]
    settings: dict[str, Any]

    def to_json(self) -> str:
        """The content of `report.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    def rows(self) -> list[list[str]]:
        """The table: a heading, then a row for what was read, each filter, what was kept, and each kind that
        was redacted."""
        columns = [*self.languages, "all"]
        rows = [["documents", *columns], ["read", *self._counts(self.read)]]
        rows += [[name.replace("_", " "), *self._counts(self.rejected.get(name, {}))] for name in self.filters]
        rows.append(["**kept**", *self._counts(self.kept)])
        rows.append(["kept, % of documents", *self._shares(DOCUMENTS)])
        rows.append(["kept, % of bytes", *self._shares(BYTES)])
        for kind in KINDS:
            of_kind = self.redacted.get(kind, {})
            numbers = [of_kind.get(language, 0) for language in self.languages]
            rows.append(
                [f"redacted: {kind}", *(f"{number:,}" if number else "" for number in (*numbers, sum(numbers)))]
            )
        return rows

    def to_markdown(self) -> str:
        """The content of `report.md`."""
        lines = _markdown(self.rows())
        if self.contamination:
            found = [["evaluation set", "items", "too short to tell", "found", "documents removed"]]
            for name, counts in self.contamination.items():
                found.append(
                    [
                        name,
                        *(f"{number:,}" for number in (counts.items, counts.too_short, counts.found, counts.documents)),
                    ]
                )
            lines += ["", *_markdown(found)]
        if self.quarantined:
            bad = [
                [input, reason, f"{lines_of:,}"]
                for input, reasons in self.quarantined.items()
                for reason, lines_of in reasons.items()
            ]
            lines += ["", *_markdown([["quarantined", "reason", "lines"], *bad])]
        return "\n".join(lines) + "\n"

    def to_table(self, title: str) -> Table:
        """The table for a terminal."""
        heading, *rows = self.rows()
        table = Table(heading[0], title=title)
        for column in heading[1:]:
            table.add_column(column, justify="right")
        for name, *cells in rows:
            emphasis = "bold" if name.startswith("**") else None
            table.add_row(name.strip("*"), *cells, style=emphasis)
        return table

    def _counts(self, by_language: dict[str, dict[str, int]]) -> list[str]:
        numbers = [by_language.get(language, {}).get(DOCUMENTS, 0) for language in self.languages]
        return [f"{number:,}" if number else "" for number in (*numbers, sum(numbers))]

    def _shares(self, unit: str) -> list[str]:
        kept = [self.kept.get(language, {}).get(unit, 0) for language in self.languages]
        read = [self.read[language][unit] for language in self.languages]
        pairs = zip((*kept, sum(kept)), (*read, sum(read)), strict=True)
        return [f"{100 * part / whole:.1f}" if whole else "" for part, whole in pairs]


def filter_order(hooks: Sequence[str], decontaminated: bool, flagged: bool) -> list[str]:
    """The filters of a run, in the order in which they are applied."""
    heuristics = [name for name in _HEURISTICS if flagged or name != "flagged_words"]
    decontamination = ["contamination"] if decontaminated else []
    return [LANGUAGE, *heuristics, *dict.fromkeys(hooks), *decontamination, "exact_duplicates", "near_duplicates"]


def compose(
    counts: Sequence[Sequence[Any]],
    metrics: Sequence[tuple[str, dict[str, float]]],
    hits: Sequence[dict[str, Any]],
    items: dict[str, tuple[int, int]],
    filters: list[str],
    settings: dict[str, Any],
) -> Report:
    """The report of what the pipeline counted.

    Args:
      counts: [group, language or input, filter or kind or reason, documents or pieces, bytes], one for each
          that occurred.
      metrics: (language, metrics) of documents drawn at random.
      hits: the lines of contamination.jsonl.
      items: evaluation file -> (items, those long enough).
      filters: `filter_order` of the run.
      settings: for the record.
    """
    documents = {
        (name, language): {DOCUMENTS: n, BYTES: size}
        for group, language, name, n, size in counts
        if group == "documents"
    }
    languages = in_order(language for name, language in documents if name == "read")
    redacted = {(kind, language): n for group, language, kind, n, _ in counts if group == "redacted"}
    quarantined: dict[str, dict[str, int]] = {}
    for input, reason, n in sorted(
        (input, reason, n) for group, input, reason, n, _ in counts if group == "quarantined"
    ):
        quarantined.setdefault(input, {})[reason] = n

    def of(name: str) -> dict[str, dict[str, int]]:
        return {language: documents[name, language] for language in languages if (name, language) in documents}

    contamination = {}
    for file, (number, long_enough) in items.items():
        hit_items = {hit["item"] for hit in hits if hit["file"] == file}
        hit_documents = {hit["document"] for hit in hits if hit["file"] == file}
        contamination[file] = EvaluationSet(number, number - long_enough, len(hit_items), len(hit_documents))
    return Report(
        languages=languages,
        filters=filters,
        read=of("read"),
        kept=of("kept"),
        rejected={name: of(name) for name in filters if of(name)},
        redacted={
            kind: here
            for kind in KINDS
            if (here := {name: redacted[kind, name] for name in languages if (kind, name) in redacted})
        },
        quarantined=quarantined,
        contamination=contamination,
        percentiles={
            language: _percentiles([values for name, values in metrics if name == language]) for language in languages
        },
        settings=settings,
    )


def _percentiles(metrics: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    if not metrics:
        return {}
    return {
        name: {
            f"{percentile}%": round(float(np.percentile([values[name] for values in metrics], percentile)), 4)
            for percentile in PERCENTILES
        }
        for name in _HEURISTICS
    }


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    heading, *body = rows
    rule = ["---", *("---:" for _ in heading[1:])]
    return ["| " + " | ".join(row) + " |" for row in (heading, rule, *body)]
