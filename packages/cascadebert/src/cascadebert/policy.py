"""When a stage's answer is good enough: the threshold, chosen on calibration data.

One threshold is shared by all stages but the last, as in the paper. An item leaves at the first stage
whose log-odds lie above it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from octavo.errors import ConfigError
from octavo.rundir import write_json
from torch import Tensor

from cascadebert.config import CostKind
from cascadebert.scores import log_odds

VERSION = 1


@dataclass(frozen=True)
class Policy:
    """A threshold, and everything that says what it was chosen for.

    Attributes:
        threshold: in log-odds; an item leaves where its own lie above.
        cost: the unit of `costs`.
        costs: price of an item at each stage.
        target_speedup: what was asked for.
        achieved: accuracy, speed-up and shares on the calibration data.
        models: hash of each stage's weights; the policy serves these models alone.
        calibration: number of rows and hash of the calibration split.
    """

    threshold: float
    cost: CostKind
    costs: list[float]
    target_speedup: float
    achieved: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def threshold_probability(self) -> float:
        """The threshold as a maximum softmax probability, the paper's tau."""
        return float(torch.sigmoid(torch.tensor(self.threshold, dtype=torch.float64)))

    def save(self, path: Path) -> None:
        """Write the policy as JSON, atomically."""
        probability = {"threshold_probability": self.threshold_probability}
        content = {"version": VERSION, "score": "max_probability"} | asdict(self) | probability
        write_json(path, content)

    @classmethod
    def load(cls, path: Path, models: Sequence[str]) -> "Policy":
        """Read a policy for these models.

        Raises:
            ConfigError: there is none, it is not a policy, or it was made for other models.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("version") != VERSION:
                raise ConfigError(f"{path}: of another version; run `cascadebert calibrate` again")
            for derived in ("score", "threshold_probability"):
                content.pop(derived)
            content["threshold"] = float(content["threshold"])
            policy = cls(**content)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no policy there; run `cascadebert calibrate`") from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a policy file ({error})") from None
        if policy.models != list(models):
            raise ConfigError(f"{path}: made for other models; run `cascadebert calibrate` again")
        return policy


def exit_stage(scores: Sequence[Float[Tensor, " items"]], threshold: float) -> Tensor:
    """At which stage each item leaves.

    Args:
        scores: log-odds at each stage but the last.
        threshold: in log-odds.

    Returns:
        Stage numbers from 0, [items] of int64; the last one where no score lies above.
    """
    above = torch.stack([*(score > threshold for score in scores), torch.ones_like(scores[0]) > 0])
    return above.int().argmax(dim=0)


def sweep(
    logits: Sequence[Float[Tensor, "items classes"]],
    labels: Sequence[int] | None,
    costs: Sequence[float],
) -> pd.DataFrame:
    """Accuracy and speed-up at every threshold that makes a difference, exactly, in O(n log n).

    An item leaves before stage i+1 just where the largest of its first i scores lies above the
    threshold, so sums over the items sorted by these running maxima give every row at once.

    Args:
        logits: of each stage on the same items, smallest stage first.
        labels: the right classes; without them there is no accuracy.
        costs: of the stages.

    Returns:
        A row a threshold, rising: `threshold` (halfway between neighbouring scores, infinite at both
        ends), `accuracy`, `speedup`, `share_1` .. `share_n` (items that leave there).
    """
    items, stages = len(logits[0]), len(logits)
    scores = torch.stack([log_odds(stage) for stage in logits[:-1]])
    reach = scores.cummax(dim=0).values.numpy()  # [stages - 1, items]
    values = np.unique(reach)
    middles = values[:-1] + (values[1:] - values[:-1]) / 2
    thresholds = np.concatenate([[-np.inf], middles, [np.inf]])
    deferred = np.zeros((stages + 1, len(thresholds)))  # beyond stage i, as a share
    deferred[0] = 1.0
    right = np.zeros(len(thresholds))
    for stage in range(stages):
        if stage < stages - 1:
            deferred[stage + 1] = _below(reach[stage], np.ones(items), thresholds) / items
        if labels is not None:
            hit = (logits[stage].argmax(dim=-1).numpy() == np.asarray(labels)).astype(float)
            here = _below(reach[stage - 1], hit, thresholds) if stage else np.full(1, hit.sum())
            beyond = _below(reach[stage], hit, thresholds) if stage < stages - 1 else 0.0
            right += here - beyond
    shares = deferred[:-1] - deferred[1:]
    paid = (deferred[:-1] * np.asarray(costs)[:, None]).sum(axis=0)
    frame = pd.DataFrame({"threshold": thresholds, "speedup": costs[-1] / paid})
    if labels is not None:
        frame.insert(1, "accuracy", right / items)
    for stage in range(stages):
        frame[f"share_{stage + 1}"] = shares[stage]
    return frame


def _below(scores: np.ndarray, weights: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Sum of the weights of the items whose score is not above each threshold."""
    order = np.argsort(scores, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(weights[order])])
    return sums[np.searchsorted(scores[order], thresholds, side="right")]


def fit_policy(
    logits: Sequence[Float[Tensor, "items classes"]],
    labels: Sequence[int] | None,
    costs: Sequence[float],
    target_speedup: float,
    cost: CostKind = "flops",
) -> Policy:
    """The highest threshold that is still as fast as wanted on these items.

    Args:
        logits: of each stage on the calibration items, smallest stage first.
        labels: the right classes, if known; they do not move the threshold.
        costs: of the stages.
        target_speedup: at least this, over the last stage alone.
        cost: the unit of `costs`.

    Raises:
        ConfigError: no threshold is as fast as that; the message names the ceiling.
    """
    if not target_speedup > 0:
        raise ConfigError(f"--target-speedup {target_speedup}: must be above 0")
    if len(logits) < 2:
        raise ConfigError("a cascade needs two models or more, smallest first")
    table = sweep(logits, labels, costs)
    ceiling = costs[-1] / costs[0]
    fast = table[table["speedup"] >= target_speedup * (1 - 1e-12)]
    if fast.empty:
        raise ConfigError(
            f"--target-speedup {target_speedup:g} is out of reach: the first stage alone is "
            f"{ceiling:.2f} times faster than the last, counted in {cost}"
        )
    chosen = fast.iloc[-1].to_dict()
    return Policy(
        threshold=float(np.clip(chosen.pop("threshold"), -1e9, 1e9)),  # JSON has no infinity
        cost=cost,
        costs=[float(price) for price in costs],
        target_speedup=float(target_speedup),
        achieved={name: float(value) for name, value in chosen.items()},
    )
