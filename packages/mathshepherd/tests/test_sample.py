"""Solutions sampled, read and graded; each has a seed of its own."""

import pytest
from mathshepherd.generate import Completion
from mathshepherd.records import Problem
from mathshepherd.sample import answer_in, read_solution, sample_solutions
from mathshepherd.steps import StepFormat
from octavo.errors import DataError

FORM = StepFormat()
PROBLEMS = [Problem(str(n), f"Question {n}?", "x+1" if n else None) for n in range(5)]


def writer(asked):
    def generate(requests):
        asked.extend((one.text, seed) for one in requests for seed in one.seeds)
        text = " Step 1: a ки\nStep 2: {} The answer is: x + {} ки"
        return [[Completion(text.format(one.text, seed % 2), True, 9) for seed in one.seeds]
                for one in requests]  # fmt: skip

    return generate


def test_solutions_of_each_problem_in_order():
    asked: list = []
    found = sample_solutions(PROBLEMS, writer(asked), FORM, 4, chunk=2)
    assert [(one.problem, one.sample) for one in found] == [
        (str(n), k) for n in range(5) for k in range(4)
    ]
    assert [text for text, _ in asked] == [f"Question {n}?" for n in range(5) for _ in range(4)]
    assert len({seed for _, seed in asked}) == 20
    for one, (_, seed) in zip(found, asked, strict=True):
        assert one.steps[0] == "Step 1: a"
        assert one.predicted == f"x + {seed % 2}"
        assert one.correct == (None if one.problem == "0" else bool(seed % 2))
    assert {one.correct for one in found} == {None, True, False}


def test_a_seed_is_of_the_problem_and_the_number_alone():
    first, alone, other = [], [], []
    sample_solutions(PROBLEMS, writer(first), FORM, 4)
    sample_solutions(PROBLEMS[3:4], writer(alone), FORM, 2)
    sample_solutions(PROBLEMS, writer(other), FORM, 4, seed=1)
    assert set(alone) < set(first)
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("text", "finished", "predicted", "correct"),
    [
        ("Step 1: so. The answer is: x + 1 ки", True, "x + 1", True),
        ("Step 1: so. The answer is: x + 1 ки", False, None, False),  # it may have gone on
        ("Step 1: so ки", True, None, False),
        ("Step 1: The answer is: 8 ки\nStep 2: The answer is: 1+x ки", True, "1+x", True),
    ],
)
def test_answers_are_of_texts_that_came_to_an_end(text, finished, predicted, correct):
    found = read_solution(PROBLEMS[1], 3, Completion(text, finished, 9), FORM)
    assert (found.sample, found.predicted, found.correct, found.finished) == (
        3, predicted, correct, finished
    )  # fmt: skip
    if finished:
        assert answer_in(text, FORM) == predicted


def test_texts_without_steps_count_as_wrong():
    found = sample_solutions(
        PROBLEMS, lambda some: [[Completion(" ки \n", True, 2)]] * len(some), FORM, 1
    )
    assert [(one.steps, one.predicted) for one in found] == [((), None)] * len(PROBLEMS)
    with pytest.raises(DataError, match="a question holds the tag"):
        sample_solutions([Problem("1", "Why ки?")], writer([]), FORM, 1)
