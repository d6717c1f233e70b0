"""Labelled steps in the formats that others publish and train on, read and written.

What a format has no place for is lost in writing, and each reader and writer says what that is.
What would be wrong instead of lost (a step without a label as a bad one, half a label as none) is
refused. All are one row a line; a reader takes every kind of source that `octavo.data` does.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.data import iter_rows
from octavo.errors import ConfigError, DataError
from octavo.rundir import write_text

from mathshepherd.answers import extract
from mathshepherd.records import Solution, StepLabels, as_text, key_of
from mathshepherd.steps import StepFormat

log = logging.getLogger(__name__)

#: How the released texts are written.
FORM = StepFormat()

Row = dict[str, Any]


def read(source: str | Path, kind: str, strict: bool = True) -> list[Solution]:
    """Solutions of a file (or folder, or hub id) in one of the `FORMATS`.

    A problem's id is made from its question, as `load_problems` makes it, and its solutions are
    numbered as they come; the benchmarks' rows keep the ids that they have.

    Args:
        source: of the rows.
        kind: name of the format.
        strict: refuse a row that cannot be read; else such rows are left out, counted and logged.

    Raises:
        ConfigError: no such format.
        DataError: a row is not in the format, or there are none.
    """
    if kind not in FORMATS:
        raise ConfigError(f"format {kind!r}: must be one of {', '.join(FORMATS)}")
    columns, reader = _READERS[kind]
    found: list[Solution] = []
    seen: Counter[str] = Counter()
    left_out: list[str] = []
    for number, row in enumerate(iter_rows(source, columns), 1):
        try:
            solutions = list(reader(row))
        except (DataError, KeyError, TypeError, AttributeError) as error:
            what = error if isinstance(error, DataError) else f"is not a row of {kind}: {error!r}"
            left_out.append(f"{source}, row {number}: {what}")
            if strict:
                raise DataError(left_out[0]) from None
            continue
        for one in solutions:
            found.append(replace(one, sample=seen[one.problem]))
            seen[one.problem] += 1
    if left_out:
        log.warning("%d rows are left out; the first: %s", len(left_out), left_out[0])
    if not found:
        raise DataError(f"{source}: holds no solutions")
    return found


def write(solutions: Iterable[Solution], file: str | Path, kind: str, labels: str = "hard") -> int:
    """Labelled solutions to a file in one of the `FORMATS`; returns the number of rows.

    Args:
        solutions: each with a label for every step.
        file: a .jsonl, written atomically.
        kind: name of the format.
        labels: `hard` (Eq. 3) or `soft` (Eq. 4).

    Raises:
        ConfigError: no such format or labels, or the format does not hold such labels.
        DataError: a solution has no label for a step, or its text cannot be written so.
    """
    if kind not in WRITABLE:
        raise ConfigError(f"format {kind!r}: must be one of {', '.join(WRITABLE)} to be written")
    if labels not in ("hard", "soft"):
        raise ConfigError(f"labels {labels!r}: must be hard or soft")
    if labels == "soft" and kind in ("mathshepherd", "prm800k", "rlhflow"):
        raise ConfigError(f"{kind} holds hard labels only; write trl, openrlhf or math-aps")
    rows = []
    for one in solutions:
        try:
            rows.append(_WRITERS[kind](one, _values(one, kind, labels)))
        except DataError as error:
            raise DataError(f"{one.key}: {error}") from None
    write_text(Path(file), "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return len(rows)


def _values(solution: Solution, kind: str, labels: str) -> list[Any]:
    """The labels of a solution, one a step."""
    if solution.labels is None:
        raise DataError("has no labels; `mathshepherd annotate` makes them")
    values = solution.labels.hard if labels == "hard" else solution.labels.soft
    if values is None:
        raise DataError("has no soft labels; annotate with --estimation soft or both")
    for number, value in enumerate(values, 1):
        if value is None and kind != "prm800k":
            raise DataError(
                f"step {number} has no {labels} label, which {kind} cannot say; "
                "write prm800k, or leave such solutions out"
            )
    if labels == "soft":
        return [float(value) for value in values if value is not None]
    return list(values)


def _solution(
    question: str, steps: Sequence[str], hard: Sequence[int | None], source: str, **more: Any
) -> Solution:
    if not question.strip():
        raise DataError("the question is blank")
    if not steps:
        raise DataError("there are no steps")
    for number, step in enumerate(steps, 1):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"step {number} of {len(steps)} is blank or no text")
    soft = more.pop("soft", None)
    if len(hard) != len(steps):
        raise DataError(f"there are {len(steps)} steps and {len(hard)} labels")
    more.setdefault("predicted", extract("\n".join(steps)))
    return Solution(
        key_of(question), 0, question.strip(), tuple(steps), **more,
        labels=StepLabels(tuple(hard), soft and tuple(soft), strategy=source),
    )  # fmt: skip


def _judged(values: Any) -> tuple[list[int], list[float] | None]:
    """Hard and, where there are such, soft labels of a column of either."""
    if not isinstance(values, list | tuple):
        raise DataError(f"the labels must be a list, not {values!r:.40}")
    values = [{"+": 1, "-": 0}.get(one, one) if isinstance(one, str) else one for one in values]
    for value in values:
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise DataError(f"label {value!r}: must be true, false, + or -, or from 0 to 1")
    soft = [float(value) for value in values] if any(type(v) is float for v in values) else None
    return [int(value > 0) for value in values], soft


# --- the released set: the text with tags, and again with the verdicts in their places


def _tagged(text: str) -> tuple[str, list[str]]:
    """Question and steps of a text with tags; what follows the last tag is a step as well."""
    *pieces, rest = text.split(FORM.tag)
    if not pieces:
        raise DataError(f"holds no step tag {FORM.tag!r}")
    start = pieces[0].find("Step 1:")
    if start < 0:
        raise DataError("holds no `Step 1:` to tell where the question ends")
    steps = [pieces[0][start:], *pieces[1:], *([rest] if rest.strip() else [])]
    return pieces[0][:start].strip(), [step.strip() for step in steps]


def _from_mathshepherd(row: Row) -> Iterator[Solution]:
    """Released rows: `input`, `label`, `task` (which is not kept).

    The last step's label says whether the answer is right (its prefix holds the answer), and a
    right answer is the problem's.
    """
    question, steps = _tagged(row["input"])
    hard: list[int | None] = []
    rest = row["label"]
    for piece in row["input"].split(FORM.tag)[:-1]:
        verdict = rest[len(piece) : len(piece) + 1]
        if not rest.startswith(piece) or verdict not in (FORM.good, FORM.bad):
            raise DataError(
                f"`label` must be `input` with {FORM.good} or {FORM.bad} for each tag; step "
                f"{len(hard) + 1} is not"
            )
        hard.append(int(verdict == FORM.good))
        rest = rest[len(piece) + 1 :]
    correct = bool(hard[-1]) if len(hard) == len(steps) else None
    predicted = extract("\n".join(steps))
    hard += [None] * (len(steps) - len(hard))
    yield _solution(
        question, steps, hard, "mathshepherd", predicted=predicted,
        correct=correct if predicted else None, answer=predicted if correct else None,
    )  # fmt: skip


def _to_mathshepherd(one: Solution, values: Sequence[Any]) -> Row:
    """Loses answers, soft labels and whether a step was numbered (all are)."""
    text = FORM.prefix(one.question, one.steps)
    pieces = text.split(FORM.tag)
    verdicts = [FORM.good if value else FORM.bad for value in values]
    label = "".join(f"{piece}{sign}" for piece, sign in zip(pieces, [*verdicts, ""], strict=True))
    return {"input": text, "label": label, "task": "unknown"}


# --- OpenRLHF's process reward data, until it was dropped: the text with tags, a list of labels


def _from_openrlhf(row: Row) -> Iterator[Solution]:
    """`input` with a placeholder behind each step; `label` or `value`: + and -, or numbers."""
    values = row["label"] if row["label"] is not None else row["value"]
    if values is None:
        raise DataError("has neither `label` nor `value`")
    question, steps = _tagged(row["input"])
    hard, soft = _judged(values)
    yield _solution(question, steps, hard, "openrlhf", soft=soft)


def _to_openrlhf(one: Solution, values: Sequence[Any]) -> Row:
    """Loses answers; + and - for hard labels, numbers for soft ones."""
    signs = [FORM.good if value else FORM.bad for value in values]
    hard = all(type(value) is int for value in values)
    return {"input": FORM.prefix(one.question, one.steps), "label": signs if hard else list(values)}


# --- TRL's stepwise supervision


def _from_trl(row: Row) -> Iterator[Solution]:
    """`prompt`, `completions` (the steps) and `labels` (truth values, or numbers from 0 to 1)."""
    if not isinstance(row["completions"], list):
        raise DataError("`completions` must be a list of texts")
    hard, soft = _judged(row["labels"])
    steps = [step.strip() for step in row["completions"]]
    yield _solution(row["prompt"], steps, hard, "trl", soft=soft)


def _to_trl(one: Solution, values: Sequence[Any]) -> Row:
    """Loses answers. TRL's trainer makes whole numbers of soft labels (so that .75 counts as 0)."""
    labels = [bool(value) if type(value) is int else value for value in values]
    return {"prompt": one.question, "completions": list(one.steps), "labels": labels}


# --- RLHFlow: a chat in which the user says steps and the assistant + or -


def _from_rlhflow(row: Row) -> Iterator[Solution]:
    """`conversations` (or `messages`); the first turn is the question and the step behind it."""
    turns = row["conversations"] if row["conversations"] is not None else row["messages"]
    if not turns or len(turns) % 2:
        raise DataError("`conversations` must be pairs of a user's and an assistant's turn")
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise DataError("the turns must be a user's and an assistant's, one after the other")
    first, *more = (turn["content"] for turn in turns[::2])
    start = first.find("Step 1:")
    if start < 0:
        raise DataError("the first turn holds no `Step 1:` to tell where the question ends")
    signs = [turn["content"].strip() for turn in turns[1::2]]
    if not set(signs) <= {FORM.good, FORM.bad}:
        raise DataError(f"the assistant must say {FORM.good} or {FORM.bad}")
    steps = [first[start:].strip(), *(text.strip() for text in more)]
    yield _solution(
        first[:start].strip(), steps, [int(sign == FORM.good) for sign in signs], "rlhflow"
    )


def _to_rlhflow(one: Solution, values: Sequence[Any]) -> Row:
    """Loses answers, soft labels and whether a step was numbered (the first is)."""
    first, *more = FORM.numbered_steps(one.steps)
    turns = []
    for text, value in zip([f"{one.question.strip()} {first}", *more], values, strict=True):
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": FORM.good if value else FORM.bad})
    return {"conversations": turns}


# --- PRM800K


def _from_prm800k(row: Row) -> Iterator[Solution]:
    """A record's own solution: of each step what was chosen to go on from.

    Where nothing was chosen, what the labeler wrote instead is taken (and is good), or else the
    first completion, with which the solution then ends. Ratings are 1, 0 and -1: a neutral step (0)
    counts as good, which is our reading of how the set is used; a missing rating is no label.
    Alternatives to a step are not read.
    """
    question, label = row["question"], row["label"]
    steps: list[str] = []
    hard: list[int | None] = []
    for step in label["steps"]:
        completions, chosen = step["completions"] or [], step["chosen_completion"]
        own = step.get("human_completion")
        if chosen is None and own:
            steps.append(own["text"].strip())
            hard.append(1)
            continue
        if not completions:
            break
        taken = completions[chosen or 0]
        rating = taken["rating"]
        if rating not in (-1, 0, 1, None):
            raise DataError(f"rating {rating!r} of step {len(steps) + 1}: must be -1, 0, 1 or null")
        steps.append(taken["text"].strip())
        hard.append(None if rating is None else int(rating >= 0))
        if chosen is None:
            break
    _, marker, last = steps[-1].rpartition("# Answer") if steps else ("", "", "")
    predicted = last.strip() or None if marker else extract("\n".join(steps))
    answer = question.get("ground_truth_answer")
    yield _solution(
        question["problem"], steps, hard, "prm800k", predicted=predicted,
        answer=as_text(answer),
        finished=label.get("finish_reason") == "solution",
    )  # fmt: skip


def _to_prm800k(one: Solution, values: Sequence[Any]) -> Row:
    """One completion a step, which is chosen. Loses samples' numbers; no step becomes neutral."""
    steps = [
        {
            "completions": [
                {"text": text, "rating": {1: 1, 0: -1}.get(value), "flagged": False}
            ],
            "human_completion": None,
            "chosen_completion": 0,
        }
        for text, value in zip(one.steps, values, strict=True)
    ]  # fmt: skip
    reason = "found_error" if 0 in values else "solution"
    return {
        "question": {"problem": one.question, "ground_truth_answer": one.answer},
        "label": {"steps": steps, "finish_reason": reason if one.finished else "give_up"},
    }


# --- MATH-APS (OmegaPRM's way): prefixes, or a tree, with the share of rollouts that came out right


def _from_aps(row: Row) -> Iterator[Solution]:
    """`question`, `final_answer`, `reasoning_steps`: a list of prefixes, or a tree.

    Each path from the question to a leaf (a prefix that no other continues) is a solution; its
    labels are soft, and good where the share is above 0 (Eq. 3). The question's own share is lost.
    A prefix that is given twice has the mean of both shares. A path without an answer did not end.
    """
    given = row["reasoning_steps"]
    tree = isinstance(given, dict)
    for path in _tree_paths(given) if tree else _prefix_paths(row["question"], given):
        steps, shares = [text for text, _ in path], [share for _, share in path]
        for share in shares:
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise DataError(f"mc_value {share!r}: must be from 0 to 1")
        predicted = extract("\n".join(steps))
        yield _solution(
            row["question"], steps, [int(share > 0) for share in shares], "math-aps",
            soft=[float(share) for share in shares], predicted=predicted,
            finished=predicted is not None,
            answer=as_text(row["final_answer"]),
        )  # fmt: skip


def _tree_paths(root: Mapping[str, Any]) -> Iterator[list[tuple[str, float]]]:
    waiting = [(child, []) for child in reversed(root["children"])]
    while waiting:
        node, before = waiting.pop()
        path = [*before, (node["text"].strip(), node["mc_value"])]
        waiting += [(child, path) for child in reversed(node["children"])]
        if not node["children"]:
            yield path


def _prefix_paths(question: str, rows: Sequence[Row]) -> Iterator[list[tuple[str, float]]]:
    shares: dict[str, list[float]] = {}
    for row in rows:
        text = row["solution_prefix"]
        if not text.startswith(question):
            raise DataError("a `solution_prefix` does not begin with the question")
        if steps := text[len(question) :].rstrip():
            shares.setdefault(steps, []).append(row["mc_value"])
    before: dict[str, str] = {}
    chain: list[str] = []
    for text in sorted(shares):  # a prefix comes before what continues it
        while chain and not (text.startswith(chain[-1]) and text[len(chain[-1])].isspace()):
            chain.pop()
        before[text] = chain[-1] if chain else ""
        chain.append(text)
    for text in shares:
        if text in before.values():
            continue
        path: list[tuple[str, float]] = []
        while text:
            share = sum(shares[text]) / len(shares[text])
            path.append((text[len(before[text]) :].strip(), share))
            text = before[text]
        yield path[::-1]


def _to_aps(one: Solution, values: Sequence[Any]) -> Row:
    """The solution's prefixes as a list, a hard label as 0 or 1; the question has no share."""
    prefixes, text = [], one.question
    for step, value in zip(one.steps, values, strict=True):
        text = f"{text}\n\n{step.strip()}"
        prefixes.append({"solution_prefix": text, "mc_value": float(value)})
    return {"question": one.question, "final_answer": one.answer, "reasoning_steps": prefixes}


# --- benchmarks, whose labels are the truth and not to be trained on


def _from_processbench(row: Row) -> Iterator[Solution]:
    """Steps are right up to the first error (`label`, from 0; -1: none); nobody judged the rest."""
    steps, error = row["steps"], row["label"]
    if not -1 <= error < len(steps):
        raise DataError(f"label {error}: must be -1 or the number of one of {len(steps)} steps")
    truth = (1,) * len(steps) if error == -1 else (1,) * error + (0,)
    yield replace(
        _solution(row["problem"], steps, [None] * len(steps), ""), problem=row["id"], labels=None,
        correct=row["final_answer_correct"], truth=truth,
    )  # fmt: skip


def _from_prmbench(row: Row) -> Iterator[Solution]:
    """The process with errors put in (`error_steps`, from 1), and then the original, all right.

    Numbers of steps that the process does not have are passed over, as the benchmark does.
    """
    wrong = set(row["error_steps"])
    for name, errors in (("modified", wrong), ("original", set())):
        steps = row[f"{name}_process"]
        truth = tuple(int(number not in errors) for number in range(1, len(steps) + 1))
        yield replace(
            _solution(row[f"{name}_question"], steps, [None] * len(steps), ""),
            problem=f"{row['classification']}:{row['idx']}", labels=None, truth=truth,
        )  # fmt: skip


_READERS: dict[str, tuple[dict[str, Any], Callable[[Row], Iterator[Solution]]]] = {
    "mathshepherd": ({"input": str, "label": str}, _from_mathshepherd),
    "prm800k": ({"question": dict, "label": dict}, _from_prm800k),
    "trl": ({"prompt": str, "completions": str | list, "labels": str | list}, _from_trl),
    "openrlhf": (
        {"input": str, "label": str | list | None, "value": str | list | None},
        _from_openrlhf,
    ),
    "rlhflow": ({"conversations": list | None, "messages": list | None}, _from_rlhflow),
    "math-aps": (
        {"question": str, "final_answer": str | int | float | None, "reasoning_steps": dict | list},
        _from_aps,
    ),
    "processbench": (
        {"id": str, "problem": str, "steps": list, "final_answer_correct": bool, "label": int},
        _from_processbench,
    ),
    "prmbench": (
        {"idx": str, "classification": str, "error_steps": list}
        | dict.fromkeys(("original_question", "modified_question"), str)
        | dict.fromkeys(("original_process", "modified_process"), list),
        _from_prmbench,
    ),
}
_WRITERS: dict[str, Callable[[Solution, Sequence[Any]], Row]] = {
    "mathshepherd": _to_mathshepherd, "prm800k": _to_prm800k, "trl": _to_trl,
    "openrlhf": _to_openrlhf, "rlhflow": _to_rlhflow, "math-aps": _to_aps,
}  # fmt: skip

#: Names of the formats; the benchmarks at the end are only read.
FORMATS = tuple(_READERS)

#: Those that can be written.
WRITABLE = tuple(_WRITERS)
