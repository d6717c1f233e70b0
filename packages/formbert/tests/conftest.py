"""A small encoder, a model of each kind that was barely taught, and files of the bundled lexicon."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from formbert.config import FitOptions, ModelOptions, ObjectiveOptions
from formbert.data import write_instances
from formbert.encode import Encoding
from formbert.formations import NAMES
from formbert.inventory import Inventory
from formbert.lexicon import mini_instances, mini_inventory
from formbert.modeling import build
from formbert.reader import Reader
from formbert.sources import Sources
from formbert.training import train
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.tiny import Shape, checkpoint

CPU = Runtime(device="cpu")
SHAPE = Shape(kind="bert", layers=2, width=32, alphabet="char", max_length=64)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A character BERT of two layers with random weights."""
    inventory, parts = mini_inventory(), mini_instances()
    texts = [one.text for rows in parts.values() for one in rows]
    glosses = [f"{one.word}：{one.pos}，{one.gloss}" for one in inventory.senses]
    return checkpoint([*texts, *glosses, '#："“”'], SHAPE, CPU)


@pytest.fixture(scope="session")
def make(encoder) -> Callable[..., Any]:
    """Make a model with random weights, and what reads for it."""

    def made(
        *, inventory: Inventory | None = None, sources: Sources = Sources(), seed: int = 0,
        spread: float = 1.0, **options: Any,
    ) -> SimpleNamespace:  # fmt: skip
        settings = ModelOptions(**{"max_length": 64, **options})
        inventory = inventory or mini_inventory()
        labels = inventory.pos_tags if settings.signal == "pos" else NAMES
        torch.manual_seed(seed)
        model, tokenizer = build(encoder, settings, labels)
        for name, weight in model.named_parameters():  # far from zero, so that every part shows
            if name.startswith(("formation", "classifier", "fusion")) and weight.ndim > 1:
                torch.nn.init.normal_(weight, std=spread * 0.3)
        encoding = Encoding(tokenizer, settings)
        reader = Reader(encoding, settings, labels, inventory, sources)
        return SimpleNamespace(
            model=model.eval(), tokenizer=tokenizer, reader=reader, encoding=encoding
        )

    return made


@pytest.fixture(scope="session")
def taught(tmp_path_factory, make) -> dict[str, Path]:
    """Folders of a cross-encoder and a bi-encoder that had two epochs."""
    gc.freeze()
    place = tmp_path_factory.mktemp("taught")
    parts = mini_instances()
    folders = {}
    for arch in ("cross", "bi"):
        made = make(arch=arch, formation_source="auto", spread=0.1)
        options = FitOptions(learning_rate=2e-3, formation_learning_rate=4e-3, epochs=2)
        with RunDir.open(place / arch, {}) as run:
            train(
                made.model, made.reader, parts["train"][::3], parts["dev"], run,
                objective=ObjectiveOptions(), options=options, runtime=CPU,
            )  # fmt: skip
            save_model(run.path / "model", made.model, made.tokenizer)
        folders[arch] = place / arch / "model"
    gc.unfreeze()
    return folders


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> SimpleNamespace:
    """The bundled lexicon as files: `senses`, `train`, `dev`, `test` (a third of the new words')."""
    place = tmp_path_factory.mktemp("files")
    parts = mini_instances()
    mini_inventory().save(place / "senses.jsonl")
    rows = {
        "train": parts["train"][::6],
        "dev": parts["dev"][::3],
        "test": parts["test_words"][::3],
    }
    for name, some in rows.items():
        write_instances(place / f"{name}.jsonl", [replace(one, split="") for one in some])
    return SimpleNamespace(
        senses=place / "senses.jsonl",
        **{name: place / f"{name}.jsonl" for name in rows},
    )
