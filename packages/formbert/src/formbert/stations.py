"""The stations of the method on the user's own files; each writes into a run's folder, or a file."""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from octavo.console import counter
from octavo.errors import ConfigError, DataError
from octavo.models import save_model
from octavo.rundir import RunDir, refuse_existing, write_text
from octavo.runtime import Runtime, is_main, seed_everything
from octavo.training import discard_checkpoints

from formbert.card import card
from formbert.config import (
    AnswerOptions,
    FitOptions,
    ModelOptions,
    ObjectiveOptions,
    SystemOptions,
    check,
)
from formbert.data import Instance, locate, need_gold, read_instances
from formbert.disambiguator import Disambiguator, Question, Second, choose_margin
from formbert.encode import Encoding
from formbert.formation import FormationPredictor
from formbert.formations import NAMES
from formbert.inventory import Inventory
from formbert.metrics import compare, evaluate
from formbert.modeling import build
from formbert.predictions import Prediction
from formbert.reader import Reader
from formbert.sources import Sources, read_lexicon
from formbert.tagger import Segmenter, Tagger
from formbert.training import train

log = logging.getLogger(__name__)

Row = dict[str, Any]
MODEL, PREDICTIONS, TABLE = "model", "predictions.jsonl", "evaluation.json"


def sources_of(lexicon: str | None, predictor: str | None) -> Sources:
    """What is known of formations beside an inventory."""
    return Sources(
        read_lexicon(lexicon) if lexicon else {},
        FormationPredictor.from_pretrained(predictor) if predictor else None,
    )


def trained(
    encoder: str,
    train_data: str,
    held_data: str | None,
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
        train_data: file of instances; rows of the part `train` where it has parts.
        held_data: file to choose the epoch by; or None for a tenth of the training data.
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
    instances = read_instances(train_data, "train" if held_data is None else None, inventory)
    need_gold(instances, train_data)
    if held_data is None:
        instances, held = held_out(instances, runtime.seed)
    else:
        held = read_instances(held_data, inventory=inventory)
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


def system(
    model: str, options: SystemOptions, answer: AnswerOptions, runtime: Runtime
) -> Disambiguator:
    """A disambiguator as the options describe it.

    Raises:
        ConfigError: the margin is out of range.
    """
    if not 0 <= options.margin <= 1:
        raise ConfigError(f"--margin {options.margin}: must be from 0 to 1")
    inventory = Inventory.load(options.inventory)
    sources = sources_of(options.formation_lexicon, options.formation_predictor)
    common = {"sources": sources, "options": answer, "runtime": runtime}
    second = None
    if options.second:
        slow = Disambiguator.from_pretrained(options.second, inventory, **common)
        second = Second(slow, options.margin)
    return Disambiguator.from_pretrained(
        model,
        inventory,
        formation=options.formation_source,
        cache=Path(options.cache) if options.cache else None,
        second=second,
        **common,
    )


def evaluated(
    wsd: Disambiguator, data: str, train_data: str | None, split: str | None, run: RunDir
) -> list[Row]:
    """Answers to instances with right senses, kept in the run, and how good they are.

    Args:
        wsd: what answers.
        data: file of instances.
        train_data: what was trained on, to tell seen senses and words from new ones.
        split: part of the file.
        run: gets `predictions.jsonl` and `evaluation.json`.
    """
    instances = read_instances(data, split, wsd.inventory)
    need_gold(instances, data)
    known = read_instances(train_data, None, wsd.inventory) if train_data else ()
    answers = wsd.batch(instances)
    rows = evaluate(answers, instances, wsd.inventory, known)
    write_predictions(run.path / PREDICTIONS, answers)
    run.write_json(TABLE, rows)
    return rows


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


def compared(first: Path, second: Path, data: str, inventory: Inventory) -> list[Row]:
    """Two systems on the same instances: differences, intervals, p-values, subset by subset."""
    instances = read_instances(data, None, inventory)
    answers = []
    for path in (first, second):
        by_key = {one.key: one for one in read_predictions(path)}
        if lacking := [one.key for one in instances if one.key not in by_key]:
            raise DataError(
                f"{path}: has no answer for {len(lacking)} instances, the first is {lacking[0]!r}"
            )
        answers.append([by_key[one.key] for one in instances])
    return compare(answers[0], answers[1], instances, inventory)


def questions_of(source: str) -> Iterator[Question]:
    """Instances of a file; or of lines `text<TAB>word[:start]`, or marked texts, from - or a .txt.

    Raises:
        DataError: a line is wrong; the message names it.
    """
    if source != "-" and not source.endswith(".txt"):
        yield from read_instances(source)
        return
    file = sys.stdin if source == "-" else _opened(source)
    with file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\r\n")
            if not line.strip():
                continue
            text, _, asked = line.partition("\t")
            word, _, start = asked.partition(":")
            try:
                place = int(start) if start else None
                yield replace(locate(text, word or None, place), key=str(number))
            except (DataError, ValueError) as error:
                raise DataError(f"{source}, line {number}: {error}") from None


def _opened(source: str) -> TextIO:
    try:
        return open(source, encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{source}: {error.strerror}") from None


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


def done(out: Path) -> int:
    """Rows that a stopped run left in a file; a line cut off in the writing is taken away."""
    if not out.exists():
        return 0
    with out.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return content[:whole].count(b"\n")


def predicted(
    wsd: Disambiguator, source: str, out: Path, resume: bool, overwrite: bool, chunk: int = 2048
) -> int:
    """Answers to a file's questions into a file; returns how many were added."""
    questions = islice(questions_of(source), done(out) if resume else 0, None)
    rows = (answer.row() for answer in wsd.stream(questions, chunk))
    return answered(rows, out, resume, overwrite, chunk, "answering")


def tagged(
    wsd: Disambiguator,
    source: str,
    segmenter: Segmenter,
    out: Path,
    resume: bool,
    overwrite: bool,
    chunk: int = 256,
) -> int:
    """Words and senses of a file's lines into a file, a line a line; returns how many were added."""
    tagger = Tagger(wsd, segmenter)
    skip = done(out) if resume else 0

    def rows() -> Iterator[Row]:
        with _opened(source) as file:
            lines = islice((line.rstrip("\r\n") for line in file), skip, None)
            while some := list(islice(lines, chunk)):
                for text, tokens in zip(some, tagger.tag_many(some), strict=True):
                    yield {"text": text, "tokens": [token.row() for token in tokens]}

    return answered(rows(), out, resume, overwrite, chunk, "tagging")


def margin_for(
    fast: str, slow: str, options: SystemOptions, data: str, answer: AnswerOptions, runtime: Runtime
) -> float:
    """The margin at which asking a second model where the first is unsure costs almost nothing."""
    inventory = Inventory.load(options.inventory)
    instances = read_instances(data, None, inventory)
    need_gold(instances, data)
    sources = sources_of(options.formation_lexicon, options.formation_predictor)
    answers = [
        Disambiguator.from_pretrained(
            name, inventory, sources=sources, options=answer, runtime=runtime
        ).batch(instances)
        for name in (fast, slow)
    ]
    return choose_margin(answers[0], answers[1], instances)


def settings(*parts: Any) -> Row:
    """All options of a run, for its `config.yaml`."""
    together: Row = {}
    for part in parts:
        together |= part if isinstance(part, dict) else asdict(part)
    return together
