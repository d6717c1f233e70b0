import math

import numpy as np
import pytest
import torch
from cascadebert.policy import fit_policy, running_maximum
from cascadebert.risk import (
    GRID,
    betting_p,
    binomial_p,
    guarantee_text,
    hoeffding_bentkus_p,
    item_losses,
    min_calibration_size,
    risk_sums,
    safe_threshold,
    walk,
)
from octavo.errors import ConfigError
from scipy.stats import binom

ANSWERS = np.array([[0, 0, 1, 1, 2], [0, 1, 1, 0, 2], [0, 1, 0, 0, 1]])
LABELS = np.array([0, 1, 1, 1, 1])


def items(count, seed=0, slope=1.0):
    """A score, and whether the small model is wrong where the large one is right: rarer if sure."""
    draw = np.random.default_rng(seed)
    scores = draw.normal(1, 2, count)
    harm = draw.random(count) < 0.2 / (1 + np.exp(slope * scores))
    return scores[None], np.stack([harm.astype(float), np.zeros(count)])


def test_losses_by_hand():
    assert item_losses("error", ANSWERS, LABELS).tolist() == [
        [0, 1, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]  # fmt: skip
    assert item_losses("harm", ANSWERS, LABELS).tolist() == [
        [0, 1, 0, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]  # fmt: skip
    assert item_losses("disagreement", ANSWERS, None).tolist() == [
        [0, 1, 1, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]  # fmt: skip
    assert item_losses("gap", ANSWERS, LABELS).tolist() == [
        [0, 1, -1, -1, 1], [0, 0, -1, 0, 1], [0, 0, 0, 0, 0]]  # fmt: skip
    with pytest.raises(ConfigError, match="--risk harm: needs labels"):
        item_losses("harm", ANSWERS, None)


def test_how_many_rows_a_guarantee_takes():
    assert min_calibration_size(0.01, 0.1) == 230
    for alpha, delta in ((0.01, 0.1), (0.05, 0.05), (0.2, 0.01)):
        enough = min_calibration_size(alpha, delta)
        assert binomial_p(np.array([0]), enough, alpha)[0] <= delta
        assert binomial_p(np.array([0]), enough - 1, alpha)[0] > delta


@pytest.mark.parametrize(("alpha", "delta"), [(0.01, 0.1), (0.05, 0.05), (0.3, 0.3), (0.9, 0.5)])
def test_how_many_rows_a_bet_takes(alpha, delta):
    enough = min_calibration_size(alpha, delta, "ucb")
    assert enough >= min_calibration_size(alpha, delta)
    reach, losses = np.zeros((1, enough)), np.zeros((2, enough))
    assert safe_threshold(reach, losses, alpha, method="ucb", delta=delta) == GRID[-1]
    assert enough == 1 or betting_p(np.zeros(enough - 1), alpha, delta) > delta
    if enough > 1:
        with pytest.raises(ConfigError, match=f"{enough - 1} .* it takes {enough} or more"):
            safe_threshold(reach[:, 1:], losses[:, 1:], alpha, method="ucb", delta=delta)


def test_the_walk_stops_before_the_first_that_is_not_shown():
    assert walk(np.array([0.0, 0.05, 0.2, 0.01]), 0.1) == 2  # not beyond a failure
    assert walk(np.array([0.5, 0.0]), 0.1) == 0
    assert walk(np.array([0.0, 0.0]), 0.1) == 2


@pytest.mark.parametrize("stages", [2, 3])
def test_risk_at_every_threshold_against_one_item_at_a_time(stages):
    draw = np.random.default_rng(stages)
    scores = draw.normal(0, 1, (stages - 1, 30)).round(1)
    losses = (draw.random((stages, 30)) < 0.4).astype(float)
    reach = np.maximum.accumulate(scores, axis=0)
    for threshold, total in zip(GRID[::50], risk_sums(reach, losses)[::50], strict=True):
        stage = [next((s for s in range(stages - 1) if scores[s, i] > threshold), stages - 1)
                 for i in range(30)]  # fmt: skip
        assert total == pytest.approx(sum(losses[s, i] for i, s in enumerate(stage)))


def test_the_binomial_walk_by_hand():
    reach, losses = items(3000)
    chosen = safe_threshold(reach, losses, 0.02)
    step = int(np.flatnonzero(chosen == GRID)[0])
    for number, safe in ((step, True), (step + 1, False)):
        failures = losses[0][reach[0] > GRID[number]].sum()
        assert (binom.cdf(failures, 3000, 0.02) <= 0.1) == safe


@pytest.mark.parametrize("method", ["ltt", "ucb"])
def test_the_guarantee_holds_on_new_items(method):
    """Over 200 calibration sets the true risk exceeds alpha in no more than delta of them."""
    alpha, delta, size = 0.03, 0.2, 800
    reach, losses = items(400_000, seed=99)
    order = np.argsort(reach[0])
    tail = losses[0][order][::-1].cumsum()[::-1] / len(order)  # true harm above each score
    failed = 0
    for seed in range(200):
        here = items(size, seed)
        bar = safe_threshold(*here, alpha, method=method, delta=delta)
        place = np.searchsorted(reach[0][order], bar, side="right")
        failed += bool(place < len(order) and tail[place] > alpha)
    assert failed <= 200 * delta + 3 * math.sqrt(200 * delta * (1 - delta))
    empirical = [
        safe_threshold(*items(size, seed), alpha, method="empirical") for seed in range(50)
    ]
    shown = [
        safe_threshold(*items(size, seed), alpha, method=method, delta=delta) for seed in range(50)
    ]
    assert np.mean(shown) > np.mean(empirical)  # a guarantee is paid for


def test_conformal_risk_control_by_hand():
    reach, losses = items(2000, seed=3)
    bar = safe_threshold(reach, losses, 0.02, method="crc")
    step = int(np.flatnonzero(bar == GRID)[0])
    for number, safe in ((step, True), (step + 1, False)):
        failures = losses[0][reach[0] > GRID[number]].sum()
        # (n / (n + 1)) R + 1 / (n + 1) <= alpha
        assert (2000 / 2001 * failures / 2000 + 1 / 2001 <= 0.02) == safe


def test_conformal_risk_control_takes_the_monotone_envelope_of_three_stages():
    """The second stage is wrong where the first is right: going down, harm first rises, then falls."""
    count = 500
    scores = np.stack([np.linspace(-1, 1, count), np.full(count, 2.0)])
    losses = np.stack([np.zeros(count), np.ones(count), np.zeros(count)])
    reach = np.maximum.accumulate(scores, axis=0)
    bar = safe_threshold(reach, losses, 0.1, method="crc")
    assert bar >= 2.0  # below, every item would have left at the harmful second stage
    with pytest.raises(ConfigError, match="needs a risk that only rises; error is none"):
        safe_threshold(reach, losses, 0.1, kind="error", method="crc")


def test_bounds_of_means_are_valid_and_tighter_than_nothing():
    draw = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):  # the null is true: the mean is alpha
        losses = (draw.random(400) < 0.3).astype(float)
        rejected += betting_p(losses, 0.3, 0.1) <= 0.1
        assert hoeffding_bentkus_p(losses.mean(), 400, 0.3) <= 1
    assert rejected <= 300 * 0.1 + 3 * math.sqrt(300 * 0.09)
    low = (draw.random(400) < 0.1).astype(float)
    assert betting_p(low, 0.3, 0.1) < 1e-3
    assert hoeffding_bentkus_p(low.mean(), 400, 0.3) < 1e-3
    assert hoeffding_bentkus_p(0.3, 400, 0.3) == 1.0


def test_what_cannot_be_shown_is_refused():
    reach, losses = items(100)
    with pytest.raises(
        ConfigError, match=r"100 calibration rows cannot show .* it takes 230 or more"
    ):
        safe_threshold(reach, losses, 0.01)
    with pytest.raises(
        ConfigError, match=r"cannot show an expected risk of 0.005: it takes 199 or"
    ):
        safe_threshold(reach, losses, 0.005, method="crc")
    for alpha, delta in ((0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (math.nan, 0.1)):
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            safe_threshold(reach, losses, alpha, delta=delta)
    wrong = np.ones((2, 400))
    with pytest.raises(ConfigError, match="cannot be shown even where the last stage answers"):
        safe_threshold(np.zeros((1, 400)), wrong, 0.1, kind="error")


@pytest.mark.parametrize("risk", ["harm", "error", "disagreement", "gap"])
@pytest.mark.parametrize("method", ["ltt", "ucb", "empirical"])
def test_a_policy_with_a_guarantee(risk, method):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (2000,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, 3).float()
    logits = [scale * truth + torch.randn(2000, 3, generator=generator) for scale in (2.0, 5.0)]
    policy = fit_policy(
        logits, labels.tolist(), [1.0, 6.0], max_risk=0.05, risk=risk, method=method
    )
    assert policy.guarantee["measured"] <= 0.05
    assert policy.guarantee["rows"] == 2000
    assert ("probability 0.9" in policy.guarantee["text"]) == (method != "empirical")
    assert policy.achieved["speedup"] > 1
    losses = item_losses(risk, np.stack([x.argmax(-1).numpy() for x in logits]), labels.numpy())
    reach = running_maximum([policy.score_of(0, logits[0])])
    total = risk_sums(reach, losses, np.array(policy.thresholds))[0]
    assert policy.guarantee["measured"] == pytest.approx(total / 2000)


def test_guarantees_in_words():
    assert guarantee_text("harm", 0.01, 0.1, "empirical", 9).startswith("none: on the 9")
    assert guarantee_text("harm", 0.01, 0.1, "crc", 9).startswith("expected harm")
    assert guarantee_text("gap", 0.01, 0.1, "ltt", 9).startswith("with probability 0.9 the gap")
