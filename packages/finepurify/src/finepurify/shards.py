"""Selection by several processes: each scores a part of the tensors, and all get every mask.

Thresholds agree since histograms are added up over the processes; of equal values those of an earlier
process are in first, and its tensors are the earlier ones: the masks are those of one process, bit for
bit. What costs is scoring (three passes over weights and curvature), and that is what is shared.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from octavo.runtime import rank, world_size
from torch import Tensor

from finepurify import select
from finepurify.select import Scope, Values

T = TypeVar("T")


def from_first(value: T) -> T:
    """The first process's value on all of them: what decides must be the same everywhere."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def owners(sizes: Sequence[int], processes: int) -> list[int]:
    """Which process scores each tensor: runs of neighbours, of about equal size in all."""
    total, before, found = max(1, sum(sizes)), 0, []
    for size in sizes:
        found.append(min(processes - 1, (2 * before + size) * processes // (2 * total)))
        before += size
    return found


def masks(
    shapes: dict[str, tuple[int, ...]], values: Values, count: int, scope: Scope = "global"
) -> dict[str, Tensor]:
    """Which values are the count smallest: `select.masks`, its work shared by torchrun's processes.

    Args:
        shapes: of the tensors by name, in their order; the same on all processes.
        values: gives a tensor's; here asked for those alone that are this process's to score.
        count: how many are in.
        scope: see `select.masks`.

    Returns:
        [shape of the tensor] of bool by name, all of them on every process.

    Raises:
        ValueError: as `select.threshold`.
    """
    names, processes = list(shapes), world_size()
    if processes == 1:
        return dict(select.masks(names, values, count, scope=scope))
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    owner = dict(zip(names, owners(sizes, processes), strict=True))
    own = [name for name in names if owner[name] == rank()]
    if scope == "global":
        found = dict(select.masks(own, values, count, reduce=_add_up))
    else:
        share = dict(zip(names, select.shares(sizes, count), strict=True))
        found = {name: next(select.masks([name], values, share[name]))[1] for name in own}
    return {name: _shown(owner[name], found.get(name), shape) for name, shape in shapes.items()}


def _add_up(tensor: Tensor) -> None:
    """Add a tensor up over all processes, in place, wherever their backend wants it to lie."""
    moved = tensor.to(_device())
    torch.distributed.all_reduce(moved)
    tensor.copy_(moved)


def _shown(owner: int, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A mask as its owner has it."""
    carrier = torch.empty(shape, dtype=torch.uint8) if mask is None else mask.to(torch.uint8)
    carrier = carrier.to(_device())
    torch.distributed.broadcast(carrier, owner)
    return carrier.bool().cpu()


def _device() -> Any:
    from accelerate import PartialState

    return PartialState().device
