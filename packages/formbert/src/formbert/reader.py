"""Instances and their candidates as what a model takes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from octavo.errors import DataError
from torch import Tensor

from formbert.config import ModelOptions
from formbert.data import Instance
from formbert.encode import Encoding, Row, Span
from formbert.inventory import Inventory, Sense
from formbert.sources import Sources


@dataclass(frozen=True)
class Item:
    """An instance that has been read.

    Attributes:
        instance: it.
        span: its tokens.
        candidates: numbers of its word's senses.
    """

    instance: Instance
    span: Span
    candidates: tuple[int, ...]


class Reader:
    """Reads instances against one inventory.

    Args:
        encoding: of the model.
        options: the model's.
        labels: the model's formations, or parts of speech.
        inventory: senses, numbered in its order.
        sources: where formations come from.
    """

    def __init__(
        self,
        encoding: Encoding,
        options: ModelOptions,
        labels: Sequence[str],
        inventory: Inventory,
        sources: Sources,
    ) -> None:
        self.encoding, self.options, self.labels = encoding, options, labels
        self.inventory = inventory
        self.senses: list[Sense] = inventory.senses
        self.number = {sense.sense_id: at for at, sense in enumerate(self.senses)}
        self.gloss_tokens = encoding.glosses(self.senses)
        self.formations, self.known = sources.table(self.senses, options, labels)

    def read(self, instances: Sequence[Instance]) -> list[Item]:
        """Items of instances.

        Raises:
            DataError: a word is not in the inventory.
        """
        for one in instances:
            if one.word not in self.inventory:
                raise DataError(f"{one.key}: {one.word!r} is not in the inventory")
        spans = self.encoding.spans(instances)
        return [
            Item(one, span, tuple(self.number[s.sense_id] for s in self.inventory[one.word]))
            for one, span in zip(instances, spans, strict=True)
        ]

    def pair_rows(self, items: Sequence[Item], pairs: Sequence[tuple[int, int]]) -> list[Row]:
        """Rows of pairs of an item's and a sense's number."""
        if self.options.authors:
            return [
                self.encoding.authors_pair(items[item].instance, self.senses[sense])
                for item, sense in pairs
            ]
        return [
            self.encoding.pair(items[item].span, self._gloss(items[item], sense))
            for item, sense in pairs
        ]

    def _gloss(self, item: Item, sense: int) -> tuple[int, ...]:
        """A gloss's tokens; another word's gloss is read as if it were this word's."""
        told, word = self.senses[sense], item.instance.word
        if told.word == word:
            return self.gloss_tokens[sense]
        return self.encoding.glosses([replace(told, word=word)])[0]

    def context_rows(self, items: Iterable[Item]) -> list[Row]:
        """Rows of texts alone."""
        if self.options.authors:
            return [self.encoding.authors_context(item.instance) for item in items]
        return [self.encoding.context(item.span) for item in items]

    def gloss_rows(self, senses: Iterable[int]) -> list[Row]:
        """Rows of glosses alone."""
        return [self.encoding.gloss(self.gloss_tokens[sense]) for sense in senses]

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as tensors; as long as the authors have them, under `authors`."""
        return self.encoding.batch(rows, self.encoding.length if self.options.authors else 0)

    def cross(
        self, items: Sequence[Item], pairs: Sequence[tuple[int, int]], known: Tensor
    ) -> dict[str, Any]:
        """What `FormBertCross` takes.

        Args:
            items: a batch.
            pairs: of numbers in `items`, and of senses.
            known: of which pairs the known formations are used.
        """
        senses = [sense for _, sense in pairs]
        inputs: dict[str, Any] = {
            "pairs": self.batch(self.pair_rows(items, pairs)),
            "text": torch.tensor([item for item, _ in pairs]),
            "formations": self.formations[senses],
            "known": known,
        }
        if self.options.predictor != "none":
            inputs["contexts"] = self.batch(self.context_rows(items))
        return inputs

    def bi(
        self, items: Sequence[Item], pairs: Sequence[tuple[int, int]], known: Tensor
    ) -> dict[str, Any]:
        """What `FormBertBi` takes: each sense's gloss once; see `cross`."""
        senses = sorted({sense for _, sense in pairs})
        place = {sense: at for at, sense in enumerate(senses)}
        used = torch.ones(len(senses), dtype=torch.bool)
        for (_, sense), keep in zip(pairs, known.tolist(), strict=True):
            used[place[sense]] &= keep
        return {
            "contexts": self.batch(self.context_rows(items)),
            "glosses": self.batch(self.gloss_rows(senses)),
            "text": torch.tensor([item for item, _ in pairs]),
            "sense": torch.tensor([place[sense] for _, sense in pairs]),
            "formations": self.formations[senses],
            "known": used,
        }
