"""The chart of `aurora data describe`: shares by language and kind, and the rate of every task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from aurora_jax.data.look.inventory import TaskRow, rate_text, shares
from aurora_jax.errors import InputError
from aurora_jax.languages import colours_of

OTHER_KIND = "#D55E00"
KIND_COLOURS = {
    "web": "#4C72B0",
    "code": "#8C8C8C",
    "encyclopedia": "#55A868",
    "instruction": "#8172B3",
    "safety": "#C44E52",
    "domain": "#B8952F",
}
LETTER = 0.0085  # of the width of a chart: a share has room for its name only if the name fits
SMALLEST = 1e-6


def draw(mixture: str, rows: Sequence[TaskRow], path: Path) -> None:
    """Writes the chart as a PNG or SVG. Raises InputError: another suffix, or no such folder."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{path}: a chart is a .png or .svg file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    height = 2.2 + 0.24 * len(rows)
    figure, (by_language, by_kind, by_task) = pyplot.subplots(
        3, 1, figsize=(10, height), height_ratios=[0.55, 0.55, 0.24 * len(rows)], layout="constrained"
    )
    colours = colours_of(row.language for row in rows)
    kinds = shares(rows, "kind")
    _stacked(by_language, "language", shares(rows, "language"), colours)
    _stacked(by_kind, "kind", kinds, {kind: KIND_COLOURS.get(kind, OTHER_KIND) for kind in kinds})
    _tasks(by_task, rows, colours)
    figure.suptitle(f"{mixture}: {len(rows)} tasks", fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _stacked(axes: Axes, title: str, parts: Mapping[str, float], colours: Mapping[str, str]) -> None:
    left = 0.0
    for name, share in parts.items():
        axes.barh([0], [share], left=left, color=colours[name], edgecolor="white", height=0.7)
        if share >= _room(name):
            axes.text(left + share / 2, 0, f"{name}\n{share:.1%}", ha="center", va="center", color="white", fontsize=8)
        left += share
    narrow = [f"{name} {rate_text(share)}" for name, share in parts.items() if share < _room(name)]
    axes.set_title(f"by {title}" + (f" (then {', '.join(narrow)})" if narrow else ""), loc="left", fontsize=9)
    axes.set_xlim(0, 1)
    axes.axis("off")


def _room(name: str) -> float:
    return LETTER * max(5, len(name))


def _tasks(axes: Axes, rows: Sequence[TaskRow], colours: Mapping[str, str]) -> None:
    """A bar a task on a logarithmic scale; solid where there are files or a store."""
    for number, row in enumerate(rows):
        there = bool(row.found) or row.store is not None
        colour = colours[row.language]
        axes.barh(
            [number],
            [row.rate],
            color=colour if there else "white",
            edgecolor=colour,
            height=0.7,
            hatch=None if there else "////",
        )
        said = rate_text(row.rate) + ("" if row.epochs is None else f", {row.epochs:.3g} epochs")
        axes.text(row.rate * 1.08, number, said, va="center", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share * 100:g}%")
    axes.set_xlim(max(SMALLEST, min(row.rate for row in rows) / 2), max(row.rate for row in rows) * 4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("share of the mixture (logarithmic); hatched: neither files nor a store are there", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
