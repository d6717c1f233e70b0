"""Which classes a model will confuse, as its anchors tell it (section 3.3 of the paper), and the truth.

At a layer and head the target's query reads the label words' keys. Two keys that differ only where
queries do not vary are read alike, so that distances between keys are taken along the principal
directions of the queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from octavo.console import progress
from octavo.errors import ConfigError
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from anchors.attention import Edit, frozen, instrument
from anchors.cache import beginning, prefill
from anchors.evaluate import Predictions, predict
from anchors.prompts import Prompt, batches
from anchors.reading import label_places, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Confusion:
    """Predicted against real confusion; small numbers are pairs that are confused.

    Attributes:
        predicted: distance of the anchors' keys over the greatest, mean over heads: [layers, C, C].
        overall: the mean over all layers and heads, each weighted by how far above .5 the area is by
            which its attention on label words tells the prediction: where anchors are read.
        real: area under the curve that tells two classes apart by the model's probabilities: [C, C].
        spearman: rank correlation of `overall` and `real` over pairs of classes.
        interval: 95 % bootstrap interval of it over prompts; the heads' weights are held as they are.
        by_layer: the correlation of each layer.
    """

    predicted: Float[np.ndarray, "layers classes classes"]
    overall: Float[np.ndarray, "classes classes"]
    real: Float[np.ndarray, "classes classes"]
    spearman: float
    interval: tuple[float, float]
    by_layer: Float[np.ndarray, " layers"]


def diagnose(
    model: "PreTrainedModel", prompts: Sequence[Prompt], labels: Sequence[int],
    variance: float = 0.9, batch_size: int = 8, resamples: int = 200, seed: int = 0,
) -> Confusion:  # fmt: skip
    """Compare the confusion that the anchors' keys predict with the model's own.

    Args:
        model: any that `instrument` takes.
        prompts: with the same demonstrations, of three classes or more.
        labels: the right class of each.
        variance: share of the queries' variance that the principal directions kept must have.
        batch_size: prompts in one pass.
        resamples: bootstrap draws of the interval; 0 for none.
        seed: of the draws.

    Raises:
        ConfigError: two classes have but one pair, which nothing can be ranked against; or a class has
            no prompt.
    """
    classes = len(prompts[0].answers)
    if classes < 3:
        raise ConfigError("two classes make one pair: error diagnosis needs three classes or more")
    if not 0 < variance <= 1:
        raise ConfigError(f"--variance {variance}: must be above 0 and at most 1")
    right = np.asarray(labels)
    if missing := sorted({*range(classes)} - {*right.tolist()}):
        raise ConfigError(f"no text of class {missing[0]} was drawn; use more --samples")
    if missing := sorted({*range(classes)} - {*prompts[0].classes}):
        raise ConfigError(f"class {missing[0]} has no demonstration, and so no anchor")
    queries, keys, attention = look(model, prompts, classes, batch_size)
    cache = prefill(model, beginning(prompts))
    predictions = predict(model, prompts, batch_size, cache=cache)
    weights = reading_weights(attention, predictions.classes)
    predicted = np.stack(
        [key_distances(queries[:, n], keys[n], variance) for n in range(len(keys))]
    )
    real = pair_areas(predictions, right, classes)
    overall = weighted_distances(queries, keys, weights, variance)
    draw, again = np.random.default_rng(seed), []
    for _ in progress(range(resamples), "interval", unit="resamples"):
        chosen = draw.integers(0, len(right), len(right))
        if len({*right[chosen].tolist()}) < classes:
            continue
        one = weighted_distances(queries[chosen], keys, weights, variance)
        some = Predictions(predictions.scores[chosen], predictions.top[chosen])
        areas = pair_areas(some, right[chosen], classes)
        again.append(rank_correlation(one, areas))
    low, high = np.nanpercentile(again, [2.5, 97.5]) if again else (np.nan, np.nan)
    return Confusion(
        predicted, overall, real, rank_correlation(overall, real), (float(low), float(high)),
        np.array([rank_correlation(one, real) for one in predicted]),
    )  # fmt: skip


def look(
    model: "PreTrainedModel", prompts: Sequence[Prompt], classes: int, batch_size: int = 8
) -> tuple[
    Float[np.ndarray, "prompts layers heads width"],
    Float[np.ndarray, "layers heads classes width"],
    Float[np.ndarray, "prompts layers heads classes"],
]:
    """Queries of the targets, keys of each class's label words, and the attention between them.

    Keys are those of the first prompt, whose demonstrations all share, averaged over a class's tokens;
    with rotary positions both are taken after the rotation.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    keys: dict[int, Tensor] = {}
    for numbers, batch in progress(batches(prompts, batch_size, device=model.device), "queries"):
        rows = torch.arange(len(numbers), device=model.device)
        layers: dict[int, Tensor] = {}
        read: dict[int, Tensor] = {}

        def weigh(
            layer: int, weights: Tensor, value: Tensor, output: Tensor,
            rows=rows, read=read, picks=label_places(batch, classes), targets=batch.targets,
        ) -> Tensor:  # fmt: skip
            here = weights[rows, :, targets].float()
            read[layer] = torch.einsum("bht,btc->bhc", here, picks).cpu()
            return output

        def watch(
            layer: int, query: Tensor, key: Tensor, rows=rows, batch=batch, layers=layers
        ) -> None:
            layers[layer] = query[rows, :, batch.targets].float().cpu()
            if layer not in keys:
                prompt, shift = batch.prompts[0], batch.shifts[0]
                sums = [
                    torch.stack(
                        [key[0, :, place + shift] for kind, places in
                         zip(prompt.classes, prompt.labels, strict=True)
                         if kind == one for place in places]
                    ).float().mean(0)
                    for one in range(classes)
                ]  # fmt: skip
                mean = torch.stack(sums, 1)
                keys[layer] = mean.repeat_interleave(query.shape[1] // mean.shape[0], 0).cpu()

        with frozen(model), torch.no_grad(), instrument(model, Edit(states=watch, after=weigh)):
            model(**batch.inputs(), use_cache=False)
        order = sorted(layers)
        both = (torch.stack([part[layer] for layer in order], 1) for part in (layers, read))
        found |= dict(zip(numbers, zip(*both, strict=True), strict=True))
    queries, attention = (
        torch.stack([found[number][part] for number in range(len(prompts))]) for part in (0, 1)
    )
    stacked = torch.stack([keys[layer] for layer in sorted(keys)])
    return queries.numpy(), stacked.numpy(), attention.numpy()


def key_distances(
    queries: Float[np.ndarray, "prompts heads width"],
    keys: Float[np.ndarray, "heads classes width"],
    variance: float = 0.9,
) -> Float[np.ndarray, "classes classes"]:
    """Distances of keys along the directions in which queries vary, over the greatest; mean over heads.

    Args:
        queries: of the targets.
        keys: of each class's label words.
        variance: share of the queries' variance that the directions kept must have.
    """
    return _over_greatest(_head_distances(queries, keys, variance).mean(0))


def weighted_distances(
    queries: Float[np.ndarray, "prompts layers heads width"],
    keys: Float[np.ndarray, "layers heads classes width"],
    weights: Float[np.ndarray, "layers heads"],
    variance: float = 0.9,
) -> Float[np.ndarray, "classes classes"]:
    """The same over all layers, each head with its weight."""
    layers = [_head_distances(queries[:, n], keys[n], variance) for n in range(len(keys))]
    return _over_greatest(np.einsum("lhij,lh->ij", np.stack(layers), weights))


def reading_weights(
    attention: Float[np.ndarray, "prompts layers heads classes"],
    predicted: Int[np.ndarray, " prompts"],
) -> Float[np.ndarray, "layers heads"]:
    """How far above .5 the area is by which a head's attention on label words tells the prediction.

    Where no head tells it, all count alike.
    """
    heads = [reading(attention[:, :, h], predicted)[0] for h in range(attention.shape[2])]
    above = np.nan_to_num(np.stack(heads, 1) - 0.5).clip(min=0)
    return above if above.any() else np.ones_like(above)


def _head_distances(
    queries: Float[np.ndarray, "prompts heads width"],
    keys: Float[np.ndarray, "heads classes width"],
    variance: float,
) -> Float[np.ndarray, "heads classes classes"]:
    centred = queries - queries.mean(0)
    sizes, directions = np.linalg.eigh(np.einsum("phv,phw->hvw", centred, centred))
    sizes, directions = sizes[:, ::-1].clip(min=0), directions[:, :, ::-1]
    before = (np.cumsum(sizes, -1) - sizes) / sizes.sum(-1, keepdims=True).clip(min=1e-30)
    inside = (keys - keys.mean(1, keepdims=True)) @ directions
    inside = inside * (before < variance - 1e-9)[:, None]
    apart = np.linalg.norm(inside[:, :, None] - inside[:, None], axis=-1)
    return apart / apart.max((1, 2), keepdims=True).clip(min=1e-30)


def _over_greatest(
    distances: Float[np.ndarray, "classes classes"],
) -> Float[np.ndarray, "classes classes"]:
    return distances / max(float(distances.max()), 1e-30)


def pair_areas(
    predictions: Predictions, labels: Int[np.ndarray, " prompts"], classes: int
) -> Float[np.ndarray, "classes classes"]:
    """Area under the curve that tells two classes' texts apart by the model's two probabilities."""
    areas = np.ones((classes, classes))
    for one, other in combinations(range(classes), 2):
        chosen = (labels == one) | (labels == other)
        scores = predictions.scores[chosen, one] - predictions.scores[chosen, other]
        first = labels[chosen] == one
        many, others = int(first.sum()), int((~first).sum())
        above = rankdata(scores)[first].sum() - many * (many + 1) / 2
        areas[one, other] = areas[other, one] = above / (many * others) if many * others else np.nan
    return areas


def rank_correlation(
    predicted: Float[np.ndarray, "classes classes"], real: Float[np.ndarray, "classes classes"]
) -> float:
    """Spearman's correlation over pairs of classes; NaN where one of the two does not vary."""
    pairs = np.triu_indices(len(real), 1)
    if np.ptp(predicted[pairs]) == 0 or np.ptp(real[pairs]) == 0:
        return float("nan")
    found: Any = spearmanr(predicted[pairs], real[pairs])
    return float(found.statistic)
