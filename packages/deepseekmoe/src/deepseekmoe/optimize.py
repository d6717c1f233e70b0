"""The training loop: AdamW, the paper's schedule, load statistics, checkpoints that resume bit by bit.

A loop of its own, because expert parallelism sums gradients over other processes for experts than for
the rest. Batches are a function of the step alone, so that a resumed run needs no cursor.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from octavo import console
from octavo.errors import ConfigError, ModelError
from octavo.rundir import RunDir, atomic, write_json
from octavo.runtime import Runtime, is_main, rank, world_size
from torch import Tensor, nn

from deepseekmoe.balance import max_violation, update_bias
from deepseekmoe.config import OptimizeConfig
from deepseekmoe.layer import moe_layers

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
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": config.weight_decay},
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
) -> Any:
    """Train a model in place; a run that was killed goes on from its last whole checkpoint.

    Args:
        model: a causal language model, on its device.
        batches: gives the tensors of a step, micro-batch and process, `labels` among them.
        config: the optimisation.
        run: gets a line in `metrics.jsonl` every so often, and the checkpoints while training.
        runtime: precision of the forward pass; weights stay as they are.
        name: of this training within the run.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: an option is out of range.
        ModelError: the loss became NaN or infinite; the first layer that did so is named.
    """
    check_options(config)
    device = next(model.parameters()).device
    precision = _autocast(device, runtime.torch_dtype())
    if config.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = make_optimizer(model, config)
    folder = run.path / "checkpoints" / name
    begin = _resume(folder, model, optimizer)
    run.forget(lambda line: line.get("training") != name or line.get("step", 0) <= begin)
    meter = _Meter()
    with console.counter(f"training {name}", config.steps, "steps") as advance:
        advance(begin)
        for step in range(begin, config.steps):
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts = [batches(step, micro, rank()) for micro in range(config.accumulate)]
            predicted = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
            predicted = int(_summed(torch.tensor(predicted, device=device)))
            for part in parts:
                part = {key: value.to(device) for key, value in part.items()}
                with precision():
                    out = model(**part, num_items_in_batch=max(1, predicted))
                out.loss.backward()
                meter.add(out, part)
            sum_gradients(model.parameters())
            norm = nn.utils.clip_grad_norm_(
                [p for p in model.parameters() if p.requires_grad], config.max_gradient_norm
            )
            if not math.isfinite(float(norm)):
                raise ModelError(_broken(model, parts, device, step, precision))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            counts = _summed(meter.step_counts)
            balance_bias(model, counts)
            meter.end_of_step(counts)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                run.log(training=name, step=done, learning_rate=rate, gradient_norm=float(norm),
                        **meter.read())  # fmt: skip
            if config.save_every and done % config.save_every == 0 and done < config.steps:
                _save(folder, done, model, optimizer)
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


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add gradients over all processes; each loss is its part's share of the whole batch's."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:  # an expert without tokens here may have some elsewhere
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)


def _summed(tensor: Tensor) -> Tensor:
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype)


class _Meter:
    """Losses, load and speed since they were last read."""

    def __init__(self) -> None:
        self.step_counts = torch.zeros(0, 0, dtype=torch.long)
        self._clear()

    def _clear(self) -> None:
        self.loss = self.lm_loss = self.balance = 0.0
        self.steps = self.tokens = 0
        self.counts: Tensor | None = None
        self.since = time.perf_counter()

    def add(self, out: Any, batch: Batch) -> None:
        fresh = not len(self.step_counts)
        self.step_counts = out.counts if fresh else self.step_counts + out.counts
        self.loss += float(out.loss.detach())
        self.lm_loss += float(out.lm_loss.detach())
        self.balance += float(out.balance[:, 0].detach().mean()) if len(out.balance) else 0.0
        self.tokens += batch["labels"].numel()

    def end_of_step(self, counts: Tensor) -> None:
        self.counts = counts if self.counts is None else self.counts + counts
        self.step_counts = torch.zeros(0, 0, dtype=torch.long)
        self.steps += 1

    def read(self) -> dict[str, Any]:
        """A line of metrics; losses are of this process's part, summed over it."""
        assert self.counts is not None
        seconds = time.perf_counter() - self.since
        line = {
            "loss": self.loss * world_size() / self.steps,
            "lm_loss": self.lm_loss * world_size() / self.steps,
            "tokens_per_second": round(self.tokens * world_size() / max(seconds, 1e-9), 1),
        }
        if self.counts.numel():
            line |= {
                "max_violation": [round(value, 4) for value in max_violation(self.counts).tolist()],
                "dead_experts": (self.counts == 0).sum(dim=-1).tolist(),
            }
        self._clear()
        return line


def _save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, optimizer and step; earlier checkpoints go once this one is whole."""
    if not is_main():
        return
    from safetensors.torch import save_file

    with atomic(folder / f"step-{step}") as temporary:
        temporary.mkdir(parents=True)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(_without_twins(state), temporary / "model.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        write_json(temporary / "state.json", {"step": step})
    for old in folder.glob("step-*"):
        if old.name != f"step-{step}":
            shutil.rmtree(old)


def _without_twins(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once."""
    seen: dict[int, str] = {}
    return {
        name: value
        for name, value in state.items()
        if seen.setdefault(value.data_ptr(), name) == name or not value.numel()
    }


def _resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint; gives the step to go on at."""
    from safetensors.torch import load_file

    there = [path for path in folder.glob("step-*") if (path / "state.json").is_file()]
    if not there:
        return 0
    newest = max(there, key=lambda path: int(path.name.split("-")[1]))
    step = int(json.loads((newest / "state.json").read_text(encoding="utf-8"))["step"])
    model.load_state_dict(load_file(newest / "model.safetensors"), strict=False)
    optimizer.load_state_dict(torch.load(newest / "optimizer.pt", weights_only=True))
    log.info("resumed at step %d", step)
    return step


def discard_checkpoints(run: RunDir, name: str = "train") -> None:
    """Remove a training's checkpoints once its model is saved (rank 0 alone)."""
    if is_main():
        shutil.rmtree(run.path / "checkpoints" / name, ignore_errors=True)


@torch.no_grad()
def _broken(model: Any, parts: list[Batch], device: torch.device, step: int, precision: Any) -> str:
    """Which layer first gives a number that is none."""
    found: list[str] = []
    handles = []
    for number, layer in enumerate(model.model.layers):

        def look(_layer: nn.Module, _inputs: Any, output: Any, number: int = number) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if not found and not bool(state.isfinite().all()):
                found.append(f"layer {number}")

        handles.append(layer.register_forward_hook(look))
    for part in parts:
        with precision():
            model(**{key: value.to(device) for key, value in part.items()})
    for handle in handles:
        handle.remove()
    where = f"{found[0]} gives NaN or infinity" if found else "a gradient became NaN or infinite"
    return f"step {step + 1}: {where}; lower --learning-rate, or look at the data"
