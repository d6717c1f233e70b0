"""Run tokens through their experts: one function, several backends, the same numbers.

    y_t = sum over chosen experts e of g_te * down_e(silu(gate_e(x_t)) * up_e(x_t))

Weights are stacked as transformers v5 has them: gate_up [E, 2h, d] and down [E, d, h].

- `reference`: a plain loop over experts, for tests and for reading.
- `grouped`: rows sorted by expert, two grouped matrix products of the framework.
- `sorted`: the same in one autograd function, products on slices and gradients into place; on a
  CPU nothing else comes as near to one dense product of equal size.
- `batched`: gathers each slot's weights, for a handful of tokens (decoding).
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from octavo.errors import ConfigError
from torch import Tensor
from torch.nn.functional import linear, silu

from deepseekmoe.routing import count_experts

Backend = Literal["auto", "reference", "grouped", "sorted", "batched"]

#: So many tokens or fewer are decoded by gathering weights on a GPU.
FEW_TOKENS = 64


def moe_forward(
    x: Float[Tensor, "tokens width"],
    ids: Int[Tensor, "tokens slots"],
    weights: Float[Tensor, "tokens slots"],
    gate_up: Float[Tensor, "experts double_hidden width"],
    down: Float[Tensor, "experts width hidden"],
    backend: str = "auto",
) -> Float[Tensor, "tokens width"]:
    """The routed experts' weighted sum.

    Args:
        x: token states.
        ids: chosen experts; E stands for a dropped slot.
        weights: their gates.
        gate_up: gate and up projections of all experts, one over the other.
        down: down projections.
        backend: how; "auto" chooses by device, dtype and number of tokens.

    Returns:
        y in the dtype of x.

    Raises:
        ConfigError: the backend is unknown, or does not work with these tensors.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"no backend {backend!r}; there are {', '.join(get_args(Backend))}")
    if backend == "auto":
        backend = choose_backend(x, gate_up)
    elif reason := unavailable(backend, x.device, gate_up.dtype):
        raise ConfigError(f"backend {backend}: {reason}")
    if not ids.numel():  # gives weights a gradient of 0, which other processes may wait for
        backend = "sorted"
    dtype = gate_up.dtype
    if torch.is_autocast_enabled(x.device.type):  # which these products do not know of
        dtype = torch.get_autocast_dtype(x.device.type)
    y = BACKENDS[backend](x.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype))
    return y.to(x.dtype)


def choose_backend(x: Tensor, gate_up: Tensor) -> str:
    """The fastest backend that works with these tensors."""
    if x.device.type == "cpu":
        return "sorted"
    if len(x) <= FEW_TOKENS and not torch.is_grad_enabled():
        return "batched"
    return "sorted" if unavailable("grouped", x.device, gate_up.dtype) else "grouped"


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend does not work here; empty where it does."""
    if backend != "grouped":
        return ""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm; 2.10 or newer has"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "grouped_mm needs a GPU of compute capability 8.0 or more"
    elif device.type != "cpu":
        return f"grouped_mm has no kernel for {device.type}"
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return "under torch.compile grouped_mm takes bfloat16 only"
    return ""


def backend_table(device: torch.device, dtype: torch.dtype) -> list[dict[str, str]]:
    """Which backends work here, and why others do not."""
    rows = []
    for name in BACKENDS:
        reason = unavailable(name, device, dtype)
        rows.append({"backend": name, "works": "no" if reason else "yes", "reason": reason})
    return rows


def _reference(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for expert, (both, back) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = torch.where(ids == expert)
        gate, up = linear(x[token], both).chunk(2, dim=-1)
        rows = linear(silu(gate) * up, back) * weights[token, slot, None]
        total = total.index_add(0, token, rows.to(total.dtype))
    return total


def _batched(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    tokens, slots = ids.shape
    dropped = ids >= len(gate_up)
    chosen = ids.masked_fill(dropped, 0).flatten()
    rows = x.repeat_interleave(slots, dim=0)
    gate, up = torch.bmm(gate_up[chosen], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
    rows = torch.bmm(down[chosen], (silu(gate) * up).unsqueeze(-1)).view(tokens, slots, -1)
    return (rows * weights.masked_fill(dropped, 0.0)[..., None]).sum(dim=1)


def _grouped(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two grouped products; hidden widths are padded to the 16 bytes that the kernel asks for."""
    tokens, slots = ids.shape
    experts, hidden = len(gate_up), down.shape[-1]
    # a dropped slot goes to the last expert with gate 0: rows outside all groups get no gradient
    weights, ids = weights.masked_fill(ids >= experts, 0.0), ids.clamp_max(experts - 1)
    order = ids.flatten().argsort(stable=True)
    ends = count_experts(ids, experts).cumsum(0).int()
    rows = _pad(x, 1)[order // slots]
    gates = _pad(gate_up.unflatten(1, (2, hidden)), 2, 3).flatten(1, 2)
    with torch.autocast(x.device.type, enabled=False):
        both = torch.nn.functional.grouped_mm(rows, gates.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        inner = silu(gate) * up
        out = torch.nn.functional.grouped_mm(inner, _pad(down, 1, 2).transpose(1, 2), offs=ends)
    out = out[:, : x.shape[-1]]
    out = out * weights.flatten()[order, None]
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device))
    # a sum's gradient is expanded, which grouped_mm's backward refuses: indexing makes it whole
    return out.to(x.dtype)[back].view(tokens, slots, -1).sum(dim=1)


def _pad(tensor: Tensor, *dims: int) -> Tensor:
    """Zeros at the end of dimensions until they are a multiple of 16 bytes."""
    unit = max(1, 16 // tensor.element_size())
    for dim in dims:
        missing = -tensor.shape[dim] % unit
        if missing:
            shape = list(tensor.shape)
            shape[dim] = missing
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
    return tensor


class _Sorted(torch.autograd.Function):
    """Gather, product, SwiGLU, product, weighted sum, with every gradient written to its place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        tokens, slots = ids.shape
        experts, width, hidden = down.shape
        order = ids.flatten().argsort(stable=True)
        counts = count_experts(ids, experts).tolist()
        used = sum(counts)
        order = order[:used]  # dropped slots stand behind all experts
        token = order // slots
        rows = x.index_select(0, token)
        both = x.new_empty(used, 2 * hidden)
        for part, out, weight in _parts(counts, rows, both, gate_up):
            torch.mm(part, weight.T, out=out)
        gate, up = both.chunk(2, dim=-1)
        inner = silu(gate).mul_(up)
        out_rows = x.new_empty(used, width)
        for part, out, weight in _parts(counts, inner, out_rows, down):
            torch.mm(part, weight.T, out=out)
        place = torch.zeros(tokens * slots, dtype=torch.long, device=x.device)
        place[order] = torch.arange(used, device=x.device)
        place = place.view(tokens, slots)
        gates = weights.to(x.dtype).masked_fill(ids >= experts, 0.0)
        ctx.counts = counts
        ctx.save_for_backward(rows, both, inner, order, place, gates, gate_up, down)
        return _gather_sum(out_rows, place, gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, both, inner, order, place, gates, gate_up, down = ctx.saved_tensors
        counts = ctx.counts
        tokens, slots = place.shape
        dy = grads[0].index_select(0, order // slots)
        gate_of_row = gates.flatten().index_select(0, order)[:, None]
        d_inner = torch.empty_like(inner)
        for part, out, weight in _parts(counts, dy, d_inner, down):
            torch.mm(part, weight, out=out)
        d_weights = None
        if ctx.needs_input_grad[2]:
            d_weights = gates.new_zeros(tokens * slots)
            d_weights[order] = (d_inner * inner).sum(dim=-1)
            d_weights = d_weights.view(tokens, slots)
        d_down = None
        if ctx.needs_input_grad[4]:
            d_down = torch.zeros_like(down)
            for part, other, out in _parts(counts, dy, inner * gate_of_row, d_down):
                torch.mm(part.T, other, out=out)
        d_inner *= gate_of_row
        gate, up = both.chunk(2, dim=-1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, dim=-1)
        torch.mul(d_inner, silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_inner.mul_(up), gate, grad_input=d_gate)
        d_gate_up = None
        if ctx.needs_input_grad[3]:
            d_gate_up = torch.zeros_like(gate_up)
            for part, other, out in _parts(counts, d_both, rows, d_gate_up):
                torch.mm(part.T, other, out=out)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_rows = torch.empty_like(rows)
            for part, out, weight in _parts(counts, d_both, d_rows, gate_up):
                torch.mm(part, weight, out=out)
            kept = torch.ones_like(gates)
            if len(order) < tokens * slots:
                kept = kept.flatten().zero_().index_fill(0, order, 1.0).view(tokens, slots)
            d_x = _gather_sum(d_rows, place, kept)
        return d_x, None, d_weights, d_gate_up, d_down


def _gather_sum(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """Sum over slots of weights [T, K] times rows[place], in one pass."""
    if not len(rows):
        return rows.new_zeros(len(place), rows.shape[-1])
    return torch.nn.functional.embedding_bag(place, rows, mode="sum", per_sample_weights=weights)


def _parts(counts: list[int], first: Tensor, second: Tensor, stacked: Tensor) -> list[tuple]:
    """Each expert's rows of two tensors and its matrix; experts without rows are left out."""
    return [
        (one, two, matrix)
        for one, two, matrix in zip(
            first.split(counts), second.split(counts), stacked.unbind(), strict=True
        )
        if len(one)
    ]


def _sorted(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _Sorted.apply(x, ids, weights, gate_up, down)  # pyright: ignore[reportReturnType]


BACKENDS: dict[Any, Callable[..., Tensor]] = {
    "reference": _reference,
    "grouped": _grouped,
    "sorted": _sorted,
    "batched": _batched,
}
