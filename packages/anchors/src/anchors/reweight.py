"""Anchor re-weighting (section 3.1 of the paper): how much of each label word the target should read.

The target's attention on the label words of class i is multiplied by exp(beta) of the layer, head and
class, and not normalised again. As only that row changes, the output changes by A (exp(beta) - 1) V, so
that the model's own attention is called as it is. Everything before the target stays constant: training
keeps its keys and values, and an epoch costs one token a prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from octavo.console import progress
from octavo.errors import ConfigError, DataError, ModelError
from octavo.rundir import write_text
from torch import Tensor, nn

from anchors.attention import Edit, frozen, instrument
from anchors.cache import check_model, read_saved, signature, write_saved
from anchors.evaluate import target_logits
from anchors.prompts import Batch, Prompt, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TENSORS, ABOUT = "reweighter.safetensors", "reweighter.json"


class Reweighter(nn.Module):
    """One number for each layer, head and class, learned from a few labelled prompts.

    Attributes:
        beta: [layers, heads, classes]; zeros change nothing.
        about: what a saved one remembers: model, task, demonstrations, training.
    """

    beta: Float[Tensor, "layers heads classes"]

    def __init__(
        self, model: "PreTrainedModel", classes: int, about: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        config = model.config.get_text_config(decoder=True)
        shape = (config.num_hidden_layers, config.num_attention_heads, classes)
        self.beta = nn.Parameter(torch.zeros(shape, device=model.device))
        self.about = {"model": signature(model)} | dict(about or {})

    def around(self, model: "PreTrainedModel") -> Callable[[Batch], AbstractContextManager[None]]:
        """What `predict` runs each batch in."""
        return lambda batch: self.applied(model, batch)

    @contextmanager
    def applied(self, model: "PreTrainedModel", batch: Batch) -> Iterator[None]:
        """Re-weight meanwhile, in passes over a batch's prompts: whole, or their last token on a cache.

        Raises:
            ModelError: the model has other layers or heads.
            ConfigError: a prompt has a class that was not trained, or no demonstrations.
        """
        if not all(one.labels for one in batch.prompts):
            raise ConfigError("a prompt without demonstrations has no label words to re-weight")
        rows = torch.arange(len(batch.prompts), device=model.device)[:, None]
        places, kinds, there = _columns(batch, model.device)
        if int(kinds.max()) >= self.beta.shape[2]:
            raise ConfigError(
                f"the adapter has {self.beta.shape[2]} classes; a prompt shows class {int(kinds.max())}"
            )

        def add(layer: int, weights: Tensor, value: Tensor, output: Tensor) -> Tensor:
            if layer >= self.beta.shape[0] or weights.shape[1] != self.beta.shape[1]:
                raise ModelError(
                    f"the adapter is for {tuple(self.beta.shape[:2])} layers and heads, not this model"
                )
            gain = (self.beta[layer].exp() - 1)[:, kinds].transpose(0, 1) * there[:, None]
            targets = batch.targets - (weights.shape[-1] - weights.shape[-2])
            if int(targets.min()) < 0:  # a later step of generation
                return output
            read = weights[rows, :, targets[:, None], places].transpose(1, 2)
            states = value[rows, :, places].transpose(1, 2)
            states = states.repeat_interleave(weights.shape[1] // states.shape[1], 1)
            more = torch.einsum("bhp,bhpw->bhw", read * gain.to(read.dtype), states)
            output = output.clone()
            output[rows[:, 0], targets] += more
            return output

        with instrument(model, Edit(after=add, cached=True)):
            yield

    def fit(
        self,
        model: "PreTrainedModel",
        prompts: Sequence[Prompt],
        labels: Sequence[int],
        learning_rate: float = 0.01,
        epochs: int = 10,
        batch_size: int = 1,
        seed: int = 0,
    ) -> list[float]:
        """Train beta by the cross-entropy over the label words, with Adam; the model stays as it is.

        Args:
            model: whose attention is re-weighted.
            prompts: one or more, other than those it is judged on.
            labels: the right class of each.
            learning_rate: of Adam.
            epochs: passes over the prompts.
            batch_size: prompts in one step.
            seed: of their order.

        Returns:
            The mean loss of each epoch.

        Raises:
            ModelError: the loss became NaN or infinite.
        """
        from torch.nn.functional import cross_entropy

        if not prompts or len(prompts) != len(labels):
            raise DataError(f"{len(prompts)} prompts and {len(labels)} labels: as many are needed")
        draw = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam([self.beta], lr=learning_rate)
        losses = []
        with frozen(model), instrument(model, Edit(cached=True)):  # instrumented once for all steps
            groups = batches(prompts, batch_size, device=model.device)
            kept = [_all_but_last(model, batch) for _, batch in groups]
            for _ in progress(range(epochs), "training beta", unit="epochs"):
                total = 0.0
                for group in torch.randperm(len(groups), generator=draw).tolist():
                    numbers, batch = groups[group]
                    with self.applied(model, batch):
                        logits = target_logits(model, _last(batch, kept[group]))
                    answers = torch.tensor([one.answers for one in batch.prompts])
                    right = torch.tensor([labels[n] for n in numbers], device=logits.device)
                    chosen = logits.gather(1, answers.to(logits.device)).float()
                    loss = cross_entropy(chosen, right)
                    if not loss.isfinite():
                        raise ModelError(
                            f"the loss became {loss.item()} in {logits.dtype}; use a smaller "
                            "--learning-rate, or --dtype float32"
                        )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += float(loss.detach()) * len(numbers)
                losses.append(total / len(prompts))
        return losses

    def save(self, folder: Path) -> None:
        """Write `reweighter.safetensors`, `reweighter.json` and a card; what else lies there stays."""
        tensors = {"beta": self.beta.detach().cpu()}
        write_saved(folder, tensors, TENSORS, {"about": self.about}, ABOUT)
        write_text(folder / "README.md", self.card(folder.name))

    @classmethod
    def load(cls, folder: Path, model: "PreTrainedModel") -> "Reweighter":
        """A saved adapter, on a model's device.

        Raises:
            DataError: the folder holds none.
            ModelError: it was trained for another model.
        """
        content, tensors = read_saved(folder, ABOUT, TENSORS)
        if not isinstance(content.get("about"), dict):
            raise DataError(f"{folder}: {ABOUT} lacks about")
        check_model(folder, content["about"].get("model", {}), model)
        beta = tensors.get("beta")
        if beta is None or beta.ndim != 3:
            raise DataError(f"{folder}: {TENSORS} holds no beta of layers, heads and classes")
        adapter = cls(model, beta.shape[2], content["about"])
        with torch.no_grad():
            adapter.beta.copy_(beta)
        return adapter

    def card(self, name: str) -> str:
        """What the adapter is, how it was made and what it is worth, in Markdown."""
        layers, heads, classes = self.beta.shape
        made_by = self.about.get("model", {})
        lines = [
            f"{key}: {value}"
            for key, value in self.about.items()
            if key not in ("model", "task", "demonstrations", "trained texts")
        ]
        return f"""# Anchor re-weighting for a {made_by.get("type", "causal")} language model

{layers * heads * classes} numbers: exp(beta) multiplies the target's attention on the label words of
each of {classes} classes, in {layers} layers of {heads} heads. It belongs to the demonstrations and
the template in `{ABOUT}` and to the model it was trained with; another is refused.

{chr(10).join(f"- {line}" for line in lines)}

    anchors evaluate MODEL --adapter {name} --data TEXTS

Limits: trained on a few texts of one task; nothing is known of others until they are measured.
"""


def _columns(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where label words are, of which class, and which of these places are real: [batch, places]."""
    found = [
        [(place + shift, kind) for kind, places in zip(one.classes, one.labels, strict=True)
         for place in places]
        for one, shift in zip(batch.prompts, batch.shifts, strict=True)
    ]  # fmt: skip
    most = max(len(pairs) for pairs in found)
    filled = [[*pairs, *[(0, 0)] * (most - len(pairs))] for pairs in found]
    both = torch.tensor(filled, device=device)
    there = torch.tensor([[n < len(pairs) for n in range(most)] for pairs in found], device=device)
    return both[..., 0], both[..., 1], there


def _all_but_last(model: "PreTrainedModel", batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, of everything before the targets."""
    from transformers import DynamicCache

    inputs = {name: value[:, :-1] for name, value in batch.inputs().items()}
    with torch.no_grad():
        filled = model(**inputs, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in filled.layers]


def _last(batch: Batch, kept: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What a pass over the targets alone takes."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (key, value) in enumerate(kept):
        cache.update(key, value, layer)
    return {
        "input_ids": batch.input_ids[:, -1:],
        "attention_mask": batch.attention_mask.long(),
        "position_ids": batch.position_ids[:, -1:],
        "past_key_values": cache,
        "use_cache": True,
    }
