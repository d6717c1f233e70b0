"""The embedded default shows what it says, and can fail to."""

import json

import pytest
from anchors import demo, world
from anchors.demo import judge

NUMBERS = {
    "accuracy 2": 0.95, "accuracy 3": 0.9, "S_wp first": 2e-3, "S_pq first": 1e-3, "S_ww first": 1e-5,
    "S_wp deep": 1e-4, "S_pq deep": 1e-2, "S_ww deep": 1e-5, "loyalty labels first": 0.4,
    "loyalty random first": 0.95, "loyalty labels last": 0.99, "AUC": 0.97, "AUC layer": 1.0,
    "AUC deep": 0.9, "R half": 0.4,
}  # fmt: skip


def test_claims_can_pass():
    assert [claim.passed for claim in judge([NUMBERS])] == [True] * 7


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"S_wp first": 1e-4}, "Information gathers"),
        ({"S_ww first": 3e-3}, "Information gathers"),
        ({"S_pq deep": 1e-5}, "In deep layers"),
        ({"S_ww deep": 2e-2}, "In deep layers"),
        ({"loyalty random first": 0.7}, "Isolating label words in the first"),
        ({"loyalty labels last": 0.45}, "Isolating them in the last"),
        ({"AUC deep": 0.7}, "The target's attention"),
        ({"R half": 0.6}, "Reading happens late"),
    ],
)
def test_each_claim_can_fail(changed, claim):
    failed = [one.claim for one in judge([NUMBERS | changed]) if not one.passed]
    assert len(failed) == 1
    assert failed[0].startswith(claim)


def test_isolation_that_costs_nothing_shows_nothing():
    nothing = {"loyalty labels first": 1.0, "loyalty random first": 1.0, "loyalty labels last": 1.0}
    assert judge([NUMBERS | nothing])[3].passed is False


def test_behind_a_closed_gate_nothing_is_judged():
    claims = judge([NUMBERS | {"accuracy 3": 0.5}])
    assert [claim.passed for claim in claims] == [False] + [None] * 6


def test_quick_demo_from_the_command_line(command, tmp_path):
    out = tmp_path / "demo"
    code, printed, err = command("demo", "--out", out, "--device", "cpu", "--quiet")
    claims = json.loads((out / "claims.json").read_text())["claims"]
    assert code in (0, 3), err
    found = {claim["claim"]: claim["verdict"] for claim in claims}
    assert found["The model learns in context"] == "PASS", claims
    assert found["Information gathers in label words in shallow layers"] == "PASS", claims
    assert found["Isolating label words in the first half of the layers hurts most"] == "PASS", (
        claims
    )
    assert found["Isolating them in the last layer hurts less"] == "PASS", claims
    assert "Claims, mean of 1 seed" in printed
    assert (out / "report.html").read_text().count("<img") == 3
    code, _, err = command("demo", "--out", out, "--quiet")
    assert code == 2
    assert "holds a finished run" in err


def test_a_model_that_was_not_trained_does_not_pass_the_gate(command, tmp_path, monkeypatch):
    def untrained(sizes, tokenizer, runtime, run):
        return world.make_model(sizes, tokenizer)

    monkeypatch.setattr(demo, "train", untrained)
    monkeypatch.setitem(demo.PROMPTS, "quick", 60)
    out = tmp_path / "demo"
    assert command("demo", "--out", out, "--device", "cpu", "--quiet")[0] == 3
    claims = json.loads((out / "claims.json").read_text())["claims"]
    assert [claim["verdict"] for claim in claims] == ["FAIL"] + ["not shown at this size"] * 6
