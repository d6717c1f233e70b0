"""The figures of reports."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

#: Parts of speech in English: no font with Chinese signs is sure to be there.
POS = {
    "名": "noun", "动": "verb", "形": "adjective", "副": "adverb", "代": "pronoun", "数": "numeral",
    "量": "classifier", "连": "conjunction", "介": "preposition", "助": "particle",
    "拟": "onomatopoeia", "未": "unknown",
}  # fmt: skip


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def accuracy_figure(table: Sequence[Row], column: str, low: str = "", high: str = "") -> "Figure":
    """A bar a system, with its interval where there is one."""
    figure, axes = _figure(7, 0.4 * len(table) + 1)
    values = np.array([row[column] for row in table])
    names = [str(row["system"]) for row in table]
    errors = None
    if low and high:
        errors = np.array(
            [[v - row[low], row[high] - v] for v, row in zip(values, table, strict=True)]
        ).T
    axes.barh(
        names[::-1], values[::-1], xerr=None if errors is None else errors[:, ::-1], color="#4c72b0"
    )
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"accuracy, {column}, %")
    return figure


def subsets_figure(evaluations: Mapping[str, Sequence[Row]], names: Sequence[str]) -> "Figure":
    """Accuracy with intervals over some subsets, a line a system."""
    figure, axes = _figure(7, 4)
    for system, rows in evaluations.items():
        by = {row["subset"]: row for row in rows}
        there = [name for name in names if name in by]
        values = np.array([by[name]["accuracy"] for name in there])
        errors = [values - [by[name]["low"] for name in there],
                  np.array([by[name]["high"] for name in there]) - values]  # fmt: skip
        labels = [POS.get(name.removeprefix("POS="), name) for name in there]
        axes.errorbar(labels, values, yerr=errors, marker="o", capsize=3, label=system)
    axes.set_ylabel("accuracy, %")
    axes.tick_params(axis="x", rotation=30)
    axes.legend()
    return figure


def confusion_figure(pairs: Sequence[Sequence[str]]) -> "Figure":
    """Formations annotated (rows) against those told (columns), as shares of a row."""
    from formbert.formations import NAMES, parse

    names = [name for name in NAMES if any(name in pair for pair in pairs)]
    counts = np.zeros((len(names), len(names)))
    for annotated, told in pairs:
        if annotated in names and told in names:
            counts[names.index(annotated), names.index(told)] += 1
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    figure, axes = _figure(1.5 + 0.6 * len(names), 1.5 + 0.5 * len(names))
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    labels = [parse(name).en for name in names]  # no font with Chinese signs is sure to be there
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlabel("told")
    axes.set_ylabel("annotated")
    figure.colorbar(image, label="share of the row")
    return figure


def reliability_figure(answers: Sequence[Sequence[Any]], bins: int = 10) -> "Figure":
    """How often answers of some probability are right.

    Args:
        answers: pairs of a probability and whether the answer was right.
        bins: steps of probability.
    """
    figure, axes = _figure(4, 4)
    confidence = np.array([float(one[0]) for one in answers])
    right = np.array([bool(one[1]) for one in answers])
    place = np.clip((confidence * bins).astype(int), 0, bins - 1)
    there = [bin for bin in range(bins) if (place == bin).any()]
    axes.plot([0, 1], [0, 1], color="#aaa", linewidth=1)
    axes.plot(
        [confidence[place == bin].mean() for bin in there],
        [right[place == bin].mean() for bin in there],
        marker="o",
    )
    axes.set_xlabel("probability told")
    axes.set_ylabel("share right")
    return figure


def coverage_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure":
    """Accuracy among the surest answers, by the share that is answered."""
    figure, axes = _figure(5, 4)
    for system, rows in curves.items():
        axes.plot(
            [row["coverage"] for row in rows], [row["accuracy"] for row in rows], label=system
        )
    axes.set_xlabel("answered, %")
    axes.set_ylabel("accuracy there, %")
    axes.legend()
    return figure
