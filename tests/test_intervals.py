"""Intervals hold what they promise: in simulations, where the truth is known."""

import numpy as np
import pytest
from scipy import stats

from aurora_jax.evaluate import intervals
from aurora_jax.evaluate.intervals import compare, detectable_difference, mean_interval

DATA_SETS = 1_000


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    """The percentiles of 1,000 draws are within a fraction of those of 10,000."""
    monkeypatch.setattr(intervals, "DRAWS", 1_000)


@pytest.mark.parametrize("kind", ["right or wrong", "bits", "clusters"])
def test_coverage_is_what_is_promised(kind):
    """95 +- 2 % of intervals hold the true mean, of 200 documents that are alike, or of 100 clusters of 1 to 5."""
    generator, held = np.random.default_rng(0), 0
    for number in range(DATA_SETS):
        clusters = None
        if kind == "right or wrong":
            truth, values = 0.3, generator.random(200) < 0.3
        elif kind == "bits":
            truth, values = 1.5, generator.gamma(3.0, 0.5, 200)
        else:
            sizes = generator.integers(1, 6, 100)
            clusters = np.repeat(np.arange(100), sizes)
            truth, values = 2.0, 2.0 + generator.normal(0, 1, 100)[clusters] + generator.normal(0, 0.5, len(clusters))
        found = mean_interval(values, clusters, seed=number)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / DATA_SETS <= 0.97


def test_clusters_that_are_ignored_promise_too_much():
    """The test above can fail: the same texts, taken for independent."""
    generator, held = np.random.default_rng(0), 0
    for number in range(200):
        clusters = np.repeat(np.arange(40), 5)
        values = generator.normal(0, 1, 40)[clusters]
        found = mean_interval(values, seed=number)
        held += found.low <= 0 <= found.high
    assert held / 200 < 0.8


def test_the_detectable_difference_is_detected_as_often_as_is_said():
    """Of paired differences whose true mean is just that: a two-sided t test rejects in 80 +- 4 %."""
    generator, documents, deviation = np.random.default_rng(1), 164, 0.45
    true = detectable_difference(deviation / np.sqrt(documents))
    samples = generator.normal(true, deviation, (2_000, documents))
    rejected = stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05
    assert 0.76 <= rejected.mean() <= 0.84


def test_humaneval_is_too_small_for_five_points():
    """164 problems, at scores such as those of this family: the smallest difference that they show, unpaired."""
    deviation = np.sqrt(0.25 * 0.75)
    assert detectable_difference(np.sqrt(2) * deviation / np.sqrt(164)) > 0.13


def test_a_comparison_counts_what_was_gained_and_lost():
    base, ours = [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 0, 1]
    found = compare(base, ours)
    assert (found.gained, found.lost) == (2, 1)
    assert found.difference.value == pytest.approx(1 / 8)
    assert found.gained_by_chance == pytest.approx(8 * (3 / 8) * (6 / 8))
    assert found.lost_by_chance == pytest.approx(8 * (5 / 8) * (2 / 8))
    error = stats.sem(np.subtract(ours, base))
    assert found.detectable == pytest.approx(detectable_difference(error))
    assert compare([0.5, 1.0], [0.25, 1.0]).gained is None
