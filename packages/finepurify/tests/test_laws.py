"""What reports say of the theory's premises, on pairs of which it is known."""

import math

import numpy as np
import pytest
import torch
from finepurify.config import IndicatorConfig
from finepurify.laws import EDGES, THEORY, counted, laws_of, scales
from finepurify.strategies import Evidence
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from .small import KEY, QUERY, TABLE, pair_of

DENSE = f"{QUERY}.weight"


@pytest.fixture
def drifted(tmp_path):
    """A function: a pair whose drift has the variance k H, each tensor its own k."""

    def make(k: dict[str, float], follows: bool = True):
        generator = torch.Generator().manual_seed(0)
        start = {name: torch.zeros(200, 50) for name in k}
        curvature = {
            name: torch.exp(2 * torch.randn(200, 50, generator=generator)) * 1e-3 for name in k
        }
        suspect = {
            name: torch.randn(200, 50, generator=generator)
            * (k[name] * (curvature[name] if follows else 1)) ** 0.5
            for name in k
        }
        return Evidence(pair_of(tmp_path, start, suspect), curvature)

    return make


def test_the_theorys_own_drift(drifted):
    """r is then Gamma(1/2, 2k); 20,000 dimensions."""
    laws = laws_of(drifted({TABLE: 4.0, DENSE: 4.0}))
    assert laws.log_sd == pytest.approx(THEORY["log_sd"], abs=0.06)
    assert laws.median_over_mean == pytest.approx(THEORY["median_over_mean"], abs=0.02)
    assert laws.k == pytest.approx(4.0, rel=0.04)
    assert laws.ks_distance < 0.02
    assert laws.spearman > 0.4
    assert laws.k_by_tensor.keys() == {TABLE, DENSE}
    assert laws.top_in_embedding == pytest.approx(0.5, abs=0.15)
    assert (laws.dimensions, laws.unmoved, laws.flat, laws.neutral) == (20_000, 0, 0, 0)


def test_drift_that_does_not_follow_curvature(drifted):
    laws = laws_of(drifted({TABLE: 1e-3}, follows=False))
    assert abs(laws.spearman) < 0.05
    assert laws.log_sd > 2.9  # that of log H, 2, is added in squares


def test_each_tensor_has_its_k(drifted):
    laws = laws_of(drifted({TABLE: 9.0, DENSE: 1.0}))
    assert laws.k_by_tensor[TABLE] == pytest.approx(9.0, rel=0.08)
    assert laws.k_by_tensor[DENSE] == pytest.approx(1.0, rel=0.08)
    assert laws.k == pytest.approx(5.0, rel=0.08)
    assert laws.top_in_embedding > 0.95
    assert laws.ks_distance > 0.05


def test_dampings_are_left_out_of_the_law(drifted):
    evidence = drifted({TABLE: 4.0})
    damped = Evidence(
        evidence.pair, evidence.fisher, IndicatorConfig(damping="tensor-mean", exponent=0.5)
    )
    assert laws_of(damped) == laws_of(evidence)


def test_counts(tmp_path):
    bias = f"{KEY}.bias"
    start = {TABLE: torch.zeros(4, 2), bias: torch.zeros(3)}
    suspect = {TABLE: torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 1]]), bias: torch.ones(3)}
    curvature = {
        TABLE: torch.tensor([[1.0, 1], [0, 0], [1, 1], [1, 1e-9]]),
        bias: torch.full((3,), 1e-20),
    }
    laws = laws_of(Evidence(pair_of(tmp_path, start, suspect), curvature))
    assert (laws.dimensions, laws.unmoved, laws.flat, laws.neutral) == (11, 2, 2, 3)
    # of the six that moved and can be told of, three have r = 1
    assert sum(laws.histogram) == 6
    # those above 1e-7 only: r = 1 each
    assert laws.k == pytest.approx(1.0)


def test_nothing_with_curvature_moved(tmp_path):
    pair = pair_of(tmp_path, {TABLE: torch.zeros(4, 2)}, {TABLE: torch.ones(4, 2)})
    laws = laws_of(Evidence(pair, {TABLE: torch.zeros(4, 2)}))
    assert math.isnan(laws.k)
    assert laws.k_by_tensor == {}
    assert laws.flat == 8


@given(st.lists(st.floats(1e-30, 1e30) | st.just(0.0), min_size=1, max_size=50))
def test_histograms_are_numpys(values):
    r = torch.tensor(values, dtype=torch.float64)
    edges = np.log10(np.array(EDGES))
    positive = np.log10(r.numpy()[r.numpy() > 0])
    # values at an edge may fall on either side of it
    clear = np.abs((positive * 10) - np.round(positive * 10)) > 1e-9
    wanted, _ = np.histogram(np.clip(positive[clear], edges[0], edges[-1]), bins=edges)
    found = counted(r[r > 0][torch.from_numpy(clear)])
    assert found.tolist() == wanted.tolist()


def test_scales_are_nearly_the_groups_means():
    draw = np.random.default_rng(0)
    r = np.sort(
        np.concatenate([stats.gamma(0.5, scale=2).rvs(9000, random_state=draw), np.zeros(1000)])
    )
    histogram = counted(torch.from_numpy(r)).tolist()
    for rho in (0.5, 0.9, 0.98):
        cut = round(rho * 10_000)
        clean, poison = scales(histogram, 10_000, rho)
        assert clean == pytest.approx(r[:cut].mean(), rel=0.05)
        assert poison == pytest.approx(r[cut:].mean(), rel=0.05)
    assert scales(histogram, 10_000, 0.05)[0] == 0
    assert scales(histogram, 10_000, 1.0)[1] == 0
