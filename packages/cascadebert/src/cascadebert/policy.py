"""When a stage's answer is good enough: thresholds, chosen on calibration data, and their file.

One threshold is shared by all stages but the last, as in the paper, or each stage has its own. An item
leaves at the first stage whose score lies above.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from octavo.errors import ConfigError
from octavo.rundir import write_json
from torch import Tensor

from cascadebert import __version__
from cascadebert.config import CostKind, Method, RiskKind, Score
from cascadebert.risk import guarantee_text, item_losses, safe_threshold
from cascadebert.scores import score

VERSION = 2

#: JSON has no infinity.
FAR = 1e9

#: Cells of the search over separate thresholds.
CELLS = 65_536


@dataclass(frozen=True)
class Policy:
    """Thresholds, and everything that says what they were chosen for.

    Attributes:
        thresholds: one a stage but the last; an item leaves where its score lies above.
        score: what is compared with them.
        temperatures: of each stage's logits, one a stage; all 1 where empty.
        heads: of the learned score, one a stage but the last.
        cost: the unit that the target was counted in.
        costs: price of an item at each stage, by unit.
        target: what was asked for, by name.
        achieved: accuracy, speed-up and shares on the calibration data.
        guarantee: risk, alpha, delta, method, number of rows, and the whole in words.
        models: hash of each stage's weights; the policy serves these models alone.
        backend: what computed the logits, with its precision; another one has other confidences.
        calibration: number of rows, how many of them the thresholds were chosen on (`achieved` is of
            these), their hashes, tokens a stage, deciles of the first stage's score.
    """

    thresholds: list[float]
    score: Score = "max_probability"
    temperatures: list[float] = field(default_factory=list)
    heads: list[dict[str, Any]] = field(default_factory=list)
    cost: CostKind = "flops"
    costs: dict[str, list[float]] = field(default_factory=dict)
    target: dict[str, float] = field(default_factory=dict)
    achieved: dict[str, Any] = field(default_factory=dict)
    guarantee: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    backend: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def probabilities(self) -> list[float]:
        """The thresholds as probabilities; for the default score the paper's tau."""
        return torch.sigmoid(torch.tensor(self.thresholds, dtype=torch.float64)).tolist()

    def temperature(self, stage: int) -> float:
        """What a stage's logits are divided by."""
        return self.temperatures[stage] if self.temperatures else 1.0

    def score_of(
        self, stage: int, logits: Float[Tensor, "items classes"]
    ) -> Float[Tensor, " items"]:
        """How certain a stage is, by this policy's score."""
        head = self.heads[stage] if stage < len(self.heads) else None
        return score(logits, self.score, self.temperature(stage), head)

    def leaves(self, stage: int, logits: Float[Tensor, "items classes"]) -> Tensor:
        """Which items leave at a stage, [items] of bool; all of them at the last."""
        if stage == len(self.thresholds):
            return torch.ones(len(logits), dtype=torch.bool)
        return self.score_of(stage, logits) > self.thresholds[stage]

    def save(self, path: Path) -> None:
        """Write the policy as JSON, atomically."""
        head = {"version": VERSION, "created_by": f"cascadebert {__version__}"}
        write_json(path, head | asdict(self) | {"probabilities": self.probabilities})

    @classmethod
    def load(cls, path: Path, models: Sequence[str], backend: str = "") -> "Policy":
        """Read a policy for these models.

        Raises:
            ConfigError: there is none, it is not a policy, or it was made for other models or for
                another backend.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("version") != VERSION:
                raise ConfigError(f"{path}: of another version; run `cascadebert calibrate` again")
            for derived in ("created_by", "probabilities"):
                content.pop(derived)
            policy = cls(**content)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no policy there; run `cascadebert calibrate`") from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a policy file ({error})") from None
        try:
            policy.check(len(policy.models))
            base64.b64decode(policy.calibration.get("row_hashes", ""), validate=True)
        except (ConfigError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not a policy file ({error})") from None
        if policy.models != list(models):
            raise ConfigError(
                f"{path}: made for other models, or another tokenizer or --max-length; run "
                "`cascadebert calibrate` again"
            )
        if backend and policy.backend and backend != policy.backend:
            raise ConfigError(
                f"{path}: made for backend {policy.backend}, and this is {backend}, whose confidences "
                "differ; run `cascadebert calibrate` again with the same --backend and --dtype"
            )
        return policy

    def check(self, stages: int) -> None:
        """Refuse thresholds and temperatures that do not fit so many stages.

        Raises:
            ConfigError: one is not a number, or there are too few or too many.
        """
        for value in (*self.thresholds, *self.temperatures):
            if not isinstance(value, int | float) or math.isnan(value):
                raise ConfigError(f"{value!r} is not a number")
        if len(self.thresholds) != stages - 1:
            raise ConfigError(f"{len(self.thresholds)} thresholds for {stages} stages")
        if self.temperatures and len(self.temperatures) != stages:
            raise ConfigError(f"{len(self.temperatures)} temperatures for {stages} stages")
        if any(not 0 < float(value) < math.inf for value in self.temperatures):
            raise ConfigError("a temperature is not above 0")
        if self.score not in get_args(Score):
            raise ConfigError(f"unknown score {self.score!r}")
        if self.score == "learned" and len(self.heads) != stages - 1:
            raise ConfigError(f"{len(self.heads)} learned heads for {stages} stages")
        if any(set(head) != {"mean", "scale", "weight", "bias"} for head in self.heads):
            raise ConfigError("a learned head lacks a part")


def exit_stage(scores: Sequence[Float[Tensor, " items"]], thresholds: Sequence[float]) -> Tensor:
    """At which stage each item leaves.

    Args:
        scores: at each stage but the last.
        thresholds: of each stage but the last.

    Returns:
        Stage numbers from 0, [items] of int64; the last one where no score lies above.
    """
    above = [value > bar for value, bar in zip(scores, thresholds, strict=True)]
    return torch.stack([*above, torch.ones_like(scores[0]) > 0]).int().argmax(dim=0)


def sweep(
    logits: Sequence[Float[Tensor, "items classes"]],
    labels: Sequence[int] | None,
    costs: Sequence[float],
    scores: Sequence[Float[Tensor, " items"]] | None = None,
) -> pd.DataFrame:
    """Accuracy and speed-up at every shared threshold that makes a difference, exactly, in O(n log n).

    An item leaves before stage i+1 just where the largest of its first i scores lies above the
    threshold, so sums over the items sorted by these running maxima give every row at once.

    Args:
        logits: of each stage on the same items, smallest stage first.
        labels: the right classes; without them there is no accuracy.
        costs: of the stages.
        scores: of the stages but the last; log-odds by default.

    Returns:
        A row a threshold, rising: `threshold` (halfway between neighbouring scores, infinite at both
        ends), `accuracy`, `speedup`, `share_1` .. `share_n` (items that leave there).
    """
    stages = len(logits)
    reach = running_maximum(scores or [score(stage) for stage in logits[:-1]])
    values = np.unique(reach)
    middles = values[:-1] + (values[1:] - values[:-1]) / 2
    thresholds = np.concatenate([[-np.inf], middles, [np.inf]])

    orders = [np.argsort(row, kind="stable") for row in reach]
    places = [
        np.searchsorted(row[order], thresholds, side="right")
        for row, order in zip(reach, orders, strict=True)
    ]

    def below(stage: int, weights: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(weights[orders[stage]])])
        return sums[places[stage]]

    frame = _outcomes(logits, labels, costs, below, len(logits[0]), len(thresholds))
    frame.insert(0, "threshold", thresholds)
    return frame.loc[:, [*[name for name in frame if not name.startswith("share")],
                  *[f"share_{stage + 1}" for stage in range(stages)]]]  # fmt: skip


def sweep_separate(
    logits: Sequence[Float[Tensor, "items classes"]],
    labels: Sequence[int] | None,
    costs: Sequence[float],
    scores: Sequence[Float[Tensor, " items"]],
    cells: int = CELLS,
) -> pd.DataFrame:
    """The same for thresholds of each stage's own: all combinations of their quantiles at once.

    A histogram over the scores of the first i stages, summed along every axis, holds how many items
    stay below each combination: O(n + cells) for any number of stages.

    Returns:
        As `sweep`, with `threshold_1` .. `threshold_n-1` instead of `threshold`.
    """
    free = len(logits) - 1
    size = max(2, round(cells ** (1 / free)) - 2)
    grids, bins = [], []
    for values in scores:
        inner = np.unique(np.quantile(values.numpy(), np.linspace(0, 1, size), method="lower"))
        middles = inner[:-1] + (inner[1:] - inner[:-1]) / 2
        grid = np.concatenate([[-np.inf], middles, [np.inf]])
        grids.append(grid)
        bins.append(np.searchsorted(grid, values.numpy(), side="left"))  # lowest bar not exceeded
    shape = tuple(len(grid) for grid in grids)

    def below(stage: int, weights: np.ndarray) -> np.ndarray:
        inner = shape[: stage + 1]
        flat = np.ravel_multi_index(tuple(bins[: stage + 1]), inner)
        counts = np.bincount(flat, weights=weights, minlength=math.prod(inner)).reshape(inner)
        for axis in range(stage + 1):
            counts = counts.cumsum(axis=axis)
        wide = counts.reshape(inner + (1,) * (free - stage - 1))
        return np.broadcast_to(wide, shape).reshape(-1)

    frame = _outcomes(logits, labels, costs, below, len(logits[0]), math.prod(shape))
    mesh = np.meshgrid(*grids, indexing="ij")
    for number, axis in enumerate(mesh, 1):
        frame[f"threshold_{number}"] = axis.reshape(-1)
    return frame


def running_maximum(scores: Sequence[Float[Tensor, " items"]]) -> np.ndarray:
    """The largest score up to each stage, [stages - 1, items]."""
    return torch.stack(list(scores)).cummax(dim=0).values.numpy()


def _outcomes(
    logits: Any, labels: Any, costs: Any, below: Any, items: int, rows: int
) -> pd.DataFrame:
    """Accuracy, speed-up and shares from the items that stay below each combination of thresholds.

    `below(stage, weights)` is the summed weight of the items that stages 0 .. stage all defer.
    """
    stages = len(logits)
    deferred = np.zeros((stages + 1, rows))  # beyond stage i, as a share
    deferred[0] = 1.0
    right = np.zeros(rows)
    truth = None if labels is None else np.asarray(labels)
    for stage in range(stages):
        if stage < stages - 1:
            deferred[stage + 1] = below(stage, np.ones(items)) / items
        if truth is not None:
            hit = (logits[stage].argmax(dim=-1).numpy() == truth).astype(float)
            here = below(stage - 1, hit) if stage else np.full(1, hit.sum())
            right += here - (below(stage, hit) if stage < stages - 1 else 0.0)
    shares = deferred[:-1] - deferred[1:]
    paid = (deferred[:-1] * np.asarray(costs, dtype=float)[:, None]).sum(axis=0)
    frame = pd.DataFrame({"speedup": costs[-1] / paid})
    if labels is not None:
        frame.insert(0, "accuracy", right / items)
    for stage in range(stages):
        frame[f"share_{stage + 1}"] = shares[stage]
    return frame


def fit_policy(
    logits: Sequence[Float[Tensor, "items classes"]],
    labels: Sequence[int] | None,
    costs: Sequence[float],
    target_speedup: float | None = None,
    *,
    min_accuracy: float | None = None,
    max_cost: float | None = None,
    max_risk: float | None = None,
    risk: RiskKind = "harm",
    method: Method = "ltt",
    delta: float = 0.1,
    separate: bool = False,
    form: Policy | None = None,
    cost: CostKind = "flops",
) -> Policy:
    """Choose thresholds on calibration items for exactly one target.

    Args:
        logits: of each stage, smallest stage first.
        labels: the right classes; a speed-up, a budget and the risk of disagreement do without.
        costs: price of an item at each stage.
        target_speedup: at least so many times faster than the last stage alone, at the highest
            threshold that is.
        min_accuracy: the fastest thresholds that are right in this share of the items, 0 to 1.
        max_cost: at most so much an item, in the unit of `costs`.
        max_risk: the fastest threshold whose risk is at most this.
        risk: harm, error, disagreement or gap.
        method: ltt, ucb, crc or empirical; see `cascadebert.risk`.
        delta: probability that the calibration rows mislead.
        separate: a threshold for each stage instead of a shared one, for three stages or more; needs
            labels, and has no guarantee.
        form: score, temperatures and heads to use; maximum probability by default.
        cost: the unit of `costs`.

    Raises:
        ConfigError: not exactly one target, or one that cannot be met; the message says how near
            one can come.
    """
    targets = {
        "speedup": target_speedup, "accuracy": min_accuracy, "cost": max_cost, "risk": max_risk
    }  # fmt: skip
    asked = {name: float(value) for name, value in targets.items() if value is not None}
    if len(asked) != 1:
        raise ConfigError(
            "name one target: --target-speedup, --min-accuracy, --max-cost or --max-risk"
        )
    if len(logits) < 2:
        raise ConfigError("a cascade needs two models or more, smallest first")
    form = form or Policy([])
    scores = [form.score_of(number, stage) for number, stage in enumerate(logits[:-1])]
    common = replace(form, cost=cost, costs={cost: [float(price) for price in costs]}, target=asked)
    if max_risk is not None:
        if separate:
            raise ConfigError("--separate: a guarantee is given for a shared threshold only")
        return _fit_risk(common, logits, labels, scores, max_risk, risk, method, delta)
    if separate and labels is None:
        raise ConfigError("--separate: choosing among combinations needs labels")
    together = not separate or len(logits) == 2
    table = sweep(logits, labels, costs, scores)
    if not together:  # the grid of combinations is coarse: keep the shared path too
        free = range(1, len(logits))
        shared = table.assign(**{f"threshold_{i}": table["threshold"] for i in free})
        apart = sweep_separate(logits, labels, costs, scores)
        table = pd.concat([apart, shared.drop(columns="threshold")], ignore_index=True)
    if min_accuracy is not None:
        chosen = _fastest(table, min_accuracy)
    else:
        wanted = costs[-1] / max_cost if max_cost else target_speedup
        chosen = _fast_enough(table, float(wanted or 0.0), asked, costs, cost, together)
    return _chosen(common, chosen, len(logits))


def _fast_enough(
    table: pd.DataFrame,
    wanted: float,
    asked: Mapping[str, float],
    costs: Any,
    cost: str,
    shared: bool,
) -> Mapping[str, float]:
    option = "--max-cost" if "cost" in asked else "--target-speedup"
    given = asked.get("cost", wanted)
    if not 0 < given < math.inf:
        raise ConfigError(f"{option} {given:g}: must be above 0")
    fast = np.flatnonzero(table["speedup"].to_numpy(dtype=float) >= wanted * (1 - 1e-12))
    if not len(fast):
        raise ConfigError(
            f"{option} {given:g} is out of reach: the first stage alone is "
            f"{costs[-1] / costs[0]:.2f} times faster than the last, counted in {cost}"
        )
    best = fast[-1] if shared else fast[table["accuracy"].to_numpy(dtype=float)[fast].argmax()]
    return _row(table, int(best))


def _fastest(table: pd.DataFrame, accuracy: float) -> Mapping[str, float]:
    if "accuracy" not in table:
        raise ConfigError("--min-accuracy: needs labels")
    if not 0 < accuracy <= 1:
        raise ConfigError(f"--min-accuracy {accuracy:g}: must be a share from 0 to 1")
    good = np.flatnonzero(table["accuracy"].to_numpy(dtype=float) >= accuracy - 1e-12)
    if not len(good):
        raise ConfigError(
            f"--min-accuracy {accuracy:g} is out of reach: the best on these rows is "
            f"{table['accuracy'].max():.4f}"
        )
    return _row(table, int(good[table["speedup"].to_numpy(dtype=float)[good].argmax()]))


def _row(table: pd.DataFrame, number: int) -> Mapping[str, float]:
    return {name: float(table[name].to_numpy()[number]) for name in map(str, table)}


def _fit_risk(
    common: Policy, logits: Any, labels: Any, scores: Any, alpha: float, risk: RiskKind,
    method: Method, delta: float,
) -> Policy:  # fmt: skip
    answers = np.stack([stage.argmax(dim=-1).numpy() for stage in logits])
    losses = item_losses(risk, answers, None if labels is None else np.asarray(labels))
    reach, items = running_maximum(scores), answers.shape[1]
    threshold = safe_threshold(reach, losses, alpha, kind=risk, method=method, delta=delta)
    stage = (reach <= threshold).sum(axis=0)
    guarantee = {
        "risk": risk, "alpha": alpha, "delta": delta, "method": method, "rows": items,
        "measured": float(losses[stage, np.arange(items)].mean()),
        "text": guarantee_text(risk, alpha, delta, method, items),
    }  # fmt: skip
    shares = np.bincount(stage, minlength=len(logits)) / items
    costs = np.asarray(common.costs[common.cost])
    achieved = {"speedup": float(costs[-1] / (shares * np.cumsum(costs)).sum())}
    if labels is not None:
        achieved["accuracy"] = float((answers[stage, np.arange(items)] == labels).mean())
    achieved |= {f"share_{number + 1}": float(share) for number, share in enumerate(shares)}
    return _chosen(
        replace(common, guarantee=guarantee), achieved | {"threshold": threshold}, len(logits)
    )


def _chosen(common: Policy, row: Mapping[str, float], stages: int) -> Policy:
    numbers = dict(row)
    bars = [numbers.pop(name) for name in sorted(numbers) if name.startswith("threshold")]
    bars = bars if len(bars) == stages - 1 else bars * (stages - 1)
    return replace(common, thresholds=np.clip(bars, -FAR, FAR).tolist(), achieved=numbers)


def superfluous_stages(
    logits: Sequence[Float[Tensor, "items classes"]],
    labels: Sequence[int],
    costs: Sequence[float],
    speedup: float,
) -> list[int]:
    """Stages without which a cascade is at least as accurate at the same speed, on these items.

    Args:
        logits: of each stage.
        labels: the right classes.
        costs: of the stages.
        speedup: at which the subsets of stages are compared, each with a shared threshold.

    Returns:
        Numbers of the stages to leave out, from 0; none where all of them pay.
    """

    def best(members: Sequence[int]) -> float:
        if len(members) == 1:
            return -1.0
        table = sweep([logits[i] for i in members], labels, [costs[i] for i in members])
        fast = table["speedup"].to_numpy(dtype=float) >= speedup * (1 - 1e-12)
        return float(table["accuracy"].to_numpy(dtype=float)[fast].max()) if fast.any() else -1.0

    last = len(logits) - 1
    subsets = [
        [*some, last] for size in range(1, last + 1) for some in combinations(range(last), size)
    ]
    winner = max(subsets, key=best)  # the first of equals, which has the fewest stages
    return [number for number in range(last) if number not in winner]
