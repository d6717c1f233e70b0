"""From step scores to a solution's score, and from solutions to an answer."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int
from octavo.errors import ConfigError

Scores = Float[np.ndarray, " steps"]


def _geometric(scores: np.ndarray) -> float:
    return float(np.exp(np.log(np.maximum(scores, 1e-12)).mean()))


#: Scores of a solution's steps as one number. The paper's is the minimum (section 3.4); Lightman et al.
#: (2023) took the product.
AGGREGATES: Mapping[str, Callable[[np.ndarray], float]] = {
    "min": lambda scores: float(scores.min()),
    "prod": lambda scores: float(np.exp(np.log(np.maximum(scores, 1e-12)).sum())),
    "mean": lambda scores: float(scores.mean()),
    "last": lambda scores: float(scores[-1]),
    "geometric": _geometric,
}


def aggregate(scores: Scores, how: str) -> float:
    """One score of a solution.

    Args:
        scores: of its steps, in [0, 1].
        how: one of `AGGREGATES`.

    Raises:
        ConfigError: there is no such aggregate.
    """
    if how not in AGGREGATES:
        raise ConfigError(f"--aggregate {how}: is none of {', '.join(AGGREGATES)}")
    return AGGREGATES[how](np.asarray(scores, dtype=float))


def votes(
    classes: Int[np.ndarray, "draws n"], weights: Float[np.ndarray, "draws n"], count: int
) -> Float[np.ndarray, "draws count"]:
    """Sum of weights of each class of answers in each draw of candidates (Eq. 5).

    Args:
        classes: of the candidates' answers, -1 for one without an answer, which has no vote.
        weights: of their votes; ones for plain self-consistency.
        count: classes there are.
    """
    draws = np.zeros((len(classes), count + 1))
    rows = np.repeat(np.arange(len(classes)), classes.shape[1])
    np.add.at(draws, (rows, classes.ravel()), weights.ravel())  # -1 adds to the last column
    return draws[:, :count]


def vote_accuracy(
    classes: Int[np.ndarray, "draws n"],
    weights: Float[np.ndarray, "draws n"],
    right: Bool[np.ndarray, " count"],
) -> Float[np.ndarray, " draws"]:
    """Chance that the class with most votes is a right one, ties drawn by lot; 0 without any answer.

    Args:
        classes: as in `votes`.
        weights: as in `votes`.
        right: whether each class is the right answer.
    """
    counts = votes(classes, weights, len(right))
    there = votes(classes, np.ones(classes.shape), len(right)) > 0
    best = np.where(there, counts, 0.0).max(1, keepdims=True, initial=0.0)
    # sums of the same weights in another order may differ in their last bits
    tied = (counts >= best * (1 - 1e-9)) & there
    return (tied & right).sum(1) / np.maximum(tied.sum(1), 1)


def best_accuracy(
    classes: Int[np.ndarray, "draws n"],
    scores: Float[np.ndarray, "draws n"],
    right: Bool[np.ndarray, " count"],
) -> Float[np.ndarray, " draws"]:
    """Chance that the best scored candidate is right, ties drawn by lot.

    One without an answer never wins while another has one.
    """
    answered = classes >= 0
    scores = np.where(answered, scores, -np.inf)
    tied = (scores == scores.max(1, keepdims=True)) & answered
    good = np.append(right, False)[classes]
    return (tied & good).sum(1) / np.maximum(tied.sum(1), 1)


def pass_at(n: int, k: int, right: int) -> float:
    """Chance that one of k of n candidates is right where `right` of them are (Chen et al. 2021)."""
    if n - right < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - right + 1, n + 1)))
