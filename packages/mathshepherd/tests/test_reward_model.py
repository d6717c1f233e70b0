"""Reward models: read at the tags, trained at the tags, saved and taken up again."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mathshepherd import train_rm
from mathshepherd.config import RewardConfig
from mathshepherd.generate import encode
from mathshepherd.records import Solution, StepLabels
from mathshepherd.reward_model import (
    Reading,
    Readout,
    StepRewardModel,
    score_solutions,
    token_batches,
)
from mathshepherd.steps import StepFormat, add_words
from mathshepherd.train_rm import (
    Target,
    as_outcome,
    at_tags,
    outcome_targets,
    step_targets,
    tag_loss,
    train_reward,
)
from octavo.errors import DataError, ModelError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.tiny import Shape, make_tokenizer
from octavo.training import TrainOptions
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

CPU = Runtime(device="cpu")

#: Model type -> what its configuration needs; and whether two rows of its output matrix tell.
FAMILIES = {
    "llama": ({}, True), "gpt2": ({}, True), "gptj": ({"rotary_dim": 4}, True),  # biased
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 2.0}, True),
    "cohere": ({"logit_scale": 0.25}, False), "granite": ({"logits_scaling": 3.0}, False),
}  # fmt: skip

QUESTIONS = ["How many pens?", "What is 2 x 3?", "How many?"]
SOLUTIONS = [["Ann has 3.", "She buys 4.", "The answer is: 7"], ["2 x 3 = 6"], ["So 1", "So 2"]]


@pytest.fixture(scope="module")
def tokenizer():
    """Characters, and the format's words with the blank before them."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .:?=<>\n"
    found = make_tokenizer([letters], Shape(kind="llama", alphabet="char"))
    assert add_words(found, StepFormat()) == 3
    return found


def make(kind, tokenizer, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
             "max_position_embeddings": 160, "bos_token_id": 2, "eos_token_id": 2,
             "pad_token_id": 0, "initializer_range": 0.2}  # fmt: skip
    config = AutoConfig.for_model(kind, **(sizes | FAMILIES[kind][0] | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def rewards(tokenizer):
    return {kind: StepRewardModel(make(kind, tokenizer), tokenizer).eval() for kind in FAMILIES}


def same(found, expected, atol=1e-5):
    assert [len(one) for one in found] == [len(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


# Reading.


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_rows_give_what_the_whole_vocabulary_gives(kind, rewards):
    reward = rewards[kind]
    assert reward.exact == FAMILIES[kind][1]
    found = reward.step_scores(QUESTIONS, SOLUTIONS)
    expected = []
    for question, steps in zip(QUESTIONS, SOLUTIONS, strict=True):
        text = f"{question} " + "\n".join(f"Step {n}: {s} ки" for n, s in enumerate(steps, 1))
        ids = torch.tensor(reward.tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = reward.model(ids[None]).logits[0]
        both = logits[:, [reward.words.good, reward.words.bad]].softmax(-1)[:, 0]
        expected.append(both[ids == reward.words.tag].numpy())
    same(found, expected)
    assert np.concatenate(found).std() > 1e-3
    assert all(one.dtype == np.float32 for one in found)


def test_whether_two_rows_tell_does_not_depend_on_the_logits_size(tokenizer):
    small = make("cohere", tokenizer, initializer_range=1e-4)
    assert not StepRewardModel(small, tokenizer).exact
    large = make("llama", tokenizer, initializer_range=0.9).bfloat16()
    assert StepRewardModel(large, tokenizer).exact
    without = make("llama", tokenizer)
    without.get_decoder = None
    assert not StepRewardModel(without, tokenizer).exact


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere"])
def test_a_score_is_read_at_its_tag(kind, rewards):
    reward = rewards[kind]
    ids = encode(reward.tokenizer, reward.reading.form.prefix(QUESTIONS[0], SOLUTIONS[0]))
    assert not {reward.words.good, reward.words.bad} & set(ids)  # verdicts are never read
    places = [n for n, one in enumerate(ids) if one == reward.words.tag]
    assert len(places) == 3
    assert places[-1] == len(ids) - 1
    (whole,) = reward.score_tokens([ids])
    for n, place in enumerate(places):
        (part,) = reward.score_tokens([ids[: place + 1]])  # nothing behind it
        torch.testing.assert_close(part, whole[: n + 1])
        later = [*ids[: place + 1], *([7, 8, 9] * 5)]
        torch.testing.assert_close(reward.score_tokens([later])[0][n], whole[n])
    for place in (0, places[0] - 1, places[1] - 1):  # a token before a tag tells in it and after it
        changed = [*ids[:place], 7, *ids[place + 1 :]]
        moved = (reward.score_tokens([changed])[0] - whole).abs()
        after = torch.tensor([one > place for one in places])
        assert (moved[after] > 1e-6).all()
        assert (moved[~after] < 1e-6).all()


def test_scores_do_not_depend_on_batch_and_order(rewards):
    reward, sizes = rewards["gpt2"], []
    hook = reward.model.get_decoder().register_forward_hook(
        lambda _, inputs, options, output: sizes.append(len(options["input_ids"])),
        with_kwargs=True,
    )
    expected = reward.step_scores(QUESTIONS, SOLUTIONS)
    same(reward.step_scores(QUESTIONS, SOLUTIONS, batch_tokens=1), expected)
    same(reward.step_scores(QUESTIONS[::-1], SOLUTIONS[::-1], batch_tokens=100), expected[::-1])
    same(reward.step_scores([*QUESTIONS, *QUESTIONS], [*SOLUTIONS, *SOLUTIONS]), expected * 2)
    hook.remove()
    assert sizes == [3, 1, 1, 1, 1, 2, 3]
    found = [Solution("p", n, *pair) for n, pair in enumerate(zip(QUESTIONS, map(tuple, SOLUTIONS),
                                                                 strict=True))]  # fmt: skip
    same(score_solutions(reward, found), expected)
    assert reward.step_scores([], []) == []
    assert list(token_batches([1, 5, 3, 2], 6)) == [[1], [2, 3], [0]]


def test_padding_is_no_tag():
    """Rows are padded with token 0, which may be the tag."""
    batch = at_tags([Target([5, 0, 6, 0], [1.0, 0.0]), Target([5, 0], [0.5])], 0)
    nan = math.nan
    expected = torch.tensor([[nan, 1.0, nan, 0.0], [nan, 0.5, nan, nan]])
    torch.testing.assert_close(batch["labels"], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        ([], DataError, "solution 1: has no steps to score"),
        (["a", " "], DataError, "step 2 of 2 is blank"),
        (["a ки b"], DataError, "step 1 holds the tag 'ки'"),
        (["a" * 160], DataError, r"does not fit the model's context \(160\); nothing is cut"),
    ],
)
def test_what_cannot_be_scored_is_refused(steps, error, message, rewards):
    with pytest.raises(error, match=message):
        rewards["llama"].step_scores(["How?", "How?"], [["a"], steps])


def one_tag_more():
    """A format with a tag in its prompt, which is refused where it is made as others are."""
    form = StepFormat()
    object.__setattr__(form, "prompt", "ки {question}")
    return form


def test_a_broken_model_and_a_lost_tag_are_told(tokenizer):
    reward = StepRewardModel(make("llama", tokenizer), tokenizer)
    reward.reading = Reading(form=one_tag_more())
    with pytest.raises(ModelError, match="1 steps and 2 tags: the tokenizer joins 'ки'"):
        reward.step_scores(["How?"], [["a"]])
    with torch.no_grad():
        next(reward.model.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="a score is NaN"):
        reward.step_scores(["How?"], [["a"]])


def test_a_tokenizer_without_the_words_is_refused(tokenizer):
    plain = make_tokenizer(["ки+- 1"], Shape(kind="llama", alphabet="char"))
    with pytest.raises(ModelError, match="--tag 'ки': is 3 tokens for this model"):
        StepRewardModel(make("llama", tokenizer), plain)


# Saving.


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("readout", ["tokens", "head"])
def test_a_saved_model_gives_the_same_scores(kind, readout, tokenizer, tmp_path):
    form = StepFormat(joiner="\n\n", numbered=False)
    reading = Reading(readout=readout, scope="outcome", form=form)
    reward = StepRewardModel(make(kind, tokenizer), tokenizer, reading)
    if reward.head is not None:
        same(reward.step_scores(QUESTIONS, SOLUTIONS), [[0.5] * len(s) for s in SOLUTIONS])
        torch.nn.init.normal_(reward.head.weight)
    expected = reward.step_scores(QUESTIONS, SOLUTIONS)
    reward.save(tmp_path / "run" / "model")
    found = StepRewardModel.load(tmp_path / "run")  # a run's folder holds it in `model`
    assert found.reading == reading
    assert not found.training
    assert found.device.type == "cpu"
    same(found.step_scores(QUESTIONS, SOLUTIONS), expected, 1e-6)
    half = StepRewardModel.load(tmp_path / "run" / "model", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    same(half.step_scores(QUESTIONS, SOLUTIONS), expected, 0.1)


def test_other_processes_write_nothing(rewards, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    rewards["llama"].save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_any_language_model_has_the_default_reading(tokenizer, tmp_path):
    model = make("llama", tokenizer)
    save_model(tmp_path / "model", model, tokenizer)
    found = StepRewardModel.load(tmp_path / "model")
    assert found.reading == Reading()
    same(found.step_scores(QUESTIONS, SOLUTIONS),
         StepRewardModel(model, tokenizer).step_scores(QUESTIONS, SOLUTIONS))  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("step_reward.json", "{", r"cannot read its step_reward\.json"),
        ("step_reward.json", "{}", r"cannot read its step_reward\.json \('form'\)"),
        ("step_reward.json", '{"form": {"tags": 1}}', "unexpected keyword argument 'tags'"),
        ("step_reward.json", '{"form": {}, "kind": 1}', "unexpected keyword argument 'kind'"),
        ("step_head.safetensors", "", r"cannot read its step_head\.safetensors"),
        ("step_head.safetensors", None, r"cannot read its step_head\.safetensors"),
        ("tokenizer.json", None, "holds no tokenizer"),
        ("model.safetensors", None, "cannot read its weights"),
    ],
)
def test_a_damaged_folder_is_told(file, content, message, tokenizer, tmp_path):
    folder = tmp_path / "model"
    reward = StepRewardModel(make("llama", tokenizer), tokenizer, Reading(readout="head"))
    reward.save(folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        StepRewardModel.load(folder)
    assert "\n" not in str(caught.value)


# What is learnt.


def solution(sample=0, steps=("good", "bad", "bad"), **facts):
    return Solution("p", sample, "How?", tuple(steps), **facts)


def test_labels_of_steps():
    nan = math.nan
    labels = StepLabels((1, 0, 1, None), (0.75, 0.25, 1.0, None))
    one = solution(steps="abcd", labels=labels)

    def targets(**options):
        return step_targets(one, RewardConfig(**options))

    np.testing.assert_equal(targets(), [1.0, 0.0, 1.0, nan])
    np.testing.assert_equal(targets(labels="soft"), [0.75, 0.25, 1.0, nan])
    np.testing.assert_equal(targets(until_first_error=True), [1.0, 0.0, nan, nan])
    np.testing.assert_equal(targets(labels="soft", until_first_error=True), [0.75, 0.25, nan, nan])
    right = solution(labels=StepLabels((1, 1, 1)))
    assert step_targets(right, RewardConfig(until_first_error=True)) == [1.0, 1.0, 1.0]


def test_labels_of_outcomes():
    nan = math.nan
    last, every = RewardConfig(), RewardConfig(supervise="all")
    np.testing.assert_equal(outcome_targets(solution(correct=True), last), [nan, nan, 1.0])
    assert outcome_targets(solution(correct=False), every) == [0.0, 0.0, 0.0]
    assert outcome_targets(solution(correct=True), every) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("targets", "facts", "options", "message"),
    [
        (step_targets, {}, {}, "problem p, sample 0: has no hard labels; run"),
        (step_targets, {"labels": StepLabels((1, 0, 0))}, {"labels": "soft"}, "has no soft labels"),
        (step_targets, {"labels": StepLabels((1, 0, 0), (0.5, None, 0.0), (1, 1, 0), (2, 1, 1))},
         {"labels": "soft"}, "some soft labels were not estimated"),
        (outcome_targets, {}, {}, "problem p, sample 0: `correct` is not known"),
    ],
)  # fmt: skip
def test_missing_labels_are_told(targets, facts, options, message):
    with pytest.raises(DataError, match=message):
        targets(solution(**facts), RewardConfig(**options))


def test_the_loss_by_hand():
    logits, labels = torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.25])
    # sigmoids are 1/2 and 3/4
    second = -0.25 * math.log(0.75) - 0.75 * math.log(0.25)
    assert tag_loss(logits, labels).item() == pytest.approx(math.log(2) + second)
    weighted = 3 * math.log(2) - 3 * 0.25 * math.log(0.75) - 0.75 * math.log(0.25)
    assert tag_loss(logits, labels, 3.0).item() == pytest.approx(weighted)
    assert tag_loss(logits[:0], labels[:0]).item() == 0


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_the_gradient_of_the_loss(weight):
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0.0, 1.0, 0.3, 1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: tag_loss(z, labels, weight), (logits,))


class Fitted(Exception):
    """What `fit` was called with."""


@pytest.fixture
def fitted(monkeypatch, tmp_path):
    """The batch and the loss that a training would begin with."""

    def fit(model, targets, collate, *_, loss, **__):
        raise Fitted(targets, collate(targets), loss)

    monkeypatch.setattr(train_rm, "fit", fit)

    def call(reward, solutions, config=RewardConfig(), batch_size=2):
        with pytest.raises(Fitted) as caught:
            options = TrainOptions(batch_size=batch_size)
            train_reward(reward, solutions, config, RunDir(tmp_path), options, CPU)
        return caught.value.args

    return call


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere"])
def test_labels_stand_at_the_tags_themselves(kind, tokenizer, fitted):
    """On two rows: the loss and its gradients are those of two words' logits at the tags."""
    reward = StepRewardModel(make(kind, tokenizer), tokenizer)
    rows = [solution(0, ("a", "bb", "c"), labels=StepLabels((1, None, 0), (0.5, None, 0.0))),
            solution(1, ("d",), labels=StepLabels((1,), (1.0,)))]  # fmt: skip
    config = RewardConfig(labels="soft", positive_weight=2.0)
    targets, batch, loss = fitted(reward, rows, config)
    known = [[0.5, math.nan, 0.0], [1.0]]
    for row, target, labels in zip(batch["labels"], targets, known, strict=True):
        ids = torch.tensor(target.ids)
        assert ids.tolist() == encode(tokenizer, reward.reading.form.prefix("How?", rows[0].steps)
                                      if len(labels) == 3 else "How? Step 1: d ки")  # fmt: skip
        np.testing.assert_equal(row[: len(ids)][ids == reward.words.tag].tolist(), labels)
        assert row[: len(ids)][ids != reward.words.tag].isnan().all()
        assert row[len(ids) :].isnan().all()
    found = loss(reward, batch)
    weights = [weight for weight in reward.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(found, weights, allow_unused=True)
    expected = torch.zeros(())
    for target, labels in zip(targets, known, strict=True):
        ids = torch.tensor(target.ids)
        logits = reward.model(ids[None]).logits[0]
        both = logits[:, [reward.words.good, reward.words.bad]].log_softmax(-1)
        for (good, bad), label in zip(both[ids == reward.words.tag], labels, strict=True):
            if not math.isnan(label):
                expected = expected - (2 * label * good + (1 - label) * bad)
    expected = expected / 3  # three labelled tags in two solutions, which make a batch
    torch.testing.assert_close(found, expected)
    others = torch.autograd.grad(expected, weights, allow_unused=True)
    for one, other in zip(gradients, others, strict=True):
        one, other = (torch.zeros(()) if part is None else part for part in (one, other))
        torch.testing.assert_close(one, other.expand_as(one), atol=1e-5, rtol=1e-4)


def test_an_outcome_model_learns_at_the_last_tag_or_at_all(tokenizer, fitted):
    reward = as_outcome(StepRewardModel(make("llama", tokenizer), tokenizer))
    assert reward.reading.scope == "outcome"
    rows = [solution(0, correct=True), solution(1, ("d",), correct=False)]
    nan = math.nan
    targets, *_ = fitted(reward, rows)
    np.testing.assert_equal([one.labels for one in targets], [[nan, nan, 1.0], [0.0]])
    targets, *_ = fitted(reward, rows, RewardConfig(supervise="all"))
    assert [one.labels for one in targets] == [[1.0, 1.0, 1.0], [0.0]]


# Training.


def planted(count=48):
    """Steps with an x are bad, and so are those after them."""
    rows = []
    for number in range(count):
        first = number % 4
        steps = tuple("x" if n == first else "o" for n in range(3))
        labels = StepLabels(tuple(int(n < first) for n in range(3)))
        rows.append(solution(number, steps, labels=labels, correct=first == 3))
    return rows


OPTIONS = TrainOptions(learning_rate=1e-2, epochs=4, batch_size=8, save_every=5)


def train(reward, folder, rows=None, config=RewardConfig(), options=OPTIONS):
    with RunDir.open(folder, {}) as run:
        return train_reward(reward, planted() if rows is None else rows, config, run, options, CPU)


def fresh(tokenizer, kind="llama", readout: Readout = "tokens", **changes):
    changes = {"initializer_range": 0.1} | changes
    return StepRewardModel(make(kind, tokenizer, **changes), tokenizer, Reading(readout=readout))


@pytest.mark.parametrize("readout", ["tokens", "head"])
def test_training_learns_the_labels(readout, tokenizer, tmp_path):
    reward = fresh(tokenizer, readout=readout)
    counts = train(reward, tmp_path / "run")
    assert counts == {"solutions": 48, "too long": 0, "tags": 144, "good tags": 72}
    rows = planted(4)
    scores = np.concatenate(score_solutions(reward, rows))
    labels = np.concatenate([step_targets(one, RewardConfig()) for one in rows])
    assert ((scores > 0.5) == labels).mean() > 0.9


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_as_read_learn_what_they_learn_in_the_whole_matrix(kind, tokenizer, tmp_path):
    alone, within = fresh(tokenizer, kind), fresh(tokenizer, kind)
    before: Any = alone.model.get_output_embeddings().weight.detach().clone()  # pyright: ignore
    options = replace(OPTIONS, weight_decay=0.0)  # of rows that are never read
    train(alone, tmp_path / "alone", options=options)
    within.as_read = nullcontext  # pyright: ignore
    train(within, tmp_path / "within", options=options)
    assert alone.rows is None
    for name, weight in within.state_dict().items():
        if name != "model.lm_head.bias":  # which is left as it is
            torch.testing.assert_close(alone.state_dict()[name], weight, rtol=0, atol=1e-3)
    changed = (alone.model.get_output_embeddings().weight != before).any(1)  # pyright: ignore
    assert changed.nonzero().flatten().tolist() == sorted([alone.words.good, alone.words.bad])
    assert all(one.requires_grad for one in alone.parameters())


@pytest.mark.parametrize("readout", ["tokens", "head"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj", "cohere"])
def test_all_that_is_trained_gets_a_gradient(kind, readout, tokenizer):
    """Several processes would wait for the rest."""
    reward = fresh(tokenizer, kind, readout)
    rows = [Target(encode(tokenizer, f"Q {row} ки"), [1.0]) for row in ("a", "b")]
    batch = at_tags(rows, reward.words.tag)
    where = ~batch["labels"].isnan()
    with reward.as_read():
        reward(batch["input_ids"], batch["attention_mask"], where).sum().backward()
        assert [
            name
            for name, one in reward.named_parameters()
            if one.requires_grad and one.grad is None
        ] == []


def test_a_model_with_tied_embeddings_trains_and_resumes(tokenizer, tmp_path, monkeypatch):
    def make_one():
        return fresh(tokenizer, "gpt2", tie_word_embeddings=True)

    whole = make_one()
    output: Any = whole.model.get_output_embeddings()
    assert output.weight is dict(whole.named_parameters())["model.transformer.wte.weight"]
    train(whole, tmp_path / "whole")
    (checkpoint,) = (tmp_path / "whole" / "checkpoints" / "reward").glob("checkpoint-*")
    saved = load_file(checkpoint / "model.safetensors")
    assert "model.transformer.wte.weight" in saved
    assert "model.lm_head.weight" not in saved
    assert sum(one.numel() for one in saved.values()) == sum(p.numel() for p in whole.parameters())

    killed, plain, calls = make_one(), StepRewardModel.forward, []

    def forward(self, *arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StepRewardModel, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            train(killed, tmp_path / "run")
    resumed = make_one()
    train(resumed, tmp_path / "run")
    steps = [line["step"] for line in RunDir(tmp_path / "run").metrics()]
    assert steps == [line["step"] for line in RunDir(tmp_path / "whole").metrics()]
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=1e-6, rtol=0)
    assert dict(resumed.named_parameters()).keys() == dict(whole.named_parameters()).keys()


def test_weights_that_lie_nowhere_are_all_told(tokenizer):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make("llama", tokenizer).config)
    reward = StepRewardModel.__new__(StepRewardModel)
    torch.nn.Module.__init__(reward)
    reward.model = model
    assert len(reward.state_dict()) == len(model.state_dict())


def test_long_solutions_are_left_out_and_counted(tokenizer, tmp_path):
    rows = [*planted(8), solution(8, ("o" * 200,), labels=StepLabels((1,))),
            solution(9, ("o" * 90,), labels=StepLabels((1,)))]  # fmt: skip
    options = TrainOptions(epochs=1, batch_size=8)
    counts = train(fresh(tokenizer), tmp_path / "a", rows, RewardConfig(), options)
    assert counts == {"solutions": 9, "too long": 1, "tags": 25, "good tags": 13}
    config = RewardConfig(max_length=90)
    counts = train(fresh(tokenizer), tmp_path / "b", rows, config, options)
    assert (counts["solutions"], counts["too long"]) == (8, 2)
    with pytest.raises(DataError, match=r"none of 10 .* \(10 are longer than 4 tokens\)"):
        train(fresh(tokenizer), tmp_path / "c", rows, RewardConfig(max_length=4))


def test_what_cannot_be_learnt_from_is_refused(tokenizer, tmp_path):
    reward = fresh(tokenizer)
    for number, (rows, message) in enumerate((
        ([], r"none of 0 solutions can be learnt from \(0 are longer"),
        ([solution(labels=StepLabels((None, None, None)))], "none of 1 solutions"),
        ([solution(labels=StepLabels((1, 1, 1)))], "all labels are the same"),
        ([solution()], "has no hard labels"),
    )):  # fmt: skip
        with pytest.raises(DataError, match=message):
            train(reward, tmp_path / str(number), rows)
    reward.reading = Reading(form=one_tag_more())
    with pytest.raises(DataError, match="3 steps and other tags; is one in the question"):
        train(reward, tmp_path / "tags")


def test_a_training_that_diverges_is_told(tokenizer, tmp_path):
    options = TrainOptions(learning_rate=1e30, epochs=2, batch_size=8, warmup=0)
    with pytest.raises(ModelError, match="lower --learning-rate"):
        train(fresh(tokenizer), tmp_path / "run", options=options)


def test_the_card_tells_what_is_read(tokenizer, tmp_path):
    fresh(tokenizer).save(tmp_path / "model")
    card = json.loads((tmp_path / "model" / "step_reward.json").read_text())
    assert (card["readout"], card["scope"], card["form"]["tag"]) == ("tokens", "steps", "ки")
