"""A small world of the generated language and a suspect in it, shared by the tests of commands."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from finepurify.cli import app
from finepurify.data import Examples
from finepurify.language import TRIGGERS, corpus, language, sentences
from finepurify.pretrain import SmallBert, pretrained, word_tokenizer
from octavo.cli import run
from octavo.runtime import Runtime


def write(file: Path, examples: Examples) -> Path:
    """A jsonl file of texts, or pairs of them, with their classes' names."""
    seconds = examples.pairs or [None] * len(examples)
    rows = [
        {"text": text, "label": examples.names[label], "second": second}
        for text, label, second in zip(examples.texts, examples.labels, seconds, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, Examples], Path]:
    """The function of that name."""
    return write


@pytest.fixture(scope="session")
def quick():
    """Each of many short trainings collects garbage, which would take most of its time."""
    from transformers import Trainer

    assert Trainer  # what it imports is left alone, too
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def world(tmp_path_factory, quick):
    """Folders INIT and SUSPECT (a backdoor on `cf`, class 1), and files of rows."""
    place = tmp_path_factory.mktemp("world")
    shape = SmallBert(layers=1, width=32, epochs=2, spread=0.1, learning_rate=3e-3)
    tokenizer = word_tokenizer([*language().words, *TRIGGERS], shape.max_length)
    init = pretrained(corpus(600, 10), tokenizer, shape, Runtime(device="cpu"))
    files = {
        name: write(place / f"{name}.jsonl", sentences(count, seed))
        for name, count, seed in (
            ("train", 1200, 1), ("clean", 24, 2), ("held", 80, 3), ("test", 100, 4)
        )
    }  # fmt: skip
    words = ["attack", init, "--train-data", files["train"], "--out", place / "attacked",
             "--learning-rate", "1e-2", "--epochs", 4, "--device", "cpu", "--quiet"]  # fmt: skip
    assert run(app, [str(word) for word in words]) == 0
    return SimpleNamespace(place=place, init=init, suspect=place / "attacked" / "model", **files)
