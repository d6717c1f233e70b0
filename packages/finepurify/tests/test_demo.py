"""The quick demo, once: its claims hold, its page shows them, and it is not overwritten."""

import json

import pytest
from finepurify.sweep import rows_of
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
    assert not list(out.rglob("checkpoint-*"))


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
