"""Train the rivals on one backbone that a cascade of complete models is measured against.

DeeBERT fine-tunes the backbone, freezes it and then trains the exits; a joint model (PABEE,
BERxiT) trains backbone and all exits at once; BERT-kL fine-tunes its first layers.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from octavo.errors import ConfigError
from octavo.models import load_config, load_tokenizer, save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, seed_everything
from octavo.training import TrainOptions, discard_checkpoints, fit
from torch import Tensor, nn

from cascadebert.config import BaselineConfig
from cascadebert.data import Examples
from cascadebert.exits import MultiExit, first_layers
from cascadebert.finetune import (
    SCRATCH,
    collator,
    encode_rows,
    fine_tune,
    inputs_of,
    new_classifier,
    refuse_other_rows,
    scratch_shape,
    source_folder,
    steps_done,
    train_options,
)
from cascadebert.losses import exit_losses, joint_loss
from cascadebert.stage import batches, longest, make_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class CachedExits(nn.Module):
    """Exits alone, trained on states that a frozen backbone gave once."""

    def __init__(self, exits: nn.ModuleList) -> None:
        super().__init__()
        self.exits = exits

    def forward(self, states: Tensor) -> list[Tensor]:
        """Logits of every exit."""
        return [exit(states[:, number]) for number, exit in enumerate(self.exits)]


def train_rival(
    examples: Examples,
    labels: Sequence[str],
    config: BaselineConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> Path:
    """Train a rival on one backbone and save it under the run's folder.

    Args:
        examples: labelled training rows.
        labels: all label names.
        config: the kind, the backbone and the settings.
        run: the folder.
        runtime: seed, device and precision.

    Returns:
        The model's folder.

    Raises:
        ModelError: the backbone's layers cannot be found.
    """
    folder = run.path / "model"
    depth = _depth(config)
    if depth < 2:
        raise ConfigError(f"--model {config.model}: early exit needs two layers or more")
    if config.kind == "layers" and not 1 <= config.layers <= depth:
        raise ConfigError(f"--layers {config.layers}: must be from 1 to the backbone's {depth}")
    if config.kind != "joint" and (config.objective != "weighted" or config.learn_to_exit):
        raise ConfigError("--objective and --learn-to-exit: are of --kind joint")
    refuse_other_rows(run, examples)
    if folder.is_dir():
        log.info("%s is trained already", folder)
        return folder
    options = train_options(config)[0]
    if config.kind == "layers":
        return _train_first(examples, labels, options, config, run, runtime, folder)
    if config.kind == "joint":
        return _train_joint(examples, labels, options, config, run, runtime, folder)
    model, tokenizer = fine_tune(
        "backbone", config.model, examples, labels, options, config, run, runtime
    )
    two_stage = train_exits(model, tokenizer, examples, labels, config, run, runtime)
    two_stage.save(folder, tokenizer, config.max_length)
    for name in ("backbone", "exits"):
        discard_checkpoints(run, name)
    return folder


def _depth(config: BaselineConfig) -> int:
    if config.model.startswith(SCRATCH):
        return scratch_shape(config.model, config).layers
    return int(load_config(config.model).num_hidden_layers)


def train_exits(
    model: "PreTrainedModel",
    tokenizer: Any,
    examples: Examples,
    labels: Sequence[str],
    config: BaselineConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> MultiExit:
    """DeeBERT's second stage: exits on a frozen, fine-tuned backbone, whose states are kept.

    The sum of all exits' cross-entropies; none of them touches another.
    """
    seed_everything(runtime.seed)
    joined = MultiExit(model.eval())
    stage = make_stage("backbone", model, tokenizer, labels, config.max_length, runtime)
    encoded = stage.encode(examples)
    device = runtime.torch_device()
    count, width = len(joined.exits), int(model.config.hidden_size)
    kept = torch.empty(len(examples), count, width)
    with torch.inference_mode():
        for batch in batches(encoded.lengths, 8192):
            inputs = stage.pad([encoded.rows[i] for i in batch])
            kept[batch] = (
                joined.states(**{k: v.to(device) for k, v in inputs.items()}).float().cpu()
            )
    truth = [labels.index(label) for label in examples.labels or []]
    rows = [{"states": kept[i], "labels": label} for i, label in enumerate(truth)]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "states": torch.stack([row["states"] for row in some]),
            "labels": torch.tensor([row["labels"] for row in some]),
        }

    def loss(exits: Any, batch: dict[str, Tensor]) -> Tensor:
        found = exits(batch["states"])
        return sum(
            (nn.functional.cross_entropy(each.float(), batch["labels"]) for each in found),
            start=torch.zeros((), device=found[0].device),
        )

    options = TrainOptions(
        learning_rate=config.exit_learning_rate,
        epochs=config.exit_epochs,
        batch_size=config.batch_size,
        warmup=config.warmup,
        report_to=config.report_to,
    )
    heads: Any = CachedExits(joined.exits)
    fit(heads, rows, collate, run, "exits", options=options, runtime=runtime, loss=loss)
    return joined.eval()


def _train_first(
    examples: Examples, labels: Sequence[str], options: TrainOptions, config: BaselineConfig,
    run: RunDir, runtime: Runtime, folder: Path,
) -> Path:  # fmt: skip
    """BERT-kL: a classifier like any other, which can stand alone or be a stage."""
    source = source_folder(config.model, examples, config, runtime)
    seed_everything(runtime.seed)
    short = first_layers(new_classifier(source, labels), config.layers)
    model, tokenizer = fine_tune(
        "layers", source, examples, labels, options, config, run, runtime, model=short
    )
    save_model(folder, model, tokenizer)
    discard_checkpoints(run, "layers")
    return folder


def _train_joint(
    examples: Examples, labels: Sequence[str], options: TrainOptions, config: BaselineConfig,
    run: RunDir, runtime: Runtime, folder: Path,
) -> Path:  # fmt: skip
    source = source_folder(config.model, examples, config, runtime)
    tokenizer = load_tokenizer(source)
    seed_everything(runtime.seed)
    model = new_classifier(source, labels)
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    length = min(config.max_length, longest(model, tokenizer))
    rows = encode_rows(examples, tokenizer, labels, length, {})
    joint: Any = MultiExit(model, config.learn_to_exit)
    step = steps_done(run, "joint")

    def loss(network: Any, batch: dict[str, Tensor]) -> Tensor:
        nonlocal step
        step += 1
        logits, certainties = (
            [each.float() for each in part] for part in network(**inputs_of(batch))
        )
        losses = exit_losses(logits, batch["labels"], certainties)
        return joint_loss(losses, config.objective, step)

    fit(joint, rows, collator(tokenizer), run, "joint", options=options, runtime=runtime, loss=loss)
    joint.save(folder, tokenizer, config.max_length)
    discard_checkpoints(run, "joint")
    return folder
