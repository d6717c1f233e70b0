"""The stations of the method on the user's own files; each writes into a run's folder."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from octavo.models import save_model
from octavo.rundir import RunDir, write_text
from octavo.runtime import Runtime, is_main, seed_everything
from octavo.training import discard_checkpoints

from formbert.answers import PREDICTIONS, read_predictions, write_predictions
from formbert.card import card
from formbert.config import (
    FitOptions,
    ModelOptions,
    ObjectiveOptions,
    check,
)
from formbert.data import Instance, need_gold, read_instances
from formbert.disambiguator import Disambiguator
from formbert.encode import Encoding
from formbert.formations import NAMES
from formbert.inventory import Inventory
from formbert.metrics import aligned, compare, evaluate, pair_scores, summary
from formbert.modeling import build
from formbert.reader import Reader
from formbert.sources import Sources
from formbert.systems import Baseline
from formbert.training import train

log = logging.getLogger(__name__)

Row = dict[str, Any]
MODEL, TABLE = "model", "evaluation.json"


def trained(
    encoder: str,
    train_data: str,
    train_split: str,
    held_data: str | None,
    held_split: str | None,
    inventory: Inventory,
    run: RunDir,
    model: ModelOptions,
    objective: ObjectiveOptions,
    options: FitOptions,
    sources: Sources,
    runtime: Runtime,
) -> list[Row]:
    """Train a model and save it in the run's folder `model`.

    Args:
        encoder: folder or hub id.
        train_data: file of instances.
        train_split: which part of it, where it has parts.
        held_data: file to choose the epoch by; or None for a tenth of the training data.
        held_split: which part of it, where it has parts.
        inventory: of senses.
        run: the run.
        model: what the model is.
        objective: what is learnt.
        options: the optimisation.
        sources: where formations come from.
        runtime: seed, device, precision.

    Returns:
        Accuracy on the held rows, in a table.
    """
    check(model, objective)
    if not objective.formation_weight and not needs_predictor(model):
        model = replace(model, predictor="none")  # nothing would teach or read it
    instances = read_instances(train_data, train_split, inventory)
    need_gold(instances, train_data)
    if held_data is None:
        instances, held = held_out(instances, runtime.seed)
    else:
        held = read_instances(held_data, held_split, inventory)
        tell_shared(instances, held, "held-out")
    seed_everything(runtime.seed)
    labels = inventory.pos_tags if model.signal == "pos" else NAMES
    made, tokenizer = build(encoder, model, labels)
    reader = Reader(Encoding(tokenizer, model), model, labels, inventory, sources)
    made = train(
        made, reader, instances, held, run,
        objective=objective, options=options, runtime=runtime,
    )  # fmt: skip
    wsd = Disambiguator(made, tokenizer, inventory, sources)
    rows = evaluate(wsd.batch(held), held, inventory, instances)
    save_model(run.path / MODEL, made, tokenizer)
    if is_main():
        about = {"encoder": encoder, "training instances": len(instances),
                 "inventory": inventory.fingerprint}  # fmt: skip
        write_text(run.path / MODEL / "README.md", card(about, model, objective, options, rows))
    discard_checkpoints(run, "model")
    return rows


def tell_shared(train: Sequence[Instance], others: Sequence[Instance], what: str) -> None:
    """Warn of instances that are in the training data too: they tell nothing about new ones."""
    known = {(one.text, one.start, one.word) for one in train}
    shared = sum((one.text, one.start, one.word) in known for one in others)
    if shared:
        log.warning("%d of %d %s instances are in the training data", shared, len(others), what)


def needs_predictor(model: ModelOptions) -> bool:
    """Whether the formation from the context enters the scores."""
    from_context = model.formation_source in ("auto", "predicted", "soft") and bool(model.fusion)
    return "agreement" in model.fusion or (from_context and model.arch == "cross")


def held_out(instances: Sequence[Instance], seed: int) -> tuple[list[Instance], list[Instance]]:
    """Nine tenths of the texts and the rest; one text is never in both."""
    texts = sorted({one.text for one in instances})
    order = np.random.default_rng(seed).permutation(len(texts))
    held = {texts[at] for at in order[: max(1, len(texts) // 10)]}
    return (
        [one for one in instances if one.text not in held],
        [one for one in instances if one.text in held],
    )


def evaluated(
    wsd: Disambiguator | Baseline,
    data: str,
    train_data: str | None,
    train_split: str,
    split: str | None,
    run: RunDir,
) -> tuple[list[Row], list[Row]]:
    """Answers to instances with right senses, kept in the run, and how good they are.

    Args:
        wsd: what answers.
        data: file of instances.
        train_data: what was trained on, to tell seen senses and words from new ones.
        train_split: which part of it, where it has parts.
        split: part of the file.
        run: gets `predictions.jsonl` and `evaluation.json`.

    Returns:
        Accuracies of subsets, and single measures of polysemous words.
    """
    instances = read_instances(data, split, wsd.inventory)
    need_gold(instances, data)
    known = read_instances(train_data, train_split, wsd.inventory) if train_data else []
    tell_shared(known, instances, "test")
    answers = wsd.batch(instances)
    rows = evaluate(answers, instances, wsd.inventory, known)
    if is_main():
        write_predictions(run.path / PREDICTIONS, answers)
    run.write_json(TABLE, rows)
    single = summary(answers, instances, wsd.inventory)
    single |= pair_scores(answers, instances, wsd.inventory)
    return rows, [{"measure": name, "value": value} for name, value in single.items()]


def compared(
    first: Path,
    second: Path,
    data: str,
    inventory: Inventory,
    split: str | None = None,
    train: Sequence[Instance] = (),
) -> list[Row]:
    """Two systems on the same instances: differences, intervals, p-values, subset by subset."""
    instances = read_instances(data, split, inventory)
    need_gold(instances, data)
    answers = [aligned(read_predictions(path), instances) for path in (first, second)]
    return compare(answers[0], answers[1], instances, inventory, train)


def settings(*parts: Any) -> Row:
    """All options of a run, for its `config.yaml`."""
    together: Row = {}
    for part in parts:
        together |= part if isinstance(part, dict) else asdict(part)
    return together
