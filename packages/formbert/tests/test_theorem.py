"""What each fusion can and cannot do to a ranking, with random weights (method page, section 0)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from formbert.formations import NAMES
from formbert.fusion import agreement
from formbert.inventory import Inventory
from formbert.lexicon import mini_instances, mini_inventory
from formbert.scoring import score

SOME = mini_instances()["test_words"][::7]
INTERACTING = ("token", "pooled_mlp", "bilinear", "matrix", "agreement")


def rankings(made, instances=SOME):
    items = made.reader.read(instances)
    return [one.scores.argmax() for one in score(made.model, made.reader, items)]


def margins(made, instances=SOME):
    items = made.reader.read(instances)
    return np.array(
        [one.scores[0] - one.scores[1] for one in score(made.model, made.reader, items)]
    )


@pytest.mark.parametrize("source", ["predicted", "soft"])
@pytest.mark.parametrize("seed", range(3))
def test_adding_one_predicted_formation_changes_no_ranking(make, source, seed):
    """All candidates get the same vector, and the classifier is linear: one shift for all."""
    added = make(fusion=("pooled_add",), formation_source=source, predictor="mean", seed=seed)
    with_formation = margins(added)
    with torch.no_grad():
        added.model.formation_embedding.weight.zero_()
    assert np.allclose(margins(added), with_formation, atol=1e-5)


def test_the_shift_itself_is_not_zero(make):
    """Else the theorem's test would hold of a fusion that does nothing."""
    added = make(fusion=("pooled_add",), formation_source="predicted", predictor="mean")
    items = added.reader.read(SOME)
    before = np.concatenate([one.scores for one in score(added.model, added.reader, items)])
    with torch.no_grad():
        added.model.formation_embedding.weight.zero_()
    after = np.concatenate([one.scores for one in score(added.model, added.reader, items)])
    assert np.abs(before - after).max() > 0.1


def test_adding_annotations_is_a_prior_by_formation(make):
    """The score of a sense moves by one number for its formation, whatever the context."""
    made = make(fusion=("pooled_add",), formation_source="annotation", predictor="none")
    moved = {}
    items = made.reader.read(SOME)
    with_formation = score(made.model, made.reader, items)
    with torch.no_grad():
        made.model.formation_embedding.weight.zero_()
    for item, one, plain in zip(
        items, with_formation, score(made.model, made.reader, items), strict=True
    ):
        for sense, shift in zip(item.candidates, one.scores - plain.scores, strict=True):
            moved.setdefault(made.reader.senses[sense].formation, []).append(shift)
    assert len(moved) > 3
    assert all(np.ptp(shifts) < 1e-5 for shifts in moved.values())


@pytest.mark.parametrize("fusion", INTERACTING)
def test_every_other_fusion_interacts(make, fusion):
    """Annotated formations move the margin of two senses differently in different contexts."""
    made = make(fusion=(fusion,), formation_source="annotation", predictor="span")
    bare = Inventory(replace(one, formation=None) for one in mini_inventory().senses)
    without = make(
        fusion=(fusion,), formation_source="annotation", predictor="span", inventory=bare
    )
    words = {one.word for one in SOME}
    moved = margins(made) - margins(without)
    spread = [np.ptp(moved[[one.word == word for one in SOME]]) for word in words]
    assert np.median(spread) > 1e-4
    if fusion != "agreement":
        assert rankings(made) != rankings(without)


def test_agreement_by_hand():
    posterior = torch.tensor([[0.5, 0.3, 0.2]])
    known = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    split = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    assert agreement(posterior, known).item() == pytest.approx(0.3)
    assert agreement(posterior, split).item() == pytest.approx(0.25 + 0.05 + 0.25 / 3)


def test_an_unknown_formation_agrees_with_all_alike():
    posterior = torch.rand(4, len(NAMES)).softmax(1)
    unknown = torch.zeros(4, len(NAMES) + 1)
    unknown[:, -1] = 1
    assert agreement(posterior, unknown) == pytest.approx([1 / len(NAMES)] * 4)
