"""A thin face over `transformers.Trainer`: custom losses, one metrics file, resume after a kill.

The same call runs alone, under `torchrun` and under `accelerate launch`; what Trainer takes from
its environment (FSDP, DeepSpeed) it takes here.
"""

import importlib.util
import json
import logging
import math
import random
import re
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octavo import console
from octavo.errors import ConfigError, ModelError
from octavo.models import quiet_library
from octavo.rundir import RunDir
from octavo.runtime import Runtime, is_main, local_rank, seed_everything, world_size

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ReportTo = Literal["none", "tensorboard", "wandb"]
Batch = dict[str, "torch.Tensor"]
Loss = Callable[["torch.nn.Module", Batch], "torch.Tensor"]
Evaluate = Callable[["PreTrainedModel"], float]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How one model is trained: linear warm-up and decay, clipped gradients."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain stochastic gradient descent."""

    learning_rate: float = 5e-5
    """Peak learning rate."""

    epochs: float = 3.0
    """Passes over the training data."""

    batch_size: int = 32
    """Items a step and process."""

    accumulate: int = 1
    """Steps whose gradients are added up before an update."""

    weight_decay: float = 0.01
    """AdamW's decay of all weights but biases and norms."""

    warmup: float = 0.1
    """Share of the updates in which the learning rate rises."""

    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""

    save_every: int = 0
    """Updates between two checkpoints to resume from; 0 for one an epoch."""

    gradient_checkpointing: bool = False
    """Compute activations twice, and keep few of them."""

    report_to: ReportTo = "none"
    """tensorboard or wandb (with octavo's extra of that name), or none."""


def fit(
    model: "PreTrainedModel",
    data: "Sequence[Any] | Dataset",
    collate: Callable[[list[Any]], Batch],
    run: RunDir,
    name: str,
    *,
    options: TrainOptions = TrainOptions(),
    runtime: Runtime = Runtime(),
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    lengths: Sequence[int] | None = None,
    rates: Mapping[str, float] = types.MappingProxyType({}),
) -> "PreTrainedModel":
    """Train a model in place; a run that was killed goes on from its last whole checkpoint.

    With `evaluate` the weights of the best epoch are kept, the first of equals, instead of the last
    one's; `metrics.jsonl` then has a score an epoch, and at the end which was the best.

    Args:
        model: any of the library's models; without `loss` it must compute its own.
        data: items by index.
        collate: makes a batch of tensors from a list of items.
        run: gets a line in `metrics.jsonl` every so often, and the checkpoints while training.
        name: of this training within the run.
        options: the optimisation.
        runtime: seed, device and precision; bfloat16 and float16 mean autocast, the weights stay as
            they are.
        loss: of the model and a batch, a scalar mean over the batch's items.
        evaluate: of the model in evaluation mode, a finite number, larger is better; asked on every
            process after each epoch and at the end of a part of one, and rank 0's answer counts.
        lengths: of the items; the batches of one update (`accumulate`) are then each of about equal
            length, which saves padding and changes no update.
        rates: peak learning rates of parameters by a regular expression of their names, where they are
            others than the options' one.

    Returns:
        The model, trained, in evaluation mode.

    Raises:
        ConfigError: an option is out of range, or a reporter is not installed.
        ModelError: the loss or the evaluation became NaN or infinite.
    """
    from accelerate.utils import broadcast_object_list
    from transformers import PrinterCallback, Trainer, TrainingArguments

    check(options)
    seed_everything(runtime.seed)
    device, dtype = runtime.torch_device(), str(runtime.torch_dtype())
    if device.type == "cuda" and device.index != local_rank():
        raise ConfigError(f"--device {device}: to train, set CUDA_VISIBLE_DEVICES={device.index}")
    folder = run.path / "checkpoints" / name
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim="sgd" if options.optimizer == "sgd" else "adamw_torch_fused",
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        max_grad_norm=options.max_gradient_norm,
        gradient_checkpointing=options.gradient_checkpointing,
        save_strategy="steps" if options.save_every or evaluate else "epoch",
        save_steps=options.save_every or 10**9,
        save_total_limit=1,
        logging_steps=20,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        run_name=f"{run.path.name}/{name}",
        seed=runtime.seed,
        use_cpu=device.type == "cpu",
        bf16=dtype.endswith("bfloat16"),
        fp16=dtype.endswith(".float16"),
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        metric_for_best_model="score" if evaluate else None,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would cut batches of nested tensors
    # set now, since Trainer would have it that checkpoints are as rare as evaluations
    arguments.load_best_model_at_end = evaluate is not None

    together = options.batch_size * options.accumulate * world_size()
    order = ByLength(lengths, together, runtime.seed) if lengths else None

    class LossTrainer(Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, *_: Any, **__: Any
        ) -> Any:
            value = loss(model, inputs) if loss else model(**inputs).loss
            return (value, None) if return_outputs else value

        def create_optimizer(self, model: Any = None) -> Any:
            made, optimizer = self.optimizer, super().create_optimizer(model)
            for pattern, rate in rates.items() if made is None else ():
                whole: Any = model or self.model
                names = {one: name for name, one in whole.named_parameters()}
                for group in list(optimizer.param_groups):
                    own = [one for one in group["params"] if re.search(pattern, names[one])]
                    group["params"] = [one for one in group["params"] if one not in set(own)]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
            return optimizer

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order or super()._get_train_sampler(train_dataset)

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            assert evaluate
            with self.autocast_smart_context_manager():
                (score,) = broadcast_object_list([float(evaluate(model.eval()))])
            if not math.isfinite(score):
                raise ModelError(f"{name}: its evaluation gave {score}; lower --learning-rate")
            metrics = {"eval_score": score}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    trainer = LossTrainer(
        model=model,
        args=arguments,
        train_dataset=data,  # pyright: ignore[reportArgumentType]
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_reporter(run, name))
    if order:
        trainer.add_callback(_order_follows(order))
    if evaluate:
        trainer.add_callback(_epoch_ends())
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_checkpoint(folder)
    reached = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    run.forget(lambda line: line.get("training") != name or line.get("step", 0) <= reached)
    if checkpoint:
        log.info("%s: resumed at %s", name, checkpoint.name)
    with quiet_library():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ModelError(f"{name}: a weight became NaN or infinite; lower --learning-rate")
    if evaluate:
        state = trainer.state
        best = next(line for line in state.log_history if line["step"] == state.best_global_step
                    and "eval_score" in line)  # fmt: skip
        found = {"best_epoch": best["epoch"], "best_score": best["eval_score"]}
        log.info("%s: best after epoch %g, score %.4f", name, *found.values())
        run.log(training=name, step=state.global_step, **found)
    return model.eval()


class ByLength:
    """Items in random order, those of one update by length: less padding, and the same updates.

    Args:
        lengths: of the items.
        together: items in an update, over all its batches and processes.
        seed: of the order, which is another each epoch.
    """

    def __init__(self, lengths: Sequence[int], together: int, seed: int) -> None:
        self.lengths, self.together, self.seed, self.epoch = lengths, together, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for start in range(0, len(order), self.together):
            yield from sorted(order[start : start + self.together], key=self.lengths.__getitem__)


def discard_checkpoints(run: RunDir, name: str) -> None:
    """Remove a training's checkpoints once its result is saved (rank 0 alone)."""
    folder = run.path / "checkpoints"
    if is_main():
        shutil.rmtree(folder / name, ignore_errors=True)
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; Trainer writes its state file last."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in reversed(numbered):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return checkpoint
        except (OSError, ValueError):
            continue
    return None


def check(options: TrainOptions) -> None:
    """Refuse options that are out of range.

    Raises:
        ConfigError: one is, or a reporter is not installed.
    """
    for name, good, what in (
        ("learning_rate", 0 < options.learning_rate < math.inf, "above 0, and finite"),
        ("epochs", 0 < options.epochs < math.inf, "above 0, and finite"),
        ("batch_size", options.batch_size >= 1, "1 or more"),
        ("accumulate", options.accumulate >= 1, "1 or more"),
        ("weight_decay", 0 <= options.weight_decay < math.inf, "0 or more"),
        ("warmup", 0 <= options.warmup < 1, "a share from 0 up to 1"),
        ("save_every", options.save_every >= 0, "0 or more"),
    ):
        if not good:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(options, name)}: must be {what}")
    if options.report_to != "none" and not importlib.util.find_spec(options.report_to):
        raise ConfigError(
            f"--report-to {options.report_to}: is not installed; pip install {options.report_to}"
        )


def _order_follows(order: ByLength) -> Any:
    """A callback that tells the order its epoch; where batches are skipped the library does not."""
    from transformers import TrainerCallback

    class OrderFollows(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            order.epoch = int(state.epoch or 0)

    return OrderFollows()


def _epoch_ends() -> Any:
    """A callback that evaluates with an epoch's last step and saves after it, never before.

    Trainer's own order at an epoch's end saves first where both fall on one step; a run killed between
    the two would resume without that epoch's score.
    """
    from transformers import TrainerCallback

    class EpochEnds(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.epoch.is_integer() or state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True

    return EpochEnds()


def _reporter(run: RunDir, name: str) -> Any:
    """A callback that writes metrics, moves the progress bar and stops at a broken loss."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.stack = ExitStack()
            self.done = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar = console.counter(f"training {name}", state.max_steps, "steps")
            self.advance = self.stack.enter_context(bar)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.advance(state.global_step - self.done)
            self.done = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs.get("logs") or {}
            value = logs.get("loss")
            if value is not None and not abs(value) < float("inf"):
                self.stack.close()
                raise ModelError(
                    f"{name}: the loss became {value} by step {state.global_step}; "
                    "lower --learning-rate or check the data"
                )
            run.log(training=name, step=state.global_step, **logs)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stack.close()

    return Reporter()
