"""What a stage costs, and how much faster a cascade is by that account.

An item that is deferred has paid for every stage it visited. With costs c_1 .. c_n and a share d_i of
the items deferred beyond stage i, an item costs c_1 + sum_i d_i c_{i+1} on average, and the speed-up is
c_n over that (in layers in the paper).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from octavo.models import count_parameters, flops
from octavo.stats import Sample

from cascadebert.config import CostKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StageCost:
    """The price of one item at one stage, in three units.

    Attributes:
        layers: transformer layers.
        flops: operations of a forward pass at the given length.
        parameters: weights, tied ones once.
    """

    layers: int
    flops: int
    parameters: int

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
