"""Exact selection of the smallest values over many tensors, without putting them together.

Non-negative floats sort like their bits read as integers. So one histogram over the upper 16 bits tells
which of 65,536 bins holds the count-th smallest value, a second one over the lower 16 bits of that bin's
values tells which it is: two streaming passes, the memory of one tensor, and a result that does not
depend on how the values lie over tensors or processes. A sort or a k-th value needs them side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from octavo.runtime import rank, world_size
from torch import Tensor

BINS = 1 << 16

#: The bin of infinity; above it lie NaN and, having their sign bit set, negative values.
INFINITE, NEGATIVE_ZERO = 0x7F80, 0x8000

#: Values in one step of a pass: they and their bins stay in the cache.
STEP = 1 << 19

#: Gives a tensor's values by its name; asked up to three times for each, with the same answer.
Values = Callable[[str], Tensor]

#: Adds an int64 tensor up over all processes, in place: `torch.distributed.all_reduce`.
Reduce = Callable[[Tensor], object]

Scope = Literal["global", "tensor"]


@dataclass(frozen=True)
class Cut:
    """Where the smallest `count` values end.

    Attributes:
        value: the count-th smallest; everything below it is in.
        ties: how many of the values equal to it are in, over all processes.
    """

    value: float
    ties: int


def threshold(
    names: Sequence[str], values: Values, count: int, *, reduce: Reduce | None = None
) -> Cut:
    """The count-th smallest value over all tensors.

    Args:
        names: of the tensors (of this process's shards of them).
        values: gives each: float32, non-negative, infinity allowed.
        count: how many are to be in, from 0 (the cut is then 0 with no ties) to all.
        reduce: where each process holds a part of the values: adds histograms up over processes.

    Raises:
        ValueError: a value is NaN or negative, a tensor is not float32, or count is out of range.
    """
    upper = _histogram(names, values, reduce)
    total = int(upper.sum())
    if not 0 <= count <= total:
        raise ValueError(f"count {count}: there are {total} values to choose from")
    if count == 0:
        return Cut(0.0, 0)
    high, count = _bin_of(upper, count)
    low, count = _bin_of(_histogram(names, values, reduce, within=high), count)
    bits = torch.tensor((high << 16) | low, dtype=torch.int32)
    return Cut(bits.view(torch.float32).item(), count)


def masks(
    names: Sequence[str],
    values: Values,
    count: int,
    *,
    scope: Scope = "global",
    reduce: Reduce | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Which values are the count smallest, tensor by tensor.

    Of equal values the first are in: by process, then in the order of `names`, then by index.

    Args:
        names: as for `threshold`.
        values: as for `threshold`.
        count: how many are in, exactly.
        scope: `global` takes the smallest of all; `tensor` as large a share of each tensor, rounded
            so that the total is `count` (all processes then hold the same names).
        reduce: as for `threshold`.

    Yields:
        Each name with a boolean tensor of the values' shape, true where they are in.

    Raises:
        ValueError: as for `threshold`.
    """
    for group, share in _groups(names, values, count, scope, reduce):
        cut = threshold(group, values, share, reduce=reduce)
        left = cut.ties - _ties_before(group, values, cut, reduce)
        for name in group:
            tensor = values(name)
            flat = tensor.reshape(-1)
            keep = flat < cut.value
            if left > 0:
                equal = (flat == cut.value).nonzero()[:left, 0]
                keep[equal] = True
                left -= len(equal)
            yield name, keep.view(tensor.shape)


def _groups(
    names: Sequence[str], values: Values, count: int, scope: Scope, reduce: Reduce | None
) -> Iterator[tuple[Sequence[str], int]]:
    """The sets of tensors that are chosen from together, each with how many of its values are in."""
    if scope == "global":
        yield names, count
        return
    sizes = torch.tensor([values(name).numel() for name in names], dtype=torch.int64)
    if reduce is not None:
        reduce(sizes)
    yield from zip(([name] for name in names), shares(sizes.tolist(), count), strict=True)


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """As large a share of each size, rounded so that the total is `count`.

    Raises:
        ValueError: count is out of range.
    """
    if not 0 <= count <= sum(sizes):
        raise ValueError(f"count {count}: there are {sum(sizes)} values to choose from")
    total, seen, found = max(1, sum(sizes)), 0, []
    for size in sizes:
        before, seen = seen, seen + size
        found.append(count * seen // total - count * before // total)
    return found


def _ties_before(names: Sequence[str], values: Values, cut: Cut, reduce: Reduce | None) -> int:
    """How many values equal to the cut the processes before this one hold."""
    if reduce is None:
        return 0
    ties = torch.zeros(world_size(), dtype=torch.int64)
    ties[rank()] = sum(int((values(name) == cut.value).sum()) for name in names)
    reduce(ties)
    return int(ties[: rank()].sum())


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin of the count-th smallest value, and the how-manieth in it that is."""
    sums = histogram.cumsum(0)
    place = int(torch.searchsorted(sums, count))
    return place, count - int(sums[place] - histogram[place])


def _histogram(
    names: Sequence[str], values: Values, reduce: Reduce | None, within: int | None = None
) -> Tensor:
    """How many values have each upper 16 bits, or each lower 16 bits within one such bin: [65536]."""
    found = torch.zeros(BINS, dtype=torch.int64)
    for name in names:
        tensor = values(name)
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name}: values are {tensor.dtype}, must be float32")
        own = torch.zeros(BINS, dtype=torch.int64, device=tensor.device)
        for part in tensor.detach().reshape(-1).split(STEP if tensor.is_cpu else 1 << 26):
            bits = part.view(torch.int32)
            upper = bits >> 16
            chosen = upper if within is None else bits[upper == within]
            own += torch.bincount(chosen & 0xFFFF, minlength=BINS)
        own = own.cpu()
        if within is None and own[INFINITE:].any():
            _check(name, tensor)
        found += own
    # -0.0 is the value zero, though its bits say otherwise
    if within is None:
        found[0] += found[NEGATIVE_ZERO]
        found[NEGATIVE_ZERO] = 0
    elif within == 0:
        for tensor in map(values, names):
            found[0] += ((tensor == 0) & tensor.signbit()).sum().cpu()
    if reduce is not None:
        reduce(found)
    return found


def _check(name: str, tensor: Tensor) -> None:
    """Refuse what must not be in a tensor that has values at or above infinity's bin."""
    for bad, what in ((tensor.isnan(), "NaN"), (tensor < 0, "negative")):
        if count := int(bad.sum()):
            raise ValueError(f"{name}: {count} of {tensor.numel()} values are {what}")
