"""The charts of a report, as matplotlib figures in one look."""

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aurora_jax.languages import colours_of, name_of

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "aurora",
}
LINES = ("-", "--", ":", "-.")
"""Of several texts of one language, which have its colour."""
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Subject to steps and values. A subject is a language, or, where several texts are of one, LANGUAGE/TASK."""


def name_of_subject(subject: str) -> str:
    """What people read: Finnish, or Finnish (wikipedia_fi)."""
    language, _, task = subject.partition("/")
    return f"{name_of(language)} ({task})" if task else name_of(language)


def looks_of(subjects: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and kind of line of each subject of a chart."""
    languages = {subject: subject.partition("/")[0] for subject in subjects}
    colours = colours_of(languages.values())
    drawn: Counter[str] = Counter()
    looks = {}
    for subject, language in languages.items():
        looks[subject] = (colours[language], LINES[drawn[language] % len(LINES)])
        drawn[language] += 1
    return looks


class Chart(Figure):
    """A figure that shows itself in a notebook, whatever its backend; made without pyplot, which would keep it."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def before_after_bars(before: Mapping[str, float], after: Mapping[str, float]) -> Figure:
    """Bits per byte of every subject (see `Curves`) before and after, with the change written above."""
    with matplotlib.rc_context(STYLE):
        width = max(8, 1.2 * len(before))  # room for names
        figure, axes = _chart(width, 3.8)
        place = np.arange(len(before))
        axes.bar(place - 0.2, list(before.values()), 0.38, color="#C9CDD2", label="before")
        colours = [colour for colour, _ in looks_of(after).values()]
        axes.bar(place + 0.2, list(after.values()), 0.38, color=colours, label="after")
        for x, subject in zip(place, before, strict=True):
            change = after[subject] / before[subject] - 1
            axes.annotate(
                f"{change:+.1%}".replace("-", "−"),
                (x + 0.2, after[subject]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_xticks(place, [name_of_subject(subject).replace(" (", "\n(") for subject in before])
        axes.set_ylabel("bits per byte (lower is better)")
        axes.grid(axis="x", visible=False)
        axes.set_title(
            "Held-out text before (grey) and after (coloured) continual pretraining", fontsize=11, loc="left"
        )
    return figure


def bits_per_byte_curves(curves: Curves, boundaries: Mapping[str, int]) -> Figure:
    """Bits per byte by language over steps; `boundaries` are the last steps of the stages."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _chart(8, 3.8)
        looks = looks_of(curves)
        for subject, (steps, values) in curves.items():
            colour, line = looks[subject]
            axes.plot(steps, values, line, color=colour, marker="o", markersize=3, label=name_of_subject(subject))
        axes.set_ylabel("bits per byte of held-out text")
        _finish(axes, boundaries)
    return figure


def loss_curves(curves: Curves, boundaries: Mapping[str, int]) -> Figure:
    """Training loss by language over steps, the mean of its tasks: raw faint, smoothed strong."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _chart(8, 3.8)
        looks = looks_of(curves)
        for subject, (steps, values) in curves.items():
            colour, line = looks[subject]
            axes.plot(steps, values, line, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(steps, _smoothed(values), line, color=colour, linewidth=1.6, label=name_of_subject(subject))
        axes.set_ylabel("training loss (nats per token)")
        _finish(axes, boundaries)
    return figure


def learning_rate_curve(steps: Sequence[int], rates: Sequence[float], boundaries: Mapping[str, int]) -> Figure:
    """The learning rate over steps."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _chart(8, 2)
        axes.plot(steps, rates, color="#333333", linewidth=1.4)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_ylabel("learning rate")
        _finish(axes, boundaries, legend=False)
    return figure


def _chart(width: float, height: float) -> tuple[Chart, Axes]:
    """An empty chart of that size in inches."""
    chart = Chart(figsize=(width, height), layout="constrained")
    return chart, chart.subplots()


def _finish(axes: Axes, boundaries: Mapping[str, int], *, legend: bool = True) -> None:
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0 if not legend else None)
    for number, (stage, end) in enumerate(boundaries.items()):
        if number < len(boundaries) - 1:
            axes.axvline(end, color="#999999", linestyle="--", linewidth=1)
        start = list(boundaries.values())[number - 1] if number else 0
        axes.annotate(
            f"stage {stage}",
            ((start + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color="#666666",
        )
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _smoothed(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start; non-finite values are passed over."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(total / weight if weight else float("nan"))
    return smooth
