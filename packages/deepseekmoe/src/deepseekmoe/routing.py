"""Which experts see a token, and with what weight: pure functions of the router's logits.

The paper's gate (eqs 9-11): a softmax over the routed experts, the K' largest kept as they are. What
later models changed are options: sigmoid scores, a bias that only selects, groups, renormalisation.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from octavo.errors import ConfigError
from torch import Tensor

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]


class Routing(NamedTuple):
    """What a router decided for T tokens among E experts.

    Attributes:
        ids: the chosen experts, [T, K] int64; E itself stands for a slot that was dropped.
        weights: gates g of the chosen experts, [T, K] float32.
        scores: s of all experts, [T, E] float32, before any bias or mask.
    """

    ids: Int[Tensor, "tokens slots"]
    weights: Float[Tensor, "tokens slots"]
    scores: Float[Tensor, "tokens experts"]


class Groups(NamedTuple):
    """Selection limited to the best groups of experts (devices or nodes).

    Attributes:
        many: groups of equal size.
        kept: groups that a token may choose from.
        by: a group's worth is its best score (DeepSeek-V2) or the sum of its two best (V3).
    """

    many: int
    kept: int
    by: GroupScore = "max"


def route(
    logits: Float[Tensor, "tokens experts"],
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    normalize: bool = False,
    bias: Float[Tensor, " experts"] | None = None,
    groups: Groups | None = None,
    scale: float = 1.0,
    disable_top: int = 0,
) -> Routing:
    """Choose K experts a token.

    Args:
        logits: u_t . e_i of the routed experts.
        top_k: experts a token (K').
        scoring: softmax over all experts (eq. 10 of the paper), or a sigmoid each (DeepSeek-V3).
        normalize: divide the kept gates by their sum; the paper does not.
        bias: added to the scores for selection alone (auxiliary-loss-free balancing, 2408.15664).
        groups: select within the best groups only.
        scale: factor of the gates.
        disable_top: mask so many of a token's most probable experts before selecting (the paper's
            Figure 4); the bias makes none more probable.

    Raises:
        ConfigError: fewer experts remain than are to be chosen.
    """
    check_selection(logits.shape[-1], top_k, groups, disable_top)
    scores = logits.softmax(dim=-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias
    if disable_top:
        best = scores.topk(disable_top, dim=-1).indices
        choice = choice.scatter(-1, best, -torch.inf)
    if groups is not None:
        choice = choice.masked_fill(~_in_best_groups(choice, groups), -torch.inf)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return Routing(ids, weights.float() * scale, scores.float())


def check_selection(
    experts: int, top_k: int, groups: Groups | None = None, disable_top: int = 0
) -> None:
    """Refuse to choose more experts than a token may choose from.

    Raises:
        ConfigError: fewer experts remain than are to be chosen, wherever the disabled ones lie.
    """
    room = experts if groups is None else groups.kept * (experts // groups.many)
    if 1 <= top_k <= room - disable_top:
        return
    within = "" if groups is None else f" in {groups.kept} of {groups.many} groups"
    without = f" with {disable_top} disabled" if disable_top else ""
    raise ConfigError(f"{top_k} experts a token of {room}{within}{without}: choose fewer")


def _in_best_groups(
    choice: Float[Tensor, "tokens experts"], groups: Groups
) -> Bool[Tensor, "tokens experts"]:
    """Which experts lie in a token's best groups."""
    tokens, experts = choice.shape
    grouped = choice.view(tokens, groups.many, experts // groups.many)
    if groups.by == "max":
        worth = grouped.amax(dim=-1)
    else:
        worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    best = worth.topk(groups.kept, dim=-1).indices
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
    return kept.repeat_interleave(experts // groups.many, dim=-1)


def hash_route(
    token_ids: Int[Tensor, " tokens"], top_k: int, experts: int, seed: int = 0
) -> Routing:
    """Experts by a fixed random hash of the token id, each with gate 1/K (Roller et al., 2021).

    Args:
        token_ids: of the vocabulary.
        top_k: experts a token.
        experts: how many there are.
        seed: another seed is another hash; each layer has its own.
    """
    # splitmix64's finaliser in 64-bit integers that wrap around: the same on every device
    mixed = token_ids.long() * 0x1E3779B97F4A7C15 + _wrapped((seed + 1) * 0x3F58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> 30)) * 0x14D049BB133111EB
    mixed = mixed ^ (mixed >> 27)
    first = (mixed & 0x7FFFFFFF) % experts
    step = 1 + (mixed >> 33 & 0x3FFFFFFF) % max(1, experts - 1)
    # distinct for every K where the step and the number of experts share no factor; else neighbours
    step = torch.where(torch.gcd(step, torch.full_like(step, experts)) == 1, step, 1)
    ids = (first[:, None] + step[:, None] * torch.arange(top_k, device=first.device)) % experts
    weights = torch.full(ids.shape, 1.0 / top_k, device=ids.device)
    scores = torch.zeros(len(ids), experts, device=ids.device).scatter(-1, ids, 1.0 / top_k)
    return Routing(ids, weights, scores)


def _wrapped(value: int) -> int:
    """A whole number as 64 bits with a sign hold it."""
    return (value + 2**63) % 2**64 - 2**63


def limit_capacity(
    routing: Routing, factor: float, mask: Bool[Tensor, " tokens"] | None = None
) -> Routing:
    """Drop what exceeds an expert's capacity, the weakest gates first.

    For training alone: whether a token is dropped depends on those behind it too.

    Args:
        routing: of T tokens.
        factor: an expert takes at most ceil(factor * T * K / E) slots.
        mask: which tokens are real; others take no capacity, and are dropped.

    Returns:
        The routing with dropped slots' ids set to E and their gates to 0.
    """
    tokens, slots = routing.ids.shape
    experts = routing.scores.shape[-1]
    if mask is not None:
        tokens = int(mask.sum())
        routing = routing._replace(ids=routing.ids.masked_fill(~mask[:, None], experts))
    capacity = -int(-factor * tokens * slots // experts)
    ids, weights = routing.ids.flatten(), routing.weights.flatten()
    order = torch.sort(weights.detach(), descending=True, stable=True).indices
    order = order[torch.sort(ids[order], stable=True).indices]  # by expert, strongest first
    starts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device)
    starts[1:] = count_experts(routing.ids, experts).cumsum(0)
    place = torch.empty_like(ids)
    place[order] = torch.arange(len(ids), device=ids.device) - starts[ids[order]]
    dropped = ((place >= capacity) | (ids == experts)).view_as(routing.ids)
    return Routing(
        routing.ids.masked_fill(dropped, experts),
        routing.weights.masked_fill(dropped, 0.0),
        routing.scores,
    )


def count_experts(
    ids: Int[Tensor, "tokens slots"], experts: int, mask: Bool[Tensor, " tokens"] | None = None
) -> Int[Tensor, " experts"]:
    """How many slots chose each expert; masked tokens and dropped slots do not count."""
    chosen = ids if mask is None else ids.masked_fill(~mask[:, None], experts)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device)
    ones = torch.ones((), dtype=torch.long, device=ids.device).expand(chosen.numel())
    return counts.scatter_add(0, chosen.flatten(), ones)[:experts]
