"""What a cascade is worth: accuracy and speed against each of its models alone, in the same engine."""

import time
from typing import Any

import numpy as np
import torch
from octavo.errors import ConfigError, DataError
from octavo.stats import Sample, bootstrap_interval, mcnemar

from cascadebert.cascade import Cascade, Predictions, single
from cascadebert.cost import speedup
from cascadebert.data import Examples
from cascadebert.policy import Policy


def dis(scores: Sample, difficulty: Sample) -> float:
    """Difficulty inversion score: how well confidence orders items by difficulty.

    Of all pairs of an easier and a harder item, the share in which the easier has the higher score; a
    tie in score counts half. With right = easy and wrong = hard it is the area under the ROC curve
    of confidence as a detector of correctness.

    Args:
        scores: confidence, best in log-odds, [n].
        difficulty: two levels, larger is harder, [n].

    Returns:
        0 to 100; 50 is chance. NaN when all items are equally difficult.
    """
    from sklearn.metrics import roc_auc_score

    hard = np.asarray(difficulty)
    easy = hard == hard.min()
    if easy.all():
        return float("nan")
    return 100 * float(roc_auc_score(easy, np.asarray(scores, dtype=float)))


def compare(
    cascade: Cascade, policy: Policy, examples: Examples, *, allow_same_split: bool = False
) -> list[dict[str, Any]]:
    """Accuracy and speed-up of the cascade and of each of its models alone.

    Args:
        cascade: the models.
        policy: the threshold.
        examples: labelled rows that the policy was not fitted on.
        allow_same_split: report on the calibration rows all the same.

    Returns:
        A row each: accuracy with its 95 % bootstrap interval, the exact McNemar p-value against the
        last stage, the speed-up by the policy's account and the one on the clock (same engine, same
        batches), and the share of items that went to the last stage.

    Raises:
        ConfigError: the policy was fitted on these very rows.
        DataError: there are fewer than two.
    """
    if len(examples) < 2:
        raise DataError("an evaluation needs two rows or more")
    if examples.fingerprint() == policy.calibration.get("hash") and not allow_same_split:
        raise ConfigError(
            "these are the rows the policy was calibrated on; report on others "
            "(or --allow-same-split, and say so)"
        )
    right = torch.tensor(cascade.class_numbers(examples))
    stages = len(cascade.stages)
    runs: list[tuple[str, Predictions, float]] = []
    for number in range(stages):
        alone = single(cascade, number)
        runs.append((f"stage {number + 1} alone", *_timed(alone, examples, 0.0)))
    runs.append(("cascade", *_timed(cascade, examples, policy.threshold)))
    correct = [(run.logits.argmax(dim=-1) == right).numpy() for _, run, _ in runs]
    last = stages - 1
    rows = []
    for number, (name, run, seconds) in enumerate(runs):
        is_cascade = number == stages
        exits = np.bincount(run.stages.numpy(), minlength=stages)
        low, high = bootstrap_interval(correct[number])
        rows.append(
            {
                "model": name,
                "accuracy %": 100 * float(correct[number].mean()),
                "95 % from": 100 * low,
                "to": 100 * high,
                f"speed-up ({policy.cost})": speedup(policy.costs, exits)
                if is_cascade
                else policy.costs[last] / policy.costs[number],
                "speed-up (clock)": runs[last][2] / seconds,
                "seconds": seconds,
                "to last stage %": 100 * float(exits[last] / len(examples)) if is_cascade else None,
                "p against last": None
                if number == last
                else mcnemar(correct[number], correct[last]),
            }
        )
    return rows


def _timed(cascade: Cascade, examples: Examples, threshold: float) -> tuple[Predictions, float]:
    """Predictions and the seconds they took, the best of three tries where they are short."""
    tries: list[float] = []
    while True:
        begin = time.perf_counter()
        predictions = cascade.predict(examples, threshold)
        tries.append(time.perf_counter() - begin)
        if len(tries) == 3 or sum(tries) > 10:
            return predictions, min(tries)
