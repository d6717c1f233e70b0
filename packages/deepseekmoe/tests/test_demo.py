"""The embedded default shows the direction of the paper's claims, and can fail to."""

import json

import pytest
from deepseekmoe.demo import GIVEN, PROFILES, Profile, judge

NUMBERS = {
    "loss deepseekmoe": 3.44, "loss gshard": 3.46, "loss gshard-x1.5": 3.445, "loss hash": 3.466,
    "loss switch": 3.509, "loss dense": 3.511, "active 4": 3.455, "swap": 0.043, "JS gshard": 0.23,
    "JS deepseekmoe": 0.30, "disabled deepseekmoe": 0.27, "disabled most deepseekmoe": 0.36,
    "disabled most gshard-x1.5": 0.40, "MaxVio": 0.88, "MaxVio none": 3.0,
}  # fmt: skip


def test_claims_pass_on_the_numbers_of_the_specification():
    claims = judge([NUMBERS])
    assert [claim.passed for claim in claims] == [True] * 10 + [None]


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"loss gshard": 3.4499, "active 4": 3.45}, "DeepSeekMoE beats GShard"),
        ({"loss gshard-x1.5": 3.42}, "It is level with GShard"),
        ({"loss hash": 3.445}, "It beats a hash layer"),
        ({"loss switch": 3.47}, "It beats Switch"),
        ({"loss dense": 3.47}, "It beats a dense model"),
        ({"active 4": 3.47}, "With 4 of its 7"),
        ({"swap": 0.02}, "A routed expert cannot replace"),
        ({"JS deepseekmoe": 0.24}, "Its experts are more specialised"),
        ({"JS deepseekmoe": 0.02, "JS gshard": 0.01}, "Its experts are more specialised"),
        ({"disabled deepseekmoe": 0.1}, "Without its best sixteenth"),
        ({"MaxVio": 2.5}, "The balance loss"),
        ({"MaxVio none": 0.9}, "The balance loss"),
    ],
)
def test_each_claim_can_fail(changed, claim):
    failed = [one.claim for one in judge([NUMBERS | changed]) if one.passed is False]
    assert len(failed) == 1
    assert failed[0].startswith(claim)


def test_one_lucky_seed_is_not_enough():
    unlucky = NUMBERS | {"loss deepseekmoe": 3.461, "active 4": 3.46}
    lucky = NUMBERS | {"loss deepseekmoe": 3.40}
    first = judge([unlucky, unlucky, lucky], GIVEN)[0]
    assert not first.passed
    assert "better on 1 of 3 seeds" in first.measured


@pytest.mark.untraced
def test_quick_demo_from_the_command_line(command, tmp_path):
    out = tmp_path / "demo"
    code, printed, err = command("demo", "--out", out, "--device", "cpu", "--quiet")
    claims = json.loads((out / "claims.json").read_text())["claims"]
    assert code == 0, (err, claims)
    assert [claim["verdict"] for claim in claims].count("PASS") == 4
    assert {claim["verdict"] for claim in claims} == {"PASS", "not shown at this size"}
    assert "GShard" in printed
    page = (out / "report.html").read_text()
    assert page.count("<img") >= 7
    for caption in ("experts chosen together", "Sum of the gates", "Rise of the loss"):
        assert caption in page
    assert "1.867" in page  # the paper's figure beside ours
    assert "1.808 to 2.414 (+33.5 %)" in page
    assert "level with GShard" in page
    code, _, err = command("demo", "--out", out, "--quiet")
    assert code == 2
    assert "holds a finished run" in err


def test_own_texts_and_resume(command, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(PROFILES, "quick", Profile(6, ("gshard",), 4000))
    words = ("demo", "--data", texts, "--out", tmp_path / "demo", "--device", "cpu", "--quiet")
    code, _, _ = command(*words, "--seeds", "1")
    assert code == 3  # it ran, and so short a training shows nothing
    row = tmp_path / "demo" / "seed-1" / "cells" / "gshard" / "row.json"
    assert json.loads(row.read_text())["model"] == "gshard"
    assert "demo/texts" not in (tmp_path / "demo" / "report.md").read_text()
    code, _, err = command("demo", "--data", tmp_path / "none", "--out", tmp_path / "x")
    assert code == 2
    assert err.count("\n") == 1


def test_a_finished_demo_is_collected(command, texts, tmp_path, monkeypatch, benchmark_file):
    monkeypatch.setitem(PROFILES, "quick", Profile(4, ("gshard",), 4000, rows=2))
    out = tmp_path / "demo"
    command("demo", "--data", texts, "--seeds", "1,2", "--out", out, "--device", "cpu", "--quiet")
    name, result = benchmark_file("bench_demo").collect(out)
    assert name == "demo-texts"
    assert result["command"] == "deepseekmoe demo --profile quick --seeds 1,2 --data DIR"
    each = [json.loads((out / f"seed-{seed}.json").read_text()) for seed in (1, 2)]
    losses = [one["tables"]["models"][0]["loss"] for one in each]
    assert result["models"][0]["loss"] == pytest.approx(sum(losses) / 2)
