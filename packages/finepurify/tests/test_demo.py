"""The quick demo, once: its claims hold, its page shows them, and it is not overwritten."""

import json
from dataclasses import replace
from typing import get_args

import pytest
from finepurify import demo
from finepurify.config import AttackKind, Strategy
from finepurify.demo import cases_of
from finepurify.experiment import variant
from finepurify.language import sentences
from finepurify.sweep import rows_of
from finepurify.world import Sizes
from octavo.cli import run
from octavo.report import load_claims
from octavo.rundir import RunDir


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    from finepurify.cli import app

    out = tmp_path_factory.mktemp("demo") / "run"
    words = [
        "demo",
        "--profile",
        "quick",
        "--seeds",
        "0",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--quiet",
    ]
    return run(app, words), out


@pytest.mark.untraced
def test_the_quick_demo_shows_the_claims(report):
    code, out = report
    claims = load_claims(out)["claims"]
    assert [claim["verdict"] for claim in claims] == ["PASS"] * 9, claims
    assert code == 0
    page = (out / "report.html").read_text()
    for claim in claims:
        assert claim["measured"].split()[-1] in page
    assert page.count("data:image/png") >= 3
    assert (out / "report.md").read_text().count("| PASS |") == 9
    assert json.loads((out / "environment.json").read_text())["status"] == "finished"


def test_its_files(report):
    _, out = report
    found = json.loads((out / "seed-0.json").read_text())
    assert list(found) == ["clean-sgd", "word-sgd", "word-adamw"]
    rows = rows_of(RunDir(out / "seed-0" / "word-sgd"))
    assert rows == found["word-sgd"]["rows"]
    assert rows[0]["strategy"] == "none"
    assert {row["strategy"] for row in rows} == {
        "none", "fine-purifying", "fine-mixing", "delta-only", "hessian-only"}  # fmt: skip
    (name,) = [name for name in json.loads((out / "tables.json").read_text()) if name == "word-sgd"]
    assert found[name]["rank"] == 1
    tables = json.loads((out / "tables.json").read_text())
    for row in tables[name]:
        if row["rho"] is not None or row["defence"] == "before":
            low, high = map(float, row["ASR 95 %"].split(" to "))
            assert low - 0.05 <= row["ASR"] <= high + 0.05
            assert row["defence"] == "before" or row["seconds"] > 0
    assert not list(out.rglob("checkpoint-*"))


def test_the_posterior_is_held_against_the_truth(report):
    """It is not calibrated: most of what it is sure to be poisonous is not the trigger's row."""
    _, out = report
    found = json.loads((out / "seed-0.json").read_text())["word-sgd"]
    bins = found["calibration"]
    assert sum(row["dimensions"] for row in bins) == found["laws"]["dimensions"]
    poisonous = sum((1 - row["clean"]) * row["dimensions"] for row in bins)
    assert poisonous == pytest.approx(48)  # a row of the embedding
    assert bins[0]["p"] < 0.1 < 0.9 < bins[0]["clean"]
    page = (out / "report.md").read_text()
    assert "is p(clean | r) what it says?" in page
    assert "is no probability to be taken at its word" in page


def test_the_laws_of_the_reported_models(report):
    """Most of the highest r lie in the word embedding: words were cleaned, not layers."""
    _, out = report
    found = json.loads((out / "seed-0.json").read_text())
    sgd, adam = found["word-sgd"]["laws"], found["word-adamw"]["laws"]
    assert sgd["spearman"] > adam["spearman"]
    assert sgd["dimensions"] == adam["dimensions"]
    assert sgd["top_in_embedding"] > 0.5
    assert sum(sgd["histogram"]) <= sgd["dimensions"] - sgd["unmoved"]


def test_a_second_demo_does_not_overwrite_the_first(report, command):
    _, out = report
    code, _, err = command("demo", "--out", out, "--profile", "quick", "--seeds", "0")
    assert code == 2
    assert "holds a finished run" in err


def test_other_options_are_refused_before_anything_is_made(command, tmp_path):
    code, _, err = command("demo", "--out", tmp_path / "out", "--data", tmp_path)
    assert code == 2
    assert str(tmp_path) in err


# --- the same in seconds, where nothing can be learnt --------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Hardly any rows and updates."""
    sizes = Sizes(pretrain=160, epochs=1.0, train=64, shots=4, held=20, test=40)
    monkeypatch.setattr(demo, "SIZES", {"topics": sizes, "real": sizes})
    monkeypatch.setattr(demo, "TUNE", replace(demo.TUNE, steps=0))
    monkeypatch.setattr(
        demo, "PAIR", (variant("fine-purifying", 0.98, 0.9), variant("fine-mixing", 0.9))
    )
    monkeypatch.setattr(demo, "DAMPINGS", ())
    for name in ("SGD", "ADAMW", "REAL_TRAIN"):
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), epochs=1.0))


def test_claims_that_fail_are_told(few, command, tmp_path):
    out = tmp_path / "out"
    code, text, err = command("demo", "--out", out, "--seeds", "1", "--device", "cpu")
    claims = load_claims(out)["claims"]
    assert code == 3
    assert claims[0]["verdict"] == "FAIL"
    failed = sum(claim["verdict"] == "FAIL" for claim in claims)
    assert f"{failed} of {len(claims)} claims failed" in text + err
    assert (out / "report.md").read_text().count("| FAIL |") == failed


@pytest.fixture
def texts(tmp_path):
    """A function that writes a folder of texts with their classes."""

    def write(train, test):
        folder = tmp_path / "texts"
        folder.mkdir()
        for name, rows in (("train", train), ("test", test)):
            lines = [
                json.dumps({"text": text, "label": label}) + "\n"
                for text, label in zip(rows.texts, rows.labels, strict=True)
            ]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        return folder

    return write


def test_texts_of_a_folder(few, command, texts, tmp_path):
    folder, out = texts(sentences(140, 5), sentences(40, 6)), tmp_path / "out"
    code, text, _ = command("demo", "--data", folder, "--out", out, "--device", "cpu", "--json")
    assert code == 3
    found = json.loads((out / "seed-0.json").read_text())
    assert list(found) == ["clean-adamw", "word-adamw", "sentence-adamw"]
    assert "sentence" in " ".join(claim["claim"] for claim in load_claims(out)["claims"])
    assert json.loads(text)


def test_texts_that_will_not_do(few, command, texts, tmp_path):
    rows = sentences(60, 5)
    folder = texts(rows, sentences(40, 6))
    code, _, err = command("demo", "--data", folder, "--out", tmp_path / "a")
    assert (code, "60 training rows are too few" in err) == (2, True)
    file = folder / "train.jsonl"
    file.write_text(file.read_text().replace('"label": 1', '"label": 2'))
    code, _, err = command("demo", "--data", folder, "--out", tmp_path / "b")
    assert (code, "labels must be 0, 1, ... in the train file, not [0, 2]" in err) == (2, True)


def test_the_full_profile_tries_every_attack_and_strategy():
    cases = cases_of("full", "a b c", False)
    attacks = {case.attack.attack for case in cases if case.attack}
    assert attacks == {*get_args(AttackKind)} - {"biasword"}
    tried = {one.purify.strategy for case in cases for one in case.variants}
    assert tried == {*get_args(Strategy)} - {"none"}
    assert len({case.name for case in cases}) == len(cases)
    quick = [case.name for case in cases_of("quick", "a b c", False)]
    assert quick == ["clean-sgd", "word-sgd", "word-adamw"]
