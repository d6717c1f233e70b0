"""Several processes equal one: real ones, over gloo, started once for all these checks."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepseekmoe.config import OptimizeConfig
from deepseekmoe.dispatch import dispatch
from deepseekmoe.experts import moe_forward
from deepseekmoe.layer import ExpertBank
from deepseekmoe.parallel import check_processes, main_first, processes, whole_model
from deepseekmoe.routing import route
from octavo.errors import ConfigError
from octavo.runtime import Runtime
from safetensors.torch import load_file

#: Every check of `on_processes.py`, and how its processes must end; those that are killed by 9.
ENDS = {
    "one": [0], "two": [0, 0], "four": [0] * 4, "dies": [9] * 4, "resumes": [0] * 4,
    "dies_plain": [9, 9], "resumes_on_fewer": [0], "resumes_plain": [0, 0], "diverges": [0, 0],
    "bad_data": [0, 0], "bad_run": [0, 0], "bad_experts": [0, 0], "bad_command": [0, 0],
    "tunes_alone": [0], "tunes": [0, 0], "bad_tuning": [0, 0],
}  # fmt: skip

#: What two tunings tell alike; the rest is timed, or lists.
TOLD = {"loss", "lm_loss", "gradient_norm", "steps", "weights trained", "loss of replies"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, measured):
    """Results of all processes."""
    place = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("on_processes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(place)], capture_output=True, text=True, timeout=240,
        env=os.environ | measured | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "codes.json").read_text()) == ENDS, done.stderr
    return place


@pytest.fixture(scope="module")
def of(folder):
    """What a check found, by its name and the process."""
    return lambda name, process=0: torch.load(folder / f"{name}-{process}.pt", weights_only=False)


def assert_equal(wanted, found):
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        near = 1e-5 * max(1.0, float(value.abs().max()))
        assert (value - found[name]).abs().max() <= near, name


@pytest.mark.parametrize(("world", "name"), [
    ("two", "model"), ("four", "model"), ("four", "model of two"),
])  # fmt: skip
def test_loss_and_every_gradient_under_expert_parallelism(of, world, name):
    one, many = of("one")["model"], of(world)[name]
    for case in ("all experts", "idle experts"):
        assert_equal(one[case], many[case])
    assert any(".experts." in weight for weight in one["all experts"])
    idle = many["idle experts"]
    assert idle["counts"][:, 4:].sum() == 0  # nothing went to the last processes
    assert idle["model.layers.0.mlp.experts.down_proj"][4:].abs().sum() == 0
    assert idle["model.layers.0.mlp.experts.down_proj"][:4].abs().sum() > 0


@pytest.mark.parametrize("world", ["two", "four"])
def test_the_layer_with_tokens_everywhere_or_on_one_process(of, world):
    one, many = of("one")["layer"], of(world)["layer"]
    assert set(one) == {"even", "on the last", "dropped on the last"}
    for case, wanted in one.items():
        found = many[case]
        assert (wanted.pop("rough") - found.pop("rough")).abs().max() < 0.01  # bfloat16
        assert_equal(wanted, found)
    assert not one["even"]["hidden"].allclose(one["dropped on the last"]["hidden"])


def test_the_global_scope_is_that_of_the_whole_batch(of):
    assert_equal(of("one")["global"]["gradients"], of("two")["global"]["gradients"])


@pytest.mark.parametrize(("world", "name", "reference"), [
    ("two", "train", "train"), ("two", "bias, dropout", "bias, dropout"), ("two", "fsdp", "train"),
    ("two", "fsdp recomputing", "train"), ("two", "tied", "tied"), ("two", "experts", "train"),
    ("two", "experts recomputing", "train"), ("two", "half", "half"),
    ("four", "experts", "train"), ("four", "both", "train"),
])  # fmt: skip
def test_training_equals_one_process(of, world, name, reference):
    one, many = of("one")[reference], of(world)[name]
    assert len(one["metrics"]) == len(many["metrics"]) == 4
    for wanted, found in zip(one["metrics"], many["metrics"], strict=True):
        assert found["max_violation"] == wanted["max_violation"]
        assert found["load"] == wanted["load"]
        for key in ("loss", "lm_loss", "gradient_norm"):
            assert found[key] == pytest.approx(wanted[key], abs=1e-5)
        assert wanted["gradient_norm"] > 0.3  # so that it was clipped
    assert_equal(one["state"], many["state"])
    near = 2e-3 if name == "half" else 1e-5  # slices in bfloat16 are evaluated in it
    assert many["dev"] == pytest.approx(one["dev"], abs=near)
    assert of(world, 1)[name] is None


def test_slices_travel_in_bfloat16_but_for_norms_and_gates(of):
    assert of("two")["dtypes"] == [torch.float32, torch.bfloat16, torch.float32]
    one, four = of("one")["half"], of("four")["half"]  # experts elsewhere round in another order
    for wanted, found in zip(one["metrics"], four["metrics"], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=5e-3)
    for name, value in four["state"].items():
        assert value.dtype == torch.float32
        assert (value - one["state"][name]).abs().max() < 0.02, name


@pytest.mark.parametrize(("one", "many"), [
    ("one", "two"), ("one", "two-divided"), ("one-experts", "two-experts"), ("one-lora", "two-lora"),
])  # fmt: skip
def test_tuning_equals_one_process(of, folder, one, many):
    """The whole folder: files, numbers, and what they say of the model."""
    if "lora" in one and not importlib.util.find_spec("peft"):
        pytest.skip("the extra [lora] is not installed")
    assert all(done["code"] == 0 for done in [*of("tunes_alone"), *of("tunes"), *of("tunes", 1)])
    first, second = folder / f"sft-{one}", folder / f"sft-{many}"
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*"))
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*"))
    for name in names:
        wanted, found = first / name, second / name
        if name.endswith(".safetensors"):
            assert_equal(load_file(wanted), load_file(found))
        elif name in ("metrics.jsonl", "summary.json"):
            pairs = zip(numbers(wanted), numbers(found), strict=True)
            assert all(one == pytest.approx(two, abs=1e-5) for one, two in pairs)
        elif name.startswith(("model/", "adapter/")) and not name.endswith(".md"):
            assert wanted.read_bytes() == found.read_bytes(), name
    assert len(numbers(first / "metrics.jsonl")) > 4


def numbers(file):
    """What the lines of a file, or its one object, tell."""
    text = file.read_text()
    found = [json.loads(text)] if file.suffix == ".json" else map(json.loads, text.splitlines())
    return [{key: value for key, value in line.items() if key in TOLD} for line in found]


def test_a_process_holds_its_share_alone(of):
    whole_experts, whole_rest = of("four")["whole"]
    shares = [of("four", process)["held"] for process in range(4)]
    assert [experts for experts, _ in shares] == [whole_experts // 4] * 4
    assert sum(rest for _, rest in shares) == whole_rest
    assert max(rest for _, rest in shares) < 0.3 * whole_rest


def test_killed_trainings_go_on_bit_by_bit(of, folder):
    for resumed, plain in (
        ("resumes", of("four")["both"]),
        ("resumes_plain", of("two")["experts"]),
    ):
        found = of(resumed)
        for name, value in plain["state"].items():
            assert value.equal(found["state"][name]), name
        for one, two in zip(plain["metrics"], found["metrics"], strict=True):
            assert one | {"tokens_per_second": 0} == two | {"tokens_per_second": 0}
    (last,) = (folder / "four-killed" / "checkpoints" / "train").iterdir()
    assert sorted(file.name for file in last.glob("*.pt")) == [
        f"optimizer-{process}.pt" for process in range(4)
    ]


def test_another_number_of_processes_is_refused_on_resuming(of):
    assert "was written by 2 processes and this run has 1" in of("resumes_on_fewer")


def test_impossible_divisions_are_refused(of, monkeypatch):
    refused = of("two")["refused"]
    assert "--expert-parallel 3 on 2 processes: start a multiple of 3" in refused["processes"]
    assert "--expert-parallel 0: must be 1 or more" in refused["below"]
    assert "9 routed experts cannot be divided so" in refused["experts"]
    with pytest.raises(ConfigError, match="--expert-parallel 2 on 1 process: start a multiple"):
        check_processes(OptimizeConfig(expert_parallel=2))
    with pytest.raises(ConfigError, match="--fsdp on 1 process: start several"):
        check_processes(OptimizeConfig(fsdp=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(OptimizeConfig(expert_parallel=2, fsdp=True), 8)
    with pytest.raises(ConfigError, match="0 routed experts cannot be divided"):
        check_processes(OptimizeConfig(expert_parallel=2), 0)


@pytest.mark.parametrize(("name", "words"), [
    ("bad_data", "holds no data file"), ("bad_run", "exists and holds no run"),
    ("bad_experts", "63 routed experts cannot be divided so"),
    ("bad_tuning", "--lora-rank and --experts train a model that is whole on every process"),
])  # fmt: skip
def test_a_users_error_is_told_once_and_ends_all(of, name, words):
    first, second = of(name, 0), of(name, 1)
    assert first["code"] == second["code"] == 2
    assert words in first["err"]
    assert first["err"].count("\n") == 1
    assert second["err"] == ""


def test_divergence_names_the_layer_on_all_processes(of):
    assert "step 1: layer 1 gives NaN or infinity" in of("diverges")


def test_other_commands_are_refused_under_torchrun(of):
    found = of("bad_command")
    assert found["code"] == 2
    assert "only `train` and `sft` run under torchrun; start this command alone" in found["err"]


def test_one_process_needs_no_connection(small):
    with processes(Runtime(device="cpu")):
        assert not torch.distributed.is_initialized()
        assert main_first(lambda: 7) == 7
    model = torch.nn.Linear(2, 2)
    assert whole_model(model) is model


def test_dispatch_among_one_process_is_the_plain_product(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # pyright: ignore
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        bank, x = ExpertBank(8, 16, 4), torch.randn(10, 16)
        for weight in bank.parameters():
            torch.nn.init.normal_(weight)
        routing = route(torch.randn(10, 8), 3)
        weights = bank.gate_up_proj, bank.down_proj
        wanted = moe_forward(x, routing.ids, routing.weights, *weights)
        assert torch.distributed.group.WORLD is not None
        for backend in ("reference", "grouped", "sorted", "batched"):
            found = dispatch(x, routing, *weights, torch.distributed.group.WORLD, backend)
            assert found.allclose(wanted, atol=1e-4), backend
    finally:
        torch.distributed.destroy_process_group()


def test_torchrun_trains_the_model_of_one_process(texts, tmp_path, command):
    words = [
        "train", "--data", texts, "--vocabulary", 300, "--steps", 5, "--width", 32, "--layers", 2,
        "--length", 32, "--batch-size", 4, "--routed-experts", 8, "--active-experts", 3,
        "--warmup-steps", 2, "--log-every", 1, "--save-every", 2, "--device", "cpu", "--quiet",
    ]  # fmt: skip
    code, _, err = command(*words, "--out", tmp_path / "one", "--accumulate", 2)
    assert code == 0, err
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "deepseekmoe", *map(str, words), "--out", str(tmp_path / "two"),
         "--expert-parallel", "2", "--json"],
        capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)  # printed once
    one, two = tmp_path / "one", tmp_path / "two"
    assert {path.name for path in two.rglob("*")} == {path.name for path in one.rglob("*")}
    assert not list((two / "checkpoints").iterdir())
    wanted = load_file(one / "model" / "model.safetensors")
    found = load_file(two / "model" / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in found
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert (value - found[name]).abs().max() <= 1e-4, name
    lines = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5]
    for first, second in zip(*lines, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-5)
    rows = [json.loads((out / "evaluation.json").read_text()) for out in (one, two)]
    assert rows[1][-1]["loss"] == pytest.approx(rows[0][-1]["loss"], abs=1e-4)
    assert rows[1][-1]["tokens"] == rows[0][-1]["tokens"]
