"""What a cascade is worth: accuracy and speed against each of its models alone, in the same engine."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from octavo.errors import ConfigError, DataError, ModelError
from octavo.stats import bootstrap_interval, mcnemar

from cascadebert.cascade import Cascade, Predictions, single
from cascadebert.config import CostKind
from cascadebert.cost import speedup
from cascadebert.data import OVERLAP, Examples, seen_before
from cascadebert.metrics import quality
from cascadebert.policy import Policy

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def refuse_calibration_rows(policy: Policy, examples: Examples, allow: bool = False) -> None:
    """Make sure that nothing is reported on what the policy or its models' epochs were chosen on.

    Raises:
        ConfigError: more than one row in a hundred is among the calibration rows, or among the dev
            rows of `train`.
        DataError: there are fewer than two rows.
    """
    if len(examples) < 2:
        raise DataError("an evaluation needs two rows or more")
    for key, what in (
        ("row_hashes", "the policy was calibrated on"),
        ("dev_hashes", "the models' best epochs were chosen on"),
    ):
        again = seen_before(examples, policy.calibration.get(key, ""))
        if again > OVERLAP * len(examples) and not allow:
            raise ConfigError(
                f"{again} of these {len(examples)} rows are rows {what}; report on others (or "
                "--allow-same-split, and say so)"
            )
        if again:
            log.warning("%d of %d rows are rows %s", again, len(examples), what)


def compare(
    cascade: Cascade, policy: Policy, examples: Examples, *, allow_same_split: bool = False
) -> list[dict[str, Any]]:
    """Accuracy and speed-up of the cascade and of each of its models alone.

    Args:
        cascade: the models.
        policy: the thresholds.
        examples: labelled rows that the policy was not fitted on.
        allow_same_split: report on the calibration rows all the same.

    Returns:
        A row each: accuracy with its 95 % bootstrap interval, the exact McNemar p-value against the
        last stage, the speed-up by every unit of cost and the one on the clock (same engine, same
        batches), and the share of items that went to the last stage.

    Raises:
        ConfigError: the policy was fitted on these rows.
        DataError: there are fewer than two.
    """
    refuse_calibration_rows(policy, examples, allow_same_split)
    right = torch.tensor(cascade.class_numbers(examples))
    stages = len(cascade.stages)
    runs: list[tuple[str, Predictions, float]] = []
    for number in range(stages):
        alone = single(cascade, number)
        runs.append((f"stage {number + 1} alone", *_timed(alone, examples, Policy([]))))
    runs.append(("cascade", *_timed(cascade, examples, policy)))
    correct = [(run.logits.argmax(dim=-1) == right).numpy() for _, run, _ in runs]
    last = stages - 1
    rows = []
    for number, (name, run, seconds) in enumerate(runs):
        is_cascade = number == stages
        exits = np.bincount(run.stages.numpy(), minlength=stages)
        low, high = bootstrap_interval(correct[number])
        row: dict[str, Any] = {
            "model": name,
            "accuracy %": 100 * float(correct[number].mean()),
            "95 % from": 100 * low,
            "to": 100 * high,
        }
        row |= speedups(policy, exits if is_cascade else None, number)
        rows.append(
            row
            | {
                "speed-up (clock)": runs[last][2] / seconds,
                "seconds": seconds,
                "to last stage %": 100 * float(exits[last] / len(examples)) if is_cascade else None,
                "p against last": None
                if number == last
                else mcnemar(correct[number], correct[last]),
            }
        )
    return rows


def speedups(
    policy: Policy, exits: Sequence[int] | np.ndarray | None, stage: int = 0
) -> dict[str, float]:
    """The speed-up over the last stage in every unit that the policy knows, side by side.

    Args:
        policy: knows the costs.
        exits: how many items left at each stage; None for one stage alone.
        stage: which one.
    """
    row = {}
    for unit in get_args(CostKind):
        costs = policy.costs.get(unit)
        if costs:
            alone = costs[-1] / costs[min(stage, len(costs) - 1)]
            row[f"speed-up ({unit})"] = alone if exits is None else speedup(costs, exits)
    return row


def stage_quality(cascade: Cascade, policy: Policy, examples: Examples) -> list[dict[str, Any]]:
    """Order and calibration of each stage's confidence on all rows, at the policy's temperatures."""
    labels = cascade.class_numbers(examples)
    rows: list[dict[str, Any]] = []
    for number in range(len(cascade.stages)):
        logits = cascade.logits(number, examples)
        temperature = policy.temperature(number)
        rows.append({"stage": number + 1} | quality(logits / temperature, labels))
    return rows


def points(table: "pd.DataFrame", most: int = 200) -> dict[str, list[float]]:
    """A sweep as a curve: speed-up and accuracy in percent at so many of its thresholds."""
    rows = table.iloc[np.unique(np.linspace(0, len(table) - 1, most).astype(int))]
    accuracy = 100 * rows["accuracy"].to_numpy(dtype=float)
    return {"speedup": rows["speedup"].tolist(), "accuracy": accuracy.tolist()}


def random_curve(costs: Sequence[float], small: float, large: float) -> dict[str, list[float]]:
    """What deferring at random would give, from none to all.

    Args:
        costs: of the first and of the last stage.
        small: accuracy of the first, in percent.
        large: accuracy of the last.
    """
    shares = np.linspace(0, 1, 50)
    return {
        "speedup": (costs[1] / (costs[0] + shares * costs[1])).tolist(),
        "accuracy": (small + shares * (large - small)).tolist(),
    }


def oracle_point(costs: Sequence[float], right: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """What a perfect signal would reach: an item leaves at the first stage that is right, else last.

    Args:
        costs: of the stages.
        right: whether each stage is right, each [items] of bool.
    """
    exits = np.argmax(np.stack([*right[:-1], np.ones_like(right[0], dtype=bool)]), axis=0)
    wrong = ~np.any(np.stack(right), axis=0)
    exits[wrong] = len(right) - 1
    counts = np.bincount(exits, minlength=len(right))
    return {"speedup": [speedup(costs, counts)], "accuracy": [100 * float((~wrong).mean())]}


def bench_engines(
    cascade: Cascade, policy: Policy, examples: Examples, tries: int = 3
) -> list[dict[str, Any]]:
    """Seconds of each way to run a cascade on the same texts, checked for equal labels.

    Args:
        cascade: the models.
        policy: the thresholds.
        examples: texts; labels are not looked at.
        tries: of each way, in turns, so that a busy moment strikes them all.

    Returns:
        A row each: the last stage alone (what speed-ups are against), every stage alone, pooled,
        compacted within batches of 16, run-all as the authors' code does, and the bound that
        pooling cannot beat, 1 / (t_first / t_last + ...) with each stage's share of visits.

    Raises:
        ModelError: a way answers otherwise.
    """
    stages = len(cascade.stages)
    ways: dict[str, Callable[[], Predictions]] = {
        f"stage {number + 1} alone": partial(single(cascade, number).predict, examples, Policy([]))
        for number in range(stages)
    }
    ways |= {
        "pooled": partial(cascade.predict, examples, policy),
        "compacted, batch 16": partial(cascade.predict, examples, policy, 16),
        "run-all": partial(cascade.run_all, examples, policy),
    }
    took = dict.fromkeys(ways, float("inf"))
    answers: dict[str, Predictions] = {}
    for _ in range(tries):
        for name, work in ways.items():
            begin = time.perf_counter()
            answers[name] = work()
            took[name] = min(took[name], time.perf_counter() - begin)
    pooled = answers["pooled"]
    for name in ("compacted, batch 16", "run-all"):
        differ = sum(a != b for a, b in zip(answers[name].labels, pooled.labels, strict=True))
        if differ > 0.001 * len(examples):  # ties at a threshold may fall either way
            raise ModelError(
                f"{name}: answers {differ} of {len(examples)} texts otherwise than pooled"
            )
    last = took[f"stage {stages} alone"]
    visits = [float((pooled.stages >= number).double().mean()) for number in range(stages)]
    alone = [took[f"stage {number + 1} alone"] for number in range(stages)]
    bound = last / sum(share * seconds for share, seconds in zip(visits, alone, strict=True))
    rows: list[dict[str, Any]] = [
        {
            "engine": name,
            "seconds": seconds,
            "texts a second": len(examples) / seconds,
            "speed-up": last / seconds,
            "of the bound %": 100 * last / seconds / bound if "alone" not in name else None,
        }
        for name, seconds in took.items()
    ]
    return [*rows, {"engine": "bound", "speed-up": bound}]


def _timed(cascade: Cascade, examples: Examples, policy: Policy) -> tuple[Predictions, float]:
    """Predictions and the seconds they took, the best of three tries where they are short."""
    tries: list[float] = []
    while True:
        begin = time.perf_counter()
        predictions = cascade.predict(examples, policy)
        tries.append(time.perf_counter() - begin)
        if len(tries) == 3 or sum(tries) > 10:
            return predictions, min(tries)
