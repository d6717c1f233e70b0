import json
import math

import numpy as np
import pytest
import torch
from cascadebert.cost import speedup
from cascadebert.policy import (
    Policy,
    exit_stage,
    fit_policy,
    superfluous_stages,
    sweep,
    sweep_separate,
)
from cascadebert.scores import log_odds
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import ConfigError


def random_stages(items, stages, classes=3, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(items, classes, generator=generator) for _ in range(stages)]
    if ties:
        logits = [stage.round() for stage in logits]
    return logits, torch.randint(0, classes, (items,), generator=generator).tolist()


def brute_force(logits, labels, costs, threshold):
    """One item at a time, as section 1.3 of the paper says it."""
    hits, paid, exits = 0, 0.0, [0] * len(logits)
    for item, label in enumerate(labels):
        for number, stage in enumerate(logits):
            paid += costs[number]
            if number == len(logits) - 1 or log_odds(stage[item][None]).item() > threshold:
                hits += int(stage[item].argmax()) == label
                exits[number] += 1
                break
    return hits / len(labels), costs[-1] * len(labels) / paid, exits


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_the_sweep_equals_running_the_cascade_at_each_threshold(stages, ties):
    logits, labels = random_stages(40, stages, ties=ties, seed=stages)
    costs = [float(2**number) for number in range(stages)]
    table = sweep(logits, labels, costs)
    assert len(table) > 10
    for row in table.to_dict("records"):
        accuracy, faster, exits = brute_force(logits, labels, costs, row["threshold"])
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["speedup"] == pytest.approx(faster)
        assert [row[f"share_{n + 1}"] * 40 for n in range(stages)] == pytest.approx(exits)
        assert speedup(costs, exits) == pytest.approx(faster)


def test_the_sweep_covers_every_distinct_outcome():
    logits, labels = random_stages(25, 3, seed=5)
    costs = [1.0, 3.0, 9.0]
    seen = {tuple(row) for row in sweep(logits, labels, costs)[["accuracy", "speedup"]].to_numpy()}
    for threshold in np.linspace(-8, 8, 400):
        accuracy, faster, _ = brute_force(logits, labels, costs, threshold)
        assert any(abs(a - accuracy) < 1e-9 and abs(s - faster) < 1e-9 for a, s in seen)


@pytest.mark.parametrize(
    ("deferred", "printed"), [(31, 4.121212), (59, 3.212598), (87, 2.632258), (124, 2.125000)]
)
def test_the_speedups_shipped_with_the_authors_code(deferred, printed):
    """Section 1.6 of the method page: MRPC dev, 2 and 12 layers, 408 items."""
    assert speedup([2, 12], [408 - deferred, deferred]) == pytest.approx(printed, abs=1e-6)


def test_a_cascade_can_be_slower_than_its_large_model():
    assert speedup([2, 12], [1, 9]) < 1 < speedup([2, 12], [2, 8])


def test_log_odds_are_those_of_the_largest_probability():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    p = logits.softmax(-1).max(-1).values.double()
    assert torch.allclose(log_odds(logits), torch.log(p / (1 - p)), atol=1e-6)


def test_log_odds_tell_items_apart_where_probabilities_have_rounded_to_one():
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0]])
    assert logits.softmax(-1).max(-1).values.tolist() == [1.0, 1.0]
    assert log_odds(logits)[0] < log_odds(logits)[1]


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=5), st.floats(-5, 5))
def test_log_odds_do_not_change_with_a_shift(values, shift):
    first = log_odds(torch.tensor([values], dtype=torch.float64))
    second = log_odds(torch.tensor([values], dtype=torch.float64) + shift)
    assert first.item() == pytest.approx(second.item(), abs=1e-6)


def test_an_item_leaves_at_the_first_stage_above_the_threshold():
    scores = [torch.tensor([1.0, -1.0, -1.0, 0.0]), torch.tensor([-1.0, 1.0, -1.0, 0.0])]
    assert exit_stage(scores, [0.0, 0.0]).tolist() == [0, 1, 2, 2]  # strictly above


@pytest.mark.parametrize("target", [0.5, 1.2, 2.0, 3.5])
def test_the_chosen_threshold_is_the_highest_that_is_fast_enough(target):
    logits, labels = random_stages(200, 2, seed=9)
    policy = fit_policy(logits, labels, [1.0, 5.0], target)
    _, faster, _ = brute_force(logits, labels, [1.0, 5.0], policy.thresholds[0])
    assert faster >= target
    assert policy.achieved["speedup"] == pytest.approx(faster)
    higher = sorted(s for s in log_odds(logits[0]).tolist() if s > policy.thresholds[0])
    if higher:
        above = brute_force(logits, labels, [1.0, 5.0], higher[0])
        assert above[1] < target


def test_targets_that_cannot_be_met():
    logits, labels = random_stages(20, 2)
    with pytest.raises(ConfigError, match=r"out of reach: the first stage alone is 6\.00 times"):
        fit_policy(logits, labels, [2.0, 12.0], 6.5, cost="layers")
    assert fit_policy(logits, labels, [2.0, 12.0], 6.0).achieved["share_1"] == 1.0
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="must be above 0"):
            fit_policy(logits, labels, [2.0, 12.0], target)
    with pytest.raises(ConfigError, match="needs two models or more"):
        fit_policy(logits[:1], labels, [2.0], 1.0)


def test_a_policy_file_serves_its_own_models_only(tmp_path):
    path = tmp_path / "policy.json"
    policy = Policy(
        [1.5], costs={"flops": [1.0, 4.0]}, target={"speedup": 3.0}, models=["a", "b"],
        backend="torch-float32", calibration={"rows": 9},
    )  # fmt: skip
    policy.save(path)
    assert Policy.load(path, ["a", "b"]) == policy
    assert Policy.load(path, ["a", "b"], "torch-float32") == policy
    stored = json.loads(path.read_text())
    assert stored["probabilities"] == [pytest.approx(1 / (1 + math.exp(-1.5)))]
    assert stored["created_by"].startswith("cascadebert ")
    with pytest.raises(ConfigError, match="made for other models, or another tokenizer or --max"):
        Policy.load(path, ["a", "c"])
    with pytest.raises(ConfigError, match="made for backend torch-float32, and this is onnx-int8"):
        Policy.load(path, ["a", "b"], "onnx-int8")
    with pytest.raises(ConfigError, match="no policy there"):
        Policy.load(tmp_path / "none.json", [])
    path.write_text(json.dumps(stored | {"version": 99}))
    with pytest.raises(ConfigError, match="of another version"):
        Policy.load(path, ["a", "b"])
    with pytest.raises(ConfigError, match="Is a directory"):
        Policy.load(tmp_path, [])
    for content in (
        json.dumps(stored | {"thresholds": ["abc"]}),
        json.dumps(stored | {"thresholds": [float("nan")]}),
        json.dumps(stored | {"thresholds": [1.0, 2.0]}),
        json.dumps(stored | {"temperatures": [1.0]}),
        json.dumps(stored | {"temperatures": [1.0, 0.0]}),
        json.dumps(stored | {"score": "hope"}),
        json.dumps(stored | {"score": "learned"}),
        json.dumps(stored | {"score": "learned", "heads": [{"mean": [0.0]}]}),
        json.dumps(stored | {"calibration": {"row_hashes": "!"}}),
        "{",
        "[]",
        '{"version": 2}',
        json.dumps(stored | {"surprise": 1}),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match="not a policy file"):
            Policy.load(path, ["a", "b"])


def test_an_infinite_threshold_survives_the_file(tmp_path):
    logits, labels = random_stages(20, 2)
    policy = fit_policy(logits, labels, [1.0, 4.0], 0.1)
    assert (exit_stage([log_odds(logits[0])], policy.thresholds) == 1).all()
    policy.save(tmp_path / "policy.json")
    assert "Infinity" not in (tmp_path / "policy.json").read_text()


def test_exactly_one_target():
    logits, labels = random_stages(30, 2)
    wrong: dict
    for wrong in ({}, {"target_speedup": 2.0, "min_accuracy": 0.5}):
        with pytest.raises(ConfigError, match="name one target"):
            fit_policy(logits, labels, [1.0, 4.0], **wrong)


def test_the_fastest_thresholds_that_are_accurate_enough():
    logits, labels = random_stages(300, 2, seed=4)
    costs = [1.0, 5.0]
    table = sweep(logits, labels, costs)
    floor = float(np.quantile(table["accuracy"].to_numpy(), 0.6))
    policy = fit_policy(logits, labels, costs, min_accuracy=floor)
    good = table[table["accuracy"] >= floor]
    assert policy.achieved["speedup"] == pytest.approx(good["speedup"].max())
    assert policy.achieved["accuracy"] >= floor
    with pytest.raises(
        ConfigError, match=r"--min-accuracy 0\.99 is out of reach: the best on these"
    ):
        fit_policy(logits, labels, costs, min_accuracy=0.99)
    with pytest.raises(ConfigError, match="must be a share from 0 to 1"):
        fit_policy(logits, labels, costs, min_accuracy=92)
    with pytest.raises(ConfigError, match="--min-accuracy: needs labels"):
        fit_policy(logits, None, costs, min_accuracy=0.5)


def test_a_budget_is_a_speed_up():
    logits, labels = random_stages(300, 2, seed=4)
    budget = fit_policy(logits, labels, [1.0, 5.0], max_cost=2.5)
    assert budget.thresholds == fit_policy(logits, labels, [1.0, 5.0], 2.0).thresholds
    assert 5.0 / budget.achieved["speedup"] <= 2.5
    with pytest.raises(ConfigError, match=r"--max-cost 0\.5 is out of reach"):
        fit_policy(logits, labels, [1.0, 5.0], max_cost=0.5)
    with pytest.raises(ConfigError, match="--max-cost -1: must be above 0"):
        fit_policy(logits, labels, [1.0, 5.0], max_cost=-1.0)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_separate_thresholds_are_what_running_them_gives(stages):
    logits, labels = random_stages(60, stages, seed=stages)
    costs = [float(3**number) for number in range(stages)]
    scores = [log_odds(stage) for stage in logits[:-1]]
    table = sweep_separate(logits, labels, costs, scores, cells=400)
    assert len(table) > 8
    for row in table.sample(min(len(table), 60), random_state=0).to_dict("records"):
        bars = [row[f"threshold_{number + 1}"] for number in range(stages - 1)]
        exits = exit_stage(scores, bars)
        given = torch.stack([stage.argmax(dim=-1) for stage in logits])[exits, torch.arange(60)]
        assert row["accuracy"] == pytest.approx(
            float((given == torch.tensor(labels)).double().mean())
        )
        counts = torch.bincount(exits, minlength=stages).tolist()
        assert row["speedup"] == pytest.approx(speedup(costs, counts))
        assert [row[f"share_{n + 1}"] * 60 for n in range(stages)] == pytest.approx(counts)


def test_separate_thresholds_are_never_worse_where_they_are_chosen():
    logits, labels = random_stages(400, 3, seed=8)
    costs = [1.0, 2.0, 8.0]
    shared = fit_policy(logits, labels, costs, 2.0)
    apart = fit_policy(logits, labels, costs, 2.0, separate=True)
    assert apart.achieved["speedup"] >= 2.0
    assert (
        apart.achieved["accuracy"] >= shared.achieved["accuracy"] - 0.01
    )  # on a grid of quantiles
    assert apart.thresholds[0] != apart.thresholds[1]
    with pytest.raises(ConfigError, match="needs labels"):
        fit_policy(logits, None, costs, 2.0, separate=True)
    with pytest.raises(ConfigError, match="for a shared threshold only"):
        fit_policy(logits, labels, costs, max_risk=0.3, separate=True)


def test_a_stage_that_adds_nothing_is_named():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (500,), generator=generator)
    sure = torch.nn.functional.one_hot(labels, 2).float()
    small = sure + 1.2 * torch.randn(500, 2, generator=generator)
    large = 3 * sure + torch.randn(500, 2, generator=generator)
    noise = torch.randn(500, 2, generator=generator) * 9  # sure of itself, and wrong
    assert superfluous_stages([small, noise, large], labels.tolist(), [1.0, 4.0, 12.0], 2.0) == [1]
    assert superfluous_stages([small, large], labels.tolist(), [1.0, 12.0], 2.0) == []
