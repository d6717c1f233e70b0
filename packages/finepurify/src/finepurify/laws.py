"""Whether the theory's premises hold for a pair: drift follows curvature, and r follows a Gamma law."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from finepurify import select
from finepurify.config import PurifyConfig
from finepurify.indicator import LOG_SD, MEDIAN, gamma_fit, neutral_mask, spearman
from finepurify.strategies import Evidence, difference, scores, word_embedding

#: What the theory says of them.
THEORY = {"log_sd": LOG_SD, "median_over_mean": MEDIAN}

#: Edges of the histogram of r: tenths of decades. What lies beyond is counted in the first or last.
LOWEST, HIGHEST, A_DECADE = -16, 14, 10
EDGES = tuple(10.0 ** (n / A_DECADE) for n in range(LOWEST * A_DECADE, HIGHEST * A_DECADE + 1))


@dataclass(frozen=True)
class Laws:
    """What a report says of a pair besides its result.

    Attributes:
        spearman: rank correlation of delta^2 with H; about 0 under Adam, clearly positive under SGD.
        log_sd: standard deviation of log r where a dimension moved and H > 1e-7; 2.221 in theory.
        median_over_mean: of the same r; 0.455 in theory.
        ks_distance: largest distance of their distribution from the law's.
        k: their mean, k_C if all were clean.
        k_by_tensor: the same, tensor by tensor.
        dimensions: d.
        unmoved: dimensions with delta = 0: they are never reset, and shift what rho means.
        flat: dimensions with H = 0, such as those of words that clean data lacks.
        neutral: attention key biases, of which nothing can be told.
        top_in_embedding: share of the highest 1 % of r that lies in the word embedding.
        histogram: dimensions with r > 0 by r, between each two of `EDGES`.
    """

    spearman: float
    log_sd: float
    median_over_mean: float
    ks_distance: float
    k: float
    k_by_tensor: dict[str, float]
    dimensions: int
    unmoved: int
    flat: int
    neutral: int
    top_in_embedding: float
    histogram: list[int]


def laws_of(evidence: Evidence) -> Laws:
    """The laws of a pair whose Fisher diagonal is known."""
    pair, curvature = evidence.pair, evidence.fisher
    plain = replace(evidence, config=replace(evidence.config, damping="absolute", exponent=1.0))
    values = scores(plain, PurifyConfig())

    def measurable(name: str) -> torch.Tensor:
        return values(name).where(curvature[name] > 1e-7, 0.0)

    def both(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return difference(pair.read(name)).square(), curvature[name]

    neutral = sum(
        int(neutral_mask(name, pair.suspect.numel(name), evidence.architecture).sum())
        for name in pair.names
        if len(pair.suspect.shape(name)) == 1
    )
    try:
        fit = gamma_fit(pair.names, measurable)
        law = (fit.log_sd, fit.median_over_mean, fit.ks_distance, fit.k, fit.per_tensor)
    except ValueError:  # nothing that moved has curvature
        law = (math.nan, math.nan, math.nan, math.nan, {})
    embedding = word_embedding(pair)
    cut = select.threshold(pair.names, values, round(0.99 * pair.numel)).value
    tops: dict[str, int] = {}
    histogram = torch.zeros(len(EDGES) - 1, dtype=torch.int64)
    for name in pair.names:
        r = values(name)
        tops[name] = int((r > cut).sum())
        histogram += counted(r)
    return Laws(
        spearman(pair.names, both),
        *law,
        dimensions=pair.numel,
        unmoved=pair.numel - pair.moved(),
        flat=sum(int((curvature[name] == 0).sum()) for name in pair.names),
        neutral=neutral,
        top_in_embedding=tops.get(embedding or "", 0) / max(1, sum(tops.values())),
        histogram=histogram.tolist(),
    )


def counted(r: Tensor) -> Int[Tensor, " bins"]:
    """How many of the indicators above 0 lie between each two of `EDGES`.

    Args:
        r: of any shape, 0 or more.
    """
    places = ((r[r > 0].double().log10() - LOWEST) * A_DECADE).floor().long()
    bins = len(EDGES) - 1
    return places.clamp(0, bins - 1).bincount(minlength=bins).cpu()


def scales(histogram: Sequence[int], dimensions: int, rho: float) -> tuple[float, float]:
    """k_C and k_P, the means of the rho * d smallest r and of the rest, as near as a histogram tells.

    Args:
        histogram: counts between `EDGES`; what is missing of all dimensions has r = 0.
        dimensions: d.
        rho: the share that is kept.

    Returns:
        0 where a part holds nothing but r = 0, or nothing at all.
    """
    clean = round(rho * dimensions)
    left = max(0, clean - (dimensions - sum(histogram)))
    below = above = 0.0
    for count, low, high in zip(histogram, EDGES, EDGES[1:], strict=False):
        taken = min(count, left)
        left -= taken
        mean = (high - low) / math.log(high / low)  # of values spread evenly over the logarithm
        below += taken * mean
        above += (count - taken) * mean
    return below / max(1, clean), above / max(1, dimensions - clean)
