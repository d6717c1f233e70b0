"""Labelled texts in, validated examples out."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from octavo.data import Row, iter_rows, load_rows
from octavo.errors import DataError

from cascadebert.config import DataConfig


@dataclass(frozen=True)
class Examples:
    """Texts, or pairs of texts, with or without labels.

    Attributes:
        texts: the text, or the first of a pair.
        pairs: the second texts of a pair task, or None.
        labels: label names, or None.

    Raises:
        DataError: a text is no string, or there are not as many of each.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        for what, values in (("text", self.texts), ("pair", self.pairs), ("label", self.labels)):
            if values is None:
                continue
            if len(values) != len(self.texts):
                raise DataError(
                    f"{len(self.texts)} texts and {len(values)} {what}s: must be as many"
                )
            for number, value in enumerate(values):
                if not isinstance(value, str):
                    raise DataError(f"row {number}: its {what} must be a string, not {value!r:.40}")

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, indices: Sequence[int]) -> "Examples":
        """The examples of these indices, in their order."""
        return Examples(
            [self.texts[i] for i in indices],
            None if self.pairs is None else [self.pairs[i] for i in indices],
            None if self.labels is None else [self.labels[i] for i in indices],
        )

    def fingerprint(self) -> str:
        """A hash of the texts, which tells one split from another whatever its order."""
        rows = zip(self.texts, self.pairs or [""] * len(self), strict=True)
        total = hashlib.sha256()
        for first, second in sorted(rows):
            total.update(f"{first}\0{second}\1".encode())
        return total.hexdigest()


def ordered_fingerprint(examples: Examples) -> str:
    """A hash of texts and labels in their order, which tells whether training rows are the same."""
    total = hashlib.sha256()
    for row in zip(
        examples.texts,
        examples.pairs or [""] * len(examples),
        examples.labels or [""] * len(examples),
        strict=True,
    ):
        total.update("\0".join(row).encode() + b"\1")
    return total.hexdigest()


def row_hashes(examples: Examples) -> np.ndarray:
    """A hash of each row's texts, [rows] of uint64, by which rows are known again."""
    pairs = examples.pairs or [""] * len(examples)
    digests = [
        hashlib.blake2b(f"{first}\0{second}".encode(), digest_size=8).digest()
        for first, second in zip(examples.texts, pairs, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def encoded_hashes(examples: Examples) -> str:
    """The sorted hashes of the rows as a string, eight bytes a row in base 64."""
    return base64.b64encode(np.unique(row_hashes(examples)).tobytes()).decode()


#: Share of rows that may be among others they should be new to, as duplicates in real data are.
OVERLAP = 0.01


def seen_before(examples: Examples, encoded: str) -> int:
    """How many rows are among those that `encoded_hashes` wrote down."""
    earlier = np.frombuffer(base64.b64decode(encoded), dtype="<u8")
    return int(np.isin(row_hashes(examples), earlier).sum())


def load_examples(
    source: str,
    config: DataConfig = DataConfig(),
    split: str | None = None,
    labels: Sequence[str] | None = None,
    labelled: bool = True,
) -> Examples:
    """Read rows, all at once.

    Args:
        source: a file, a folder of splits or a hub id.
        config: which columns hold what.
        split: of a folder or a hub id, where the configuration names none.
        labels: the names that are allowed; any by default.
        labelled: whether the label column is read.

    Raises:
        DataError: the source, a column or a value is missing or wrong, or a label is unknown.
    """
    columns, rename = _columns(config)
    if not labelled:
        return _examples(load_rows(source, columns, config.split or split, rename))

    def check(row: Row) -> str | None:
        label = _label(row)
        if not label:
            return "the label is empty"
        if labels is not None and label not in labels:
            return f"label {label!r} is not one of the model's: {', '.join(labels)}"
        return None

    columns |= {"label": str | int | bool}  # text stays text: 01 is not 1
    rename |= {"label": config.label_column}
    rows = load_rows(source, columns, config.split or split, rename, check)
    return _examples(rows, [_label(row) for row in rows])


def stream_examples(source: str, config: DataConfig, chunk: int) -> Iterator[Examples]:
    """Read unlabelled rows in chunks, so that a file of any length fits into memory."""
    columns, rename = _columns(config)
    rows: list[Row] = []
    for row in iter_rows(source, columns, config.split, rename):
        rows.append(row)
        if len(rows) == chunk:
            yield _examples(rows)
            rows = []
    if rows:
        yield _examples(rows)


def label_names(examples: Examples, source: str) -> list[str]:
    """The labels that occur, numbers in their order, names in the alphabet's.

    Raises:
        DataError: there are fewer than two.
    """
    names = sorted(set(examples.labels or []))
    if all(name.isdecimal() for name in names):
        names.sort(key=lambda name: (len(name), name))
    if len(names) < 2:
        raise DataError(f"{source}: classification needs two labels or more, it has {names}")
    return names


def _label(row: Row) -> str:
    value = row["label"]
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _columns(config: DataConfig) -> tuple[dict, dict]:
    columns: dict = {"text": str}
    rename = {"text": config.text_column}
    if config.pair_column:
        columns["pair"] = str
        rename["pair"] = config.pair_column
    return columns, rename


def _examples(rows: list[Row], labels: list[str] | None = None) -> Examples:
    pairs = [row["pair"] for row in rows] if rows and "pair" in rows[0] else None
    return Examples([row["text"] for row in rows], pairs, labels)
