"""Reinforcement on a very small model: tokens and scores, processes, kills, every way to learn."""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from mathshepherd import ppo, shop
from mathshepherd.actor import checkpoint_layers
from mathshepherd.answers import equivalent
from mathshepherd.config import PPOConfig, Shaping
from mathshepherd.generate import seed_of
from mathshepherd.monitor import Alarm
from mathshepherd.records import Problem
from mathshepherd.responses import Responder, Response, step_ends
from mathshepherd.reward_model import Reading, StepRewardModel
from mathshepherd.steps import StepFormat
from octavo import tiny
from octavo.errors import ConfigError, DataError, ModelError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from torch import nn
from transformers.models.llama import modeling_llama

SCRIPT = Path(__file__).with_name("reinforcing.py")


@pytest.fixture(scope="session")
def small() -> Any:
    """The module `reinforcing` beside this file."""
    spec = importlib.util.spec_from_file_location("reinforcing", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    return RunDir.open(tmp_path / "run", {})


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of pieces of bytes, which knows lines and the tag."""
    text = "Step 1: 2 + 3 = 5 ки\nStep 2: so it is good ки\n\nThe answer is: 5 + - ки"
    return tiny.make_tokenizer([text] * 4, tiny.Shape(kind="llama", alphabet="bpe", vocabulary=330))


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def largest_change(before, after):
    assert before.keys() == after.keys()
    return max(float((before[name] - after[name]).abs().max()) for name in before)


# Steps and their scores


def test_steps_end_at_the_tags(small):
    ids = small.TOKENIZER(" 3 + 2 = 5 ки ки 5 + 1 = 6. The answer is: 6")["input_ids"]
    assert [small.TOKENIZER.decode(ids[n]) for n in step_ends(small.TOKENIZER, shop.FORMAT, ids)] == [
        " ки", " ки"
    ]  # fmt: skip
    assert step_ends(small.TOKENIZER, shop.FORMAT, []) == []


lines = st.lists(st.text("Step 12:\n=5äки", max_size=8), max_size=4).map("\n".join)


@settings(max_examples=60)
@given(text=lines)
def test_plain_steps_end_with_their_last_character(letters, text):
    form = StepFormat(plain=True)
    ids = letters(text, add_special_tokens=False)["input_ids"]
    assert letters.decode(ids) == text
    ends = step_ends(letters, form, ids)
    place, wanted = 0, []
    for piece in text.split("\n"):
        place += len(piece)
        if piece.strip():
            wanted.append(place)
        place += 1
    found = [len(letters.decode(ids[: end + 1])) for end in ends]
    before = [len(letters.decode(ids[:end])) for end in ends]
    # one token may hold the ends of two short steps
    assert all(any(a < place <= b for a, b in zip(before, found, strict=True)) for place in wanted)
    assert len(ends) <= len(wanted)
    assert ends == sorted(set(ends))


def response(tokenizer, form, question, text):
    prompt = tokenizer(form.question(question))["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Response(prompt, ids, step_ends(tokenizer, form, ids), [], None, True)


def test_scores_of_tokens_are_those_of_the_text(small):
    reward = small.make_reward()
    responder = Responder(small.make_model(), small.TOKENIZER, reward, shop.FORMAT)
    assert responder.same_tokens
    problems = small.WORLD.pool[:4]
    texts = [" " + one.solution for one in problems]
    texts[2] += " 3 + 2 ки ки"  # a blank step
    texts[3] = " 3 + 2"  # no step came to its end
    made = [response(small.TOKENIZER, shop.FORMAT, one.question, text)
            for one, text in zip(problems, texts, strict=True)]  # fmt: skip
    by_text = copy.deepcopy(made)
    responder._score(problems, made)
    responder._score_texts(reward, list(zip(problems, by_text, strict=True))[:3])
    for problem, one, other in zip(problems[:2], made, by_text, strict=False):
        assert one.scores == pytest.approx(other.scores, abs=1e-6)
        steps = shop.FORMAT.split(problem.solution)
        (wanted,) = reward.step_scores([problem.question], [steps])
        assert one.scores == pytest.approx(wanted.tolist(), abs=1e-6)
    assert len(made[2].scores) == len(by_text[2].scores)
    assert made[2].scores[-1] == by_text[2].scores[-1] == 0  # worth nothing
    assert made[2].scores[:-1] == pytest.approx(by_text[2].scores[:-1], abs=1e-6)
    assert made[2].scores[-2] > 0
    assert made[3].scores == []
    assert len({round(score, 4) for one in made for score in one.scores}) > 3


def test_another_tokenizer_scores_the_texts(small, letters):
    form = StepFormat(plain=True)
    shape = tiny.Shape(kind="llama", layers=1, width=16, max_length=128)
    policy = tiny.make_model(shape, letters, 0)
    tagged = StepFormat(tag="good")  # which the policy happens to write
    judge = StepRewardModel(
        tiny.make_model(shape, letters, 1).eval(), letters, Reading(form=tagged)
    )
    responder = Responder(policy, letters, judge, form)
    assert not responder.same_tokens
    problems = [Problem("1", "How many?"), Problem("2", "What?"), Problem("3", "Why?")]
    texts = ["Step 1: 2 + 3 = 5\nStep 2: so it is good 5\n", " good\n", "\n"]
    made = [response(letters, form, one.question, text)
            for one, text in zip(problems, texts, strict=True)]  # fmt: skip
    responder._score(problems, made)
    steps = ("Step 1: 2 + 3 = 5", "Step 2: so it is  5")
    (wanted,) = judge.step_scores(["How many?"], [steps])
    assert made[0].scores == pytest.approx(wanted.tolist(), abs=1e-6)
    assert [one.scores for one in made[1:]] == [[0.0], []]
    alone = Responder(policy, letters, None, form)
    alone._score(problems, made)
    assert [one.scores for one in made] == [[0.0, 0.0], [0.0], []]


def test_tokens_are_the_same_only_where_words_and_format_are(small, letters):
    reward = small.make_reward()
    other = replace(shop.FORMAT, joiner="\n")
    policy = small.make_model()
    assert not Responder(policy, small.TOKENIZER, reward, other).same_tokens
    assert not Responder(policy, small.TOKENIZER, reward, replace(other, plain=True)).same_tokens
    assert not Responder(policy, letters, reward, shop.FORMAT).same_tokens
    assert not Responder(policy, small.TOKENIZER, None, shop.FORMAT).same_tokens


def trainer(small, run, reward=None, shaping=Shaping(answer_weight=1.0), **changes) -> Any:
    return ppo._Trainer(
        small.make_model(), small.TOKENIZER, reward, run, small.options(**changes), shaping,
        shop.FORMAT, small.RUNTIME, equivalent, Accelerator(cpu=True),
    )  # fmt: skip


def sampled(made, small, count=2):
    problems = small.WORLD.pool[:3]
    seeds = [[seed_of(n, k) for k in range(count)] for n in range(len(problems))]
    return made.responder(problems, count, 0.8, seeds)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_log_probabilities_are_those_of_the_whole_pass(small, run, critic):
    made = trainer(small, run, temperature=0.8, critic=critic, micro_batch_size=4, max_new_tokens=9)
    other = small.make_model(5)
    made.reference.model.load_state_dict(other.state_dict())
    with torch.no_grad():
        for part in made.actor.head, made.critic and made.critic.head:
            if part is not None:
                part.weight.fill_(0.1)
    rows = sampled(made, small)
    made.judge_tokens(rows)
    assert len({len(one.prompt) for one in rows}) > 1
    for one in rows:
        ids = torch.tensor([one.prompt + one.ids])
        begin = len(one.prompt) - 1
        for model, found in ((made.policy, one.old), (other, one.reference)):
            with torch.no_grad():
                logits = model(ids).logits[0, begin:-1] / 0.8
            wanted = logits.log_softmax(-1)[range(len(one.ids)), one.ids]
            assert torch.allclose(found, wanted, atol=1e-5)
        states = made.policy(ids, output_hidden_states=True).hidden_states[-1][0, begin:-1]
        assert torch.allclose(one.values, 0.1 * states.sum(-1), atol=1e-5)  # before each token
    assert not torch.allclose(rows[0].old, rows[0].reference, atol=0.1)


def test_sampled_tokens_are_likely_ones(small, run):
    """The sampling policy's own probabilities: the mean surprise of samples is the entropy."""
    made = trainer(small, run, temperature=0.8, critic="shared", max_new_tokens=12)
    rows = sampled(made, small, 60)
    made.judge_tokens(rows)
    ids, mask, places, tokens, there = made._tensors(rows)
    with torch.no_grad():
        logs, entropy, _ = made.actor(ids, mask, places, tokens, 0.8)
    surprise, expected = -float(logs[there].mean()), float(entropy[there].mean())
    spread = float(logs[there].std()) / int(there.sum()) ** 0.5
    assert surprise == pytest.approx(expected, abs=4 * spread)
    assert expected > 0.5


def test_what_a_batch_is_made_of(small, run):
    """Returns by hand: scores, the divergence, the answer, the penalty, and values."""
    shaping = Shaping(shaping="raw", answer_weight=2.0, missing_penalty=0.5)
    made = trainer(small, run, small.make_reward(), shaping, kl=0.1, lam=1.0)
    rows = [Response([5], [7, 8, 9], [0, 2], [0.25, 0.75], True, True),
            Response([5], [7, 8], [1], [0.5], False, False)]  # fmt: skip
    for one in rows:
        size = len(one.ids)
        one.old, one.reference = torch.zeros(size), torch.full((size,), 1.0)
        one.values = torch.full((size,), 0.5)
    found = made.batch(rows)
    assert found["task"].tolist() == [3.0, 0.0]
    assert found["kl"].tolist() == [-3, -2]
    rewards = [[0.35, 0.1, 2.85], [0.1, 0.1, 0.0]]  # with 0.1 a token
    to_go = torch.tensor([[3.3, 2.95, 2.85], [0.2, 0.1, 0]])
    assert rewards[0][0] + rewards[0][1] + rewards[0][2] == pytest.approx(3.3)
    assert torch.allclose(found["returns"][found["mask"]], to_go[found["mask"]], atol=1e-6)
    known = (to_go - 0.5)[found["mask"]]
    wanted = (known - known.mean()) / known.std(correction=0)
    assert torch.allclose(found["advantages"][found["mask"]], wanted, atol=1e-5)
    assert found["advantages"][1, 2] == 0


@pytest.mark.parametrize(
    ("truncated", "to_go"),
    [
        ("penalty", [[1.0, 0.75], [0.0, -0.5], [0.5, 0.25]]),
        ("bootstrap", [[1.0, 0.75], [2.5, 2.0], [0.5, 0.25]]),
        ("drop", [[1.0, 0.75], None, [0.5, 0.25]]),
    ],
)
def test_what_is_cut_off(small, run, truncated, to_go):
    """Returns by hand: no end pays the penalty, goes on with the critic's value, or is left out."""
    shaping = Shaping(shaping="raw", missing_penalty=1.0)
    made = trainer(small, run, small.make_reward(), shaping, kl=0.0, lam=1.0, truncated=truncated)
    rows = [Response([5], [7, 8], [0, 1], [0.25, 0.75], True, True),
            Response([5], [7, 8], [0, 1], [0.5, 0.5], None, False, finished=False, behind=1.5),
            Response([5], [7, 8], [0, 1], [0.25, 1.25], None, False)]  # fmt: skip
    for one in rows:
        one.old, one.reference = torch.zeros(2), torch.ones(2)
        one.values = torch.full((2,), 0.25)
        one.behind *= truncated == "bootstrap"
    found = made.batch(rows)
    kept = [n for n, one in enumerate(to_go) if one is not None]
    assert found["mask"].all(1).nonzero().flatten().tolist() == kept
    wanted = torch.tensor([to_go[n] for n in kept])
    assert torch.allclose(found["returns"][kept], wanted, atol=1e-6)
    known = wanted - 0.25
    known = (known - known.mean()) / known.std(correction=0)
    assert torch.allclose(found["advantages"][kept], known, atol=1e-5)
    assert found["kl"].tolist() == [-2, -2, -2]  # is told of all
    assert not found["advantages"][[n for n in range(3) if n not in kept]].any()


def test_what_is_left_out_teaches_nothing(small, run):
    """Updates without a response that was cut off are those of the others alone."""
    states = []
    for kept in (slice(3), slice(2), slice(2, 3)):
        made = trainer(small, run, small.make_reward(), truncated="drop", kl=0.0)
        rows = sampled(made, small, 2)[:3]
        made.judge_tokens(rows)
        rows[0].finished, rows[1].finished, rows[2].finished = True, True, False
        rows[2].values = rows[2].values + 100
        rows = rows[kept]
        told = made._step(range(len(rows)), range(len(rows)), rows, made.batch(rows))
        states.append(weights_of(made.actor))
        assert bool(told) == (len(rows) > 1)
    begun = weights_of(trainer(small, run, small.make_reward()).actor)
    assert largest_change(begun, states[0]) > 1e-5
    assert largest_change(states[0], states[1]) < 1e-6
    assert largest_change(begun, states[2]) == 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_value_behind_the_end_is_that_of_the_last_state(small, run, critic):
    made = trainer(small, run, truncated="bootstrap", critic=critic, max_new_tokens=5)
    rows = sampled(made, small, 8)
    assert 0 < sum(one.finished for one in rows) < len(rows)
    head = made.actor.head if critic == "shared" else made.critic.head
    with torch.no_grad():
        head.weight.fill_(0.1)
    made.judge_tokens(rows)
    for one in rows:
        ids = torch.tensor([one.prompt + one.ids])
        states = made.policy(ids, output_hidden_states=True).hidden_states[-1][0].detach()
        begin = len(one.prompt) - 1
        assert torch.allclose(one.values, 0.1 * states[begin:-1].sum(-1), atol=1e-5)
        last = 0.0 if one.finished else 0.1 * float(states[-1].sum())
        assert one.behind == pytest.approx(last, abs=1e-5)


def test_grpo_counts_no_end_without_a_reward(small, run):
    """Without a reward model steps do not count, and without an answer's weight ends do not."""
    made = trainer(small, run, None, Shaping(answer_weight=1.0), advantage="grpo", group=2)
    rows = [Response([5], [7, 8, 9], [0, 1], [0.0, 0.0], True, True),
            Response([5], [7, 8], [0], [0.0], False, True)]  # fmt: skip
    for one in rows:
        one.old = one.reference = torch.zeros(len(one.ids))
    assert made.batch(rows)["advantages"][:, 0].tolist() == pytest.approx([1, -1], abs=1e-4)
    made = trainer(
        small, run, small.make_reward(), Shaping(shaping="raw"), advantage="grpo", group=2
    )
    rows[0].scores, rows[1].scores = [0.9, 0.1], [0.5]
    for one in rows:
        one.reference = torch.full((len(one.ids),), 9.0)  # is the loss's affair
    found = made.batch(rows)["advantages"]
    unit = 1.5**0.5
    assert found[0].tolist() == pytest.approx([0, -unit, 0], abs=1e-4)
    assert found[1].tolist() == pytest.approx([0, 0, 0], abs=1e-4)


def test_every_question_is_asked_before_one_is_asked_again():
    problems = [Problem(str(n), "?") for n in range(7)]
    for begin in (0, 3):
        asked = [one.id for k in range(3) for one in ppo._drawn(problems, 2, begin + k, 0)]
        assert max(Counter(asked).values()) == 1
    first, again, other = (ppo._drawn(problems, 7, *key) for key in ((0, 0), (0, 0), (1, 0)))
    assert first == again != other


# Processes


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, measured):
    """What the runs in other processes left."""
    folder = tmp_path_factory.mktemp("processes")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=240,
        env=os.environ | measured | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["separate", "shared", "lora"])
def test_two_processes_equal_one(small, elsewhere, run, name):
    found = small.train(run, **small.RUNS[name])
    wanted = found.policy.state_dict()
    assert largest_change(small.make_policy().state_dict(), wanted) > 1e-3
    for rank in range(2):
        state, history = torch.load(elsewhere / f"{name}-rank-{rank}.pt")
        assert largest_change(wanted, state) < 1e-5
        assert [line["accuracy"] for line in history] == [
            line["accuracy"] for line in found.history
        ]
    lines = list(zip(metrics_of(run.path), metrics_of(elsewhere / "rank-0" / name), strict=True))
    assert [sorted(one) for one, _ in lines] == [sorted(other) for _, other in lines]
    for one, other in lines:
        known = {key: value for key, value in one.items() if value is not None}
        assert {key: other[key] for key in known} == pytest.approx(known, abs=1e-5)
    assert not (elsewhere / "rank-1").exists()


@pytest.mark.parametrize("name", ["killed", "killed-lora"])
def test_a_killed_run_ends_like_one_that_was_not(small, elsewhere, run, name):
    """Bit for bit, though it was killed by the system between two checkpoints."""
    whole = small.train(run, **small.KILLED[name])
    cut = RunDir.open(elsewhere / name, {})
    assert cut.resumed
    assert [line["iteration"] for line in cut.metrics() if "iteration" in line] == [1, 2, 3, 4, 5]
    again = small.train(cut, **small.KILLED[name])
    assert largest_change(whole.policy.state_dict(), again.policy.state_dict()) == 0
    assert whole.history == again.history
    assert metrics_of(run.path) == metrics_of(cut.path)
    assert [line.get("iteration") for line in cut.metrics()].count(5) == 1
    assert not math.isinf(sum(line.get("reward") or 0 for line in cut.metrics()))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_checkpoints_hold_what_is_trained_alone(small, run, critic):
    """With an adapter that is the policy's, the critic's, and the head."""
    small.train(run, lora_rank=2, critic=critic)
    last, best = (
        torch.load(run.path / "checkpoints/ppo" / file, weights_only=True)
        for file in ("last.pt", "best.pt")
    )
    heads = {"head.weight", "head.bias"}
    held = last["critic" if critic == "separate" else "actor"]
    assert heads < held.keys()
    assert float(held["head.weight"].abs().max()) > 0
    names = {*last["actor"], *last.get("critic", ()), *best["actor"]} - heads
    assert len(names) > 8
    assert all("lora_" in name for name in names)
    assert ("critic" in last) == (critic == "separate")
    count = sum(len(last.get(name, ())) for name in ("actor", "critic"))
    assert len(last["optimizer"]["state"]) == count


def test_a_run_killed_before_its_first_checkpoint_begins_anew(small, run):
    run.log(iteration=1, reward=9.0)
    run.log(check=0, reward=9.0)
    run.log(training="sft", step=1)
    small.train(run, iterations=1)
    lines = run.metrics()
    assert [line.get("iteration", line.get("check")) for line in lines] == [None, 0, 1, 1]
    assert all(line.get("reward") != 9.0 for line in lines)


# Ways to learn


WAYS: dict[str, dict[str, Any]] = {
    "rloo": {"advantage": "rloo", "group": 4},
    "grpo": {"advantage": "grpo", "group": 4},
    "kl in the loss": {"kl_in": "loss"},
    "no kl": {"kl": 0.0},
    "bootstrap": {"truncated": "bootstrap"},
    "drop": {"truncated": "drop", "max_new_tokens": 32},
    "separate critic": {"critic": "separate", "critic_learning_rate": 1e-2},
    "shared critic": {"critic": "shared"},
    "answers": {"reward": None, "shaping": Shaping(answer_weight=1.0)},
    "answers, rloo": {"reward": None, "shaping": Shaping(answer_weight=1.0), "advantage": "rloo",
                      "group": 2, "kl_in": "loss"},
    "outcome": {"scope": "outcome"},
    "bfloat16": {"runtime": Runtime(device="cpu", dtype="bfloat16")},
    "lora": {"lora_rank": 2},
    "lora, answers, bfloat16": {
        "lora_rank": 2, "reward": None, "shaping": Shaping(answer_weight=1.0),
        "runtime": Runtime(device="cpu", dtype="bfloat16"),
    },
    "lora, shared critic, no kl": {"lora_rank": 2, "critic": "shared", "kl": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_changes_the_policy(small, run, way):
    changes = dict(WAYS[way])
    if scope := changes.pop("scope", None):
        changes["reward"] = small.make_reward(scope)
    reward = changes.setdefault("reward", small.make_reward())
    before = reward and weights_of(reward)
    found = small.train(run, micro_batch_size=3, **changes)
    state = found.policy.state_dict()
    assert (
        largest_change(small.make_policy().state_dict(), state) > 1e-4
    )  # no adapter is left in it
    assert reward is None or largest_change(before, reward.state_dict()) == 0
    lines = [line for line in run.metrics() if "iteration" in line]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert (lines[0]["value_loss"] > 0) == (changes.get("advantage", "gae") == "gae")
    assert abs(lines[0]["kl"]) < 1e-6  # it begins as the reference
    if changes.get("kl") != 0.0:
        assert abs(lines[1]["kl"]) > 1e-6  # and the reference stays
    assert (found.iteration, found.stopped) == (2, "")
    if way == "outcome":
        last = found.history[-1]
        rows = Responder(found.policy, small.TOKENIZER, reward, shop.FORMAT, 12)(
            small.WORLD.dev, 1, 0.0, [[0]] * 3
        )  # fmt: skip
        judged = [one.scores[-1] if one.scores else 0.0 for one in rows]
        assert last["judged"] == pytest.approx(sum(judged) / 3, abs=1e-5)


def test_micro_batches_change_nothing(small, tmp_path):
    states = [
        small.train(
            RunDir.open(tmp_path / str(size), {}), micro_batch_size=size
        ).policy.state_dict()
        for size in (1, 3, 8)
    ]
    assert all(largest_change(one, other) < 1e-5 for one, other in pairwise(states))


@pytest.mark.parametrize("way", [{}, {"critic": "shared"}, {"lora_rank": 2}])
def test_activations_computed_twice_change_nothing(small, tmp_path, monkeypatch, way):
    begun, passes = small.make_policy().state_dict(), {True: 0, False: 0}
    plain = modeling_llama.LlamaMLP.forward

    def counted(self, *given):
        passes[on] += torch.is_grad_enabled()
        return plain(self, *given)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", counted)
    states = {}
    for on in (False, True):
        run = RunDir.open(tmp_path / str(on), {})
        found = small.train(run, gradient_checkpointing=on, micro_batch_size=4, **way)
        states[on] = found.policy.state_dict()
        assert not any("forward" in one.__dict__ for one in found.policy.modules())
    assert largest_change(begun, states[True]) > 1e-4
    assert largest_change(states[False], states[True]) < 1e-6
    assert passes[True] == 2 * passes[False] > 0


def test_updates_end_when_the_policy_has_moved_far(small, tmp_path, monkeypatch):
    steps = []
    plain = ppo._Trainer._step
    monkeypatch.setattr(
        ppo._Trainer, "_step", lambda *given: steps.append(1) or plain(*given)
    )  # fmt: skip
    for limit, count in ((0.0, 8), (1e-9, 2), (100.0, 8)):  # two batches in each of four passes
        steps.clear()
        run = RunDir.open(tmp_path / str(limit), {})
        small.train(run, iterations=1, epochs=4, target_kl=limit)
        assert len(steps) == count


@pytest.mark.parametrize("way", [{"critic": "shared"}, {"advantage": "grpo", "group": 4}])
def test_a_reward_of_answers_raises_accuracy(small, run, way):
    asked = [f"Ann has {n} pens. How many?" for n in range(1, 9)]
    policy = small.taught(
        [(one, [f"The answer is: {k}"]) for one in asked for k in range(2, 6)], 60
    )
    problems = [Problem(str(n), one, "4") for n, one in enumerate(asked * 8)]
    found = small.train(
        run, policy, problems=problems, dev=problems[:8], reward=None,
        shaping=Shaping(answer_weight=1.0), iterations=16, responses=32, batch_size=16,
        micro_batch_size=32, monitor_every=16, learning_rate=2e-3, max_new_tokens=8, **way,
    )  # fmt: skip
    shares = [line["accuracy"] for line in run.metrics() if "iteration" in line]
    assert sum(shares[:2]) / 2 < 0.5
    assert np.median(shares[-5:]) > 0.9
    first, last = found.history
    assert last["no answer"] <= first["no answer"] + 0.2
    assert last["gap"] is None  # there is no reward model


@pytest.mark.parametrize(
    ("accuracies", "best"), [([0, 1, 1, 0], 2), ([1, 0, 0, 0], 0), ([0, 0, 0, 1], 3), (None, 2)]
)
def test_an_early_stop_restores_the_best_policy(small, tmp_path, monkeypatch, accuracies, best):
    dev = [replace(small.WORLD.dev[0], answer=None if accuracies is None else "dev")]
    told = iter(accuracies or [])

    def grade(found, wanted):
        return bool(next(told)) if wanted == "dev" else found == wanted

    monkeypatch.setattr(ppo, "alarm", lambda history, _: "enough" if len(history) == 4 else "")
    options: dict[str, Any] = {"dev": dev, "grade": grade, "iterations": 9}
    found = small.train(RunDir.open(tmp_path / "a", {}), limits=Alarm(), **options)
    assert (found.iteration, found.stopped, len(found.history)) == (best, "enough", 4)
    wanted = small.make_policy()
    if best:
        wanted = small.train(RunDir.open(tmp_path / "b", {}), iterations=best).policy
    assert largest_change(wanted.state_dict(), found.policy.state_dict()) == 0


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({name: 0}, f"--{name.replace('_', '-')} 0: must be 1 or more") for name in (
            "iterations", "responses", "group", "epochs", "batch_size", "micro_batch_size",
            "max_new_tokens", "monitor_every", "save_every")),
        *(({name: 0.0}, f"--{name.replace('_', '-')} 0.0: must be above 0") for name in (
            "learning_rate", "clip", "temperature")),
        *(({name: -0.1}, f"--{name.replace('_', '-')} -0.1: must be 0 or more") for name in (
            "critic_learning_rate", "value_weight", "gamma", "lam", "kl", "target_kl")),
        ({"lora_rank": -1}, "--lora-rank -1: must be 0 or more"),
        ({"gamma": 1.5}, "--gamma 1.5: must be 1 at most"),
        ({"lam": 1.5}, "--lam 1.5: must be 1 at most"),
        ({"kl": math.inf}, "--kl inf: .*finite"),
        ({"learning_rate": math.nan}, "--learning-rate nan: .*finite"),
        ({"advantage": "rloo"}, "--advantage rloo: compares a --group of 2 or more"),
        ({"advantage": "grpo"}, "--advantage grpo: compares a --group of 2 or more"),
        ({"truncated": "bootstrap", "advantage": "rloo", "group": 2}, "--truncated bootstrap: needs"),
        ({"responses": 9, "group": 2}, "--responses 9: must be a multiple of --group 2"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        PPOConfig(**options)


def test_options_that_do_not_fit(small, run, monkeypatch):
    pool = small.WORLD.pool
    with pytest.raises(ConfigError, match="there is no reward: name a --reward model"):
        small.train(run, reward=None)
    with pytest.raises(ConfigError, match="--answer-weight: some problems have no answer"):
        small.train(
            run, problems=[*pool, Problem("x", "How many?")], shaping=Shaping(answer_weight=1)
        )
    with pytest.raises(ConfigError, match="--group 2: need 18 questions, and there are 16"):
        small.train(run, responses=36, group=2)
    with pytest.raises(ConfigError, match="--dtype float16: reinforcement needs bfloat16"):
        small.train(run, runtime=Runtime(device="cpu", dtype="float16"))
    with pytest.raises(ConfigError, match="--gradient-checkpointing: does not fit this model"):
        checkpoint_layers(nn.Linear(1, 1))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ConfigError, match="--lora-rank: needs peft; pip install"):
            small.train(run, lora_rank=2)
    monkeypatch.setattr(ppo, "world_size", lambda: 3)
    for options in ({"responses": 8, "batch_size": 3}, {"responses": 9, "batch_size": 4}):
        with pytest.raises(ConfigError, match="must be multiples of the 3 processes"):
            small.train(run, **options)


def test_questions_that_cannot_be_asked(small, run):
    long = Problem("x", "Ann has 3 pens. " * 30)
    with pytest.raises(DataError, match="leaves no room in the model's context"):
        small.train(run, problems=[long], responses=1, dev=[])
    with pytest.raises(DataError, match="a question holds the tag 'ки'"):
        small.train(run, problems=[Problem("x", "How ки many?")], responses=1, dev=[])


def test_a_diverged_policy_is_told_of(small, run, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="a gradient of the policy became NaN or infinite"):
        small.train(run, learning_rate=1e30, dev=[])

    def iterate(self, *_):
        self.actor.model.lm_head.weight.data[0, 0] = math.nan

    monkeypatch.setattr(ppo._Trainer, "iterate", iterate)
    with pytest.raises(ModelError, match="a weight of the policy became NaN or infinite"):
        small.train(RunDir.open(tmp_path / "other", {}), dev=[])
