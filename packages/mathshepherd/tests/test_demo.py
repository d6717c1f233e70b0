"""The embedded default shows what it says, and each claim can fail."""

import copy
import json
import random
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from mathshepherd import experiment, ppo
from mathshepherd.annotate import annotate
from mathshepherd.claims import judge
from mathshepherd.cli import app
from mathshepherd.config import Shaping
from mathshepherd.experiment import SIZES, Experiment
from mathshepherd.quality import label_quality
from mathshepherd.rewards import step_rewards
from octavo.cli import run
from octavo.rundir import RunDir
from octavo.runtime import Runtime

COUNTS = (1, 2, 4, 8, 16, 32)
NUMBERS = (
    {
        "SFT greedy": 0.55, "SFT sampled": 0.57, "SFT steps": 4.9, "label accuracy": 0.92,
        "share of plain": 0.4, "FN 1": 0.4, "FN 8": 0.1, "FP 1": 0.03, "FP 32": 0.06, "CE 1": 1.9,
        "CE 32": 0.7, "PRM AUC": 0.98, "PRM accuracy": 0.95, "few PRM prod": 0.75, "few ORM": 0.7,
        "RFT greedy": 0.7, "right solutions alone greedy": 0.9, "PPO by steps greedy": 0.95,
        "PPO by outcome greedy": 0.94, "PPO by steps steps": 4.95, "PPO by steps no answer": 0.0,
        "raw stopped": 1.0, "raw stopped at": 12.0, "PPO by steps alarmed": 0.0,
    }
    | {f"SC @{n}": 0.56 for n in COUNTS}
    | {f"SC + PRM min @{n}": 0.8 for n in COUNTS}
    | {f"PRM min @{n}": 0.57 + 0.06 * k for k, n in enumerate(COUNTS)}
    | {f"ORM @{n}": 0.56 + 0.055 * k for k, n in enumerate(COUNTS)}
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


@pytest.mark.untraced
def test_a_killed_demo_ends_like_one_that_was_not(tmp_path, killed, monkeypatch):
    """Killed once the first seed's generator is saved; its training is not repeated."""
    size = SIZES["quick"]
    monkeypatch.setitem(SIZES, "quick", replace(
        size, demonstrations=200, pool=48, test=20, dev=8, candidates=4, truth_prefixes=4,
        iterations=1, layers=1, sft=replace(size.sft, epochs=16, batch_size=16),
        reward=replace(size.reward, epochs=1),
    ))  # fmt: skip
    small = replace(experiment.REINFORCE, responses=8, batch_size=8)
    monkeypatch.setattr(experiment, "REINFORCE", small)

    def words(out):
        return ["demo", "--seeds", "0,1", "--out", str(out), "--device", "cpu", "--quiet"]

    whole, other = tmp_path / "whole", tmp_path / "killed"
    first = other / "seed-0" / "sft" / "model"
    killed(*words(other), once=first.is_dir)
    assert not (other / "claims.json").exists()
    before = (first / "model.safetensors").stat().st_mtime_ns
    codes = [run(app, words(out)) for out in (other, whole)]
    assert codes == [3, 3]  # such a generator does not pass the gate
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    for name in ("seed-0.json", "seed-1.json"):
        assert (other / name).read_bytes() == (whole / name).read_bytes()


# With a key step taken out, the claims must fail: they measure the method and not the task. On the quick
# demo's sizes and seed, at which nothing fails untampered, what each claim is about is repeated with
# labels drawn by lot, scores of nothing, or rewards that know nothing.

LABEL = "Rollouts label steps well (hard estimate, N = 8)"
TELL = "The process reward model tells good steps from bad ones"
BEST = "Best of 16 by the process reward model beats self-consistency"
OUTCOME = "Best of 16 by the outcome reward model beats self-consistency"
PPO = "Step-by-step PPO improves it more"

#: What the rest of a demo would give.
REST = {
    "FN 1": 0.4, "FN 8": 0.1, "FP 1": 0.03, "FP 32": 0.06, "CE 1": 1.9, "CE 32": 0.7,
    "share of plain": 0.4, "few PRM prod": 0.75, "few ORM": 0.7, "RFT greedy": 0.7,
    "right solutions alone greedy": 0.9, "PPO by steps greedy": 0.95, "PPO by outcome greedy": 0.94,
    "PPO by steps steps": 3.5, "PPO by steps no answer": 0.0,
}  # fmt: skip

SCORED = {"SFT sampled": 0.6, "PRM AUC": 1.0, "PRM accuracy": 1.0} | {
    f"{name} @{n}": 0.5 for name in ("SC", "ORM", "PRM min", "SC + PRM min") for n in (1, 16)
}


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """The quick demo's experiment up to its labels, with its own generator."""
    _, out = finished
    folder = tmp_path_factory.mktemp("sabotage")
    shutil.copytree(out / "seed-0" / "sft", folder / "seed-0" / "sft")
    size = replace(SIZES["quick"], truth_prefixes=4)
    one = Experiment(RunDir(folder), size, Runtime(device="cpu"))
    model = one.generator()
    labelled, _ = one.labels(model)
    return one, model, labelled


@pytest.fixture
def again(trained):
    """The experiment with numbers of its own."""
    one, model, labelled = trained
    one = copy.copy(one)
    one.numbers = dict(one.numbers)
    return one, model, labelled


def failed(one):
    return {claim.claim for claim in judge([REST | one.numbers]) if claim.passed is False}


def steps(one):
    size = one.size
    return replace(experiment.REINFORCE, iterations=size.iterations, max_new_tokens=size.tokens)


@pytest.mark.untraced
def test_labels_by_lot(again):
    """Each solution gets the labels of another one of as many steps."""
    one, model, labelled = again
    draw, by_length = random.Random(0), {}
    for solution in labelled:
        by_length.setdefault(len(solution.steps), []).append((solution.labels, solution.correct))
    for some in by_length.values():
        draw.shuffle(some)
    shuffled = []
    for solution in labelled:
        labels, correct = by_length[len(solution.steps)].pop()
        shuffled.append(replace(solution, labels=labels, correct=correct))
    one.numbers["label accuracy"] = label_quality(shuffled)["accuracy"]
    one.verification(model, shuffled)
    assert failed(one) >= {LABEL, TELL, BEST, OUTCOME}


@pytest.mark.untraced
def test_completions_that_are_never_right(again, monkeypatch):
    """A step is then good only where the solution's own answer is."""
    one, model, _ = again
    one.world = replace(one.world, pool=one.world.pool[:100])
    quality = {"false negatives": 0.1, "false positives": 0.1, "CE of soft": 0.5}
    never = partial(annotate, grade=lambda *answer: False)
    monkeypatch.setattr(experiment, "annotate", never)
    monkeypatch.setattr(experiment, "quality_by_rollouts", lambda *given: [quality] * 6)
    one.labels(model)
    one.numbers |= SCORED
    assert LABEL in failed(one)


@pytest.mark.untraced
def test_scores_that_know_nothing(again, monkeypatch):
    draw = np.random.default_rng(0)
    monkeypatch.setattr(
        experiment, "score_solutions",
        lambda reward, rows: [draw.random(len(row.steps)).astype(np.float32) for row in rows],
    )  # fmt: skip
    monkeypatch.setattr(experiment, "train_reward", lambda *given: {})
    one, model, labelled = again
    one.verification(model, labelled)
    assert failed(one) >= {TELL, BEST, OUTCOME}


@pytest.mark.untraced
def test_rewards_that_know_nothing(again, monkeypatch):
    """All steps are worth the same; what is left is the divergence's price."""
    one, model, labelled = again
    one.prm = one.reward(model, "steps", labelled[:64], "prm-any")
    plain = step_rewards
    monkeypatch.setattr(ppo, "step_rewards", lambda *given: plain(*given) * 0)
    found = one.ppo(model, "PPO", one.prm, steps(one), Shaping(), None)
    one.numbers["PPO by steps greedy"] = one.greedy(found.policy)["greedy"]
    one.numbers |= SCORED
    assert PPO in failed(one)
