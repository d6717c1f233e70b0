"""How well confidence orders items, and how well it tells how often a stage is right."""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from octavo.stats import Sample, calibration_error
from torch import Tensor

from cascadebert.scores import log_odds

LOGITS = Float[Tensor, "items classes"]


def dis(scores: Sample, difficulty: Sample) -> float:
    """Difficulty inversion score: how well confidence orders items by difficulty.

    Of all pairs of an easier and a harder item, the share in which the easier has the higher score.
    Items equally difficult are no pair, and a tie in score counts half. With right = easy and wrong =
    hard it is the area under the ROC curve of confidence as a detector of correctness. O(n log n).

    Args:
        scores: confidence, best in log-odds, [n].
        difficulty: any number of levels, larger is harder, [n].

    Returns:
        0 to 100; 50 is chance. NaN when all items are equally difficult.
    """
    from scipy.stats import kendalltau, rankdata

    sure, hard = np.asarray(scores, dtype=float), np.asarray(difficulty, dtype=float)
    if len(sure) != len(hard) or len(sure) == 0:
        raise ValueError("needs one score for each difficulty, and one item or more")
    levels, counts = np.unique(hard, return_counts=True)
    if len(levels) == 1:
        return float("nan")
    if len(levels) == 2:  # Mann-Whitney's count
        easy = int(counts[0])
        above = rankdata(sure)[hard == levels[0]].sum() - easy * (easy + 1) / 2
        return 100 * float(above / (easy * counts[1]))
    if (sure == sure[0]).all():
        return 50.0
    everything = len(sure) * (len(sure) - 1) / 2
    pairs = everything - (counts * (counts - 1.0) / 2).sum()
    ties = np.unique(sure, return_counts=True)[1]
    told_apart = everything - (ties * (ties - 1.0) / 2).sum()
    # tau-b is (concordant - discordant) over the root of both numbers of pairs that are no ties
    tau = kendalltau(sure, -hard, method="asymptotic").statistic  # pyright: ignore
    return 50 + 50 * float(tau * np.sqrt(pairs * told_apart) / pairs)


def ece(
    logits: LOGITS, labels: Sample, bins: int = 15, binning: Literal["width", "mass"] = "width"
) -> float:
    """Expected calibration error of the largest probability, as a share of 1.

    Args:
        logits: of the stage.
        labels: the right classes, [items].
        bins: how many.
        binning: equal steps of confidence, or as many items in each.
    """
    right = logits.argmax(dim=-1).numpy() == np.asarray(labels)
    return calibration_error(torch.sigmoid(log_odds(logits)).numpy(), right, bins, binning)


def nll(logits: LOGITS, labels: Sample) -> float:
    """Mean negative log-likelihood of the right classes, in nats."""
    truth = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    return float(torch.nn.functional.cross_entropy(logits.double(), truth))


def brier(logits: LOGITS, labels: Sample) -> float:
    """Mean squared distance of the probabilities from the right class's, summed over classes: 0 to 2."""
    truth = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    wanted = torch.nn.functional.one_hot(truth, logits.shape[-1])
    return float(((logits.double().softmax(dim=-1) - wanted) ** 2).sum(dim=-1).mean())


def aurc(scores: Sample, right: Sample) -> float:
    """Area under the risk-coverage curve: the error among the surest k items, averaged over all k.

    Args:
        scores: confidence, [n].
        right: whether each item was answered rightly, [n].

    Returns:
        0 to 1, smaller is better. Items of equal score share their mean error.
    """
    sure, wrong = np.asarray(scores, float), 1.0 - np.asarray(right, float)
    values, group = np.unique(-sure, return_inverse=True)
    mean = np.bincount(group, weights=wrong) / np.bincount(group, minlength=len(values))
    errors = mean[np.sort(group)]
    return float((np.cumsum(errors) / np.arange(1, len(sure) + 1)).mean())


def reliability_table(logits: LOGITS, labels: Sample, bins: int = 10) -> list[dict[str, Any]]:
    """Confidence beside accuracy, a row for each step of confidence that holds items."""
    sure = torch.sigmoid(log_odds(logits)).numpy()
    right = logits.argmax(dim=-1).numpy() == np.asarray(labels)
    member = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    return [
        {
            "confidence": f"{number / bins:.2f} to {(number + 1) / bins:.2f}",
            "items": int((member == number).sum()),
            "mean confidence %": 100 * float(sure[member == number].mean()),
            "accuracy %": 100 * float(right[member == number].mean()),
        }
        for number in range(bins)
        if (member == number).any()
    ]


def quality(logits: LOGITS, labels: Sample) -> dict[str, float]:
    """All of these for one stage, as a row of a table."""
    right = logits.argmax(dim=-1).numpy() == np.asarray(labels)
    sure = log_odds(logits).numpy()
    return {
        "accuracy %": 100 * float(right.mean()),
        "DIS": dis(sure, ~right),
        "ECE %": 100 * ece(logits, labels),
        "ECE % (equal mass)": 100 * ece(logits, labels, binning="mass"),
        "Brier": brier(logits, labels),
        "NLL": nll(logits, labels),
        "AURC": aurc(sure, right),
    }


def fit_temperature(logits: LOGITS, labels: Sample) -> float:
    """The temperature that makes held-out labels most probable (Guo et al. 2017).

    It calibrates and cannot reorder: with two classes DIS stays exactly what it was.

    Returns:
        From 0.05 to 20; the logits are to be divided by it.
    """
    from scipy.optimize import minimize_scalar

    def loss(logarithm: float) -> float:
        return nll(logits.double() / float(np.exp(logarithm)), labels)

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))  # pyright: ignore[reportAttributeAccessIssue]


def performance_gap_recovered(
    speedups: Sample, accuracies: Sample, small: float, large: float
) -> float:
    """Share of the gap between the small and the large model's accuracy that a curve recovers.

    Averaged over the share of its cost that is spent, as RouteLLM's APGR; 0.5 is deferring at random.

    Args:
        speedups: of the points of the curve over the large model, [n].
        accuracies: at these points, [n].
        small: accuracy of the small model alone.
        large: accuracy of the large model alone.

    Returns:
        The share; NaN where the large model is not the better one.
    """
    if large <= small:
        return float("nan")
    cost = 1 / np.asarray(speedups, float)
    order = np.argsort(cost, kind="stable")
    cost, height = cost[order], (np.asarray(accuracies, float)[order] - small) / (large - small)
    span = cost[-1] - cost[0]
    return float(np.trapezoid(height, cost) / span) if span > 0 else float("nan")


def call_performance_threshold(
    shares: Sample, accuracies: Sample, small: float, large: float, recovered: float
) -> float:
    """RouteLLM's CPT: how few items the large model must see to recover so much of the gap to it.

    The smallest share at any point of the curve that is good enough (Ong et al. 2024, who
    interpolate between points; here every threshold is a point).

    Args:
        shares: of the items, those that go to the large model at each point of the curve, [n].
        accuracies: at these points, [n].
        small: accuracy of the small model alone.
        large: accuracy of the large model alone.
        recovered: the wanted part of the gap, 0 to 1; 0.5 for CPT(50).

    Returns:
        From 0 to 1; NaN where the large model is not the better one, or no point is good enough.
    """
    if large <= small:
        return float("nan")
    wanted = small + recovered * (large - small)
    good = np.asarray(accuracies, float) >= wanted - 1e-12
    return float(np.asarray(shares, float)[good].min()) if good.any() else float("nan")
