"""What a training resumes from: each process writes what it alone holds; a checkpoint appears whole.

Weights lie in `model-P.safetensors` and AdamW's moments in `optimizer-P.pt`, P being the part of the
model: 0 alone where every process holds all of it.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from octavo.errors import ConfigError
from octavo.rundir import RunDir, atomic, write_json
from octavo.runtime import is_main, rank, world_size
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseekmoe.config import OptimizeConfig
from deepseekmoe.parallel import local

log = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Any,
    config: OptimizeConfig,
    meter: dict[str, Any],
) -> None:
    """Write weights, optimizer, step and meter; earlier checkpoints go once this one is whole.

    Args:
        folder: of the training's checkpoints; on several machines, one that all of them see.
        step: updates that are done.
        model: on every process its part.
        optimizer: of these parts.
        config: says how many parts there are.
        meter: what metrics were counted since the last line of them; plain values.
    """
    final = folder / f"step-{step}"
    if not is_main():
        place: list[Any] = [None]
        dist.broadcast_object_list(place, src=0)
        _write_part(place[0], model, optimizer, config)
        dist.barrier()
        return
    with atomic(final) as temporary:
        temporary.mkdir(parents=True)
        if world_size() > 1:
            dist.broadcast_object_list([temporary], src=0)
        _write_part(temporary, model, optimizer, config)
        state = {"step": step, "processes": world_size(), "meter": meter}
        write_json(temporary / "state.json", state)
        if world_size() > 1:
            dist.barrier()
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def resume(
    folder: Path, model: nn.Module, optimizer: Any, config: OptimizeConfig
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint.

    Returns:
        The step to go on at and what the meter had counted; 0 and nothing where there is none.

    Raises:
        ConfigError: it was written by another number of processes, so that batches would differ.
    """
    there = [path for path in folder.glob("step-*") if (path / "state.json").is_file()]
    if not there:
        return 0, {}
    newest = max(there, key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    if state["processes"] != world_size():
        raise ConfigError(
            f"{newest} was written by {state['processes']} processes and this run has "
            f"{world_size()}; start as many again, or start anew with --overwrite"
        )
    part = _part(config)
    weights = load_file(newest / f"model-{part}.safetensors")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in weights:  # of tied tensors one is written
                local(tensor).copy_(weights[name])
    moments = torch.load(newest / f"optimizer-{part}.pt", weights_only=True)
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in moments["state"].items():
        for name, value in values.items():
            values[name] = _like(value, held[number])
    optimizer.load_state_dict(moments)
    log.info("resumed at step %d", state["step"])
    return int(state["step"]), state["meter"]


def discard_checkpoints(run: RunDir, name: str = "train") -> None:
    """Remove a training's checkpoints once its model is saved (rank 0 alone)."""
    if is_main():
        shutil.rmtree(run.path / "checkpoints" / name, ignore_errors=True)


def _part(config: OptimizeConfig) -> int:
    """Which part of the model this process holds."""
    return rank() if config.fsdp else rank() % config.expert_parallel


def _write_part(place: Path, model: nn.Module, optimizer: Any, config: OptimizeConfig) -> None:
    """This process's part, unless one before it holds the same."""
    part = _part(config)
    if rank() != part:
        return
    weights = {name: local(value).contiguous() for name, value in model.state_dict().items()}
    save_file(_without_twins(weights), place / f"model-{part}.safetensors")
    moments = optimizer.state_dict()
    moments["state"] = {
        number: {name: local(value) for name, value in values.items()}
        for number, values in moments["state"].items()
    }
    torch.save(moments, place / f"optimizer-{part}.pt")


def _without_twins(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors once."""
    seen: dict[int, str] = {}
    return {
        name: value
        for name, value in state.items()
        if seen.setdefault(value.data_ptr(), name) == name or not value.numel()
    }


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """A moment as its weight lies: a slice where that is one."""
    if not isinstance(weight, DTensor) or not value.dim():
        return value
    return DTensor.from_local(
        value.to(weight.device), weight.device_mesh, weight.placements, run_check=False,
        shape=weight.shape, stride=weight.stride(),
    )  # fmt: skip
