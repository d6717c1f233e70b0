"""Early exit inside one backbone: the rivals that a cascade of complete models is measured against.

An exit is a small classifier on the first token's state after a layer; the last exit is the model's
own head. DeeBERT fine-tunes the backbone, freezes it and then trains the exits; a joint model (BERxiT,
PABEE) trains backbone and all exits at once. Rules: leave when confident (1 - entropy or largest
probability), or when `patience` exits in a row agree.

Any encoder of the library will do, if its layers are a list that it goes through in order. Inference
drops items from the batch as they leave, layer by layer, so that an exit saves real time.
"""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from octavo.errors import ConfigError, ModelError
from octavo.models import load_config, load_model, load_tokenizer, save_model
from octavo.rundir import RunDir, atomic, write_json
from octavo.runtime import Runtime, is_main, seed_everything
from octavo.training import TrainOptions, discard_checkpoints, fit
from torch import Tensor, nn

from cascadebert.config import BaselineConfig
from cascadebert.data import Examples
from cascadebert.finetune import (
    SCRATCH,
    collator,
    encode_rows,
    fine_tune,
    inputs_of,
    new_classifier,
    refuse_other_rows,
    scratch_shape,
    source_folder,
    train_options,
)
from cascadebert.losses import exit_losses
from cascadebert.policy import sweep
from cascadebert.scores import score
from cascadebert.stage import Stage, batches, load_stage, longest, make_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

EXITS = "exits.json"
WEIGHTS = "exits.safetensors"

Signal = Literal["max_probability", "entropy"]
Rule = Literal["max_probability", "entropy", "patience"]


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


class MultiExit(nn.Module):
    """A sequence classifier with an exit after every layer but the last, where its own head stands.

    Args:
        model: the classifier.
        exits: one a layer but the last; new ones by default.
    """

    def __init__(self, model: "PreTrainedModel", exits: Sequence[Exit] | None = None) -> None:
        super().__init__()
        self.model = model
        layers_of(model)
        count = int(model.config.num_hidden_layers)
        width, classes = int(model.config.hidden_size), int(model.config.num_labels or 2)
        self.exits = nn.ModuleList(exits or [Exit(width, classes) for _ in range(count - 1)])

    def forward(self, **inputs: Tensor) -> list[Float[Tensor, "batch classes"]]:
        """Logits of every exit, the first layer's first."""
        output = self.model(**inputs, output_hidden_states=True)
        states = output.hidden_states[1:-1]
        early = [exit(state[:, 0]) for exit, state in zip(self.exits, states, strict=True)]
        return [*early, output.logits]

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
            save_file(self.exits.state_dict(), temporary / WEIGHTS)
            write_json(temporary / EXITS, {"exits": len(self.exits) + 1, "max_length": max_length})


class CachedExits(nn.Module):
    """Exits alone, trained on states that a frozen backbone gave once."""

    def __init__(self, exits: nn.ModuleList) -> None:
        super().__init__()
        self.exits = exits

    def forward(self, states: Tensor) -> list[Tensor]:
        """Logits of every exit."""
        return [exit(states[:, number]) for number, exit in enumerate(self.exits)]


def train_rival(
    examples: Examples,
    labels: Sequence[str],
    config: BaselineConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> Path:
    """Train a rival on one backbone and save it under the run's folder.

    Args:
        examples: labelled training rows.
        labels: all label names.
        config: the kind, the backbone and the settings.
        run: the folder.
        runtime: seed, device and precision.

    Returns:
        The model's folder.

    Raises:
        ModelError: the backbone's layers cannot be found.
    """
    folder = run.path / "model"
    depth = _depth(config)
    if depth < 2:
        raise ConfigError(f"--model {config.model}: early exit needs two layers or more")
    if config.kind == "layers" and not 1 <= config.layers <= depth:
        raise ConfigError(f"--layers {config.layers}: must be from 1 to the backbone's {depth}")
    refuse_other_rows(run, examples)
    if folder.is_dir():
        log.info("%s is trained already", folder)
        return folder
    options = train_options(config)[0]
    if config.kind == "layers":
        return _train_first(examples, labels, options, config, run, runtime, folder)
    if config.kind == "joint":
        return _train_joint(examples, labels, options, config, run, runtime, folder)
    model, tokenizer = fine_tune(
        "backbone", config.model, examples, labels, options, config, run, runtime
    )
    two_stage = train_exits(model, tokenizer, examples, labels, config, run, runtime)
    two_stage.save(folder, tokenizer, config.max_length)
    for name in ("backbone", "exits"):
        discard_checkpoints(run, name)
    return folder


def _depth(config: BaselineConfig) -> int:
    if config.model.startswith(SCRATCH):
        return scratch_shape(config.model, config).layers
    return int(load_config(config.model).num_hidden_layers)


def train_exits(
    model: "PreTrainedModel",
    tokenizer: Any,
    examples: Examples,
    labels: Sequence[str],
    config: BaselineConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> MultiExit:
    """DeeBERT's second stage: exits on a frozen, fine-tuned backbone, whose states are kept.

    The sum of all exits' cross-entropies; none of them touches another.
    """
    seed_everything(runtime.seed)
    joined = MultiExit(model.eval())
    stage = make_stage("backbone", model, tokenizer, labels, config.max_length, runtime)
    encoded = stage.encode(examples)
    device = runtime.torch_device()
    count, width = len(joined.exits), int(model.config.hidden_size)
    kept = torch.empty(len(examples), count, width)
    with torch.inference_mode():
        for batch in batches(encoded.lengths, 8192):
            inputs = stage.pad([encoded.rows[i] for i in batch])
            kept[batch] = (
                joined.states(**{k: v.to(device) for k, v in inputs.items()}).float().cpu()
            )
    truth = [labels.index(label) for label in examples.labels or []]
    rows = [{"states": kept[i], "labels": label} for i, label in enumerate(truth)]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "states": torch.stack([row["states"] for row in some]),
            "labels": torch.tensor([row["labels"] for row in some]),
        }

    def loss(exits: Any, batch: dict[str, Tensor]) -> Tensor:
        found = exits(batch["states"])
        return sum(
            (nn.functional.cross_entropy(each.float(), batch["labels"]) for each in found),
            start=torch.zeros((), device=found[0].device),
        )

    options = TrainOptions(
        learning_rate=config.exit_learning_rate,
        epochs=config.exit_epochs,
        batch_size=config.batch_size,
        warmup=config.warmup,
        report_to=config.report_to,
    )
    heads: Any = CachedExits(joined.exits)
    fit(heads, rows, collate, run, "exits", options=options, runtime=runtime, loss=loss)
    return joined.eval()


def _train_first(
    examples: Examples, labels: Sequence[str], options: TrainOptions, config: BaselineConfig,
    run: RunDir, runtime: Runtime, folder: Path,
) -> Path:  # fmt: skip
    """BERT-kL: a classifier like any other, which can stand alone or be a stage."""
    source = source_folder(config.model, examples, config, runtime)
    seed_everything(runtime.seed)
    short = first_layers(new_classifier(source, labels), config.layers)
    model, tokenizer = fine_tune(
        "layers", source, examples, labels, options, config, run, runtime, model=short
    )
    save_model(folder, model, tokenizer)
    discard_checkpoints(run, "layers")
    return folder


def _train_joint(
    examples: Examples, labels: Sequence[str], options: TrainOptions, config: BaselineConfig,
    run: RunDir, runtime: Runtime, folder: Path,
) -> Path:  # fmt: skip
    source = source_folder(config.model, examples, config, runtime)
    tokenizer = load_tokenizer(source)
    seed_everything(runtime.seed)
    model = new_classifier(source, labels)
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    length = min(config.max_length, longest(model, tokenizer))
    rows = encode_rows(examples, tokenizer, labels, length, {})
    joint: Any = MultiExit(model)

    def loss(network: Any, batch: dict[str, Tensor]) -> Tensor:
        found = [logits.float() for logits in network(**inputs_of(batch))]
        return exit_losses(found, batch["labels"])

    fit(joint, rows, collator(tokenizer), run, "joint", options=options, runtime=runtime, loss=loss)
    joint.save(folder, tokenizer, config.max_length)
    discard_checkpoints(run, "joint")
    return folder


@dataclass
class EarlyExit:
    """A trained early-exit model as it is used.

    Attributes:
        stage: its backbone, tokenizer and labels.
        network: the exits on it.
        batch_tokens: tokens in a batch, padding included.
    """

    stage: Stage
    network: MultiExit
    batch_tokens: int = 8192

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        labels: Sequence[str] | None = None,
        max_length: int | None = None,
        runtime: Runtime = Runtime(),
    ) -> "EarlyExit":
        """Load what `cascadebert baseline` saved.

        Raises:
            ModelError: there is none, or its labels are others.
        """
        from safetensors.torch import load_file
        from transformers import AutoModelForSequenceClassification

        place = Path(folder)
        place = place / "model" if (place / "model" / EXITS).is_file() else place
        if not (place / EXITS).is_file():
            raise ModelError(f"{folder}: no early-exit model there; run `cascadebert baseline`")
        try:
            kept = json.loads((place / EXITS).read_text(encoding="utf-8"))["max_length"]
            weights = load_file(place / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{place}: its exits cannot be read ({error})") from None
        model = load_model(AutoModelForSequenceClassification, place, dtype=torch.float32)
        own = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
        wanted = list(labels or own)
        if sorted(own) != sorted(wanted):
            raise ModelError(f"{folder}: its labels ({', '.join(own)}) are not {', '.join(wanted)}")
        network = MultiExit(model)
        network.exits.load_state_dict(weights)
        tokenizer = load_tokenizer(place)
        stage = make_stage(place.name, model, tokenizer, wanted, max_length or kept, runtime)
        stage.classes = [own.index(label) for label in wanted]
        network.to(runtime.torch_device(), runtime.torch_dtype()).eval()
        return cls(stage, network)

    def logits(self, examples: Examples) -> list[Tensor]:
        """Logits of every exit on all examples, each [items, classes] of float32 on the CPU."""
        encoded = self.stage.encode(examples)
        count = len(self.network.exits) + 1
        result = [torch.empty(len(encoded), len(self.stage.labels)) for _ in range(count)]
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            for batch in batches(encoded.lengths, self.batch_tokens):
                inputs = self.stage.pad([encoded.rows[i] for i in batch])
                found = self.network(**{key: value.to(device) for key, value in inputs.items()})
                for exit, logits in zip(result, found, strict=True):
                    exit[batch] = logits[:, self.stage.classes].float().cpu()
        return result

    def predict(self, examples: Examples, rule: Rule, bar: float) -> tuple[Tensor, Tensor]:
        """Answer each example at the first exit that the rule accepts; the others go on together.

        Args:
            examples: any number of them.
            rule: max_probability or entropy, whose score must lie above the bar, or patience.
            bar: the threshold in log-odds, or the number of exits in a row that must agree with
                the one before.

        Returns:
            Predicted classes and exits (from 0), both [items] of int64.
        """
        encoded = self.stage.encode(examples)
        classes = torch.empty(len(encoded), dtype=torch.long)
        exits = torch.empty(len(encoded), dtype=torch.long)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            for batch in batches(encoded.lengths, self.batch_tokens):
                inputs = self.stage.pad([encoded.rows[i] for i in batch])
                inputs = {key: value.to(device) for key, value in inputs.items()}
                found, left = _compacted(self.network, inputs, rule, bar)
                classes[batch], exits[batch] = found.cpu(), left.cpu()
        return torch.tensor(self.stage.classes).argsort()[classes], exits


def load_rival(
    folder: str | Path,
    labels: Sequence[str],
    max_length: int | None = None,
    runtime: Runtime = Runtime(),
) -> "EarlyExit | Stage":
    """What `cascadebert baseline` saved: an early-exit model, or a shallow classifier.

    Raises:
        ModelError: there is neither.
    """
    place = Path(folder) / "model"
    if (place / "config.json").is_file() and not (place / EXITS).is_file():
        return load_stage(str(place), labels, max_length, runtime=runtime)
    return EarlyExit.from_pretrained(folder, labels, max_length, runtime)


class _AllLeft(Exception):
    """Raised through the model's own loop over layers when no item is left in the batch."""


def _compacted(
    network: MultiExit, inputs: dict[str, Tensor], rule: Rule, bar: float
) -> tuple[Tensor, Tensor]:
    """Run the layers one by one on the items that have not left yet."""
    size = len(inputs["input_ids"])
    device = inputs["input_ids"].device
    classes = torch.zeros(size, dtype=torch.long, device=device)
    exits = torch.full((size,), len(network.exits), dtype=torch.long, device=device)
    alive = torch.arange(size, device=device)
    before = torch.full((size,), -1, dtype=torch.long, device=device)
    streak = torch.zeros(size, dtype=torch.long, device=device)

    def after(number: int, state: Tensor) -> Tensor:
        """Which items of the compacted batch go on."""
        nonlocal alive
        logits = network.exits[number](state[:, 0])
        answer = logits.argmax(dim=-1)
        if rule == "patience":
            same = answer == before[alive]
            streak[alive] = torch.where(same, streak[alive] + 1, torch.zeros_like(streak[alive]))
            before[alive] = answer
            leave = streak[alive] >= bar
        else:
            leave = score(logits.float(), rule) > bar
        gone = alive[leave]
        classes[gone], exits[gone] = answer[leave], number
        alive = alive[~leave]
        return ~leave

    with _dropping(network.model, size, lambda: alive, after):
        try:
            logits = network.model(**inputs).logits
            classes[alive] = logits.argmax(dim=-1)
        except _AllLeft:
            pass
    return classes, exits


@contextmanager
def _dropping(model: nn.Module, size: int, alive: Any, after: Any) -> Iterator[None]:
    """Hooks that give every layer the remaining items only, and its output to an exit."""
    layers = layers_of(model)
    handles = []

    def fewer(value: Any) -> Any:
        """A mask [batch, ...] of the whole batch, cut to the items that are left."""
        is_mask = isinstance(value, Tensor) and value.dim() in (2, 4) and len(value) == size
        return value[alive()] if is_mask and len(alive()) < size else value

    def before(layer: Any, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        state, *others = arguments
        masks = {key: fewer(value) if "mask" in key else value for key, value in named.items()}
        return (state, *[fewer(value) for value in others[:1]], *others[1:]), masks

    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if number == len(layers) - 1:
            continue

        def behind(layer: Any, arguments: Any, output: Any, number: int = number) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            stay = after(number, state)
            if not stay.any():
                raise _AllLeft
            state = state[stay]
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handles.append(layer.register_forward_hook(behind))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def exit_sweep(
    logits: Sequence[Tensor], labels: Sequence[int], kind: Signal = "entropy"
) -> pd.DataFrame:
    """Accuracy and speed-up in layers at every threshold, exactly, as `sweep` gives it of a cascade.

    An item that leaves at exit i has paid i layers: layers are visited once, so each costs one.
    """
    scores = [score(exit, kind) for exit in logits[:-1]]
    table = sweep(logits, labels, [1.0] * len(logits), scores)
    return table.assign(speedup=len(logits) * table["speedup"])


def patience_table(logits: Sequence[Tensor], labels: Sequence[int]) -> pd.DataFrame:
    """Accuracy and speed-up in layers at every patience: the only points this rule can reach."""
    answers = torch.stack([exit.argmax(dim=-1) for exit in logits])
    rows = []
    for patience in range(1, len(logits)):
        exits = patience_exits(answers, patience)
        given = answers[exits, torch.arange(answers.shape[1])].numpy()
        rows.append(
            {
                "patience": patience,
                "accuracy": float((given == np.asarray(labels)).mean()),
                "speedup": len(logits) / float((exits + 1).double().mean()),
            }
        )
    return pd.DataFrame(rows)


def patience_exits(answers: Tensor, patience: int) -> Tensor:
    """At which exit each item leaves: where so many answers in a row were like the one before.

    Args:
        answers: predicted classes, [exits, items].
        patience: how many.
    """
    exits = torch.full((answers.shape[1],), len(answers) - 1)
    streak = torch.zeros(answers.shape[1], dtype=torch.long)
    inside = torch.ones(answers.shape[1], dtype=torch.bool)
    for number in range(1, len(answers)):
        same = answers[number] == answers[number - 1]
        streak = torch.where(same, streak + 1, torch.zeros_like(streak))
        leave = inside & (streak >= patience)
        exits[leave] = number
        inside &= ~leave
    return exits
