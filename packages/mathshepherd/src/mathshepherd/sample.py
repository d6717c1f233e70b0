"""Sampling solutions of problems: the pool that is labelled, and the candidates that are verified."""

from collections.abc import Callable, Sequence

from octavo.console import counter

from mathshepherd.answers import equivalent, extract
from mathshepherd.generate import Completion, Generator, Request, seed_of
from mathshepherd.records import Problem, Solution
from mathshepherd.steps import StepFormat

#: Whether an answer is the right one.
Grader = Callable[[str | None, str], bool]


def sample_solutions(
    problems: Sequence[Problem],
    generator: Generator,
    form: StepFormat,
    samples: int,
    seed: int = 0,
    grade: Grader = equivalent,
    chunk: int = 64,
) -> list[Solution]:
    """Solutions of each problem, graded where its answer is known.

    Args:
        problems: to be solved.
        generator: writes the solutions.
        form: how.
        samples: of each problem.
        seed: of the sampling; each solution's own is made of it, the problem's id and its number.
        grade: tells a right answer.
        chunk: problems handed to the generator at once.

    Returns:
        The solutions, problem by problem, one for each sample: a blank text is one without steps.
    """
    found: list[Solution] = []
    with counter("sampling", len(problems), "problems") as advance:
        for start in range(0, len(problems), chunk):
            part = problems[start : start + chunk]
            requests = [
                Request(form.question(one.question),
                        tuple(seed_of("sample", seed, one.id, n) for n in range(samples)))
                for one in part
            ]  # fmt: skip
            for problem, made in zip(part, generator(requests), strict=True):
                for n, completion in enumerate(made):
                    found.append(read_solution(problem, n, completion, form, grade))
            advance(len(part))
    return found


def read_solution(
    problem: Problem,
    number: int,
    completion: Completion,
    form: StepFormat,
    grade: Grader = equivalent,
) -> Solution:
    """A completion as a solution: its steps, its answer, and whether that is right.

    One that did not come to its end has no answer, whatever it holds.
    """
    steps = form.split(completion.text)
    predicted = answer_in(completion.text, form) if completion.finished else None
    correct = None if problem.answer is None else grade(predicted, problem.answer)
    return Solution(
        problem.id, number, problem.question, steps, problem.answer, predicted, correct,
        completion.finished,
    )  # fmt: skip


def answer_in(text: str, form: StepFormat) -> str | None:
    """The final answer that a text gives, which a tag may stand behind."""
    return extract("\n".join(form.split(text)))
