"""How certain a stage is. Every score is larger where the stage is more certain.

Scores that are made of probabilities are given as log-odds: the same order, and items go on being
told apart where their probabilities have rounded to 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from octavo.errors import ConfigError
from torch import Tensor

from cascadebert.config import Score

#: A fitted linear head as plain numbers: `mean`, `scale`, `weight` (one a feature) and `bias`.
Head = Mapping[str, Any]

LOGITS = Float[Tensor, "items classes"]


def log_odds(logits: LOGITS) -> Float[Tensor, " items"]:
    """Log-odds of the predicted class, log(p / (1 - p)) of the largest softmax probability p.

    It orders items as the paper's maximum softmax does.

    Args:
        logits: of the classes, in any precision.

    Returns:
        The largest logit minus the log-sum-exp of the others, in float64.
    """
    ordered = logits.double().sort(dim=-1, descending=True).values
    return ordered[:, 0] - ordered[:, 1:].logsumexp(dim=-1)


def margin(logits: LOGITS) -> Float[Tensor, " items"]:
    """Log-odds log((1 + m) / (1 - m)) of the margin m between the two largest probabilities.

    With two classes it is the log-odds of the largest.
    """
    ordered = logits.double().sort(dim=-1, descending=True).values
    first, second, rest = ordered[:, 0], ordered[:, 1], ordered[:, 2:]
    others = rest.logsumexp(dim=-1) if rest.shape[1] else torch.full_like(first, -math.inf)
    more = torch.logaddexp(math.log(2) + first, others)  # 1 + p1 - p2 = 2 p1 + rest
    return more - torch.logaddexp(math.log(2) + second, others)


def entropy(logits: LOGITS) -> Float[Tensor, " items"]:
    """Log-odds log((1 - h) / h) of the entropy h, as a share of its largest value log K.

    Summed from terms that are none of them negative, with no p log p: it loses nothing where a
    probability underflows.
    """
    gaps = logits.double().amax(dim=-1, keepdim=True) - logits.double()
    others = gaps.sort(dim=-1).values[:, 1:]
    rest = (-others).exp().sum(dim=-1)
    nats = rest.log1p() + ((-others).exp() * others).sum(dim=-1) / (1 + rest)
    share = (nats / math.log(logits.shape[-1])).clamp(1e-300, 1 - 1e-16)
    return torch.log1p(-share) - share.log()


def energy(logits: LOGITS) -> Float[Tensor, " items"]:
    """Log-sum-exp of the logits (E-LANG, Akbari et al. 2022); not a function of probabilities."""
    return logits.double().logsumexp(dim=-1)


def features(logits: LOGITS) -> Float[Tensor, "items features"]:
    """What the learned score sees: the four scores above, and the three largest log-probabilities."""
    largest = logits.double().log_softmax(dim=-1).sort(dim=-1, descending=True).values[:, :3]
    four = [log_odds(logits), margin(logits), entropy(logits), energy(logits)]
    return torch.cat([torch.stack(four, dim=-1), largest], dim=-1).clamp(-1e3, 1e3)


def fit_head(logits: LOGITS, right: Sequence[bool]) -> Head:
    """Learn how probable it is that a stage is right, by logistic regression on `features`.

    Args:
        logits: of the stage, on rows that no threshold is chosen on.
        right: whether it answered each of them rightly.

    Raises:
        ConfigError: it is always right there, or always wrong.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(right)) < 2:
        raise ConfigError("--score learned: needs rows the stage gets right and rows it gets wrong")
    inputs = features(logits).numpy()
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    model = LogisticRegression(max_iter=1000).fit((inputs - mean) / scale, np.asarray(right))
    return {
        "mean": mean.tolist(),
        "scale": scale.tolist(),
        "weight": np.ravel(model.coef_).tolist(),
        "bias": float(np.ravel(model.intercept_)[0]),
    }


def score(
    logits: LOGITS,
    kind: Score = "max_probability",
    temperature: float = 1.0,
    head: Head | None = None,
) -> Float[Tensor, " items"]:
    """How certain a stage is by the kind of score that is named.

    Args:
        logits: of the stage.
        kind: max_probability, margin, entropy, energy or learned.
        temperature: divides the logits before.
        head: of the learned score, from `fit_head`.

    Raises:
        ConfigError: it is the learned score and there is no head.
    """
    scaled = logits.double() / temperature
    if kind == "learned":
        if head is None:
            raise ConfigError(
                "the learned score has not been fitted; calibrate with --score learned"
            )
        mean, scale, weight = (torch.tensor(head[name]) for name in ("mean", "scale", "weight"))
        return ((features(scaled) - mean) / scale) @ weight.double() + head["bias"]
    kinds = {"max_probability": log_odds, "margin": margin, "entropy": entropy, "energy": energy}
    return kinds[kind](scaled)
