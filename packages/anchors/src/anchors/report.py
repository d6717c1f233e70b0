"""Figures of the analyses, drawn from their tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError, DataError
from octavo.report import Report
from octavo.rundir import RunDir

from anchors.analyses import GUESSES
from anchors.saliency import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

#: What a heading already says.
SHOWN_ABOVE = ("command", "model", "data")


def result_report(results: Sequence[Mapping[str, Any]]) -> Report:
    """The tables and figures of one or several commands in one report.

    Args:
        results: what the commands wrote as `result.json`.
    """
    names = ", ".join(dict.fromkeys(one["about"]["command"] for one in results))
    report = Report(f"anchors {names}")
    for one in results:
        about = one["about"]
        report.heading(f"{about['command']}: {about['model']} on {about['data']}")
        chosen = [f"{key} {value}" for key, value in about.items() if key not in SHOWN_ABOVE]
        if chosen:
            report.text(", ".join(chosen))
        for caption, rows in one["tables"].items():
            report.table(caption, rows)
        for caption, figure in figures(about["command"], one["tables"]).items():
            report.figure(caption, figure)
    return report


def combined(runs: Sequence[Path], out: Path, overwrite: bool = False) -> Path:
    """One report of several commands' folders.

    Raises:
        DataError: a folder holds no result of a command.
        ConfigError: the report would replace one of them.
    """
    results = []
    for folder in runs:
        file = folder / "result.json"
        if not file.is_file():
            raise DataError(f"{folder}: holds no result.json; give folders written with --out")
        try:
            one = json.loads(file.read_text(encoding="utf-8"))
            results.append({"about": dict(one["about"]), "tables": dict(one["tables"])})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: is not the result of a command") from error
    inside = [run for run in runs if out.absolute() in (run.absolute(), *run.absolute().parents)]
    if inside:
        raise ConfigError(f"--out {out}: {inside[0]} lies in it; choose another folder")
    with RunDir.open(out, {"command": "report", "runs": [str(run) for run in runs]}, overwrite):
        return result_report(results).save(out)


def figures(command: str, tables: Mapping[str, Rows]) -> "dict[str, Figure]":
    """The figures of a command's tables, by caption."""
    first = next(iter(tables.values()))
    match command:
        case "flow" | "view":
            return {"Saliency by layer": flow_figure(first)}
        case "block":
            return {"Loyalty under isolation": block_figure(first)}
        case "read":
            return {"AUC and R by layer": read_figure(first)}
        case "evaluate" | "reweight":
            return {"Accuracy": accuracy_figure(first)}
        case "compress":
            return {"Loyalty of compressed prompts": compress_figure(first)}
        case "diagnose":
            return {"Predicted and real confusion": confusion_figure(first)}
    return {}


def flow_figure(rows: Rows) -> "Figure":
    """The parts of the flow over layers; heads are averaged."""
    figure, axes = _layer_axes("saliency")
    layers = sorted({row["layer"] for row in rows})
    for part in PARTS:
        each = [[row[part] for row in rows if row["layer"] == layer] for layer in layers]
        axes.plot(layers, [sum(values) / len(values) for values in each], marker="o", label=part)
    axes.set_yscale("symlog", linthresh=1e-6)
    _legend(axes)
    return figure


def block_figure(rows: Rows) -> "Figure":
    """Label and word loyalty of each isolation, side by side, and what guesses would keep."""
    figure, axes = _axes("", "loyalty")
    done = [row for row in rows if "layers" in row]
    for offset, name in ((-0.2, "label loyalty"), (0.2, "word loyalty")):
        heights = [row[name] for row in done]
        axes.bar([place + offset for place in range(len(done))], heights, 0.4, label=name)
    axes.set_xticks(range(len(done)), [f"{row['isolated']}\n{row['layers']}" for row in done])
    for row in rows:
        if row["isolated"] == GUESSES:
            name = "label loyalty of guesses"
            axes.axhline(row["label loyalty"], color="grey", linewidth=0.8, label=name)
    axes.set_ylim(0, 1)
    _legend(axes)
    return figure


def read_figure(rows: Rows) -> "Figure":
    """AUC and its cumulative share over layers."""
    figure, axes = _layer_axes("AUC, R")
    for name in ("AUC", "R"):
        axes.plot(
            [row["layer"] for row in rows], [row[name] for row in rows], marker="o", label=name
        )
    axes.axhline(0.5, color="grey", linewidth=0.8)
    _legend(axes)
    return figure


def accuracy_figure(rows: Rows) -> "Figure":
    """Accuracy of each method, with its interval."""
    rows = [row for row in rows if "accuracy" in row]
    figure, axes = _axes("accuracy", "")
    for place, row in enumerate(rows):
        low, high = _ends(row.get("interval"), row["accuracy"])
        axes.barh(place, row["accuracy"], color="C0")
        axes.plot([low, high], [place, place], color="black", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    return figure


def compress_figure(rows: Rows) -> "Figure":
    """Label and word loyalty of each way to compress."""
    figure, axes = _axes("loyalty to the whole prompt", "")
    done = [row for row in rows if "label loyalty" in row]
    for offset, name in ((-0.2, "label loyalty"), (0.2, "word loyalty")):
        places = [place + offset for place in range(len(done))]
        axes.barh(places, [row[name] for row in done], 0.4, label=name)
        for place, row in zip(places, done, strict=True):
            axes.plot(_ends(row.get(f"{name} interval"), row[name]), [place] * 2, color="black")
    axes.set_yticks(range(len(done)), [row["kept"] for row in done])
    axes.set_xlim(0, 1.02)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False)
    return figure


def confusion_figure(rows: Rows) -> "Figure":
    """Heat maps of both confusions, dark where two classes are near."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row[end] for row in rows for end in ("one", "other")))
    figure = Figure(figsize=(9, 4.2))
    for axes, column in zip(
        figure.subplots(1, 2), ("distance of anchors", "AUC of the two"), strict=True
    ):
        grid = [[float("nan")] * len(names) for _ in names]
        for row in rows:
            one, other = names.index(row["one"]), names.index(row["other"])
            value = float("nan") if row[column] is None else row[column]
            grid[one][other] = grid[other][one] = value
        values = [value for line in grid for value in line if value == value] or [0.0]
        image = axes.imshow(grid, cmap="viridis", vmin=min(values), vmax=max(values))
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if value == value:
                    middle = (min(values) + max(values)) / 2
                    color = "black" if value > middle else "white"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(
            {"distance of anchors": "predicted: " + column}.get(column, f"real: {column}")
        )
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.tight_layout()
    return figure


def _ends(words: str | None, value: float) -> tuple[float, float]:
    """The ends of an interval from its words; of none the value itself."""
    if not words:
        return value, value
    low, _, high = words.partition(" to ")
    return float(low), float(high)


def _axes(across: str, up: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return figure, axes


def _layer_axes(up: str) -> tuple["Figure", Any]:
    """Layers across, without ticks between them."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes("layer", up)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, axes


def _legend(axes: Any) -> None:
    """In one row above the axes, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
