"""The embedded default shows what it says, and each claim can fail."""

import json
import subprocess
import sys
import time

import pytest
from mathshepherd.claims import judge
from mathshepherd.cli import app
from octavo.cli import run

SIZES = (1, 2, 4, 8, 16, 32)
NUMBERS = (
    {
        "SFT greedy": 0.55, "SFT sampled": 0.57, "SFT steps": 4.9, "label accuracy": 0.92,
        "share of plain": 0.4, "FN 1": 0.4, "FN 8": 0.1, "FP 1": 0.03, "FP 32": 0.06, "CE 1": 1.9,
        "CE 32": 0.7, "PRM AUC": 0.98, "PRM accuracy": 0.95, "few PRM prod": 0.75, "few ORM": 0.7,
        "RFT greedy": 0.7, "right solutions alone greedy": 0.9, "PPO by steps greedy": 0.95,
        "PPO by outcome greedy": 0.94, "PPO by steps steps": 4.95, "PPO by steps no answer": 0.0,
        "raw stopped": 1.0, "raw stopped at": 12.0, "PPO by steps alarmed": 0.0,
    }
    | {f"SC @{n}": 0.56 for n in SIZES}
    | {f"SC + PRM min @{n}": 0.8 for n in SIZES}
    | {f"PRM min @{n}": 0.57 + 0.06 * k for k, n in enumerate(SIZES)}
    | {f"ORM @{n}": 0.56 + 0.055 * k for k, n in enumerate(SIZES)}
)  # fmt: skip


def test_claims_can_pass():
    assert {claim.passed for claim in judge([NUMBERS])} == {True}


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"label accuracy": 0.87}, "Rollouts label steps well"),
        ({"FN 8": 0.25}, "More rollouts find"),
        ({"CE 32": 2.0}, "The soft estimate"),
        ({"FP 32": 0.02}, "False positives rise"),
        ({"PRM AUC": 0.94}, "The process reward model tells"),
        ({"SC @16": 0.68, "ORM @16": 0.81}, "Best of 16 by the process"),
        ({"ORM @16": 0.67}, "Best of 16 by the outcome"),
        ({"ORM @16": 0.84}, "The process reward model is no worse"),
        ({"few ORM": 0.74}, "With little data"),
        ({"PRM min @32": 0.78}, "More candidates"),
        ({"RFT greedy": 0.58}, "Rejection sampling"),
        ({"PPO by steps greedy": 0.74, "PPO by outcome greedy": 0.7}, "Step-by-step PPO improves"),
        ({"PPO by outcome greedy": 0.99}, "Step-by-step PPO is no worse"),
        ({"PPO by steps steps": 6.0}, "Its policy still"),
        ({"PPO by steps no answer": 0.03}, "Its policy still"),
        ({"raw stopped": 0.67}, "Raw sums"),
        ({"PPO by steps alarmed": 0.33}, "Raw sums"),
    ],
)
def test_each_claim_can_fail(changed, claim):
    failed = [one.claim for one in judge([NUMBERS | changed]) if not one.passed]
    assert len(failed) == 1
    assert failed[0].startswith(claim)


@pytest.mark.parametrize("greedy", [0.2, 0.8])
def test_behind_a_closed_gate_nothing_is_judged(greedy):
    claims = judge([NUMBERS | {"SFT greedy": greedy}])
    assert [claim.passed for claim in claims] == [False] + [None] * 15


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The quick demo, once."""
    out = tmp_path_factory.mktemp("demo") / "run"
    return run(app, ["demo", "--out", str(out), "--device", "cpu", "--quiet"]), out


@pytest.mark.untraced
def test_the_quick_demo_shows_the_claims(finished, command, visit):
    code, out = finished
    claims = json.loads((out / "claims.json").read_text())["claims"]
    found = {claim["claim"]: claim["verdict"] for claim in claims}
    for long in ("Raw sums of scores are hacked, and the monitor sees it",
                 "With little data it is better: it learns more from each solution"):  # fmt: skip
        assert found.pop(long) == "not shown at this size"
    assert {*found.values()} == {"PASS"}, claims
    assert code == 0
    for page in (out / "report.html", out / "seed-0" / "steps.html"):
        _, said, asked = visit(page)
        assert (said, asked) == ([], [])
    assert (out / "report.html").read_text().count("<img") == 4
    code, _, err = command("demo", "--out", out, "--quiet")
    assert code == 2
    assert "holds a finished run" in err


#: A demo of few and short steps, in a process of its own.
SMALL = """
import sys
from dataclasses import replace
from mathshepherd import experiment
from mathshepherd.cli import main
size = experiment.SIZES["quick"]
experiment.SIZES["quick"] = replace(
    size, demonstrations=200, pool=48, test=20, dev=8, candidates=4, few=24, few_epochs=1,
    truth_prefixes=4, iterations=1, sft=replace(size.sft, epochs=16, batch_size=16),
    reward=replace(size.reward, epochs=1),
)
experiment.REINFORCE = replace(experiment.REINFORCE, responses=8, batch_size=8)
sys.exit(main())
"""


def test_a_killed_demo_ends_like_one_that_was_not(tmp_path):
    """Killed once the first seed's generator is saved; its training is not repeated."""

    def start(out):
        words = ["demo", "--seeds", "0,1", "--out", str(out), "--device", "cpu", "--quiet"]
        return subprocess.Popen([sys.executable, "-c", SMALL, *words], stdout=subprocess.DEVNULL)

    whole = start(tmp_path / "whole")
    killed = start(tmp_path / "killed")
    first = tmp_path / "killed" / "seed-0" / "sft" / "model"
    while not first.is_dir() and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "claims.json").exists()
    before = (first / "model.safetensors").stat().st_mtime_ns
    again = start(tmp_path / "killed")
    assert (again.wait(), whole.wait()) == (3, 3)  # such a generator does not pass the gate
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    for name in ("seed-0.json", "seed-1.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
