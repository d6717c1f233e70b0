"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): train the experts that a task uses.

A trace of the task's own data tells how relevant each expert is; the most relevant ones of each layer
are trained, and every other weight stays as it is, bit for bit.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from octavo.errors import ConfigError, DataError
from octavo.rundir import write_json
from torch import Tensor, nn

from deepseekmoe.analyze import Trace
from deepseekmoe.experts import moe_forward
from deepseekmoe.layer import ExpertBank, moe_layers
from deepseekmoe.routing import Routing

Score = Literal["token", "gate"]


@dataclass(frozen=True)
class Selection:
    """Which weights are trained; its file is the one that ESFT's authors use.

    Attributes:
        experts: numbers of routed experts, by number of the layer from 0.
        shared_experts: whether the shared experts are trained too.
        non_expert_modules: whether all that is no expert is: attention, gates, norms, embeddings.
    """

    experts: dict[int, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        experts = {str(layer): chosen for layer, chosen in self.experts.items()}
        rest = {
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
        }
        write_json(file, {"experts": experts} | rest)

    @classmethod
    def load(cls, file: Path) -> "Selection":
        """Read what `save` wrote.

        Raises:
            DataError: the file is none.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            experts = {
                int(layer): [int(expert) for expert in chosen]
                for layer, chosen in found["experts"].items()
            }
            shared = bool(found.get("shared_experts", False))
            return cls(experts, shared, bool(found.get("non_expert_modules", False)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: is no selection of experts ({error})") from None


def relevance(trace: Trace, score: Score) -> Float[np.ndarray, "layers experts"]:
    """How relevant each expert is to the traced data, as shares that sum to 1 in each layer.

    Args:
        trace: of the task's data.
        score: "token", the share of slots that chose the expert (eq. 6 of ESFT), or "gate", its share
            of the gates' sum (eq. 5; there the mean, which orders experts alike).
    """
    amounts = (trace.counts if score == "token" else trace.gates).sum(axis=0, dtype=np.float64)
    return amounts / amounts.sum(axis=-1, keepdims=True)


def select_experts(trace: Trace, score: Score = "token", p: float = 0.2) -> Selection:
    """In each layer the fewest experts whose relevance adds up to p or more.

    Args:
        trace: of the task's data, as `trace_routing` gives it.
        score: see `relevance`. ESFT uses p = 0.2 with "token" and 0.1 with "gate".
        p: share from above 0 to 1.

    Raises:
        ConfigError: p is out of range.
    """
    check_share(p)
    chosen: dict[int, list[int]] = {}
    for place, shares in enumerate(relevance(trace, score)):
        order = np.argsort(-shares, kind="stable")
        reached = np.cumsum(shares[order]) >= p - 1e-9
        many = int(np.argmax(reached)) + 1 if reached.any() else len(order)
        chosen[trace.layers[place]] = sorted(order[:many].tolist())
    return Selection(chosen)


def check_share(p: float) -> None:
    """Refuse a share of relevance that cannot be.

    Raises:
        ConfigError: p is out of range.
    """
    if not 0 < p <= 1:
        raise ConfigError(f"--p {p}: must be above 0, and 1 at the most")


@contextmanager
def freeze_except(model: nn.Module, selection: Selection) -> Iterator[None]:
    """Train nothing but a selection inside; afterwards the model is whole and trainable again.

    The chosen rows of a bank of experts become parameters of their own, in float32: optimizers hold
    states for them alone, and neither gradients nor weight decay reach the others.

    Args:
        model: of this package.
        selection: what is trained.

    Raises:
        ConfigError: the selection names a layer or an expert that the model has not.
    """
    layers = chosen_layers(model, selection)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        shared, routed = "shared_experts." in name, ".experts." in name
        weight.requires_grad_(
            (shared and selection.shared_experts)
            or (not shared and not routed and selection.non_expert_modules)
        )
    divided: list[tuple[Any, _PartlyTrained]] = []
    try:
        for layer, chosen in layers:
            divided.append((layer, _PartlyTrained(layer.experts, chosen)))
            layer.experts = divided[-1][1]
        yield
    finally:
        for layer, part in divided:
            part.finish()
            layer.experts = part.bank
        for name, weight in model.named_parameters():
            weight.requires_grad_(before[name])


def chosen_layers(model: Any, selection: Selection) -> list[tuple[Any, list[int]]]:
    """The layers that a selection names, each with the numbers of its chosen experts.

    Raises:
        ConfigError: the model has no such layer or expert, no shared ones where they are to be
            trained, or nothing is chosen.
    """
    numbers, layers = model.config.moe_layers, moe_layers(model)
    known = dict(zip(numbers, layers, strict=False)) if layers else {}
    experts = int(model.config.n_routed_experts or 0)
    found = []
    for number, chosen in selection.experts.items():
        if number not in known:
            raise ConfigError(f"the selection names layer {number}, which has no routed experts")
        if wrong := [expert for expert in chosen if not 0 <= expert < experts]:
            raise ConfigError(
                f"the selection names expert {wrong[0]} of layer {number}; there are {experts}"
            )
        if chosen:
            found.append((known[number], sorted(set(chosen))))
    names = [name for name, _ in model.named_parameters()]
    if selection.shared_experts and not any("shared_experts." in name for name in names):
        raise ConfigError("the selection trains shared experts, and the model has none")
    trains_more = selection.shared_experts or selection.non_expert_modules
    if not found and not trains_more:
        raise ConfigError("the selection names no expert, so there is nothing to train")
    return found


class _PartlyTrained(nn.Module):
    """A bank of which some experts are trained; see `freeze_except`."""

    chosen: Tensor

    def __init__(self, bank: ExpertBank, chosen: list[int]) -> None:
        super().__init__()
        self.bank = bank
        device = bank.gate_up_proj.device
        self.register_buffer("chosen", torch.tensor(chosen, device=device), persistent=False)
        self.gate_up = nn.Parameter(bank.gate_up_proj.detach()[chosen].float())
        self.down = nn.Parameter(bank.down_proj.detach()[chosen].float())

    def forward(self, x: Tensor, routing: Routing, backend: str) -> Float[Tensor, "tokens width"]:
        bank = self.bank
        gate_up: Any = _Rows.apply(self.gate_up, bank.gate_up_proj, self.chosen)
        down: Any = _Rows.apply(self.down, bank.down_proj, self.chosen)
        return moe_forward(x, routing.ids, routing.weights, gate_up, down, backend)

    def finish(self) -> None:
        """Leave the trained rows in the bank."""
        for rows, stack in (
            (self.gate_up, self.bank.gate_up_proj),
            (self.down, self.bank.down_proj),
        ):
            stack.data[self.chosen] = rows.detach().to(stack.dtype)


class _Rows(torch.autograd.Function):
    """A stack of experts some of whose rows are given; gradients go to these rows alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Tensor, chosen: Int[Tensor, " chosen"]) -> Tensor:
        ctx.save_for_backward(chosen)
        ctx.dtype = rows.dtype
        # `.data`: between a forward pass and its backward pass the same values are written again
        stack.data[chosen] = rows.to(stack.dtype)
        return stack.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (chosen,) = ctx.saved_tensors
        return grads[0][chosen].to(ctx.dtype), None, None
