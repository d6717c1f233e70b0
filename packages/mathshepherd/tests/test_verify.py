"""Best-of-N and votes: by hand, over all subsets, and against enumeration."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd import verify
from mathshepherd.aggregate import (
    AGGREGATES,
    aggregate,
    best_accuracy,
    pass_at,
    vote_accuracy,
    votes,
)
from mathshepherd.records import Solution
from mathshepherd.verify import curves, make_pools, position_of_minimum, step_quality, subsets
from octavo.errors import ConfigError, DataError

METHODS = {"PRM": ("prm", "min"), "last": ("prm", "last")}


def candidate(sample: int, predicted: str | None, scores, problem="p", answer="1", **more: Any):
    steps = tuple(f"step {n}" for n in range(len(scores)))
    found = {"prm": tuple(map(float, scores))}
    return Solution(problem, sample, "How many?", steps, answer, predicted, predicted == answer,
                    scores=found, **more)  # fmt: skip


def pool_of(rows, problem="p"):
    return [candidate(n, answer, scores, problem) for n, (answer, scores) in enumerate(rows)]


def accuracy(rows, n, method):
    (found,) = (row for row in rows if (row["n"], row["method"]) == (n, method))
    return found["accuracy"]


def test_aggregates_by_hand():
    scores = np.array([0.5, 0.8, 0.9])
    assert {how: round(aggregate(scores, how), 6) for how in AGGREGATES} == {
        "min": 0.5, "prod": 0.36, "mean": 0.733333, "last": 0.9, "geometric": 0.711379
    }  # fmt: skip
    assert all(aggregate(np.array([0.3]), how) == pytest.approx(0.3) for how in AGGREGATES)
    zero = np.array([0.0, 0.5])
    assert [aggregate(zero, how) for how in ("min", "prod", "geometric")] == pytest.approx(
        [0, 0, 0], abs=1e-5
    )
    with pytest.raises(ConfigError, match="--aggregate median: is none of min, prod, mean, last"):
        aggregate(scores, "median")


def test_votes_by_hand():
    classes = np.array([[0, 1, 1, -1], [2, -1, -1, -1], [-1, -1, -1, -1]])
    assert votes(classes, np.ones((3, 4)), 3).tolist() == [[1, 2, 0], [0, 0, 1], [0, 0, 0]]
    weights = np.array([[0.9, 0.3, 0.5, 9.0]] * 3)
    assert votes(classes, weights, 3).round(6).tolist() == [[0.9, 0.8, 0], [0, 0, 0.9], [0, 0, 0]]


@pytest.mark.parametrize(
    ("classes", "weights", "right", "chance"),
    [
        ([0, 1, 1], [1, 1, 1], [0, 1], 1),
        ([0, 1, 1], [0.9, 0.3, 0.5], [0, 1], 0),  # Eq. 5: weights add up
        ([0, 0, 1, 1], [1, 1, 1, 1], [0, 1], 0.5),  # a tie is drawn by lot
        ([0, 1, 2], [1, 1, 1], [0, 1, 0], 1 / 3),
        ([0, 0, 1], [0.1, 0.2, 0.3], [0, 1], 0.5),  # but for its last bits
        ([-1, -1, -1, 0], [1, 1, 1, 0.1], [1], 1),  # no answer is no class
        ([-1, -1], [1, 1], [0], 0),
        ([0, 1], [0, 0], [1, 0], 0.5),  # no weight is no vote against
        ([-1, 0], [1, 0], [1], 1),
    ],
)
def test_votes_are_decided_by_most_and_by_lot(classes, weights, right, chance):
    found = vote_accuracy(np.array([classes]), np.array([weights], float), np.array(right, bool))
    assert found.tolist() == pytest.approx([chance])


@pytest.mark.parametrize(
    ("classes", "scores", "chance"),
    [
        ([0, 1, 1], [0.1, 0.2, 0.3], 1),
        ([0, 1, 0], [0.1, 0.2, 0.3], 0),
        ([0, 1, 1], [0.3, 0.3, 0.3], 2 / 3),
        ([-1, 1, 0], [0.9, 0.2, 0.1], 1),  # one without an answer never wins
        ([-1, 0, -1], [0.9, 0.0, 0.9], 0),
        ([-1, -1, -1], [0.9, 0.8, 0.7], 0),  # all of them: wrong
    ],
)
def test_the_best_candidate_by_hand(classes, scores, chance):
    found = best_accuracy(np.array([classes]), np.array([scores]), np.array([False, True]))
    assert found.tolist() == pytest.approx([chance])


candidates = st.lists(
    st.tuples(st.sampled_from(["1", "2", "0.5", "1/2", None]), st.sampled_from([0.1, 0.25, 0.5, 0.9])),
    min_size=1, max_size=6,
)  # fmt: skip


def equal(first, second):
    return first == second or {first, second} == {"1/2", "0.5"}


def by_vote(some, weight):
    """Eq. 5 for one set of candidates, in the plainest way."""
    answered = [(answer, weight(score)) for answer, score in some if answer is not None]
    sums = [
        round(sum(w for other, w in answered if equal(other, answer)), 9) for answer, _ in answered
    ]
    # each class once, by its first member
    firsts = [n for n, (answer, _) in enumerate(answered)
              if not any(equal(answer, other) for other, _ in answered[:n])]  # fmt: skip
    best = [n for n in firsts if sums[n] == max(sums)]
    return sum(answered[n][0] == "1" for n in best) / len(best) if best else 0.0


def by_score(some):
    answered = [one for one in some if one[0] is not None]
    best = [answer for answer, score in answered if score == max(score for _, score in answered)]
    return sum(answer == "1" for answer in best) / len(best) if best else 0.0


@given(candidates, st.data())
def test_curves_are_means_over_all_subsets(rows, data):
    n = data.draw(st.integers(1, len(rows)))
    pool = pool_of([(answer, [score]) for answer, score in rows])
    sets = np.array(list(combinations(range(len(rows)), n)))
    (made,) = make_pools(pool, METHODS)
    found = verify._pick(made, sets)
    subs = [[rows[k] for k in one] for one in sets]
    assert found["PRM"] == pytest.approx(np.mean([by_score(one) for one in subs]))
    assert found["SC"] == pytest.approx(np.mean([by_vote(one, lambda _: 1.0) for one in subs]))
    assert found["SC + PRM"] == pytest.approx(np.mean([by_vote(one, lambda w: w) for one in subs]))
    passed = np.mean([any(answer == "1" for answer, _ in one) for one in subs])
    assert accuracy(curves(pool, METHODS, [n], draws=1), n, "pass") == pytest.approx(passed)


@pytest.mark.parametrize("rows", [
    [("1", [0.3]), ("2", [0.9]), ("2", [0.1]), ("1", [0.8]), (None, [0.99]), ("0.5", [0.5])]
])  # fmt: skip
def test_random_subsets_come_near_all_of_them(rows):
    pool = pool_of(rows)
    found = curves(pool, METHODS, [1, 3, 6], draws=4000)
    (made,) = make_pools(pool, METHODS)
    for n in (1, 3, 6):
        wanted = verify._pick(made, np.array(list(combinations(range(6), n))))
        for method, value in wanted.items():
            assert accuracy(found, n, method) == pytest.approx(value, abs=1e-9 if n == 6 else 0.03)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_enumeration(n, data):
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    wanted = np.mean([any(one < right for one in some) for some in combinations(range(n), k)])
    assert pass_at(n, k, right) == pytest.approx(wanted)


def test_one_candidate_is_the_same_to_every_method():
    rows = [("1", [0.0]), ("2", [0.5]), (None, [0.9]), ("1", [1.0])]
    found = curves(pool_of(rows), METHODS, [1], draws=50)
    assert len({row["accuracy"] for row in found if row["method"] != "pass"}) == 1
    assert accuracy(found, 1, "pass") == 0.5


def test_all_methods_see_the_same_sets(monkeypatch):
    seen = []
    plain = verify._pick
    monkeypatch.setattr(
        verify, "_pick", lambda pool, sets: seen.append(sets.tolist()) or plain(pool, sets)
    )
    pools = pool_of([("1", [0.5])] * 5) + pool_of([("2", [0.5])] * 5, "q")
    first = curves(pools, METHODS, [2, 5], draws=3)
    assert seen[0] == seen[1] != seen[2] == seen[3] == [[0, 1, 2, 3, 4]]
    assert all(len(set(one)) == 2 for one in seen[0])
    assert curves(pools, METHODS, [2, 5], draws=3) == first
    assert not np.array_equal(subsets(9, 3, 8, seed=0), subsets(9, 3, 8, seed=1))
    counts = np.bincount(subsets(9, 3, 3000, seed=0).ravel(), minlength=9) / 3000
    assert counts == pytest.approx(np.full(9, 1 / 3), abs=0.04)


def test_rows_of_curves():
    pools = pool_of([("1", [0.5, 0.9])] * 6) + pool_of([("2", [0.5, 0.1])] * 6, "q")
    found = curves(pools, METHODS)
    assert sorted({row["n"] for row in found}) == [1, 2, 4, 6]
    assert {row["method"] for row in found} == {
        "SC", "PRM", "SC + PRM", "last", "SC + last", "pass"
    }  # fmt: skip
    assert {row["accuracy"] for row in found} == {0.5}
    assert all(row["low"] <= 0.5 <= row["high"] for row in found)
    alone = curves(pools[:6], METHODS)
    assert {(row["accuracy"], row["low"], row["high"]) for row in alone} == {(1.0, None, None)}


def test_equal_answers_are_one_class():
    found = curves(pool_of([("1/2", [0.4]), ("0.5", [0.4]), ("1", [0.5])]), METHODS, [3])
    assert accuracy(found, 3, "SC") == accuracy(found, 3, "SC + PRM") == 0
    assert accuracy(found, 3, "PRM") == 1


def test_what_cannot_be_measured_is_refused():
    pool = pool_of([("1", [0.5]), ("2", [0.5])])
    with pytest.raises(DataError, match="there are no candidates"):
        curves([], METHODS)
    for sizes in ([3], [0], [1, 4]):
        with pytest.raises(ConfigError, match=r"must be from 1 to the pool's 2 candidates"):
            curves(pool, METHODS, sizes)
    with pytest.raises(
        DataError, match="problems have 1 to 2 candidates; curves over N need as many"
    ):
        curves([*pool, candidate(0, "1", [0.5], "q")], METHODS)
    with pytest.raises(DataError, match="problem p, sample 1: `correct` is not known"):
        curves([pool[0], replace(pool[1], correct=None)], METHODS)
    with pytest.raises(
        DataError, match="problem p, sample 0: has no scores of 'orm'; run `mathshep"
    ):
        curves(pool, {"ORM": ("orm", "last")})
    with pytest.raises(ConfigError, match="--aggregate median"):
        curves(pool, {"PRM": ("prm", "median")})


def test_where_the_lowest_score_lies():
    pool = pool_of(
        [("1", [0.5, 0.4]), ("1", [0.3, 0.4, 0.9]), ("1", [0.1]), ("1", [0.9, 0.9, 0.2])]
    )
    found = position_of_minimum(pool, "prm")
    assert found == {
        "score": "prm",
        "solutions": 3,
        "minimum on the last step": pytest.approx(2 / 3),
    }
    assert position_of_minimum(pool[2:3], "prm")["minimum on the last step"] is None


def test_how_well_scores_tell_steps_apart():
    pool = [
        candidate(0, "1", [0.9, 0.6, 0.55], truth=(1, 1, 0)),
        candidate(1, "1", [0.4, 0.1, 0.99], truth=(1, 0)),  # truth ends at the first error
        candidate(2, "1", [0.0]),
    ]
    found = step_quality(pool, "prm")
    # good: .9 .6 .4, bad: .55 .1; five of six pairs are in order
    assert found == {"score": "prm", "steps": 5, "AUC": pytest.approx(5 / 6), "accuracy": 0.6}
    for some in (pool[2:], [candidate(0, "1", [0.9], truth=(1,))]):
        with pytest.raises(DataError, match="no steps of known truth, or all alike"):
            step_quality(some, "prm")
