"""The short fine-tuning on clean rows, which every defence ends with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import Loss, TrainOptions, discard_checkpoints, fit

from finepurify.config import TuneConfig
from finepurify.data import Item, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        config: steps (0 leaves the model as it is), learning rate, batch size.
        run: holds checkpoints meanwhile, and the metrics.
        name: of this training within the run.
        runtime: seed, device, precision.
    """
    if not config.steps:
        return model.eval()
    size = min(config.batch_size, len(items))
    options = TrainOptions(
        learning_rate=config.learning_rate,
        epochs=config.steps / -(-len(items) // size),
        batch_size=size,
    )
    return train(model, items, pad, options, run, name, runtime)


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
