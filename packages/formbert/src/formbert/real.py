"""The demo on real texts: MiCLS, in the shape that `formbert data import micls` gives it."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from octavo.console import Outcome
from octavo.errors import DataError
from octavo.report import Claim, Report, save_claims
from octavo.rundir import RunDir, options_of
from octavo.runtime import Runtime
from octavo.tiny import Shape

from formbert.baselines import BASELINES, ORACLES
from formbert.config import FitOptions
from formbert.data import need_gold, read_instances
from formbert.experiment import (
    ADDED,
    GLOSS_ONLY,
    INTERACTING,
    PARTS_OF_SPEECH,
    TAUGHT_ALONG,
    World,
    run_system,
)
from formbert.figures import accuracy_figure
from formbert.inventory import Inventory
from formbert.metrics import compare, evaluate
from formbert.predictions import Prediction
from formbert.stations import held_out

Row = dict[str, Any]
SYSTEMS = (GLOSS_ONLY, TAUGHT_ALONG, ADDED, INTERACTING, PARTS_OF_SPEECH)
COLUMNS = (
    "all", "polysemous", "formation-differs", "formation-same", "formation-differs, POS-same",
    "gold=first", "gold=other", "sense-seen", "sense-new", "word-new",
)  # fmt: skip
PART = "test"


@dataclass(frozen=True)
class Size:
    """How large the encoder is, and how long it learns."""

    shape: Shape
    epochs: float


#: Encoders are pre-trained on the training texts and all glosses first.
SIZES = {
    "quick": Size(Shape(kind="bert", layers=2, width=128, alphabet="char", max_length=96,
                        pretrain_epochs=10), 4),
    "full": Size(Shape(kind="bert", layers=4, width=192, alphabet="char", max_length=128,
                       pretrain_epochs=10), 4),
}  # fmt: skip


@dataclass(frozen=True)
class Margins:
    """What a claim must reach on real texts, in percentage points of polysemous words.

    Attributes:
        first: of the plain cross-encoder above the first sense.
        gain: of interacting formations over the plain one where formations differ.
        same_pos: the same where the parts of speech are one, over the plain one and over parts of
            speech; twice the standard error of a difference there is about 7.
    """

    first: float = 2.0
    gain: float = 6.0
    same_pos: float = 7.0


def world_of(folder: Path, size: Size, seed: int) -> World:
    """MiCLS: its part `val` is learnt from (less a tenth of its texts), its part `test` judged on.

    Raises:
        DataError: the folder lacks a file or a part.
    """
    senses = _file(folder, "inventory.jsonl")
    texts = _file(folder, "instances.jsonl")
    inventory = Inventory.load(senses)
    taught, held = held_out(read_instances(texts, "val", inventory), seed)
    judged = read_instances(texts, "test", inventory)
    need_gold(taught, str(texts))
    need_gold(judged, str(texts))
    known = {one.text for one in judged}  # some texts are in both parts
    taught = [one for one in taught if one.text not in known]
    held = [one for one in held if one.text not in known]
    fit = FitOptions(
        learning_rate=5e-4,
        formation_learning_rate=2e-3,
        batch_size=32,
        epochs=size.epochs,
        warmup=0.1,
    )
    return World(inventory, taught, held, {PART: judged}, size.shape, fit)


def _file(folder: Path, name: str) -> Path:
    for end in ("", ".gz"):
        if (folder / f"{name}{end}").is_file():
            return folder / f"{name}{end}"
    if (folder / "micls").is_dir():
        return _file(folder / "micls", name)
    raise DataError(
        f"{folder}: holds no {name}; `formbert data import micls FOLDER --out OUT` makes it"
    )


def run_real(
    data: Path,
    profile: str,
    seeds: Sequence[int],
    out: Path,
    overwrite: bool = False,
    runtime: Runtime = Runtime(),
) -> Outcome:
    """Teach, answer and judge on real texts, once a seed.

    Args:
        data: folder with `inventory.jsonl` and `instances.jsonl` (or .gz).
        profile: quick or full, the encoder's size.
        seeds: of weights and batches.
        out: folder of the runs and the report.
        overwrite: start anew where one lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.

    Raises:
        DataError: a file is missing or wrong.
    """
    begin = time.perf_counter()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    options = options_of({"profile": profile, "seeds": list(seeds), "data": str(data)})
    with RunDir.open(out, options, overwrite) as run:
        found = [of_seed(data, profile, run, replace(runtime, seed=seed)) for seed in seeds]
        table = _mean([one["table"] for one in found], "system")
        claims = judge(table)
        seconds = time.perf_counter() - begin
        report = Report("FormBERT on MiCLS")
        report.text(
            f"Profile {profile}, seeds {', '.join(map(str, seeds))}, Python "
            f"{platform.python_version()}, PyTorch {version('torch')}. Small encoders, pre-trained "
            "on the training texts and the glosses, taught on the part val, judged on the part test; "
            "texts of both are left out of the teaching. Annotated formations are each candidate's own, "
            "of the inventory."
        )
        report.claims(claims)
        report.table("Accuracy, %", table)
        report.figure("Where formations differ", accuracy_figure(table, "formation-differs"))
        for seed, one in zip(seeds, found, strict=True):
            report.heading(f"Seed {seed}: against gloss only, points")
            for name, rows in one["differences"].items():
                report.table(name, rows)
        page = report.save(out)
        save_claims(claims, seconds, out)
    failed = [claim for claim in claims if claim.passed is False]
    return Outcome(
        {"Accuracy, %": table, "Claims": [claim.row() for claim in claims]},
        note=f"Report: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


def of_seed(data: Path, profile: str, run: RunDir, runtime: Runtime) -> dict[str, Any]:
    """All that one seed gave, kept in a file."""
    file = run.path / f"seed-{runtime.seed}.json"
    if not file.is_file():
        world = world_of(data, SIZES[profile], runtime.seed)
        rules = {
            "first sense": BASELINES["first-sense"], "most frequent in training": BASELINES["train-mfs"],
            "Lesk, TF-IDF": BASELINES["lesk-tfidf"], "formation oracle": ORACLES["formation-oracle"],
            "part-of-speech oracle": ORACLES["pos-oracle"],
        }  # fmt: skip
        test = world.tests[PART]
        answers: dict[str, Sequence[Prediction]] = {
            name: rule(test, world.inventory, world.train) for name, rule in rules.items()
        }
        for system in SYSTEMS:
            answers |= {
                name: parts[PART] for name, parts in run_system(system, world, run, runtime).items()
            }
        table = [_row(name, told, world) for name, told in answers.items()]
        plain = answers[GLOSS_ONLY.name]
        shown = [name for name in answers if name not in rules and name != GLOSS_ONLY.name]
        run.write_json(file.name, {
            "table": table,
            "differences": {
                name: [row for row in compare(plain, answers[name], test, world.inventory, world.train)
                       if row["subset"] in COLUMNS]
                for name in shown
            },
        })  # fmt: skip
    return json.loads(file.read_text(encoding="utf-8"))


def _row(name: str, told: Sequence[Prediction], world: World) -> Row:
    rows = evaluate(told, world.tests[PART], world.inventory, world.train)
    by = {row["subset"]: row["accuracy"] for row in rows}
    return {"system": name} | {column: by[column] for column in COLUMNS if column in by}


def _mean(tables: Sequence[Sequence[Row]], name: str) -> list[Row]:
    return [
        {column: value if column == name else float(np.mean([row[column] for row in rows]))
         for column, value in rows[0].items()}
        for rows in zip(*tables, strict=True)
    ]  # fmt: skip


def judge(table: Sequence[Mapping[str, Any]], margins: Margins = Margins()) -> list[Claim]:
    """The claims on real texts, on means over seeds."""
    by = {row["system"]: row for row in table}
    plain, first = by[GLOSS_ONLY.name], by["first sense"]
    annotated, pos = by[INTERACTING.name], by[PARTS_OF_SPEECH.name]
    gain = annotated["formation-differs"] - plain["formation-differs"]
    added = by[ADDED.name]["formation-differs"] - plain["formation-differs"]
    here = "formation-differs, POS-same"
    alone = annotated[here] - plain[here]
    return [
        Claim(
            "A small encoder beats the first sense on polysemous words",
            f"{annotated['polysemous']:.1f} % with annotated formations against "
            f"{first['polysemous']:.1f} ({plain['polysemous']:.1f} from glosses alone)",
            f"at least {margins.first:+g}",
            annotated["polysemous"] >= first["polysemous"] + margins.first,
        ),
        Claim(
            "Interacting formations help where they differ",
            f"{annotated['formation-differs']:.1f} % against {plain['formation-differs']:.1f} "
            f"({gain:+.1f}); parts of speech instead {pos['formation-differs']:.1f}; added "
            f"{added:+.1f}",
            f"at least {margins.gain:+g}",
            gain >= margins.gain,
        ),
        Claim(
            "They help where parts of speech cannot: formations differ, parts of speech do not",
            f"{annotated[here]:.1f} % against {plain[here]:.1f} ({alone:+.1f}; parts of speech "
            f"instead {pos[here]:.1f})",
            f"at least {margins.same_pos:+g} over gloss only and over parts of speech",
            alone >= margins.same_pos and annotated[here] - pos[here] >= margins.same_pos,
        ),
    ]
