"""The charts of a report, as matplotlib figures in one look."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# One colour a language in every chart: Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"en": "#0072B2", "code": "#555555", "fi": "#56B4E9", "hi": "#E69F00", "ja": "#CC79A7", "vi": "#009E73"}
NAMES = {"en": "English", "code": "Code", "fi": "Finnish", "hi": "Hindi", "ja": "Japanese", "vi": "Vietnamese"}
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
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Language to steps and values."""


class Chart(Figure):
    """A figure that shows itself in a notebook, whatever its backend; made without pyplot, which would keep it."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def before_after_bars(before: Mapping[str, float], after: Mapping[str, float]) -> Figure:
    """Bits per byte of every language before and after, with the change written above."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _chart(8, 3.8)
        place = np.arange(len(before))
        axes.bar(place - 0.2, list(before.values()), 0.38, color="#C9CDD2", label="before")
        axes.bar(
            place + 0.2, list(after.values()), 0.38, color=[_colour(language) for language in after], label="after"
        )
        for x, language in zip(place, before, strict=True):
            if language not in after:
                continue
            change = after[language] / before[language] - 1
            axes.annotate(
                f"{change:+.1%}".replace("-", "−"),
                (x + 0.2, after[language]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_xticks(place, [NAMES.get(language, language) for language in before])
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
        for language, (steps, values) in curves.items():
            axes.plot(
                steps, values, color=_colour(language), marker="o", markersize=3, label=NAMES.get(language, language)
            )
        axes.set_ylabel("bits per byte of held-out text")
        _finish(axes, boundaries)
    return figure


def loss_curves(curves: Curves, boundaries: Mapping[str, int]) -> Figure:
    """Training loss by language over steps: raw faint, smoothed strong."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _chart(8, 3.8)
        for language, (steps, values) in curves.items():
            axes.plot(steps, values, color=_colour(language), alpha=0.2, linewidth=0.8)
            axes.plot(
                steps, _smoothed(values), color=_colour(language), linewidth=1.6, label=NAMES.get(language, language)
            )
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


def _colour(language: str) -> str:
    return COLOURS.get(language, "#000000")
