import subprocess
import sys
from pathlib import Path

import pytest
import torch
from octavo.errors import ConfigError, ModelError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import ByLength, TrainOptions, discard_checkpoints, fit, last_checkpoint
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import train_words  # noqa: E402

SCRIPT = str(HERE / "train_words.py")
CPU = Runtime(device="cpu")


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def equal(first, second, tolerance):
    return all(torch.allclose(first[name], second[name], atol=tolerance, rtol=0) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training in this process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_words.main(out, batch_size=8)
    return out


def test_training_learns_and_writes_metrics(whole):
    losses = [line["loss"] for line in RunDir(whole).metrics() if "loss" in line]
    assert losses
    model = train_words.make_model()
    before = train_words.loss(model, train_words.collate(train_words.rows()))
    model.load_state_dict(weights(whole))
    after = train_words.loss(model, train_words.collate(train_words.rows()))
    assert after < 0.95 * before


def test_a_custom_loss_is_the_one_that_is_minimised(whole, tmp_path):
    model = train_words.make_model()
    options = TrainOptions(learning_rate=1e-2, epochs=3, batch_size=8)
    with RunDir.open(tmp_path / "run", {}) as run:
        fit(
            model, train_words.rows(), train_words.collate, run, "own", options=options, runtime=CPU
        )
        own = [line["loss"] for line in run.metrics() if "loss" in line]
        doubled = [line["loss"] for line in RunDir(whole).metrics() if "loss" in line]
        assert own[0] == pytest.approx(doubled[0] / 2, rel=0.2)
        assert not model.training
        discard_checkpoints(run, "own")
        assert not (run.path / "checkpoints").exists()


def test_a_parameter_may_learn_at_a_rate_of_its_own(tmp_path):
    model, untouched = train_words.make_model(), train_words.make_model()
    name = next(name for name, _ in model.named_parameters() if name.endswith("bias"))
    options = TrainOptions(learning_rate=1e-2, epochs=2, batch_size=8)
    rates = {f"^{name}$": 1e-9}
    with RunDir.open(tmp_path / "run", {}) as run:
        fit(
            model, train_words.rows(), train_words.collate, run, "own", options=options,
            runtime=CPU, rates=rates,
        )  # fmt: skip
    moved = {
        key: float((weight - untouched.get_parameter(key)).detach().abs().max())
        for key, weight in model.named_parameters()
    }
    assert moved.pop(name) < 1e-6
    assert sorted(moved.values())[len(moved) // 2] > 1e-3


def test_accumulated_gradients_equal_one_large_batch(whole, tmp_path):
    model = train_words.make_model()
    options = TrainOptions(learning_rate=1e-2, epochs=3, batch_size=4, accumulate=2)
    with RunDir.open(tmp_path / "run", {}) as run:
        fit(model, train_words.rows(), train_words.collate, run, "x", options=options, runtime=CPU,
            loss=train_words.loss, lengths=train_words.lengths())  # fmt: skip
    assert equal(weights(whole), model.state_dict(), 1e-4)


def test_a_killed_training_resumed_equals_an_uninterrupted_one(whole, tmp_path):
    out = tmp_path / "run"
    first = subprocess.run([sys.executable, SCRIPT, "8", "14", str(out)], capture_output=True)
    assert first.returncode == -9
    assert not (out / "model").exists()
    checkpoint = last_checkpoint(out / "checkpoints" / "words")
    assert checkpoint
    assert checkpoint.name == "checkpoint-12"
    RunDir(out).log(training="words", step=13, loss=9.9)  # written, but after the checkpoint
    train_words.main(out, batch_size=8)
    steps = [line["step"] for line in RunDir(out).metrics()]
    assert 13 not in steps
    assert steps == [line["step"] for line in RunDir(whole).metrics()]
    assert equal(weights(whole), weights(out), 0)


def test_the_items_of_an_update_come_by_length():
    lengths = [n * 37 % 101 for n in range(1000)]
    order = ByLength(lengths, 32, 0)
    first = list(order)
    assert sorted(first) == list(range(1000))
    assert first == list(order)
    updates = [[lengths[n] for n in first[k : k + 32]] for k in range(0, 1000, 32)]
    assert all(some == sorted(some) for some in updates)
    means = [sum(some) / len(some) for some in updates]
    assert max(means) - min(means) < 40  # updates are drawn by lot
    order.epoch = 1
    assert list(order) != first
    assert sorted(ByLength([3, 1, 2], 8, 0)) == [0, 1, 2]


@pytest.mark.parametrize("save_every", [0, 4, 5])
def test_the_best_epoch_is_kept(tmp_path, save_every):
    """Whether other checkpoints are written at its end, within it or not at all."""
    scores, seen = [0.5, 0.9, 0.9, 0.3], []

    def scripted(model):
        assert not model.training
        seen.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return scores[len(seen) - 1]

    model = train_words.make_model()
    options = TrainOptions(learning_rate=1e-2, epochs=3.5, batch_size=8, save_every=save_every)
    with RunDir.open(tmp_path / "run", {}) as run:
        fit(model, train_words.rows(), train_words.collate, run, "x", options=options, runtime=CPU,
            evaluate=scripted)  # fmt: skip
    assert len(seen) == 4  # the half of an epoch too
    kept = [number for number, each in enumerate(seen) if equal(each, model.state_dict(), 0)]
    assert kept == [1]  # the first of equals
    lines = run.metrics()
    assert [line["eval_score"] for line in lines if "eval_score" in line] == scores
    assert lines[-1] == {"training": "x", "step": 28, "best_epoch": 2.0, "best_score": 0.9}


def test_evaluation_changes_nothing_but_the_choice(whole, tmp_path):
    """Asked after each epoch, the last being best, it leaves the training as it was."""
    rising = iter(range(3))
    train_words.main(tmp_path / "run", batch_size=8, evaluate=lambda _: next(rising))
    assert equal(weights(whole), weights(tmp_path / "run"), 0)


def test_an_evaluation_that_is_no_number_is_an_error(tmp_path):
    with RunDir.open(tmp_path / "run", {}) as run, pytest.raises(ModelError, match="gave nan"):
        fit(train_words.make_model(), train_words.rows(), train_words.collate, run, "x",
            options=TrainOptions(epochs=1), runtime=CPU, evaluate=lambda _: float("nan"))  # fmt: skip


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """An uninterrupted training whose first epoch is the best."""
    out = tmp_path_factory.mktemp("best") / "run"
    train_words.main(out, batch_size=8, evaluate=train_words.worst)
    assert RunDir(out).metrics()[-1]["best_epoch"] == 1
    return out


def test_the_best_epoch_outlives_a_kill(best, whole, tmp_path):
    """Between the second epoch and the third."""
    out = tmp_path / "best"
    first = subprocess.run([sys.executable, SCRIPT, "8", "16", str(out)], capture_output=True)
    assert first.returncode == -9
    assert len(list((out / "checkpoints" / "words").iterdir())) == 2  # the best, and the newest
    train_words.main(out, batch_size=8, evaluate=train_words.worst)
    assert equal(weights(best), weights(out), 0)
    assert not equal(weights(whole), weights(out), 0)
    assert [line["step"] for line in RunDir(out).metrics()] == [
        line["step"] for line in RunDir(best).metrics()]  # fmt: skip
    assert RunDir(out).metrics()[-1] == RunDir(best).metrics()[-1]


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """Two trainings, one after the other in the same two processes."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         SCRIPT, "4", "0", str(folder / "run"), str(folder / "best"),
         str(folder / "stopped")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_keep_the_same_epoch(best, in_two):
    """Also where their own answers differ: rank 0's counts."""
    out = in_two / "best"
    assert equal(weights(best), weights(out), 1e-4)
    assert equal(weights(out), load_file(out / "rank-1.safetensors"), 0)
    assert RunDir(out).metrics()[-1]["best_epoch"] == 1


def test_two_processes_that_were_stopped_go_on_as_if_they_were_not(in_two):
    stopped, whole = RunDir(in_two / "stopped"), RunDir(in_two / "run")
    assert equal(weights(whole.path), weights(stopped.path), 0)
    assert [line["step"] for line in stopped.metrics()] == [
        line["step"] for line in whole.metrics()
    ]


def test_a_checkpoint_cut_off_in_the_writing_is_passed_over(tmp_path):
    for step, state in ((3, "{}"), (6, "{}"), (9, '{"half'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    found = last_checkpoint(tmp_path)
    assert found
    assert found.name == "checkpoint-6"
    assert last_checkpoint(tmp_path / "none") is None


def test_two_processes_equal_one(whole, in_two):
    out = in_two / "run"
    assert equal(weights(whole), weights(out), 1e-4)
    lines = RunDir(out).metrics()
    single = RunDir(whole).metrics()
    assert [line["step"] for line in lines] == [line["step"] for line in single]
    for one, two in zip(single, lines, strict=True):
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate 0.0: must be above 0"),
        ({"epochs": -1.0}, "--epochs -1.0: must be above 0"),
        ({"batch_size": 0}, "--batch-size 0: must be 1 or more"),
        ({"warmup": 1.5}, "--warmup 1.5: must be a share"),
        ({"save_every": -1}, "--save-every -1"),
        ({"report_to": "wandb"}, "--report-to wandb: is not installed; pip install wandb"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with RunDir.open(tmp_path / "run", {}) as run, pytest.raises(ConfigError, match=message):
        fit(train_words.make_model(), train_words.rows(), train_words.collate, run, "x",
            options=TrainOptions(**options), runtime=CPU)  # fmt: skip


def test_a_loss_that_breaks_is_an_error(tmp_path):
    def broken(model, batch):
        return train_words.loss(model, batch) * float("nan")

    options = TrainOptions(epochs=5, batch_size=8)
    with (
        RunDir.open(tmp_path / "run", {}) as run,
        pytest.raises(ModelError, match="the loss became nan by step 20; lower --learning-rate"),
    ):
        fit(train_words.make_model(), train_words.rows(), train_words.collate, run, "x",
            options=options, runtime=CPU, loss=broken)  # fmt: skip
