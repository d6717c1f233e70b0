"""What a stage costs, in four units, and how much faster a cascade is by that account.

An item that is deferred has paid for every stage it visited. With costs c_1 .. c_n and a share d_i of
the items deferred beyond stage i, an item costs c_1 + sum_i d_i c_{i+1} on average, and the speed-up is
c_n over that (in layers in the paper).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from octavo.models import count_parameters, flops
from octavo.stats import Sample

from cascadebert.config import CostKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StageCost:
    """The price of one item at one stage.

    Attributes:
        layers: transformer layers, the paper's unit.
        flops: operations of a forward pass at the given length.
        parameters: weights, tied ones once.
        latency: milliseconds on this machine in a full batch; NaN where it was not measured.
    """

    layers: int
    flops: int
    parameters: int
    latency: float = float("nan")

    def of(self, kind: CostKind) -> float:
        """The price in one unit."""
        return float(asdict(self)[kind])


def stage_cost(model: "PreTrainedModel", length: int) -> StageCost:
    """Count what one item of `length` tokens costs in a sequence classifier."""
    return StageCost(
        layers=int(model.config.num_hidden_layers),
        flops=flops(model, length),
        parameters=count_parameters(model),
    )


def latency(
    forward: Callable[[int, int], Any], length: int, batch_tokens: int, tries: int = 3
) -> float:
    """Milliseconds of one item of `length` tokens in a full batch.

    Times batches of several sizes, the best of some tries each, fits seconds = a + b tokens by least
    squares, and charges an item its share of a and its tokens of b.

    Args:
        forward: runs a batch of (items, tokens each) to its end.
        length: tokens of a typical item.
        batch_tokens: tokens of a full batch.
        tries: of each size.
    """
    full = max(1, min(batch_tokens, 4096) // length)
    rows = []
    for items in sorted({1, max(1, full // 4), full}):
        seconds = []
        for _ in range(tries + 1):  # the first warms up
            begin = time.perf_counter()
            forward(items, length)
            seconds.append(time.perf_counter() - begin)
        rows.append((items * length, min(seconds[1:])))
    tokens, seconds = np.array(rows).T
    design = np.stack([np.ones_like(tokens), tokens], axis=1)
    fixed, each = np.linalg.lstsq(design, seconds, rcond=None)[0]
    fitted = max(0.0, fixed) / full + each * length
    return 1000 * float(fitted if each > 0 else seconds.min() / full)


def speedup(costs: Sequence[float], exits: Sample) -> float:
    """How many times cheaper than the last stage alone.

    Args:
        costs: of the stages, [n].
        exits: how many items left at each stage, [n].

    Returns:
        c_n over the mean price of an item; below 1 when the cascade is dearer.
    """
    counts = np.asarray(exits, dtype=float)
    paid = np.cumsum(costs)
    return float(costs[-1] * counts.sum() / (counts * paid).sum())
