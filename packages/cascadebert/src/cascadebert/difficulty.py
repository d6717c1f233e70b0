"""How difficult each training row is: how often models that did not see it get it wrong.

The rows are cut into folds anew for every seed; a model trained on the other folds predicts each. A
file a fold and seed is written whole, so that a killed run goes on from there.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from octavo.errors import ConfigError, DataError
from octavo.rundir import RunDir, write_json, write_text
from octavo.runtime import Runtime, is_main
from octavo.training import Loss, TrainOptions, discard_checkpoints

from cascadebert.config import FitConfig, FoldConfig
from cascadebert.data import Examples
from cascadebert.finetune import fine_tune, refuse_other_rows
from cascadebert.stage import make_stage

log = logging.getLogger(__name__)

MERGED = "difficulty.jsonl"


def check_folds(config: FoldConfig, rows: int) -> None:
    """Refuse folds that cannot be.

    Raises:
        ConfigError: fewer than two, more than rows, or seeds missing or twice.
    """
    if not 2 <= config.folds <= rows:
        raise ConfigError(f"--folds {config.folds}: must be from 2 to the number of rows ({rows})")
    if not config.fold_seeds or len(set(config.fold_seeds)) != len(config.fold_seeds):
        raise ConfigError(f"--fold-seeds {config.fold_seeds}: give one or more, none twice")


def build_difficulty(
    source: str,
    examples: Examples,
    labels: Sequence[str],
    options: TrainOptions,
    config: FitConfig,
    folds: FoldConfig,
    run: RunDir,
    name: str,
    runtime: Runtime = Runtime(),
    *,
    loss: Loss | None = None,
    extras: Mapping[str, Sequence[Any]] | None = None,
) -> list[int]:
    """Train on all folds but one, predict that one, for every fold and seed; count the errors.

    Args:
        source: the model whose difficulty is measured, as in `fine_tune`.
        examples: labelled training rows.
        labels: all label names.
        options: the recipe, that of the model itself.
        config: lengths, smoothing and tokenizer.
        folds: their number, seeds and the rule.
        run: the folder; `<name>/seed-S-fold-F.json` that lie there are not computed again.
        name: of the folder in the run.
        runtime: device and precision; its seed is added to the folds' own.
        loss: the recipe's, without the regularization that the difficulty is for.
        extras: further columns that the loss takes.

    Returns:
        A level a row, larger is harder.
    """
    check_folds(folds, len(examples))
    refuse_other_rows(run, examples)
    folder = run.path / name
    if is_main():
        folder.mkdir(exist_ok=True)
    runtime.wait_for_everyone()
    wrong = np.zeros((len(folds.fold_seeds), len(examples)), dtype=bool)
    total = len(folds.fold_seeds) * folds.folds
    for row, seed in enumerate(folds.fold_seeds):
        order = np.random.default_rng(seed).permutation(len(examples))
        for number, held in enumerate(np.array_split(order, folds.folds)):
            file = folder / f"seed-{seed}-fold-{number}.json"
            training = f"{name}-seed-{seed}-fold-{number}"
            done = row * folds.folds + number + 1
            if file.exists():
                missed = _read(file)
            else:
                log.info("%s: fold %d of %d", name, done, total)
                rest = np.setdiff1d(order, held)
                part = {key: [values[i] for i in rest] for key, values in (extras or {}).items()}
                here = replace(runtime, seed=runtime.seed + 1000 * seed + number)
                model, tokenizer = fine_tune(
                    training, source, examples.at(rest.tolist()), labels, options, config, run,
                    here, loss=loss, extras=part,
                )  # fmt: skip
                stage = make_stage(training, model, tokenizer, labels, config.max_length, here)
                out = examples.at(held.tolist())
                given = stage.run(stage.encode(out), 8192).argmax(dim=-1).tolist()
                truth = [labels.index(label) for label in out.labels or []]
                missed = [
                    int(i) for i, a, b in zip(held, given, truth, strict=True) if a != b
                ]  # fmt: skip
                if is_main():
                    write_json(file, {"rows": len(examples), "wrong": sorted(missed)})
                discard_checkpoints(run, training)
                runtime.wait_for_everyone()
            wrong[row, missed] = True
    votes = wrong.sum(axis=0)
    levels = to_levels(votes, len(folds.fold_seeds), folds.rule)
    if is_main():
        rows = zip(votes.tolist(), levels, strict=True)
        lines = (json.dumps({"wrong_votes": v, "level": level}) + "\n" for v, level in rows)
        write_text(folder / MERGED, "".join(lines))
    if len(set(levels)) == 1:
        log.warning(
            "%s: all rows are equally difficult; the regularization has nothing to do", name
        )
    return levels


def to_levels(votes: Sequence[int] | np.ndarray, seeds: int, rule: str) -> list[int]:
    """Levels from the number of seeds whose model was wrong.

    Args:
        votes: a row each, from 0 to `seeds`.
        seeds: how many voted.
        rule: majority (1 if wrong in half of the seeds or more), any, all, or votes (the number
            itself, a level a vote).
    """
    counts = np.asarray(votes)
    if rule == "votes":
        return counts.tolist()
    least = {"majority": seeds / 2, "any": 1, "all": seeds}[rule]
    return (counts >= least).astype(int).tolist()


def load_difficulty(path: Path, rows: int) -> list[int]:
    """Levels that `build_difficulty` wrote, for so many training rows.

    Raises:
        DataError: the file is missing, broken or of another number of rows.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        levels = [int(json.loads(line)["level"]) for line in lines]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a difficulty file ({error})") from None
    if len(levels) != rows:
        raise DataError(f"{path}: holds {len(levels)} rows where the training data has {rows}")
    return levels


def _read(file: Path) -> list[int]:
    try:
        return [int(i) for i in json.loads(file.read_text(encoding="utf-8"))["wrong"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{file}: not a fold's result; remove it to compute it again") from None
