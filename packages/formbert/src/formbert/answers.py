"""Questions out of files and answers into them: as a stream, safe on disk, resumed where they stop."""

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from octavo.console import counter
from octavo.errors import ConfigError, DataError
from octavo.rundir import refuse_existing, write_text
from octavo.runtime import world_size

from formbert.data import Instance, iter_instances, locate
from formbert.disambiguator import Disambiguator, Question
from formbert.predictions import Prediction
from formbert.tagger import TaggedToken, Tagger

Row = dict[str, Any]
PREDICTIONS = "predictions.jsonl"
STDIN = "-"


def questions_of(source: str) -> Iterator[Question]:
    """Instances of a file; or of lines `text<TAB>word[:start]`, or marked texts, from - or a .txt.

    Raises:
        DataError: a line is wrong, and the message names it; or there is none.
    """
    if source != STDIN and not source.endswith(".txt"):
        found = False
        for one in iter_instances(source):
            found = True
            yield one
        if not found:
            raise DataError(f"{source}: holds no instance")
        return
    name, file = ("standard input", sys.stdin) if source == STDIN else (source, _opened(source))
    number = 0
    with nullcontext(file) if source == STDIN else file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\r\n")
            if not line.strip():
                continue
            try:
                yield replace(_asked(line), key=str(number))
            except DataError as error:
                raise DataError(f"{name}, line {number}: {error}") from None
    if not number:
        raise DataError(f"{name}: is empty; give lines like `text<TAB>word`, or mark words with #")


def _asked(line: str) -> Instance:
    text, _, asked = line.partition("\t")
    word, _, start = asked.partition(":")
    if start and not start.isdecimal():
        raise DataError(f"the start of {word!r} is {start!r}; count characters from 0")
    return locate(text, word or None, int(start) if start else None)


def _opened(source: str) -> TextIO:
    try:
        return Path(source).open(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{source}: {error.strerror}") from None


def done(out: Path) -> int:
    """Rows that a stopped run left in a file; a line cut off in the writing is taken away."""
    if not out.exists():
        return 0
    count = whole = 0
    with out.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, whole = count + 1, whole + len(line)
        file.truncate(whole)
    return count


def answered(
    results: Iterator[Row], out: Path, resume: bool, overwrite: bool, chunk: int, description: str
) -> int:
    """Append rows to a file, safe on disk after each chunk; returns how many were added.

    Args:
        results: in an order that is always the same; as many as the file holds are passed over by the
            caller, who asks `done`.
        out: the file.
        resume: go on where it stops.
        overwrite: begin anew.
        chunk: rows a write.
        description: for the bar of progress.
    """
    count = 0
    if not (resume and out.exists()):
        refuse_existing(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a" if resume else "w", encoding="utf-8") as file, counter(description) as step:
        while some := list(islice(results, chunk)):
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
            file.flush()
            os.fsync(file.fileno())
            count += len(some)
            step(len(some))
    return count


def alone() -> None:
    """Refuse several processes, which would write one file at once.

    Raises:
        ConfigError: torchrun started several.
    """
    if world_size() > 1:
        raise ConfigError(
            "one process writes the answers: cut the file, and start one for each part"
        )


def predicted(
    wsd: Disambiguator, source: str, out: Path, resume: bool, overwrite: bool, chunk: int = 2048
) -> int:
    """Answers to a file's questions into a file; returns how many were added."""
    alone()
    questions = questions_of(source)
    if resume and (count := done(out)):
        last = next(islice(questions, count - 1, None), None)
        with out.open(encoding="utf-8") as file:
            told = json.loads(deque(file, 1)[0])
        if not isinstance(last, Instance) or (told["id"], told["word"]) != (last.key, last.word):
            raise DataError(
                f"{out}: answers other questions than those of {source}; name another file"
            )
    rows = (answer.row() for answer in wsd.stream(questions, chunk))
    return answered(rows, out, resume, overwrite, chunk, "answering")


def tagged(
    wsd: Disambiguator,
    source: str,
    segmenter: str,
    out: Path,
    resume: bool,
    overwrite: bool,
    chunk: int = 256,
) -> int:
    """Words and senses of a file's lines into a file, a line a line; returns how many were added."""
    alone()
    tagger = Tagger(wsd, segmenter)
    skip = done(out) if resume else 0

    def rows() -> Iterator[Row]:
        with _opened(source) as file:
            lines = islice((line.rstrip("\r\n") for line in file), skip, None)
            while some := list(islice(lines, chunk)):
                for text, tokens in zip(some, tagger.tag_many(some), strict=True):
                    yield {"text": text, "tokens": [_token(token) for token in tokens]}

    return answered(rows(), out, resume, overwrite, chunk, "tagging")


def tag_table(wsd: Disambiguator, source: str, segmenter: str) -> list[Row]:
    """The words of a file's lines that have a sense."""
    with _opened(source) as file:
        texts = [line.rstrip("\r\n") for line in file]
    rows = []
    for line, tokens in enumerate(Tagger(wsd, segmenter).tag_many(texts), 1):
        for token in tokens:
            if token.prediction:
                told = token.prediction
                rows.append({"line": line, "start": token.start, "word": token.text,
                             "sense": told.sense_id, "gloss": told.gloss,
                             "probability": told.probability})  # fmt: skip
    return rows


def _token(token: TaggedToken) -> Row:
    told = token.prediction
    row: Row = {"text": token.text, "start": token.start, "end": token.end}
    return row if told is None else row | {"sense_id": told.sense_id, "gloss": told.gloss,
                                           "probability": round(told.probability, 6),
                                           "formation": told.formation}  # fmt: skip


def write_predictions(path: Path, answers: Iterable[Prediction]) -> None:
    """Answers as .jsonl, atomically."""
    lines = (json.dumps(one.row(), ensure_ascii=False) for one in answers)
    write_text(path, "\n".join(lines) + "\n")


def read_predictions(path: Path) -> list[Prediction]:
    """Answers of a file, or of the folder of an evaluation.

    Raises:
        DataError: there is none, or a line is damaged.
    """
    file = path / PREDICTIONS if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Prediction.of(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file}, line {number}: is no prediction") from None
    return found
