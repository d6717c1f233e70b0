"""What a person sees: logs and progress on stderr, results on stdout.

A library call only logs and yields progress; whether that shows is the command line's to say.
"""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from octavo.errors import ConfigError
from octavo.runtime import is_main

T = TypeVar("T")
Row = Mapping[str, Any]

_progress_wanted = False


@dataclass(frozen=True)
class Outcome:
    """What a command found: named tables for people, the same values for programs.

    Attributes:
        tables: rows by table name; each row maps column to value.
        note: one line of what to do next or where the results lie.
        no: why the answer is no; the command then exits with 3.
    """

    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    note: str = ""
    no: str = ""

    def as_json(self) -> str:
        """The outcome as one JSON object; NaN and infinities become null."""
        content = {**self.tables, "note": self.note, "no": self.no}
        return json.dumps(_jsonable(content), indent=2, ensure_ascii=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def cell(value: Any) -> str:
    """A value as a table shows it: four significant digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if value == value else ""
    return str(value)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All column names in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def show(outcome: Outcome, as_json: bool = False) -> None:
    """Print an outcome on stdout (rank 0 alone)."""
    if not is_main():
        return
    if as_json:
        print(outcome.as_json())  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 200  # a file or a pipe wraps nothing
    console = Console(highlight=False, markup=False, width=width)
    for name, rows in outcome.tables.items():
        console.print(name, style="bold", soft_wrap=True)
        table = Table()
        columns = columns_of(rows)
        for column in columns:
            numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
            table.add_column(column, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(cell(row.get(column)) for column in columns))
        console.print(table)
    if outcome.note:
        console.print(outcome.note, soft_wrap=True)


def progress(
    items: Iterable[T], description: str, total: int | None = None, unit: str = ""
) -> Iterator[T]:
    """Yield the items, with a progress bar and ETA on stderr where a person watches.

    Args:
        items: what to go through.
        description: what is being done, in a few words.
        total: how many there are; taken from `len` where the items have one.
        unit: what is counted, shown behind the count.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # pyright: ignore[reportArgumentType]
    with counter(description, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def counter(description: str, total: int | None = None, unit: str = ""):
    """A progress bar advanced by hand; the context is a function that takes the amount."""
    if not (_progress_wanted and is_main() and sys.stderr.isatty()):
        yield lambda amount=1: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        Remaining(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda amount=1: bar.update(task, advance=amount)


def start(package: str, level: int = logging.INFO, log_file: Path | None = None) -> None:
    """Send the logs of the package and of octavo to stderr (and a file), and allow progress bars.

    Raises:
        ConfigError: the log file cannot be written.
    """
    global _progress_wanted
    _progress_wanted = level <= logging.INFO
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None:
        try:
            handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--log-file {log_file}: {error.strerror}; choose another") from None
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    for handler in handlers[1:]:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in (package, "octavo"):
        logger = logging.getLogger(name)
        logger.handlers = list(handlers) if is_main() else [logging.NullHandler()]
        logger.setLevel(level)
        logger.propagate = False
