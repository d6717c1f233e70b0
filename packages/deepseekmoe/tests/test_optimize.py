"""The loop: schedule, decay, load, resume bit by bit, and what a broken number says."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from deepseekmoe.config import OptimizeConfig
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from deepseekmoe.optimize import learning_rate, make_optimizer, optimize
from octavo.errors import ConfigError, ModelError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from safetensors.torch import load_file

CPU = Runtime(device="cpu")


def batches(step, micro, process):
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro + process)
    ids = torch.randint(2, 300, (2, 10), generator=draw)
    return {"input_ids": ids, "labels": ids}


def options(**changes):
    given = {"steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 0, "log_every": 2}
    return OptimizeConfig(**(given | changes))


def make(config) -> Any:
    torch.manual_seed(0)
    return DeepseekMoeForCausalLM(config)


def test_the_papers_schedule():
    config = OptimizeConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == rates[79] == 1.0
    assert rates[80] == rates[89] == pytest.approx(0.316)
    assert rates[90] == rates[99] == pytest.approx(0.316**2)


def test_other_schedules():
    cosine = OptimizeConfig(steps=100, warmup_steps=0, learning_rate=1.0, schedule="cosine")
    assert learning_rate(cosine, 0) == pytest.approx(1.0)
    assert learning_rate(cosine, 50) == pytest.approx(0.55)
    assert learning_rate(cosine, 99) < 0.11
    constant = OptimizeConfig(steps=100, warmup_steps=0, schedule="constant")
    assert learning_rate(constant, 99) == constant.learning_rate


def test_norms_do_not_decay(small):
    model = make(small())
    decayed, plain = make_optimizer(model, options(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert {p.dim() for p in plain["params"]} == {1}
    assert plain["weight_decay"] == 0.0
    many = sum(len(group["params"]) for group in (decayed, plain))
    assert many == len(list(model.parameters()))


def test_accumulated_steps_equal_large_ones(small, tmp_path):
    """Two halves of a batch train as the whole does."""
    whole, halves = make(small()), make(small())

    def both(step, micro, process):
        parts = [batches(step, number, process) for number in range(2)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    optimize(whole, both, options(), RunDir.open(tmp_path / "a", {}), CPU)
    optimize(halves, batches, options(accumulate=2), RunDir.open(tmp_path / "b", {}), CPU)
    for one, two in zip(whole.parameters(), halves.parameters(), strict=True):
        assert one.allclose(two, atol=1e-5)


def test_metrics_tell_the_load(small, tmp_path):
    run = RunDir.open(tmp_path / "run", {})
    optimize(make(small(first_k_dense_replace=0)), batches, options(), run, CPU)
    lines = run.metrics()
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        load = torch.tensor(line["load"])
        assert load.shape == (2, 8)
        assert load.mean(dim=-1).tolist() == pytest.approx([1, 1], abs=1e-3)
        assert line["max_violation"] == pytest.approx((load.amax(dim=-1) - 1).tolist(), abs=1e-3)
        assert line["dead_experts"] == (load == 0).sum(dim=-1).tolist()
    assert lines[0]["lm_loss"] == pytest.approx(math.log(300), rel=0.1)
    assert lines[-1]["loss"] > lines[-1]["lm_loss"]
    assert lines[-1]["tokens_per_second"] > 0


def test_the_bias_moves_and_is_no_weight(small, tmp_path):
    model = make(small(bias_update_rate=0.01, aux_loss_alpha=0.0))
    optimize(model, batches, options(), RunDir.open(tmp_path / "run", {}), CPU)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.abs().max() > 0
    assert (bias / 0.01 - (bias / 0.01).round()).abs().max() < 1e-4  # whole steps of u
    assert not bias.requires_grad


def test_recomputation_counts_load_once(small, tmp_path):
    found = []
    for number, checkpointing in enumerate((False, True)):
        model = make(small(bias_update_rate=0.01))
        run = RunDir.open(tmp_path / str(number), {})
        optimize(model, batches, options(checkpointing=checkpointing), run, CPU)
        found.append(model.model.layers[1].mlp.gate.e_score_correction_bias)
    assert found[0].equal(found[1])


def test_dropout_draws_other_numbers_in_each_part_and_seed(small, tmp_path):
    def losses(name, **changes):
        run, runtime = RunDir.open(tmp_path / name, {}), Runtime(device="cpu", **changes)
        still = options(steps=3, log_every=1, learning_rate=1e-9)
        model = make(small(attention_dropout=0.5))
        optimize(model, lambda *_: batches(0, 0, 0), still, run, runtime)
        return [line["lm_loss"] for line in run.metrics()]

    assert losses("one") == losses("again")
    assert len(set(losses("two") + losses("three", seed=1))) == 6


@pytest.mark.parametrize(("dropout", "log_every"), [(0.0, 2), (0.1, 3)])
def test_a_run_that_stops_goes_on_bit_by_bit(small, tmp_path, dropout, log_every):
    config = small(bias_update_rate=0.01, attention_dropout=dropout)
    lines = {"log_every": log_every}  # the checkpoint of step 4 lies at a line, or between two
    whole, unbroken = make(config), RunDir.open(tmp_path / "whole", {})
    optimize(whole, batches, options(**lines), unbroken, CPU)
    broken = make(config)

    def dying(step, micro, process):
        if step == 5:
            raise KeyboardInterrupt
        return batches(step, micro, process)

    run = RunDir.open(tmp_path / "run", {})
    with pytest.raises(KeyboardInterrupt):
        optimize(broken, dying, options(save_every=2, **lines), run, CPU)
    assert [path.name for path in (run.path / "checkpoints" / "train").iterdir()] == ["step-4"]
    resumed = make(config)
    optimize(resumed, batches, options(save_every=2, **lines), run, CPU)
    for (name, one), two in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert one.equal(two), name
    assert [line["step"] for line in run.metrics()] == list(range(log_every, 7, log_every))
    for one, two in zip(unbroken.metrics(), run.metrics(), strict=True):
        assert one.pop("tokens_per_second") > 0
        assert two.pop("tokens_per_second") > 0
        assert one == two


def test_a_half_written_checkpoint_is_left_alone(small, tmp_path):
    run = RunDir.open(tmp_path / "run", {})
    (run.path / "checkpoints" / "train" / "step-4").mkdir(parents=True)
    model = make(small())
    optimize(model, batches, options(), run, CPU)
    assert [line["step"] for line in run.metrics()] == [2, 4, 6]


def test_a_broken_layer_is_named(small, tmp_path):
    model = make(small())
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="step 1: layer 1 gives NaN or infinity"):
        optimize(model, batches, options(), RunDir.open(tmp_path / "run", {}), CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"learning_rate": 0.0},
        {"learning_rate": math.nan}, {"warmup_steps": -1}, {"weight_decay": -1.0},
        {"max_gradient_norm": 0.0}, {"save_every": -1}, {"log_every": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_options_out_of_range_are_named(small, tmp_path, changes):
    option = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(ConfigError, match=option):
        optimize(make(small()), batches, options(**changes), RunDir.open(tmp_path / "r", {}), CPU)


def test_bfloat16_trains_with_float32_weights(small, tmp_path):
    model = make(small())
    runtime = Runtime(device="cpu", dtype="bfloat16")
    before = copy.deepcopy(model.state_dict())
    optimize(model, batches, options(), RunDir.open(tmp_path / "run", {}), runtime)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert not value.equal(before[name]), name


@pytest.mark.untraced
def test_a_killed_training_ends_like_one_that_was_not(texts, command, killed, tmp_path):
    """A real process, killed by the system once it has saved a checkpoint."""
    words = [
        "train", "--data", str(texts), "--vocabulary", "280",
        "--width", "16", "--layers", "1", "--routed-experts", "4", "--active-experts", "2",
        "--length", "16", "--batch-size", "4", "--steps", "150", "--save-every", "10", "--log-every",
        "20", "--device", "cpu", "--quiet", "--out",
    ]  # fmt: skip
    out = tmp_path / "killed"
    killed(*words, out, once=lambda: any(out.glob("checkpoints/train/step-*/state.json")))
    assert json.loads((out / "environment.json").read_text())["status"] == "running"
    whole = tmp_path / "whole"
    assert [command(*words, place)[0] for place in (out, whole)] == [0, 0]
    one, two = (load_file(path / "model" / "model.safetensors") for path in (out, whole))
    assert all(one[name].equal(two[name]) for name in two)
    assert not (out / "checkpoints" / "train").exists()
