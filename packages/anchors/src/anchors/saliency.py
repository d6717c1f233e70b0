"""Saliency of attention (section 2.1 of the paper): how much each edge of the flow matters.

One backward pass serves all layers: each layer's product of attention and gradient is reduced the moment
its gradient arrives, so that no layers' matrices are kept beside those the pass itself keeps.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from octavo.console import progress
from octavo.errors import ModelError
from torch import Tensor

from anchors.attention import Edit, frozen, instrument
from anchors.evaluate import target_logits
from anchors.prompts import Batch, Prompt, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The three parts of the flow: text to label word, label word to target, everything else.
PARTS = ("S_wp", "S_pq", "S_ww")

Reduce = Callable[[int, Float[Tensor, "batch heads time time"]], None]


def saliency(
    model: "PreTrainedModel",
    prompts: Sequence[Prompt],
    labels: Sequence[int],
    batch_size: int = 8,
    per_head: bool = False,
) -> Float[np.ndarray, "prompts ..."]:
    """S_wp, S_pq and S_ww of each prompt and layer.

    S_wp is the mean saliency of the edges from the words before a label word to it, S_pq of those from
    label words to the target, S_ww of all other edges from earlier to later tokens. A label word of
    several tokens counts with all of them, and edges inside it are of the rest.

    Args:
        model: any that `instrument` takes.
        prompts: at least one.
        labels: the right class of each.
        batch_size: prompts in one pass.
        per_head: whether to keep heads apart; otherwise they are summed before the absolute value, as
            the authors' code has it.

    Returns:
        [prompts, layers, 3], or [prompts, layers, heads, 3]; the last axis is `PARTS`.

    Raises:
        ModelError: gradients became NaN or infinite.
    """
    found: dict[int, np.ndarray] = {}
    for numbers, batch in progress(batches(prompts, batch_size, device=model.device), "saliency"):
        parts = part_edges(batch)
        layers: dict[int, Tensor] = {}

        def reduce(layer: int, product: Tensor, parts=parts, layers=layers) -> None:
            each = product.abs() if per_head else product.sum(1, keepdim=True).abs()
            sums = torch.einsum("bhij,kbij->bhk", each, parts.to(each.dtype))
            layers[layer] = sums / parts.sum((-1, -2)).T[:, None].clamp(min=1)

        _backward(model, batch, [labels[number] for number in numbers], reduce)
        values = torch.stack([layers[layer] for layer in sorted(layers)], 1).float().cpu().numpy()
        found |= dict(zip(numbers, values if per_head else values[:, :, 0], strict=True))
    return np.stack([found[number] for number in range(len(prompts))])


def saliency_matrices(
    model: "PreTrainedModel", prompt: Prompt, label: int
) -> Float[Tensor, "layers time time"]:
    """I_l(i, j), the flow from token j to token i in each layer, of one prompt (equation 1).

    The diagonal is zero, as in the authors' code.
    """
    layers: dict[int, Tensor] = {}
    (_, batch), *_ = batches([prompt], 1, device=model.device)
    _backward(model, batch, [label], lambda layer, product: layers.update({layer: product[0]}))
    flows = torch.stack([layers[layer].sum(0).abs() for layer in sorted(layers)])
    flows.diagonal(dim1=-2, dim2=-1).zero_()
    return flows.float().cpu()


def _backward(
    model: "PreTrainedModel", batch: Batch, labels: Sequence[int], reduce: Reduce
) -> None:
    """Hand A * dL/dA of every layer to `reduce`; L is the cross-entropy over the label words."""

    def watch(layer: int, weights: Tensor, value: Tensor, output: Tensor) -> Tensor:
        weights.register_hook(lambda gradient: reduce(layer, (weights * gradient).detach()))
        return output

    answers = torch.tensor([prompt.answers for prompt in batch.prompts], device=model.device)
    with frozen(model), instrument(model, Edit(after=watch, gradients=True)), torch.enable_grad():
        logits = target_logits(model, batch.inputs() | {"use_cache": False})
        right = torch.tensor(labels, device=model.device)
        loss = torch.nn.functional.cross_entropy(
            logits.gather(1, answers).float(), right, reduction="sum"
        )
        if not loss.isfinite():
            raise ModelError(
                f"the loss became {loss.item()} in {logits.dtype}; use --dtype float32 or bfloat16"
            )
        loss.backward()


def part_edges(batch: Batch) -> Bool[Tensor, "parts batch time time"]:
    """Which edges (row, column) belong to each of `PARTS`."""
    count, time = batch.input_ids.shape
    parts = torch.zeros(3, count, time, time, dtype=torch.bool)
    for row, (prompt, shift) in enumerate(zip(batch.prompts, batch.shifts, strict=True)):
        for places in prompt.labels:
            first = places[0] + shift
            for place in places:
                parts[0, row, place + shift, shift:first] = True
                parts[1, row, prompt.target + shift, place + shift] = True
        end = shift + len(prompt)
        parts[2, row, shift:end, shift:end] = True
    parts[2] &= torch.ones(time, time, dtype=torch.bool).tril(-1) & ~parts[0] & ~parts[1]
    return parts.to(batch.input_ids.device)
