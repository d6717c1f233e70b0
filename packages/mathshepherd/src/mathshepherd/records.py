"""Problems and solutions. A solution is one row, which gains a field at each station of the method."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from octavo.data import iter_rows
from octavo.errors import DataError
from octavo.rundir import write_text

log = logging.getLogger(__name__)

#: Version of the rows' layout, in every row.
SCHEMA = 1

#: The file of rows in the folder of a run, so that the folder may be named instead.
ROWS = "solutions.jsonl"


@dataclass(frozen=True)
class Problem:
    """A question and, where it is known, its right answer.

    Attributes:
        id: unique in its file; made from the question where the file has none.
        question: as the model reads it.
        answer: the right final answer.
        solution: a worked solution.
    """

    id: str
    question: str
    answer: str | None = None
    solution: str | None = None


@dataclass(frozen=True)
class StepLabels:
    """How good each step of a solution is.

    Attributes:
        hard: 1 or 0 for each step (Eq. 3: some completion reached the right answer); None where a
            step is not judged.
        soft: share of completions that did (Eq. 4), None where it was not estimated.
        hits: completions that reached the right answer.
        tried: completions made; 1 for the last step, whose own answer tells.
        strategy: `linear` (every step by its own completions), `binary` (search for the first error)
            or the name of another source.
    """

    hard: tuple[int | None, ...]
    soft: tuple[float | None, ...] | None = None
    hits: tuple[int, ...] | None = None
    tried: tuple[int, ...] | None = None
    strategy: str = "linear"


@dataclass(frozen=True)
class Solution:
    """One attempt at a problem, and what the stations found out about it.

    Attributes:
        problem: the problem's id.
        sample: which of its attempts, from 0.
        question: the problem's question.
        steps: without tags; none where nothing was written.
        answer: the right final answer.
        predicted: the answer that the attempt gives, None where it gives none.
        correct: whether that is right, None where it cannot be told.
        finished: whether the text came to an end of its own.
        labels: by rollouts (`annotate`), or from elsewhere.
        truth: true quality of each step, where it is known (generated problems); it may end with
            the first error, where nobody judged the steps behind that (ProcessBench).
        scores: of each step, by a reward model's name; none of a solution that it could not read.
    """

    problem: str
    sample: int
    question: str
    steps: tuple[str, ...]
    answer: str | None = None
    predicted: str | None = None
    correct: bool | None = None
    finished: bool = True
    labels: StepLabels | None = None
    truth: tuple[int, ...] | None = None
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells it from others in a message."""
        return f"problem {self.problem}, sample {self.sample}"

    def row(self) -> dict[str, Any]:
        """The solution as a row, without what is not known."""
        row: dict[str, Any] = {"schema": SCHEMA} | asdict(self)
        if self.labels:
            row["labels"] = {k: v for k, v in asdict(self.labels).items() if v is not None}
        return {name: value for name, value in row.items() if value not in (None, {})}


def load_problems(source: str | Path, split: str | None = None) -> list[Problem]:
    """Problems of a file, a folder of splits or a hub id.

    The columns may be named as in GSM8K (`question`, `answer` with the solution before `####`), MATH
    (`problem`, `solution`, `answer`, `unique_id`), MetaMATH (`query`, and `response` that ends in "The
    answer is: ...") or plainly (`id`, `question`, `answer`). A question that stands twice with the same
    answer is taken once.

    Raises:
        DataError: a column or value is missing, or two problems have the same id.
    """
    names = ("id", "unique_id", "question", "problem", "answer", "final_answer", "solution",
             "query", "response")  # fmt: skip
    columns: dict[str, Any] = dict.fromkeys(names, str | int | float | None)
    found: dict[str, Problem] = {}
    repeated = 0
    for number, row in enumerate(iter_rows(source, columns, split), 1):
        texts = {name: as_text(row[name]) for name in names}
        question = texts["question"] or texts["problem"] or texts["query"]
        if not (question and question.strip()):
            raise DataError(f"{source}, row {number}: has no `question` (or `problem`)")
        answer, solution = texts["answer"] or texts["final_answer"], texts["solution"]
        if answer and "####" in answer:
            solution, _, answer = answer.rpartition("####")
        if (response := texts["response"]) and not answer:
            solution, answer = response, response.rpartition("The answer is:")[2]
            answer = None if answer == response else answer
        answer = answer.strip() if answer else None
        named = texts["id"] or texts["unique_id"]
        solution = solution and solution.strip()
        problem = Problem(named or key_of(question), question, answer or None, solution)
        if problem.id in found:
            if named or found[problem.id].answer != problem.answer:
                raise DataError(f"{source}, row {number}: the id {problem.id} stands twice")
            repeated += 1
        found[problem.id] = problem
    if not found:
        raise DataError(f"{source}: holds no problems")
    if repeated:
        log.info("%s: %d questions stand twice, and are taken once", source, repeated)
    return list(found.values())


def key_of(question: str) -> str:
    """The id of a problem that has none: the same for the same question, whatever is around it."""
    return hashlib.sha256(question.strip().encode()).hexdigest()[:12]


def load_solutions(sources: str | Path | Sequence[str | Path]) -> list[Solution]:
    """Solutions of one file or more, or of the folders of runs.

    Those of several are put together: where two have a problem's sample of the same number, the later
    one's is counted on.

    Raises:
        DataError: there is no such file, a row is not as the stations write it, or stands twice.
    """
    found: list[Solution] = []
    counts: Counter[str] = Counter()
    for source in [sources] if isinstance(sources, str | Path) else sources:
        if not Path(source).exists():
            raise DataError(f"{source}: no such file, nor folder of a run")
        path = Path(source) / ROWS
        columns: dict[str, Any] = {
            "problem": str | int, "sample": int | None, "question": str, "steps": str | list,
            "answer": str | int | float | None, "predicted": str | int | float | None,
            "correct": bool | None, "finished": bool | None, "labels": dict | None,
            "truth": list | None, "scores": dict | None,
        }  # fmt: skip
        place = path if path.is_file() else source
        here: dict[tuple[str, int], Solution] = {}
        for number, row in enumerate(iter_rows(place, columns), 1):
            solution = _solution(row, f"{place}, row {number}")
            key = (solution.problem, solution.sample)
            if key in here:
                raise DataError(f"{place}, row {number}: {solution.key} stands twice")
            here[key] = solution
        before = dict(counts)
        for one in here.values():
            sample = one.sample + before.get(one.problem, 0)
            found.append(replace(one, sample=sample))
            counts[one.problem] = max(counts[one.problem], sample + 1)
    if not found:
        raise DataError(f"{sources}: holds no solutions")
    return found


def _solution(row: Mapping[str, Any], where: str) -> Solution:
    steps = tuple(row["steps"]) if isinstance(row["steps"], list) else ()
    blank = not all(isinstance(step, str) and step.strip() for step in steps)
    if blank or not (steps or (isinstance(row["steps"], list) and row["predicted"] is None)):
        raise DataError(
            f"{where}: `steps` must be one text or more, none of them blank (none at all where there "
            "is no answer either)"
        )
    scores = {name: _numbers(values, len(steps), f"{where}: scores of {name!r}")
              for name, values in (row["scores"] or {}).items()}  # fmt: skip
    labels = None
    if row["labels"] is not None:
        labels = _labels(row["labels"], len(steps), where)
    truth = None if row["truth"] is None else tuple(row["truth"])
    if truth is not None:
        short = 0 < len(truth) < len(steps) and truth[-1] == 0
        if not all(one in (0, 1) for one in truth) or not (short or len(truth) == len(steps)):
            raise DataError(
                f"{where}: `truth` must be 0 or 1 for each of the {len(steps)} steps, or end with a 0"
            )
        truth = tuple(map(int, truth))
    return Solution(
        str(row["problem"]), row["sample"] or 0, row["question"], steps, as_text(row["answer"]),
        as_text(row["predicted"]), row["correct"], row["finished"] is not False, labels, truth, scores,
    )  # fmt: skip


def as_text(value: Any) -> str | None:
    """An answer or an id that may stand as a number in a file: 3 for 3, not 3.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return None if value is None else str(value)


def _numbers(values: Any, count: int, what: str) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) not in (0, count):
        raise DataError(f"{what}: must be one number for each of the {count} steps, or none at all")
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
        raise DataError(f"{what}: one is not a finite number")
    return tuple(float(one) for one in values)


def _labels(row: Mapping[str, Any], count: int, where: str) -> StepLabels:
    parts: dict[str, Any] = {}
    for name, good, what in (
        ("hard", lambda one: one in (0, 1, None), "0, 1 or null"),
        ("soft", lambda one: one is None or 0 <= one <= 1, "from 0 to 1, or null"),
        ("hits", lambda one: one is not None and one >= 0 and one % 1 == 0, "0 or more, and whole"),
        ("tried", lambda one: one is not None and one >= 0 and one % 1 == 0, "0 or more, and whole"),
    ):  # fmt: skip
        values = row.get(name)
        if values is None and name != "hard":
            continue
        if not isinstance(values, list) or len(values) != count:
            raise DataError(
                f"{where}: labels: `{name}` must have one for each of the {count} steps"
            )
        for one in values:
            if not (one is None or isinstance(one, int | float)) or not good(one):
                raise DataError(f"{where}: labels: `{name}` holds {one!r}; must be {what}")
        whole = name != "soft"
        parts[name] = tuple(int(one) if whole and one is not None else one for one in values)
    return StepLabels(**parts, strategy=str(row.get("strategy", "linear")))


def write_solutions(file: Path, solutions: Iterable[Solution]) -> None:
    """One row a solution, the file written atomically."""
    lines = (json.dumps(one.row(), ensure_ascii=False) for one in solutions)
    write_text(file, "".join(f"{line}\n" for line in lines))


def by_problem(solutions: Iterable[Solution]) -> dict[str, list[Solution]]:
    """Solutions of each problem, in the order of their first."""
    found: dict[str, list[Solution]] = {}
    for one in solutions:
        found.setdefault(one.problem, []).append(one)
    return found


def without_doubles(solutions: Iterable[Solution]) -> list[Solution]:
    """The first of each problem's solutions with the same steps (section 4.1: duplicates removed)."""
    seen = {}
    for one in solutions:
        seen.setdefault((one.problem, one.steps), one)
    return list(seen.values())


def with_scores(solution: Solution, name: str, scores: np.ndarray | Sequence[float]) -> Solution:
    """The solution with a reward model's scores of its steps."""
    return replace(solution, scores={**solution.scores, name: tuple(float(one) for one in scores)})
