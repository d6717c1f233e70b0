"""Options that go together, or are refused; and those that other tests leave out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

TABLE = "bert.embeddings.word_embeddings.weight"
ALONE = ("--device", "cpu", "--quiet")


@pytest.fixture
def purify(command, world, tmp_path):
    def call(*words, out="run"):
        return command(
            "purify", world.init, world.suspect, "--clean-data", world.clean,
            "--out", tmp_path / out, *words, *ALONE,
        )  # fmt: skip

    return call


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--fisher", "hutchinson"), "add --damping tensor-mean"),
        (("--mode", "posterior", "--scope", "tensor"), "leave out --scope tensor"),
        (("--mode", "posterior", "--rho-over", "moved"), "leave out --rho-over moved"),
        (("--mode", "posterior", "--strategy", "random"), "leave out --strategy random"),
        (("--preset", "paper", "--epsilon", 1e-3), "--epsilon 0.001: --preset paper sets it"),
        (("--rho", 0.9, "--drop", 5), "leaves nothing to choose"),
    ],
)
def test_options_that_do_not_go_together(purify, tmp_path, words, what):
    code, _, err = purify(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert what in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--strategy", "random"), "name what is compared with --strategies"),
        (("--trigger", "mn"), "are looked at with --known-attack alone"),
    ],
)
def test_compare_takes_no_option_that_does_nothing(command, world, tmp_path, words, what):
    code, _, err = command(
        "compare", world.init, world.suspect, "--clean-data", world.clean, "--out", tmp_path / "run",
        *words, *ALONE,
    )  # fmt: skip
    assert code == 2
    assert what in err


def test_a_rounding_is_no_drift(command, world, tmp_path):
    shutil.copytree(world.suspect, tmp_path / "near")
    init = load_file(world.init / "model.safetensors")
    near = load_file(tmp_path / "near" / "model.safetensors")
    for name in near:
        if name in init:
            near[name] = init[name] * (1 + 1e-7)
    save_file(near, tmp_path / "near" / "model.safetensors", {"format": "pt"})
    code, _, err = command(
        "purify", world.init, tmp_path / "near", "--clean-data", world.clean,
        "--out", tmp_path / "run", *ALONE,
    )  # fmt: skip
    assert code == 3
    assert "a rounding's, nothing to purify" in err
    assert not (tmp_path / "run").exists()


def test_a_head_is_drawn_anew_where_asked(purify, world, tmp_path):
    for head in ("keep", "reset"):
        assert purify("--rho", 1, "--steps", 0, "--head", head, out=head)[0] == 0
    kept, drawn = (
        load_file(tmp_path / head / "model" / "model.safetensors") for head in ("keep", "reset")
    )
    suspect = load_file(world.suspect / "model.safetensors")
    differ = [name for name in suspect if not torch.equal(drawn[name], suspect[name])]
    assert sorted(differ) == ["classifier.bias", "classifier.weight"]
    assert all(torch.equal(kept[name], suspect[name]) for name in suspect)
    assert not drawn["classifier.bias"].any()


def test_a_head_that_is_retrained_learns_alone_first(purify, world, tmp_path):
    """With no fine-tuning the encoder is the suspect's bit for bit; after it, a reset head is behind."""
    found, losses = {}, {}
    for head, steps in (("retrain", 0), ("retrain", 3), ("reset", 3)):
        out = f"{head}-{steps}"
        code, _, err = purify(
            "--rho", 1, "--steps", steps, "--head", head, "--points", 0.5, out=out
        )
        assert code == 0, err
        found[out] = load_file(tmp_path / out / "model" / "model.safetensors")
        losses[out] = loss_of(tmp_path / out / "model", world.test)
    suspect = load_file(world.suspect / "model.safetensors")
    differ = [name for name in suspect if not torch.equal(found["retrain-0"][name], suspect[name])]
    assert sorted(differ) == ["classifier.bias", "classifier.weight"]
    assert not torch.equal(found["retrain-3"][TABLE], suspect[TABLE])  # nothing stayed frozen
    assert max(losses["retrain-0"], losses["retrain-3"]) < 0.4 < 0.5 < losses["reset-3"]
    assert not (tmp_path / "retrain-3" / "checkpoints").exists()
    assert "drawn anew, and learnt on clean rows, alone first" in page(tmp_path / "retrain-3")
    assert "drawn anew, and learnt in the fine-tuning" in page(tmp_path / "reset-3")


def loss_of(folder, rows):
    """Mean cross-entropy of a saved classifier."""
    from finepurify.config import DataConfig
    from finepurify.data import collate, encode, load_examples
    from finepurify.models import load_suspect, tokenizer_of

    model = load_suspect(folder)
    items = encode(
        load_examples(str(rows), DataConfig(), ["negative", "positive"], "test"),
        tokenizer_of(folder),
        26,
    )
    with torch.no_grad():
        return model(**collate(items, 0)).loss.item()


def page(run):
    return (run / "report.md").read_text()


def test_a_head_that_is_not_there_cannot_be_drawn(command, world, tmp_path):
    other = shutil.copytree(world.suspect, tmp_path / "other")
    save_file(
        {name: 1.1 * value for name, value in load_file(other / "model.safetensors").items()},
        other / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    for head in ("reset", "retrain"):
        code, _, err = command(
            "purify", world.suspect, other, "--clean-data", world.clean, "--head", head,
            "--out", tmp_path / "run", *ALONE,
        )  # fmt: skip
        assert (code, err.count("\n")) == (2, 1)
        assert "has no head of its own" in err
        assert not (tmp_path / "run").exists()


def test_hutchinson_and_the_median(purify, tmp_path):
    words = ("--rho", 0.9, "--steps", 0, "--fisher", "hutchinson", "--probes", 2, "--points", 0.5)
    assert purify(*words, "--damping", "tensor-mean", out="curved")[0] == 0
    found = load_file(tmp_path / "curved" / "fisher.safetensors")
    assert all(bool((value >= 0).all()) for value in found.values())
    scales = []
    for scale in ("mean", "median"):
        words = ("--rho", 0.9, "--steps", 0, "--mode", "posterior", "--scale", scale)
        assert purify(*words, out=scale)[0] == 0
        numbers = json.loads((tmp_path / scale / "result.json").read_text())["numbers"]
        scales.append(numbers["k poison"])
    assert scales[1] != scales[0]


def test_a_diagonal_knows_what_it_is_of(world, tmp_path):
    from finepurify.config import FisherConfig
    from finepurify.models import load_suspect
    from finepurify.pairing import WeightPair
    from finepurify.points import fisher
    from octavo.errors import ConfigError
    from octavo.rundir import RunDir

    pair, model = WeightPair.load(world.init, world.suspect), load_suspect(world.suspect)
    items = [
        {"input_ids": [2, 7, 8, 3], "attention_mask": [1, 1, 1, 1], "labels": label}
        for label in (0, 1)
    ]
    config, run = FisherConfig(points=(0.5,)), RunDir(tmp_path)
    first = fisher(pair, model, items, 0, config, run)
    again = fisher(pair, model, items, 0, config, run)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(ConfigError, match="of other rows, models or points"):
        fisher(pair, model, items[:1], 0, config, run)


def test_the_embedded_task_as_files(command, world, tmp_path, monkeypatch):
    from finepurify import world as worlds
    from finepurify.language import sentences

    train, clean, held, test = (sentences(count, count) for count in (9, 4, 3, 5))
    made = worlds.World(world.init, train, clean, held, test, 26)
    monkeypatch.setattr(worlds, "topics", lambda sizes, seed, runtime: made)
    assert command("topics", tmp_path / "toy", "--device", "cpu", "--quiet")[0] == 0
    rows = (tmp_path / "toy" / "test.jsonl").read_text().splitlines()
    assert len(rows) == 5
    assert set(json.loads(rows[0])) == {"text", "label"}
    assert (tmp_path / "toy" / "init" / "model.safetensors").is_file()
    code, _, err = command("topics", tmp_path / "toy", "--device", "cpu", "--quiet")
    assert code == 2
    assert "exists already" in err
