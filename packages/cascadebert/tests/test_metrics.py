import math

import numpy as np
import pytest
import torch
from cascadebert.metrics import (
    aurc,
    brier,
    call_performance_threshold,
    dis,
    ece,
    fit_temperature,
    nll,
    performance_gap_recovered,
    quality,
    reliability_table,
)
from cascadebert.scores import energy, entropy, fit_head, log_odds, margin, score
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import ConfigError
from scipy.special import logit
from sklearn.metrics import roc_auc_score

SCORES = ["max_probability", "margin", "entropy", "energy"]


def random_logits(items=200, classes=4, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(items, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (items,), generator=generator).tolist()


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_dis_against_all_pairs(items):
    pairs = [
        1.0 if a[0] > b[0] else 0.5 if a[0] == b[0] else 0.0
        for a in items
        for b in items
        if a[1] < b[1]
    ]
    value = dis([sure for sure, _ in items], [hard for _, hard in items])
    if pairs:
        assert value == pytest.approx(100 * np.mean(pairs))
    else:
        assert math.isnan(value)


def test_dis_of_right_and_wrong_is_the_area_under_the_roc_curve():
    logits, labels = random_logits(500)
    wrong = logits.argmax(-1).numpy() != np.array(labels)
    sure = log_odds(logits).numpy()
    assert dis(sure, wrong) == pytest.approx(100 * roc_auc_score(~wrong, sure))


def test_temperature_cannot_change_the_order_of_two_classes():
    logits, labels = random_logits(500, classes=2)
    wrong = logits.argmax(-1).numpy() != np.array(labels)
    plain = dis(log_odds(logits).numpy(), wrong)
    for temperature in (0.1, 3.0, 50.0):
        assert dis(log_odds(logits / temperature).numpy(), wrong) == pytest.approx(plain)


def test_saturated_probabilities_would_have_lost_the_order():
    logits = torch.tensor([[40.0, 0.0], [50.0, 0.0], [60.0, 0.0], [70.0, 0.0]])
    hard = [1, 1, 0, 0]
    rounded = logits.softmax(-1).max(-1).values.numpy()
    assert dis(rounded, hard) == 50.0
    assert dis(log_odds(logits).numpy(), hard) == 100.0


def test_dis_needs_items():
    with pytest.raises(ValueError, match="one score for each difficulty"):
        dis([], [])
    with pytest.raises(ValueError, match="one score for each difficulty"):
        dis([1.0], [0, 1])


def test_calibration_measures_by_hand():
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], dtype=torch.float64))
    labels = [0, 1, 1]
    assert nll(logits, labels) == pytest.approx(-np.log([0.8, 0.4, 0.7]).mean())
    assert brier(logits, labels) == pytest.approx(np.mean([0.08, 0.72, 0.18]))
    assert ece(logits, labels, bins=10) == pytest.approx(np.mean([0.2, 0.6, 0.3]))
    assert ece(logits, labels, bins=1) == pytest.approx(abs(2 / 3 - 0.7))
    (row,) = reliability_table(logits, labels, bins=2)
    assert (row["confidence"], row["items"]) == ("0.50 to 1.00", 3)
    assert row["mean confidence %"] == pytest.approx(70)
    assert row["accuracy %"] == pytest.approx(200 / 3)


def test_risk_coverage_by_hand():
    assert aurc([3.0, 2.0, 1.0], [True, False, True]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert aurc([1.0, 1.0], [True, False]) == aurc([1.0, 1.0], [False, True]) == pytest.approx(0.5)


def test_temperature_scaling_finds_the_temperature():
    logits, _ = random_logits(4000, classes=3, seed=1)
    draws = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(2))
    labels = draws[:, 0].tolist()
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    assert ece(logits, labels) < ece(3 * logits, labels)
    assert set(quality(logits, labels)) >= {"DIS", "ECE %", "Brier", "NLL", "AURC"}


def test_gap_recovered():
    assert performance_gap_recovered([4.0, 1.0], [0.5, 1.0], 0.5, 1.0) == pytest.approx(0.5)
    assert performance_gap_recovered([4.0, 1.0], [1.0, 1.0], 0.5, 1.0) == pytest.approx(1.0)
    assert math.isnan(performance_gap_recovered([4.0, 1.0], [0.5, 0.5], 0.5, 0.5))


def test_scores_are_those_of_the_probabilities():
    logits, _ = random_logits()
    p = logits.softmax(-1).sort(-1, descending=True).values.numpy()
    shares = -(p * np.log(p)).sum(-1) / np.log(p.shape[1])
    assert margin(logits).numpy() == pytest.approx(logit((1 + p[:, 0] - p[:, 1]) / 2))
    assert entropy(logits).numpy() == pytest.approx(logit(1 - shares))
    assert energy(logits).numpy() == pytest.approx(np.log(np.exp(logits.numpy()).sum(-1)))
    assert score(logits, "max_probability").numpy() == pytest.approx(logit(p[:, 0]))


def test_two_classes_have_one_order():
    logits, _ = random_logits(classes=2)
    order = log_odds(logits).argsort()
    assert torch.equal(margin(logits).argsort(), order)
    assert torch.equal(entropy(logits).argsort(), order)
    assert torch.allclose(margin(logits), log_odds(logits))


@pytest.mark.parametrize("kind", SCORES)
def test_scores_stay_finite_and_told_apart_where_probabilities_saturate(kind):
    logits = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [80.0, 0.0, 0.0], [600.0, 0.0, 0.0]])
    values = score(logits, kind)
    assert values.isfinite().all()
    assert (values.diff() > 0).all()


def test_scores_are_divided_by_the_temperature():
    logits, _ = random_logits()
    assert torch.allclose(score(logits, "margin", 2.5), margin(logits / 2.5))


def test_a_learned_score_orders_what_a_plain_one_cannot():
    """Class 0 is always right and class 1 never, at the same confidence."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    logits[:, 0] += 1.0
    right = (logits.logsumexp(-1) > logits.logsumexp(-1).median()).tolist()
    head = fit_head(logits[1::2], right[1::2])
    hard = [int(not value) for value in right[::2]]
    learned = dis(score(logits[::2], "learned", head=head).numpy(), hard)
    assert learned > 95 > dis(log_odds(logits[::2]).numpy(), hard)


def test_scores_that_are_not_there():
    logits, _ = random_logits(10)
    with pytest.raises(ConfigError, match="has not been fitted"):
        score(logits, "learned")
    with pytest.raises(ConfigError, match="needs rows the stage gets right and rows it gets wrong"):
        fit_head(logits, [True] * 10)


def test_how_few_items_the_large_model_must_see_by_hand():
    """From 0.7 to 0.9: half of the gap is at 0.8, four fifths at 0.86."""
    shares = [1.0, 0.6, 0.4, 0.1, 0.3, 0.0]
    accuracies = [0.9, 0.88, 0.84, 0.75, 0.80, 0.7]
    for part, share in ((0.5, 0.3), (0.8, 0.6), (1.0, 1.0), (0.0, 0.0)):
        assert call_performance_threshold(shares, accuracies, 0.7, 0.9, part) == share
    assert math.isnan(call_performance_threshold(shares, accuracies, 0.9, 0.9, 0.5))
    assert math.isnan(call_performance_threshold([0.1], [0.75], 0.7, 0.9, 0.5))
