"""The demo's page: what stands beside the paper, and what the figures draw."""

from typing import Any

import numpy as np
import pytest
from deepseekmoe.analyze import Trace, lifts
from deepseekmoe.demo import Found
from deepseekmoe.report import (
    active_beside_paper,
    disabled_beside_paper,
    lift_figure,
    load_figure,
    models_table,
    sums_figure,
    swap_beside_paper,
)


def found(*losses):
    """A seed, with the losses of two models."""
    rows = [
        {"model": name, "loss": loss, "ppl": 2 * loss, "parameters": 7}
        for name, loss in zip(("gshard", "deepseekmoe"), losses, strict=True)
    ]
    return Found({}, {"models": rows}, {})


def test_the_spread_over_seeds_stands_beside_the_mean():
    rows = models_table([found(3.0, 2.5), found(3.2, 2.5), found(3.4, 2.5)])
    assert list(rows[0]) == ["model", "loss", "sd over seeds", "ppl", "parameters"]
    assert [row["loss"] for row in rows] == pytest.approx([3.2, 2.5])
    assert [row["sd over seeds"] for row in rows] == pytest.approx([0.2, 0.0])
    assert "sd over seeds" not in models_table([found(3.0, 2.5)])[0]


def test_the_swap_beside_the_paper():
    row = swap_beside_paper([{"loss": 3.0}, {"loss": 3.3}])
    assert row["paper"] == "1.808 to 2.414 (+33.5 %)"
    assert row["ours"] == "3.000 to 3.300 (+10.0 %)"
    assert row["verdict"] == "reproduced"
    assert swap_beside_paper([{"loss": 3.0}, {"loss": 2.9}])["verdict"] == "not reproduced"


def test_four_experts_beside_the_paper():
    rows = [{"active": active, "loss": 4 - active / 10} for active in range(1, 8)]
    assert active_beside_paper(rows, gshard=3.596)["verdict"] == "reproduced"
    row = active_beside_paper(rows, gshard=3.594)
    assert row["verdict"] == "not reproduced"
    assert row["ours"] == "3.600 against 3.594 (+0.006)"


def test_masked_experts_beside_the_paper():
    rows = [
        {"model": model, "rate": rate, "rise": rise}
        for model, rises in (("deepseekmoe", (0.0, 0.2, 0.3)), ("gshard-x1.5", (0.0, 0.1, 0.4)))
        for rate, rise in zip((0, 1 / 16, 4 / 16), rises, strict=True)
    ]
    first, last = disabled_beside_paper(rows)
    assert (first["setting"], first["verdict"]) == ("1/16 of the experts masked", "reproduced")
    assert (last["setting"], last["verdict"]) == ("4/16 of the experts masked", "not reproduced")
    assert last["ours"] == "+0.300 against +0.400 (gshard-x1.5)"
    other = [row | {"model": row["model"].removesuffix("-x1.5")} for row in rows]
    assert {row["verdict"] for row in disabled_beside_paper(other)} == {"another rival"}


def test_the_load_is_drawn_where_it_was_recorded():
    load = np.random.default_rng(0).random((3, 2, 5))
    lines = [{"step": 10 * n, "load": one.tolist()} for n, one in enumerate(load)]
    figure = load_figure([{"step": 0, "lm_loss": 3.0}, *lines])
    assert figure is not None
    images: list[Any] = [axes.get_images()[0] for axes in figure.axes[:2]]
    assert (images[1].get_array() == load[:, 1].T).all()
    assert images[0].get_clim() == images[1].get_clim() == (0, load.max())
    assert load_figure([{"step": 0, "lm_loss": 3.0}]) is None
    assert load_figure([{"step": 0, "load": []}]) is None  # a dense model's
    assert load_figure([]) is None


def test_lifts_and_their_figure():
    # 4 tokens, two experts each: 0+1, 0+1, 0+2, 1+2
    pairs = np.array([[[3, 2, 1, 0], [2, 3, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0]]])
    trace = Trace(["a"], np.array([[[3, 3, 2, 0]]]), np.ones((1, 1, 4)), pairs, [0])
    values = lifts(trace)
    assert values[0, 0, 1] == pytest.approx(2 / (3 * 3 / 4))
    assert values[0, 0, 2] == pytest.approx(1 / (3 * 2 / 4))
    assert not values[0, 3].any()
    drawn: Any = lift_figure(values.tolist()).axes[0].get_images()[0].get_array()
    assert drawn[0, 1] == values[0, 0, 1]
    assert np.isnan(np.ma.filled(drawn, np.nan).diagonal()).all()


def test_sums_are_shares_of_all_layers_tokens():
    figure = sums_figure({"ours": [[0, 1, 0, 0], [0, 1, 0, 2]]})
    steps: Any = figure.axes[0].patches[0]
    values, edges, _ = steps.get_data()
    assert values.tolist() == [0, 50, 0, 50]
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
