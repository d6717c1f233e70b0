"""From step scores to rewards of tokens, and from these to advantages."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mathshepherd.config import Shaping


def step_rewards(
    scores: Float[Tensor, "rows steps"],
    ends: Int[Tensor, "rows steps"],
    length: int,
    shaping: Shaping = Shaping(),
) -> Float[Tensor, "rows length"]:
    """The reward of each token: a step's stands at its last one (section 3.5 of the paper).

    Adding raw scores up pays for each further step, so that a policy learns to write more of them; the
    default pays for the change of the score instead, and a repeated step gains nothing.

    Args:
        scores: of the steps, in (0, 1).
        ends: the token each step ends with, from 0; -1 where a row has fewer steps.
        length: tokens in the longest row.
        shaping: what is made of the scores.

    Returns:
        Rewards, 0 at tokens that end no step.
    """
    there = ends >= 0
    scores = scores.float()
    match shaping.shaping:
        case "raw":
            values = scores
        case "center":
            values = scores - shaping.offset
        case "delta":
            before = torch.cat([torch.full_like(scores[:, :1], shaping.prior), scores[:, :-1]], 1)
            values = scores - before
        case "clip":
            values = (scores - shaping.eta).clamp(max=0)
        case "min":
            centred = scores - shaping.offset
            weights = (-centred / shaping.tau).masked_fill(~there, -torch.inf).softmax(1)
            values = torch.nan_to_num(weights) * centred
        case "last":
            count = there.sum(1, keepdim=True)
            values = scores * (torch.arange(scores.shape[1], device=scores.device) == count - 1)
    found = scores.new_zeros(len(scores), length + 1)  # the last place takes what is not there
    found.scatter_(1, torch.where(there, ends, length), torch.where(there, values, 0.0))
    return found[:, :length]


def final_rewards(
    rewards: Float[Tensor, "rows length"],
    lengths: Int[Tensor, " rows"],
    right: Sequence[bool | None],
    answered: Sequence[bool],
    shaping: Shaping,
) -> Float[Tensor, "rows length"]:
    """The rewards with those of the whole response added at its last token.

    Args:
        rewards: of the tokens.
        lengths: tokens in each response.
        right: whether its answer is; None where that is not known.
        answered: whether it has one and came to its end.
        shaping: how much these count.
    """
    last = torch.tensor(
        [shaping.answer_weight * bool(good) - shaping.missing_penalty * (not there)
         for good, there in zip(right, answered, strict=True)],
        device=rewards.device,
    )  # fmt: skip
    return rewards.scatter_add(1, (lengths - 1)[:, None], last[:, None])


def reward_places(
    ends: Int[Tensor, "rows steps"],
    lengths: Int[Tensor, " rows"],
    length: int,
    answered: Sequence[bool],
    shaping: Shaping,
    scored: bool = True,
) -> Bool[Tensor, "rows length"]:
    """The tokens that `step_rewards` and `final_rewards` give a reward to, be it 0.

    Args:
        ends: the token each step ends with; -1 where a row has fewer.
        lengths: tokens in each response.
        length: in the longest.
        answered: whether it has an answer and came to its end.
        shaping: what is made of the scores.
        scored: whether there are scores of steps.
    """
    found = torch.zeros(len(ends), length + 1, dtype=torch.bool, device=ends.device)
    if scored:
        if shaping.shaping == "last":
            ends = ends.amax(1, keepdim=True) if ends.shape[1] else ends
        found.scatter_(1, torch.where(ends >= 0, ends, length), True)
    whole = [
        bool(shaping.answer_weight or (shaping.missing_penalty and not one)) for one in answered
    ]
    found[torch.arange(len(ends)), lengths - 1] |= torch.tensor(whole, device=ends.device)
    return found[:, :length]


def gae(
    rewards: Float[Tensor, "rows length"],
    values: Float[Tensor, "rows length"],
    mask: Bool[Tensor, "rows length"],
    gamma: float = 1.0,
    lam: float = 0.95,
    behind: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows length"]:
    """Generalised advantage estimates (Schulman et al. 2016).

    Args:
        rewards: of the tokens.
        values: before each token.
        mask: where there is one.
        gamma: discount.
        lam: lambda.
        behind: value behind each response's last token; 0 by default.
    """
    found, ahead = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    following = behind = ahead if behind is None else behind
    for place in reversed(range(rewards.shape[1])):
        here = mask[:, place]
        delta = rewards[:, place] + gamma * following - values[:, place]
        ahead = torch.where(here, delta + gamma * lam * ahead, 0.0)
        following = torch.where(here, values[:, place], behind)
        found[:, place] = ahead
    return found


def rewards_to_go(
    rewards: Float[Tensor, "rows length"], gamma: float = 1.0
) -> Float[Tensor, "rows length"]:
    """Discounted sum of each token's reward and all later ones."""
    found, ahead = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for place in reversed(range(rewards.shape[1])):
        ahead = rewards[:, place] + gamma * ahead
        found[:, place] = ahead
    return found


def rloo(
    rewards: Float[Tensor, "rows length"], group: int, gamma: float = 1.0
) -> Float[Tensor, "rows length"]:
    """Rewards to go, less the mean return of the question's other responses (Ahmadian et al. 2024).

    Args:
        rewards: of the tokens; responses of one question stand together.
        group: how many.
        gamma: discount.
    """
    ahead = rewards_to_go(rewards, gamma)
    returns = ahead[:, 0].view(-1, group)
    others = (returns.sum(1, keepdim=True) - returns) / (group - 1)
    return ahead - others.view(-1, 1)


def grpo(
    rewards: Float[Tensor, "rows length"], ends: Bool[Tensor, "rows length"], group: int
) -> Float[Tensor, "rows length"]:
    """Step rewards normalised over a question's responses; a token gets its own step's and later ones.

    Process supervision as in DeepSeekMath (section 4.1.3), our reading.

    Args:
        rewards: of the tokens; responses of one question stand together.
        ends: tokens that carry a reward.
        group: responses of one question.
    """
    shape = (-1, group * rewards.shape[1])
    grouped, where = rewards.reshape(shape), ends.reshape(shape)
    count = where.sum(1, keepdim=True).clamp(min=1)
    mean = (grouped * where).sum(1, keepdim=True) / count
    deviation = (((grouped - mean) ** 2 * where).sum(1, keepdim=True) / count).sqrt()
    normal = ((grouped - mean) / (deviation + 1e-6) * where).view_as(rewards)
    return rewards_to_go(normal)


def whiten(
    values: Float[Tensor, "rows length"], mask: Bool[Tensor, "rows length"]
) -> Float[Tensor, "rows length"]:
    """Values with mean 0 and deviation 1 over the places that are there; 0 elsewhere."""
    if not mask.any():
        return torch.zeros_like(values)
    known = values[mask]
    return torch.where(mask, (values - known.mean()) / (known.std(correction=0) + 1e-8), 0.0)
