"""The balance losses against numbers worked by hand and against loops over the formulas."""

from typing import Any

import pytest
import torch
from deepseekmoe.balance import (
    communication_loss,
    device_balance_loss,
    device_map,
    expert_balance_loss,
    max_violation,
    relative_load,
    router_z_loss,
    update_bias,
)
from octavo.errors import ConfigError

SCORES = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
IDS = torch.tensor([[0, 1], [3, 2], [0, 1]])


def by_the_formula(scores, ids):
    """Equations 12 to 14, a loop each."""
    tokens, experts = scores.shape
    slots = ids.shape[1]
    total = 0.0
    for expert in range(experts):
        chose = sum(expert in row.tolist() for row in ids)
        frequency = experts / (slots * tokens) * chose
        total += frequency * scores[:, expert].mean()
    return total


def test_expert_loss_by_hand():
    # f = 4/(2*3) * [2, 2, 1, 1], P = [1.4, 0.6, 0.5, 0.5] / 3
    wanted = (4 / 6) * (2 * 1.4 + 2 * 0.6 + 0.5 + 0.5) / 3
    assert float(expert_balance_loss(SCORES, IDS)) == pytest.approx(wanted)
    assert float(by_the_formula(SCORES, IDS)) == pytest.approx(wanted)


def test_at_perfect_balance_every_loss_is_one():
    scores = torch.full((4, 4), 0.25)
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    devices = device_map(4, 2)
    assert float(expert_balance_loss(scores, ids)) == pytest.approx(1)
    assert float(device_balance_loss(scores, ids, devices)) == pytest.approx(1)
    even = torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2]])  # two devices a token, of two at the most
    assert float(communication_loss(scores, even, devices, 2)) == pytest.approx(1)


def test_device_loss_is_a_mean_of_f_and_a_sum_of_p():
    f = torch.tensor([2, 2, 1, 1]) * 4 / 6
    p = SCORES.mean(0)
    wanted = f[:2].mean() * p[:2].sum() + f[2:].mean() * p[2:].sum()
    assert device_balance_loss(SCORES, IDS, device_map(4, 2)).allclose(wanted)
    crossed = torch.tensor([0, 1, 0, 1])
    assert not device_balance_loss(SCORES, IDS, crossed).allclose(wanted)


def test_with_one_expert_a_device_both_losses_agree():
    one = expert_balance_loss(SCORES, IDS)
    assert device_balance_loss(SCORES, IDS, torch.arange(4)).allclose(one)


def test_communication_counts_a_device_once_a_token():
    # token 0 goes to device 0 alone (both experts there), token 1 to device 1, token 2 to device 0
    p = SCORES.mean(0)
    wanted = 2 / (1 * 3) * (2 * p[:2].sum() + 1 * p[2:].sum())
    assert communication_loss(SCORES, IDS, device_map(4, 2), 1).allclose(wanted)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    wanted = (torch.log(torch.tensor(2.0)) ** 2 + (1 + torch.log(torch.tensor(2.0))) ** 2) / 2
    assert router_z_loss(logits).allclose(wanted)
    mask = torch.tensor([True, False])
    assert router_z_loss(logits, mask=mask).allclose(torch.log(torch.tensor(2.0)) ** 2)


def random_case(seed=0, tokens=12, experts=6, slots=2):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=draw, dtype=torch.float64)
    return logits, logits.softmax(-1).topk(slots).indices


@pytest.mark.parametrize("loss", ["expert", "device"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_padding_counts_in_nothing(loss, scope):
    logits, ids = random_case()
    scores = logits.softmax(-1)
    mask = torch.ones(12, dtype=torch.bool)
    mask[[3, 7, 8]] = False
    rows = torch.arange(12) // 6
    extra: dict[str, Any] = {"device_of_expert": device_map(6, 3)} if loss == "device" else {}
    function: Any = device_balance_loss if loss == "device" else expert_balance_loss
    options = extra | {"scope": scope}
    padded = function(scores, ids, mask=mask, sequence_ids=rows, **options)
    cut = function(scores[mask], ids[mask], sequence_ids=rows[mask], **options)
    assert padded.allclose(cut)


def test_a_sequence_is_judged_for_itself():
    logits, ids = random_case()
    scores = logits.softmax(-1)
    rows = torch.tensor([0] * 5 + [1] * 7)
    each = [by_the_formula(scores[rows == row], ids[rows == row]) for row in (0, 1)]
    found = expert_balance_loss(scores, ids, sequence_ids=rows, scope="sequence")
    assert float(found) == pytest.approx(float(sum(each)) / 2)
    assert float(found) != pytest.approx(float(expert_balance_loss(scores, ids)))
    empty = torch.where(rows == 1, 2, 0)  # the second of three sequences holds nothing
    assert expert_balance_loss(scores, ids, sequence_ids=empty, scope="sequence").allclose(found)


def test_scope_sequence_needs_sequences():
    with pytest.raises(ConfigError, match="each token's sequence"):
        expert_balance_loss(SCORES, IDS, scope="sequence")


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
def test_gradients(scope):
    logits, ids = random_case()
    rows = torch.arange(12) // 4
    mask = torch.arange(12) != 5

    def losses(logits):
        scores = logits.softmax(-1)
        options = {"mask": mask, "sequence_ids": rows, "scope": scope}
        return (
            expert_balance_loss(scores, ids, **options),
            device_balance_loss(scores, ids, device_map(6, 2), **options),
            communication_loss(scores, ids, device_map(6, 2), 2, mask=mask),
        )

    assert torch.autograd.gradcheck(losses, logits.requires_grad_())
    single = torch.randn(3, 4, dtype=torch.float32, requires_grad=True)
    wanted = torch.autograd.grad((single.logsumexp(-1) ** 2).mean(), single)[0]
    assert torch.autograd.grad(router_z_loss(single), single)[0].allclose(wanted)


def test_the_gradient_pushes_the_busy_expert_down():
    logits = torch.zeros(4, 2, requires_grad=True)
    ids = torch.tensor([[0], [0], [0], [1]])
    expert_balance_loss(logits.softmax(-1), ids).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()  # descent lowers it
    assert (logits.grad[:, 1] < 0).all()


def test_the_bias_moves_against_the_load():
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([10, 0, 5, 5]), 1e-3)
    assert bias.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0])


def test_relative_load():
    counts = torch.tensor([[4, 4, 4, 4], [12, 0, 3, 1], [0, 0, 0, 0]])
    assert relative_load(counts).tolist() == [[1, 1, 1, 1], [3, 0, 0.75, 0.25], [0, 0, 0, 0]]


def test_max_violation():
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])
    assert max_violation(counts).tolist() == pytest.approx([0, 3])
