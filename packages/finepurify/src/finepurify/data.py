"""Labelled texts, or pairs of them, in; token rows and padded batches out."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from octavo.data import load_rows
from octavo.errors import DataError
from torch import Tensor

from finepurify.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100


@dataclass(frozen=True)
class Examples:
    """Texts with their classes; a causal language model's have none.

    Attributes:
        texts: the texts, the first of each pair.
        labels: class numbers; 0 throughout where a language model is cleaned.
        names: of the classes, in the order of their numbers.
        pairs: the second texts, or None.
    """

    texts: Sequence[str]
    labels: Sequence[int]
    names: Sequence[str] = ()
    pairs: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, rows: Sequence[int]) -> "Examples":
        """Some of the rows, in the order given."""
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        texts, labels = [self.texts[row] for row in rows], [self.labels[row] for row in rows]
        return replace(self, texts=texts, labels=labels, pairs=pairs)

    def plus(self, other: "Examples") -> "Examples":
        """These rows and after them the other ones."""
        pairs = None if self.pairs is None else [*self.pairs, *(other.pairs or [])]
        return replace(
            self,
            texts=[*self.texts, *other.texts],
            labels=[*self.labels, *other.labels],
            pairs=pairs,
        )


def load_examples(source: str, config: DataConfig, names: Sequence[str], split: str) -> Examples:
    """The labelled rows of a file, a folder of splits or a hub id.

    Args:
        source: as `octavo.data.load_rows` reads it.
        config: names the columns.
        names: of the model's classes; a label is one of them or a class number. Empty for a language
            model, which needs no labels.
        split: read where the source has several.

    Raises:
        DataError: a column is missing, a label is none of the model's, or no text is left.
    """
    columns: dict[str, Any] = {"text": str}
    rename = {"text": config.text_column}
    if config.pair_column:
        columns["pair"] = str
        rename["pair"] = config.pair_column
    if names:
        columns["label"] = int | str
        rename["label"] = config.label_column
    number = {name: at for at, name in enumerate(names)}

    def check(row: dict[str, Any]) -> str | None:
        if names and _class(row["label"], number) is None:
            known = ", ".join(names)
            numbers = f"0 to {len(names) - 1}"
            return f"label {row['label']!r} is none of the model's: {known} (or {numbers})"
        return None

    rows = load_rows(source, columns, split, rename, check)
    kept = [row for row in rows if row["text"].strip()]
    if not kept:
        raise DataError(f"{source}: every text is blank")
    if blank := len(rows) - len(kept):
        log.warning("%s: %d of %d texts are blank and left out", source, blank, len(rows))
    return Examples(
        [row["text"] for row in kept],
        [_class(row["label"], number) or 0 if names else 0 for row in kept],
        tuple(names),
        [row["pair"] for row in kept] if config.pair_column else None,
    )


def _class(label: int | str, number: dict[str, int]) -> int | None:
    """A label's class number, or None."""
    if str(label) in number:
        return number[str(label)]
    try:
        at = int(label)
    except ValueError:
        return None
    return at if 0 <= at < len(number) else None


def check_clean(examples: Examples, source: str) -> None:
    """Refuse a clean set that cannot speak for every class.

    Raises:
        DataError: it has fewer rows than there are classes, or none of one class.
    """
    if not examples.names:
        return
    classes = len(examples.names)
    if len(examples) < classes:
        raise DataError(f"{source}: {len(examples)} rows for {classes} classes; give some of each")
    seen = Counter(examples.labels)
    missing = [name for at, name in enumerate(examples.names) if not seen[at]]
    if missing:
        raise DataError(f"{source}: no row of class {missing[0]!r}; give some of each class")


def warn_of_overlap(clean: Examples, test: Examples) -> int:
    """How many test rows stand in the clean set too; said in the log."""

    def keys(examples: Examples) -> list[tuple[str, str]]:
        pairs = examples.pairs or [""] * len(examples)
        return [
            (text.strip(), pair.strip()) for text, pair in zip(examples.texts, pairs, strict=True)
        ]

    known = set(keys(clean))
    both = sum(key in known for key in keys(test))
    if both:
        log.warning("%d of the %d test rows are in the clean set too", both, len(test))
    return both


def first_of_each(examples: Examples, shots: int, seed: int) -> Examples:
    """So many random rows of each class."""
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    taken: Counter[int] = Counter()
    rows = []
    for row in order:
        if taken[examples.labels[row]] < shots:
            taken[examples.labels[row]] += 1
            rows.append(row)
    return examples.at(sorted(rows))


def hold_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """A clean set in two: rows to compute on, and rows to judge accuracy on, drawn class by class.

    Each class gives the share to the second, rounded up, but keeps one row at least in the first.
    """
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    totals = Counter(examples.labels)
    wanted = {label: min(-int(-n * share // 1), n - 1) for label, n in totals.items()}
    taken: Counter[int] = Counter()
    held = set()
    for row in order:
        if taken[examples.labels[row]] < wanted[examples.labels[row]]:
            taken[examples.labels[row]] += 1
            held.add(row)
    rest = [row for row in range(len(examples)) if row not in held]
    return examples.at(rest), examples.at(sorted(held))


Item = dict[str, Any]


def encode(examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[Item]:
    """Token rows with their labels, one an example, in order; over-long texts are cut, and counted.

    Args:
        examples: what to encode. Without class names, a language model's: every token is a label.
        tokenizer: the model's own.
        max_length: tokens at most.

    Returns:
        Rows as the tokenizer gives them, with `labels`: a class number, or the token ids.
    """
    pairs = None if examples.pairs is None else list(examples.pairs)
    limit = min(max_length, tokenizer.model_max_length)
    rows = tokenizer(list(examples.texts), pairs, truncation=True, max_length=limit)
    cut = sum(bool(row.overflowing) for row in rows.encodings or ())
    if cut:
        log.info("%d of %d texts are longer than %d tokens and cut", cut, len(examples), limit)
    items = [{name: rows[name][at] for name in rows} for at in range(len(examples))]
    for item, label in zip(items, examples.labels, strict=True):
        item["labels"] = int(label) if examples.names else list(item["input_ids"])
    return items


def collate(items: Sequence[Item], pad: int) -> dict[str, Tensor]:
    """Rows padded to the longest, on the right.

    Args:
        items: what `encode` made.
        pad: the padding token's id.
    """
    longest = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": pad, "labels": IGNORED}
    return {
        name: torch.tensor(
            [
                value
                if not isinstance(value := item[name], list)
                else value + [fill.get(name, 0)] * (longest - len(value))
                for item in items
            ]
        )
        for name in items[0]
    }


def batches(
    items: Sequence[Item], size: int, pad: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches in the order of length, each with the rows it holds."""
    order = sorted(range(len(items)), key=lambda row: (len(items[row]["input_ids"]), row))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, collate([items[row] for row in rows], pad)
