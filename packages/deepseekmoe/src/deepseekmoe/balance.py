"""What keeps the experts' load even: the paper's two losses, those of its successors, and the bias.

All losses come without their alpha, are ordinary terms for autograd, and leave padding out. At perfect
balance the expert-level, device-level and communication losses are 1.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from octavo.errors import ConfigError
from torch import Tensor

from deepseekmoe.routing import count_experts

Scope = Literal["sequence", "batch", "global"]


def expert_balance_loss(
    scores: Float[Tensor, "tokens experts"],
    ids: Int[Tensor, "tokens slots"],
    *,
    mask: Bool[Tensor, " tokens"] | None = None,
    sequence_ids: Int[Tensor, " tokens"] | None = None,
    sequences: int | None = None,
    scope: Scope = "batch",
    group: Any = None,
) -> Float[Tensor, ""]:
    """Sum over experts of f_i P_i (eqs 12-14).

    f_i is the expert's share of the chosen slots times E, without gradient; P_i its mean score over
    all tokens, chosen or not.

    Args:
        scores: s of all experts.
        ids: the chosen experts.
        mask: which tokens count; all by default.
        sequence_ids: to which sequence each token belongs, from 0; for scope "sequence".
        sequences: how many there are; by default the device is asked, and waited for.
        scope: statistics of each sequence and then their mean (the released code's default), of the
            whole batch, or f of all processes' batches together and P of this one's, so that the
            processes' losses, weighted by their tokens, sum up to the loss of all tokens.
        group: process group of the scope "global"; all processes by default.

    Raises:
        ConfigError: the scope is "sequence" and no sequences are given.
    """
    frequency, mean, size = _statistics(scores, ids, mask, sequence_ids, sequences, scope, group)
    return _over_sequences((frequency * mean).sum(dim=-1), size)


def device_balance_loss(
    scores: Float[Tensor, "tokens experts"],
    ids: Int[Tensor, "tokens slots"],
    device_of_expert: Int[Tensor, " experts"],
    *,
    mask: Bool[Tensor, " tokens"] | None = None,
    sequence_ids: Int[Tensor, " tokens"] | None = None,
    sequences: int | None = None,
    scope: Scope = "batch",
    group: Any = None,
) -> Float[Tensor, ""]:
    """Sum over devices of f'_i P'_i (eqs 15-17): f' is a mean over a device's experts, P' a sum.

    Args:
        scores: s of all experts.
        ids: the chosen experts.
        device_of_expert: on which device each expert lies, from 0.
        mask: which tokens count.
        sequence_ids: to which sequence each token belongs.
        sequences: how many there are.
        scope: as in `expert_balance_loss`.
        group: as in `expert_balance_loss`.
    """
    frequency, mean, size = _statistics(scores, ids, mask, sequence_ids, sequences, scope, group)
    members = _members(device_of_expert).to(scores.dtype)
    per_device = (frequency @ members / members.sum(dim=0)) * (mean @ members)
    return _over_sequences(per_device.sum(dim=-1), size)


def communication_loss(
    scores: Float[Tensor, "tokens experts"],
    ids: Int[Tensor, "tokens slots"],
    device_of_expert: Int[Tensor, " experts"],
    devices_per_token: int,
    *,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """DeepSeek-V2's third loss: how evenly devices receive tokens, once for each token they get.

    Args:
        scores: s of all experts.
        ids: the chosen experts.
        device_of_expert: on which device each expert lies.
        devices_per_token: M, to how many devices a token is sent at the most.
        mask: which tokens count.
    """
    members = _members(device_of_expert)
    there = torch.ones(len(ids), dtype=torch.bool, device=ids.device) if mask is None else mask
    chosen = torch.zeros(len(ids), len(device_of_expert) + 1, dtype=torch.bool, device=ids.device)
    chosen = chosen.scatter(-1, ids, True)[:, :-1]  # behind the last: dropped slots
    sent = (chosen.to(scores.dtype) @ members.to(scores.dtype) > 0) & there[:, None]
    tokens = there.sum().clamp_min(1)
    frequency = sent.sum(dim=0) * members.shape[1] / (devices_per_token * tokens)
    mean = (scores * there[:, None]).sum(dim=0) / tokens
    return (frequency * (mean @ members.to(scores.dtype))).sum()


def router_z_loss(
    logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean of squared logsumexp, which keeps logits small (ST-MoE)."""
    squares = logits.float().logsumexp(dim=-1) ** 2
    if mask is None:
        return squares.mean()
    return (squares * mask).sum() / mask.sum().clamp_min(1)


def device_map(experts: int, devices: int, device: Any = None) -> Int[Tensor, " experts"]:
    """Experts in equal, contiguous groups, one a device."""
    return torch.arange(experts, device=device) // (experts // devices)


@torch.no_grad()
def update_bias(
    bias: Float[Tensor, "*layers experts"], counts: Int[Tensor, "*layers experts"], rate: float
) -> None:
    """One step of auxiliary-loss-free balancing, in place: b_i += u sign(mean count - count_i)."""
    counts = counts.to(bias)
    bias += rate * (counts.mean(dim=-1, keepdim=True) - counts).sign()


def relative_load(counts: Int[Tensor, "*layers experts"]) -> Float[Tensor, "*layers experts"]:
    """Each expert's share of the slots times the number of experts; 1 is the mean load."""
    counts = counts.double()
    return counts / counts.mean(dim=-1, keepdim=True).clamp_min(1e-12)


def max_violation(counts: Int[Tensor, "*layers experts"]) -> Float[Tensor, "*layers"]:
    """MaxVio: the largest load over the mean load, minus 1; 0 is perfect balance."""
    return relative_load(counts).amax(dim=-1) - 1


def _members(device_of_expert: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(device_of_expert.long())


def _statistics(
    scores: Tensor, ids: Tensor, mask: Tensor | None, sequence_ids: Tensor | None,
    sequences: int | None, scope: Scope, group: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """F without and P with gradient, and how many tokens they are of.

    [experts], [experts] and []; for the scope "sequence" [sequences, experts] twice and [sequences].
    """
    tokens, experts = scores.shape
    slots = ids.shape[-1]
    there = torch.ones(tokens, dtype=torch.bool, device=ids.device) if mask is None else mask
    if scope == "sequence":
        if sequence_ids is None:
            raise ConfigError("the scope 'sequence' needs to know each token's sequence")
        many = sequences or (int(sequence_ids.max()) + 1 if tokens else 1)
        place = sequence_ids[:, None] * experts + ids
        chosen = place.masked_fill(~there[:, None] | (ids >= experts), many * experts)
        ones = torch.ones_like(chosen.flatten())
        counts = torch.zeros(many * experts + 1, dtype=torch.long, device=ids.device)
        counts = counts.scatter_add(0, chosen.flatten(), ones)[:-1].view(many, experts)
        size = torch.zeros(many, device=ids.device).index_add(0, sequence_ids, there.float())
        total = torch.zeros(many, experts, device=scores.device, dtype=scores.dtype)
        total = total.index_add(0, sequence_ids, scores * there[:, None])
        each = size.clamp_min(1)[:, None]
        frequency = counts * (experts / slots) / each
        return frequency.to(scores.dtype), total / each, size
    counts, size = count_experts(ids, experts, there), there.sum()
    mean = (scores * there[:, None]).sum(dim=0) / size.clamp_min(1)
    if scope == "global" and torch.distributed.is_initialized():
        both = torch.cat([counts, size[None]])
        torch.distributed.all_reduce(both, group=group)
        counts, size = both[:-1], both[-1]
    frequency = counts * (experts / slots) / size.clamp_min(1)
    return frequency.to(scores.dtype), mean, size


def _over_sequences(values: Tensor, size: Tensor) -> Tensor:
    """The mean over sequences that have a token; one value stays as it is."""
    if not values.dim():
        return values
    present = size > 0
    return (values * present).sum() / present.sum().clamp_min(1)
