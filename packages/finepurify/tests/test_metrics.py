"""Shares with their intervals, attack success, and what two defences differ in."""

import math

import numpy as np
import pytest
from finepurify.metrics import Share, accuracy, attack_success, differ, measured
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
       st.sampled_from([0.8, 0.95, 0.99]))  # fmt: skip
def test_wilsons_interval_is_scipys(counts, confidence):
    hits, cases = counts
    wanted = binomtest(hits, cases).proportion_ci(confidence, "wilson")
    found = Share(hits, cases).interval(confidence)
    assert found == pytest.approx((100 * wanted.low, 100 * wanted.high), abs=1e-9)


def test_an_interval_by_hand():
    # z = 1.96: (8 + 1.92) / 13.84 = .7168, half 1.96 / 13.84 * sqrt(1.6 + .9604) = .2266
    assert Share(8, 10).interval() == pytest.approx((49.02, 94.33), abs=0.01)
    assert str(Share(8, 10)) == "80.0 [49.0, 94.3]"


def test_no_case():
    assert math.isnan(Share(0, 0).percent)
    assert Share(0, 0).interval() == (0.0, 100.0)


def test_accuracy():
    assert accuracy(np.array([0, 1, 1, 2]), [0, 1, 2, 2]) == Share(3, 4)
    assert accuracy(np.array([0.5, 1.0]), [0, 0]) == Share(1.5, 2)
    assert accuracy(np.array([0.5, 1.0]), [0, 0]).percent == 75


def test_attack_success_leaves_out_the_targets_own_texts():
    answers = np.array([1, 1, 1, 0, 2])
    labels = [1, 1, 0, 0, 2]
    assert attack_success(answers, labels, 1) == Share(1, 3)
    assert attack_success(answers, labels, 0) == Share(0, 3)
    assert attack_success(answers, labels, 2) == Share(0, 4)
    assert attack_success(np.array([1, 1]), [1, 1], 1).cases == 0


def test_mcnemar_by_hand():
    # they differ on 5 texts, always the one way: p = 2 / 2^5
    first = np.array([True] * 10)
    second = np.array([True] * 5 + [False] * 5)
    assert differ(first, second) == pytest.approx(2 / 32)
    assert differ(first, first) == 1
    # 1 against 3: 2 * (1 + 4) / 16
    one = np.array([1, 0, 0, 0, 1, 1], dtype=bool)
    two = np.array([0, 1, 1, 1, 1, 1], dtype=bool)
    assert differ(one, two) == pytest.approx(10 / 16)


def test_a_row_of_a_table():
    row = measured(Share(8, 10), triggered=Share(0, 10))
    assert row == {"ACC": 80.0, "ACC 95 %": "49.0 to 94.3", "ASR": 0.0, "ASR 95 %": "0.0 to 27.8"}
    assert list(measured(Share(1, 2), biased=Share(2, 2))) == [
        "ACC",
        "ACC 95 %",
        "BACC",
        "BACC 95 %",
    ]
