"""rho is chosen by the held rows alone, and a killed sweep goes on; what a bench does to a model."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from finepurify.bench import Bench
from finepurify.config import PurifyConfig, TuneConfig
from finepurify.data import encode
from finepurify.language import sentences
from finepurify.metrics import Share
from finepurify.models import load_suspect
from finepurify.pairing import WeightPair
from finepurify.strategies import Evidence, Weights, purified
from finepurify.sweep import FILE, Trial, choose, floor_of, rows_of, sweep, trials
from finepurify.tune import fine_tune
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime

from .small import TABLE, classifier, pair_of, save_init, tokenizer

GRID = (0.5, 0.9, 0.7, 0.9)
RUNTIME = Runtime(device="cpu")


class Judge(Bench):
    """A bench whose accuracy is the share of dimensions that stayed; it notes what was tried."""

    def __post_init__(self):
        self.tried: list[str] = []

    def defended(self, weights: Weights, name: str) -> Any:
        self.tried.append(name)
        self.stays = int((weights.tensor(TABLE) == self.pair.read(TABLE).suspect).sum())

    def accuracy(self) -> Share:
        return Share(self.stays, self.pair.numel)


@pytest.fixture
def bench(tmp_path):
    """A function that gives a bench on a pair of 100 dimensions, in a run of its own."""
    pair = pair_of(tmp_path, {TABLE: torch.zeros(20, 5)}, {TABLE: torch.ones(20, 5)})

    def make(name: str = "run") -> Judge:
        (tmp_path / name).mkdir(exist_ok=True)
        model: Any = None
        return Judge(pair, model, 0, [], [], [], TuneConfig(), RunDir(tmp_path / name), RUNTIME)

    return make


def plan_of(bench: Bench, *strategies) -> list[Trial]:
    return trials(Evidence(bench.pair), PurifyConfig(), strategies, GRID)


def test_each_strategy_is_tried_from_the_largest_rho(bench):
    plan = plan_of(bench(), "random", "none", "fine-mixing", "random", "reset", "wag")
    assert [(trial.name, trial.rho) for trial in plan] == [
        ("random", 0.9), ("random", 0.7), ("random", 0.5), ("none", 1.0),
        ("fine-mixing", 0.9), ("fine-mixing", 0.7), ("fine-mixing", 0.5), ("reset", 0.0), ("wag", 1.0),
    ]  # fmt: skip
    named = trials(Evidence(bench().pair), PurifyConfig(), ["random"], (0.5,), "mine")
    assert [(trial.name, trial.rho) for trial in named] == [("mine", 0.5)]
    weights = named[0].weights()
    assert weights.numbers["reset"] == 50


def test_fine_tuning_alone_comes_first(bench):
    place = bench()
    rows = sweep(place, plan_of(place, "random", "none", "reset"))
    assert [(row["strategy"], row["rho"], row["ACC"]) for row in rows] == [
        ("none", 1.0, 100.0), ("random", 0.9, 90.0), ("random", 0.7, 70.0), ("random", 0.5, 50.0),
        ("reset", 0.0, 0.0),
    ]  # fmt: skip
    assert rows[1]["reset"] == 10
    assert (rows[1]["low"], rows[1]["high"]) == pytest.approx(Share(90, 100).interval())
    assert place.tried == ["none 1", "random 0.9", "random 0.7", "random 0.5", "reset 0"]
    assert rows_of(place.run) == rows


def test_more_can_be_noted(bench):
    place = bench()
    rows = sweep(place, plan_of(place, "random"), lambda bench: {"seen": bench.accuracy().hits})
    assert [row["seen"] for row in rows] == [100, 90, 70, 50]


@pytest.mark.parametrize("whole", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", ["", '{"strategy": "rand', '{"strategy": "random", "rho": 0.5}'])
def test_a_killed_sweep_goes_on_after_its_last_whole_line(bench, whole, torn):
    first = bench("whole")
    rows = sweep(first, plan_of(first, "random"))
    wanted = (first.run.path / FILE).read_bytes()
    second = bench("killed")
    lines = wanted.decode().splitlines(keepends=True)
    (second.run.path / FILE).write_text("".join(lines[:whole]) + torn)
    assert rows_of(second.run) == rows[:whole]
    assert sweep(second, plan_of(second, "random")) == rows
    assert (second.run.path / FILE).read_bytes() == wanted
    assert len(second.tried) == 4 - whole
    third = bench("killed")
    assert sweep(third, plan_of(third, "random")) == rows
    assert third.tried == []


def test_a_line_is_written_as_soon_as_it_is_known(bench):
    place = bench()
    seen = []

    def look(bench: Bench):
        seen.append(len(rows_of(bench.run)))
        return {}

    sweep(place, plan_of(place, "random"), look)
    assert seen == [0, 1, 2, 3]
    assert len(rows_of(place.run)) == 4


def rows(*accuracies):
    alone = {"strategy": "none", "rho": 1.0, "ACC": 94.0}
    return [alone, *({"strategy": "x", "rho": rho, "ACC": value} for rho, value in accuracies),
            {"strategy": "y", "rho": 0.1, "ACC": 99.0}]  # fmt: skip


@pytest.mark.parametrize(
    ("drop", "wanted"), [(0.0, 0.9), (1.0, 0.7), (1.9, 0.7), (2.0, 0.5), (100.0, 0.3)]
)
def test_the_smallest_rho_that_keeps_the_floor(drop, wanted):
    found = choose(rows((0.9, 94.5), (0.7, 93.0), (0.5, 92.0), (0.3, 50.0)), "x", drop)
    assert found is not None
    assert found["rho"] == wanted


def test_a_smaller_rho_may_keep_it_where_a_larger_does_not():
    found = choose(rows((0.9, 91.0), (0.5, 93.5)), "x", 1.0)
    assert found is not None
    assert found["rho"] == 0.5


def test_no_rho_keeps_the_floor():
    assert choose(rows((0.9, 91.0)), "x", 1.0) is None
    assert choose(rows(), "x", 1.0) is None
    assert floor_of(rows(), 1.5) == 92.5


def test_the_attack_is_not_looked_at():
    plain = rows((0.9, 94.0), (0.7, 93.5), (0.5, 90.0))
    told = [row | {"ASR": 100 * row["rho"], "test ACC": 0.0} for row in plain]
    other = [row | {"ASR": 0.0} for row in plain]
    for drop in (0.0, 1.0, 5.0):
        found = [choose(one, "x", drop) for one in (plain, told, other)]
        assert len({one["rho"] for one in found if one}) == 1


# --- a real model on the bench -------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A suspect that was trained a little, on a bench."""
    folder = tmp_path_factory.mktemp("bench")
    init, words = save_init(folder / "init"), tokenizer()
    model = classifier(init)
    items = encode(sentences(48, 1), words, 26)
    run = RunDir(folder / "run")
    run.path.mkdir()
    fine_tune(model, items, 0, TuneConfig(steps=4, learning_rate=1e-3), run, "attack", RUNTIME)
    save_model(folder / "suspect", model, words)
    held = sentences(40, 2)
    return Bench(
        WeightPair.load(init, folder / "suspect"), load_suspect(folder / "suspect"), 0, items,
        encode(held, words, 26), held.labels, TuneConfig(steps=3, learning_rate=1e-3), run, RUNTIME,
    )  # fmt: skip


def weights_of(bench, strategy, rho=1.0):
    return purified(Evidence(bench.pair), PurifyConfig(strategy=strategy), rho)


def test_weights_are_placed_and_the_head_stays_the_suspects(place):
    model = place.place(weights_of(place, "reset"))
    assert place.pair.kept["classifier.weight"] == "no counterpart in INIT"
    for name in place.pair.names:
        assert torch.equal(model.get_parameter(name), place.pair.read(name).init)
    head = place.pair.suspect.read("classifier.weight")
    assert torch.equal(model.get_parameter("classifier.weight"), head)
    model = place.place(weights_of(place, "none"))
    for name in place.pair.names:
        assert torch.equal(model.get_parameter(name), place.pair.read(name).suspect)


def test_each_trial_begins_with_the_suspect(place):
    """The head that another trial trained is forgotten, and the same trial ends the same."""
    first = {
        key: value.clone()
        for key, value in place.defended(weights_of(place, "none"), "a").state_dict().items()
    }
    place.defended(weights_of(place, "reset"), "b")
    second = place.defended(weights_of(place, "none"), "c").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    head = place.pair.suspect.read("classifier.weight")
    assert not torch.equal(second["classifier.weight"], head)


def test_no_steps_leave_the_model(place):
    still = replace(place, model=place.place(weights_of(place, "none")), tune=TuneConfig(steps=0))
    model = still.defended(weights_of(place, "none"), "still")
    for name in place.pair.names:
        assert torch.equal(model.get_parameter(name), place.pair.read(name).suspect)
    assert not model.training


def test_as_many_updates_as_asked(place):
    """48 rows are three batches of 16: seven updates are two passes and a third."""
    before = len(place.run.metrics())
    fine_tune(
        place.model,
        place.items,
        0,
        TuneConfig(steps=7, learning_rate=1e-4),
        place.run,
        "seven",
        RUNTIME,
    )
    told = place.run.metrics()[before:]
    assert max(line.get("step", 0) for line in told) == 7
    assert not list(place.run.path.rglob("checkpoint-*"))


def test_a_real_sweep_of_a_bench(place, tmp_path):
    place = replace(place, run=RunDir(tmp_path))
    found = sweep(place, trials(Evidence(place.pair), PurifyConfig(), ["delta-only"], (0.9,)))
    assert [row["rho"] for row in found] == [1.0, 0.9]
    assert all(0 <= row["low"] <= row["ACC"] <= row["high"] <= 100 for row in found)
    assert found[1]["reset"] == place.pair.numel - round(0.9 * place.pair.numel)
    saved = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert saved == found
