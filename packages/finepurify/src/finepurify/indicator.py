"""The indicator r = delta^2 / H and what it says about a dimension (our reading of the paper).

Fine-tuning as a diffusion lets a dimension drift by delta ~ N(0, k H). Clean dimensions follow the
Hessian of clean data, so their r has mean k_C; poisonous ones followed that of the poison, and have a
much larger k_P. Either way r is Gamma(1/2, 2k), the square of a normal: from both densities and the
prior rho follows the posterior probability that a dimension is clean, which falls with r.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from finepurify.select import Values, threshold

Damping = Literal["absolute", "tensor-mean", "global-mean", "row-mean"]

#: Standard deviation of log r, if r is Gamma(1/2, 2k): pi / sqrt(2).
LOG_SD = math.pi / math.sqrt(2)

#: Median of r in units of k (of a chi-squared variable with one degree of freedom).
MEDIAN = 0.45493642311957283

#: Names of the biases of attention keys, and of those that hold queries', keys' and values' in one.
KEY = re.compile(r"(^|\.)(key|k_lin|k_proj|key_proj)\.bias$")
THIRDS = re.compile(r"(^|\.)attn\.c_attn\.bias$")
HEADS = re.compile(r"(^|\.)query_key_value\.bias$")


def indicator(
    delta: Tensor,
    fisher: Tensor,
    *,
    damping: Damping = "absolute",
    epsilon: float = 1e-8,
    strength: float = 0.1,
    global_mean: float | None = None,
    exponent: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """The indicator r = delta^2 / H^alpha of each dimension of a tensor, H damped.

    Args:
        delta: w_ft - w_init, of any shape.
        fisher: H, of the same shape, the diagonal on clean data; negative estimates (Hutchinson's)
            count as zero.
        damping: what is added to H: `absolute` only epsilon; the others besides it `strength` times
            the mean of H over the tensor, over all tensors, or over the row (a word's embedding;
            a tensor of fewer than two dimensions is one row).
        epsilon: guards the division.
        strength: lambda, the share of the mean.
        global_mean: the mean of H over all tensors (see `global_mean`), for that damping.
        exponent: alpha: 1 after the theory of SGD, 0 leaves H out (r = delta^2).

    Returns:
        r, float32, finite, at least 0; 0 where delta is.

    Raises:
        ValueError: the shapes differ, a value is NaN, the mean over all tensors was not given, or
            nothing guards the division.
    """
    if delta.shape != fisher.shape:
        raise ValueError(f"delta is {list(delta.shape)}, its Fisher diagonal {list(fisher.shape)}")
    if epsilon <= 0 or strength < 0:
        raise ValueError(f"epsilon {epsilon} must be above 0, strength {strength} at least 0")
    curvature = fisher.float().clamp(min=0)
    damped = curvature + epsilon
    if damping == "tensor-mean" or (damping == "row-mean" and curvature.dim() < 2):
        damped += strength * (curvature.mean() if curvature.numel() else 0)
    elif damping == "row-mean":
        damped += strength * curvature.mean(tuple(range(1, curvature.dim())), keepdim=True)
    elif damping == "global-mean":
        if global_mean is None:
            raise ValueError("global-mean damping needs global_mean, that of H over all tensors")
        damped += strength * global_mean
    found = delta.float().square() / damped.pow(exponent)
    if found.isnan().any():
        raise ValueError(f"{int(found.isnan().sum())} of {found.numel()} indicators are NaN")
    return found.clamp(max=torch.finfo(torch.float32).max)


def global_mean(names: Sequence[str], fisher: Values) -> float:
    """The mean of H over the dimensions of all tensors, negative estimates taken as zero."""
    total, count = 0.0, 0
    for name in names:
        curvature = fisher(name).float().clamp(min=0)
        total += curvature.sum(dtype=torch.float64).item()
        count += curvature.numel()
    return total / max(1, count)


def neutral(name: str, config: Any = None) -> bool:
    """Whether a tensor is, or has within it, an attention's key bias that changes nothing.

    Added to all keys it adds the same to all scores of a query, and the softmax takes no notice. Its
    Fisher is rounding noise, which would make any drift look poisonous. That ends where scores depend on
    positions through the keys: in rotated dimensions, and in DeBERTa's position-to-content term.

    Args:
        name: of a tensor.
        config: of the model; without one the name alone decides, and no rotation is supposed.
    """
    if config is None:
        return bool(re.search(KEY, name) or re.search(THIRDS, name)) and "key_proj" not in name
    if re.search(THIRDS, name):
        return not getattr(config, "multi_query", False)
    return bool(re.search(KEY, name) or re.search(HEADS, name)) and _rotated(config) < 1


def neutral_mask(name: str, size: int, config: Any = None) -> Bool[Tensor, " size"]:
    """Which dimensions of a bias are neutral (see `neutral`): all, none, or those of the keys in it.

    Args:
        name: of the tensor.
        size: its length.
        config: of the model.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    if not neutral(name, config):
        return mask
    if re.search(THIRDS, name):
        mask[size // 3 : 2 * size // 3] = True
        return mask
    if config is None:
        return ~mask
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(width * _rotated(config))
    if re.search(HEADS, name):
        mask.view(-1, 3, width)[:, 1, rotated:] = True
    else:
        mask.view(-1, width)[:, rotated:] = True
    return mask


def _rotated(config: Any) -> float:
    """The share of a head's dimensions in which a key bias meets positions."""
    if config.model_type == "roformer" or "p2c" in (getattr(config, "pos_att_type", None) or ()):
        return 1.0
    if getattr(config, "position_embedding_type", None) == "rotary":
        return 1.0
    if getattr(config, "alibi", False) or config.model_type == "esm":
        return 0.0
    if rope := getattr(config, "rope_parameters", None):
        return float(rope.get("partial_rotary_factor", 1.0))
    return 0.0


@dataclass(frozen=True)
class Split:
    """Both kinds of dimensions, provisionally told apart by r.

    Attributes:
        k_clean: k_C, the scale of r of the smallest.
        k_poison: k_P, that of the others.
        count: how many are the smallest.
    """

    k_clean: float
    k_poison: float
    count: int


def split_means(
    names: Sequence[str],
    values: Values,
    rho: float,
    *,
    statistic: Literal["mean", "median"] = "mean",
) -> Split:
    """k_C and k_P from the rho * d smallest indicators and the rest.

    Args:
        names: of the tensors.
        values: gives each one's r.
        rho: the share of clean dimensions, from 0 to 1.
        statistic: `mean`, as E[r] = k; or `median` over 0.455, which outliers do not move.

    Returns:
        The scales; where one part is empty it has the other's.

    Raises:
        ValueError: rho is out of range, or there are no values.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho {rho}: must be from 0 to 1")
    total = sum(values(name).numel() for name in names)
    if not total:
        raise ValueError("there are no indicators to split")
    count = round(rho * total)
    if statistic == "median":
        clean = threshold(names, values, (count + 1) // 2).value / MEDIAN
        poison = threshold(names, values, count + (total - count + 1) // 2).value / MEDIAN
    else:
        cut = threshold(names, values, count)
        clean = cut.value * cut.ties
        poison = 0.0
        for name in names:
            tensor = values(name)
            below = tensor[tensor < cut.value].sum(dtype=torch.float64).item()
            clean += below
            poison += tensor.sum(dtype=torch.float64).item() - below
        poison = (poison - cut.value * cut.ties) / max(1, total - count)
        clean /= max(1, count)
    if count == 0:
        clean = poison
    if count == total:
        poison = clean
    return Split(clean, max(clean, poison), count)


def posterior_clean(
    r: Float[Tensor, "*shape"], k_clean: float, k_poison: float, rho: float
) -> Float[Tensor, "*shape"]:
    """p(C | r), the probability that a dimension is clean (our reading of the paper's posterior).

    1 / (1 + (1 - rho) / rho * sqrt(k_C / k_P) * exp(r / 2 * (1 / k_C - 1 / k_P))), from the logarithm
    of the odds in float64, so that nothing overflows.

    Args:
        r: indicators, at least 0.
        k_clean: k_C, at least 0.
        k_poison: k_P, at least k_C.
        rho: prior share of clean dimensions, from 0 to 1.

    Returns:
        float32, falling with r.

    Raises:
        ValueError: rho or a scale is out of range.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho {rho}: must be from 0 to 1")
    if not 0 <= k_clean <= k_poison < math.inf:
        raise ValueError(
            f"k_clean {k_clean}, k_poison {k_poison}: must be finite, the latter larger"
        )
    if rho in (0, 1) or k_clean == k_poison:
        return torch.full_like(r, rho, dtype=torch.float32)
    k_clean = max(k_clean, 1e-250)  # all dimensions of that part are where they were
    k_poison = max(k_poison, k_clean)
    prior = math.log1p(-rho) - math.log(rho) + 0.5 * (math.log(k_clean) - math.log(k_poison))
    odds = prior + r.double() / 2 * (1 / k_clean - 1 / k_poison)
    return torch.sigmoid(-odds).float()


@dataclass(frozen=True)
class GammaFit:
    """How well indicators follow Gamma(1/2, 2k), and what they would be if they did.

    Attributes:
        log_sd: standard deviation of log r; 2.221 in theory, more if k differs between dimensions.
        median_over_mean: 0.455 in theory.
        ks_distance: largest distance between the distributions of a subsample and of the law (0 to 1).
        k: the mean of all r above 0.
        per_tensor: the same of each tensor that has any.
        moved: how many r are above 0.
    """

    log_sd: float
    median_over_mean: float
    ks_distance: float
    k: float
    per_tensor: dict[str, float]
    moved: int


def gamma_fit(names: Sequence[str], values: Values, *, sample: int = 200_000) -> GammaFit:
    """Hold the indicators of dimensions that moved (r > 0) against the law of the theory.

    Args:
        names: of the tensors.
        values: gives each one's r.
        sample: about how many values the median and the distance are taken from.

    Raises:
        ValueError: no value is above 0.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    moved = 0
    per_tensor: dict[str, float] = {}
    for name in names:
        positive = (tensor := values(name))[tensor > 0].double()
        if len(positive):
            logs = positive.log()
            sums += torch.stack([positive.sum(), logs.sum(), logs.square().sum()]).cpu()
            per_tensor[name] = positive.mean().item()
            moved += len(positive)
    if not moved:
        raise ValueError("no indicator is above 0: no dimension moved")
    k, mean, square = (sums / moved).tolist()
    drawn = torch.cat([part for (part,) in _sample(names, lambda name: (values(name),), sample)])
    drawn = drawn[drawn > 0].double().sort().values
    steps = torch.arange(len(drawn) + 1, dtype=torch.float64) / max(1, len(drawn))
    law = torch.erf((drawn / (2 * k)).sqrt())
    apart = torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs())
    return GammaFit(
        log_sd=math.sqrt(max(0.0, square - mean**2)),
        median_over_mean=drawn.median().item() / k if len(drawn) else math.nan,
        ks_distance=apart.max().item() if len(drawn) else math.nan,
        k=k,
        per_tensor=per_tensor,
        moved=moved,
    )


def spearman(
    names: Sequence[str],
    pairs: Callable[[str], tuple[Tensor, Tensor]],
    *,
    sample: int = 200_000,
) -> float:
    """Rank correlation, such as of delta^2 with H: whether drift follows curvature as SGD's would.

    Args:
        names: of the tensors.
        pairs: gives both sides of each, in one shape.
        sample: about how many dimensions are looked at, the same ones in every run.

    Returns:
        From -1 to 1; NaN where one side is constant.
    """
    parts = list(_sample(names, pairs, sample))
    one, other = (_ranks(torch.cat([part[side] for part in parts])) for side in (0, 1))
    one, other = one - one.mean(), other - other.mean()
    scale = (one.square().sum() * other.square().sum()).sqrt()
    return ((one * other).sum() / scale).item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2).double()[place]


def _sample(
    names: Sequence[str], values: Callable[[str], tuple[Tensor, ...]], size: int
) -> Iterator[tuple[Tensor, ...]]:
    """About so many values in all, each tensor's share at places drawn with a fixed seed."""
    total = sum(values(name)[0].numel() for name in names)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        flat = tuple(each.detach().reshape(-1).cpu() for each in values(name))
        length = len(flat[0])
        if total > size:
            share = math.ceil(length * size / total)
            places = torch.randint(length, (share,), generator=generator) if length else []
            flat = tuple(each[places] for each in flat)
        yield flat
