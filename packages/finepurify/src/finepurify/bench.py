"""The defender's bench: a suspect, clean rows to compute on, and clean rows to judge by."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from octavo.errors import ModelError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from torch import Tensor, nn

from finepurify.config import Head, TuneConfig
from finepurify.data import Item, batches
from finepurify.metrics import Share, accuracy
from finepurify.models import answers, place
from finepurify.pairing import WeightPair
from finepurify.points import parameters_of
from finepurify.strategies import Weights
from finepurify.tune import fine_tune, train_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Bench:
    """Everything that a defence is tried with; the model is reused from one trial to the next.

    Attributes:
        pair: the two models.
        model: the suspect, loaded in float32.
        pad: the padding token's id.
        items: clean rows to compute on: Fisher, fine-tuning, counts.
        held: clean rows that only judge accuracy.
        labels: of the held rows.
        tune: the short fine-tuning.
        run: where trainings keep their checkpoints and metrics.
        runtime: seed, device, precision.
        head: keep the suspect's classifier, draw it anew, or train the new one alone first, too.
        seconds: what the last trial of a sweep took: choosing dimensions, and the fine-tuning.
    """

    pair: WeightPair
    model: "PreTrainedModel"
    pad: int
    items: Sequence[Item]
    held: Sequence[Item]
    labels: Sequence[int]
    tune: TuneConfig
    run: RunDir
    runtime: Runtime = field(default_factory=Runtime)
    head: Head = "keep"
    seconds: float = 0.0
    _suspect: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._suspect = copy.deepcopy(self.model.state_dict())
        if self.head != "keep":
            self._draw_head()

    def _draw_head(self) -> None:
        """New weights for what INIT lacks: small random matrices, and biases of zero."""
        generator = torch.Generator().manual_seed(self.runtime.seed)
        for name in self._head_names():
            value = self._suspect[name]
            drawn = 0.02 * torch.randn(value.shape, generator=generator)
            value.copy_(drawn if value.ndim > 1 else torch.zeros_like(drawn))

    def _head_names(self) -> list[str]:
        """The model's names for what INIT lacks."""
        return [
            name for name in map(self.pair.model_name, self.pair.lacking) if name in self._suspect
        ]

    def place(self, weights: Weights) -> "PreTrainedModel":
        """The model with a strategy's weights, and the suspect's where nothing was compared."""
        self.model.load_state_dict(self._suspect)
        place(self.model, parameters_of(self.model, self.pair), weights.tensor)
        return self.model.eval()

    def defended(self, weights: Weights, name: str) -> "PreTrainedModel":
        """The model after a strategy and the short fine-tuning.

        Args:
            weights: the strategy's.
            name: of the training within the run.
        """
        model = self.place(weights)
        if self.head == "retrain":
            train_head(
                model, self._head_names(), self.items, self.pad, self.tune, self.run,
                f"{name} head", self.runtime,
            )  # fmt: skip
        return fine_tune(model, self.items, self.pad, self.tune, self.run, name, self.runtime)

    def accuracy(self) -> Share:
        """Of the model as it is now, on the held rows."""
        return accuracy(answers(self.model, self.held, self.pad, self.runtime), self.labels)

    def answers(self, items: Sequence[Item]) -> np.ndarray:
        """Of the model as it is now."""
        return answers(self.model, items, self.pad, self.runtime)


def frequencies(items: Sequence[Item]) -> dict[int, int]:
    """How often each token id stands in the rows."""
    return dict(Counter(token for item in items for token in item["input_ids"]))


def activity(
    model: "PreTrainedModel", pair: WeightPair, items: Sequence[Item], pad: int, runtime: Runtime
) -> dict[str, Tensor]:
    """Mean activation of each layer's inner neurons on clean rows, for fine-pruning.

    Inner neurons are the outputs of the layers as wide as the configuration's inner size, through the
    model's own activation function; padding is not counted.

    Args:
        model: with the suspect's weights.
        pair: whose tensors the neurons' weights and biases are.
        items: clean rows.
        pad: the padding token's id.
        runtime: device and precision.

    Returns:
        [neurons] by the names of the tensors that make them.

    Raises:
        ModelError: no compared layer makes inner neurons alone.
    """
    from transformers.activations import ACT2FN

    config = model.config
    inner = next(
        getattr(config, name)
        for name in ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim", "hidden_size")
        if getattr(config, name, None)
    )
    if getattr(config, "model_type", "") == "gpt2":
        inner = config.n_inner or 4 * config.n_embd
    kind = next(
        getattr(config, name)
        for name in ("hidden_act", "activation", "hidden_activation", "activation_function")
        if getattr(config, name, None)
    )
    act = ACT2FN[kind]
    by_parameter = {pair.model_name(name): name for name in pair.names}
    totals: dict[str, Tensor] = {}
    mask: Tensor = torch.empty(0)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            values = act(output.detach().float()).reshape(*mask.shape, -1)
            totals[name] = totals.get(name, torch.zeros(inner)) + values[mask].sum(0).cpu()

        return hook

    handles = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        # a Linear's weight is [out, in], a Conv1D's [in, out]
        out = weight.shape[0 if isinstance(module, nn.Linear) else 1]
        if out == inner and f"{name}.weight" in by_parameter:
            handles.append(module.register_forward_hook(watch(name)))
    if not handles:
        raise ModelError(
            f"{pair.suspect.source}: no layer of inner neurons was found ({inner} wide); "
            "fine-pruning does not fit this model"
        )
    device = runtime.torch_device()
    model.to(cast(Any, device))
    with torch.inference_mode():
        for _, batch in batches(items, 32, pad):
            mask = batch["attention_mask"].bool().to(device)
            batch.pop("labels")
            model(**{name: value.to(device) for name, value in batch.items()})
    for handle in handles:
        handle.remove()
    words = sum(sum(item["attention_mask"]) for item in items)
    return {
        by_parameter[parameter]: total / words
        for name, total in totals.items()
        for parameter in (f"{name}.weight", f"{name}.bias")
        if parameter in by_parameter
    }
