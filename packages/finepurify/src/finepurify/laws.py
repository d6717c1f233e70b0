"""Whether the theory's premises hold for a pair: drift follows curvature, and r follows a Gamma law."""

from dataclasses import dataclass, replace

import torch

from finepurify import select
from finepurify.config import PurifyConfig
from finepurify.indicator import LOG_SD, MEDIAN, gamma_fit, neutral_mask, spearman
from finepurify.strategies import Evidence, difference, scores, word_embedding

#: What the theory says of them.
THEORY = {"log_sd": LOG_SD, "median_over_mean": MEDIAN}


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
        int(neutral_mask(name, *pair.suspect.shape(name), evidence.architecture).sum())
        for name in pair.names
        if len(pair.suspect.shape(name)) == 1
    )
    try:
        fit = gamma_fit(pair.names, measurable)
        law = (fit.log_sd, fit.median_over_mean, fit.ks_distance, fit.k, fit.per_tensor)
    except ValueError:  # nothing that moved has curvature
        law = (float("nan"),) * 4 + ({},)
    embedding = word_embedding(pair)
    cut = select.threshold(pair.names, values, round(0.99 * pair.numel)).value
    tops = {name: int((values(name) > cut).sum()) for name in pair.names}
    return Laws(
        spearman(pair.names, both),
        *law,
        dimensions=pair.numel,
        unmoved=pair.numel - pair.moved(),
        flat=sum(int((curvature[name] == 0).sum()) for name in pair.names),
        neutral=neutral,
        top_in_embedding=tops.get(embedding or "", 0) / max(1, sum(tops.values())),
    )
