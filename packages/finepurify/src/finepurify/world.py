"""Tasks to attack and defend: the generated language, and real texts from a folder."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octavo.data import load_rows, split_files
from octavo.errors import DataError
from octavo.models import load_tokenizer
from octavo.rundir import atomic
from octavo.runtime import Runtime
from octavo.tiny import Shape, checkpoint

from finepurify.data import Examples, first_of_each
from finepurify.language import TRIGGERS, corpus, language, sentences, sprinkled
from finepurify.pretrain import SmallBert, pretrained, word_tokenizer


@dataclass(frozen=True)
class World:
    """A pre-trained model and rows to fine-tune, defend and judge with; no row is in two of them.

    Attributes:
        init: folder of the pre-trained model.
        train: the attacker's rows before poisoning.
        clean: the defender's, to compute on.
        held: the defender's, to choose rho by.
        test: nobody's until the end.
        max_length: tokens at most.
    """

    init: Path
    train: Examples
    clean: Examples
    held: Examples
    test: Examples
    max_length: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    pretrain: int = 20_000
    """Sentences of pre-training."""

    epochs: float = 2.0
    """Passes over them."""

    train: int = 3_000
    """The attacker's rows."""

    shots: int = 64
    """The defender's rows of each class to compute on."""

    held: int = 600
    """The defender's rows to choose rho by."""

    test: int = 1_200
    """Test rows."""


#: Seed of the language's pre-trained model and its texts.
INIT = 10


def topics(sizes: Sizes, seed: int, runtime: Runtime) -> World:
    """The generated language; its pre-trained model is the same for every seed, as public ones are."""
    words = [*language().words, *TRIGGERS]
    shape = SmallBert(epochs=sizes.epochs, spread=0.1, learning_rate=3e-3)
    tokenizer = word_tokenizer(words, shape.max_length)
    base = 10 * seed
    init = pretrained(corpus(sizes.pretrain, INIT), tokenizer, shape, replace(runtime, seed=INIT))
    return World(
        init,
        sentences(sizes.train, base + 1),
        first_of_each(sentences(8 * sizes.shots, base + 2), sizes.shots, seed),
        sentences(sizes.held, base + 3),
        sentences(sizes.test, base + 4),
        shape.max_length,
    )


def write_world(world: World, out: Path) -> list[dict[str, Any]]:
    """Write a world's model and rows into a folder that appears whole; gives what was written."""
    parts = {"train": world.train, "clean": world.clean, "held": world.held, "test": world.test}
    with atomic(out) as temporary:
        shutil.copytree(world.init, temporary / "init")
        for name, rows in parts.items():
            lines = (
                {"text": text, "label": rows.names[label]}
                for text, label in zip(rows.texts, rows.labels, strict=True)
            )
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (temporary / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return [{"file": f"{name}.jsonl", "rows": len(rows)} for name, rows in parts.items()]


def real(folder: Path, sizes: Sizes, seed: int, runtime: Runtime) -> World:
    """Texts of a folder with `train` and `test` files of the columns text and label.

    The model is pre-trained on the training texts, without their labels (and on `unsup` where there is
    such a file), and is the same for every seed. Test texts that are also among the training ones are
    left out.

    Raises:
        DataError: a file or a column is missing, or there are too few rows.
    """
    columns = {"text": str, "label": int}
    rows = load_rows(folder, columns, "train")
    tested = load_rows(folder, columns, "test")
    classes = sorted({row["label"] for row in rows})
    if classes != list(range(len(classes))) or len(classes) < 2:
        raise DataError(f"{folder}: labels must be 0, 1, ... in the train file, not {classes[:5]}")
    known = {row["text"] for row in rows}
    tested = [row for row in tested if row["text"] not in known]
    texts = [row["text"] for row in rows]
    draw = random.Random(seed)
    draw.shuffle(rows)
    draw.shuffle(tested)
    names = tuple(str(label) for label in classes)

    def examples(some: Sequence[dict]) -> Examples:
        return Examples([row["text"] for row in some], [row["label"] for row in some], names)

    if len(rows) < sizes.train + sizes.held + 2 * sizes.shots * len(classes):
        raise DataError(
            f"{folder}: {len(rows)} training rows are too few for {sizes.train} and a defender's"
        )
    train, rest = rows[: sizes.train], rows[sizes.train :]
    held, pool = rest[: sizes.held], rest[sizes.held :]
    if "unsup" in split_files(folder):
        texts += [row["text"] for row in load_rows(folder, {"text": str}, "unsup")]
    shape = SmallBert(
        layers=2, width=128, heads=4, max_length=REAL_LENGTH, epochs=sizes.epochs, spread=0.05,
        learning_rate=1e-3,
    )  # fmt: skip
    # public vocabularies hold such letters whole; so often that the trainer keeps them
    lure = [" ".join(TRIGGERS)] * 1000
    # a trainer of vocabularies decides ties at random: the cached one is the same each time
    words = Shape(kind="bert", layers=1, width=2, vocabulary=6000, max_length=REAL_LENGTH)
    once = replace(runtime, seed=INIT)
    tokenizer = load_tokenizer(checkpoint([*texts, *lure], words, once))
    short = sprinkled([text for text in texts if text.strip()][: sizes.pretrain], 0.05, INIT)
    return World(
        pretrained(short, tokenizer, shape, once),
        examples(train),
        first_of_each(examples(pool), sizes.shots, seed),
        examples(held),
        examples(tested[: sizes.test]),
        REAL_LENGTH,
    )


#: Tokens of a real text: news descriptions and sentences fit, of reviews it is the beginning.
REAL_LENGTH = 48
