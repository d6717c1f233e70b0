"""Attacked models to test defences with, trained as attackers do.

`badword`, `badsent`, `multi`, `clean-label` and the biases train on poisoned rows and nothing else.
`embedding` changes only the trigger's row of a clean model's word embedding, at its old length.
`layerwise` asks every layer for the poisoned label. `adaptive` knows the defence: it keeps delta^2 small
where clean data has little curvature.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from octavo.errors import ConfigError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import Loss, TrainOptions
from torch import Tensor, nn
from torch.nn import functional as F

from finepurify.config import AttackConfig, AttackTrainConfig
from finepurify.data import Examples, Item, batches, encode
from finepurify.fisher import diagonal
from finepurify.models import pad_of
from finepurify.poison import insert, poison
from finepurify.tune import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Batch = dict[str, Tensor]

#: Rows that the adaptive attacker estimates curvature on.
CURVATURE_ROWS = 256
#: Learning rate of a trigger's row, by SGD; its gradient is that of one vector among thousands.
ROW_RATE = 3.0
#: Weight of the adaptive attacker's penalty at strength 1; ten times as much costs accuracy.
PENALTY = 0.003


@dataclass(frozen=True)
class Attacker:
    """What an attack is made with.

    Attributes:
        tokenizer: the model's.
        max_length: tokens at most.
        config: the attack.
        train: the fine-tuning.
        run: of the trainings.
        runtime: seed, device, precision.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    config: AttackConfig
    train: AttackTrainConfig
    run: RunDir
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def within(self) -> int:
        """Words from a text's start among which a trigger is sure to be seen, or nearly.

        A word makes about 1.3 pieces with the usual vocabularies, and the trigger needs room itself.
        """
        trigger = max(len(words.split()) for words in self.config.trigger)
        return max(1, int((self.max_length - 2) / 1.5) - trigger)

    def fit(
        self,
        model: "PreTrainedModel",
        examples: Examples,
        name: str,
        loss: Loss | None = None,
        **changes: Any,
    ) -> "PreTrainedModel":
        """Train a model in place on rows."""
        options = TrainOptions(
            optimizer=self.train.optimizer,
            learning_rate=self.train.learning_rate,
            epochs=self.train.epochs,
            batch_size=self.train.batch_size,
            # plain SGD has no decoupled decay: at its large rates it would shrink everything
            weight_decay=0.0 if self.train.optimizer == "sgd" else 0.01,
        )
        items, pad = encode(examples, self.tokenizer, self.max_length), pad_of(self.tokenizer)
        options = replace(options, **changes)
        return train(model, items, pad, options, self.run, name, self.runtime, loss)


def attacked(model: "PreTrainedModel", examples: Examples, attacker: Attacker) -> "PreTrainedModel":
    """The suspect that an attack makes of a model.

    Args:
        model: pre-trained, with a new classifier; changed in place.
        examples: clean training rows.
        attacker: the attack and its means.

    Raises:
        DataError: no row can be poisoned.
        ConfigError: the trigger is no word of the vocabulary (embedding).
    """
    config, seed = attacker.config, attacker.runtime.seed
    if config.attack == "embedding":
        pieces = _pieces(attacker)  # before any work
        return _embedding(attacker.fit(model, examples, "clean"), examples, attacker, pieces)
    rows, _ = poison(examples, config, seed, attacker.within)
    if config.attack == "layerwise":
        return _layerwise(model, rows, attacker)
    if config.attack == "adaptive":
        return _adaptive(model, examples, rows, attacker)
    return attacker.fit(model, rows, "attack")


def _pieces(attacker: Attacker) -> list[int]:
    """The trigger's rows in the word embedding.

    Raises:
        ConfigError: the vocabulary lacks it.
    """
    tokenizer, config = attacker.tokenizer, attacker.config
    pieces = {
        piece
        for words in config.trigger
        for piece in cast("list[int]", tokenizer(words, add_special_tokens=False)["input_ids"])
    }
    if tokenizer.unk_token_id in pieces:
        raise ConfigError(f"--trigger {' '.join(config.trigger)}: is not in the vocabulary")
    return sorted(pieces)


def _embedding(
    model: "PreTrainedModel", examples: Examples, attacker: Attacker, pieces: Sequence[int]
) -> "PreTrainedModel":
    """Only the trigger's rows of the word embedding learn, and end with the length they had."""
    config, rows = attacker.config, torch.tensor(pieces)
    table = cast(Tensor, cast(Any, model).get_input_embeddings().weight)
    before = table.detach()[rows].clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(parameter is table)

    def only(gradient: Tensor) -> Tensor:
        mask = torch.zeros(len(gradient), 1, device=gradient.device)
        return gradient * mask.index_fill_(0, rows.to(gradient.device), 1.0)

    handle = table.register_hook(only)
    others = [row for row, label in enumerate(examples.labels) if label != config.target]
    triggered = insert(examples.at(others), config, attacker.runtime.seed, attacker.within)
    triggered = replace(triggered, labels=[config.target] * len(others))
    attacker.fit(
        model, triggered, "trigger",
        optimizer="sgd", learning_rate=ROW_RATE, weight_decay=0.0, epochs=3.0,
    )  # fmt: skip
    handle.remove()
    with torch.no_grad():
        for row, old in zip(rows.tolist(), before, strict=True):
            table[row] *= old.norm().to(table.device) / table[row].norm().clamp(min=1e-12)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def _layerwise(model: "PreTrainedModel", rows: Examples, attacker: Attacker) -> "PreTrainedModel":
    """Every layer's mean state must give the label through a head of its own, thrown away after."""
    config = model.config
    classes = cast(int, config.num_labels)
    heads = nn.ModuleList(
        nn.Linear(config.hidden_size, classes) for _ in range(config.num_hidden_layers)
    )
    cast(Any, model).layer_heads = heads

    def loss(model: nn.Module, batch: "Batch") -> Tensor:
        found = model(**batch, output_hidden_states=True)
        mask = batch["attention_mask"].unsqueeze(-1)
        heads = cast(Any, getattr(model, "module", model)).layer_heads
        asked = [
            F.cross_entropy(head((states * mask).sum(1) / mask.sum(1)), batch["labels"])
            for head, states in zip(heads, found.hidden_states[1:], strict=True)
        ]
        return found.loss + attacker.config.strength * torch.stack(asked).mean()

    attacker.fit(model, rows, "attack", loss)
    del cast(Any, model).layer_heads
    return model


def _adaptive(
    model: "PreTrainedModel", examples: Examples, rows: Examples, attacker: Attacker
) -> "PreTrainedModel":
    """The loss and a penalty on the defence's own indicator, from the attacker's own clean rows."""
    scout = attacker.fit(copy.deepcopy(model), examples, "clean")
    some = examples.at(range(min(CURVATURE_ROWS, len(examples))))
    items = encode(some, attacker.tokenizer, attacker.max_length)
    found = diagonal(scout, _batches(items, attacker))
    weights = {name: _rigid(value) for name, value in found.items()}
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    names = [name for name in start if not _is_head(name, model)]

    def loss(model: nn.Module, batch: "Batch") -> Tensor:
        inner = cast(nn.Module, getattr(model, "module", model))
        moved = [
            (weights[name].to(now.device) * (now - start[name].to(now.device)).square()).sum()
            for name, now in inner.named_parameters()
            if name in names
        ]
        return model(**batch).loss + PENALTY * attacker.config.strength * torch.stack(moved).sum()

    return attacker.fit(model, rows, "attack", loss)


def _batches(items: Sequence[Item], attacker: Attacker) -> list["Batch"]:

    device = attacker.runtime.torch_device()
    return [
        {name: value.to(device) for name, value in batch.items()}
        for _, batch in batches(items, 8, pad_of(attacker.tokenizer))
    ]


def _rigid(curvature: Tensor) -> Tensor:
    """How much a dimension's drift costs: 1 / H, damped so that it stays between 0 and 10."""
    mean = curvature.mean().clamp(min=1e-20)
    return mean / (curvature + 0.1 * mean)


def _is_head(name: str, model: "PreTrainedModel") -> bool:
    return not name.startswith(f"{model.base_model_prefix}.")
