"""What a score can say: its interval, its difference to another model's on the same documents, and the smallest
difference that so many documents can show.

N documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL, POWER = 0.95, 0.80
DRAWS = 10_000
CHUNK = 1 << 22
"""Numbers that are drawn at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval at LEVEL."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """A model against a base, on the same documents.

    Attributes:
        difference: of the means, ours minus the base's.
        detectable: the smallest true difference that a two-sided test at 1 - LEVEL finds with POWER, given how the
            differences of these documents vary.
        gained: documents that the base has at 0 and the model at 1; of scores that are only these two.
        lost: the other way round.
        gained_by_chance: as many as there would be if which documents each has right had nothing to do with the other.
        lost_by_chance: the same of `lost`.
    """

    difference: Interval
    detectable: float
    gained: int | None = None
    lost: int | None = None
    gained_by_chance: float | None = None
    lost_by_chance: float | None = None


def mean_interval(
    values_N: Sequence[float] | np.ndarray, clusters_N: Sequence[object] | None = None, seed: int = 0
) -> Interval:
    """The mean of some documents' scores; bootstrap over documents, or over clusters of them (Efron 1979; percentiles).

    Args:
        clusters_N: what each document belongs to, where several are not independent: all of a cluster are drawn
            together, and the mean stays that of documents.
    """
    values = np.asarray(values_N, np.float64)
    sums, counts = _by_cluster(values, clusters_N)
    generator = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    step = max(1, CHUNK // len(sums))
    for start in range(0, DRAWS, step):
        chosen = generator.integers(0, len(sums), (min(step, DRAWS - start), len(sums)))
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def detectable_difference(standard_error: float) -> float:
    """The smallest true value that a two-sided test of zero finds with POWER, of an estimate with that error."""
    return float((stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)) * standard_error)


def compare(
    base_N: Sequence[float], ours_N: Sequence[float], clusters_N: Sequence[object] | None = None, seed: int = 0
) -> Comparison:
    """Ours against a base, document by document."""
    base, ours = np.asarray(base_N, np.float64), np.asarray(ours_N, np.float64)
    difference = mean_interval(ours - base, clusters_N, seed)
    sums, counts = _by_cluster(ours - base, clusters_N)
    deviations = sums - counts * difference.value
    error = float(np.sqrt((deviations**2).sum() * len(sums) / max(1, len(sums) - 1)) / counts.sum())
    comparison = Comparison(difference, detectable_difference(error))
    if not np.isin(np.concatenate([base, ours]), (0.0, 1.0)).all():
        return comparison
    right, ours_right, N = base.mean(), ours.mean(), len(base)
    return Comparison(
        comparison.difference,
        comparison.detectable,
        gained=int(((base == 0) & (ours == 1)).sum()),
        lost=int(((base == 1) & (ours == 0)).sum()),
        gained_by_chance=float(N * (1 - right) * ours_right),
        lost_by_chance=float(N * right * (1 - ours_right)),
    )


def _by_cluster(values: np.ndarray, clusters_N: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of the documents of each cluster."""
    if clusters_N is None:
        return values, np.ones(len(values))
    _, index = np.unique(np.asarray(clusters_N, dtype=str), return_inverse=True)
    return np.bincount(index, values), np.bincount(index).astype(np.float64)
