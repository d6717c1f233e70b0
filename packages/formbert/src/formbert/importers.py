"""Public data sets in the layouts their authors give them, as an inventory and instances.

Nothing is fetched: every reader takes what the user has already downloaded, plain or gzipped. What is
odd in the files is counted, and every row that is lost is named with its reason.
"""

import ast
import csv
import gzip
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from octavo.data import iter_rows
from octavo.errors import ConfigError, DataError
from octavo.rundir import atomic, refuse_existing, write_json

from formbert.data import Instance, write_instances
from formbert.formations import COARSE, Formation, parse
from formbert.inventory import Inventory, Sense

#: Names of the parts of a data set, in the order in which they are read.
SPLITS = ("train", "val", "valid", "dev", "test")


class Pair(NamedTuple):
    """Two instances of a word, and whether it means the same in both (None: unknown)."""

    key: str
    first: Instance
    second: Instance
    same: bool | None


class FormedWord(NamedTuple):
    """How a word is formed: `formation` where it is told, else only its coarse type."""

    word: str
    coarse: str
    formation: Formation | None = None
    pos: str = ""
    gloss: str = ""


@dataclass
class Imported:
    """What was read.

    Attributes:
        inventory: senses; None where the data set has none.
        instances: words in texts.
        pairs: of instances (MCL-WiC).
        formed: words with their formations, without a text.
        counts: what was met, by a few words each.
        lost: every row that could not be used: where it is, and why.
    """

    inventory: Inventory | None = None
    instances: list[Instance] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    formed: list[FormedWord] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def lose(self, where: str, why: str) -> None:
        """Note a row that cannot be used."""
        self.counts[f"lost: {why}"] += 1
        self.lost.append(f"{where}: {why}")


# Files -------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends, of a file plain or gzipped, with or without a byte order mark."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                if line := line.rstrip("\r\n"):
                    yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _found(folder: Path, name: str) -> Path | None:
    """A file by its name, plain or gzipped."""
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _need(path: Path, names: Iterable[str]) -> list[Path]:
    """The file itself, or those of these names that a folder has."""
    if path.is_file():
        return [path]
    found = [file for name in names if (file := _found(path, name))]
    if not found:
        what = f"has none of {', '.join(names)}" if path.is_dir() else "no such file or folder"
        raise DataError(f"{path}: {what}")
    return found


def _four_fields(path: Path, done: Imported) -> list[Sense]:
    """Senses of `WrdInv.txt` or `MorInv.txt`: name, word, part of speech and gloss, by spaces."""
    senses = []
    for number, line in enumerate(_lines(path), 1):
        parts = line.split(" ", 3)
        if len(parts) < 4 or not all(part.strip() for part in parts):
            done.lose(f"{path}, line {number}", "not four fields: name, word, POS, gloss")
            continue
        name, word, pos, gloss = parts
        senses.append(Sense(name, word, gloss.strip(), pos))
    return senses


# MiCLS and FiCLS: a row for each pair of a context and a sense -------------------------------------


def micls(path: Path) -> Imported:
    """MiCLS (COOLPKU/MorBERT): `train|val|test.tsv` and `WrdInv.txt` in one folder.

    A sense is found by its exact gloss; where two senses of a word have the same, it is the first. Its
    formation and morphemes are those that most rows give (the first met, where they tie). A morpheme
    without meaning (`NULL`) is empty text.
    """
    return _from_pairs(path, with_inventory=True)


def ficls(path: Path) -> Imported:
    """Rows `context, definition, formation, label` as FiCLS's and GlossBERT's, without an inventory.

    The target stands between `#`, the definition begins with `word：`. Senses are numbered in the order
    in which they are met, which need not be a dictionary's: first-sense scores then mean little.
    """
    return _from_pairs(path, with_inventory=False)


class _Row(NamedTuple):
    where: str
    gloss: str
    formation: str | None
    morphemes: tuple[str, ...]
    right: bool


def _from_pairs(path: Path, with_inventory: bool) -> Imported:
    files = _need(path, [f"{split}.tsv" for split in SPLITS])
    done = Imported()
    senses: list[Sense] = []
    if with_inventory:
        listing = _found(_folder(path), "WrdInv.txt")
        if listing is None:
            raise DataError(f"{_folder(path)}: has no WrdInv.txt; without it import as ficls")
        senses = _four_fields(listing, done)
    by_gloss: dict[tuple[str, str], str] = {}
    numbers: Counter[str] = Counter()
    for sense in senses:
        if (sense.word, sense.gloss) in by_gloss:
            done.counts["senses with the same word and gloss as another"] += 1
        by_gloss.setdefault((sense.word, sense.gloss), sense.sense_id)
    seen: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    formations: dict[str, Counter[Formation]] = defaultdict(Counter)
    texts: dict[str, set[str]] = {}
    number = 0
    for file in files:
        split = file.name.split(".")[0]
        texts[split] = set()
        for (word, context), rows in _groups(file, done).items():
            key = f"{split}-{number:05d}"
            number += 1
            at = context.index(f"#{word}#")
            text = context[:at] + word + context[at + len(word) + 2 :]
            _count_places(done, text, word, at, len(rows))
            gold: dict[str, None] = {}
            for row in rows:
                name = by_gloss.get((word, row.gloss))
                if name is None and with_inventory:
                    done.lose(row.where, "no sense of the word has this gloss")
                    continue
                if name is None:
                    numbers[word] += 1
                    name = f"{word}_{numbers[word]:02d}"
                    by_gloss[word, row.gloss] = name
                    senses.append(Sense(name, word, row.gloss))
                if row.morphemes:
                    seen[name][row.morphemes] += 1
                if row.formation:
                    try:
                        formations[name][parse(row.formation)] += 1
                    except DataError:
                        done.counts[f"unknown formation {row.formation}"] += 1
                if row.right:
                    gold[name] = None
            if not gold:
                done.lose(rows[0].where, "no sense of the instance is labelled right")
                continue
            done.counts["instances with several right senses"] += len(gold) > 1
            texts[split].add(text)
            done.instances.append(Instance(text, at, at + len(word), word, tuple(gold), key, split))
    done.counts["senses with several formations"] = sum(len(c) > 1 for c in formations.values())
    shared = sum((Counter(each) for each in texts.values()), Counter())
    done.counts["texts in several splits"] = sum(count > 1 for count in shared.values())
    if senses:
        done.inventory = Inventory(_annotated(senses, formations, seen))
    return done


def _groups(path: Path, done: Imported) -> dict[tuple[str, str], list[_Row]]:
    """Rows of a file by word and context, in the order of the file."""
    columns = {
        "word": str | None, "context": str, "definition": str, "formation": str | None,
        "morpheme1": str | None, "morpheme2": str | None, "label": int,
    }  # fmt: skip
    groups: dict[tuple[str, str], list[_Row]] = defaultdict(list)
    labels: dict[tuple[str, str, str], bool] = {}
    repeated = set()
    for number, row in enumerate(iter_rows(path, columns), 1):
        where, context, right = f"{path}, row {number}", row["context"], bool(row["label"])
        word = row["word"] or _word_of(row["definition"], context)
        if not word or f"#{word}#" not in context:
            done.lose(where, "the word is not between # in its context")
            continue
        gloss = re.sub(f"^{re.escape(word)}\\s*[：:]\\s*", "", row["definition"]).strip()
        if not gloss:
            done.lose(where, "the gloss is empty")
            continue
        if (word, context, gloss) in labels:
            done.counts["rows that repeat a sense of their instance"] += 1
            differs = labels[word, context, gloss] != right
            done.counts["of these with another label (right wins)"] += differs
            repeated.add((word, context))
        labels[word, context, gloss] = right
        pair = (row["morpheme1"], row["morpheme2"])
        morphemes = tuple("" if one in ("NULL", None) else one for one in pair)
        row = _Row(where, gloss, row["formation"], morphemes if any(pair) else (), right)
        groups[word, context].append(row)
    done.counts["instances with such rows"] += len(repeated)
    return groups


def _word_of(definition: str, context: str) -> str:
    """The word before the definition's colon, or the only one that is marked."""
    word = re.split("[：:]", definition, maxsplit=1)[0].strip()
    if f"#{word}#" in context:
        return word
    parts = context.split("#")
    return parts[1] if len(parts) == 3 else ""


def _count_places(done: Imported, text: str, word: str, at: int, rows: int) -> None:
    done.counts["texts with # besides the mark"] += "#" in text
    done.counts["rows whose word stands elsewhere in the text too"] += rows * (text.count(word) > 1)
    done.counts["targets beyond character 108"] += at > 108


def _annotated(
    senses: Iterable[Sense],
    formations: dict[str, Counter[Formation]],
    morphemes: dict[str, Counter[tuple[str, ...]]],
) -> Iterator[Sense]:
    """Senses with what most rows say of them."""
    for sense in senses:
        name = sense.sense_id
        formed = formations[name].most_common(1)[0][0] if formations[name] else None
        parts = morphemes[name].most_common(1)[0][0] if morphemes[name] else ()
        yield Sense(name, sense.word, sense.gloss, sense.pos, formed, (), parts)


def micls_oov(path: Path) -> Imported:
    """MiCLS's `OOV.tsv`: columns `word, context`, with `～` for a word whose sense no inventory has."""
    (file,) = _need(path, ["OOV.tsv"])
    done = Imported()
    for number, row in enumerate(iter_rows(file, {"word": str, "context": str})):
        one = _tilde(row["context"], row["word"], done, f"{file}, row {number + 1}")
        if one:
            done.instances.append(_named(one, f"oov-{number:05d}", split="oov"))
    return done


def _tilde(text: str, word: str, done: Imported, where: str) -> Instance | None:
    """The instance at the first `～`; the others are the same word too."""
    at = text.replace("~", "～").find("～")
    if at < 0 or not word:
        done.lose(where, "no ～ stands for the word" if word else "the word is empty")
        return None
    done.counts["texts with several ～ (the first is the target)"] += text.count("～") > 1
    return Instance(text.replace("～", word).replace("~", word), at, at + len(word), word)


def _named(one: Instance, key: str, gold: tuple[str, ...] = (), split: str = "") -> Instance:
    return Instance(one.text, one.start, one.end, one.word, gold, key, split)


# MorDis: morphemes ---------------------------------------------------------------------------------


def mordis(path: Path) -> Imported:
    """MorDis (COOLPKU/MSD_task): `MorTxt_*.csv`, `MorWrd_*.csv` and, where it is there, `MorInv.txt`.

    Targets are morphemes, written `～` in a sentence (MorTxt) or a word (MorWrd; the text is then the
    word, a colon and its gloss). Without `MorInv.txt` the inventory is what the rows name. Splits are
    `txt-train`, `wrd-test` and so on.
    """
    files = _need(path, [f"Mor{kind}_{split}.csv" for kind in ("Txt", "Wrd") for split in SPLITS])
    done = Imported()
    listing = _found(_folder(path), "MorInv.txt")
    senses = {sense.sense_id: sense for sense in _four_fields(listing, done)} if listing else {}
    for file in files:
        split = file.name.split(".")[0].removeprefix("Mor").lower().replace("_", "-")
        met: set[tuple[str, ...]] = set()
        for number, cells in enumerate(csv.reader(_lines(file))):
            where = f"{file}, row {number + 1}"
            if len(cells) not in (5, 6) or not all(cell.strip() for cell in cells):
                done.lose(where, "not five cells (a sentence) or six (a word)")
                continue
            text, name, morpheme, pos, gloss = cells[:5]
            done.counts["repeated rows"] += tuple(cells) in met
            met.add(tuple(cells))
            if listing and name not in senses:
                done.lose(where, "the morpheme's sense is not in MorInv.txt")
                continue
            senses.setdefault(name, Sense(name, morpheme, gloss, pos))
            whole = f"{text}：{cells[5]}" if len(cells) == 6 else text
            if one := _tilde(whole, morpheme, done, where):
                done.instances.append(_named(one, f"{split}-{number:05d}", (name,), split))
    done.inventory = Inventory(senses.values()) if senses else None
    return done


# SememeWSD -----------------------------------------------------------------------------------------


def sememewsd(path: Path) -> Imported:
    """SememeWSD (thunlp/SememeWSD): a Python dict a line, with `<target>` among the tokens.

    A sense is a set of HowNet's sememes; they make its gloss, sorted. Senses stand in the order in which
    they are met: the file has no other.
    """
    (file,) = _need(path, ["dataset.txt"])
    done = Imported()
    senses: dict[tuple[str, tuple[str, ...]], Sense] = {}
    numbers: Counter[str] = Counter()
    for number, line in enumerate(_lines(file), 1):
        try:
            row = ast.literal_eval(line)
            word, tokens = str(row["target_word"]), [str(token) for token in row["context"]]
            sememes, pos = tuple(sorted(map(str, row["sense"]))), str(row["target_word_pos"])
        except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
            done.lose(f"{file}, line {number}", "not a dict with context, target_word, sense, ...")
            continue
        if tokens.count("<target>") != 1 or not sememes:
            done.lose(f"{file}, line {number}", "not one <target> and a sememe or more")
            continue
        if (word, sememes) not in senses:
            numbers[word] += 1
            name = f"{word}_{numbers[word]:02d}"
            senses[word, sememes] = Sense(name, word, "；".join(sememes), pos)
        at = tokens.index("<target>")
        before = "".join(tokens[:at])
        text = before + word + "".join(tokens[at + 1 :])
        gold = (senses[word, sememes].sense_id,)
        place = (len(before), len(before) + len(word))
        done.instances.append(Instance(text, *place, word, gold, f"{number - 1:05d}"))
    done.inventory = Inventory(senses.values()) if senses else None
    return done


# MCL-WiC -------------------------------------------------------------------------------------------


def mclwic(path: Path) -> Imported:
    """MCL-WiC (SemEval-2021 task 2): `*.data` with, where it is there, `*.gold` beside it.

    Gives pairs, and both their instances (`<id>.1`, `<id>.2`) without right senses.
    """
    files = (
        [path] if path.is_file() else sorted(path.glob("*.data")) + sorted(path.glob("*.data.gz"))
    )
    if not files:
        raise DataError(f"{path}: has no .data file")
    done = Imported()
    for file in files:
        name = file.name.removesuffix(".gz").removesuffix(".data")
        answers = _found(file.parent, f"{name}.gold")
        tags = {row.get("id"): row.get("tag") for row in _json(answers)} if answers else {}
        for row in _json(file):
            where = f"{file}, {row.get('id')!r}"
            try:
                key = str(row["id"])
                first, second = (
                    _placed(row, at, key, file.name.split(".")[0]) for at in ("1", "2")
                )
            except (KeyError, ValueError):
                done.lose(where, "no id, lemma, or sentence with start and end")
                continue
            if first is None or second is None:
                done.lose(where, "the offsets lie outside the sentence")
                continue
            tag = tags.get(key)
            done.counts["pairs without an answer"] += tag not in ("T", "F")
            done.counts["pairs that mean the same"] += tag == "T"
            done.pairs.append(Pair(key, first, second, {"T": True, "F": False}.get(str(tag))))
            done.instances += [first, second]
    return done


def _json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads("\n".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: {error.msg}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: must hold a list of objects")
    return rows


def _placed(row: dict[str, Any], at: str, key: str, split: str) -> Instance | None:
    text, start, end = str(row[f"sentence{at}"]), int(row[f"start{at}"]), int(row[f"end{at}"])
    if not 0 <= start < end <= len(text):
        return None
    return Instance(text, start, end, text[start:end], (), f"{key}.{at}", split)


# Raganato's layout -----------------------------------------------------------------------------------

_WIDE = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")


def raganato(path: Path) -> Imported:
    """The English evaluation framework's layout: `NAME.data.xml` with `NAME.gold.key.txt` beside it.

    A sentence's tokens are joined by spaces, but not between Chinese characters. Right senses are the
    keys as they stand; the inventory that they are of is the user's to give. The instance's word is the
    form in the text, which is the lemma where words have one form only.
    """
    from xml.etree import ElementTree

    files = [path] if path.is_file() else sorted(path.rglob("*.data.xml"))
    if not files:
        raise DataError(f"{path}: has no .data.xml file")
    done = Imported()
    for file in files:
        keys = _found(file.parent, file.name.replace(".data.xml", ".gold.key.txt"))
        gold = (
            {name: tuple(senses) for name, *senses in map(str.split, _lines(keys))} if keys else {}
        )
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"{file}: {error}") from None
        split = file.name.split(".")[0]
        for sentence in root.iter("sentence"):
            for one, lemma in _in_sentence(sentence, done, f"{file}, {sentence.get('id')}"):
                done.counts["words in another form than their lemma"] += one.word != lemma
                done.counts["instances with several right senses"] += len(gold.get(one.key, ())) > 1
                done.counts["instances without a right sense"] += one.key not in gold
                done.instances.append(_named(one, one.key, gold.get(one.key, ()), split))
        unused = set(gold) - {one.key for one in done.instances}
        done.counts["keys without an instance"] += len(unused)
    return done


def _in_sentence(sentence: Any, done: Imported, where: str) -> list[tuple[Instance, str]]:
    text, places = "", []
    for token in sentence:
        words = (token.text or "").strip()
        wide = not text or (_WIDE.match(words[:1]) and _WIDE.match(text[-1]))
        text += words if wide else f" {words}"
        if token.tag == "instance":
            if words and token.get("id"):
                places.append((len(text) - len(words), words, token))
            else:
                done.lose(where, "an instance without an id or a word")
    return [
        (Instance(text, at, at + len(words), words, (), token.get("id")), token.get("lemma", words))
        for at, words, token in places
    ]


# Words with formations ---------------------------------------------------------------------------------


def cmorph(path: Path) -> Imported:
    """Cmorph (CSentiPackage; Huang, Ku and Chen, LREC 2010): columns `word, type` in UTF-8.

    Types are the six of `formations.COARSE`; the script is traditional.
    """
    done = Imported()
    for number, row in enumerate(iter_rows(path, {"word": str, "type": str}), 1):
        word, coarse = row["word"].strip(), row["type"].strip()
        if not word or coarse not in COARSE:
            done.lose(
                f"{path}, row {number}", f"no word, or the type {coarse!r} is none of the six"
            )
            continue
        done.formed.append(FormedWord(word, coarse))
    _count_formed(done)
    return done


#: Names that columns of word lists go by; the first that a file has is taken, letters' case aside.
COLUMN_NAMES = {
    "word": ("word", "words", "term", "neologism", "exist_word", "词", "词语", "单词"),
    "formation": ("formation", "word_formation", "formation_label", "label", "type", "构词",
                  "构词法", "构词方式"),
    "gloss": ("gloss", "definition", "meaning", "sense", "释义", "词义"),
    "pos": ("pos", "part_of_speech", "词性"),
}  # fmt: skip


def neologism(path: Path) -> Imported:
    """Words with their formations, as the neologism data's `exist_words`: csv, tsv, json or jsonl.

    Columns are found by the names in `COLUMN_NAMES`; the layout of the release itself could not be
    seen, so that names are taken leniently. Word and formation must be there, gloss and part of speech
    may be.
    """
    names = {name.strip().lower(): name for name in _column_names(path)}
    rename = {}
    for column, wanted in COLUMN_NAMES.items():
        known = [names[name] for name in wanted if name in names]
        if known:
            rename[column] = known[0]
        elif column in ("word", "formation"):
            raise DataError(
                f"{path}: no column for the {column}; it may be named {', '.join(wanted)}; "
                f"the file has {', '.join(names.values())}"
            )
    done = Imported()
    columns = {"word": str, "formation": str | int | float | None, "gloss": str | None,
               "pos": str | None}  # fmt: skip
    for number, row in enumerate(iter_rows(path, columns, rename=rename), 1):
        where, word = f"{path}, row {number}", row["word"].strip()
        value = row["formation"]
        if not word or value is None or not str(value).strip():
            done.lose(where, "no word or no formation")
            continue
        try:
            formation = parse(value)
        except DataError as error:
            done.lose(where, str(error))
            continue
        pos, gloss = (row["pos"] or "").strip(), (row["gloss"] or "").strip()
        done.formed.append(FormedWord(word, formation.coarse, formation, pos, gloss))
    _count_formed(done)
    return done


def _column_names(path: Path) -> list[str]:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if kind == "json":
        return list(dict.fromkeys(name for row in _json(path) for name in row))
    first = next(_lines(path), "")
    if kind == "jsonl":
        try:
            row = json.loads(first or "{}")
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line 1, column {error.colno}: {error.msg}") from None
        return list(row) if isinstance(row, dict) else []
    return next(csv.reader([first], delimiter="\t" if kind == "tsv" else ","), [])


def _count_formed(done: Imported) -> None:
    words: dict[str, set[Any]] = defaultdict(set)
    for one in done.formed:
        words[one.word].add(one.formation if one.formation is not None else one.coarse)
    done.counts["repeated words"] = len(done.formed) - len(words)
    done.counts["words with several formations"] = sum(len(kinds) > 1 for kinds in words.values())


# By name -----------------------------------------------------------------------------------------------

#: Readers by the name of the data set.
IMPORTERS: dict[str, Callable[[Path], Imported]] = {
    "micls": micls,
    "micls-oov": micls_oov,
    "ficls": ficls,
    "mordis": mordis,
    "sememewsd": sememewsd,
    "mclwic": mclwic,
    "raganato": raganato,
    "cmorph": cmorph,
    "neologism": neologism,
}


def read(kind: str, path: Path) -> Imported:
    """Read a data set.

    Args:
        kind: one of `IMPORTERS`.
        path: its folder, or one file of it.

    Raises:
        ConfigError: the kind is unknown.
        DataError: there is no such file, it is of another layout, or nothing in it could be used.
    """
    if kind not in IMPORTERS:
        raise ConfigError(f"no importer {kind!r}; there are {', '.join(IMPORTERS)}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    done = IMPORTERS[kind](path)
    if not done.instances and not done.formed:
        why = f"; the first row was lost since {done.lost[0]}" if done.lost else ""
        raise DataError(f"{path}: nothing in it could be read as {kind}{why}")
    totals = {"senses": len(done.inventory.senses) if done.inventory else 0,
              "words": len(done.inventory) if done.inventory else 0,
              "instances": len(done.instances), "pairs": len(done.pairs),
              "words with formation": len(done.formed)}  # fmt: skip
    met = {name: count for name, count in (totals | done.counts).items() if count}
    done.counts = Counter(met)
    return done


def import_data(kind: str, path: Path, out: Path, overwrite: bool = False) -> dict[str, int]:
    """Read a data set and write it as this package reads it.

    Writes, as far as the data set has it: `inventory.jsonl`, `instances.jsonl`, `pairs.jsonl` (`id`,
    `first`, `second`, `same`), `formations.jsonl` (`word`, `formation`, `coarse`, `pos`, `gloss`); and
    last `imported.json` with the counts and every lost row.

    Args:
        kind: one of `IMPORTERS`.
        path: the data set's folder, or one file of it.
        out: the folder to write.
        overwrite: whether an earlier import there may be replaced.

    Returns:
        What was met: senses, instances, duplicates, several right senses, rows lost by reason, ...

    Raises:
        ConfigError: the kind is unknown, or the folder is there already.
        DataError: see `read`.
    """
    for name in ("inventory.jsonl", "instances.jsonl", "pairs.jsonl", "formations.jsonl",
                 "imported.json"):  # fmt: skip
        refuse_existing(out / name, overwrite)  # it may be a file of the user's own
    done = read(kind, path)
    out.mkdir(parents=True, exist_ok=True)
    if done.inventory:
        done.inventory.save(out / "inventory.jsonl")
    if done.instances:
        write_instances(out / "instances.jsonl", done.instances)
    if done.pairs:
        rows = [one._asdict() | {"first": one.first.row(), "second": one.second.row()}
                for one in done.pairs]  # fmt: skip
        _write_rows(out / "pairs.jsonl", rows)
    if done.formed:
        rows = [one._asdict() | {"formation": one.formation.zh if one.formation is not None else None}
                for one in done.formed]  # fmt: skip
        _write_rows(out / "formations.jsonl", rows)
    counts = dict(done.counts)
    told = {"kind": kind, "source": str(path), "counts": counts, "lost": done.lost}
    write_json(out / "imported.json", told)
    return counts


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
