"""Errors found by scores: by hand, by brute force, and in the benchmarks by fake scorers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd.convert import read
from mathshepherd.processbench import (
    Subset,
    best_threshold,
    evaluate_prmbench,
    evaluate_processbench,
    f1,
    first_errors,
    true_error,
)
from mathshepherd.records import Solution
from octavo.errors import ConfigError, DataError

SCORES = [[0.9, 0.8, 0.2], [0.4, 0.9], [0.9, 0.9], [0.9, 0.3, 0.1], [0.6]]
LABELS = [2, 1, -1, 1, -1]
SUBSET = Subset(SCORES, LABELS, [True, False, True, True, True])


def test_the_first_error_is_the_first_score_below_the_threshold():
    assert first_errors(SCORES).tolist() == [2, 0, -1, 1, -1]
    assert first_errors(SCORES, 0.2).tolist() == [-1, -1, -1, 2, -1]
    assert first_errors([[0.5]], 0.5).tolist() == [-1]
    assert first_errors([np.array([0.5], dtype=np.float32)], 0.6).tolist() == [0]


def test_a_hand_worked_subset():
    (row,) = evaluate_processbench({"gsm8k": SUBSET})
    assert (row.errors, row.correct, row.threshold, row.tuned) == (3, 2, 0.5, False)
    assert row.error_accuracy == pytest.approx(2 / 3)
    assert row.correct_accuracy == 1
    assert row.f1 == pytest.approx(0.8)
    assert (row.hidden, row.hidden_found, row.hidden_flagged) == (2, 1, 1)
    assert row.interval is not None
    assert 0 <= row.interval[0] <= row.f1 <= row.interval[1] <= 1
    (row,) = evaluate_processbench({"gsm8k": SUBSET}, threshold=0.15)
    assert row.hidden_found == 0
    assert row.hidden_flagged == 0.5
    (row,) = evaluate_processbench({"a": Subset([[0.1]], [0])})
    assert (row.f1, row.interval, row.hidden, row.hidden_found) == (0, None, 0, None)
    assert f1(0, 0) == 0
    assert f1(0.5, 1) == pytest.approx(2 / 3)


def test_the_interval_is_that_of_a_plain_bootstrap():
    draw = np.random.default_rng(0)
    labels = draw.integers(-1, 2, 60)
    scores = [draw.random(2) for _ in labels]
    (row,) = evaluate_processbench({"a": Subset(scores, labels.tolist())}, resamples=1000)
    match = first_errors(scores) == labels
    means = []
    for _ in range(1000):
        taken = draw.integers(0, 60, 60)
        found, kept = (
            match[taken][group].mean() for group in (labels[taken] >= 0, labels[taken] < 0)
        )
        means.append(f1(found, kept))
    assert row.interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.04)


one_solution = st.lists(st.integers(0, 10).map(lambda n: n / 10), min_size=1, max_size=4).flatmap(
    lambda scores: st.tuples(st.just(scores), st.integers(-1, len(scores) - 1))
)


@given(st.lists(one_solution, min_size=2, max_size=8).filter(
    lambda pairs: len({label >= 0 for _, label in pairs}) == 2
))  # fmt: skip
def test_the_threshold_is_the_best_there_is(pairs):
    subset = Subset([scores for scores, _ in pairs], [label for _, label in pairs])

    def mean(threshold):
        match = first_errors(subset.scores, threshold) == subset.labels
        wrong = np.asarray(subset.labels) >= 0
        return f1(match[wrong].mean(), match[~wrong].mean())

    best = mean(best_threshold(subset))
    assert best == pytest.approx(max(mean(n / 20) for n in range(-1, 23)))


def test_the_threshold_is_chosen_on_one_subset_and_kept():
    other = Subset([[0.7, 0.9], [0.95]], [0, -1], [True, True])
    low, high, average = evaluate_processbench({"gsm8k": SUBSET, "math": other}, choose_on="math")
    assert low.threshold == high.threshold == average.threshold
    assert 0.7 < high.threshold <= 0.95
    assert (low.tuned, high.tuned, average.tuned) == (False, True, True)
    assert high.f1 == 1
    assert average.subset == "average"
    assert average.f1 == pytest.approx((low.f1 + high.f1) / 2)
    assert average.hidden == 3
    assert average.interval is None


def test_solutions_become_a_subset():
    plain = Solution("a", 0, "Q?", ("x", "y", "z"), correct=True, truth=(1, 0))
    solutions = [
        replace(plain, scores={"prm": (0.9, 0.1, 0.2)}),
        replace(plain, sample=1, truth=(1, 1, 1), scores={"prm": (0.9, 0.9, 0.9)}),
    ]
    subset = Subset.of(solutions, "prm")
    assert list(subset.labels) == [1, -1]
    assert evaluate_processbench({"a": subset})[0].f1 == 1
    with pytest.raises(DataError, match="problem a, sample 0: has no scores of 'orm'; it has prm"):
        Subset.of(solutions, "orm")
    with pytest.raises(DataError, match="has no `truth`"):
        true_error(replace(plain, truth=None))


def test_what_is_wrong_is_refused():
    with pytest.raises(DataError, match="1 solutions have scores, 2 labels and 2 answers"):
        Subset([[1.0]], [0, 0])
    with pytest.raises(DataError, match="1 labels and 0 answers"):
        Subset([[1.0]], [0], [])
    with pytest.raises(DataError, match="no solutions to evaluate"):
        Subset([], [])
    with pytest.raises(DataError, match="solution 0: the label 1 is none of its 1 steps, nor -1"):
        Subset([[1.0]], [1])
    with pytest.raises(DataError, match="solution 1: the score of step 1 is NaN"):
        Subset([[1.0], [1.0, float("nan")]], [0, 0])
    with pytest.raises(DataError, match="solution 0: must have one score for each step"):
        Subset([[]], [-1])
    with pytest.raises(DataError, match="no subsets"):
        evaluate_processbench({})
    with pytest.raises(ConfigError, match="and not both"):
        evaluate_processbench({"a": SUBSET}, threshold=0.5, choose_on="a")
    with pytest.raises(ConfigError, match="subset 'b': must be one of a"):
        evaluate_processbench({"a": SUBSET}, choose_on="b")
    with pytest.raises(ConfigError, match="must be a finite number"):
        evaluate_processbench({"a": SUBSET}, threshold=float("nan"))
    with pytest.raises(DataError, match="with errors and on such without"):
        best_threshold(Subset([[1.0]], [-1]))
    with pytest.raises(DataError, match="must be of as many solutions"):
        evaluate_prmbench([[1.0]], [])
    with pytest.raises(DataError, match="no solutions to evaluate"):
        evaluate_prmbench([], [])
    with pytest.raises(DataError, match="solution 0: the score of step 0 is NaN"):
        evaluate_prmbench([[1.0]], [[1]], original=[[float("nan")]])


def test_hand_worked_steps():
    modified = [[0.9, 0.2, 0.8], [0.9, 0.9]]
    circular, other, total = evaluate_prmbench(
        modified, [{2, 3, 9}, []], ["circular", "multi_solutions"], [[0.9, 0.8], [0.9, 0.4]]
    )
    # right: 1 hit, 2 said, 1 true; wrong: 1 hit, 1 said, 2 true
    assert (circular.f1, circular.error_f1) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert circular.prm_score == pytest.approx(2 / 3)
    assert (circular.solutions, circular.steps, circular.first_error_accuracy) == (1, 3, 1)
    assert (circular.preferred, circular.false_alarms) == (1, 0)
    assert (other.f1, other.error_f1, other.prm_score) == (1, None, 1)
    assert other.first_error_accuracy is None
    assert (other.preferred, other.false_alarms) == (0, 0.5)
    assert (total.kind, total.steps) == ("all", 5)
    assert total.f1 == pytest.approx(2 * 3 / (4 + 3))
    assert (total.preferred, total.false_alarms) == (0.5, 0.25)
    (alone,) = evaluate_prmbench(modified, [[2], [1]])
    assert (alone.first_error_accuracy, alone.preferred) == (0.5, None)


SPLITS = {
    "gsm8k": (207, 193),
    "math": (594, 406),
    "olympiadbench": (661, 339),
    "omnimath": (759, 241),
}


def scored(found, scorer):
    return [replace(one, scores={"fake": tuple(scorer(one))}) for one in found]


def oracle(one):
    error = true_error(one)
    return [float(step != error) for step in range(len(one.steps))]


@pytest.mark.realdata
@pytest.mark.untraced
def test_fake_scorers_on_processbench(data_folder):
    found = {
        name: read(data_folder / "processbench" / f"{name}.json.gz", "processbench")
        for name in SPLITS
    }

    def rows(scorer, **options):
        subsets = {name: Subset.of(scored(own, scorer), "fake") for name, own in found.items()}
        return evaluate_processbench(subsets, resamples=200, **options)

    for row in rows(oracle):
        assert (row.f1, row.error_accuracy, row.correct_accuracy, row.hidden_found) == (1, 1, 1, 1)
        if row.subset != "average":
            assert (row.errors, row.correct) == SPLITS[row.subset]
            assert row.interval == (1, 1)
    *parts, average = rows(lambda one: [1.0] * len(one.steps))
    assert {(row.error_accuracy, row.correct_accuracy, row.f1) for row in parts} == {(0, 1, 0)}
    assert average.f1 == 0
    for row in rows(lambda one: [0.0] * len(one.steps))[:-1]:
        firsts = sum(true_error(one) == 0 for one in found[row.subset])
        assert row.error_accuracy == pytest.approx(firsts / row.errors)
        assert (row.correct_accuracy, row.f1, row.hidden_flagged) == (0, 0, 1)
    *parts, average = rows(
        lambda one: [0.2 * score + 0.1 for score in oracle(one)], choose_on="gsm8k"
    )
    assert average.f1 == 1
    assert average.threshold == pytest.approx(0.2)
    assert [row.tuned for row in parts] == [True, False, False, False]
    assert [row.hidden for row in parts] == [7, 94, 161, 259]


@pytest.mark.realdata
@pytest.mark.untraced
def test_fake_scorers_on_prmbench(data_folder):
    found = read(data_folder / "step_labels" / "prmbench_subset400.jsonl.gz", "prmbench")
    modified, original = found[::2], found[1::2]
    errors = [{n for n, right in enumerate(one.truth or (), 1) if not right} for one in modified]
    kinds = [one.problem.split(":")[0] for one in modified]

    def rows(scorer):
        return evaluate_prmbench(
            [scorer(one) for one in modified], errors, kinds, [scorer(one) for one in original]
        )

    perfect = rows(lambda one: [float(right) for right in one.truth or ()])
    assert len(perfect) == 10
    assert perfect[-1].solutions == 394
    for row in perfect:
        assert (row.f1, row.prm_score, row.false_alarms) == (1, 1, 0)
        assert row.first_error_accuracy == (None if row.kind == "multi_solutions" else 1)
    blind = rows(lambda one: [1.0] * len(one.steps))[-1]
    assert (blind.error_f1, blind.preferred, blind.false_alarms) == (0, 0, 0)
    assert blind.prm_score == pytest.approx(blind.f1 / 2)
