"""With a key step taken out, the claims must fail: they measure the method and not the task.

On the quick demo's sizes and seed, at which nothing fails untampered (test_demo.py). What each claim is
about is repeated with labels drawn by lot, scores of nothing, or rewards that know nothing.
"""

import copy
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from mathshepherd import experiment, ppo
from mathshepherd.annotate import annotate
from mathshepherd.claims import judge
from mathshepherd.config import Shaping
from mathshepherd.experiment import SIZES, Experiment
from mathshepherd.quality import label_quality
from mathshepherd.rewards import step_rewards
from octavo.rundir import RunDir
from octavo.runtime import Runtime

pytestmark = pytest.mark.untraced

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
def trained(tmp_path_factory):
    """The quick demo's experiment up to its labels."""
    folder = tmp_path_factory.mktemp("sabotage")
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
