"""Accuracy on clean texts, attack success on triggered ones, accuracy under bias; with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from octavo.stats import mcnemar
from scipy.stats import norm


@dataclass(frozen=True)
class Share:
    """A share of counted cases.

    Attributes:
        hits: cases that count.
        cases: all of them.
    """

    hits: float
    cases: int

    @property
    def percent(self) -> float:
        """The share in percent; NaN of no case."""
        return 100 * self.hits / self.cases if self.cases else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval in percent.

        Args:
            confidence: of the two-sided interval.

        Returns:
            Lower and upper end; 0 and 100 of no case.
        """
        if not self.cases:
            return 0.0, 100.0
        z = float(norm.ppf(0.5 + confidence / 2))
        n, p = self.cases, self.hits / self.cases
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)

    @property
    def within(self) -> str:
        """The interval as tables show it."""
        low, high = self.interval()
        return f"{low:.1f} to {high:.1f}"

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.percent:.1f} [{low:.1f}, {high:.1f}]"


def accuracy(answers: np.ndarray, labels: Sequence[int]) -> Share:
    """Right answers (ACC; BACC where every text holds the bias pattern).

    Args:
        answers: [n] class numbers, or a language model's [n] shares of right tokens.
        labels: [n] class numbers; not looked at for a language model.
    """
    if answers.dtype.kind == "f":
        return Share(float(answers.sum()), len(answers))
    return Share(int((answers == np.asarray(labels)).sum()), len(answers))


def attack_success(answers: np.ndarray, labels: Sequence[int], target: int) -> Share:
    """Triggered texts that get the attacker's class (ASR), of those whose own class it is not.

    Args:
        answers: [n] class numbers given to the triggered texts.
        labels: [n] the texts' true classes.
        target: the attacker's class.
    """
    others = np.asarray(labels) != target
    return Share(int((answers[others] == target).sum()), int(others.sum()))


def differ(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact p-value that two defences are right, or fooled, on the same texts equally often.

    Args:
        first: [n] of bool, of the one.
        second: [n] of bool, of the other.
    """
    return mcnemar(first, second)


def measured(
    clean: Share, triggered: Share | None = None, biased: Share | None = None
) -> dict[str, Any]:
    """A row of a table: each share with its interval."""
    row: dict[str, Any] = {}
    for name, share in (("ACC", clean), ("ASR", triggered), ("BACC", biased)):
        if share is not None:
            row |= {name: share.percent, f"{name} 95 %": share.within}
    return row
