"""A model taught on instances; the best epoch on other instances is kept, and calibrated on them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from octavo.errors import DataError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import TrainOptions, fit
from torch import Tensor
from torch.nn import functional as F

from formbert.config import FitOptions, ObjectiveOptions
from formbert.data import Instance, need_gold
from formbert.modeling import FormBert
from formbert.objectives import (
    LOWEST,
    binary_loss,
    listed,
    listmle_loss,
    listnet_loss,
    listwise_loss,
    pair_loss,
)
from formbert.reader import Item, Reader
from formbert.scoring import Scored, score
from formbert.sources import annotation
from formbert.teacher import gloss_vectors, likeness

IGNORED = -100


def train(
    model: FormBert,
    reader: Reader,
    instances: Sequence[Instance],
    held: Sequence[Instance],
    run: RunDir,
    *,
    objective: ObjectiveOptions = ObjectiveOptions(),
    options: FitOptions = FitOptions(),
    runtime: Runtime = Runtime(),
    name: str = "model",
) -> FormBert:
    """Train a model in place; a run that was killed goes on from its last whole checkpoint.

    Args:
        model: of `modeling.build`.
        reader: of the inventory, with the model's encoding.
        instances: with right senses.
        held: others; the best epoch is that with most of their polysemous words right.
        run: gets metrics and checkpoints.
        objective: what is learnt.
        options: the optimisation.
        runtime: seed, device and precision.
        name: of this training within the run.

    Returns:
        The model, in evaluation mode, with its temperature in `config.calibration`.

    Raises:
        DataError: an instance has no right sense, or `held` no polysemous word.
        ModelError: a loss became NaN.
    """
    need_gold(instances, "training data")
    need_gold(held, "development data")
    lessons = Lessons(reader, reader.read(instances), objective, runtime)
    judged = [item for item in reader.read(held) if len(item.candidates) > 1]
    if not judged:
        raise DataError("development data: no instance has a word of several senses")

    def evaluate(model: Any) -> float:
        return accuracy(score(model, reader, judged), judged, reader)

    fit(
        model,
        range(len(lessons.items)),
        lessons.batch,
        run,
        name,
        options=TrainOptions(
            learning_rate=options.learning_rate,
            epochs=options.epochs,
            batch_size=options.batch_size,
            weight_decay=options.weight_decay,
            warmup=options.warmup,
            report_to=options.report_to,
        ),
        runtime=runtime,
        loss=lessons.loss,
        evaluate=evaluate,
        lengths=[len(item.span.ids) for item in lessons.items],
        rates={"formation": options.formation_learning_rate},
    )
    model.config.calibration = temperature(score(model, reader, judged), judged, reader)
    return model


class Lessons:
    """Batches of instances, and their loss.

    Args:
        reader: of the inventory.
        items: that it read.
        objective: what is learnt.
        runtime: where a teacher runs.
    """

    def __init__(
        self, reader: Reader, items: Sequence[Item], objective: ObjectiveOptions, runtime: Runtime
    ) -> None:
        self.reader, self.items, self.objective = reader, items, objective
        self.whole = objective.objective in ("pair", "in-batch")
        self.ranked = objective.objective in ("listnet", "listmle") or objective.rank_weight > 0
        self.annotated = reader.formations.sum(1) > 0
        self.labels = torch.tensor(
            [_or_ignored(annotation(one, reader.options, reader.labels)) for one in reader.senses]
        )
        if self.ranked:
            glosses = [sense.gloss for sense in reader.senses]
            self.teacher = gloss_vectors(glosses, objective.teacher, runtime)
        self.weights = self._weights() if objective.balanced else None

    def _weights(self) -> list[float]:
        """Total over count of the right sense, within its word."""
        words = Counter(item.instance.word for item in self.items)
        senses = Counter(item.instance.gold[0] for item in self.items)
        return [words[item.instance.word] / senses[item.instance.gold[0]] for item in self.items]

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """A batch of items: the model's inputs, and what is right."""
        items = [self.items[number] for number in numbers]
        pairs = self._pairs(items)
        senses = torch.tensor([sense for _, sense in pairs])
        text = torch.tensor([item for item, _ in pairs])
        cross = self.reader.options.arch == "cross"
        drawn = torch.rand(len(pairs) if cross else len(self.reader.senses))
        keep = (drawn if cross else drawn[senses]) >= self.objective.annotation_drop
        known = self.annotated[senses] & keep  # a bi-encoder reads each sense once for all texts
        inputs = (self.reader.cross if cross else self.reader.bi)(items, pairs, known)
        right = [{self.reader.number[name] for name in item.instance.gold} for item in items]
        gold = torch.tensor([sense in right[item] for item, sense in pairs])
        first = [min(one) for one in right]
        batch = {"inputs": inputs, "text": text, "gold": gold, "texts": torch.zeros(len(items))}
        if self.reader.options.authors:  # the formation of every row's own sense
            batch |= {"labels": self.labels[senses], "label_text": text}
        else:
            batch |= {"labels": self.labels[first], "label_text": torch.arange(len(items))}
        if self.ranked:
            alike = likeness(self.teacher, [first[item] for item, _ in pairs], senses.tolist())
            batch["likeness"] = torch.from_numpy(alike)
        if self.weights:
            batch["weights"] = torch.tensor([self.weights[number] for number in numbers])
        return batch

    def _pairs(self, items: Sequence[Item]) -> list[tuple[int, int]]:
        """Numbers of texts and senses that are compared, text by text."""
        if self.objective.objective == "in-batch":
            every = sorted({sense for item in items for sense in item.candidates})
            return [(at, sense) for at in range(len(items)) for sense in every]
        pairs = []
        for at, item in enumerate(items):
            if self.whole or len(item.candidates) > 1:  # one sense alone has nothing to lose to
                pairs += [(at, sense) for sense in item.candidates]
                pairs += [(at, sense) for sense in self._noise(item)]
        return pairs or [(at, sense) for at, item in enumerate(items) for sense in item.candidates]

    def _noise(self, item: Item) -> list[int]:
        """Random senses of other words, as many as a Poisson draw says (ESC, Barba et al. 2021)."""
        if not self.objective.gloss_noise:
            return []
        count = int(torch.poisson(torch.tensor(self.objective.gloss_noise)))
        drawn = torch.randint(len(self.reader.senses), (count,)).tolist()
        return sorted(set(drawn) - set(item.candidates))

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """The objective, and the formation predictor's cross-entropy times its weight."""
        found = model(**batch["inputs"])
        total = self._objective(found.scores, found.logits, batch)
        if found.formation_logits is not None and self.objective.formation_weight:
            logits = found.formation_logits[batch["label_text"]].float()
            counted = (batch["labels"] != IGNORED).sum().clamp_min(1)
            wrong = F.cross_entropy(logits, batch["labels"], ignore_index=IGNORED, reduction="sum")
            total = total + self.objective.formation_weight * wrong / counted
        return total

    def _objective(self, scores: Tensor, logits: Tensor | None, batch: dict[str, Any]) -> Tensor:
        gold, kind = batch["gold"], self.objective.objective
        if kind == "pair" and logits is not None:
            total = pair_loss(logits, gold)
        elif kind == "pair":
            total = binary_loss(scores, gold)
        else:
            total = scores.new_zeros(())
        if kind == "pair" and not self.ranked:
            return total
        text, texts = batch["text"], len(batch["texts"])
        rows = listed(scores.float(), text, texts, LOWEST)
        right = listed(gold.float(), text, texts, 0.0) > 0
        if kind in ("listwise", "in-batch"):
            total = total + listwise_loss(rows, right, batch.get("weights"))
        if self.ranked:
            alike = listed(batch["likeness"], text, texts, LOWEST)
            usable = right.any(1) & ((rows > LOWEST).sum(1) > 1)
            if kind in ("listnet", "listmle"):
                ranking = listnet_loss if kind == "listnet" else listmle_loss
                total = total + ranking(rows, alike, usable)
            if self.objective.rank_weight:
                total = total + self.objective.rank_weight * listnet_loss(rows, alike, usable)
        return total


def _or_ignored(label: int | None) -> int:
    return IGNORED if label is None else int(label)


def right_places(item: Item, reader: Reader) -> list[int]:
    """Which of an item's candidates are right."""
    right = {reader.number[name] for name in item.instance.gold}
    return [place for place, sense in enumerate(item.candidates) if sense in right]


def accuracy(scored: Sequence[Scored], items: Sequence[Item], reader: Reader) -> float:
    """Share of items of which the best candidate is right."""
    return float(
        np.mean(
            [one.scores.argmax() in right_places(item, reader)
             for one, item in zip(scored, items, strict=True)]
        )
    )  # fmt: skip


def temperature(scored: Sequence[Scored], items: Sequence[Item], reader: Reader) -> float:
    """What scores are divided by so that their softmax is calibrated (Guo et al. 2017).

    The one that makes the right senses most probable, from 0.05 to 20. One wrong answer more than there
    are is counted, so that a few rows that are all right do not make the model sure of everything.
    """
    from scipy.optimize import minimize_scalar

    rows = [
        (one.scores, right_places(item, reader)) for one, item in zip(scored, items, strict=True)
    ]

    def surprise(log_temperature: float) -> float:
        scaled = [(scores / np.exp(log_temperature), right) for scores, right in rows]
        total = np.logaddexp.reduce
        taken = sum(total(s) - total(s[right]) for s, right in scaled)
        return float(taken + np.mean([total(s) - s.min() for s, _ in scaled]))

    bounds = (np.log(0.05), np.log(20.0))
    return float(np.exp(minimize_scalar(surprise, bounds=bounds, method="bounded").x))  # pyright: ignore
