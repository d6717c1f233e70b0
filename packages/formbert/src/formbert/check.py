"""All that is wrong with an inventory or a file of instances, row by row.

The readers stop at the first error, as they must; this goes on to the end, so that a file is put right
in one go. It also warns of what can be read but is seldom meant.
"""

import csv
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.errors import DataError

from formbert.data import Instance, locate
from formbert.formations import parse
from formbert.inventory import Inventory

#: Common characters that exist in the one script only, each traditional one with its simplified form: a
#: small set, enough to tell which script a text of some length is in, not to convert it.
SCRIPTS = (
    "國国學学會会來来時时這这個个們们說说對对為为過过還还開开關关門门問问間间長长東东車车馬马鳥鸟"
    "魚鱼龍龙風风電电頭头見见現现觀观視视覺觉親亲語语話话認认識识讀读書书寫写記记請请謝谢課课論论議议"
    "讓让變变實实寶宝買买賣卖錢钱銀银鐵铁飯饭飲饮館馆醫医藥药衛卫體体點点無无熱热愛爱歡欢樂乐藝艺術术"
    "經经濟济業业產产農农動动勞劳員员師师歲岁歷历當当發发結结給给組组線线網网級级紅红綠绿聽听聲声"
    "腦脑臉脸氣气漢汉義义習习華华報报場场塊块壞坏處处備备雙双難难雖虽離离類类題题願愿顯显驗验齊齐"
)
TRADITIONAL, SIMPLIFIED = frozenset(SCRIPTS[::2]), frozenset(SCRIPTS[1::2])

#: What tables write where there is nothing.
MISSING = frozenset({"nan", "none", "null", "n/a", "<na>"})

Problem = dict[str, Any]


def check_data(path: str | Path, inventory: Inventory | None = None) -> list[Problem]:
    """Everything wrong with a file: an inventory where it has a column `gloss`, else instances.

    Args:
        path: a csv, tsv, jsonl or json file, plain or compressed (.gz, .xz).
        inventory: of which the instances' words and right senses must be.

    Returns:
        Problems `row` (counted from 1 as the readers do; 0 for the whole file), `column`, `severity`
        (`error`: the readers refuse it, or would take it for something else; `warning`: it can be read),
        `problem`, `todo` (what to do). None where all is well.

    Raises:
        DataError: there is no such file, it is of another format, or damaged.
    """
    path = Path(path)
    text, problems = _text_of(path)
    rows = list(_rows(path, text, problems))
    columns = {name for _, row in rows for name in row}
    if not rows:
        problems.append(_error(0, "", "the file holds no row", "give it rows"))
        return problems
    if "gloss" in columns:
        problems += _need_columns(columns, ("word", "gloss")) or _check_senses(rows)
    else:
        problems += _need_columns(columns, ("text",)) or _check_instances(rows, inventory)
    problems += _check_script(rows)
    return sorted(problems, key=lambda problem: problem["row"])


def _error(row: int, column: str, problem: str, todo: str) -> Problem:
    return {"row": row, "column": column, "severity": "error", "problem": problem, "todo": todo}


def _warning(row: int, column: str, problem: str, todo: str) -> Problem:
    return _error(row, column, problem, todo) | {"severity": "warning"}


# Reading what may be broken ------------------------------------------------------------------------


def _text_of(path: Path) -> tuple[str, list[Problem]]:
    """The file's text, with what is odd in its bytes."""
    openers = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix.lower(), open)(path, "rb") as file:
            content = bytes(file.read())
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    problems = []
    if content.startswith(b"\xef\xbb\xbf"):
        problems.append(
            _warning(0, "", "begins with a byte order mark", "save as UTF-8 without BOM")
        )
    if b"\r" in content:
        problems.append(_warning(0, "", "has CR at line ends", "save with Unix line ends"))
    try:
        return content.decode("utf-8-sig"), problems
    except UnicodeDecodeError as error:
        at = f"not UTF-8 at byte {error.start} ({content[error.start]:#04x})"
        problems.append(_error(0, "", at, "convert the file to UTF-8 (was it GB18030?)"))
        return content.decode("utf-8-sig", "replace"), problems


def _rows(path: Path, text: str, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows that can be parsed, with their numbers; what cannot be goes to the problems."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".xz")
    match name.rsplit(".", 1)[-1]:
        case "csv" | "tsv" as kind:
            yield from _separated(text, kind, problems)
        case "jsonl":
            lines = [line for line in text.split("\n") if line.strip()]
            yield from _objects(enumerate(lines, 1), problems)
        case "json":
            try:
                values = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                problems.append(_error(0, "", f"no JSON: {error}", "mend it there"))
                return
            if not isinstance(values, list):
                problems.append(_error(0, "", "holds no list", "put the rows in [ ]"))
                return
            yield from _objects(enumerate(values, 1), problems)
        case _:
            raise DataError(
                f"{path}: only csv, tsv, jsonl and json can be checked, also as .gz or .xz"
            )


def _separated(
    text: str, kind: str, problems: list[Problem]
) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    lines = text.splitlines(keepends=True) if kind == "csv" else text.replace("\r", "").split("\n")
    reader = (
        csv.reader(lines, strict=True) if kind == "csv"
        else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    )  # fmt: skip
    header: list[str] | None = None
    number = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:  # where the next row begins cannot be told
            todo = "mend the quotes; later rows were not looked at"
            problems.append(_error(number + 1, "", str(error), todo))
            return
        if cells is None:
            return
        if header is None:
            header = [name.strip() for name in cells]
            continue
        if not cells:
            continue
        number += 1
        if len(cells) != len(header):
            problem = f"has {len(cells)} cells where the header has {len(header)}"
            todo = "quote cells that hold a comma" if kind == "csv" else "take tabs out of cells"
            problems.append(_error(number, "", problem, todo))
            continue
        yield number, dict(zip(header, cells, strict=True))


def _objects(
    values: Iterator[tuple[int, Any]] | enumerate[Any], problems: list[Problem]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, value in values:
        row = value
        if isinstance(value, str):
            try:
                row = json.loads(value)
            except (json.JSONDecodeError, RecursionError) as error:
                problems.append(_error(number, "", f"no JSON: {error}", "mend it there"))
                continue
        if not isinstance(row, dict):
            problems.append(_error(number, "", "is no object", "write {...} with named values"))
            continue
        yield number, row


def _need_columns(columns: set[str], wanted: tuple[str, ...]) -> list[Problem]:
    return [
        _error(0, name, f"there is no such column; there are {', '.join(sorted(columns))}",
               f"name the column {name}")
        for name in wanted if name not in columns
    ]  # fmt: skip


# What a row may hold ----------------------------------------------------------------------------------


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _words(row: int, column: str, value: Any) -> list[Problem]:
    """What is wrong with a value that must be text."""
    if _empty(value):
        return [_error(row, column, "is empty", "fill it in, or leave the row out")]
    if isinstance(value, float) and math.isnan(value):
        return [_error(row, column, "is NaN", "fill it in, or leave the row out")]
    if not isinstance(value, str):
        return [_error(row, column, f"is {value!r}, no text", "quote it")]
    if value.strip().lower() in MISSING:
        return [
            _error(row, column, f"is {value!r}: a missing value written as text?", "fill it in")
        ]
    if any("\ud800" <= character <= "\udfff" for character in value):
        return [_error(row, column, "holds half a character (a lone surrogate)", "mend it")]
    if "\ufffd" in value:
        return [_warning(row, column, "holds U+FFFD, which stands for a lost character", "mend it")]
    return []


def _formation(row: int, value: Any) -> list[Problem]:
    if _empty(value):
        return []
    if (isinstance(value, float) and math.isnan(value)) or str(value).strip().lower() in MISSING:
        return [_error(row, "formation", f"is {value}", "leave it empty where it is unknown")]
    try:
        parse(value)
    except DataError as error:
        number = str(value).strip().removesuffix(".0") in ("0", "1", "10")
        todo = "write 00, 01 or 10 as text: read the column as text where it was last saved"
        return [
            _error(row, "formation", str(error), todo if number else "use a name from the list")
        ]
    return []


def _check_senses(rows: list[tuple[int, dict[str, Any]]]) -> list[Problem]:
    problems: list[Problem] = []
    names: dict[str, int] = {}
    meanings: dict[tuple[str, str], int] = {}
    for number, row in rows:
        word, gloss = row.get("word"), row.get("gloss")
        problems += _words(number, "word", word) + _words(number, "gloss", gloss)
        problems += _formation(number, row.get("formation"))
        meaning = (str(word).strip(), str(gloss).strip())
        if not _empty(word) and not _empty(gloss):
            if meaning in meanings:
                same = f"{word!r} has this gloss in row {meanings[meaning]} already"
                todo = "leave one out, or tell them apart: no model can"
                problems.append(_warning(number, "gloss", same, todo))
            meanings.setdefault(meaning, number)
        if not _empty(name := row.get("sense_id")):
            if not isinstance(name, str):
                problems.append(_error(number, "sense_id", f"is {name!r}, no text", "quote it"))
            if str(name) in names:
                same = f"{name!r} is the name of row {names[str(name)]} already"
                problems.append(
                    _error(number, "sense_id", same, "rename one, or leave all names out")
                )
            names.setdefault(str(name), number)
    return problems


def _check_instances(
    rows: list[tuple[int, dict[str, Any]]], inventory: Inventory | None
) -> list[Problem]:
    problems: list[Problem] = []
    keys: dict[str, int] = {}
    places: dict[tuple[str, int, str], int] = {}
    for number, row in rows:
        key = str(row.get("id") or number)
        if key in keys:
            same = f"{key!r} is the id of row {keys[key]} already"
            problems.append(_error(number, "id", same, "give each row its own, or none at all"))
        keys.setdefault(key, number)
        one = _place(number, row, problems)
        problems += _gold(number, row, one, inventory)
        if one is not None:
            place = (one.text, one.start, one.word)
            if place in places:
                same = f"is the same word at the same place as row {places[place]}"
                todo = "leave one out; several right senses go into one row"
                problems.append(_warning(number, "text", same, todo))
            places.setdefault(place, number)
    return problems


def _place(number: int, row: dict[str, Any], problems: list[Problem]) -> Instance | None:
    """The instance that a row means; what is wrong goes to the problems."""
    text, word = row.get("text"), row.get("word")
    wrong = _words(number, "text", text) + ([] if _empty(word) else _words(number, "word", word))
    start, end = (_whole(number, name, row.get(name), wrong) for name in ("start", "end"))
    problems += wrong
    if any(problem["severity"] == "error" for problem in wrong):
        return None
    assert isinstance(text, str)
    try:
        one = locate(text, word, start)
    except DataError as error:
        column, todo = "word", "give the word as it stands in the text"
        if start is not None:
            column, todo = "start", "count characters (code points) from 0, not bytes or tokens"
        elif word and word in text:
            column, todo = "start", "give its start, or mark it with # on both sides"
        elif not word:
            todo = "give the word, or mark it with # on both sides"
        problems.append(_error(number, column, str(error), todo))
        return None
    if end is not None and end != one.end:
        told = f"{one.word!r} ends at {one.end}, not at {end}"
        problems.append(_error(number, "end", told, "count it exclusive, or leave it out"))
    return one


def _whole(number: int, column: str, value: Any, wrong: list[Problem]) -> int | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str | int) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    wrong.append(
        _error(number, column, f"is {value!r}, no whole number", "count characters from 0")
    )
    return None


def _gold(
    number: int, row: dict[str, Any], one: Instance | None, inventory: Inventory | None
) -> list[Problem]:
    column = "gold" if row.get("gold") else "sense_id"
    value = row.get("gold") or row.get("sense_id")
    if _empty(value) or value == []:
        todo = "give it where models are trained or judged by this file"
        return [_warning(number, "gold", "there is no right sense", todo)]
    if not isinstance(value, str | list):
        return [_error(number, column, f"is {value!r}, no name or list", "quote the sense's name")]
    names = value.split("|") if isinstance(value, str) else [str(name) for name in value]
    if one is None or inventory is None:
        return []
    if one.word not in inventory:
        what = f"{one.word!r} is not in the inventory"
        return [_error(number, "word", what, "add its senses, or leave the row out")]
    there = [sense.sense_id for sense in inventory[one.word]]
    return [
        _error(number, column, f"{name!r} is no sense of {one.word!r}", f"it has {', '.join(there)}")
        for name in names if name not in there
    ]  # fmt: skip


def _check_script(rows: list[tuple[int, dict[str, Any]]]) -> list[Problem]:
    """Rows in the script that the fewer rows are in; none where all are in one script."""
    found: dict[str, dict[int, str]] = {"traditional": {}, "simplified": {}}
    for number, row in rows:
        text = "".join(value for value in row.values() if isinstance(value, str))
        for script, signs in (("traditional", TRADITIONAL), ("simplified", SIMPLIFIED)):
            if there := [character for character in dict.fromkeys(text) if character in signs]:
                found[script][number] = "".join(there[:5])
    fewer, more = sorted(found, key=lambda script: len(found[script]))  # a tie: traditional
    if not found[more]:
        return []
    return [
        _warning(number, "", f"holds {fewer} characters ({there}) in a file that is mostly {more}",
                 f"convert the row to {more} script: a model trained on one reads the other badly")
        for number, there in found[fewer].items()
    ]  # fmt: skip
