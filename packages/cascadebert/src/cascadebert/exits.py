"""Exits inside one backbone: small classifiers on the first token's state after each layer.

The last exit is the model's own head. Any encoder of the library will do, if its layers are a list that
it goes through in order. The classifier is saved as the ecosystem does, its exits beside it.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from octavo.errors import ConfigError, ModelError
from octavo.models import load_model
from octavo.rundir import atomic, write_json
from octavo.runtime import is_main
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXITS = "exits.json"
WEIGHTS = "exits.safetensors"


class Exit(nn.Module):
    """A norm, a pooler and a classifier on the first token's state, as DeeBERT's."""

    def __init__(self, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pooler = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def forward(self, states: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """Logits of an exit."""
        return self.classifier(self.dropout(torch.tanh(self.pooler(self.norm(states)))))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of a model's layers.

    Raises:
        ModelError: it has none of the length that its configuration names.
    """
    config: Any = model.config
    count = int(config.num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__}: no list of {count} layers in it, so that exits have no place; "
        "use a BERT-like encoder"
    )


def first_layers(model: "PreTrainedModel", count: int) -> "PreTrainedModel":
    """A copy with the first layers only: the paper's BERT-kL, to be fine-tuned.

    Raises:
        ConfigError: it has not as many.
    """
    short = copy.deepcopy(model)
    layers = layers_of(short)
    if not 1 <= count <= len(layers):
        raise ConfigError(f"{count} layers of {len(layers)}: must be from 1 to all of them")
    del layers[count:]
    short.config.num_hidden_layers = count
    if getattr(short.config, "layer_types", None):
        short.config.layer_types = short.config.layer_types[:count]
    return short


class ExitOutput(NamedTuple):
    """What every exit answers.

    Attributes:
        logits: of every exit, each [batch, classes], the first layer's first.
        certainties: log-odds that an exit is right, of every exit but the last, each [batch]; none
            without a head that tells them.
    """

    logits: list[Tensor]
    certainties: list[Tensor]


class MultiExit(nn.Module):
    """A sequence classifier with an exit after every layer but the last, where its own head stands.

    Args:
        model: the classifier.
        learn_to_exit: with BERxiT's head, linear on an exit's state and shared by all exits, that
            tells how certain an exit is.
    """

    def __init__(self, model: "PreTrainedModel", learn_to_exit: bool = False) -> None:
        super().__init__()
        self.model = model
        layers_of(model)
        count = int(model.config.num_hidden_layers)
        width, classes = int(model.config.hidden_size), int(model.config.num_labels or 2)
        self.exits = nn.ModuleList([Exit(width, classes) for _ in range(count - 1)])
        self.certainty = nn.Linear(width, 1) if learn_to_exit else None

    def forward(self, **inputs: Tensor) -> ExitOutput:
        """Logits of every exit, and its certainty if there is a head for it."""
        output = self.model(**inputs, output_hidden_states=True)
        states = [state[:, 0] for state in output.hidden_states[1:-1]]
        early = [exit(state) for exit, state in zip(self.exits, states, strict=True)]
        head = self.certainty
        certainties = [head(state)[:, 0] for state in states] if head is not None else []
        return ExitOutput([*early, output.logits], certainties)

    def states(self, **inputs: Tensor) -> Float[Tensor, "batch exits width"]:
        """The first token's state after every layer but the last, which a frozen backbone keeps."""
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[1:-1]
        return torch.stack([state[:, 0] for state in hidden], dim=1)

    def save(self, folder: Path, tokenizer: Any, max_length: int | None = None) -> None:
        """Write the classifier as the ecosystem does, and the exits beside it (rank 0 alone)."""
        from safetensors.torch import save_file

        if not is_main():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic(folder) as temporary:  # all of it, or nothing
            self.model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            save_file(self._heads(), temporary / WEIGHTS)
            write_json(temporary / EXITS, {"exits": len(self.exits) + 1, "max_length": max_length})

    @classmethod
    def load(cls, folder: Path) -> tuple["MultiExit", int | None]:
        """What `save` wrote, in float32: the network, and the tokens after which texts are cut.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        from safetensors.torch import load_file
        from transformers import AutoModelForSequenceClassification

        if not (folder / EXITS).is_file():
            raise ModelError(f"{folder}: no early-exit model there; run `cascadebert baseline`")
        try:
            max_length = json.loads((folder / EXITS).read_text(encoding="utf-8"))["max_length"]
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder}: its exits cannot be read ({error})") from None
        model = load_model(AutoModelForSequenceClassification, folder, dtype=torch.float32)
        network = cls(model, learn_to_exit=any(name.startswith("certainty.") for name in weights))
        if set(weights) != set(network._heads()):
            raise ModelError(f"{folder}: its exits are not those of a model of so many layers")
        for name, value in network._heads().items():
            value.copy_(weights[name])
        return network, max_length

    def _heads(self) -> dict[str, Tensor]:
        """The weights beside the classifier's, by their names in the file."""
        heads = self.exits.state_dict()
        if self.certainty is not None:
            heads |= {f"certainty.{name}": v for name, v in self.certainty.state_dict().items()}
        return heads
