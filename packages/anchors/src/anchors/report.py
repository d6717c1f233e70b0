"""Figures of the analyses, drawn from their tables."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anchors.saliency import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def flow_figure(rows: Rows) -> "Figure":
    """The parts of the flow over layers; heads are averaged."""
    figure, axes = _axes("layer", "saliency")
    layers = sorted({row["layer"] for row in rows})
    for part in PARTS:
        each = [[row[part] for row in rows if row["layer"] == layer] for layer in layers]
        axes.plot(layers, [sum(values) / len(values) for values in each], marker="o", label=part)
    axes.set_yscale("symlog", linthresh=1e-6)
    axes.legend()
    return figure


def block_figure(rows: Rows) -> "Figure":
    """Label and word loyalty of each isolation, side by side."""
    figure, axes = _axes("", "loyalty")
    done = [row for row in rows if "label loyalty" in row]
    for offset, name in ((-0.2, "label loyalty"), (0.2, "word loyalty")):
        heights = [row[name] for row in done]
        axes.bar([place + offset for place in range(len(done))], heights, 0.4, label=name)
    axes.set_xticks(range(len(done)), [f"{row['isolated']}\n{row['layers']}" for row in done])
    axes.legend()
    return figure


def read_figure(rows: Rows) -> "Figure":
    """AUC and its cumulative share over layers."""
    figure, axes = _axes("layer", "AUC, R")
    for name in ("AUC", "R"):
        axes.plot(
            [row["layer"] for row in rows], [row[name] for row in rows], marker="o", label=name
        )
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.legend()
    return figure


def _axes(across: str, up: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return figure, axes
