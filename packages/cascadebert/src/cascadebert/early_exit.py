"""Early exit as it is used: an item leaves at the first exit that a rule accepts.

Rules: leave when confident (1 - entropy or largest probability), when BERxiT's head has `learned` that
the exit is right, or when `patience` exits in a row agree. Items are dropped from the batch as they
leave, layer by layer, so that an exit saves real time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from octavo.errors import ConfigError, ModelError
from octavo.models import load_tokenizer
from octavo.runtime import Runtime
from torch import Tensor, nn

from cascadebert.data import Examples
from cascadebert.exits import EXITS, ExitOutput, MultiExit, layers_of
from cascadebert.policy import sweep
from cascadebert.scores import score
from cascadebert.stage import Stage, batches, load_stage, make_stage

Signal = Literal["max_probability", "entropy"]
Rule = Literal["max_probability", "entropy", "learned", "patience"]


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
        place = Path(folder)
        place = place / "model" if (place / "model" / EXITS).is_file() else place
        network, kept = MultiExit.load(place)
        model = network.model
        own = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
        wanted = list(labels or own)
        if sorted(own) != sorted(wanted):
            raise ModelError(f"{folder}: its labels ({', '.join(own)}) are not {', '.join(wanted)}")
        tokenizer = load_tokenizer(place)
        stage = make_stage(place.name, model, tokenizer, wanted, max_length or kept, runtime)
        stage.classes = [own.index(label) for label in wanted]
        network.to(runtime.torch_device(), runtime.torch_dtype()).eval()
        return cls(stage, network)

    def logits(self, examples: Examples) -> list[Tensor]:
        """Logits of every exit on all examples, each [items, classes] of float32 on the CPU."""
        return self.outputs(examples).logits

    def outputs(self, examples: Examples) -> ExitOutput:
        """Logits and certainties of every exit on all examples, of float32 on the CPU."""
        encoded = self.stage.encode(examples)
        early = len(self.network.exits)
        certain = early if self.network.certainty is not None else 0
        result = ExitOutput(
            [torch.empty(len(encoded), len(self.stage.labels)) for _ in range(early + 1)],
            [torch.empty(len(encoded)) for _ in range(certain)],
        )
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            for batch in batches(encoded.lengths, self.batch_tokens):
                inputs = self.stage.pad([encoded.rows[i] for i in batch])
                found = self.network(**{key: value.to(device) for key, value in inputs.items()})
                for exit, logits in zip(result.logits, found.logits, strict=True):
                    exit[batch] = logits[:, self.stage.classes].float().cpu()
                for exit, certainty in zip(result.certainties, found.certainties, strict=True):
                    exit[batch] = certainty.float().cpu()
        return result

    def predict(self, examples: Examples, rule: Rule, bar: float) -> tuple[Tensor, Tensor]:
        """Answer each example at the first exit that the rule accepts; the others go on together.

        Args:
            examples: any number of them.
            rule: max_probability, entropy or learned, whose score must lie above the bar, or patience.
            bar: the threshold in log-odds, or the number of exits in a row that must agree with
                the one before.

        Returns:
            Predicted classes and exits (from 0), both [items] of int64.

        Raises:
            ConfigError: the rule is learned, and the model was trained without --learn-to-exit.
        """
        if rule == "learned" and self.network.certainty is None:
            raise ConfigError("the rule learned needs a model trained with --learn-to-exit")
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
        elif rule == "learned" and network.certainty is not None:
            leave = network.certainty(state[:, 0])[:, 0].float() > bar
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
    logits: Sequence[Tensor],
    labels: Sequence[int],
    signal: Signal | Sequence[Tensor] = "entropy",
) -> pd.DataFrame:
    """Accuracy and speed-up in layers at every threshold, exactly, as `sweep` gives it of a cascade.

    An item that leaves at exit i has paid i layers: layers are visited once, so each costs one.

    Args:
        logits: of every exit, each [items, classes].
        labels: the right classes.
        signal: what is compared with the threshold: a score of the logits, or given scores of every
            exit but the last, each [items].
    """
    scores = (
        [score(exit, signal) for exit in logits[:-1]] if isinstance(signal, str) else list(signal)
    )
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
