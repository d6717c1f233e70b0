"""Best-of-N: which of many candidates a reward model or a vote picks, for all N from one pool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from octavo.errors import ConfigError, DataError
from octavo.stats import bootstrap_interval

from mathshepherd.aggregate import aggregate, best_accuracy, pass_at, vote_accuracy
from mathshepherd.answers import classes as answer_classes
from mathshepherd.records import Solution, by_problem


@dataclass(frozen=True)
class Pool:
    """The candidates of one problem.

    Attributes:
        classes: of their answers, [n] of int; -1 without one.
        right: whether each class is the right answer.
        scores: of the solutions by method, each [n].
    """

    classes: np.ndarray
    right: np.ndarray
    scores: Mapping[str, np.ndarray]


def make_pools(solutions: Sequence[Solution], methods: Mapping[str, tuple[str, str]]) -> list[Pool]:
    """One pool for each problem.

    Args:
        solutions: graded candidates with scores.
        methods: names, each of a score's name and an aggregate.

    Raises:
        DataError: there are no candidates, an outcome or a score is missing, or problems have different
            numbers of candidates.
    """
    pools = []
    if not solutions:
        raise DataError("there are no candidates")
    grouped = by_problem(solutions)
    sizes = {len(group) for group in grouped.values()}
    if len(sizes) > 1:
        raise DataError(
            f"problems have {min(sizes)} to {max(sizes)} candidates; curves over N need as many of each"
        )
    for group in grouped.values():
        for one in group:
            if one.correct is None:
                raise DataError(
                    f"{one.key}: `correct` is not known, so that nothing can be measured"
                )
            for score, _ in methods.values():
                if score not in one.scores:
                    raise DataError(
                        f"{one.key}: has no scores of {score!r}; run `mathshepherd score`"
                    )
        numbers = answer_classes([one.predicted for one in group])
        found = np.array([-1 if number is None else number for number in numbers])
        right = np.zeros(max(found.max(), 0) + 1, dtype=bool)
        for number, one in zip(found, group, strict=True):
            if number >= 0:
                right[number] |= bool(one.correct)
        scores = {
            name: np.array(
                [
                    aggregate(np.array(one.scores[score]), how) if one.scores[score] else 0.0
                    for one in group
                ]
            )
            for name, (score, how) in methods.items()
        }
        pools.append(Pool(found, right, scores))
    return pools


def subsets(size: int, n: int, draws: int, seed: int) -> np.ndarray:
    """Random sets of n of `size` candidates, [draws, n]; all of them where n is `size`."""
    if n == size:
        return np.arange(size)[None]
    order = np.random.default_rng([seed, n]).random((draws, size)).argsort(1)
    return order[:, :n]


def curves(
    solutions: Sequence[Solution],
    methods: Mapping[str, tuple[str, str]],
    sizes: Sequence[int] = (),
    draws: int = 64,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy of each way to pick, for each number of candidates.

    Each method sees the same random sets of the same pool. Ties are drawn by lot: their chance of being
    right counts. Intervals are bootstrap ones over problems.

    Args:
        solutions: graded candidates with scores, as many of each problem.
        methods: names, each of a score's name and an aggregate; each also as self-consistency weighted
            by it (Eq. 5).
        sizes: numbers of candidates; by default 1, 2, 4 ... and all.
        draws: random sets of each size.
        seed: of these.

    Returns:
        Rows of `n`, `method`, `accuracy`, `low` and `high`.

    Raises:
        ConfigError: a size is above the pool's.
        DataError: as `make_pools`.
    """
    pools = make_pools(solutions, methods)
    size = len(pools[0].classes)
    sizes = sizes or sorted({*(2**k for k in range(20) if 2**k < size), size})
    if max(sizes) > size or min(sizes) < 1:
        raise ConfigError(f"--sizes {list(sizes)}: must be from 1 to the pool's {size} candidates")
    rows = []
    for n in sizes:
        sets = subsets(size, n, draws, seed)
        found: dict[str, list[float]] = {}
        for pool in pools:
            for name, value in _pick(pool, sets).items():
                found.setdefault(name, []).append(value)
            hits = int(np.append(pool.right, False)[pool.classes].sum())
            found.setdefault("pass", []).append(pass_at(size, n, hits))
        for name, values in found.items():
            low, high = bootstrap_interval(values) if len(values) > 1 else (None, None)
            rows.append(
                {
                    "n": n,
                    "method": name,
                    "accuracy": float(np.mean(values)),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def _pick(pool: Pool, sets: np.ndarray) -> dict[str, float]:
    """Chance of a right answer by each method, mean over the sets."""
    classes = pool.classes[sets]
    found = {"SC": float(vote_accuracy(classes, np.ones(sets.shape), pool.right).mean())}
    for name, scores in pool.scores.items():
        found[name] = float(best_accuracy(classes, scores[sets], pool.right).mean())
        found[f"SC + {name}"] = float(vote_accuracy(classes, scores[sets], pool.right).mean())
    return found


def position_of_minimum(solutions: Sequence[Solution], score: str) -> dict[str, Any]:
    """Where the lowest step score lies: mostly on the last step means that a PRM has become an ORM."""
    several = [one for one in solutions if len(one.scores[score]) > 1]
    places = [int(np.argmin(one.scores[score])) for one in several]
    last = [place == len(one.steps) - 1 for place, one in zip(places, several, strict=True)]
    return {
        "score": score,
        "solutions": len(several),
        "minimum on the last step": float(np.mean(last)) if last else None,
    }


def step_quality(solutions: Sequence[Solution], score: str) -> dict[str, Any]:
    """How well scores tell truly good steps from bad ones: AUC, and accuracy at one half.

    Raises:
        DataError: no solution has truth.
    """
    from sklearn.metrics import roc_auc_score

    known = [one for one in solutions if one.truth and one.scores[score]]
    true = [value for one in known for value in one.truth or ()]
    scores = [
        value for one in known for value, _ in zip(one.scores[score], one.truth or (), strict=False)
    ]
    if len(set(true)) < 2:
        raise DataError("no steps of known truth, or all alike")
    accuracy = float(np.mean((np.array(scores) > 0.5) == np.array(true, dtype=bool)))
    return {
        "score": score,
        "steps": len(true),
        "AUC": float(roc_auc_score(true, scores)),
        "accuracy": accuracy,
    }
