"""The paper's three analyses as tables: means over prompts with bootstrap intervals."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from octavo.errors import ConfigError
from octavo.stats import bootstrap_interval

from anchors.blocking import What, block, edges_before, isolated
from anchors.evaluate import Predictions, label_loyalty, predict, word_loyalty
from anchors.prompts import Batch, Prompt
from anchors.reading import reading, target_attention
from anchors.saliency import PARTS, saliency

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = list[dict[str, Any]]

#: The row of answers drawn by lot, which tells from where on a loyalty means something.
GUESSES = "(guesses instead)"


def interval(values: Any) -> str:
    """A 95 % bootstrap interval in words; of one value nothing."""
    if len(values) < 2:
        return ""
    return "{:.3g} to {:.3g}".format(*bootstrap_interval(values))


def known(value: Any) -> float | None:
    """A number, or none where it is NaN, which JSON does not have."""
    return None if np.isnan(value) else float(value)


def flow_rows(
    model: "PreTrainedModel", prompts: Sequence[Prompt], labels: Sequence[int],
    batch_size: int = 8, per_head: bool = False,
) -> Rows:  # fmt: skip
    """S_wp, S_pq and S_ww of each layer (and head)."""
    values = saliency(model, prompts, labels, batch_size, per_head)
    rows: Rows = []
    for place in np.ndindex(values.shape[1:-1]):
        here = values[(slice(None), *place)]
        row: dict[str, Any] = {"layer": place[0]} | ({"head": place[1]} if per_head else {})
        for part, name in enumerate(PARTS):
            row |= {name: float(here[:, part].mean()), f"{name} interval": interval(here[:, part])}
        rows.append(row)
    return rows


def block_rows(
    model: "PreTrainedModel", prompts: Sequence[Prompt], labels: Sequence[int],
    window: int = 5, seed: int = 0, batch_size: int = 8,
) -> Rows:  # fmt: skip
    """Loyalties and accuracy with label, random or format tokens isolated in some layers.

    The last row is what guesses would reach, each label word as likely as the others.

    Raises:
        ConfigError: the window is no number of the model's layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if window < 1:
        raise ConfigError(f"--window {window}: must be 1 or more")
    window = min(window, count)
    before = predict(model, prompts, batch_size)
    rows: Rows = [{"isolated": "nothing", "accuracy": before.accuracy(labels)}]
    whats: tuple[What, ...] = ("labels", "random", "format")
    places = {f"first {window}": range(window), f"last {window}": range(count - window, count)}
    for where, layers in places.items():
        for what in whats:
            after = isolate(model, prompts, what, layers, seed, batch_size)
            label, word = label_loyalty(before, after), word_loyalty(before, after)
            rows.append(
                {"isolated": what, "layers": where, "accuracy": after.accuracy(labels),
                 "label loyalty": float(label.mean()), "label loyalty interval": interval(label),
                 "word loyalty": float(word.mean()), "word loyalty interval": interval(word)}
            )  # fmt: skip
    guessed = 1 / before.scores.shape[1]
    return [*rows, {"isolated": GUESSES, "accuracy": guessed, "label loyalty": guessed}]


def isolate(
    model: "PreTrainedModel", prompts: Sequence[Prompt], what: What, layers: Sequence[int],
    seed: int = 0, batch_size: int = 8,
) -> Predictions:  # fmt: skip
    """Predictions with some tokens cut from everything before them in some layers."""

    def around(batch: Batch) -> AbstractContextManager[None]:
        return block(model, edges_before(batch, lambda one: isolated(one, what, seed)), layers)

    return predict(model, prompts, batch_size, around)


def read_tables(
    model: "PreTrainedModel", prompts: Sequence[Prompt], labels: Sequence[int],
    batch_size: int = 8, per_head: bool = False, resamples: int = 200,
) -> dict[str, Rows]:  # fmt: skip
    """AUCROC and R of each layer, with intervals over prompts, and with `per_head` of each head."""
    predicted = predict(model, prompts, batch_size)
    classes = predicted.scores.shape[1]
    attention = target_attention(model, prompts, classes, batch_size)
    summed = attention.sum(2)
    auc, share = reading(summed, predicted.classes)
    draw = np.random.default_rng(0)
    again = [
        reading(summed[rows], predicted.classes[rows])[0]
        for rows in draw.integers(0, len(prompts), (resamples, len(prompts)))
    ]
    if np.isnan(auc).all():
        low = high = auc
    else:
        low, high = np.nanpercentile(again, [2.5, 97.5], axis=0)
    tables: dict[str, Rows] = {
        f"Reading, {len(prompts)} prompts, accuracy {predicted.accuracy(labels):.3f}": [
            {"layer": layer, "AUC": known(auc[layer]),
             "AUC interval": "" if np.isnan(auc[layer]) else f"{low[layer]:.3g} to {high[layer]:.3g}",
             "R": known(share[layer])}
            for layer in range(len(auc))
        ]
    }  # fmt: skip
    if per_head:
        heads = [
            reading(attention[:, :, head], predicted.classes)[0]
            for head in range(attention.shape[2])
        ]
        tables["AUC of each head"] = [
            {"layer": layer} | {f"head {head}": known(one[layer]) for head, one in enumerate(heads)}
            for layer in range(len(auc))
        ]
    return tables
