"""Fine-tune each stage on its own: independent models, nothing shared but the data.

A stage that is done lies whole in its folder, and a killed run goes on at the stage, epoch and step
where it stopped.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from octavo.errors import ConfigError, DataError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, world_size
from octavo.training import Loss, TrainOptions, check, discard_checkpoints, fit
from torch.nn.functional import cross_entropy

from cascadebert.card import model_card
from cascadebert.cascade import MANIFEST
from cascadebert.config import TrainConfig
from cascadebert.data import OVERLAP, Examples, encoded_hashes, label_names, seen_before
from cascadebert.difficulty import build_difficulty, check_folds
from cascadebert.finetune import (
    check_fit,
    collator,
    encode_rows,
    fine_tune,
    inputs_of,
    refuse_other_rows,
    steps_done,
    train_options,
)
from cascadebert.losses import (
    confidence,
    dar_loss,
    distill_loss,
    gatekeeper_loss,
    online_difficulty,
)
from cascadebert.stage import load_stage, longest

log = logging.getLogger(__name__)


def train_cascade(
    examples: Examples,
    config: TrainConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
    dev: Examples | None = None,
) -> list[str]:
    """Fine-tune every stage and write the cascade into the run's folder.

    Args:
        examples: labelled training rows.
        config: the models and how they are trained.
        run: the folder; a stage that already lies there whole is left as it is.
        runtime: seed, device and precision.
        dev: labelled rows that are not among `examples`; each stage keeps the epoch that is most
            often right on them, the last one without. Gatekeeper's epoch comes after that choice,
            and the models that measure difficulty keep their last.

    Returns:
        The label names.

    Raises:
        ConfigError: fewer than two models, settings that do not match their number, dev rows that
            are training rows, or other rows than the run was begun with.
        ModelError: a model cannot be had, or is no encoder for classification.
        DataError: fewer than two labels, or no dev rows.
    """
    labels = label_names(examples, config.train_data)
    names = [f"stage-{number + 1}" for number in range(len(config.model))]
    if dev is not None:
        _check_dev(dev, examples, config)
        refuse_other_rows(run, dev, "dev")
    refuse_other_rows(run, examples)
    runtime.wait_for_everyone()  # before asking what is there already
    order = list(range(len(names)))
    if config.distill_weight:
        order.insert(0, order.pop())  # the teacher first
    for number in order:
        if (run.path / names[number]).is_dir():
            log.info("%s is trained already", names[number])
            continue
        _train_stage(number, names, examples, dev, labels, config, run, runtime)
    manifest = {"stages": names, "labels": labels, "max_length": config.max_length}
    manifest |= {"pairs": examples.pairs is not None}
    chosen = {} if dev is None else {"dev_hashes": encoded_hashes(dev)}
    run.write_json(MANIFEST, manifest | chosen)
    run.write_text("README.md", model_card(names, labels, config, examples))
    return labels


def _check_dev(dev: Examples, examples: Examples, config: TrainConfig) -> None:
    if len(dev) == 0:
        raise DataError(f"--dev-data {config.dev_data}: holds no rows")
    again = seen_before(dev, encoded_hashes(examples))
    if again > OVERLAP * len(dev):
        raise ConfigError(
            f"--dev-data {config.dev_data}: {again} of its {len(dev)} rows are training rows, which "
            "cannot tell the best epoch; give others"
        )


def check_models(config: TrainConfig) -> None:
    """Find out before anything is written whether the models can be had.

    Raises:
        ConfigError: fewer than two models, settings that do not match their number or are out of
            range, or a model that lies in the folder that is written to.
        ModelError: a model cannot be had.
    """
    if len(config.model) < 2:
        raise ConfigError("--model: a cascade needs two models or more, smallest first")
    for options in train_options(config, len(config.model)):
        check(options)
    for name, good, what in (
        ("dar_weight", 0 <= config.dar_weight < math.inf, "0 or more"),
        ("dar_margin", 0 <= config.dar_margin <= 1, "from 0 to 1"),
        ("online_from", 0 <= config.online_from < 1, "a share from 0 up to 1"),
        ("gatekeeper_weight", 0 <= config.gatekeeper_weight < 1, "from 0 up to 1"),
        ("distill_weight", 0 <= config.distill_weight <= 1, "from 0 to 1"),
        ("distill_temperature", 0 < config.distill_temperature < math.inf, "above 0"),
    ):
        if not good:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(config, name)}: must be {what}")
    if config.dar_weight and config.difficulty == "folds":
        check_folds(config, 10**9)
    for source in config.model:
        check_fit(config, source, config.out)
    if config.preset == "paper" and not config.dev_data:
        log.warning("each stage keeps its last epoch; the best on dev takes --dev-data")


def _train_stage(
    number: int,
    names: Sequence[str],
    examples: Examples,
    dev: Examples | None,
    labels: Sequence[str],
    config: TrainConfig,
    run: RunDir,
    runtime: Runtime,
) -> None:
    name, source = names[number], config.model[number]
    options = train_options(config, len(names))[number]
    defers = number < len(names) - 1  # the last stage keeps what it gets
    extras: dict[str, list[Any]] = {}
    if defers and config.distill_weight:
        teacher = load_stage(str(run.path / names[-1]), labels, config.max_length, runtime=runtime)
        extras["teacher"] = teacher.run(teacher.encode(examples), 8192).tolist()
    plain = replace(config, dar_weight=0.0)
    if defers and config.dar_weight and config.difficulty == "folds":
        extras["difficulty"] = build_difficulty(
            source, examples, labels, options, config, config, run, f"difficulty-{number + 1}",
            runtime, loss=stage_loss(plain, 0), extras=dict(extras),
        )  # fmt: skip
    log.info("%s: fine-tuning %s on %d rows", name, source, len(examples))
    steps = math.ceil(len(examples) / (config.batch_size * world_size())) * options.epochs
    loss = stage_loss(config if defers else plain, steps, steps_done(run, name))
    model, tokenizer = fine_tune(
        name, source, examples, labels, options, config, run, runtime, loss=loss, extras=extras,
        dev=dev,
    )  # fmt: skip
    if defers and config.gatekeeper_weight:
        _gatekeep(f"{name}-gatekeeper", model, tokenizer, examples, labels, options, config, run,
                  runtime)  # fmt: skip
    save_model(run.path / name, model, tokenizer)
    for training in (name, f"{name}-gatekeeper"):
        discard_checkpoints(run, training)


def stage_loss(config: TrainConfig, steps: float, step: int = 0) -> Loss:
    """The loss of a stage that defers: cross-entropy, and what the configuration adds to it.

    L = (1 - w) CE + w distillation + lambda DAR.

    Args:
        config: weights and margins.
        steps: of the whole training, for online difficulty, which begins after a share of them.
        step: from which a resumed training goes on.
    """
    seen = [step]

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen[0] += 1
        logits, labels = model(**inputs_of(batch)).logits.float(), batch["labels"]
        value = cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if "teacher" in batch:
            soft = distill_loss(logits, batch["teacher"], config.distill_temperature)
            value = (1 - config.distill_weight) * value + config.distill_weight * soft
        if config.dar_weight:
            if config.difficulty == "online":
                begun = seen[0] > config.online_from * steps
                levels = online_difficulty(logits, labels) if begun else torch.zeros_like(labels)
            else:
                levels = batch["difficulty"]
            draws = torch.Generator().manual_seed(
                int(batch["input_ids"].sum())
            )  # of the batch alone
            order = dar_loss(confidence(logits), levels, config.dar_margin, config.pairing, draws)
            value = value + config.dar_weight * order
        return value

    return loss


def _gatekeep(
    name: str, model: Any, tokenizer: Any, examples: Examples, labels: Sequence[str],
    options: TrainOptions, config: TrainConfig, run: RunDir, runtime: Runtime,
) -> None:  # fmt: skip
    """One more epoch that flattens the answers the stage gets wrong."""

    def loss(network: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = network(**inputs_of(batch)).logits.float()
        return gatekeeper_loss(logits, batch["labels"], config.gatekeeper_weight)

    length = min(config.max_length, longest(model, tokenizer))
    rows = encode_rows(examples, tokenizer, labels, length, {})
    once = replace(options, epochs=1.0, learning_rate=options.learning_rate / 2)
    fit(model, rows, collator(tokenizer), run, name, options=once, runtime=runtime, loss=loss)
