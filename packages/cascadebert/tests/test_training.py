"""Difficulty, regularization and the other ways to train a stage."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cascadebert import report
from cascadebert.cascade import Cascade
from cascadebert.config import PAPER, FoldConfig, TrainConfig, with_preset
from cascadebert.data import load_examples
from cascadebert.difficulty import load_difficulty, to_levels
from cascadebert.finetune import _accuracy
from cascadebert.train import check_models, stage_loss
from octavo.errors import DataError
from octavo.runtime import Runtime
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

FAST = ["--alphabet", "char", "--max-length", 16, "--learning-rate", "4e-3", "--epochs", 2]


def difficulty_words(words, out, *more, folds=3):
    return ["difficulty", "--model", "scratch:1x16", "--train-data", words, "--out", out, *FAST,
            "--folds", folds, "--fold-seeds", 0, "--fold-seeds", 1, *more]  # fmt: skip


def train_words(words, out, *more):
    return ["train", "--model", "scratch:1x16", "--model", "scratch:1x32", "--train-data", words,
            "--out", out, *FAST, *more]  # fmt: skip


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(words, tmp_path_factory):
    """Difficulty of the words, once."""
    from cascadebert.cli import app
    from octavo.cli import run

    out = tmp_path_factory.mktemp("difficulty") / "run"
    assert run(app, [*map(str, difficulty_words(words, out)), "--quiet"]) == 0
    return out / "difficulty"


def test_every_row_is_judged_once_a_seed_by_a_model_that_did_not_see_it(measured, words):
    votes = [0] * 1200
    for seed in (0, 1):
        files = sorted(measured.glob(f"seed-{seed}-fold-*.json"))
        assert len(files) == 3
        for file in files:
            for row in json.loads(file.read_text())["wrong"]:
                votes[row] += 1
    assert max(votes) == 2
    found = rows(measured / "difficulty.jsonl")
    assert [row["wrong_votes"] for row in found] == votes
    assert [row["level"] for row in found] == [int(vote >= 1) for vote in votes]
    share = sum(row["level"] for row in found) / 1200
    assert 0.1 < share < 0.95
    assert not (measured.parent / "checkpoints").exists()


def test_longer_words_are_harder(measured, words):
    levels = load_difficulty(measured / "difficulty.jsonl", 1200)
    letters = [len(row["text"]) for row in rows(words / "train.jsonl")]
    hard = [n for n, level in zip(letters, levels, strict=True) if level]
    easy = [n for n, level in zip(letters, levels, strict=True) if not level]
    assert sum(hard) / len(hard) > sum(easy) / len(easy)


def test_folds_that_are_done_are_not_computed_again(measured, words, command, killed, tmp_path):
    """A real process, killed after its second fold."""
    out = tmp_path / "run"
    killed(
        *difficulty_words(words, out),
        once=lambda: len(list(out.glob("difficulty/seed-*.json"))) >= 2,
    )
    done = {path: path.stat().st_mtime_ns for path in out.glob("difficulty/seed-*.json")}
    assert not (out / "difficulty" / "difficulty.jsonl").exists()
    assert command(*difficulty_words(words, out))[0] == 0
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    for path in sorted(measured.iterdir()):
        assert (out / "difficulty" / path.name).read_bytes() == path.read_bytes()


def test_a_run_that_was_begun_with_other_rows_is_not_gone_on_with(words, command, tmp_path):
    for name, line in (("train", train_words), ("difficulty", difficulty_words)):
        out, data = tmp_path / name, tmp_path / f"{name}.jsonl"
        lines = (words / "train.jsonl").read_text().splitlines(keepends=True)[:60]
        data.write_text("".join(lines))
        assert command(*line(data, out))[0] == 0
        environment = json.loads((out / "environment.json").read_text())
        (out / "environment.json").write_text(json.dumps(environment | {"status": "running"}))
        data.write_text("".join(lines[:-1]))
        code, _, err = command(*line(data, out))
        assert (code, "was begun with other training rows" in err) == (2, True), err
        data.write_text("".join(lines))
        assert command(*line(data, out))[0] == 0


REGULARIZED = ["--dar-weight", 0.5, "--folds", 2, "--fold-seeds", 0, "--dev-data"]
SAVED = ["--save-every", 5]


@pytest.fixture(scope="module")
def in_two(words, trained, tmp_path_factory):
    """Commands, one after the other in the same two processes: their folder, and what they print."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(trained, folder / "again")
    lines = [
        difficulty_words(words, folder / "difficulty", "--batch-size", 10, folds=2),
        train_words(words, folder / "train", *REGULARIZED, words, "--batch-size", 20),
        train_words(words, folder / "again", *SAVED, "--overwrite", "--batch-size", 20),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         Path(__file__).with_name("commands_in_turn.py"),
         *(json.dumps([str(word) for word in line]) for line in lines)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def metric(run, key="loss"):
    """All values of one kind by training, in their order."""
    found = {}
    for line in rows(run / "metrics.jsonl"):
        if key in line:
            found.setdefault(line["training"], []).append(line[key])
    return found


def test_two_processes_measure_the_difficulty_that_one_does(words, command, in_two, tmp_path):
    one, two, shown = tmp_path / "one", in_two[0] / "difficulty", in_two[1]
    assert command(*difficulty_words(words, one, "--batch-size", 20, folds=2))[0] == 0
    assert shown.count("Difficulty of 1200 rows") == 1
    single, double = metric(one), metric(two)
    assert list(single) == list(double)
    assert len(single) == 4
    for name, losses in single.items():
        assert double[name] == pytest.approx(losses, abs=1e-5)
    names = [sorted(path.name for path in (run / "difficulty").iterdir()) for run in (one, two)]
    assert names[0] == names[1]  # each file once, nothing left half written
    levels = [load_difficulty(run / "difficulty" / "difficulty.jsonl", 1200) for run in (one, two)]
    differ = sum(a != b for a, b in zip(*levels, strict=True))
    assert differ <= 6  # rows on which two classes are as good as equal


def test_two_processes_train_with_the_regularization(words, command, in_two, tmp_path):
    """Pairs are made within each process, so that only what has none is as one process has it."""
    one, two, shown = tmp_path / "one", in_two[0] / "train", in_two[1]
    assert command(*train_words(words, one, *REGULARIZED, words, "--batch-size", 40))[0] == 0
    assert shown.count("Trained on 1200 rows") == 2  # once by either training
    single, double = metric(one), metric(two)
    assert list(single) == list(double)
    for name in single:
        assert (double[name] == pytest.approx(single[name], abs=1e-5)) == (name != "stage-1")
    assert metric(one, "best_score")["stage-2"] == pytest.approx(
        metric(two, "best_score")["stage-2"]
    )
    levels = [
        load_difficulty(run / "difficulty-1" / "difficulty.jsonl", 1200) for run in (one, two)
    ]
    assert sum(a != b for a, b in zip(*levels, strict=True)) <= 6
    tree = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one, two)]
    assert tree[0] == tree[1]


def test_two_processes_overwrite_a_run_and_train_what_one_does(
    words, command, trained, in_two, tmp_path
):
    one, two = tmp_path / "one", in_two[0] / "again"
    assert command(*train_words(words, one, *SAVED, "--batch-size", 40))[0] == 0
    old, new = (run / "stage-1" / "model.safetensors" for run in (trained, two))
    assert new.read_bytes() != old.read_bytes()
    assert (two / "cascade.json").exists()
    first, second = metric(one), metric(two)
    assert list(first) == list(second) == ["stage-1", "stage-2"]
    assert sum(map(len, first.values())) > 4
    for name, losses in first.items():
        assert second[name] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize(("kind", "killed_in"), [("deebert", "exits"), ("joint", "joint")])
def test_a_killed_rival_goes_on_and_ends_alike(words, command, killed, tmp_path, kind, killed_in):
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def line(out):
        return ["baseline", "--kind", kind, "--model", "scratch:2x16", "--train-data", words, *FAST,
                "--exit-epochs", 4, "--out", out]  # fmt: skip

    assert command(*line(whole))[0] == 0
    checkpoints = f"checkpoints/{killed_in}/checkpoint-*/trainer_state.json"
    killed(*line(cut), once=lambda: any(cut.glob(checkpoints)))
    assert not (cut / "model").exists()
    code, _, err = command(*line(cut))
    assert code == 0
    assert f"{killed_in}: resumed at checkpoint-" in err
    for name in ("model.safetensors", "exits.safetensors"):
        first, second = (load_file(run / "model" / name) for run in (whole, cut))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (cut / "checkpoints").exists()


def test_rules():
    votes = [0, 1, 2, 3]
    assert to_levels(votes, 3, "majority") == [0, 0, 1, 1]
    assert to_levels([0, 1, 2], 2, "majority") == [0, 1, 1]  # half of the seeds is enough
    assert to_levels(votes, 3, "any") == [0, 1, 1, 1]
    assert to_levels(votes, 3, "all") == [0, 0, 0, 1]
    assert to_levels(votes, 3, "votes") == votes


def test_a_difficulty_file_of_other_rows_is_refused(tmp_path):
    file = tmp_path / "difficulty.jsonl"
    file.write_text('{"wrong_votes": 1, "level": 1}\n')
    assert load_difficulty(file, 1) == [1]
    with pytest.raises(DataError, match="holds 1 rows where the training data has 2"):
        load_difficulty(file, 2)
    file.write_text("{\n")
    with pytest.raises(DataError, match="not a difficulty file"):
        load_difficulty(file, 1)
    with pytest.raises(DataError, match="No such file"):
        load_difficulty(tmp_path / "none", 1)


CONFIG = TrainConfig(model=("a", "b"), train_data="x", out=Path("x"))


class Echo(torch.nn.Module):
    """Gives the logits of the batch back."""

    def forward(self, input_ids):
        return type("Output", (), {"logits": input_ids.float()})


def test_the_loss_of_a_stage_by_hand():
    batch = {
        "input_ids": torch.tensor([[2, 0], [0, 1], [1, 0]]),
        "labels": torch.tensor([0, 0, 1]),
        "difficulty": torch.tensor([0, 1, 1]),
        "teacher": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    }
    logits = batch["input_ids"].float()
    ce = cross_entropy(logits, batch["labels"])
    plain = {key: batch[key] for key in ("input_ids", "labels")}
    assert stage_loss(CONFIG, 10)(Echo(), plain) == ce
    sure = logits.softmax(-1).max(-1).values
    order = ((0.5 - (sure[0] - sure[1])) + (0.5 - (sure[0] - sure[2]))) / 2
    dar = replace(CONFIG, dar_weight=0.7)
    found = stage_loss(dar, 10)(Echo(), {**plain, "difficulty": batch["difficulty"]})
    assert found.item() == pytest.approx((ce + 0.7 * order).item())
    smooth = stage_loss(replace(CONFIG, label_smoothing=0.1), 10)(Echo(), plain)
    expected = cross_entropy(logits, batch["labels"], label_smoothing=0.1)
    assert smooth.item() == pytest.approx(expected.item())
    distilled = replace(CONFIG, distill_weight=1.0, distill_temperature=1.0)
    soft = stage_loss(distilled, 10)(Echo(), {**plain, "teacher": logits})
    assert soft.item() == pytest.approx(0, abs=1e-6)
    online = stage_loss(replace(dar, difficulty="online", online_from=0.15), 10)
    early, late = online(Echo(), plain), online(Echo(), plain)
    assert early == ce  # the first of ten steps: not yet
    hard = torch.tensor([0, 1, 1])  # of the moment: the second and third are wrong
    assert late.item() == pytest.approx((ce + 0.7 * order).item()), hard


def test_regularized_training_goes_the_whole_way(words, command, tmp_path, measured):
    run = tmp_path / "run"
    code, _, err = command(*train_words(words, run, "--dar-weight", 0.5, "--folds", 3,
                                        "--fold-seeds", 0, "--fold-seeds", 1))  # fmt: skip
    assert code == 0, err
    assert (run / "difficulty-1" / "difficulty.jsonl").exists()
    assert not (run / "difficulty-2").exists()  # the last stage never defers
    assert len(rows(run / "difficulty-1" / "difficulty.jsonl")) == 1200
    plain = tmp_path / "plain"
    assert command(*train_words(words, plain))[0] == 0
    first, second = (load_file(at / "stage-1" / "model.safetensors") for at in (run, plain))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    first, second = (load_file(at / "stage-2" / "model.safetensors") for at in (run, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)
    card = (run / "README.md").read_text()
    assert "difficulty-aware regularization (lambda 0.5" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "regularization" not in (plain / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["--dar-weight", 0.5, "--difficulty", "online", "--pairing", "sampled"],
        ["--distill-weight", 0.5],
        ["--gatekeeper-weight", 0.3],
    ],
)
def test_other_ways_to_train_a_stage(words, command, tmp_path, options, trained):
    run = tmp_path / "run"
    code, _, err = command(*train_words(words, run, *options))
    assert code == 0, err
    assert sorted(path.name for path in run.iterdir()) == [
        "README.md", "cascade.json", "config.yaml", "environment.json", "metrics.jsonl",
        "rows.json", "stage-1", "stage-2"]  # fmt: skip
    order = list(dict.fromkeys(line["training"] for line in rows(run / "metrics.jsonl")))
    if "--distill-weight" in options:
        assert order == ["stage-2", "stage-1"]  # the teacher first
    if "--gatekeeper-weight" in options:
        assert order == ["stage-1", "stage-1-gatekeeper", "stage-2"]
    assert Cascade.from_pretrained([run]).pairs is False


def test_each_stage_keeps_its_best_epoch_on_dev_rows(words, command, tmp_path, monkeypatch):
    """Pairs, with scripted accuracies that fall after the first epoch of one and rise in the other."""
    from cascadebert import finetune

    seen = {"stage-1": [], "stage-2": []}

    def scripted(dev, tokenizer, labels, max_length, runtime):
        name = next(name for name, weights in seen.items() if not weights)
        scores = [0.6, 0.5] if name == "stage-1" else [0.5, 0.6]
        real = accuracy(dev, tokenizer, labels, max_length, runtime)

        def evaluate(model):
            assert 0 < real(model) < 1
            seen[name].append({key: value.clone() for key, value in model.state_dict().items()})
            return scores[len(seen[name]) - 1]

        return evaluate

    accuracy = finetune._accuracy
    monkeypatch.setattr(finetune, "_accuracy", scripted)
    for name in ("train", "dev"):
        pairs = [row | {"other": row["text"]} for row in rows(words / f"{name}.jsonl")[:200]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    run = tmp_path / "run"
    code, _, err = command(*train_words(tmp_path / "train.jsonl", run, "--dev-data",
                                        tmp_path / "dev.jsonl", "--pair-column", "other"))  # fmt: skip
    assert code == 0, err
    for name, best in (("stage-1", 1), ("stage-2", 2)):
        saved = load_file(run / name / "model.safetensors")
        for number, weights in enumerate(seen[name], 1):
            same = all(torch.equal(weights[key], saved[key]) for key in saved)
            assert same == (number == best)
    told = {line["training"]: line["best_epoch"] for line in rows(run / "metrics.jsonl")
            if "best_epoch" in line}  # fmt: skip
    assert told == {"stage-1": 1, "stage-2": 2}
    assert "best epoch by accuracy on" in (run / "README.md").read_text()
    assert not (run / "checkpoints").exists()


def test_the_accuracy_that_decides_is_that_of_the_stage(words, trained):
    stage = Cascade.from_pretrained([trained]).stages[1]
    dev = load_examples(str(words / "dev.jsonl"))
    right = stage.run(stage.encode(dev), 512).argmax(dim=-1)
    truth = torch.tensor([stage.labels.index(label) for label in dev.labels or []])
    asked = _accuracy(dev, stage.tokenizer, stage.labels, stage.max_length, Runtime())
    assert asked(stage.model) == (right == truth).double().mean().item()


@pytest.fixture(scope="module")
def chosen(words, tmp_path_factory):
    """A cascade whose epochs were chosen on the dev words."""
    from cascadebert.cli import app
    from octavo.cli import run

    out = tmp_path_factory.mktemp("chosen") / "run"
    line = train_words(words, out, "--dev-data", words, "--save-every", 10, "--quiet")
    assert run(app, [*map(str, line)]) == 0
    return out


def test_a_killed_training_keeps_the_same_best_epoch(chosen, words, command, killed, tmp_path):
    cut = tmp_path / "cut"
    line = train_words(words, cut, "--dev-data", words, "--save-every", 10)
    checkpoint = cut / "checkpoints" / "stage-1" / "checkpoint-50"
    killed(*line, once=(checkpoint / "trainer_state.json").exists)
    begun = (cut / "dev-rows.json").read_text()
    (cut / "dev-rows.json").write_text(json.dumps(json.loads(begun) | {"hash": "other"}))
    code, _, err = command(*line)
    assert (code, "was begun with other dev rows" in err) == (2, True)
    (cut / "dev-rows.json").write_text(begun)
    assert command(*line)[0] == 0
    for stage in ("stage-1", "stage-2"):
        first, second = (load_file(run / stage / "model.safetensors") for run in (chosen, cut))
        assert all(torch.equal(first[name], second[name]) for name in first)
    scores = [[(line["training"], line["best_epoch"], line["best_score"])
               for line in rows(run / "metrics.jsonl") if "best_score" in line]
              for run in (chosen, cut)]  # fmt: skip
    assert scores[0] == scores[1]
    assert (cut / "cascade.json").read_bytes() == (chosen / "cascade.json").read_bytes()


def test_rows_that_chose_an_epoch_are_not_reported_on(chosen, words, command, tmp_path):
    policy, test = tmp_path / "policy.json", words / "test.jsonl"
    asked = ["calibrate", "--model", chosen, "--out", policy, "--dev-data"]
    code, _, err = command(*asked, words, "--target-speedup", 1.5)
    assert code == 0, err
    assert "300 of these 300 rows are rows the best epochs were chosen on" in err
    code, _, err = command(*asked, words, "--max-risk", 0.1, "--overwrite")
    assert (code, "they can show no guarantee; calibrate on others" in err) == (2, True)
    risk = ["--max-risk", 0.1, "--method", "empirical", "--overwrite"]
    assert command(*asked, words, *risk)[0] in (0, 3)  # it promises nothing
    code, _, err = command(*asked, test, "--target-speedup", 1.5, "--overwrite")
    assert (code, "were chosen on" in err) == (0, False)
    moved = tmp_path / "moved"
    Cascade.from_pretrained([chosen]).save_pretrained(moved)
    again = ["calibrate", "--model", moved, "--dev-data", words, "--max-risk", 0.1]
    assert command(*again)[0] == 2  # it remembers
    for line in (["evaluate"], ["report", "--out", tmp_path / "page"]):
        line += ["--model", chosen, "--policy", policy, "--test-data", words, "--split", "dev"]
        code, _, err = command(*line)
        assert (code, "rows the models' best epochs were chosen on" in err) == (2, True), err
        code, _, err = command(*line, "--allow-same-split")
        assert (code, "300 of 300 rows are rows the models' best" in err) == (0, True), err


def test_dev_rows_that_cannot_choose(words, command, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "nine.jsonl").write_text('{"text": "making", "label": "9"}\n')
    for file, message in {
        words / "train.jsonl": "1200 of its 1200 rows are training rows",
        tmp_path / "empty.jsonl": "holds no rows",
        tmp_path / "nine.jsonl": "label '9' is not one of the model's",
        tmp_path / "none.jsonl": "no such file",
    }.items():
        code, _, err = command(*train_words(words, tmp_path / "out", "--dev-data", file))
        assert (code, message in err) == (2, True), err
        assert not (tmp_path / "out").exists()


def test_the_papers_preset(caplog):
    config = with_preset(TrainConfig(train_data="x", out=Path("x"), preset="paper"))
    assert config.model == ("google/bert_uncased_L-2_H-768_A-12", "bert-base-uncased")
    assert (config.learning_rate, config.epochs, config.batch_size) == ((2e-5,), (5.0,), 16)
    assert (config.dar_weight, config.dar_margin, config.pairing) == (0.5, 0.5, "sampled")
    own = TrainConfig(
        train_data="x", out=Path("x"), preset="paper", model=("a", "b"), batch_size=64
    )
    assert (with_preset(own).model, with_preset(own).batch_size) == (("a", "b"), 64)
    assert with_preset(CONFIG) == CONFIG
    small = replace(with_preset(own), model=("scratch:1x16", "scratch:1x32"))
    for dev, told in ((None, True), ("dev.csv", False)):
        caplog.clear()
        check_models(replace(small, dev_data=dev))
        assert ("the best on dev takes --dev-data" in caplog.text) == told
    assert set(PAPER) <= set(TrainConfig.__dataclass_fields__)


def test_an_early_exit_rival_from_the_command_line(
    words, calibrated, command, tmp_path, monkeypatch
):
    made, drawn = [], {}
    draw = report.curve_figure
    monkeypatch.setattr(
        report, "curve_figure", lambda curves, unit: (drawn.update(curves), draw(curves, unit))[1]
    )
    berxit = ["--objective", "alternating", "--learn-to-exit"]
    for kind, model, options in (
        ("deebert", calibrated / "stage-2", []),
        ("joint", "scratch:2x32", berxit),
    ):
        out = tmp_path / kind
        code, _, err = command("baseline", "--kind", kind, "--model", model, "--train-data", words,
                               "--out", out, *FAST, *options)  # fmt: skip
        assert code == 0, err
        assert (out / "model" / "exits.safetensors").exists()
        assert not (out / "checkpoints").exists()
        made += ["--rival", out]
    out = tmp_path / "first"
    code, _, err = command(
        "baseline", "--kind", "layers", "--layers", 1, "--model", calibrated / "stage-2",
        "--train-data", words, "--out", out, *FAST,
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((out / "model" / "config.json").read_text())["num_hidden_layers"] == 1
    made += ["--rival", out]
    code, _, err = command("report", "--model", calibrated, "--test-data", words / "test.jsonl",
                           "--out", tmp_path / "page", *made)  # fmt: skip
    assert code == 0, err
    page = (tmp_path / "page" / "report.html").read_text()
    parts = ("deebert", "joint", "cascade, by stage", "CPT(80)", "Reliability of stage 2")
    for words_there in parts:
        assert words_there in page
    assert page.count("data:image/png") == 2
    assert f"{tmp_path / 'joint'} learned" in drawn
    assert f"{tmp_path / 'deebert'} learned" not in drawn
    assert json.loads((tmp_path / "joint" / "model" / "exits.json").read_text())["max_length"] == 16
    code, _, err = command("report", "--model", calibrated, "--test-data", words / "test.jsonl",
                           "--out", tmp_path / "page")  # fmt: skip
    assert (code, "exists already" in err) == (2, True)


def test_settings_that_cannot_be(words, command, tmp_path):
    out = tmp_path / "out"
    train, once = train_words(words, out), difficulty_words(words, out)
    many = difficulty_words(words, out, folds=5000)
    for message, line in {
        "--dar-weight -1.0: must be 0 or more": [*train, "--dar-weight=-1"],
        "--dar-margin 2.0: must be from 0 to 1": [*train, "--dar-margin", 2],
        "--online-from 1.0: must be a share": [*train, "--online-from", 1],
        "--gatekeeper-weight 1.0": [*train, "--gatekeeper-weight", 1],
        "--distill-weight 2.0": [*train, "--distill-weight", 2],
        "--distill-temperature 0.0": [*train, "--distill-temperature", 0],
        "--label-smoothing 1.0": [*train, "--label-smoothing", 1],
        "--folds 1: must be from 2": [*train, "--dar-weight", 0.5, "--folds", 1],
        "--folds 5000: must be from 2 to the number of rows (1200)": many,
        "give one or more, none twice": difficulty_words(words, out, "--fold-seeds", 1),
        "--epochs: give one value, or one for each of the 1": [*once, "--epochs", 1],
    }.items():  # fmt: skip
        code, _, err = command(*line, "--quiet")
        assert (code, message in err) == (2, True), err
        assert not out.exists()


def test_early_exit_needs_two_layers(words, command, tmp_path):
    code, _, err = command("baseline", "--kind", "joint", "--model", "scratch:1x16", "--train-data",
                           words, "--out", tmp_path / "out", *FAST)  # fmt: skip
    assert (code, "early exit needs two layers or more" in err) == (2, True)
    code, _, err = command("baseline", "--kind", "layers", "--layers", 3, "--model", "scratch:2x16",
                           "--train-data", words, "--out", tmp_path / "out", *FAST)  # fmt: skip
    assert (code, "--layers 3: must be from 1 to the backbone's 2" in err) == (2, True)
    for option in (["--objective", "alternating"], ["--learn-to-exit"]):
        code, _, err = command("baseline", "--kind", "deebert", "--model", "scratch:2x16", *option,
                               "--train-data", words, "--out", tmp_path / "out", *FAST)  # fmt: skip
        assert (code, "are of --kind joint" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_folds_are_a_part_of_the_configuration():
    assert FoldConfig().folds == CONFIG.folds == 5
