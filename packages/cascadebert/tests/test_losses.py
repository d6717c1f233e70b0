from functools import partial

import pytest
import torch
from cascadebert.config import Objective
from cascadebert.losses import (
    confidence,
    dar_loss,
    distill_loss,
    exit_losses,
    gatekeeper_loss,
    joint_loss,
    online_difficulty,
)
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy


def logits_of(items=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, classes, generator=generator, dtype=torch.float64, requires_grad=True)


def test_regularization_by_hand():
    sure, hard = torch.tensor([0.9, 0.6, 0.8]), torch.tensor([0, 1, 1])
    # pairs (0, 1) and (0, 2): 0.5 - 0.3 and 0.5 - 0.1
    assert dar_loss(sure, hard, 0.5).item() == pytest.approx((0.2 + 0.4) / 2)
    assert dar_loss(sure, hard, 0.2).item() == pytest.approx((0.0 + 0.1) / 2)


def test_regularization_takes_any_number_of_levels():
    sure, hard = torch.tensor([0.5, 0.7, 0.6]), torch.tensor([2, 0, 1])
    # (1, 2): 0.1, (1, 0): 0.2, (2, 0): 0.1
    assert dar_loss(sure, hard, 0.5).item() == pytest.approx((0.4 + 0.3 + 0.4) / 3)


def test_a_batch_of_one_level_has_no_loss_and_a_gradient():
    sure = torch.tensor([0.5, 0.7], requires_grad=True)
    for pairing in ("all", "sampled"):
        loss = dar_loss(sure, torch.zeros(2), 0.5, pairing, torch.Generator())
        loss.backward()
        assert loss.item() == 0
    assert sure.grad is not None
    assert sure.grad.tolist() == [0, 0]


def test_sampled_pairs_draw_a_harder_item_for_each_easier_one():
    sure, hard = torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([0, 0, 1, 1])
    values = {
        round(dar_loss(sure, hard, 1.0, "sampled", torch.Generator().manual_seed(seed)).item(), 6)
        for seed in range(60)
    }
    gaps = {first: [first - second for second in (0.6, 0.5)] for first in (0.9, 0.8)}
    assert values == {round(1 - (a + b) / 2, 6) for a in gaps[0.9] for b in gaps[0.8]}
    once, twice = (dar_loss(sure, hard, 1.0, "sampled", torch.Generator().manual_seed(3))
                   for _ in range(2))  # fmt: skip
    assert once == twice
    mean = torch.tensor([
        dar_loss(sure, hard, 1.0, "sampled", torch.Generator().manual_seed(seed)).item()
        for seed in range(400)
    ]).mean()  # fmt: skip
    assert mean.item() == pytest.approx(dar_loss(sure, hard, 1.0).item(), abs=0.01)


def test_with_two_classes_half_a_margin_is_never_met():
    """Section 1.4: confidence lies in [0.5, 1], so the hinge stays active and the loss is linear."""
    for seed in range(20):
        sure = confidence(logits_of(8, 2, seed).detach())
        hard = torch.tensor([0, 1] * 4)
        gaps = sure[hard == 0].mean() - sure[hard == 1].mean()
        assert dar_loss(sure, hard, 0.5).item() == pytest.approx(0.5 - gaps.item())


def test_gradients():
    hard, labels = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 1, 2, 0, 1, 2])
    logits, teacher = logits_of(), logits_of(seed=1).detach()
    assert gradcheck(lambda x: dar_loss(confidence(x), hard, 0.37), logits)
    assert gradcheck(lambda x: gatekeeper_loss(x, labels, 0.3), logits)
    assert gradcheck(lambda x: distill_loss(x, teacher, 2.0), logits)
    assert gradcheck(lambda x: exit_losses([x, 2 * x], labels, [x[:, 0]]), logits)
    steps: list[tuple[Objective, int]] = [("weighted", 1), ("alternating", 1), ("alternating", 2)]
    for objective, step in steps:
        each = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
        assert gradcheck(partial(joint_loss, objective=objective, step=step), each)


def test_difficulty_of_the_moment():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    levels = online_difficulty(logits, torch.tensor([0, 0]))
    assert levels.tolist() == [0, 1]
    assert not levels.requires_grad


def test_gatekeeper_by_hand():
    logits, labels = torch.log(torch.tensor([[0.8, 0.2], [0.6, 0.4]])), torch.tensor([0, 1])
    flat = 0.6 * torch.log(torch.tensor(1.2)) + 0.4 * torch.log(torch.tensor(0.8))
    expected = (0.3 * -torch.log(torch.tensor(0.8)) + 0.7 * flat) / 2
    assert gatekeeper_loss(logits, labels, 0.3).item() == pytest.approx(expected.item())


def test_distillation_is_zero_at_the_teacher():
    logits = logits_of()
    assert distill_loss(logits, logits.detach()).item() == pytest.approx(0, abs=1e-12)
    assert distill_loss(logits, -logits.detach()).item() > 0


def test_exits_weigh_as_their_layer():
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    exits = [logits_of(seed=seed).detach() for seed in range(3)]
    each = [cross_entropy(exit, labels).item() for exit in exits]
    losses = exit_losses(exits, labels)
    assert losses.tolist() == pytest.approx(each)
    expected = (each[0] + 2 * each[1] + 3 * each[2]) / 6
    assert joint_loss(losses, "weighted", 1).item() == pytest.approx(expected)
    for step, alternating in ((1, each[2]), (2, sum(each)), (3, each[2])):
        assert joint_loss(losses, "alternating", step).item() == pytest.approx(alternating)


def test_learning_to_exit_by_hand():
    """Right and sure, right and unsure, wrong and unsure: certainties 0.9, 0.5 and 0.5."""
    early = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    labels, certainty = torch.tensor([0, 0, 1]), torch.logit(torch.tensor([0.9, 0.5, 0.5]))
    plain = exit_losses([early, early], labels)
    learned = exit_losses([early, early], labels, [certainty])
    assert (learned - plain).tolist() == pytest.approx([(0.01 + 0.25 + 0.25) / 3, 0.0])
