"""Send tokens to the processes that hold their experts, and bring back what those make of them.

Process p of n holds experts p E/n to (p + 1) E/n. Rows are sorted by expert, counts are exchanged, then
rows go there and back in two all-to-alls whose backward passes are the same exchanges reversed. No row
is padded or dropped, and a process without rows takes part all the same.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single

from deepseekmoe.experts import moe_forward
from deepseekmoe.routing import Routing, count_experts


class _Exchange(torch.autograd.Function):
    """Rows to other processes: `give[p]` of them, in this order, to p; `take[p]` come from p."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, give: list[int], take: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.back = take, give, group
        got = rows.new_empty(sum(take), *rows.shape[1:])
        all_to_all_single(got, rows.contiguous(), take, give, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return exchange(grads[0], *ctx.back), None, None, None


def exchange(
    rows: Float[Tensor, "rows width"], give: list[int], take: list[int], group: ProcessGroup
) -> Float[Tensor, "taken width"]:
    """Swap rows with the other processes of a group; differentiable.

    Args:
        rows: those for the first process first.
        give: how many go to each process.
        take: how many come from each; its `give` for this one.
        group: all its processes call this together.

    Returns:
        The rows that came, those of the first process first.
    """
    return _Exchange.apply(rows, give, take, group)  # pyright: ignore[reportReturnType]


def dispatch(
    x: Float[Tensor, "tokens width"],
    routing: Routing,
    gate_up: Float[Tensor, "local_experts double_hidden width"],
    down: Float[Tensor, "local_experts width hidden"],
    group: ProcessGroup,
    backend: str = "auto",
) -> Float[Tensor, "tokens width"]:
    """The routed experts' weighted sum, of experts that a group of processes holds together.

    The same numbers as `moe_forward` of all experts. A slot is a row: 2 T K' d values go to and fro.

    Args:
        x: this process's token states; there may be none.
        routing: of these tokens among all E experts.
        gate_up: this process's experts, E / n of them.
        down: likewise.
        group: the n processes; all of them call this together.
        backend: how each computes its experts, as in `moe_forward`.
    """
    tokens, slots = routing.ids.shape
    local = len(gate_up)
    dtype = gate_up.dtype
    if torch.is_autocast_enabled(x.device.type):  # fewer bytes travel
        dtype = torch.get_autocast_dtype(x.device.type)
    counts = count_experts(routing.ids, local * group.size())
    arriving = torch.empty_like(counts)
    all_to_all_single(arriving, counts, group=group)
    give = counts.view(-1, local).sum(dim=1).tolist()
    take = arriving.view(-1, local).sum(dim=1).tolist()

    order = routing.ids.flatten().argsort(stable=True)[: sum(give)]  # dropped slots stand behind
    rows = exchange(x.to(dtype)[order // slots], give, take, group)
    experts = torch.arange(local, device=x.device).repeat(group.size())
    ids = experts.repeat_interleave(arriving, output_size=sum(take))[:, None]
    made = moe_forward(rows, ids, torch.ones_like(ids, dtype=dtype), gate_up, down, backend)
    made = exchange(made, take, give, group)

    by_slot = made.new_zeros(tokens * slots, x.shape[-1]).index_copy(0, order, made)
    weights = routing.weights.masked_fill(routing.ids >= local * group.size(), 0.0)
    y = (by_slot.view(tokens, slots, x.shape[-1]) * weights[..., None].to(made.dtype)).sum(dim=1)
    return y.to(x.dtype)
