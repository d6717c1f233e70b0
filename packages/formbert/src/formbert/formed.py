"""How words are formed, for whoever asks for that alone; and what tells it, taught."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from octavo.console import Outcome
from octavo.data import iter_rows
from octavo.errors import ConfigError
from octavo.rundir import RunDir, refuse_existing, write_text
from octavo.runtime import Runtime
from octavo.stats import bootstrap_interval
from octavo.training import discard_checkpoints

from formbert.formation import FormationPredictor, train_predictor
from formbert.inventory import Inventory, Sense
from formbert.stations import MODEL, TABLE

Row = dict[str, Any]


def formed(
    words: Sequence[str],
    model: str | None,
    file: Path | None,
    inventory: str | None,
    top_k: int,
    out: Path | None,
    overwrite: bool,
) -> Outcome:
    """How words are formed; those given, or a file's.

    Raises:
        ConfigError: neither a model nor an inventory is given, or no word, or nothing is to be told.
    """
    if top_k < 1:
        raise ConfigError(f"--top-k {top_k}: must be 1 or more")
    if model is None and inventory is None:
        raise ConfigError("--model or --inventory: name what knows formations")
    if out is not None:
        refuse_existing(out, overwrite)
    columns = {"word": str, "gloss": str | None, "pos": str | None}
    rows: list[Row] = list(iter_rows(file, columns)) if file else []
    rows += [{"word": word, "gloss": None, "pos": None} for word in words]
    if not rows:
        raise ConfigError("no word is given; name words, or a --file of them")
    lexicon = Inventory.load(inventory).formation_lexicon() if inventory else {}
    if model is not None:
        predictor = FormationPredictor.from_pretrained(model)
        predictor.lexicon |= {word: dict(shares) for word, shares in lexicon.items()}
        told = predictor.predict(
            [row["word"] for row in rows],
            glosses=[row["gloss"] or "" for row in rows],
            pos=[row["pos"] or "" for row in rows],
            top_k=top_k,
        )
        found = [(one.word, list(one.ranked), one.source) for one in told]
    else:
        found = [
            (row["word"], sorted(lexicon.get(row["word"], {}).items(), key=lambda one: -one[1]),
             "lexicon" if row["word"] in lexicon else "unknown")
            for row in rows
        ]  # fmt: skip
    table = []
    for word, formations, source in found:
        row: Row = {"word": word, "source": source}
        for rank, (formation, share) in enumerate(formations[:top_k], 1):
            row |= {f"formation {rank}": formation.zh, f"in English {rank}": formation.en,
                    f"probability {rank}": share}  # fmt: skip
        table.append(row)
    if out is None:
        return Outcome({"Formations": table})
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table))
    return Outcome(note=f"{len(table)} words: {out}")


def train_formation(
    train_data: str, out: Path | None, overwrite: bool, runtime: Runtime
) -> Outcome:
    """Train a formation predictor on an inventory's annotations; it lies in OUT/model.

    A tenth of the words is held out to tell its accuracy on words it has not seen; the model that is
    saved has learnt from the rest.
    """
    if out is None:
        raise ConfigError("--out: name the folder of the predictor")
    inventory = Inventory.load(train_data)
    senses = [sense for sense in inventory.senses if sense.formation is not None]
    words = sorted({sense.word for sense in senses})
    order = np.random.default_rng(runtime.seed).permutation(len(words))
    held = {words[at] for at in order[: max(1, len(words) // 10)]}
    known = [sense for sense in senses if sense.word not in held]
    judged = [sense for sense in senses if sense.word in held]
    options = {"train-data": train_data, "seed": runtime.seed}
    with RunDir.open(out, options, overwrite) as run:
        predictor = train_predictor(known, run, runtime=runtime)
        predictor.lexicon = {}  # no held-out word is looked up, and none is told
        rows = formation_accuracy(predictor, judged)
        predictor.lexicon = {
            word: dict(shares) for word, shares in inventory.formation_lexicon().items()
        }
        predictor.save_pretrained(run.path / MODEL)
        run.write_json(TABLE, rows)
        discard_checkpoints(run, "formation")
    return Outcome({f"{len(held)} words held out": rows}, note=f"Predictor: {out / MODEL}")


def formation_accuracy(predictor: FormationPredictor, senses: Sequence[Sense]) -> list[Row]:
    """How often the likeliest formation is the annotated one, by what is told beside the word."""
    words = [sense.word for sense in senses]
    right = np.array([sense.formation for sense in senses])
    glosses, pos = [sense.gloss for sense in senses], [sense.pos for sense in senses]
    rows = []
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("the word", {}), ("and its gloss", {"glosses": glosses}),
        ("and its part of speech", {"pos": pos}), ("and both", {"glosses": glosses, "pos": pos}),
    )  # fmt: skip
    for name, told in ways:
        best = predictor.probabilities(words, **told).argmax(1)
        low, high = bootstrap_interval(best == right)
        rows.append({"told": name, "n": len(words), "accuracy, %": 100 * float((best == right).mean()),
                     "low": 100 * low, "high": 100 * high})  # fmt: skip
    return rows
