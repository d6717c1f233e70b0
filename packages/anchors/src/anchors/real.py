"""The demo on real rows: the paper's analyses and compression on each set of a folder."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from octavo.console import Outcome
from octavo.errors import DataError
from octavo.report import Claim, Report, save_claims
from octavo.rundir import RunDir, options_of
from octavo.runtime import Runtime
from octavo.tiny import Shape, checkpoint

from anchors.analyses import known
from anchors.comparisons import accuracy_rows, compress_rows
from anchors.config import TASKS, PromptOptions
from anchors.data import load_examples
from anchors.demo import FIGURES, Margins, analyse, behind, compression_claim, flow_claims, means
from anchors.session import Session, ready

#: Texts of a set that are labelled, and of each class that random anchors are chosen on.
SAMPLES, CHOOSE_ON = {"quick": 60, "full": 500}, 4

#: The stand-in where no model is named, and how many rows it is pre-trained on.
STAND_IN = Shape(
    kind="llama",
    layers=2,
    width=64,
    alphabet="bpe",
    vocabulary=4000,
    max_length=1024,
    pretrain_epochs=1,
)
ROWS = 1500


@dataclass(frozen=True)
class RealSet:
    """Files of one task."""

    task: str
    train: Path
    test: Path


def find_sets(folder: Path) -> list[RealSet]:
    """The sets of a folder, by file names like `sst2_train.tsv.gz` and `sst2_validation.tsv.gz`.

    Raises:
        DataError: there is none.
    """
    files = sorted(folder.glob("*")) if folder.is_dir() else []

    def find(task: str, splits: str) -> Path | None:
        kinds = r"(csv|tsv|jsonl|json|parquet)(\.gz|\.xz)?"
        pattern = re.compile(rf"{task}[_-]({splits})[^.]*\.{kinds}")
        return next((file for file in files if pattern.fullmatch(file.name)), None)

    found = []
    for task in TASKS:
        train, test = find(task, "train"), find(task, "test|validation|dev")
        if train and test:
            found.append(RealSet(task, train, test))
    if not found:
        raise DataError(
            f"{folder}: holds no files like sst2_train.tsv and sst2_test.tsv (tasks "
            f"{', '.join(TASKS)}; columns text and label)"
        )
    return found


def run_real(
    folder: Path, model: str | None, profile: str, seeds: Sequence[int], out: Path,
    overwrite: bool = False, runtime: Runtime = Runtime(),
) -> Outcome:  # fmt: skip
    """Analyse a model on every set of a folder; claims are judged on means over sets and seeds.

    Args:
        folder: of the sets.
        model: folder or hub id; without one a small decoder is pre-trained on the rows, which shows that
            everything runs and does not learn in context.
        profile: quick or full, how many texts.
        seeds: of demonstrations and texts.
        out: folder of the report.
        overwrite: start anew where a demo already lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.

    Raises:
        OctavoError: the folder holds no set, or something of it or of the model is wrong.
    """
    begin = time.perf_counter()
    sets = find_sets(folder)
    given = {"data": str(folder), "model": model, "profile": profile, "seeds": list(seeds)}
    with RunDir.open(out, options_of(given), overwrite) as run:
        source = model or str(_stand_in(sets, runtime))
        report = Report("Label words are anchors: real texts")
        numbers = []
        tables: list[tuple[str, dict[str, Any]]] = []
        for seed in seeds:
            for one in sets:
                found, shown = _measured(run, source, one, profile, replace(runtime, seed=seed))
                numbers.append(found)
                tables.append((f"{one.task}, seed {seed}", shown))
        claims = judge(numbers)
        report.text(
            f"Model {model or 'a small decoder pre-trained on these rows'}, texts of {folder.name}."
        )
        report.claims(claims)
        for name, shown in tables:
            report.heading(name)
            for caption, rows in shown.items():
                report.table(caption, rows)
            for figure, table in FIGURES:
                report.figure(f"{table}, {name}", figure(shown[table]))
        page, seconds = report.save(out), time.perf_counter() - begin
        save_claims(claims, seconds, out)
    failed = [claim.claim for claim in claims if claim.passed is False]
    return Outcome(
        {f"Claims, {len(sets)} sets": [claim.row() for claim in claims]},
        note=f"To read: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


def judge(found: Sequence[dict[str, float]], margins: Margins = Margins()) -> list[Claim]:
    """The claims that real rows can show, on the means over sets and seeds."""
    mean = means(found)
    gate = Claim(
        "The model learns in context",
        f"accuracy {mean['accuracy']:.3f}; the most frequent class alone {mean['majority']:.3f}",
        "above it by two standard errors or more, as a mean over sets",
        mean["accuracy"] > mean["majority"] + 2 * mean["error"],
    )
    return behind(gate, [*flow_claims(mean, margins), compression_claim(mean, margins)])


def _measured(
    run: RunDir, source: str, one: RealSet, profile: str, runtime: Runtime
) -> tuple[dict[str, float], dict[str, Any]]:
    """The numbers claims are about, and the tables, of one set: of a stopped run, or measured now."""
    file = f"{one.task}-{runtime.seed}.json"
    if not (run.path / file).is_file():
        options = PromptOptions(
            data=str(one.test), train_data=str(one.train), task=one.task, samples=SAMPLES[profile]
        )
        with ready("demo", source, options, runtime, {}) as session:
            numbers, tables = _measure(session, runtime.seed)
        known_numbers = {name: known(value) for name, value in numbers.items()}
        run.write_json(file, {"numbers": known_numbers, "tables": tables})
    content = json.loads((run.path / file).read_text(encoding="utf-8"))
    numbers = {
        name: np.nan if value is None else value for name, value in content["numbers"].items()
    }
    return numbers, content["tables"]


def _measure(session: Session, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    predictions, labels = session.vanilla(), session.labels
    right = predictions.classes == np.asarray(labels)
    numbers = {
        "accuracy": float(right.mean()),
        "majority": float(np.bincount(labels).max() / len(labels)),
        "error": float(np.sqrt(right.var() / len(right))),
    }
    size = session.options.batch_size
    tables: dict[str, Any] = {
        "Accuracy": accuracy_rows(session.rivals(predictions, 0), labels),
        **analyse(session.model, session.prompts, labels, seed, numbers, size),
    }
    held = session.prompts_of(session.drawn, session.drawn.examples(CHOOSE_ON, seed))
    tables["Compression"], _ = compress_rows(
        session.model, session.prompts, labels, held, seed=seed, batch_size=size
    )
    loyal = {
        f"loyalty {row['kept']}": row["label loyalty"]
        for row in tables["Compression"] if "label loyalty" in row
    }  # fmt: skip
    return numbers | loyal, tables


def _stand_in(sets: Sequence[RealSet], runtime: Runtime) -> Path:
    """A small decoder that knows the sets' templates and words."""
    texts = []
    for one in sets:
        task = TASKS[one.task]
        rows = load_examples(str(one.train), task)
        lines = [task.template.format(text=row.text, label=task.labels[row.label]) for row in rows]
        texts += ["\n".join(lines[n : n + 4]) for n in range(0, min(len(lines), ROWS), 4)]
    return checkpoint(texts, STAND_IN, runtime)
