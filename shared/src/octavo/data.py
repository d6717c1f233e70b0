"""Rows in: files, folders of splits and hub ids, read by one function that names what is wrong.

Text files go through the standard library's readers, so that an error tells file, line and column;
parquet, saved datasets and hub ids go through `datasets`. `iter_rows` holds one row, or one group of
parquet's, at a time; only a .json is read whole.
"""

import csv
import gzip
import json
import logging
import lzma
import math
import re
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOBase
from pathlib import Path
from types import NoneType
from typing import Any, Union, cast, get_args, get_origin

from octavo.errors import DataError

log = logging.getLogger(__name__)

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "heldout"),
    "test": ("test",),
}

Row = dict[str, Any]
Columns = Mapping[str, Any]
Check = Callable[[Row], str | None]


def load_rows(
    source: str | Path,
    columns: Columns,
    split: str | None = None,
    rename: Mapping[str, str] | None = None,
    check: Check | None = None,
) -> list[Row]:
    """All rows of a source; see `iter_rows` for the arguments.

    A hub id is downloaded into the cache of `datasets`, so that a second call does without the hub.

    Raises:
        DataError: as `iter_rows`, and when there is no row.
    """
    rows = list(iter_rows(source, columns, split, rename, check, streaming=False))
    if not rows:
        raise DataError(f"{source}: holds no rows")
    return rows


def iter_rows(
    source: str | Path,
    columns: Columns,
    split: str | None = None,
    rename: Mapping[str, str] | None = None,
    check: Check | None = None,
    streaming: bool = True,
) -> Iterator[Row]:
    """Stream the rows of a file, a folder of splits, a saved dataset or a hub id.

    Args:
        source: a file (csv, tsv, jsonl, json, txt, parquet; text also as .gz and .xz), a folder
            with one file a split, a folder saved by `datasets`, or a dataset's hub id
            (`id:configuration` for one of several). A tsv is read
            without quoting, as GLUE's are. A txt holds one text a line, as the column `text`.
        columns: the wanted columns by name, each with its type: `str`, `int`, `float`, `bool` or a
            union of these; `| None` makes it optional.
        split: train, validation or test (or a name as the source has it), for a folder or a hub id.
        rename: the source's name for a wanted column, where it differs: `{"text": "sentence"}`.
        check: returns what is wrong with a row, or None; the error then names the row's place.
        streaming: read a hub id over the network as its rows are asked for, and keep nothing.

    Yields:
        One dict a row with exactly the wanted columns, None for an optional one that is missing.

    Raises:
        DataError: the source, a column or a value is missing or wrong.
    """
    named = {column: (rename or {}).get(column, column) for column in columns}
    if unknown := set(rename or {}) - set(columns):
        raise DataError(
            f"no column {sorted(unknown)[0]!r} is read here; rename one of {', '.join(columns)}"
        )
    kinds = {column: _kinds(wanted) for column, wanted in columns.items()}
    for where, raw in _places(str(source), split, named, columns, streaming):
        row = {
            column: _typed(raw.get(name), kinds[column], where, name)
            for column, name in named.items()
        }
        if check is not None and (problem := check(row)):
            raise DataError(f"{where}: {problem}")
        yield row


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder of splits, by the split each holds; parquet may come in shards."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if _format_of(file) in FORMATS:
            name = file.name.split(".")[0].split("-")[0]  # train.csv, train-00000-of-00002.parquet
            found.setdefault(name, []).append(file)
    return found


def _places(
    source: str, split: str | None, named: Mapping[str, str], columns: Columns, streaming: bool
) -> Iterator[tuple[str, Row]]:
    """Pairs of a row's place, in words, and the raw row."""
    if not source:
        raise DataError("an empty name is no source; give a file, a folder or a hub id")
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            yield from _from_datasets(source, _load_saved(path, split), named, columns)
        else:
            for file in _split_files(path, split):
                yield from _from_file(file, named, columns)
    elif path.exists():
        yield from _from_file(path, named, columns)
    elif _format_of(path) or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or folder")
    else:
        with _read_errors(source):
            yield from _from_datasets(source, _load_hub(source, split, streaming), named, columns)


def _split_files(folder: Path, split: str | None) -> list[Path]:
    files = split_files(folder)
    if not files:
        raise DataError(f"{folder}: holds no data file ({', '.join(FORMATS)})")
    if split is None:
        if len(files) == 1:
            return _shards(*next(iter(files.items())))
        raise DataError(f"{folder}: holds several files; name one of them: {', '.join(files)}")
    for name in SPLIT_NAMES.get(split, (split,)):
        if name in files:
            return _shards(name, files[name])
    raise DataError(f"{folder}: has no split {split!r}; it has {', '.join(files)}")


def _shards(split: str, files: list[Path]) -> list[Path]:
    if len(files) > 1 and {file.suffix for file in files} != {".parquet"}:
        names = " and ".join(file.name for file in files)
        raise DataError(f"{files[0].parent}: {names} both hold {split!r}; name one of them")
    return files


def _format_of(path: Path) -> str:
    """The suffix that tells the format, below one of compression; empty when it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def _from_file(path: Path, named: Mapping[str, str], columns: Columns) -> Iterator[tuple[str, Row]]:
    kind = _format_of(path)
    if not kind:
        raise DataError(f"{path}: unknown format; use {', '.join(FORMATS)}, or .gz or .xz of these")
    if kind == ".parquet":
        from datasets import Dataset

        with _read_errors(path):
            table = Dataset.from_parquet(str(path), streaming=True)
            yield from _from_datasets(str(path), table, named, columns)
        return
    readers = {".jsonl": _jsonl, ".json": _json, ".txt": _txt}
    with _read_errors(path), _open(path) as file:
        if kind in readers:
            yield from readers[kind](path, file)
        else:
            yield from _separated(path, file, kind, named, columns)


def _open(path: Path) -> TextIOBase:
    opener = COMPRESSIONS.get(path.suffix.lower(), open)
    return cast(TextIOBase, opener(path, "rt", encoding="utf-8-sig", newline=""))


@contextmanager
def _read_errors(path: Path | str) -> Iterator[None]:
    """Turn what can go wrong while reading into one line about the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start} ({error.object[error.start]:#04x}); "
            "convert the file"
        ) from None
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        if type(error).__module__.startswith(("pyarrow", "datasets")):
            raise DataError(f"{path}: damaged, or of another format ({error})") from None
        raise


def _separated(
    path: Path, file: TextIOBase, kind: str, named: Mapping[str, str], columns: Columns
) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)
    plain: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
    lines = _csv_lines(path, csv.reader(file, strict=True, **plain))
    header = next(lines, None)
    if header is None:
        raise DataError(f"{path}: is empty; the first line must name the columns")
    names = [name.strip() for name in header[1]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}, line 1: the column {twice[0]!r} stands twice")
    _need(named, columns, names, f"{path}, line 1")
    for number, cells in lines:
        if not cells:
            continue
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {number}: has {len(cells)} cells where the header has {len(names)}"
            )
        yield f"{path}, line {number}", dict(zip(names, cells, strict=True))


def _csv_lines(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    first = 1
    try:
        for cells in reader:
            yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {first}: {error}") from None


def _jsonl(path: Path, file: TextIOBase) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise DataError(f"{where}, column {error.colno}: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: {error}") from None
            yield where, _mapping(row, where)


def _json(path: Path, file: TextIOBase) -> Iterator[tuple[str, Row]]:
    text = file.read()
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: {error.msg}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list of objects; for one object a line use .jsonl")
    for number, row in enumerate(rows, 1):
        where = f"{path}, item {number}"
        yield where, _mapping(row, where)


def _txt(path: Path, file: TextIOBase) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, 1):
        yield f"{path}, line {number}", {"text": line.rstrip("\r\n")}


def _mapping(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object, not {type(row).__name__}")
    return row


def _load_saved(path: Path, split: str | None) -> Any:
    from datasets import load_from_disk

    with _read_errors(path):
        data = load_from_disk(str(path))
    return _one_split(str(path), data, split)


def _load_hub(source: str, split: str | None, streaming: bool) -> Any:
    import datasets

    try:
        log.info("%s: asking the hub", source)
        name, _, configuration = source.partition(":")
        data = datasets.load_dataset(name, configuration or None, streaming=streaming)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source}: neither a file or folder here nor a dataset the hub gave ({first})"
        ) from None
    return _one_split(source, data, split)


def _one_split(source: str, data: Any, split: str | None) -> Any:
    if not isinstance(data, dict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    for name in SPLIT_NAMES.get(split or "", (split,)):
        if name in data:
            return data[name]
    wanted = f"has no split {split!r}; it has" if split else "holds several splits; name one of"
    raise DataError(f"{source}: {wanted} {', '.join(map(str, data))}")


def _from_datasets(
    source: str, data: Any, named: Mapping[str, str], columns: Columns
) -> Iterator[tuple[str, Row]]:
    from datasets import ClassLabel

    # a stream of a set that declares no features tells its columns by its first row
    _need(named, columns, data.column_names or next(iter(data), {}), source)
    classes = {
        name: feature.names for name, feature in (data.features or {}).items()
        if isinstance(feature, ClassLabel)
    }  # fmt: skip
    for number, row in enumerate(data, 1):
        for name, names in classes.items():
            if isinstance(value := row[name], int):
                row[name] = names[value] if 0 <= value < len(names) else None
        yield f"{source}, row {number}", row


def _need(named: Mapping[str, str], columns: Columns, there: Iterable[str], where: str) -> None:
    names = list(there)
    for column, name in named.items():
        if name not in names and NoneType not in _kinds(columns[column]):
            raise DataError(f"{where}: no column {name!r}; it has {', '.join(names)}")


def _kinds(wanted: Any) -> tuple[type, ...]:
    """The types of a union in their order; never cached by it, as `int | str` equals `str | int`."""
    return get_args(wanted) if get_origin(wanted) in (types.UnionType, Union) else (wanted,)


def _typed(value: Any, kinds: tuple[type, ...], where: str, name: str) -> Any:
    """The value as one of the wanted types, or an error that names its place."""
    if value is None:
        if NoneType in kinds:
            return None
        raise DataError(f"{where}: {name!r} is missing")
    if float in kinds and type(value) is int:
        value = float(value)
    if isinstance(value, str):  # a cell of a text file
        for kind in kinds:
            try:
                value = kind(value) if kind is not bool else _TRUTH[value.strip().lower()]
                break
            except (ValueError, KeyError, TypeError):  # the last is what None says
                continue
    if isinstance(value, float) and math.isnan(value):
        raise DataError(f"{where}: {name!r} is NaN")
    if isinstance(value, str) and _HALF_LETTER.search(value):
        raise DataError(f"{where}: {name!r} holds half a character (a lone surrogate)")
    if type(value) in kinds:
        return value
    expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
    shown = f"{value!r:.40}"
    raise DataError(f"{where}: {name!r} must be {expected}, not {type(value).__name__} {shown}")


_HALF_LETTER = re.compile("[\ud800-\udfff]")
_TRUTH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
