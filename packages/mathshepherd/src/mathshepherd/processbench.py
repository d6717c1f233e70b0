"""How well step scores find errors that people have marked: ProcessBench and PRMBench.

ProcessBench (Zheng et al. 2024) asks for the first wrong step, or that there is none; PRMBench
(Song et al. 2025) for each step of a solution into which errors were put. Scores come from
anywhere: these are functions of numbers, and `convert.read` gives the solutions to be scored.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from octavo.errors import ConfigError, DataError
from octavo.stats import bootstrap_interval

from mathshepherd.records import Solution

#: Of each solution the scores of its steps.
Scores = Sequence[Sequence[float] | np.ndarray]


@dataclass(frozen=True)
class Subset:
    """Solutions of ProcessBench and what a model says of them.

    Attributes:
        scores: of each solution, one for each step; the higher, the better the step.
        labels: the first wrong step, from 0; -1 where all are right.
        right_answers: whether the final answer is right, where that is known.
    """

    scores: Scores
    labels: Sequence[int] | np.ndarray
    right_answers: Sequence[bool] | np.ndarray | None = None

    def __post_init__(self) -> None:
        answers = len(self.labels) if self.right_answers is None else len(self.right_answers)
        if not len(self.scores) == len(self.labels) == answers:
            raise DataError(
                f"{len(self.scores)} solutions have scores, {len(self.labels)} labels and "
                f"{answers} answers; there must be as many of each"
            )
        if not len(self.labels):
            raise DataError("there are no solutions to evaluate")
        for number, (scores, label) in enumerate(zip(self.scores, self.labels, strict=True)):
            _check(scores, number)
            if not -1 <= label < len(scores):
                raise DataError(
                    f"solution {number}: the label {label} is none of its {len(scores)} steps, "
                    "nor -1"
                )

    @classmethod
    def of(cls, solutions: Sequence[Solution], name: str) -> "Subset":
        """The subset that solutions are, with the scores of a reward model by its name.

        Raises:
            DataError: a solution has no such scores, or its truth is not known.
        """
        scores, labels = [], []
        for one in solutions:
            if name not in one.scores:
                known = ", ".join(one.scores) or "none"
                raise DataError(f"{one.key}: has no scores of {name!r}; it has {known}")
            scores.append(one.scores[name])
            labels.append(true_error(one))
        return cls(scores, labels, [bool(one.correct) for one in solutions])


@dataclass(frozen=True)
class ErrorRow:
    """How well the first error is found in a subset; shares from 0 to 1.

    Attributes:
        subset: its name; "average" for the mean over the subsets, as the benchmark reports it.
        threshold: a step with a lower score counts as wrong.
        errors: solutions with an error.
        correct: solutions without one.
        error_accuracy: share of the former whose first error is named.
        correct_accuracy: share of the latter in which none is named.
        f1: harmonic mean of both.
        interval: of the F1, 95 % by bootstrap over solutions; None for the average.
        hidden: solutions with an error and a right answer.
        hidden_found: share of these whose first error is named; None where there are none.
        hidden_flagged: share of these in which any step is named.
        tuned: the threshold was chosen on this subset, so that its row flatters.
    """

    subset: str
    threshold: float
    errors: int
    correct: int
    error_accuracy: float
    correct_accuracy: float
    f1: float
    interval: tuple[float, float] | None
    hidden: int
    hidden_found: float | None
    hidden_flagged: float | None
    tuned: bool


def true_error(solution: Solution) -> int:
    """The first wrong step of a solution whose truth is known, from 0; -1 where there is none.

    Raises:
        DataError: it is not known.
    """
    if solution.truth is None:
        raise DataError(f"{solution.key}: has no `truth` to find errors in")
    return solution.truth.index(0) if 0 in solution.truth else -1


def first_errors(scores: Scores, threshold: float = 0.5) -> np.ndarray:
    """The first step of each solution with a score below the threshold, from 0; -1 for none."""
    return np.array(
        [next(iter(np.flatnonzero(np.asarray(one, float) < threshold)), -1) for one in scores]
    )


def f1(error_accuracy: float, correct_accuracy: float) -> float:
    """The harmonic mean of both accuracies; 0 where both are 0."""
    total = error_accuracy + correct_accuracy
    return 2 * error_accuracy * correct_accuracy / total if total else 0.0


def best_threshold(subset: Subset) -> float:
    """The threshold with the highest F1 on a subset.

    A solution is judged right for all thresholds above its first wrong step's score (above none
    where all are right) up to the lowest score before that, so that the F1 is a step function whose
    every step is looked at, in its middle; of several best ones the nearest to 0.5 is taken.

    Raises:
        DataError: the subset has no solution with an error, or none without.
    """
    labels = np.asarray(subset.labels)
    wrong = labels >= 0
    if wrong.all() or not wrong.any():
        raise DataError("a threshold is chosen on solutions with errors and on such without")
    pairs = list(zip(subset.scores, labels.tolist(), strict=True))
    low = np.array([scores[label] if label >= 0 else -np.inf for scores, label in pairs])
    high = np.array([
        min(scores[: label if label >= 0 else len(scores)], default=np.inf)
        for scores, label in pairs
    ])  # fmt: skip
    ends = np.unique(np.concatenate([low, high]))
    ends = ends[np.isfinite(ends)]
    middles = (ends[:-1] + ends[1:]) / 2
    middles = np.where(middles > ends[:-1], middles, ends[1:])  # between neighbours lies none
    candidates = np.concatenate([[0.5, ends[0] - 0.5], middles, [ends[-1] + 0.5]])

    def judged(group: np.ndarray) -> np.ndarray:
        group = group & (low < high)
        entered = np.searchsorted(np.sort(low[group]), candidates, side="left")
        left = np.searchsorted(np.sort(high[group]), candidates, side="left")
        return entered - left

    found, kept = judged(wrong) / wrong.sum(), judged(~wrong) / (~wrong).sum()
    means = np.array([f1(*both) for both in zip(found.tolist(), kept.tolist(), strict=True)])
    best = candidates[means >= means.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - 0.5))])


def evaluate_processbench(
    subsets: Mapping[str, Subset],
    threshold: float | None = None,
    choose_on: str | None = None,
    resamples: int = 2000,
) -> list[ErrorRow]:
    """One row for each subset, and their average where there are several.

    The benchmark's code lets a two-class model decide, which is a threshold of 0.5; for scores that
    are not such decisions, the threshold with the best F1 on the subset `gsm8k` is kept for all.

    Args:
        subsets: by name; the benchmark's are gsm8k, math, olympiadbench and omnimath.
        threshold: a step with a lower score counts as wrong; 0.5 unless one is chosen.
        choose_on: name of the subset on which the threshold is chosen.
        resamples: of the bootstrap.

    Raises:
        ConfigError: a threshold is both given and chosen, or is not a number, or the subset is not
            there.
        DataError: there are no subsets, or a threshold cannot be chosen on one.
    """
    if threshold is not None and choose_on is not None:
        raise ConfigError("give a threshold, or the subset to choose it on, and not both")
    if threshold is not None and not np.isfinite(threshold):
        raise ConfigError(f"threshold {threshold}: must be a finite number")
    if not subsets:
        raise DataError("there are no subsets to evaluate")
    if choose_on is not None:
        if choose_on not in subsets:
            raise ConfigError(f"subset {choose_on!r}: must be one of {', '.join(subsets)}")
        threshold = best_threshold(subsets[choose_on])
    limit = 0.5 if threshold is None else threshold
    rows = [_row(name, one, limit, name == choose_on, resamples) for name, one in subsets.items()]
    return [*rows, _average(rows)] if len(rows) > 1 else rows


def _row(name: str, subset: Subset, threshold: float, tuned: bool, resamples: int) -> ErrorRow:
    labels, named = np.asarray(subset.labels), first_errors(subset.scores, threshold)
    match, wrong = (named == labels).astype(float), (labels >= 0).astype(float)

    def mean_of_both(match: np.ndarray, wrong: np.ndarray, axis: int = -1) -> np.ndarray:
        found, kept = (
            (match * group).sum(axis) / np.maximum(group.sum(axis), 1)
            for group in (wrong, 1 - wrong)
        )
        return 2 * found * kept / np.maximum(found + kept, 1e-300)

    found, kept = (
        float((match * group).sum() / max(group.sum(), 1)) for group in (wrong, 1 - wrong)
    )
    interval = None
    if len(labels) > 1:
        interval = bootstrap_interval(match, wrong, statistic=mean_of_both, resamples=resamples)
    answers = subset.right_answers
    hidden = (labels >= 0) & np.asarray([False] * len(labels) if answers is None else answers, bool)
    some = bool(hidden.any())
    return ErrorRow(
        name, threshold, int(wrong.sum()), int((1 - wrong).sum()), found, kept, f1(found, kept),
        interval, int(hidden.sum()), float(match[hidden].mean()) if some else None,
        float((named[hidden] >= 0).mean()) if some else None, tuned,
    )  # fmt: skip


def _average(rows: Sequence[ErrorRow]) -> ErrorRow:
    def mean(name: str) -> float:
        return float(np.mean([getattr(row, name) for row in rows]))

    def over_hidden(name: str) -> float | None:
        known = [getattr(row, name) for row in rows if row.hidden]
        return float(np.mean(known)) if known else None

    return ErrorRow(
        "average", rows[0].threshold, sum(row.errors for row in rows),
        sum(row.correct for row in rows), mean("error_accuracy"), mean("correct_accuracy"),
        mean("f1"), None, sum(row.hidden for row in rows), over_hidden("hidden_found"),
        over_hidden("hidden_flagged"), any(row.tuned for row in rows),
    )  # fmt: skip


@dataclass(frozen=True)
class StepRow:
    """How well the steps of PRMBench's solutions are judged; shares from 0 to 1.

    Attributes:
        kind: of the errors; "all" for all solutions together.
        solutions: how many.
        steps: of these solutions.
        f1: of the right steps.
        error_f1: of the wrong steps; None where there are none.
        prm_score: mean of both, or the former alone (PRMBench's headline).
        first_error_accuracy: share of first errors judged wrong; None where there are none.
        preferred: share of solutions whose original has the higher lowest score; None without them.
        false_alarms: share of the originals' steps judged wrong; None without them.
    """

    kind: str
    solutions: int
    steps: int
    f1: float
    error_f1: float | None
    prm_score: float
    first_error_accuracy: float | None
    preferred: float | None
    false_alarms: float | None


def evaluate_prmbench(
    modified: Scores,
    errors: Sequence[Collection[int]],
    kinds: Sequence[str] | None = None,
    original: Scores | None = None,
    threshold: float = 0.5,
) -> list[StepRow]:
    """One row for each kind of error, and one for all.

    Counts run over the steps of all solutions of a row, as in the benchmark's code.

    Args:
        modified: scores of the solutions into which errors were put.
        errors: the wrong steps of each, from 1; those that it does not have are passed over.
        kinds: of the errors of each.
        original: scores of the same solutions without the errors.
        threshold: a step with a lower score counts as wrong.

    Raises:
        DataError: the arguments are not of the same length, are empty, or a score is not a number.
    """
    names = list(kinds) if kinds is not None else ["all"] * len(modified)
    before = list(original) if original is not None else [None] * len(modified)
    if not len(modified) == len(errors) == len(names) == len(before):
        raise DataError("scores, errors, kinds and originals must be of as many solutions")
    if not len(modified):
        raise DataError("there are no solutions to evaluate")
    for several in (modified, original or ()):
        for number, scores in enumerate(several):
            _check(scores, number)
    groups = {kind: [n for n, name in enumerate(names) if name == kind] for kind in names}
    groups |= {"all": list(range(len(names)))}
    return [
        _step_row(
            kind, [modified[n] for n in group], [errors[n] for n in group],
            [before[n] for n in group], threshold,
        )
        for kind, group in groups.items()
    ]  # fmt: skip


def _step_row(
    kind: str,
    modified: Scores,
    errors: Sequence[Collection[int]],
    original: Sequence[Sequence[float] | np.ndarray | None],
    threshold: float,
) -> StepRow:
    said = np.concatenate([np.asarray(scores, float) >= threshold for scores in modified])
    true = np.concatenate([
        np.array([step not in wrong for step in range(1, len(scores) + 1)])
        for scores, wrong in zip(modified, errors, strict=True)
    ])  # fmt: skip
    firsts = [
        scores[min(wrong) - 1] < threshold
        for scores, wrong in zip(modified, errors, strict=True)
        if wrong and min(wrong) <= len(scores)
    ]
    right, wrong = _f1(said, true), _f1(~said, ~true) if not true.all() else None
    pairs = [(new, old) for new, old in zip(modified, original, strict=True) if old is not None]
    return StepRow(
        kind, len(modified), len(true), right, wrong,
        right if wrong is None else (right + wrong) / 2,
        float(np.mean(firsts)) if firsts else None,
        float(np.mean([min(old) > min(new) for new, old in pairs])) if pairs else None,
        float(np.mean(np.concatenate([old for _, old in pairs]) < threshold)) if pairs else None,
    )  # fmt: skip


def _f1(said: np.ndarray, true: np.ndarray) -> float:
    hits = int((said & true).sum())
    return 2 * hits / (int(said.sum()) + int(true.sum())) if hits else 0.0


def _check(scores: Sequence[float] | np.ndarray, number: int) -> None:
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or not len(values):
        raise DataError(f"solution {number}: must have one score for each step, and a step or more")
    if np.isnan(values).any():
        raise DataError(f"solution {number}: the score of step {np.isnan(values).argmax()} is NaN")
