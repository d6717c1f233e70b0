"""With a key step taken out, the claims must fail: they measure the flow and not the method.

The demo's own analysis and judgement, on a model whose flows were set by hand: in its first layer label
words gather, in the third of four the target reads them.
"""

import random
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from anchors import analyses, demo
from anchors.attention import Edit, frozen, instrument
from anchors.blocking import isolated
from anchors.demo import analyse, judge
from anchors.evaluate import predict
from anchors.reading import reading

saliency = import_module("anchors.saliency")  # anchors.saliency is the function in it

GATE = "The model learns in context"
GATHER = "Information gathers in label words in shallow layers"
READ = "In deep layers the prediction is read from label words"
HURT = "Isolating label words in the first half of the layers hurts most"
LAST = "Isolating them in the deeper half hurts less"
TELL = "The target's attention on label words tells the prediction"
LATE = "Reading happens late: R rises in the deeper half"

#: What the trials of the applications would give; none of the claims here is about them.
APPLIED = {
    "loyalty hidden anchors": 1.0, "loyalty text anchors": 0.4, "loyalty hidden random": 0.4,
    "loyalty hidden random, best of 20 on other texts": 0.4, "accuracy unbiased": 0.9,
    "accuracy biased": 0.7, "accuracy re-weighted": 0.9, "spearman": 0.9, "siblings": 0.7,
    "no siblings": 0.9,
}  # fmt: skip
FLOWS = {GATHER, READ, HURT, LAST, TELL, LATE}


@pytest.fixture
def failed(planted, monkeypatch):
    """A function that gives the claims which do not pass; those behind a closed gate are among them."""
    # what no claim needs: the table of isolation, narrow intervals
    monkeypatch.setattr(demo, "block_rows", lambda *options: [])
    monkeypatch.setattr(demo, "read_tables", partial(analyses.read_tables, resamples=2))

    def call(model=None, change=lambda prompt: prompt):
        model = model or planted.make_model(4, 0, 2)
        pairs, labels_of_pairs = planted.make_prompts(50, 2)
        prompts, labels = planted.make_prompts(50, 3)
        numbers = APPLIED | {
            "accuracy 2": predict(model, pairs, 50).accuracy(labels_of_pairs),
            "accuracy 3": predict(model, prompts, 50).accuracy(labels),
        }
        analyse(model, [change(prompt) for prompt in prompts], labels, 0, numbers)
        verdicts = {claim.claim: claim.passed for claim in judge([numbers])}
        return {name for name in {GATE} | FLOWS if not verdicts[name]}

    return call


def test_nothing_fails_untampered(failed):
    assert failed() == set()


def test_a_block_that_does_nothing(failed, monkeypatch):
    monkeypatch.setattr(analyses, "block", lambda *options: nullcontext())
    assert failed() == {HURT, LAST}


def test_label_words_sought_at_other_places(failed):
    def astray(prompt):
        taken = {place for places in prompt.labels for place in places}
        pool = [place for place in range(1, prompt.query) if place not in taken]
        drawn = random.Random(str(prompt.input_ids)).sample(pool, len(prompt.labels))
        return replace(prompt, labels=tuple((place,) for place in drawn))

    assert failed(change=astray) >= {GATHER, READ, HURT, LAST, TELL}


def test_label_words_of_one_another(failed):
    """The places are right and the classes are not: only what is told by class can fail."""
    found = failed(
        change=lambda prompt: replace(prompt, classes=(*prompt.classes[1:], prompt.classes[0]))
    )
    assert {TELL} <= found <= {TELL, LATE}


def weights_alone(model, batch, labels, reduce, what):
    """In the place of attention times gradient: something of the attention alone."""

    def watch(layer, weights, value, output):
        reduce(layer, what(weights))
        return output

    with frozen(model), torch.no_grad(), instrument(model, Edit(after=watch)):
        model(**batch.inputs(), use_cache=False)


def test_attention_without_gradients(failed, monkeypatch):
    """The head that looks at label words early, and writes nothing, is then taken for a reader."""
    monkeypatch.setattr(saliency, "_backward", partial(weights_alone, what=torch.clone))
    assert failed() == {GATHER}


def test_every_edge_alike(failed, monkeypatch):
    monkeypatch.setattr(saliency, "_backward", partial(weights_alone, what=torch.ones_like))
    assert failed() == {GATHER, READ}


def test_gradients_of_any_answer(failed, monkeypatch):
    """A loss that no answer lowers has no gradient."""
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda scores, *_, **__: (scores * 0).sum()
    )
    assert failed() == {GATHER, READ}


def test_predictions_of_other_prompts(failed, monkeypatch):
    draw = np.random.default_rng(0)

    def shuffled(attention, predicted):
        return reading(attention, draw.permutation(predicted))

    monkeypatch.setattr(analyses, "reading", shuffled)
    assert {TELL} <= failed() <= {TELL, LATE}


def test_isolation_that_hurts_anyone(failed, monkeypatch):
    """Where random tokens are cut off no less than label words, label words are nothing special."""
    monkeypatch.setattr(analyses, "isolated", lambda prompt, what, seed: isolated(prompt, "labels"))
    assert failed() == {HURT}


@pytest.mark.parametrize(
    ("layers", "wrong"),
    [
        ((4, 2, 3), {GATHER, READ, HURT, LAST}),  # all of it in the deeper half
        ((4, 0, 1), {READ, TELL, LATE}),  # all of it in the first half
    ],
    ids=["late", "early"],
)
def test_a_model_whose_flows_are_elsewhere(failed, planted, layers, wrong):
    assert failed(planted.make_model(*layers)) == wrong


def test_a_model_that_says_the_latest_label(failed, planted):
    """Without its gathering the model answers all the same; nothing is judged of it."""
    model = planted.make_model(4, 0, 2)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight.zero_()
    assert failed(model) == {GATE} | FLOWS
