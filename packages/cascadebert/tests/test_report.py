"""What the figures of a report show."""

from typing import Any

import numpy as np
import torch
from cascadebert.policy import sweep
from cascadebert.report import (
    NOMINAL,
    call_row,
    clock_figure,
    curve_figure,
    heat_figure,
    reliability_figure,
)


def axes_of(figure) -> Any:
    """The only axes of a figure, or its first."""
    return figure.axes[0]


def labels(axes):
    return axes.get_xlabel(), axes.get_ylabel()


def test_layers_stand_in_the_order_of_their_numbers():
    rows = [
        {"DIS": "exits", **{f"layer {number}": float(number) for number in (10, 2, 12, 1)}},
        {"DIS": "exits, accuracy %", "layer 3": 50.0},
        {"DIS": "cascade", "layer 2": 7.0},
    ]
    axes = axes_of(heat_figure(rows))
    shown = [text.get_text() for text in axes.get_xticklabels()]
    assert shown == ["layer 1", "layer 2", "layer 10", "layer 12"]
    values = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.array_equal(values, [[1, 2, 10, 12], [np.nan, 7, np.nan, np.nan]], equal_nan=True)


def test_measured_over_nominal_speed_up_of_rows_that_have_both():
    axes = axes_of(clock_figure([
        {"method": "cascade", "speed-up (nominal)": 2.0, "speed-up (clock)": 1.5},
        {"method": "small alone", "speed-up (nominal)": 9.0},
        {"method": "cascade", "speed-up (nominal)": 4.0, "speed-up (clock)": 3.0},
        {"method": "PABEE", "target": 4.0, "note": "cannot be reached"},
    ]))  # fmt: skip
    line, diagonal = axes.lines
    assert line.get_xydata().tolist() == [[2.0, 1.5], [4.0, 3.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cascade"]
    assert labels(axes) == (f"nominal speed-up ({NOMINAL})", "speed-up (clock)")
    assert (diagonal.get_xy1(), diagonal.get_slope()) == ((1, 1), 1)


def test_accuracy_over_confidence():
    rows = [
        {"mean confidence %": 60.0, "accuracy %": 0.0, "items": 10},
        {"mean confidence %": 30.0, "accuracy %": 100.0, "items": 1},  # chance
    ]
    axes = axes_of(reliability_figure({"stage 1": rows}))
    assert axes.lines[0].get_xydata().tolist() == [[60.0, 0.0]]
    assert labels(axes) == ("mean confidence %", "accuracy %")


def test_what_a_speed_up_counts_stands_on_its_axis():
    curves = {"cascade": {"speedup": [1.0, 2.0], "accuracy": [90.0, 80.0]}}
    assert labels(axes_of(curve_figure(curves, NOMINAL)))[0] == (
        "speed-up over the large model (FLOPs for cascades, layers for exits)"
    )


def test_how_few_rows_must_reach_the_last_stage():
    """Of four rows the first stage is wrong on its two least certain, and the last is always right."""
    first = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    labels = [1, 1, 0, 0]
    last = torch.nn.functional.one_hot(torch.tensor(labels), 2).double()
    table = sweep([first, last], labels, [1.0, 6.0])
    assert call_row(table, 2, 0.5, 1.0) == {"CPT(50)": 25.0, "CPT(80)": 50.0}
