"""Every analysis finds the flows of a model in which they were set by hand, and finds no others."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from anchors.analyses import block_rows, flow_rows, isolate, read_tables
from anchors.blocking import block
from anchors.evaluate import label_loyalty, predict
from anchors.reading import target_attention
from anchors.saliency import saliency, saliency_matrices

#: Layers, which of them gathers and which reads.
PLACES = [(2, 0, 1), (4, 1, 3)]
COUNT = 50


@dataclass
class World:
    """The model of two layers, prompts of three classes, and what it does with each of them."""

    model: Any
    prompts: list[Any]
    labels: list[int]
    truths: list[Any]


@pytest.fixture(scope="module")
def world(planted):
    prompts, labels = planted.make_prompts(COUNT, 3)
    truths = [planted.work_out(*pair) for pair in zip(prompts, labels, strict=True)]
    return World(planted.make_model(), prompts, labels, truths)


@pytest.fixture(params=PLACES, ids=str)
def placed(request, planted):
    """A model, the layer in which it gathers and that in which it reads."""
    return planted.make_model(*request.param), *request.param[1:]


def scores_without(world, cuts, layer, heads=None):
    """Probabilities of the classes with edges of each prompt, (row, column), cut in one layer."""

    def around(batch):
        count, time = batch.input_ids.shape
        where = torch.zeros(count, time, time, dtype=torch.bool)
        for row, (prompt, shift) in enumerate(zip(batch.prompts, batch.shifts, strict=True)):
            for i, j in cuts[world.prompts.index(prompt)]:
                where[row, i + shift, j + shift] = True
        return block(world.model, where, [layer], heads)

    return np.exp(predict(world.model, world.prompts, 50, around).scores)


def latest(prompt):
    """What the model says where no label word has its topic."""
    return prompt.classes[-1]


# the oracle itself


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_it_learns_in_context(planted, classes):
    model = planted.make_model()
    prompts, labels = planted.make_prompts(COUNT, classes)
    found = predict(model, prompts, 50)
    assert found.accuracy(labels) == 1
    # the label word is the likeliest of all words, under mappings of which hardly two are the same
    right = [prompt.answers[label] for prompt, label in zip(prompts, labels, strict=True)]
    assert found.top[:, 0].tolist() == right
    assert len({prompt.input_ids for prompt in prompts}) == COUNT
    topics = [planted.TOPICS[p.input_ids[planted.work_out(p, 0).own]] for p in prompts]
    named = {*zip(topics, right, strict=True)}
    assert len(named) > 0.6 * planted.WORLD.topics * len(planted.LABELS)


def test_attention_is_what_was_planted(planted, world):
    own = planted.make_model()
    own.set_attn_implementation("eager")
    for prompt, truth in zip(world.prompts[:12], world.truths, strict=False):
        with torch.no_grad():
            weights = own(torch.tensor([prompt.input_ids]), output_attentions=True).attentions
        gather, read = (one[0].numpy() for one in weights)
        assert np.allclose(gather[0], truth.gathered, atol=1e-4)
        assert np.allclose(read[0, -1], truth.read, atol=1e-4)
        for layer in (gather, read):  # the head that writes nothing
            assert np.allclose(layer[1, -1, truth.labels], 1 / 3, atol=1e-4)
        for place, topic in zip(truth.labels, truth.topics, strict=True):
            assert gather[0, place, topic] > 0.25
            words = [j for j in range(place) if gather[0, place, j] > 0.1]
            assert topic in words
            assert 2 <= len(words) <= 3  # words of no topic are looked at just as well


# saliency


def test_saliency_is_what_was_worked_out(world):
    for prompt, label, truth in list(zip(world.prompts, world.labels, world.truths, strict=True))[
        :20
    ]:
        gather, read = saliency_matrices(world.model, prompt, label).numpy()
        assert np.allclose(gather, truth.into, rtol=1e-3, atol=1e-3 * truth.into.max())
        assert np.allclose(read[-1], truth.out, rtol=1e-3, atol=1e-3 * truth.out.max())
        assert read[:-1].max() == 0  # in the last step only the target's row is read


def test_parts_are_what_was_worked_out(world):
    found = saliency(world.model, world.prompts, world.labels, batch_size=16)
    for prompt, truth, parts in zip(world.prompts, world.truths, found, strict=True):
        out = np.zeros_like(truth.into)
        out[-1] = truth.out
        into = np.concatenate([[0.0], *[truth.into[p, :p] for p in truth.labels]])
        assert np.isclose(parts[0, 0], into.sum() / sum(truth.labels), rtol=1e-2)
        assert np.isclose(parts[1, 1], truth.out[truth.labels].mean(), rtol=1e-2)
        count = len(prompt) * (len(prompt) - 1) / 2 - sum(truth.labels) - 3
        rest = truth.into.sum() - into.sum() - truth.into[-1, truth.labels].sum()
        assert np.isclose(parts[0, 2], rest / count, rtol=1e-2)


def test_flows_are_found_in_their_layers(world, placed):
    model, gather, read = placed
    rows = flow_rows(model, world.prompts, world.labels, 50)
    into, out, rest = (np.array([row[part] for row in rows]) for part in ("S_wp", "S_pq", "S_ww"))
    assert into[gather] > 5 * rest[gather] > 0
    assert into[gather] > 1e6 * out[gather]
    assert out[read] > 1e6 * max(rest[read], into[read])
    others = [layer for layer in range(len(rows)) if layer not in (gather, read)]
    for part in (into, out, rest):
        assert not part[others].any()


def test_the_strongest_edges_are_the_planted_ones(world, placed):
    model, gather, read = placed
    for prompt, label, truth in list(zip(world.prompts, world.labels, world.truths, strict=True))[
        :20
    ]:
        flows = saliency_matrices(model, prompt, label)
        right = truth.labels[label]
        assert flows[gather, right].argmax() == truth.topics[label]
        assert flows[gather, -1].argmax() == truth.own
        assert flows[read, -1].argmax() == right
        # nothing that matters comes into the other label words: they are not of this topic
        wrong = [place for place in truth.labels if place != right]
        assert flows[gather, wrong].max() < 0.1 * flows[gather, right].max()
        # words of no topic are looked at and carry nothing
        shown = [truth.own, *truth.topics]
        rest = [j for j in range(len(prompt)) if j not in shown]
        assert flows[gather][:, rest].max() < 1e-5 * flows[gather].max()


def test_the_answer_hangs_on_the_strongest_edge(world):
    """Cutting the one edge that saliency names loses the answer; cutting its neighbours does not."""
    strongest, others = [], []
    for label, truth in zip(world.labels, world.truths, strict=True):
        right, topic = truth.labels[label], truth.topics[label]
        words = [j for j in range(right) if truth.gathered[right, j] > 0.1]
        assert topic in words
        strongest.append([(right, topic)])
        others.append([(right, j) for j in words if j != topic])
    rows = np.arange(COUNT)
    assert scores_without(world, strongest, 0)[rows, world.labels].max() < 0.5
    assert scores_without(world, others, 0)[rows, world.labels].min() > 0.8


def test_a_head_that_does_nothing_is_found_to_do_nothing(world, placed):
    model, gather, read = placed
    found = saliency(model, world.prompts, world.labels, 50, per_head=True)
    assert not found[:, :, 1].any()
    assert (found[:, gather, 0, 0] > 0).all()
    assert (found[:, read, 0, 1] > 0).all()
    rows = flow_rows(model, world.prompts, world.labels, 50, per_head=True)
    assert [row["S_pq"] > 0 for row in rows if row["layer"] == read] == [True, False]


# isolation


def test_isolation_hurts_where_label_words_gather_and_nowhere_else(world, placed):
    model, gather, _ = placed
    before = predict(model, world.prompts, 50)
    for layer in range(model.config.n_layer):
        after = isolate(model, world.prompts, "labels", [layer], batch_size=50)
        kept = label_loyalty(before, after)
        if layer == gather:
            assert after.classes.tolist() == [latest(prompt) for prompt in world.prompts]
            assert abs(kept.mean() - 1 / 3) < 0.15
        else:
            assert kept.all()
        for what in ("random", "format"):
            after = isolate(model, world.prompts, what, [layer], batch_size=50)
            assert label_loyalty(before, after).all()
            assert np.allclose(after.scores, before.scores, atol=1e-3)


def test_the_table_of_isolation(planted, world):
    rows = block_rows(planted.make_model(4, 0, 2), world.prompts, world.labels, 2, batch_size=50)
    isolations = [row for row in rows if "layers" in row]
    loyalty = {(row["isolated"], row["layers"]): row["label loyalty"] for row in isolations}
    assert loyalty.pop(("labels", "first 2")) < 0.5
    assert set(loyalty.values()) == {1.0}
    assert len(loyalty) == 5
    assert rows[0]["accuracy"] == 1
    assert rows[1]["accuracy"] == rows[1]["label loyalty"]


def test_only_the_head_that_gathers_can_be_hurt(world):
    cuts = [[(p, j) for p in truth.labels for j in range(p)] for truth in world.truths]
    hurt, unhurt = (scores_without(world, cuts, 0, [head]).argmax(-1) for head in (0, 1))
    assert hurt.tolist() == [latest(prompt) for prompt in world.prompts]
    assert unhurt.tolist() == world.labels


def test_a_target_that_is_cut_from_label_words_knows_nothing(world):
    pairs = list(zip(world.prompts, world.truths, strict=True))
    cuts = [[(prompt.target, place) for place in truth.labels] for prompt, truth in pairs]
    assert np.allclose(scores_without(world, cuts, 1), 1 / 3, atol=1e-4)
    # where it gathers, it takes nothing from them
    assert (scores_without(world, cuts, 0).argmax(-1) == world.labels).all()
    # cut from one of them it cannot say that one, and still says the others
    for kind in range(3):
        found = scores_without(world, [cut[kind : kind + 1] for cut in cuts], 1)
        for one, label in zip(found, world.labels, strict=True):
            assert (one.argmax() == label) == (kind != label)
            assert one[kind] < 0.25


# reading


def test_reading_is_found_in_its_layer_and_head(world, placed):
    model, _, read = placed
    tables = read_tables(model, world.prompts, world.labels, 50, per_head=True)
    (name, rows), (_, heads) = tables.items()
    assert name.endswith("accuracy 1.000")
    for layer, (row, each) in enumerate(zip(rows, heads, strict=True)):
        if layer == read:
            assert row["AUC"] == each["head 0"] == 1
            assert row["AUC interval"] == "1 to 1"
        else:
            assert abs(row["AUC"] - 0.5) < 0.15
            assert abs(each["head 0"] - 0.5) < 0.15
        assert abs(each["head 1"] - 0.5) < 0.15
        assert (row["R"] > 0.5) == (layer >= read)
    assert rows[-1]["R"] == 1


def test_attention_of_the_target_is_what_was_worked_out(world):
    found = target_attention(world.model, world.prompts, 3, 50)
    for one, truth in zip(found, world.truths, strict=True):
        assert np.allclose(one[0, 0], truth.gathered[-1, truth.labels], atol=1e-4)
        assert np.allclose(one[1, 0], truth.read[truth.labels], atol=1e-4)
        assert np.allclose(one[:, 1], 1 / 3, atol=1e-4)
