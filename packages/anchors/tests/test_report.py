"""The figures show what their tables hold, and nothing lies over it."""

from typing import Any

import pytest
from anchors.analyses import GUESSES
from anchors.report import block_figure, flow_figure, read_figure
from matplotlib.backends.backend_agg import FigureCanvasAgg

ISOLATED = [
    {"isolated": "nothing", "accuracy": 0.9},
    {"isolated": "labels", "layers": "first 2", "label loyalty": 0.4, "word loyalty": 0.2},
    {"isolated": "random", "layers": "first 2", "label loyalty": 1.0, "word loyalty": 0.9},
    {"isolated": GUESSES, "accuracy": 0.25, "label loyalty": 0.25},
]


def drawn(figure) -> Any:
    FigureCanvasAgg(figure).draw()
    return figure.axes[0]


def figures(layers):
    parts = {"S_wp": 1e-3, "S_pq": 1e-2, "S_ww": 0.0}
    flow = flow_figure([{"layer": layer} | parts for layer in range(layers)])
    read = read_figure([{"layer": layer, "AUC": 0.9, "R": 1.0} for layer in range(layers)])
    return [drawn(flow), drawn(read)]


@pytest.mark.parametrize("layers", [1, 2, 4, 48])
def test_ticks_are_layers(layers):
    for axes in figures(layers):
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


def test_bars_begin_at_nothing_and_stand_beside_guesses():
    axes = drawn(block_figure(ISOLATED))
    assert axes.get_ylim() == (0, 1)
    assert [bar.get_height() for bar in axes.patches] == [0.4, 1.0, 0.2, 0.9]
    assert [set(line.get_ydata()) for line in axes.lines] == [{0.25}]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "labels\nfirst 2", "random\nfirst 2"
    ]  # fmt: skip


def test_legends_cover_nothing():
    for axes in [*figures(4), drawn(block_figure(ISOLATED))]:
        inside = axes.get_window_extent()
        assert axes.get_legend().get_window_extent().y0 >= inside.y1
