"""Intervals, paired tests and calibration error, on scipy."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

#: One number or truth value for each observation.
Sample = Sequence[Any] | np.ndarray


def bootstrap_interval(
    *samples: Sample,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic; several samples are resampled together.

    Args:
        samples: one or more arrays of the same length [n].
        statistic: of the samples; takes `axis` where it is vectorised, like `np.mean`.
        confidence: of the two-sided interval.
        resamples: how many.
        seed: of the resampling.

    Returns:
        The lower and the upper end, in the statistic's unit.

    Raises:
        ValueError: fewer than two observations.
    """
    from scipy.stats import bootstrap

    arrays = tuple(np.asarray(sample, dtype=float) for sample in samples)
    if len(arrays[0]) < 2:
        raise ValueError("a bootstrap interval needs two observations or more")
    result = bootstrap(
        arrays,
        statistic,
        paired=len(arrays) > 1,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, 10_000_000 // len(arrays[0])),
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mcnemar(first_correct: Sample, second_correct: Sample) -> float:
    """Exact two-sided p-value that two classifiers are right equally often on the same items.

    Args:
        first_correct: whether the first was right, [n] of bool.
        second_correct: the same of the second.

    Returns:
        The p-value; 1.0 where they never disagree in being right.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(first_correct, bool), np.asarray(second_correct, bool)
    if first.shape != second.shape:
        raise ValueError(f"the same items are needed: {first.shape} against {second.shape}")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def calibration_error(
    confidence: Sample,
    correct: Sample,
    bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    """Expected calibration error: |accuracy - mean confidence| over bins, weighted by their share.

    Args:
        confidence: of the predicted class, [n] in [0, 1].
        correct: whether the prediction was right, [n] of bool.
        bins: how many.
        binning: `width` for equal steps of confidence, a bin holding its upper edge (Guo et al.
            2017); `mass` for as many items in each (Nixon et al. 2019).

    Returns:
        The error in [0, 1].
    """
    scores, right = np.asarray(confidence, float), np.asarray(correct, float)
    if len(scores) == 0 or len(scores) != len(right):
        raise ValueError("needs one confidence for each outcome, and one item or more")
    if binning == "width":
        members = np.clip(np.ceil(scores * bins).astype(int) - 1, 0, bins - 1)
    else:
        members = np.argsort(np.argsort(scores, kind="stable")) * bins // len(scores)
    gaps = np.bincount(members, weights=right - scores, minlength=bins)
    return float(np.abs(gaps).sum() / len(scores))
