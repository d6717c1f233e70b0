"""One seed of the embedded experiment: train the cascade and its rivals, and have them measured.

Whatever has been trained lies in the seed's folder and is not trained again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from octavo.models import save_model
from octavo.rundir import RunDir, is_finished, options_of
from octavo.runtime import Runtime
from octavo.training import TrainOptions, discard_checkpoints

from cascadebert.cascade import Cascade
from cascadebert.config import BaselineConfig, FoldConfig, TrainConfig
from cascadebert.data import Examples
from cascadebert.difficulty import build_difficulty
from cascadebert.early_exit import EarlyExit
from cascadebert.exits import first_layers
from cascadebert.finetune import fine_tune
from cascadebert.measure import Found, Measured, Split
from cascadebert.rivals import train_exits, train_rival
from cascadebert.stage import Stage, load_stage
from cascadebert.train import stage_loss, train_cascade

LARGE, SMALL = "scratch:6x64", "scratch:2x32"


@dataclass(frozen=True)
class Profile:
    """Sizes of an experiment: words, models and their training."""

    train: int
    dev: int
    test: int
    batch_size: int = 128
    models: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: {SMALL: (4e-3, 7.0), LARGE: (2e-3, 5.0)}
    )
    """Complete models by size, each with its learning rate and epochs; the last is the large one."""

    joint: tuple[float, float] | None = None
    """Learning rate and epochs of the joint multi-exit model."""

    exit_epochs: float = 20.0
    """Passes over the words in which DeeBERT's exits are trained."""

    first_layers: tuple[int, ...] = ()
    """BERT-kL: first k layers of the large model, fine-tuned further."""

    regularized: int = 0
    """Words of the small-data regime that difficulty-aware regularization is shown in; 0 for none."""

    regularized_epochs: float = 25.0
    """Passes over these."""

    folds: FoldConfig = field(default_factory=FoldConfig)
    """How their difficulty is measured."""

    resplits: int = 200
    """New splits of calibration and test words on which guarantees are tried."""

    targets: tuple[float, ...] = (2.0, 3.0, 4.0, 6.0)
    """Speed-ups at which methods are compared."""


def run_seed(
    profile: Profile, words: Examples, seed: int, run: RunDir, runtime: Runtime = Runtime()
) -> Found:
    """Train and measure everything of one seed.

    Args:
        profile: sizes.
        words: enough of them for all splits, in the order in which they are dealt out.
        seed: of models, training and splits.
        run: the experiment's folder; this seed has one in it.
        runtime: device, precision, threads.
    """
    runtime = replace(runtime, seed=seed)
    folder = run.path / f"seed-{seed}"
    ends = np.cumsum([0, profile.train, profile.dev, profile.test]).tolist()
    train, dev, test = (words.at(range(start, end)) for start, end in pairwise(ends))
    config = _train_config(profile, folder / "complete")
    cascade, labels = _complete(config, train, runtime)
    numbers = {label: number for number, label in enumerate(labels)}
    splits = [Split(part, [numbers[label] for label in part.labels or []]) for part in (dev, test)]
    names = [name.removeprefix("scratch:") for name in profile.models]
    found = Measured(names, profile.targets, cascade, *splits)
    backbone = folder / "complete" / f"stage-{len(profile.models)}"
    rival = _deebert(profile, backbone, train, labels, folder, runtime)
    found.add_exits("DeeBERT", rival)
    if profile.joint:
        found.add_exits("joint", _joint(profile, train, labels, folder, runtime))
    found.speed_table()
    found.order_table()
    if profile.first_layers:
        shallow = {
            count: _first(profile, count, backbone, train, labels, folder, runtime)
            for count in profile.first_layers
        }
        found.exited_table(shallow)
    found.quality_table()
    found.shares_tables()
    found.risk_table(seed, profile.resplits)
    found.stages_table()
    if profile.regularized:
        some = train.at(range(min(profile.regularized, len(train))))
        found.regularized_table(*_regularized(profile, some, labels, folder, runtime))
    return Found(found.numbers, found.tables, found.curves)


def _train_config(profile: Profile, out: Path) -> TrainConfig:
    rates, epochs = zip(*profile.models.values(), strict=True)
    return TrainConfig(
        model=tuple(profile.models),
        train_data="words",
        out=out,
        learning_rate=rates,
        epochs=epochs,
        batch_size=profile.batch_size,
        max_length=16,
        alphabet="char",
    )


def _once(folder: Path, options: Any, work: Callable[[RunDir], Any]) -> Path:
    """Do some work in a run's folder unless it was finished there before."""
    if not is_finished(folder):
        with RunDir.open(folder, options_of(options)) as run:
            work(run)
    return folder


def _complete(config: TrainConfig, train: Examples, runtime: Runtime) -> tuple[Cascade, list[str]]:
    _once(config.out, config, lambda run: train_cascade(train, config, run, runtime))
    cascade = Cascade.from_pretrained(config.out, runtime=runtime)
    return cascade, cascade.labels


def _rival_config(profile: Profile, kind: Any, model: str, out: Path) -> BaselineConfig:
    rate, epochs = profile.joint or list(profile.models.values())[-1]
    return BaselineConfig(
        kind=kind, model=model, train_data="words", out=out, learning_rate=(rate,), epochs=(epochs,),
        batch_size=profile.batch_size, max_length=16, alphabet="char",
        exit_epochs=profile.exit_epochs, exit_learning_rate=3e-3,
    )  # fmt: skip


def _deebert(
    profile: Profile, backbone: Path, train: Examples, labels: Sequence[str], folder: Path,
    runtime: Runtime,
) -> EarlyExit:  # fmt: skip
    """Exits on the very large model that the cascade uses."""
    config = _rival_config(profile, "deebert", LARGE, folder / "deebert")
    stage = load_stage(str(backbone), labels, config.max_length, runtime=runtime)

    def work(run: RunDir) -> None:
        network = train_exits(stage.model, stage.tokenizer, train, labels, config, run, runtime)
        network.save(run.path / "model", stage.tokenizer, config.max_length)
        discard_checkpoints(run, "exits")

    _once(config.out, config, work)
    return EarlyExit.from_pretrained(config.out, labels, config.max_length, runtime)


def _joint(
    profile: Profile, train: Examples, labels: Sequence[str], folder: Path, runtime: Runtime
) -> EarlyExit:
    config = _rival_config(profile, "joint", LARGE, folder / "joint")
    _once(config.out, config, lambda run: train_rival(train, labels, config, run, runtime))
    return EarlyExit.from_pretrained(config.out, labels, config.max_length, runtime)


def _first(
    profile: Profile, count: int, backbone: Path, train: Examples, labels: Sequence[str],
    folder: Path, runtime: Runtime,
) -> Stage:  # fmt: skip
    """BERT-kL: the first layers of the fine-tuned large model, fine-tuned further."""
    config = _train_config(profile, folder / f"first-{count}")
    rate, epochs = list(profile.models.values())[-1]
    options = TrainOptions(learning_rate=rate, epochs=epochs, batch_size=profile.batch_size)

    def work(run: RunDir) -> None:
        whole = load_stage(str(backbone), labels, config.max_length, runtime=runtime)
        model, tokenizer = fine_tune(
            "first", str(backbone), train, labels, options, config, run, runtime,
            model=first_layers(whole.model, count),
        )  # fmt: skip
        save_model(run.path / "model", model, tokenizer)
        discard_checkpoints(run, "first")

    _once(config.out, config, work)
    return load_stage(str(config.out / "model"), labels, config.max_length, runtime=runtime)


def _regularized(
    profile: Profile, some: Examples, labels: Sequence[str], folder: Path, runtime: Runtime
) -> tuple[dict[str, Stage], list[int]]:
    """The small model on few words: plainly, with the regularization, and with online difficulty."""
    rate = profile.models[SMALL][0]
    options = TrainOptions(
        learning_rate=rate, epochs=profile.regularized_epochs, batch_size=profile.batch_size
    )
    plain = replace(_train_config(profile, folder / "regularized"), model=(SMALL,))
    place = folder / "regularized"
    levels: list[int] = []

    def work(run: RunDir) -> None:
        levels.extend(
            build_difficulty(
                SMALL, some, labels, options, plain, profile.folds, run, "difficulty", runtime
            )
        )
        steps = np.ceil(len(some) / profile.batch_size) * profile.regularized_epochs
        for name, config in (
            ("plain", plain),
            ("folds", replace(plain, dar_weight=0.5)),
            ("online", replace(plain, dar_weight=0.5, difficulty="online")),
        ):
            if (run.path / name).is_dir():
                continue
            extras = {"difficulty": levels} if name == "folds" else None
            model, tokenizer = fine_tune(
                name, SMALL, some, labels, options, config, run, runtime,
                loss=stage_loss(config, steps), extras=extras,
            )  # fmt: skip
            save_model(run.path / name, model, tokenizer)
            discard_checkpoints(run, name)

    _once(place, plain, work)
    lines = (place / "difficulty" / "difficulty.jsonl").read_text(encoding="utf-8").splitlines()
    levels = [int(json.loads(line)["level"]) for line in lines]
    stages = {
        name: load_stage(str(place / name), labels, plain.max_length, runtime=runtime)
        for name in ("plain", "folds", "online")
    }
    return stages, levels
