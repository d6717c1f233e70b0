"""Search guided by a reward model: several ways to take the next step, the best of them gone on from.

A beam search over steps (as in Snell et al., 2408.03314). All problems take each step together, and all
ways of going on from one beginning are sampled from one prefix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from octavo.console import counter

from mathshepherd.aggregate import aggregate
from mathshepherd.answers import equivalent
from mathshepherd.config import SearchConfig
from mathshepherd.generate import Completion, Generator, Request, seed_of
from mathshepherd.records import Problem, Solution, with_scores
from mathshepherd.sample import Grader, answer_in
from mathshepherd.steps import StepFormat


@dataclass(frozen=True)
class Path:
    """A solution on its way.

    Attributes:
        steps: taken so far, without tags.
        ended: whether it goes on no further.
        whole: whether it came to an end of its own.
        scores: of its steps.
        tokens: made for them.
    """

    steps: tuple[str, ...] = ()
    ended: bool = False
    whole: bool = False
    scores: tuple[float, ...] = ()
    tokens: int = 0


def beam_search(
    problems: Sequence[Problem],
    generator: Generator,
    scorer: Any,
    config: SearchConfig = SearchConfig(),
    form: StepFormat = StepFormat(),
    seed: int = 0,
    grade: Grader = equivalent,
    name: str = "prm",
    batch_tokens: int = 16384,
    max_tokens: int = 512,
) -> tuple[list[Solution], int]:
    """Solutions found step by step, the best of each problem first.

    Each round asks for `width` ways on from each of `beams` beginnings, scores them all, and keeps the
    best, those that have ended among them.

    Args:
        problems: to be solved.
        generator: continues a text by one step; it must stop at `stop_words(form)`.
        scorer: with `step_scores`, as `StepRewardModel` has it.
        config: how wide and how long, and how step scores become one.
        form: how solutions are written.
        seed: of the sampling.
        grade: tells a right answer.
        name: of the scores.
        batch_tokens: tokens in one batch of scoring.
        max_tokens: of the longest solution; one that has not ended by then goes on no further. One
            that is longer than the scorer's context is dropped.

    Returns:
        `beams` solutions of each problem or fewer, where fewer were different, with their scores; and
        the tokens that were made.
    """
    beams: list[list[Path]] = [[Path()] for _ in problems]
    tokens = 0
    with counter("searching", config.max_steps, "steps") as advance:
        for depth in range(config.max_steps):
            going = [(n, path) for n, some in enumerate(beams) for path in some if not path.ended]
            if not going:
                break
            made = generator([
                Request(
                    form.to_continue(problems[n].question, path.steps),
                    tuple(
                        seed_of("search", seed, problems[n].id, depth, *path.steps, k)
                        for k in range(config.ways(depth))
                    ),
                )
                for n, path in going
            ])  # fmt: skip
            found = [[path for path in some if path.ended] for some in beams]
            new: dict[tuple[int, tuple[str, ...]], Path] = {}
            for (n, path), some in zip(going, made, strict=True):
                tokens += sum(one.tokens for one in some)
                for one in some:
                    last = depth + 1 == config.max_steps or path.tokens + one.tokens >= max_tokens
                    further = _further(path, one, form, last)
                    known = new.setdefault((n, further.steps), further)
                    if further.whole and not known.whole:  # the same steps, and their end
                        new[n, further.steps] = further
            keys = [key for key, path in new.items() if path.steps]
            scores = scorer.step_scores(
                [problems[n].question for n, _ in keys], [steps for _, steps in keys],
                batch_tokens=batch_tokens, skip_long=True,
            )  # fmt: skip
            for (n, _), path in new.items():
                if not path.steps:
                    found[n].append(path)
            for (n, steps), values in zip(keys, scores, strict=True):
                if len(values):
                    scored = tuple(float(one) for one in values)
                    found[n].append(replace(new[n, steps], scores=scored))
            beams = [
                sorted(some, key=lambda path: -worth(path, config.aggregate))[: config.beams]
                for some in found
            ]
            advance(1)
        advance(config.max_steps)
    return [
        _solution(problem, k, path, form, grade, name)
        for problem, some in zip(problems, beams, strict=True)
        for k, path in enumerate(some or [Path(ended=True)])
    ], tokens


def stop_words(form: StepFormat) -> str:
    """Where a generator's step ends: its tag, or what stands between steps."""
    return form.joiner if form.plain else form.tag


def worth(path: Path, how: str) -> float:
    """A path's score; a whole one goes before another that is worth as much, a blank one last."""
    if not path.scores:
        return -math.inf
    return aggregate(np.array(path.scores), how) + 1e-9 * path.whole


def _further(path: Path, made: Completion, form: StepFormat, last: bool) -> Path:
    """A path with one more step; it has ended with its answer, or where the text did.

    A step that reached neither its end nor the text's was cut off, and is no whole solution's. A blank
    one that was ended is none: the next is asked for.
    """
    step = " ".join(form.split(made.text)).strip()
    steps = (*path.steps, step) if step else path.steps
    answered = bool(step) and made.stopped and answer_in(step, form) is not None
    whole = made.finished or answered
    tokens = path.tokens + made.tokens
    return Path(steps, whole or last or not made.stopped, whole, tokens=tokens)


def _solution(
    problem: Problem, number: int, path: Path, form: StepFormat, grade: Grader, name: str
) -> Solution:
    predicted = answer_in(form.joiner.join(path.steps), form) if path.whole and path.steps else None
    correct = None if problem.answer is None else grade(predicted, problem.answer)
    found = Solution(
        problem.id,
        number,
        problem.question,
        path.steps,
        problem.answer,
        predicted,
        correct,
        path.whole,
    )
    return with_scores(found, name, path.scores) if path.steps else found
