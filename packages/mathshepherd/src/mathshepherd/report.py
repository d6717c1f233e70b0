"""Figures of what the stations found, and one report of several runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.report import Report
from octavo.rundir import RunDir, options_of

from mathshepherd.records import Solution
from mathshepherd.stations import result_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def _axes(wide: int = 1) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * wide, 3.8))
    return figure, list(figure.subplots(1, wide, squeeze=False)[0])


def curves_figure(rows: Rows) -> "Figure":
    """Accuracy of each way to pick against the number of candidates, with its interval."""
    figure, (axes,) = _axes()
    for method in dict.fromkeys(row["method"] for row in rows):
        some = [row for row in rows if row["method"] == method]
        sizes = [row["n"] for row in some]
        (line,) = axes.plot(
            sizes, [row["accuracy"] for row in some], marker=".", label=method,
            linestyle=":" if method == "pass" else "-",
        )  # fmt: skip
        if all(row.get("low") is not None for row in some):
            low, high = ([row[end] for row in some] for end in ("low", "high"))
            axes.fill_between(sizes, low, high, alpha=0.08, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set(xlabel="candidates N", ylabel="accuracy")
    axes.legend(fontsize=7)
    return figure


def rollouts_figure(rows: Rows) -> "Figure":
    """Quality of hard and soft labels against the number of rollouts."""
    figure, (left, right) = _axes(2)
    counts = [row["rollouts"] for row in rows]
    for name in ("accuracy", "false positives", "false negatives"):
        left.plot(counts, [row[name] for row in rows], marker=".", label=name)
    left.set_xscale("log", base=2)
    left.set(xlabel="rollouts N", ylabel="share", title="hard labels")
    left.legend(fontsize=8)
    right.plot(counts, [row["CE of soft"] for row in rows], marker=".")
    right.set_xscale("log", base=2)
    right.set(xlabel="rollouts N", ylabel="cross-entropy", title="soft labels")
    return figure


def checks_figure(rows: Rows) -> "Figure":
    """A reinforcement's checks: reward, accuracy, divergence, steps and answers by iteration."""
    names = [("accuracy", "judged"), ("reward",), ("kl",), ("steps",), ("no answer",)]
    figure, panels = _axes(len(names))
    for axes, some in zip(panels, names, strict=True):
        for name in some:
            known = [row for row in rows if row.get(name) not in (None, float("-inf"))]
            axes.plot([row["iteration"] for row in known], [row[name] for row in known], marker=".",
                      label=name)  # fmt: skip
        axes.set(xlabel="iteration", title=" and ".join(some))
        if len(some) > 1:
            axes.legend(fontsize=8)
    return figure


def sizes_figure(rows: Rows) -> "Figure":
    """Best-of-N of process and outcome reward models against the solutions they were trained on."""
    figure, (axes,) = _axes()
    for name in [name for name in rows[0] if name != "solutions"]:
        axes.plot(
            [row["solutions"] for row in rows], [row[name] for row in rows], marker=".", label=name
        )
    axes.set_xscale("log")
    axes.set(xlabel="labelled solutions", ylabel="accuracy")
    axes.legend(fontsize=8)
    return figure


def scores_figure(solutions: Sequence[Solution], name: str) -> "Figure":
    """Scores of truly good and bad steps, how well they are calibrated, and where the lowest lies.

    Args:
        solutions: with scores of that name and truth.
        name: of the scores.
    """
    import numpy as np

    pairs = [pair for one in solutions
             for pair in zip(one.scores[name], one.truth or (), strict=False)]  # fmt: skip
    scores, true = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    figure, (left, middle, right) = _axes(3)
    for value, words in ((1, "good steps"), (0, "bad steps")):
        left.hist(scores[true == value], bins=20, range=(0, 1), alpha=0.6, label=words)
    left.set(xlabel=f"score of {name}", ylabel="steps")
    left.legend(fontsize=8)
    bins = np.minimum((scores * 10).astype(int), 9)
    there = [n for n in range(10) if (bins == n).any()]
    middle.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    middle.plot([scores[bins == n].mean() for n in there], [true[bins == n].mean() for n in there],
                marker=".")  # fmt: skip
    middle.set(xlabel="mean score", ylabel="share of good steps")
    places = [float(np.argmin(one.scores[name])) / (len(one.steps) - 1)
              for one in solutions if len(one.scores[name]) > 1]  # fmt: skip
    right.hist(places, bins=10, range=(0, 1))
    right.set(xlabel="place of the lowest score (1: last step)", ylabel="solutions")
    return figure


#: What is drawn of a table, by its caption's beginning.
FIGURES: Mapping[str, Callable[[Rows], "Figure"]] = {
    "Best of N": curves_figure,
    "Quality by rollouts": rollouts_figure,
    "Checks": checks_figure,
    "By training solutions": sizes_figure,
}


def steps_page(solutions: Sequence[Solution], name: str, title: str) -> str:
    """A page of solutions whose steps are coloured by their scores, red for 0 and green for 1.

    Args:
        solutions: with scores of that name.
        name: of the scores.
        title: of the page.
    """
    from html import escape

    from octavo.report import html_page

    body = [f"<h1>{escape(title)}</h1>"]
    for one in solutions:
        verdict = {True: "right", False: "wrong", None: "not graded"}[one.correct]
        body.append(f"<h2>{escape(one.key)}: {escape(str(one.predicted))}, {verdict}</h2>")
        body.append(f"<p>{escape(one.question)}</p><ol>")
        for step, score in zip(one.steps, one.scores[name] or [None] * len(one.steps), strict=True):
            if score is None:
                body.append(f"<li>{escape(step)} <small>not scored</small></li>")
                continue
            colour = f"hsl({120 * score:.0f} 70% 85%)"
            body.append(
                f'<li style="background:{colour}">{escape(step)} <small>{score:.3f}</small></li>'
            )
        body.append("</ol>")
    return html_page(title, "\n".join(body))


def result_report(results: Sequence[Mapping[str, Any]]) -> Report:
    """The report of one command's result, or of several.

    Args:
        results: each with `command` and `tables`, as a run's `result.json` holds them.
    """
    report = Report("Math-Shepherd")
    for result in results:
        report.heading(str(result["command"]))
        for caption, rows in result["tables"].items():
            report.table(caption, rows)
            for beginning, draw in FIGURES.items():
                if caption.startswith(beginning) and rows:
                    report.figure(caption, draw(rows))
    return report


def combined(runs: Sequence[Path], out: Path, overwrite: bool = False) -> Path:
    """One report of several runs, in a folder of its own; returns the page.

    Raises:
        DataError: a folder holds no result.
        ConfigError: the folder holds something already.
    """
    found = [(folder, result_of(folder)) for folder in runs]
    results = [one | {"command": f"{one['command']} ({folder.name})"} for folder, one in found]
    with RunDir.open(out, options_of({"runs": list(runs)}), overwrite):
        return result_report(results).save(out)
