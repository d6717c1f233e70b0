"""The Fisher diagonal on clean data at several points on the way from w_init to w_ft."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from octavo import console
from octavo.errors import ConfigError, ModelError
from octavo.rundir import RunDir, atomic
from octavo.runtime import Runtime, is_main, rank, world_size
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finepurify.config import FisherConfig
from finepurify.data import Item, batches
from finepurify.fisher import diagonal
from finepurify.hutchinson import hessian_diagonal
from finepurify.models import place
from finepurify.pairing import WeightPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FILE = "fisher.safetensors"


def parameters_of(model: "PreTrainedModel", pair: WeightPair) -> dict[str, str]:
    """The pair's tensors by the names of the model's parameters.

    Raises:
        ModelError: a compared tensor is no parameter of the loaded model.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {pair.model_name(name): name for name in pair.names}
    lost = [name for parameter, name in names.items() if parameter not in own]
    if lost:
        raise ModelError(
            f"{pair.suspect.source}: {lost[0]} is no parameter of {type(model).__name__} as loaded "
            f"({len(lost)} such); leave them out with --exclude"
        )
    return names


def fisher(
    pair: WeightPair,
    model: "PreTrainedModel",
    items: Sequence[Item],
    pad: int,
    config: FisherConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> dict[str, Tensor]:
    """H_i on clean data, averaged over the points; a killed run goes on with the next one.

    Under torchrun each process takes its share of the rows, and all get the mean.

    Args:
        pair: the two models.
        model: the suspect, loaded in float32; left as it was.
        items: clean rows, from `data.encode`.
        pad: the padding token's id.
        config: kind, points, engine.
        run: gets a file a point, and `fisher.safetensors`, their mean.
        runtime: device and seed; the arithmetic is float32 whatever its dtype.

    Returns:
        float32, by the pair's names, each of its tensor's shape.

    Raises:
        ConfigError: there are fewer rows than processes, or the run holds another diagonal.
    """
    runtime.wait_for_everyone()
    if len(items) < world_size():
        raise ConfigError(f"{len(items)} rows for {world_size()} processes: start fewer")
    about = _about(pair, items, config, runtime)
    if (run.path / FILE).exists():
        _same_subject(run.path / FILE, about)
        return load_file(run.path / FILE)
    names = parameters_of(model, pair)
    files = []
    for number, point in enumerate(config.points):
        file = run.path / f"fisher-{number}.safetensors"
        files.append(file)
        if not file.exists():
            place(model, names, lambda name, at=point: between(pair, name, at))
            log.info("Fisher diagonal at %g of the way, %d rows", point, len(items))
            found = _shared(model, items, pad, config, runtime)
            _save(file, {names[key]: value for key, value in found.items() if key in names})
        runtime.wait_for_everyone()
    place(model, names, lambda name: pair.read(name).suspect)
    if is_main():
        mean = {name: _mean_of(files, name) for name in pair.names}
        # one entry: safetensors writes several in any order, and a file would not be the same twice
        _save(run.path / FILE, mean, {"fisher": json.dumps(about)})
        for file in files:
            file.unlink()
    runtime.wait_for_everyone()
    return load_file(run.path / FILE)


def _about(
    pair: WeightPair, items: Sequence[Item], config: FisherConfig, runtime: Runtime
) -> dict[str, Any]:
    """What a diagonal is of: its kind, and a hash of the rows and of what the two models are."""
    content = hashlib.sha256(json.dumps(items, sort_keys=True).encode())
    content.update(f"{pair.numel} {pair.moved()} {pair.names} {runtime.seed}".encode())
    kind = {"kind": config.fisher, "points": list(config.points), "rows": len(items)}
    return kind | {"hash": content.hexdigest()}


def _same_subject(file: Path, about: dict[str, Any]) -> None:
    with safe_open(file, "pt") as stored:
        known = json.loads((stored.metadata() or {}).get("fisher", "null"))
    if known != about:
        raise ConfigError(f"{file}: is of other rows, models or points; choose another --out")


def between(pair: WeightPair, name: str, point: float) -> Tensor:
    """w_init + point * delta in float32."""
    both = pair.read(name)
    return torch.lerp(both.init.float(), both.suspect.float(), point)


def _shared(
    model: "PreTrainedModel",
    items: Sequence[Item],
    pad: int,
    config: FisherConfig,
    runtime: Runtime,
) -> dict[str, Tensor]:
    """The diagonal at the model's present weights, over all processes' rows.

    Hutchinson's keeps its sign here: what is below zero is noise, which a mean takes away.
    """
    device = runtime.torch_device()
    model.to(cast(Any, device))
    own = items[rank() :: world_size()]
    rows = console.progress(
        _on(device, own, config.fisher_batch_size, pad), "Fisher", unit="batches"
    )
    if config.fisher == "hutchinson":
        found = hessian_diagonal(model, rows, probes=config.probes, seed=runtime.seed)
    else:
        # another process draws other labels
        seed = runtime.seed + 1000 * rank()
        found = diagonal(model, rows, kind=config.fisher, engine=config.engine, seed=seed)
    if world_size() > 1:
        from torch import distributed

        for value in found.values():
            value.mul_(len(own) / len(items))
            distributed.all_reduce(value)
    return {name: value.cpu() for name, value in found.items()}


def _on(
    device: torch.device, items: Sequence[Item], size: int, pad: int
) -> list[dict[str, Tensor]]:
    return [
        {name: value.to(device) for name, value in batch.items()}
        for _, batch in batches(items, size, pad)
    ]


def _save(file: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    if is_main():
        with atomic(file) as temporary:
            save_file(
                {name: value.contiguous() for name, value in tensors.items()}, temporary, about
            )


def _mean_of(files: Sequence[Path], name: str) -> Tensor:
    values = []
    for file in files:
        with safe_open(file, "pt") as stored:
            values.append(stored.get_tensor(name))
    return torch.stack(values).mean(0).clamp(min=0)
