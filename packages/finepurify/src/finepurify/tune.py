"""The short fine-tuning on clean rows, which every defence ends with."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.rundir import RunDir
from octavo.runtime import Runtime, world_size
from octavo.training import Loss, TrainOptions, discard_checkpoints, fit

from finepurify.config import TuneConfig
from finepurify.data import Item, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A head drawn anew starts from noise: it takes more than the short fine-tuning's small steps.
HEAD_STEPS, HEAD_RATE = 100, 1e-3


def fine_tune(
    model: "PreTrainedModel",
    items: Sequence[Item],
    pad: int,
    config: TuneConfig,
    run: RunDir,
    name: str,
    runtime: Runtime = Runtime(),
) -> "PreTrainedModel":
    """Train a model in place on the clean rows, by AdamW.

    Args:
        model: of any kind that computes its own loss.
        items: what `data.encode` made.
        pad: the padding token's id.
        config: steps (0 leaves the model as it is), learning rate, batch size; under torchrun each
            process takes its share of a batch.
        run: holds checkpoints meanwhile, and the metrics.
        name: of this training within the run.
        runtime: seed, device, precision.
    """
    if not config.steps:
        return model.eval()
    size = -(-min(config.batch_size, len(items)) // world_size())
    options = TrainOptions(
        learning_rate=config.learning_rate,
        epochs=config.steps / -(-len(items) // (size * world_size())),
        batch_size=size,
    )
    return train(model, items, pad, options, run, name, runtime)


def train_head(
    model: "PreTrainedModel",
    names: Collection[str],
    items: Sequence[Item],
    pad: int,
    config: TuneConfig,
    run: RunDir,
    name: str,
    runtime: Runtime = Runtime(),
) -> "PreTrainedModel":
    """Train a new head in place on the clean rows while all else is frozen.

    Fine-tuning under a random head would first of all bend the encoder towards it (linear probing,
    then fine-tuning: Kumar et al. 2022).

    Args:
        model: see `fine_tune`.
        names: of the head's parameters.
        items: see `fine_tune`.
        pad: see `fine_tune`.
        config: its batch size; `HEAD_STEPS` and `HEAD_RATE` are a head's own.
        run: see `fine_tune`.
        name: of this training within the run.
        runtime: see `fine_tune`.
    """
    frozen = [each for key, each in model.named_parameters() if key not in names]
    config = replace(config, steps=HEAD_STEPS, learning_rate=HEAD_RATE)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return fine_tune(model, items, pad, config, run, name, runtime)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def train(
    model: "PreTrainedModel",
    items: Sequence[Item],
    pad: int,
    options: TrainOptions,
    run: RunDir,
    name: str,
    runtime: Runtime = Runtime(),
    loss: Loss | None = None,
) -> "PreTrainedModel":
    """Train a model in place and drop the checkpoints that a kill would have needed."""
    fit(
        model,
        items,
        lambda chosen: collate(chosen, pad),
        run,
        name,
        options=options,
        runtime=runtime,
        loss=loss,
    )
    discard_checkpoints(run, name)
    return model
