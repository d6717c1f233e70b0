"""The applications beside their rivals, as tables: accuracy, loyalty, memory, time, with intervals."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from octavo.stats import mcnemar

from anchors.analyses import Rows, interval, known
from anchors.cache import PromptCache, beginning, prefill
from anchors.compress import Positions, best_random, compress
from anchors.diagnose import Confusion
from anchors.evaluate import Predictions, label_loyalty, predict, word_loyalty
from anchors.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Draws of random tokens in the place of label words, whose mean is shown.
RANDOM = 5


def accuracy_rows(found: Mapping[str, Predictions | str], labels: Sequence[int]) -> Rows:
    """Accuracy of each method, or why it has none; the others are tested against the first (McNemar)."""
    first: Any = None
    rows: Rows = []
    for name, predictions in found.items():
        if isinstance(predictions, str):
            rows.append({"method": name, "interval": predictions})
            continue
        right = predictions.classes == np.asarray(labels)
        row: dict[str, Any] = {
            "method": name,
            "accuracy": float(right.mean()),
            "interval": interval(right),
            "macro F1": macro_f1(predictions, labels),
        }
        rows.append(row if first is None else row | {"p against the first": mcnemar(first, right)})
        first = right if first is None else first
    return rows


def macro_f1(predictions: Predictions, labels: Sequence[int]) -> float:
    """Mean over classes of the harmonic mean of precision and recall."""
    from sklearn.metrics import f1_score

    kinds = list(range(predictions.scores.shape[1]))
    return float(
        f1_score(list(labels), predictions.classes, labels=kinds, average="macro", zero_division=0)  # pyright: ignore
    )


def compress_rows(
    model: "PreTrainedModel",
    prompts: Sequence[Prompt],
    labels: Sequence[int],
    held: Sequence[Prompt],
    positions: Positions = "original",
    draws: int = 20,
    seed: int = 0,
    batch_size: int = 8,
) -> tuple[Rows, PromptCache]:
    """Hidden anchors, text anchors and random ones against the whole prompt.

    Args:
        model: any causal language model with a cache of keys and values.
        prompts: with the same demonstrations.
        labels: the right class of each.
        held: prompts with these demonstrations that the best random draw is chosen on; none for no such
            row.
        positions: as in `compress`.
        draws: how many random ones are tried.
        seed: of the first of the random ones whose mean is shown.
        batch_size: prompts in one pass.

    Returns:
        The rows, and the cache of hidden anchors.
    """
    first = prompts[0]
    predict(model, prompts[: 2 * batch_size], batch_size)  # the first passes are slow
    before, whole_seconds = _timed(model, prompts, batch_size, None)
    tails = sum(len(prompt) - prompt.query for prompt in prompts)
    bound = sum(len(prompt) for prompt in prompts) / tails
    whole = prefill(model, beginning(prompts))
    hidden = compress(model, first, "anchors+format", positions)
    caches = {
        "whole prompt, cached": whole,
        "hidden anchors": hidden,
        "hidden anchors, 8 bits": hidden.quantized(),
        "label words alone": compress(model, first, "anchors", positions),
        "text anchors": compress(model, first, "text"),
    }
    singles = [compress(model, first, "random", positions, seed + n) for n in range(RANDOM)]
    if held:
        best = best_random(model, held, draws, positions, batch_size)
        caches[f"hidden random, best of {draws} on other texts"] = best
    several = [predict(model, prompts, batch_size, cache=one) for one in singles]
    rows: Rows = [
        {"kept": "whole prompt", "tokens": len(whole), "accuracy": before.accuracy(labels),
         "accuracy interval": interval(before.classes == np.asarray(labels))}
    ]  # fmt: skip
    for name, cache in caches.items():
        after, seconds = _timed(model, prompts, batch_size, cache)
        label, word = label_loyalty(before, after), word_loyalty(before, after)
        right = after.classes == np.asarray(labels)
        rows.append(
            {"kept": name, "tokens": len(cache),
             "label loyalty": float(label.mean()), "label loyalty interval": interval(label),
             "word loyalty": float(word.mean()), "word loyalty interval": interval(word),
             "accuracy": float(right.mean()), "accuracy interval": interval(right),
             "KiB": cache.bytes / 1024, "speed-up": whole_seconds / seconds, "token ratio": bound}
        )  # fmt: skip
    label = np.mean([label_loyalty(before, one) for one in several], axis=0)
    word = np.mean([word_loyalty(before, one) for one in several], axis=0)
    right = np.mean([one.classes == np.asarray(labels) for one in several], axis=0)
    rows.append(
        {"kept": f"hidden random, mean of {RANDOM}", "tokens": len(singles[0]),
         "label loyalty": float(label.mean()), "label loyalty interval": interval(label),
         "word loyalty": float(word.mean()), "word loyalty interval": interval(word),
         "accuracy": float(right.mean()), "accuracy interval": interval(right),
         "KiB": singles[0].bytes / 1024}
    )  # fmt: skip
    return rows, hidden


def _timed(
    model: "PreTrainedModel", prompts: Sequence[Prompt], batch_size: int, cache: PromptCache | None
) -> tuple[Predictions, float]:
    """Predictions, and the seconds of the fastest of up to three tries."""
    tries: list[float] = []
    while True:
        begin = time.perf_counter()
        found = predict(model, prompts, batch_size, cache=cache)
        tries.append(time.perf_counter() - begin)
        if len(tries) == 3 or sum(tries) > 10:
            return found, min(tries)


def diagnose_tables(found: Confusion, names: Sequence[str]) -> dict[str, Rows]:
    """Pairs of classes, most confusable first as predicted, and the rank correlation."""
    low, high = found.interval
    pairs = [
        (float(found.overall[i, j]), float(found.real[i, j]), names[i].strip(), names[j].strip())
        for i in range(len(names))
        for j in range(i)
    ]
    return {
        "Predicted and real confusion": [
            {"one": two, "other": one, "distance of anchors": near, "AUC of the two": known(area)}
            for near, area, one, two in sorted(pairs)
        ],
        "Rank correlation (Spearman)": [
            {"layers": "all, weighted by reading", "correlation": known(found.spearman),
             "interval": "" if np.isnan(low) else f"{low:.3g} to {high:.3g}", "pairs": len(pairs)},
            *({"layers": str(layer), "correlation": known(value), "pairs": len(pairs)}
              for layer, value in enumerate(found.by_layer)),
        ],
    }  # fmt: skip
