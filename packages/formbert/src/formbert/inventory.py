"""A sense inventory: words, their senses in order, and what is known of each sense."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from octavo.data import iter_rows
from octavo.errors import DataError
from octavo.rundir import atomic

from formbert.formations import Formation, parse

#: Columns of an inventory's file; only the first two must be there.
COLUMNS = {
    "word": str, "gloss": str, "sense_id": str | None, "pos": str | None,
    "formation": str | int | None, "examples": str | list | None,
    "morphemes": str | list | None, "morpheme1": str | None, "morpheme2": str | None,
}  # fmt: skip


@dataclass(frozen=True)
class Sense:
    """One sense of a word.

    Attributes:
        sense_id: its name, unique in an inventory.
        word: the word.
        gloss: what it means.
        pos: part of speech, in any tag set; empty where unknown.
        formation: how the word is formed in this sense; None where unknown.
        examples: sentences or phrases that show it.
        morphemes: what each morpheme means; empty text for one without a meaning of its own.
    """

    sense_id: str
    word: str
    gloss: str
    pos: str = ""
    formation: Formation | None = None
    examples: tuple[str, ...] = ()
    morphemes: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """As a row of a file; the formation by its name in Chinese."""
        return asdict(self) | {
            "formation": self.formation.zh if self.formation is not None else None,
            "examples": list(self.examples),
            "morphemes": list(self.morphemes),
        }


class Inventory(Mapping[str, tuple[Sense, ...]]):
    """Senses by word, in the order of the file (the first is a dictionary's first sense).

    Args:
        senses: in any order of words.

    Raises:
        DataError: there is none, a word or a gloss is empty, or two senses have one name.
    """

    def __init__(self, senses: Iterable[Sense]) -> None:
        words: dict[str, list[Sense]] = defaultdict(list)
        self.by_id: dict[str, Sense] = {}
        for sense in senses:
            if not sense.word.strip() or not sense.gloss.strip():
                what = "word" if not sense.word.strip() else f"gloss of {sense.word!r}"
                raise DataError(f"sense {sense.sense_id!r}: the {what} is empty")
            if sense.sense_id in self.by_id:
                raise DataError(f"two senses have the name {sense.sense_id!r}; rename one")
            self.by_id[sense.sense_id] = sense
            words[sense.word].append(sense)
        if not words:
            raise DataError("the inventory holds no sense")
        self._words = {word: tuple(listed) for word, listed in words.items()}

    def __getitem__(self, word: str) -> tuple[Sense, ...]:
        """The senses of a word."""
        return self._words[word]

    def __iter__(self) -> Iterator[str]:
        """The words, in the order of the file."""
        return iter(self._words)

    def __len__(self) -> int:
        """How many words there are."""
        return len(self._words)

    @property
    def senses(self) -> list[Sense]:
        """All senses, word by word."""
        return [sense for listed in self._words.values() for sense in listed]

    @property
    def pos_tags(self) -> tuple[str, ...]:
        """All parts of speech, sorted."""
        return tuple(sorted({sense.pos for sense in self.senses if sense.pos}))

    @property
    def fingerprint(self) -> str:
        """A hash of everything in it, in order."""
        content = json.dumps([sense.row() for sense in self.senses], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, source: str | Path) -> "Inventory":
        """Read an inventory from a file (tsv, csv, jsonl, json, parquet), or the bundled one.

        Columns: `word` and `gloss`; and, where known, `sense_id`, `pos`, `formation`, `examples` (a
        list, or text parted by `|`), `morphemes` (likewise) or `morpheme1` and `morpheme2`.

        Args:
            source: the file, or `mini`.

        Raises:
            DataError: a row is wrong; the message names file and line. `formbert data check` lists all.
        """
        if str(source) == "mini":
            from formbert.lexicon import mini_inventory

            return mini_inventory()
        return cls(sense for _, sense in read_senses(source))

    def save(self, path: Path) -> None:
        """Write it as .jsonl, a sense a line."""
        with atomic(path) as temporary:
            lines = (json.dumps(sense.row(), ensure_ascii=False) for sense in self.senses)
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def merged(self, other: "Inventory") -> "Inventory":
        """This inventory, and of the other the words that it lacks."""
        more = [sense for word in other if word not in self for sense in other[word]]
        return Inventory([*self.senses, *more])

    def formation_lexicon(self) -> dict[str, dict[Formation, float]]:
        """How each word is formed, as shares of its senses that have an annotation."""
        lexicon = {}
        for word, listed in self.items():
            known = [sense.formation for sense in listed if sense.formation is not None]
            if known:
                lexicon[word] = {one: known.count(one) / len(known) for one in sorted(set(known))}
        return lexicon


def read_senses(source: str | Path) -> Iterator[tuple[int, Sense]]:
    """Senses of a file with their row numbers, counted from 1; see `Inventory.load`."""
    counted: dict[str, int] = defaultdict(int)
    for number, row in enumerate(iter_rows(source, COLUMNS), 1):
        word = _plain(row["word"])
        counted[word] += 1
        try:
            yield number, _sense(row, word, counted[word])
        except DataError as error:
            raise DataError(f"{source}, row {number}, {word!r}: {error}") from None


def _sense(row: Mapping[str, Any], word: str, number: int) -> Sense:
    formation = row["formation"]
    known = formation is not None and str(formation).strip() != ""
    pair = [row["morpheme1"], row["morpheme2"]]
    morphemes = _several(row["morphemes"], holes=True) or tuple(one or "" for one in pair)
    return Sense(
        sense_id=(row["sense_id"] or "").strip() or f"{word}_{number:02d}",
        word=word,
        gloss=_plain(row["gloss"]),
        pos=(row["pos"] or "").strip(),
        formation=parse(formation) if known else None,
        examples=_several(row["examples"]),
        morphemes=morphemes if any(morphemes) else (),
    )


def _plain(words: str) -> str:
    return words.replace("\u3000", " ").strip()


def _several(value: Any, holes: bool = False) -> tuple[str, ...]:
    """A list as it is, text parted at bars; empty parts are left out unless they hold a place."""
    parts = value.split("|") if isinstance(value, str) else value or ()
    words = [str(part or "").strip() for part in parts]
    return tuple(words if holes else filter(None, words))
