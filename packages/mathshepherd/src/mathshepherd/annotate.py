"""Labels of steps by rollouts: a step is as good as the share of completions from it that are right.

All inner prefixes of all solutions stand in one queue, each once. Rounds of completions go over those
that are still undecided: a hard label is decided by the first hit, a soft one by all N. The number of
a completion decides its seed, so that neither the rounds nor a kill change what is sampled.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from octavo.console import counter
from octavo.errors import ConfigError, DataError

from mathshepherd.answers import equivalent
from mathshepherd.config import AnnotateConfig
from mathshepherd.generate import Generator, Request, seed_of
from mathshepherd.records import Problem, Solution, StepLabels, without_doubles
from mathshepherd.sample import Grader, answer_in
from mathshepherd.steps import StepFormat


@dataclass(frozen=True)
class Prefix:
    """The beginning of a solution; solutions of a problem that begin alike share it."""

    question: str
    answer: str
    steps: tuple[str, ...]

    @property
    def key(self) -> str:
        """A hash of the content."""
        words = json.dumps([self.question, self.answer, self.steps], ensure_ascii=False)
        return hashlib.blake2b(words.encode(), digest_size=12).hexdigest()


class RolloutStore:
    """Which completions of each prefix were right, in memory and appended to a file.

    A line that a kill left half is dropped; what is finished is never made again.

    Args:
        file: where it is kept; None for in memory alone.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.hits: dict[str, list[bool]] = {}
        self.tokens = 0
        self.made = 0  # by this process
        if file and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._take(row["prefix"], row["first"], row["hits"], row["tokens"])
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{file}, line {number}: is damaged; remove the file") from None
        if len(whole) < len(content):
            with file.open("rb+") as opened:
                opened.truncate(len(whole))

    def _take(self, key: str, first: int, hits: Sequence[int], tokens: int) -> None:
        known = self.hits.setdefault(key, [])
        if first != len(known):
            raise ValueError(key)
        known += map(bool, hits)
        self.tokens += tokens

    @contextmanager
    def appending(self) -> Iterator["RolloutStore"]:
        """Open the file; what is added is on the disk at the latest when this ends."""
        if self.file is None:
            yield self
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as self._opened:
            yield self

    def add(self, found: Mapping[str, tuple[list[bool], int]]) -> None:
        """Add the next completions of some prefixes: whether each was right, and tokens made."""
        lines = []
        for key, (hits, tokens) in found.items():
            first = len(self.hits.get(key, ()))
            self._take(key, first, hits, tokens)
            self.made += len(hits)
            row = {"prefix": key, "first": first, "hits": list(map(int, hits)), "tokens": tokens}
            lines.append(json.dumps(row) + "\n")
        if self.file is not None:
            self._opened.write("".join(lines))
            self._opened.flush()
            os.fsync(self._opened.fileno())


@dataclass(frozen=True)
class Cost:
    """What labels cost, and what they would have cost.

    Attributes:
        solutions: labelled.
        steps: of them but the last ones.
        prefixes: different ones that completions were made of.
        rollouts: completions.
        plain: completions without sharing and early exit, N for each inner step.
        tokens: made in them.
        left_out: solutions that were not labelled, by reason.
    """

    solutions: int
    steps: int
    prefixes: int
    rollouts: int
    plain: int
    tokens: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        return {k: v for k, v in asdict(self).items() if k != "left_out"} | {
            "share of plain": self.rollouts / self.plain if self.plain else None
        } | {f"left out: {reason}": n for reason, n in self.left_out.items()}  # fmt: skip


def labelable(solutions: Iterable[Solution]) -> tuple[list[Solution], dict[str, int]]:
    """Solutions that can be labelled, each text once, and how many cannot by reason.

    Raises:
        DataError: a right answer is not known.
    """
    left: dict[str, int] = {"unfinished": 0, "no answer": 0}
    found = []
    for one in solutions:
        if one.answer is None or one.correct is None:
            raise DataError(f"{one.key}: the right answer is not known, and labels need it")
        reason = (
            "unfinished" if not one.finished else "no answer" if one.predicted is None else None
        )
        if reason:
            left[reason] += 1
        else:
            found.append(one)
    different = without_doubles(found)
    return different, left | {"doubles": len(found) - len(different)}


def annotate(
    solutions: Sequence[Solution],
    generator: Generator,
    config: AnnotateConfig = AnnotateConfig(),
    form: StepFormat = StepFormat(),
    store: RolloutStore | None = None,
    seed: int = 0,
    grade: Grader = equivalent,
    chunk: int = 512,
) -> tuple[list[Solution], Cost]:
    """Label the steps of solutions by completing them (Eqs. 3 and 4).

    The last step needs no completion: the solution's own answer tells.

    Args:
        solutions: with graded answers; unfinished and answerless ones and doubles are left out.
        generator: the completer.
        config: how many completions, and for which labels.
        form: how solutions are written.
        store: keeps completions' outcomes, and goes on from those it has.
        seed: of the sampling.
        grade: tells a right answer.
        chunk: prefixes handed to the generator at once; their outcomes are then on the disk.

    Returns:
        The labelled solutions, and what they cost.

    Raises:
        DataError: there is none to label, or a right answer is not known.
    """
    kept, left_out = labelable(solutions)
    if not kept:
        raise DataError(f"none of {len(solutions)} solutions can be labelled ({left_out})")
    store = store or RolloutStore()
    inner = [prefixes(one) for one in kept]
    with store.appending():
        complete = _Completer(generator, config, form, store, seed, grade, chunk)
        if config.strategy == "linear":
            queue = list(dict.fromkeys(prefix for some in inner for prefix in some))
            complete(queue)
            labels = [
                linear_labels(
                    [store.hits[prefix.key] for prefix in some], bool(one.correct), config
                )
                for one, some in zip(kept, inner, strict=True)
            ]
        else:
            labels, queue = _binary(kept, inner, complete, store)
    labelled = [replace(one, labels=found) for one, found in zip(kept, labels, strict=True)]
    steps = sum(map(len, inner))
    rollouts = sum(len(store.hits[prefix.key]) for prefix in queue)
    return labelled, Cost(
        len(kept), steps, len(queue), rollouts, steps * config.rollouts, store.tokens, left_out
    )


def prefixes(solution: Solution) -> list[Prefix]:
    """A solution's inner prefixes, from one step to all but the last."""
    return [
        Prefix(solution.question, str(solution.answer), solution.steps[:n])
        for n in range(1, len(solution.steps))
    ]


@dataclass(frozen=True)
class _Completer:
    """Completes prefixes round by round until each is decided."""

    generator: Generator
    config: AnnotateConfig
    form: StepFormat
    store: RolloutStore
    seed: int
    grade: Grader
    chunk: int

    def __call__(self, queue: Sequence[Prefix]) -> None:
        made = 0
        keys = {prefix: prefix.key for prefix in queue}
        with counter("completing", len(queue) * self.config.rollouts, "rollouts") as advance:
            for size in self.config.rounds():
                made += size
                waiting = [one for one in queue if self._undecided(keys[one], made)]
                texts = {one: self.form.to_continue(one.question, one.steps) for one in waiting}
                waiting.sort(key=lambda one: -len(texts[one]))
                for start in range(0, len(waiting), self.chunk):
                    part = waiting[start : start + self.chunk]
                    self._complete(
                        part, [texts[one] for one in part], [keys[one] for one in part], made
                    )
                    advance(size * len(part))
                advance(size * (len(queue) - len(waiting)))

    def _undecided(self, key: str, made: int) -> bool:
        known = self.store.hits.get(key, [])
        return len(known) < made and not (self.config.estimation == "hard" and any(known))

    def _complete(
        self, part: Sequence[Prefix], texts: Sequence[str], keys: Sequence[str], made: int
    ) -> None:
        firsts = [len(self.store.hits.get(key, ())) for key in keys]
        requests = [
            Request(text, tuple(seed_of("rollout", self.seed, key, n) for n in range(first, made)))
            for text, key, first in zip(texts, keys, firsts, strict=True)
        ]
        found = {}
        for one, key, some in zip(part, keys, self.generator(requests), strict=True):
            hits = [
                completion.finished
                and self.grade(answer_in(completion.text, self.form), one.answer)
                for completion in some
            ]
            found[key] = (hits, sum(completion.tokens for completion in some))
        self.store.add(found)


def linear_labels(
    hits: Sequence[Sequence[bool]], correct: bool, config: AnnotateConfig
) -> StepLabels:
    """Labels of a solution's steps from the outcomes of its inner prefixes' completions.

    A soft label is given where all N completions were made, and never of an early exit.
    """
    counted = [some[: config.rollouts] for some in hits]
    totals, tried = [*map(sum, counted), int(correct)], [*map(len, counted), 1]
    soft = [
        total / many if many == config.rollouts or n == len(counted) else None
        for n, (total, many) in enumerate(zip(totals, tried, strict=True))
    ]
    hard = tuple(int(total > 0) for total in totals)
    return StepLabels(
        hard, None if config.estimation == "hard" else tuple(soft), tuple(totals), tuple(tried)
    )


def _binary(
    solutions: Sequence[Solution], inner: Sequence[Sequence[Prefix]], complete: _Completer,
    store: RolloutStore,
) -> tuple[list[StepLabels], list[Prefix]]:  # fmt: skip
    """Labels by bisection for the first step from which no completion is right (2406.06592)."""
    low = [0 if not one.correct else len(one.steps) for one in solutions]  # steps known to be good
    high = [len(one.steps) - 1 if not one.correct else len(one.steps) for one in solutions]
    asked: dict[Prefix, None] = {}
    while active := [n for n in range(len(solutions)) if low[n] < high[n]]:
        middle = {n: inner[n][(low[n] + high[n]) // 2] for n in active}
        queue = list(dict.fromkeys(middle.values()))
        asked |= dict.fromkeys(queue)
        complete(queue)
        for n, prefix in middle.items():
            if any(store.hits[prefix.key][: complete.config.rollouts]):
                low[n] = len(prefix.steps)
            else:
                high[n] = len(prefix.steps) - 1
    labels = [
        StepLabels(tuple(int(k < good) for k in range(len(one.steps))), strategy="binary")
        for one, good in zip(solutions, low, strict=True)
    ]
    return labels, list(asked)


Part = TypeVar("Part", Problem, Solution)


def shard(rows: Sequence[Part], which: str) -> list[Part]:
    """Part i of k (`1/4`) of the problems, or all solutions of these, so that they share prefixes.

    Raises:
        ConfigError: the words are not of that form.
    """
    first, _, count = which.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ConfigError(f"--shard {which}: write it like 1/4, from 1/4 to 4/4")
    return [
        one for one in rows
        if seed_of("shard", one.id if isinstance(one, Problem) else one.problem) % int(count)
        == int(first) - 1
    ]  # fmt: skip
