"""Where the prediction is read from (section 2.3): attention of the target on label words against it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from octavo.console import progress
from scipy.stats import rankdata
from torch import Tensor

from anchors.attention import Edit, frozen, instrument
from anchors.prompts import Batch, Prompt, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def target_attention(
    model: "PreTrainedModel", prompts: Sequence[Prompt], classes: int, batch_size: int = 8
) -> Float[np.ndarray, "prompts layers heads classes"]:
    """Attention of the target on each class's label words, summed over tokens and demonstrations."""
    found: dict[int, np.ndarray] = {}
    for numbers, batch in progress(batches(prompts, batch_size, device=model.device), "reading"):
        picks = label_places(batch, classes)
        rows = torch.arange(len(numbers), device=model.device)
        layers: dict[int, Tensor] = {}

        def watch(
            layer: int, weights: Tensor, value: Tensor, output: Tensor,
            rows=rows, picks=picks, layers=layers, targets=batch.targets,
        ) -> Tensor:  # fmt: skip
            layers[layer] = torch.einsum("bht,btc->bhc", weights[rows, :, targets].float(), picks)
            return output

        with frozen(model), torch.no_grad(), instrument(model, Edit(after=watch)):
            model(**batch.inputs(), use_cache=False)
        values = torch.stack([layers[layer] for layer in sorted(layers)], 1).cpu().numpy()
        found |= dict(zip(numbers, values, strict=True))
    return np.stack([found[number] for number in range(len(prompts))])


def label_places(batch: Batch, classes: int) -> Float[Tensor, "batch time classes"]:
    """1 where a token is of a class's label word."""
    picks = torch.zeros(*batch.input_ids.shape, classes, device=batch.input_ids.device)
    for row, (prompt, shift) in enumerate(zip(batch.prompts, batch.shifts, strict=True)):
        for kind, places in zip(prompt.classes, prompt.labels, strict=True):
            for place in places:
                picks[row, place + shift, kind] = 1.0
    return picks


def reading(
    attention: Float[np.ndarray, "prompts layers classes"], predicted: Int[np.ndarray, " prompts"]
) -> tuple[Float[np.ndarray, " layers"], Float[np.ndarray, " layers"]]:
    """AUCROC_l of the attention on label words against the prediction, and its cumulative share R_l.

    Args:
        attention: of the target on each class's label words, summed over heads.
        predicted: the model's own predictions.

    Returns:
        AUCROC_l, the mean over the classes that are predicted sometimes and not always (NaN where there
        is none), and R_l (equation 6), which ends at 1 (NaN where the areas do not add up to more than
        guessing).
    """
    ranks = rankdata(attention, axis=0)
    each = []
    for kind in range(attention.shape[-1]):
        chosen = predicted == kind
        many, others = chosen.sum(), (~chosen).sum()
        if many and others:  # the Mann-Whitney form of the area
            sums = ranks[chosen, :, kind].sum(0) - many * (many + 1) / 2
            each.append(sums / (many * others))
    auc = np.mean(each, axis=0) if each else np.full(attention.shape[1], np.nan)
    above = np.cumsum(auc - 0.5)
    return auc, above / above[-1] if above[-1] > 0 else np.full_like(above, np.nan)
