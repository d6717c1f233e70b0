"""The training loop: AdamW, the paper's schedule, load statistics; it resumes bit by bit.

A loop of its own, because expert parallelism sums gradients over other processes for experts than for
the rest. Batches, and dropout's random numbers, are functions of the step alone, so that a resumed run
needs no cursor.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from octavo import console
from octavo.errors import ConfigError, ModelError
from octavo.rundir import RunDir
from octavo.runtime import Runtime, rank, world_size
from torch import Tensor, nn

from deepseekmoe.balance import max_violation, relative_load, update_bias
from deepseekmoe.checkpoints import resume, save_checkpoint
from deepseekmoe.config import OptimizeConfig
from deepseekmoe.layer import moe_layers
from deepseekmoe.parallel import (
    check_processes,
    clip_gradients,
    divided,
    main_first,
    spread,
    sum_gradients,
)

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
#: The batch of a step, a micro-batch within it, and a process.
Batches = Callable[[int, int, int], Batch]

BETAS = (0.9, 0.95)
DROPS = ((0.8, 0.316), (0.9, 0.316**2))


def check_options(config: OptimizeConfig) -> None:
    """Refuse options that are out of range.

    Raises:
        ConfigError: one is.
    """
    for name, good, what in (
        ("steps", config.steps >= 1, "1 or more"),
        ("batch_size", config.batch_size >= 1, "1 or more"),
        ("accumulate", config.accumulate >= 1, "1 or more"),
        ("learning_rate", 0 < config.learning_rate < math.inf, "above 0, and finite"),
        ("warmup_steps", config.warmup_steps >= 0, "0 or more"),
        ("weight_decay", 0 <= config.weight_decay < math.inf, "0 or more"),
        ("max_gradient_norm", config.max_gradient_norm > 0, "above 0"),
        ("save_every", config.save_every >= 0, "0 or more"),
        ("log_every", config.log_every >= 1, "1 or more"),
    ):
        if not good:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} {getattr(config, name)}: must be {what}")
    check_processes(config)


def learning_rate(config: OptimizeConfig, step: int) -> float:
    """The rate of a step, from 0: linear warm-up, then the schedule (section 4.1 of the paper)."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return peak * min(
            [factor for share, factor in DROPS if step >= share * config.steps] or [1]
        )
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))
    return peak


def make_optimizer(model: nn.Module, config: OptimizeConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone."""
    weights = [p for p in model.parameters() if p.requires_grad]
    apart = divided(model)  # a group of their own: slices over other processes do not mix
    decay = config.weight_decay
    groups = [
        {"params": [p for p in weights if p in apart], "weight_decay": decay},
        {"params": [p for p in weights if p.dim() >= 2 and p not in apart], "weight_decay": decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, eps=1e-8)


def optimize(
    model: Any,
    batches: Batches,
    config: OptimizeConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
    name: str = "train",
    each_step: Callable[[int, Any], None] | None = None,
) -> Any:
    """Train a model in place; a run that was killed goes on from its last whole checkpoint.

    Args:
        model: a causal language model; on several processes (see `parallel.processes`) whole on each.
        batches: gives the tensors of a step, micro-batch and process, `labels` among them.
        config: the optimisation.
        run: gets a line in `metrics.jsonl` every so often, and the checkpoints while training.
        runtime: device, and precision of the forward pass; weights stay as they are.
        name: of this training within the run.
        each_step: is given the number of updates done and the model behind each of them, on every
            process.

    Returns:
        The model, in evaluation mode. Where processes share it they call it together;
        `parallel.whole_model` puts it together.

    Raises:
        ConfigError: an option is out of range, or asks for other processes than there are.
        ModelError: the loss became NaN or infinite; the first layer that did so is named.
    """
    check_options(config)
    if runtime.torch_dtype() == torch.float16:
        raise ConfigError(
            "--dtype float16: gradients would underflow; train in bfloat16 or float32"
        )
    if str(model.config._attn_implementation).startswith("flash"):
        raise ConfigError(
            "flash attention cannot keep packed documents apart in batches of several rows: load the "
            'model with attn_implementation="sdpa"'
        )
    device = runtime.torch_device()
    precision = _autocast(device, runtime.torch_dtype())
    spread(model, config, device, runtime.torch_dtype())
    if config.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = make_optimizer(model, config)
    folder = run.path / "checkpoints" / name
    begin, told = main_first(lambda: resume(folder, model, optimizer, config))
    run.forget(lambda line: line.get("training") != name or line.get("step", 0) <= begin)
    meter = _Meter(told)
    with console.counter(f"training {name}", config.steps, "steps") as advance:
        advance(begin)
        for step in range(begin, config.steps):
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts = [batches(step, micro, rank()) for micro in range(config.accumulate)]
            predicted = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
            rows = sum(len(part["labels"]) for part in parts)
            real = sum(_real_tokens(part) for part in parts)
            predicted, rows, real = _summed(torch.tensor([predicted, rows, real])).tolist()
            for micro, part in enumerate(parts):
                part = {key: value.to(device) for key, value in part.items()}
                if model.config.attention_dropout:
                    _seed(runtime.seed, (step * config.accumulate + micro) * world_size() + rank())
                with precision():
                    out = model(
                        **part, num_items_in_batch=max(1, predicted), num_rows_in_batch=rows,
                        num_tokens_in_batch=real,
                    )  # fmt: skip
                out.loss.backward()
                meter.add(out, part)
            sum_gradients(model)
            norm = clip_gradients(model, config.max_gradient_norm)
            if not math.isfinite(norm):
                _explain_break(model, parts, device, step, precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            balance_bias(model, meter.end_of_step())
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                run.log(training=name, step=done, learning_rate=rate, gradient_norm=norm,
                        **meter.read())  # fmt: skip
            if each_step is not None:
                each_step(done, model)
            if config.save_every and done % config.save_every == 0 and done < config.steps:
                save_checkpoint(folder, done, model, optimizer, config, meter.state())
            advance(1)
    return model.eval()


def balance_bias(model: Any, counts: Tensor) -> None:
    """Move every layer's selection bias by its load, where the model has one and trains its gate."""
    layers: list[Any] = moe_layers(model)
    if model.config.bias_update_rate:
        for layer, load in zip(layers, counts, strict=True):
            if not any(weight.requires_grad for weight in layer.gate.parameters()):
                continue
            update_bias(layer.gate.e_score_correction_bias, load, model.config.bias_update_rate)


def _summed(tensor: Tensor) -> Tensor:
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def _real_tokens(batch: Batch) -> int:
    mask = batch.get("token_mask", batch.get("attention_mask"))
    return batch["labels"].numel() if mask is None else int(mask.sum())


def _seed(seed: int, part: int) -> None:
    """Draw a part of a batch the same random numbers, whenever and wherever it is computed."""
    torch.manual_seed(int(np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)[0]))


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype)


class _Meter:
    """Losses, load and speed of all processes since they were last read.

    Args:
        state: of a meter whose training stopped; empty for a new one.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self._begin_step()
        self._clear()
        if state:
            self.steps, self.sums = state["steps"], torch.tensor(state["sums"], dtype=torch.double)
            self.counts = torch.tensor(state["counts"], dtype=torch.long)
            self.since -= state["seconds"]

    def _clear(self) -> None:
        self.steps = 0
        self.sums = torch.zeros(3, dtype=torch.double)  # loss, lm_loss, tokens
        self.counts: Tensor | None = None
        self.since = time.perf_counter()

    def _begin_step(self) -> None:
        self.step_sums = torch.zeros(3, dtype=torch.double)
        self.step_counts: Tensor | None = None

    def add(self, out: Any, batch: Batch) -> None:
        """Count a part of this process's batch."""
        many = self.step_counts
        self.step_counts = out.counts if many is None else many + out.counts
        found = float(out.loss.detach()), float(out.lm_loss.detach()), batch["labels"].numel()
        self.step_sums += torch.tensor(found, dtype=torch.double)

    def end_of_step(self) -> Int[Tensor, "layers experts"]:
        """Add up the step over all processes, each of which calls it; gives the step's load."""
        assert self.step_counts is not None
        counts = _summed(self.step_counts).cpu()
        self.counts = counts if self.counts is None else self.counts + counts
        self.sums += _summed(self.step_sums)
        self.steps += 1
        self._begin_step()
        return counts

    def state(self) -> dict[str, Any]:
        """What a meter goes on from, in plain values; empty where nothing was counted."""
        if self.counts is None:
            return {}
        return {
            "steps": self.steps, "sums": self.sums.tolist(), "counts": self.counts.tolist(),
            "seconds": time.perf_counter() - self.since,
        }  # fmt: skip

    def read(self) -> dict[str, Any]:
        """A line of metrics; the meter begins anew."""
        assert self.counts is not None
        seconds = time.perf_counter() - self.since
        loss, lm_loss, tokens = self.sums.tolist()
        line = {
            "loss": loss / self.steps,
            "lm_loss": lm_loss / self.steps,
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        }
        if self.counts.numel():
            line |= {
                "max_violation": _rounded(max_violation(self.counts), 4),
                "dead_experts": (self.counts == 0).sum(dim=-1).tolist(),
                "load": _rounded(relative_load(self.counts), 3),
            }
        self._clear()
        return line


def _rounded(values: Tensor, digits: int) -> list[Any]:
    return values.round(decimals=digits).tolist()


@torch.no_grad()
def _explain_break(
    model: Any, parts: list[Batch], device: torch.device, step: int, precision: Any
) -> None:
    """Stop, and say which layer first gives a number that is none, on whichever process."""
    many = len(model.model.layers)
    found = torch.tensor(many)
    handles = []
    for number, layer in enumerate(model.model.layers):

        def look(_layer: nn.Module, _inputs: Any, output: Any, number: int = number) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if not bool(state.isfinite().all()):
                found.clamp_(max=number)

        handles.append(layer.register_forward_hook(look))
    for part in parts:
        with precision():
            model(**{key: value.to(device) for key, value in part.items()})
    for handle in handles:
        handle.remove()
    if world_size() > 1:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    where = "a gradient became NaN or infinite"
    if found < many:
        where = f"layer {int(found)} gives NaN or infinity"

    def stop() -> None:
        raise ModelError(f"step {step + 1}: {where}; lower --learning-rate, or look at the data")

    main_first(stop)
