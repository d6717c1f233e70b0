"""Rows in, prompts out: labelled texts, and demonstrations drawn from them by the seed."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.data import load_rows
from octavo.errors import DataError

from anchors.config import PromptOptions, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from anchors.prompts import Prompt


@dataclass(frozen=True)
class Example:
    """A text and its class."""

    text: str
    label: int

    @property
    def key(self) -> str:
        """What tells it from others without showing it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Made:
    """What a saved cache or adapter was made with.

    Attributes:
        task: template and label words.
        shown: the demonstrations.
        trained: keys of the texts it was trained on.
    """

    task: Task
    shown: tuple[tuple[str, int], ...]
    trained: frozenset[str] = frozenset()


def load_examples(
    source: str, task: Task, split: str | None = None, text: str = "text", label: str = "label"
) -> list[Example]:
    """Labelled texts; labels are class numbers or label words, in any case.

    Args:
        source: a file, a folder of splits or a hub id.
        task: whose classes they are.
        split: of a folder or a hub id.
        text: column of the texts; several, joined by a space, as "turn1,turn2,turn3".
        label: column of the labels.

    Raises:
        DataError: a row is wrong, or its label is none of the task's.
    """
    words = [word.strip().lower() for word in task.labels]
    numbers = {word: i for i, word in enumerate(words)}
    if not any(word.lstrip("-").isdigit() for word in words):  # else 1 could mean two classes
        numbers |= {str(i): i for i in range(len(words))}

    parts = {f"text {n}": column.strip() for n, column in enumerate(text.split(","))}

    def joined(row: dict[str, Any]) -> str:
        return " ".join(row[part].strip() for part in parts).strip()

    def check(row: dict[str, Any]) -> str | None:
        if str(row["label"]).strip().lower() in numbers:
            return None if joined(row) else "its text is empty"
        return (
            f"label {row['label']!r} is none of {', '.join(words)}, nor a number up to "
            f"{len(task.labels) - 1}"
        )

    rows = load_rows(
        source,
        dict.fromkeys(parts, str) | {"label": int | str},
        split,
        parts | {"label": label},
        check,
    )
    return [Example(joined(row), numbers[str(row["label"]).strip().lower()]) for row in rows]


def draw_demonstrations(
    examples: Sequence[Example], classes: int, shots: int, seed: int
) -> list[tuple[str, int]]:
    """Some texts of each class, all in shuffled order.

    Raises:
        DataError: a class has too few texts.
    """
    draw = random.Random(seed)
    chosen = []
    for kind in range(classes):
        own = [example.text for example in examples if example.label == kind]
        if len(own) < shots:
            raise DataError(
                f"class {kind} has {len(own)} texts to demonstrate it, and {shots} are asked for"
            )
        chosen += [(text, kind) for text in draw.sample(own, shots)]
    draw.shuffle(chosen)
    return chosen


@dataclass(frozen=True)
class Drawn:
    """What the options and a seed give.

    Attributes:
        task: template and label words.
        shown: the demonstrations, in their order.
        rows: texts to label.
        rest: rows to demonstrate with that were not drawn.
    """

    task: Task
    shown: list[tuple[str, int]]
    rows: list[Example]
    rest: list[Example]

    @property
    def labels(self) -> list[int]:
        """The true class of each row."""
        return [row.label for row in self.rows]

    def prompts(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        longest: int,
        rows: Sequence[Example] | None = None,
    ) -> "list[Prompt]":
        """A prompt for each row (by default those to label), all with the same demonstrations.

        Raises:
            DataError: a prompt is longer than the model takes.
        """
        from anchors.prompts import build_prompt

        chosen = self.rows if rows is None else rows
        prompts = [build_prompt(self.task, tokenizer, self.shown, row.text) for row in chosen]
        most = max(len(prompt) for prompt in prompts)
        if most > longest:
            raise DataError(
                f"a prompt has {most} tokens and the model takes {longest}; use fewer --shots or "
                "shorter texts"
            )
        return prompts

    def examples(self, count: int, seed: int) -> list[Example]:
        """As many of the rest of each class, to train or to choose on.

        Raises:
            DataError: a class has too few.
        """
        pairs = draw_demonstrations(self.rest, len(self.task.labels), count, seed)
        return [Example(text, kind) for text, kind in pairs]


def draw(
    options: PromptOptions,
    seed: int,
    made: Made | None = None,
) -> Drawn:
    """Rows to label, and demonstrations.

    Args:
        options: task, rows and sizes.
        seed: of the demonstrations and of the texts drawn.
        made: a task and demonstrations that are given already; rows to demonstrate with are then not
            read, and texts that it was trained on are not labelled.

    Raises:
        DataError: rows are wrong, or a class is empty.
    """
    task = made.task if made else options.chosen_task()
    columns = {"text": options.text_column, "label": options.label_column}
    pool: list[Example] = []
    if made:
        shown = list(made.shown)
    else:
        pool = load_examples(options.train_rows(), task, "train", **columns)
        shown = draw_demonstrations(pool, len(task.labels), options.shots, seed)
    rows = load_examples(options.data, task, "test", **columns)
    taken = set(shown)
    trained = made.trained if made else frozenset()
    rows = [row for row in rows if (row.text, row.label) not in taken and row.key not in trained]
    if options.samples and options.samples < len(rows):
        rows = random.Random(seed).sample(rows, options.samples)
    if not rows:
        raise DataError(f"{options.data}: holds no text besides the demonstrations")
    asked = {row.text for row in rows}
    rest = [row for row in pool if (row.text, row.label) not in taken and row.text not in asked]
    return Drawn(task, shown, rows, rest)


def build_prompts(
    options: PromptOptions, tokenizer: "PreTrainedTokenizerBase", seed: int, longest: int
) -> "tuple[list[Prompt], list[int]]":
    """Prompts that share their demonstrations, and the true class of each.

    Args:
        options: task, rows and sizes.
        tokenizer: of the model.
        seed: of the demonstrations and of the texts drawn.
        longest: tokens that the model takes.

    Raises:
        DataError: rows are wrong, a class is empty, or a prompt is longer than the model takes.
    """
    drawn = draw(options, seed)
    return drawn.prompts(tokenizer, longest), drawn.labels
