"""Instances: a word in a text, at a place, with its right senses where they are known."""

import json
import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from octavo.data import iter_rows
from octavo.errors import DataError
from octavo.rundir import atomic

from formbert.inventory import Inventory, Sense

T = TypeVar("T", "Instance", Sense)

COLUMNS = {
    "text": str, "word": str | None, "start": int | str | None, "end": int | str | None,
    "sense_id": str | None, "gold": str | list | None, "id": str | int | None,
    "split": str | None,
}  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """A word in a text.

    Attributes:
        text: the whole text.
        start: where the word begins, in characters (code points) from 0.
        end: where it ends, exclusive.
        word: the word, as the inventory has it.
        gold: names of the right senses; empty where unknown.
        key: a name that tells it from others.
        split: which part of its data set it belongs to; empty where there are no parts.
    """

    text: str
    start: int
    end: int
    word: str
    gold: tuple[str, ...] = ()
    key: str = ""
    split: str = ""

    def row(self) -> dict[str, Any]:
        """As a row of a file."""
        row = {"id": self.key, "word": self.word, "text": self.text, "start": self.start,
               "end": self.end, "gold": list(self.gold)}  # fmt: skip
        return row | ({"split": self.split} if self.split else {})


def locate(text: str, word: str | None = None, start: int | None = None) -> Instance:
    """The instance that a text and a word, a place, or a pair of marks around it mean.

    Marks are `#` directly on both sides of the word (`他去银行#存款#。`), or one `～` or `~` in its
    stead; full-width signs count as the plain ones where the text has the word only in another width.

    Args:
        text: the text, with or without marks.
        word: the word; may be left out where it is marked by `#`.
        start: where it begins; needed where it stands in several places without a mark.

    Raises:
        DataError: it is not there, not at that place, or in several places; the message names them.
    """
    if start is None and (marked := _marked(text, word)):
        return marked
    if not word:
        raise DataError(f"no word is given and none is marked with # in {text[:40]!r}")
    if start is not None:
        if text[start : start + len(word)] != word or start < 0:
            there = text[max(start, 0) : max(start, 0) + len(word)]
            raise DataError(f"at {start} stands {there!r}, not {word!r}{_at(text, word)}")
        return Instance(text, start, start + len(word), word)
    places = _places(text, word)
    if not places:
        places = _places(_folded(text), _folded(word))
    if len(places) != 1:
        what = f"stands at {', '.join(map(str, places))}" if places else "is not"
        also = "; give its start, or mark it with #" if places else ""
        raise DataError(f"{word!r} {what} in {text[:60]!r}{also}")
    return Instance(text, places[0], places[0] + len(word), word)


def _folded(text: str) -> str:
    """Plain forms of full-width and compatibility signs, where one sign is one still."""
    plain = (unicodedata.normalize("NFKC", sign) for sign in text)
    return "".join(new if len(new) == 1 else old for old, new in zip(text, plain, strict=True))


def _places(text: str, word: str) -> list[int]:
    return [at for at in range(len(text) - len(word) + 1) if text.startswith(word, at)]


def _at(text: str, word: str) -> str:
    places = _places(text, word)
    return f" (it stands at {', '.join(map(str, places))})" if places else ", which is nowhere"


def _marked(text: str, word: str | None) -> Instance | None:
    """The instance of a text in which the word is marked, without the mark."""
    if word:
        for sign in "#＃":
            found = _places(text, f"{sign}{word}{sign}")
            if len(found) == 1:
                at = found[0]
                plain = text[:at] + word + text[at + len(word) + 2 :]
                return Instance(plain, at, at + len(word), word)
        if word not in text:
            for sign in "～~":
                if text.count(sign) == 1:
                    at = text.index(sign)
                    plain = text[:at] + word + text[at + 1 :]
                    return Instance(plain, at, at + len(word), word)
        return None
    for sign in "#＃":
        if text.count(sign) == 2:
            before, inner, after = text.split(sign)
            if inner:
                at = len(before)
                return Instance(before + inner + after, at, at + len(inner), inner)
    return None


def read_instances(
    source: str | Path, split: str | None = None, inventory: Inventory | None = None
) -> list[Instance]:
    """Instances of a file (jsonl, json, csv, tsv, parquet).

    Columns: `text`; `word` unless it is marked; `start` (and `end`) unless the place is plain; `gold` (a
    list, or names parted by `|`) or `sense_id`; `id`; `split`.

    Args:
        source: the file.
        split: only rows of this part, where the file has a column `split`.
        inventory: right senses must be of the word, in this inventory.

    Raises:
        DataError: a row is wrong; the message names it.
    """
    found = list(iter_instances(source, split, inventory))
    if not found:
        part = f" of the part {split!r}" if split else ""
        raise DataError(f"{source}: holds no instance{part}")
    if len({one.key for one in found}) < len(found):
        keys = [one.key for one in found]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{source}: two instances have the id {twice!r}")
    return found


def iter_instances(
    source: str | Path, split: str | None = None, inventory: Inventory | None = None
) -> Iterator[Instance]:
    """The same, one after the other; a file of any size fits."""
    for number, row in enumerate(iter_rows(source, COLUMNS), 1):
        if split and row["split"] and row["split"] != split:
            continue
        try:
            yield instance_of(row, number, inventory)
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None


def instance_of(
    row: Mapping[str, Any], number: int = 0, inventory: Inventory | None = None
) -> Instance:
    """One instance from the columns that `read_instances` names."""
    start, end = (_place(row.get(name), name) for name in ("start", "end"))
    one = locate(row["text"], row.get("word"), start)
    if end is not None and end != one.end:
        raise DataError(f"{one.word!r} ends at {one.end}, not at {end}")
    gold = row.get("gold") or row.get("sense_id") or ()
    names = tuple(gold.split("|")) if isinstance(gold, str) else tuple(map(str, gold))
    if inventory is not None:
        there = {sense.sense_id for sense in inventory.get(one.word, ())}
        if wrong := [name for name in names if name not in there]:
            raise DataError(f"{wrong[0]!r} is no sense of {one.word!r} in the inventory")
    key = str(row.get("id") or number)
    return replace(one, gold=names, key=key, split=row.get("split") or "")


def _place(value: Any, name: str) -> int | None:
    """A number of characters; an empty cell is none."""
    if value is None or value == "":
        return None
    if not isinstance(value, int):
        raise DataError(f"{name!r} must be a whole number, not {value!r}")
    return value


def write_instances(path: Path, instances: Iterable[Instance]) -> None:
    """Write instances as .jsonl, one a line."""
    with atomic(path) as temporary:
        lines = (json.dumps(one.row(), ensure_ascii=False) for one in instances)
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def need_gold(instances: Sequence[Instance], what: str) -> None:
    """Refuse instances without a right sense.

    Raises:
        DataError: one has none; the message names it.
    """
    if missing := [one.key for one in instances if not one.gold]:
        raise DataError(
            f"{what}: {len(missing)} instances have no right sense, the first is {missing[0]!r}"
        )


def by_word(rows: Sequence[T], share: float, seed: int = 0) -> tuple[list[T], list[T]]:
    """Two parts of instances or senses with no word in common; the second has this share of words."""
    words = sorted({one.word for one in rows})
    random.Random(seed).shuffle(words)
    held = set(words[: max(1, round(share * len(words)))])
    return (
        [one for one in rows if one.word not in held],
        [one for one in rows if one.word in held],
    )
