"""Losses against hand-worked numbers, loops, and gradients against finite differences."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from formbert.config import ObjectiveOptions
from formbert.lexicon import mini_instances
from formbert.objectives import (
    LOWEST,
    TAU,
    binary_loss,
    listed,
    listmle_loss,
    listnet_loss,
    listwise_loss,
    pair_loss,
)
from formbert.teacher import gloss_vectors, likeness
from formbert.training import IGNORED, Lessons, temperature
from octavo.runtime import Runtime

CPU = Runtime(device="cpu")
SCORES = torch.tensor([[2.0, 1.0, LOWEST], [0.5, -1.0, 0.0], [3.0, LOWEST, LOWEST]])
GOLD = torch.tensor([[False, True, False], [True, False, True], [True, False, False]])
ALL = torch.tensor([True, True, False])


def test_pairs_become_rows():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = listed(values, torch.tensor([0, 0, 2, 2]), 3, -9.0)
    assert rows.tolist() == [[1, 2], [-9, -9], [3, 4]]


def test_pairs_of_right_and_wrong():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    gold = torch.tensor([True, False])
    wanted = (-math.log(0.75) - math.log(0.5)) / 2
    assert pair_loss(logits, gold).item() == pytest.approx(wanted)
    assert binary_loss(logits[:, 1] - logits[:, 0], gold).item() == pytest.approx(wanted)


def test_listwise_by_hand():
    """A sense alone has nothing to lose to, and several right ones count together."""
    first = -math.log(math.exp(1) / (math.exp(2) + math.exp(1)))
    total = math.exp(0.5) + math.exp(-1) + 1
    second = -math.log((math.exp(0.5) + 1) / total)
    assert listwise_loss(SCORES, GOLD).item() == pytest.approx((first + second) / 2, rel=1e-5)
    weights = torch.tensor([1.0, 3.0, 9.0])
    wanted = (first + 3 * second) / 4
    assert listwise_loss(SCORES, GOLD, weights).item() == pytest.approx(wanted, rel=1e-5)


def test_listnet_by_a_loop():
    alike = torch.tensor([[1.0, 0.9, LOWEST], [0.2, 1.0, 0.3], [1.0, LOWEST, LOWEST]])
    wanted = 0.0
    for scores, near in ((SCORES[0][:2], alike[0][:2]), (SCORES[1], alike[1])):
        teacher = np.exp(near.numpy() / TAU) / np.exp(near.numpy() / TAU).sum()
        model = scores.numpy() - np.log(np.exp(scores.numpy()).sum())
        wanted -= float((teacher * model).sum()) / 2
    assert listnet_loss(SCORES, alike, ALL).item() == pytest.approx(wanted, rel=1e-4)


def test_listmle_is_the_probability_of_the_teachers_order():
    """With equal weights the loss is -log of the order's Plackett-Luce probability over its length."""
    scores = torch.tensor([[0.3, -0.2, 1.0]])
    chances = []
    for order in permutations(range(3)):
        values = scores[0][list(order)].exp()
        chances.append(math.prod(float(values[k] / values[k:].sum()) for k in range(3)))
    assert sum(chances) == pytest.approx(1)
    near = torch.tensor([[2e-9, 1e-9, 3e-9]])  # almost equal: weights of a third, order 2, 0, 1
    values = scores[0][[2, 0, 1]].exp()
    wanted = -sum(math.log(float(values[k] / values[k:].sum())) for k in range(3)) / 3
    found = listmle_loss(scores, near, torch.tensor([True])).item()
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("loss", [listnet_loss, listmle_loss])
def test_gradients_of_ranking_losses(loss):
    torch.manual_seed(0)
    scores = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    alike = torch.rand(3, 4).double()

    def value(x):
        # the losses compute in float32, as a mixed-precision run does
        rows = x.float()
        return loss(rows, alike.float(), torch.ones(3, dtype=torch.bool)).double()

    analytic = torch.autograd.grad(value(scores), scores)[0]
    step, numeric = 1e-2, torch.zeros_like(scores)
    with torch.no_grad():
        for place in np.ndindex(*scores.shape):
            change = torch.zeros_like(scores)
            change[place] = step
            numeric[place] = (value(scores + change) - value(scores - change)) / (2 * step)
    assert torch.allclose(analytic, numeric, atol=2e-3)


def lessons(made, **options):
    parts = mini_instances()["train"][:40:5]
    return Lessons(made.reader, made.reader.read(parts), ObjectiveOptions(**options), CPU)


def test_a_batch_holds_all_candidates_and_what_is_right(make):
    taught = lessons(make(), annotation_drop=0.0)
    order = [3, 0, 7, 5, 1]
    batch = taught.batch(order)
    assert batch["text"].tolist() == [text for text in range(5) for _ in range(2)]
    assert batch["gold"].sum() == 5
    gold = [taught.reader.number[taught.items[k].instance.gold[0]] for k in order]
    formations = [taught.reader.senses[sense].formation for sense in gold]
    assert len(set(formations)) > 1
    assert batch["labels"].tolist() == formations
    assert batch["inputs"]["known"].all()


def test_annotations_are_dropped_at_their_share(make):
    torch.manual_seed(0)
    taught = lessons(make(), annotation_drop=0.3)
    kept = torch.cat([taught.batch(range(8))["inputs"]["known"] for _ in range(60)]).float().mean()
    assert kept == pytest.approx(0.7, abs=0.05)


def test_in_a_batch_every_gloss_is_a_candidate_of_every_text(make):
    taught = lessons(make(arch="bi"), objective="in-batch")
    batch = taught.batch(range(8))
    senses = len(set(batch["inputs"]["sense"].tolist()))
    assert len(batch["text"]) == 8 * senses
    assert batch["gold"].sum() == 8


def test_noise_adds_wrong_senses_of_other_words(make):
    torch.manual_seed(0)
    plain, noisy = lessons(make()), lessons(make(), gloss_noise=2.0)
    more = [
        len(noisy.batch(range(8))["text"]) - len(plain.batch(range(8))["text"]) for _ in range(20)
    ]
    assert np.mean(more) / 8 == pytest.approx(2.0, abs=0.4)
    batch = noisy.batch(range(8))
    assert batch["gold"].sum() == 8
    assert batch["text"].tolist() == sorted(batch["text"].tolist())


def test_rare_senses_weigh_more_when_balanced(make):
    made = make()
    rows = [one for one in mini_instances()["train"] if one.word == "存款"]
    some = [one for one in rows if one.gold == ("存款_01",)][:3]
    some += [one for one in rows if one.gold == ("存款_02",)][:1]
    taught = Lessons(made.reader, made.reader.read(some), ObjectiveOptions(balanced=True), CPU)
    assert taught.weights == pytest.approx([4 / 3, 4 / 3, 4 / 3, 4])


def test_a_sense_without_an_annotation_teaches_the_predictor_nothing(make):
    taught = lessons(make())
    taught.labels[:] = IGNORED
    assert taught.loss(taught_model := make().model, taught.batch([0, 1])).isfinite()
    assert taught_model is not None


def test_the_teacher_finds_like_glosses():
    glosses = ["把钱存进银行", "存在银行里的钱", "房子后面的门"]
    vectors = gloss_vectors(glosses, "ngrams")
    same, near, far = likeness(vectors, [0, 0, 0], [0, 1, 2])
    assert same == pytest.approx(1)
    assert same > near > far


def test_an_encoder_may_teach(encoder):
    vectors = gloss_vectors(["把钱存进银行", "存在银行里的钱"], str(encoder), CPU)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert likeness(vectors, [0], [0]) == pytest.approx([1], abs=1e-5)


def test_the_temperature_makes_the_right_senses_most_probable(make):
    """Right 40 times, wrong 10, and once more as a prior: odds of 40 to 11, whatever the scale."""
    from formbert.scoring import Scored

    made = make()
    items = made.reader.read(mini_instances()["dev"][:50])
    scored = []
    for place, item in enumerate(items):
        right = [made.reader.number[name] for name in item.instance.gold]
        first = item.candidates.index(right[0])
        scores = np.zeros(2)
        scores[first if place % 5 else 1 - first] = 10.0
        scored.append(Scored(scores, None))
    assert temperature(scored, items, made.reader) == pytest.approx(
        10 / math.log(40 / 11), rel=1e-3
    )
