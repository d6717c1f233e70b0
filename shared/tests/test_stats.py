from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.stats import bootstrap_interval, calibration_error, mcnemar
from scipy.stats import binom, norm


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(10, 2, 400)
    low, high = bootstrap_interval(values)
    half = norm.ppf(0.975) * values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap_interval(values) == (low, high)


def test_bootstrap_resamples_pairs_together():
    x = np.random.default_rng(1).normal(size=200)
    low, high = bootstrap_interval(x, 2 * x, statistic=lambda a, b, axis: (b - 2 * a).mean(axis))
    assert low == high == 0


def test_bootstrap_needs_observations():
    with pytest.raises(ValueError, match="two observations"):
        bootstrap_interval([1.0])


def test_mcnemar_by_hand():
    first = [1, 1, 1, 1, 1, 1, 0, 1, 0]
    second = [0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert mcnemar(first, second) == pytest.approx(2 * binom.cdf(1, 7, 0.5))
    assert mcnemar(first, first) == 1.0
    with pytest.raises(ValueError, match="same items"):
        mcnemar(first, second[:-1])


def test_calibration_error_by_hand():
    confidence, correct = [0.95, 0.95, 0.55, 0.55], [1, 0, 1, 1]
    expected = (abs(0.5 - 0.95) * 2 + abs(1 - 0.55) * 2) / 4
    assert calibration_error(confidence, correct, bins=10) == pytest.approx(expected)
    assert calibration_error(confidence, correct, bins=2, binning="mass") == pytest.approx(expected)
    assert calibration_error([0.5, 1.0], [1, 1], bins=2) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="one confidence"):
        calibration_error([], [])


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_against_brute_force(items):
    edges = np.linspace(0, 1, 6)
    error = 0.0
    for low, high in pairwise(edges):
        inside = [(c, r) for c, r in items if (low < c <= high) or (low == 0 and c == 0)]
        if inside:
            gap = np.mean([r for _, r in inside]) - np.mean([c for c, _ in inside])
            error += len(inside) / len(items) * abs(gap)
    confidence, correct = zip(*items, strict=True)
    near_an_edge = any(abs(c * 5 - round(c * 5)) < 1e-9 for c in confidence)
    if not near_an_edge:
        assert calibration_error(confidence, correct, bins=5) == pytest.approx(error)
