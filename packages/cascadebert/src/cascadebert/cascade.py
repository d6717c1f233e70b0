"""The cascade: complete models of rising size, each seeing only what those before it deferred.

Every stage keeps its own configuration, tokenizer, width and family; nothing is shared but the label
names. Survivors are pooled: a stage sees all items deferred to it at once, sorted by length, so that
the large model's batches are as full as the small one's.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from octavo import console
from octavo.errors import ConfigError, DataError, ModelError
from octavo.models import load_model, load_tokenizer
from octavo.runtime import Runtime
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cascadebert.config import CostKind
from cascadebert.cost import StageCost, stage_cost
from cascadebert.data import Examples
from cascadebert.policy import Policy, exit_stage, fit_policy
from cascadebert.scores import log_odds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MANIFEST = "cascade.json"


@dataclass
class Stage:
    """One complete model.

    Attributes:
        name: where it came from.
        model: a sequence classifier in evaluation mode.
        tokenizer: its own.
        labels: the cascade's label names.
        classes: for each of these, the model's own class number.
        max_length: tokens after which a text is cut.
        weights: hash of its weights.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    labels: list[str]
    classes: list[int]
    max_length: int
    weights: str

    def encode(self, examples: Examples) -> list[dict[str, list[int]]]:
        """Token ids and masks of each example, cut to the stage's length, not padded."""
        batch = self.tokenizer(
            examples.texts,
            examples.pairs,
            truncation=True,
            max_length=self.max_length,
        )
        names = list(batch.keys())
        return [
            dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]

    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows as tensors [rows, longest], padded on the tokenizer's side."""
        side = self.tokenizer.padding_side
        fill = {"input_ids": int(self.tokenizer.pad_token_id or 0)}  # pyright: ignore
        return {
            key: pad_sequence(
                [torch.tensor(row[key]) for row in rows], True, fill.get(key, 0), side
            )
            for key in rows[0]
        }


@dataclass
class Predictions:
    """The answers of a cascade.

    Attributes:
        labels: label names, one an item.
        stages: the stage that answered, from 0, [items] of int64.
        scores: its log-odds, [items] of float64.
        logits: its logits in the order of the cascade's labels, [items, classes] of float32.
    """

    labels: list[str]
    stages: Tensor
    scores: Tensor
    logits: Tensor

    @property
    def confidence(self) -> Tensor:
        """Softmax probability of each answer."""
        return torch.sigmoid(self.scores)


class Cascade:
    """Complete classifiers from small to large over the same labels.

    Args:
        stages: smallest first.
        labels: their common label names, in the cascade's order.
        batch_tokens: tokens in a batch, padding included.
    """

    def __init__(
        self, stages: Sequence[Stage], labels: Sequence[str], batch_tokens: int = 8192
    ) -> None:
        self.stages = list(stages)
        self.labels = list(labels)
        self.batch_tokens = batch_tokens

    @classmethod
    def from_pretrained(
        cls,
        models: Sequence[str | Path],
        *,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        runtime: Runtime = Runtime(),
    ) -> "Cascade":
        """Load a trained cascade's folder, or fine-tuned classifiers from small to large.

        Args:
            models: one folder that `cascadebert train` made, or two models or more (hub ids or
                local folders).
            max_length: tokens after which a text is cut; each model's own limit, or what it was
                trained with, where that is None.
            batch_tokens: tokens in a batch, padding included.
            runtime: device and precision.

        Raises:
            ConfigError: a length is too small.
            ModelError: a model cannot be had, its checkpoint lacks a weight or has one too many, or
                the models' label names differ.
        """
        if batch_tokens < 1:
            raise ConfigError(f"--batch-tokens {batch_tokens}: must be 1 or more")
        if max_length is not None and max_length < 4:
            raise ConfigError(f"--max-length {max_length}: must be 4 or more")
        sources, labels = [str(model) for model in models], None
        if len(sources) == 1:
            folder = Path(sources[0]).expanduser()
            manifest = folder / MANIFEST
            if not manifest.is_file():
                raise ModelError(
                    f"{folder}: no cascade there ({MANIFEST} is missing); give a folder that "
                    "`cascadebert train` finished, or two fine-tuned models or more"
                )
            try:
                content = json.loads(manifest.read_text(encoding="utf-8"))
                sources = [str(folder / stage) for stage in content["stages"]]
                labels = [str(label) for label in content["labels"]]
                max_length = max_length or int(content["max_length"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{manifest}: not a cascade's description ({error})") from None
        device, dtype = runtime.torch_device(), runtime.torch_dtype()
        stages: list[Stage] = []
        for source in sources:
            stage = _load_stage(source, labels, max_length, dtype)
            stage.model.to(device)  # pyright: ignore[reportArgumentType]
            labels = labels or stage.labels
            stages.append(stage)
        return cls(stages, labels or [], batch_tokens)

    @property
    def hashes(self) -> list[str]:
        """Hash of each stage's weights, by which a policy knows its models."""
        return [stage.weights for stage in self.stages]

    def lengths(self, examples: Examples, sample: int = 2000) -> list[int]:
        """Tokens of a typical example at each stage, special ones included."""
        some = examples.at(range(min(sample, len(examples))))
        tokens = [[len(row["input_ids"]) for row in stage.encode(some)] for stage in self.stages]
        return [max(1, round(sum(counts) / len(counts))) for counts in tokens]

    def costs(self, lengths: Sequence[int]) -> list[StageCost]:
        """What an item of so many tokens costs at each stage."""
        return [
            stage_cost(stage.model, length)
            for stage, length in zip(self.stages, lengths, strict=True)
        ]

    def class_numbers(self, examples: Examples) -> list[int]:
        """The examples' labels as numbers in the cascade's order.

        Raises:
            DataError: a label is not one of the cascade's.
        """
        numbers = {label: number for number, label in enumerate(self.labels)}
        try:
            return [numbers[label] for label in examples.labels or []]
        except KeyError as error:
            known = ", ".join(self.labels)
            raise DataError(f"label {error} is not one of the model's: {known}") from None

    def logits(self, number: int, examples: Examples) -> Tensor:
        """One stage's logits on all examples.

        Args:
            number: of the stage, from 0.
            examples: any number of them; sorted by length into batches inside, order restored.

        Returns:
            [items, classes] of float32 on the CPU, in the order of the cascade's labels.
        """
        stage = self.stages[number]
        rows = stage.encode(examples)
        result = torch.empty(len(rows), len(self.labels))
        device = next(stage.model.parameters()).device
        name = f"stage {number + 1} of {len(self.stages)}"
        with torch.inference_mode(), console.counter(name, len(rows), "texts") as advance:
            for batch in _batches([len(row["input_ids"]) for row in rows], self.batch_tokens):
                inputs = stage.pad([rows[i] for i in batch])
                inputs = {key: value.to(device) for key, value in inputs.items()}
                output = stage.model(**inputs).logits
                result[batch] = output[:, stage.classes].float().cpu()
                advance(len(batch))
        if not result.isfinite().all():
            raise ModelError(f"{stage.name}: gives logits that are not finite; train it again")
        return result

    def predict(self, examples: Examples, threshold: float) -> Predictions:
        """Answer each example at the first stage that is certain enough.

        Args:
            examples: any number of them, one or more.
            threshold: in log-odds, as in `Policy.threshold`.
        """
        alive = torch.arange(len(examples))
        logits = torch.empty(len(examples), len(self.labels))
        stages = torch.zeros(len(examples), dtype=torch.long)
        for number in range(len(self.stages)):
            last = number == len(self.stages) - 1
            here = self.logits(number, examples.at(alive.tolist()))
            leave = torch.ones(len(alive)) > 0 if last else log_odds(here) > threshold
            logits[alive[leave]] = here[leave]
            stages[alive[leave]] = number
            alive = alive[~leave]
            if len(alive) == 0:
                break
        names = [self.labels[number] for number in logits.argmax(dim=-1).tolist()]
        return Predictions(names, stages, log_odds(logits), logits)

    def calibrate(
        self, examples: Examples, target_speedup: float, cost: CostKind = "flops"
    ) -> Policy:
        """Choose the threshold for a wanted speed-up on these labelled examples.

        Raises:
            ConfigError: it is out of reach; the message names the ceiling.
        """
        lengths = self.lengths(examples)
        policy = fit_policy(
            [self.logits(number, examples) for number in range(len(self.stages))],
            self.class_numbers(examples),
            [price.of(cost) for price in self.costs(lengths)],
            target_speedup,
            cost,
        )
        calibration = {"rows": len(examples), "hash": examples.fingerprint(), "lengths": lengths}
        return replace(policy, models=self.hashes, calibration=calibration)

    def run_all(self, examples: Examples, threshold: float) -> Predictions:
        """The same answers by running every stage on everything, as the authors' code does."""
        everything = [self.logits(number, examples) for number in range(len(self.stages))]
        stages = exit_stage([log_odds(logits) for logits in everything[:-1]], threshold)
        logits = torch.stack(everything)[stages, torch.arange(len(examples))]
        names = [self.labels[number] for number in logits.argmax(dim=-1).tolist()]
        return Predictions(names, stages, log_odds(logits), logits)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, each within the token budget when padded, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _load_stage(
    source: str, labels: Sequence[str] | None, max_length: int | None, dtype: torch.dtype
) -> Stage:
    from transformers import AutoModelForSequenceClassification

    model = load_model(AutoModelForSequenceClassification, source, dtype="auto")
    weights = hash_weights(model)  # as stored, so that a policy holds in any precision
    model.to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    tokenizer = load_tokenizer(source)
    if (model.config.num_labels or 0) < 2:
        raise ModelError(f"{source}: a regression head has no confidence; needs two labels or more")
    named = {int(number): str(name) for number, name in (model.config.id2label or {}).items()}
    if all(name == f"LABEL_{number}" for number, name in named.items()):
        named = {number: str(number) for number in named}  # the library's stand-in for no names
    names = {name: number for number, name in named.items()}
    if labels is not None and set(names) != set(labels):
        raise ModelError(
            f"{source}: its labels ({', '.join(names)}) are not those of the first stage "
            f"({', '.join(labels)}); set id2label in its config.json to the same names"
        )
    labels = list(labels or names)
    limit = longest(model, tokenizer)
    return Stage(
        name=Path(source).name,
        model=model.eval(),
        tokenizer=tokenizer,
        labels=labels,
        classes=[names[label] for label in labels],
        max_length=min(max_length or limit, limit),
        weights=weights,
    )


def longest(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Tokens that fit into a model, by its positions and its tokenizer."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet"):
        positions -= config.pad_token_id + 1  # these count positions from behind the padding id
    return int(min(positions, tokenizer.model_max_length))


def hash_weights(model: "PreTrainedModel") -> str:
    """A hash of a model's weights, whatever file they came from."""
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        total.update(weight.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()


def single(cascade: Cascade, number: int) -> Cascade:
    """One stage of a cascade as a cascade of its own, for comparison.

    Raises:
        ConfigError: there is no such stage.
    """
    if not 0 <= number < len(cascade.stages):
        raise ConfigError(f"there is no stage {number + 1} of {len(cascade.stages)}")
    return Cascade([cascade.stages[number]], cascade.labels, cascade.batch_tokens)
