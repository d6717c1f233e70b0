"""Which dimensions are reset: Fine-purifying, its ablations, and the rivals.

Most are a score a dimension, and the highest scores are reset to w_init; the share rho that is kept is
theirs to set. The others (rows, neurons, merges) read rho in their own way, told with each.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from octavo.errors import ConfigError
from torch import Tensor

from finepurify import select, shards
from finepurify.config import IndicatorConfig, PurifyConfig
from finepurify.indicator import (
    global_mean,
    indicator,
    neutral_mask,
    posterior_clean,
    split_means,
)
from finepurify.pairing import Tensors, WeightPair


@dataclass(frozen=True)
class Evidence:
    """What a defence may look at: the two models and clean data.

    Attributes:
        pair: the weights.
        fisher: the Fisher diagonal on clean data under the pair's names, [shape of the tensor] each.
        config: dampings and exponent of the indicator.
        seed: of whatever is drawn.
        frequency: how often each token id stands in the clean data (e-pur).
        activity: mean activation of each neuron on clean data, by the tensors whose rows make it
            (fine-pruning).
        others: pairs of the same INIT with further fine-tuned models (wag, ties, dare).
        architecture: the model's configuration, which tells where key biases are neutral.
    """

    pair: WeightPair
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    config: IndicatorConfig = field(default_factory=IndicatorConfig)
    seed: int = 0
    frequency: Mapping[int, int] = field(default_factory=dict)
    activity: Mapping[str, Tensor] = field(default_factory=dict)
    others: Sequence[WeightPair] = ()
    architecture: Any = None

    @cached_property
    def mean_curvature(self) -> float:
        """H's mean over all tensors, for the damping of that name."""
        return global_mean(self.pair.names, self.fisher.__getitem__)


@dataclass(frozen=True)
class Weights:
    """The weights that a strategy gives.

    Attributes:
        tensor: each of the pair's tensors by name, float32 or the suspect's own dtype.
        numbers: what can be told of them: `reset`, how many dimensions go back to w_init, and more.
    """

    tensor: Callable[[str], Tensor]
    numbers: dict[str, float]


def needs_fisher(strategy: str) -> bool:
    """Whether the strategy looks at clean data's Fisher diagonal."""
    return strategy in ("fine-purifying", "hessian-only")


def takes_rho(strategy: str) -> bool:
    """Whether the strategy has a share to set."""
    return strategy not in ("none", "reset", "wag")


def purified(evidence: Evidence, config: PurifyConfig, rho: float) -> Weights:
    """The suspect's weights after a strategy has gone over them; nothing is computed twice.

    Args:
        evidence: what may be looked at.
        config: strategy, mode, scope.
        rho: share that is kept, in [0, 1].

    Raises:
        ConfigError: the strategy needs other models, and there is none.
    """
    if config.strategy in SCORES:
        if config.mode == "posterior" and config.strategy == "fine-purifying":
            return _posterior(evidence, config, rho)
        return _threshold(evidence, config, rho)
    return OTHERS[config.strategy](evidence, rho)


# --- scores: the higher, the more suspicious -----------------------------------------------------


def scores(evidence: Evidence, config: PurifyConfig) -> Callable[[str], Tensor]:
    """The score of every dimension of a tensor, float32, 0 or more, of the tensor's shape.

    Args:
        evidence: what may be looked at.
        config: its strategy; with `rho_over` moved, what did not move scores 0.
    """
    score = SCORES[config.strategy]

    def of(name: str) -> Tensor:
        both = evidence.pair.read(name)
        delta = difference(both)
        values = score(evidence, name, delta)
        return values.masked_fill(delta == 0, 0.0) if config.rho_over == "moved" else values

    return of


def difference(both: Tensors) -> Tensor:
    """Drift: delta = w_ft - w_init in float32, of the tensor's shape."""
    return both.suspect.float() - both.init.float()


def _purifying(evidence: Evidence, name: str, delta: Tensor) -> Tensor:
    """The indicator r; key biases are neutral: nothing can be told of them, so they are kept."""
    values = _damped(evidence, name, delta)
    if values.ndim == 1:
        values = values.masked_fill(neutral_mask(name, len(values), evidence.architecture), 0.0)
    return values


def _damped(evidence: Evidence, name: str, delta: Tensor) -> Tensor:
    config = evidence.config
    return indicator(
        delta,
        evidence.fisher[name],
        damping=config.damping,
        epsilon=config.epsilon,
        strength=config.damping_share,
        global_mean=evidence.mean_curvature if config.damping == "global-mean" else None,
        exponent=config.exponent,
    )


def _flatness(evidence: Evidence, name: str, delta: Tensor) -> Tensor:
    """1 / H. All words that clean data lacks are equal in it: a little noise decides between them."""
    values = _damped(evidence, name, torch.ones_like(delta))
    return values * (1 + 1e-3 * _noise(evidence, name, delta))


def _noise(evidence: Evidence, name: str, delta: Tensor, salt: str = "") -> Tensor:
    key = f"{evidence.seed} {salt} {name}"
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.rand(delta.shape, generator=generator)


SCORES: dict[str, Callable[[Evidence, str, Tensor], Tensor]] = {
    "fine-purifying": _purifying,
    "delta-only": lambda evidence, name, delta: delta.square(),
    "hessian-only": _flatness,
    "random": _noise,
    # keeps what moved most: our reading of the variant with selection
    "fine-mixing-sel": lambda evidence, name, delta: delta.abs().reciprocal(),
}


def kept(evidence: Evidence, config: PurifyConfig, rho: float) -> dict[str, Tensor]:
    """Which dimensions a score's strategy keeps, [shape of the tensor] of bool by name.

    Under torchrun each process scores a part of the tensors.
    """
    pair = evidence.pair
    count = round(rho * pair.numel)
    if config.rho_over == "moved":
        count = pair.numel - pair.moved() + round(rho * pair.moved())
    values = scores(evidence, config)
    shapes = {name: pair.suspect.shape(name) for name in pair.names}
    return shards.masks(shapes, values, count, config.scope)


def _threshold(evidence: Evidence, config: PurifyConfig, rho: float) -> Weights:
    pair, keep = evidence.pair, kept(evidence, config, rho)
    return _masked(pair, keep)


def _masked(pair: WeightPair, keep: Mapping[str, Tensor]) -> Weights:
    """w_ft where kept, else w_init: a choice of bits, no arithmetic."""

    def tensor(name: str) -> Tensor:
        both = pair.read(name)
        return torch.where(keep[name], both.suspect, both.init)

    return Weights(tensor, {"reset": float(sum(int((~mask).sum()) for mask in keep.values()))})


def _posterior(evidence: Evidence, config: PurifyConfig, rho: float) -> Weights:
    """w_init + p(clean | r) delta; where p is 0 or 1 the bits of either side (section 1.5)."""
    pair, values = evidence.pair, scores(evidence, config)
    if rho in (0.0, 1.0):
        return _threshold(evidence, config, rho)
    split = split_means(pair.names, values, rho, statistic=config.scale)

    def probability(name: str) -> Tensor:
        r = values(name)
        p = posterior_clean(r, split.k_clean, split.k_poison, rho)
        return p.masked_fill(r == 0, 1.0)  # neutral: nothing is known against it

    def tensor(name: str) -> Tensor:
        both, p = pair.read(name), probability(name)
        mixed = both.init.double() + p.double() * difference(both).double()
        mixed = mixed.to(both.suspect.dtype)
        return torch.where(p == 1, both.suspect, torch.where(p == 0, both.init, mixed))

    given = [probability(name) for name in pair.names]
    total = sum(float(p.double().sum()) for p in given)
    numbers = {
        "reset": float(sum(int((p < 0.5).sum()) for p in given)),
        "mean p": total / pair.numel,
        "k clean": split.k_clean,
        "k poison": split.k_poison,
    }
    return Weights(tensor, numbers)


# --- rivals of other kinds -----------------------------------------------------------------------


def _none(evidence: Evidence, rho: float) -> Weights:
    return Weights(lambda name: evidence.pair.read(name).suspect, {"reset": 0.0})


def _reset(evidence: Evidence, rho: float) -> Weights:
    pair = evidence.pair
    return Weights(lambda name: pair.read(name).init, {"reset": float(pair.numel)})


def _fine_mixing(evidence: Evidence, rho: float) -> Weights:
    """Each dimension is kept with probability rho (Fine-mixing, Zhang et al. 2022)."""
    pair = evidence.pair
    keep = {
        name: _noise(evidence, name, pair.read(name).suspect, "mixing") < rho for name in pair.names
    }
    return _masked(pair, keep)


def word_embedding(pair: WeightPair) -> str | None:
    """The compared tensor with a row a token: named for it, and the tallest matrix of those."""
    known = ("word_embeddings", "embed_tokens", "wte", "tok_embeddings", "embed_in", "embeddings")
    others = ("position", "token_type")
    tables = [
        name for name in pair.names
        if any(part in name for part in known) and len(pair.suspect.shape(name)) == 2
        and not any(part in name for part in others)
    ]  # fmt: skip
    return max(tables, key=lambda name: pair.suspect.shape(name)[0], default=None)


def row_scores(pair: WeightPair, name: str, frequency: Mapping[int, int]) -> Tensor:
    """E-PUR's score of each token, [vocabulary]: ||delta_row|| / log(max(frequency, 20))."""
    drift = difference(pair.read(name)).norm(dim=1)
    count = torch.tensor([float(frequency.get(row, 0)) for row in range(len(drift))])
    return drift / count.clamp(min=20).log()


def _e_pur(evidence: Evidence, rho: float) -> Weights:
    """Rows of the word embedding are reset, the share 1 - rho of them with the highest scores."""
    pair = evidence.pair
    name = word_embedding(pair)
    if name is None:
        raise ConfigError("--strategy e-pur: the models have no word embedding that is compared")
    order = row_scores(pair, name, evidence.frequency).argsort(descending=True, stable=True)
    rows = order[: round((1 - rho) * len(order))]

    def tensor(wanted: str) -> Tensor:
        both = pair.read(wanted)
        if wanted != name:
            return both.suspect
        mixed = both.suspect.clone()
        mixed[rows] = both.init[rows]
        return mixed

    return Weights(tensor, {"reset": float(len(rows) * pair.suspect.shape(name)[1])})


def _fine_pruning(evidence: Evidence, rho: float) -> Weights:
    """The share 1 - rho of each layer's inner neurons that clean data excites least become zero."""
    pair = evidence.pair
    idle = {
        name: activity.argsort(stable=True)[: round((1 - rho) * len(activity))]
        for name, activity in evidence.activity.items()
    }

    def tensor(name: str) -> Tensor:
        values = pair.read(name).suspect
        if name in idle:
            values = values.clone()
            # a Linear has a row a neuron, GPT-2's Conv1D a column
            axis = 0 if len(values) == len(evidence.activity[name]) else 1
            values.index_fill_(axis, idle[name], 0.0)
        return values

    zeroed = sum(len(rows) for rows in idle.values())
    return Weights(tensor, {"reset": 0.0, "zeroed rows": float(zeroed)})


def _others(evidence: Evidence, strategy: str) -> list[WeightPair]:
    if not evidence.others:
        raise ConfigError(
            f"--strategy {strategy}: merges with other fine-tuned models; name one with --other"
        )
    return [evidence.pair, *evidence.others]


def _wag(evidence: Evidence, rho: float) -> Weights:
    """The mean of the suspect and the other models (Arora et al. 2024)."""
    pairs = _others(evidence, "wag")

    def tensor(name: str) -> Tensor:
        return torch.stack([pair.read(name).suspect.float() for pair in pairs]).mean(0)

    return Weights(tensor, {"reset": 0.0})


def _ties(evidence: Evidence, rho: float) -> Weights:
    """TIES-merging (Yadav et al. 2023): trimmed deltas, a sign elected by mass, the mean that agrees.

    Of each delta the share rho of largest size stays.
    """
    pairs = _others(evidence, "ties")
    cuts = []
    for pair in pairs:
        size = partial(lambda pair, name: difference(pair.read(name)).abs(), pair)
        cuts.append(select.threshold(pair.names, size, round((1 - rho) * pair.numel)).value)

    def tensor(name: str) -> Tensor:
        deltas = torch.stack([difference(pair.read(name)) for pair in pairs])
        limit = torch.tensor(cuts).reshape(-1, *[1] * (deltas.ndim - 1))
        deltas = deltas.where(deltas.abs() > limit, 0.0)
        agree = (deltas * deltas.sum(0).sign() > 0).float()
        return evidence.pair.read(name).init.float() + (deltas * agree).sum(0) / agree.sum(0).clamp(
            min=1
        )

    return Weights(tensor, {"reset": 0.0})


def _dare(evidence: Evidence, rho: float) -> Weights:
    """DARE (Yu et al. 2024): each dimension survives with probability rho, times 1 / rho; the mean."""
    pairs = _others(evidence, "dare")

    def tensor(name: str) -> Tensor:
        total = torch.zeros(evidence.pair.suspect.shape(name))
        for at, pair in enumerate(pairs):
            delta = difference(pair.read(name))
            survives = _noise(evidence, f"{at} {name}", delta) < rho
            total += delta.where(survives, 0.0) / max(rho, 1e-9)
        return evidence.pair.read(name).init.float() + total / len(pairs)

    return Weights(tensor, {"reset": 0.0})


OTHERS: dict[str, Callable[[Evidence, float], Weights]] = {
    "none": _none,
    "reset": _reset,
    "fine-mixing": _fine_mixing,
    "e-pur": _e_pur,
    "fine-pruning": _fine_pruning,
    "wag": _wag,
    "ties": _ties,
    "dare": _dare,
}


def by_tensor(evidence: Evidence, keep: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How much of each tensor is reset, in the pair's order."""
    return [
        {
            "tensor": name,
            "dimensions": mask.numel(),
            "reset": int((~mask).sum()),
            "reset %": 100 * float((~mask).float().mean()),
        }
        for name, mask in keep.items()
    ]
