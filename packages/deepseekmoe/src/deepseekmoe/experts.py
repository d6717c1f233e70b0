"""Run tokens through their experts: one function, several backends, the same numbers.

    y_t = sum over chosen experts e of g_te * down_e(silu(gate_e(x_t)) * up_e(x_t))

Weights are stacked as transformers v5 has them: gate_up [E, 2h, d] and down [E, d, h].

- `reference`: a plain loop over experts, for tests and for reading.
- `grouped`: rows sorted by expert and the framework's grouped matrix product, forward and backward
  in one autograd function that keeps little and never waits for the device.
- `sorted`: the same with a product an expert, where the framework's kernel is missing.
- `batched`: gathers each slot's weights, for a handful of tokens (decoding).
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from octavo.errors import ConfigError
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, linear, silu

from deepseekmoe.routing import count_experts

#: Weights that are gathered at the most on a CPU, where products of one row are slow.
GATHERED_ON_CPU = 2**19

#: Before the name of one of transformers' own implementations: deepgemm, sonicmoe, or a user's.
BORROWED = "transformers:"


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
    check_backend(backend)
    if backend == "auto":
        backend = choose_backend(ids, gate_up)
    elif reason := unavailable(backend, x.device, gate_up.dtype):
        raise ConfigError(f"backend {backend}: {reason}")
    if not ids.numel():  # gives weights a gradient of 0, which other processes may wait for
        backend = "reference"
    dtype = gate_up.dtype
    if torch.is_autocast_enabled(x.device.type):  # which these products do not know of
        dtype = torch.get_autocast_dtype(x.device.type)
    given = x.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype)
    if backend.startswith(BORROWED):
        return _borrowed(backend.removeprefix(BORROWED), *given).to(x.dtype)
    return BACKENDS[backend](*given).to(x.dtype)


def check_backend(name: str) -> None:
    """Refuse a name that no backend has.

    Raises:
        ConfigError: it is such a name.
    """
    if name not in ("auto", *BACKENDS) and not name.startswith(BORROWED):
        raise ConfigError(
            f"no backend {name!r}; there are auto, {', '.join(BACKENDS)} and {BORROWED}NAME"
        )


def choose_backend(ids: Tensor, gate_up: Tensor) -> str:
    """The fastest backend that works with these tensors.

    A few tokens are decoded by gathering their experts' weights: that moves each thrice, but sorts
    nothing.
    """
    slots = ids.numel()
    if ids.device.type == "cpu":
        few = slots * gate_up[0].numel() <= GATHERED_ON_CPU
    else:
        few = 2 * slots <= len(gate_up)
    if few and not torch.is_grad_enabled():
        return "batched"
    return "sorted" if unavailable("grouped", ids.device, gate_up.dtype) else "grouped"


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend does not work here; empty where it does."""
    if backend.startswith(BORROWED):
        name = backend.removeprefix(BORROWED)
        known = name in _transformers()
        return "" if known else "transformers has no such experts implementation"
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


def backend_table(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Which backends work here, tried on a small layer, and why others do not.

    Returns:
        Rows of backend, works, the largest difference from `reference` in output and gradients relative
        to the largest value, and the reason.
    """
    rows = []
    for name in [*BACKENDS, *(BORROWED + name for name in _transformers().valid_keys())]:
        row: dict[str, Any] = {"backend": name, "works": "no", "difference": ""}
        reason = unavailable(name, device, dtype)
        if not reason:
            try:
                row |= {"works": "yes", "difference": _difference(name, device, dtype)}
            except Exception as error:  # whatever a kernel of others raises is its reason
                reason = str(error).strip().split("\n")[0]
        rows.append(row | {"reason": reason})
    return rows


def _difference(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    draw = torch.Generator().manual_seed(0)
    shapes = (48, 64), (48, 2), (8, 64, 64), (8, 64, 32)
    leaves = [
        (torch.randn(shape, generator=draw) / 8).to(device, dtype).requires_grad_()
        for shape in shapes
    ]
    x, weights, gate_up, down = leaves
    ids = torch.randn(48, 8, generator=draw).topk(2).indices.to(device)
    found = []
    for name in ("reference", backend):
        y = moe_forward(x, ids, weights, gate_up, down, name)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    return max(
        float((one - two).abs().max() / one.abs().max()) for one, two in zip(*found, strict=True)
    )


def _reference(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for expert, (both, back) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = torch.where(ids == expert)
        gate, up = linear(x[token], both).chunk(2, dim=-1)
        rows = linear(silu(gate) * up, back) * weights[token, slot, None]
        total = total.index_add(0, token, rows.to(total.dtype))
    return total


def _transformers() -> Any:
    """The library's implementations by name; importing them takes seconds."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def _borrowed(
    name: str, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """One of transformers' implementations, on what it reads of a module of experts."""

    def apply_gate(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return silu(gate) * up

    module: Any = SimpleNamespace(
        gate_up_proj=gate_up, down_proj=down, num_experts=len(down), act_fn=silu,
        hidden_dim=x.shape[1], intermediate_dim=down.shape[-1],
        has_gate=True, has_bias=False, has_post_expert_norm=False,
        is_transposed=False, is_concatenated=True, _is_expert_parallel=True,
        _apply_gate=apply_gate, config=SimpleNamespace(hidden_act="silu"),
    )  # fmt: skip
    weights = weights.masked_fill(ids >= len(down), 0.0)
    return _transformers()[name](module, x, ids, weights.to(x.dtype))


def _batched(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    tokens, slots = ids.shape
    dropped = ids >= len(gate_up)
    chosen = ids.masked_fill(dropped, 0).flatten()
    rows = x.repeat_interleave(slots, dim=0)
    gate, up = torch.bmm(gate_up[chosen], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
    rows = torch.bmm(down[chosen], (silu(gate) * up).unsqueeze(-1)).view(tokens, slots, -1)
    return (rows * weights.masked_fill(dropped, 0.0)[..., None]).sum(dim=1)


class _Products(NamedTuple):
    """Products of rows sorted by expert with each expert's own matrix.

    Attributes:
        rows: [R, a] and [E, a, b], where experts' rows end, to [R, b].
        matrices: [R, a] and [R, b], where experts' rows end, to [E, a, b]: the sum over an expert's rows
            of their outer products; 0 for an expert without rows.
    """

    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    matrices: Callable[[Tensor, Tensor, Tensor], Tensor]


class _Experts(torch.autograd.Function):
    """Gather, product, SwiGLU, product, weighted sum, and every gradient by the same two products.

    What is kept for the backward pass is one row of 2h a slot; gathered rows are gathered anew.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
        products: _Products,
    ) -> Tensor:  # fmt: skip
        slots = ids.shape[1]
        order = _by_expert(ids)
        ends = count_experts(ids, len(down)).cumsum(0).int()
        place = torch.empty_like(order).index_copy(0, order, _numbers(order)).view_as(ids)
        both = products.rows(x.index_select(0, order // slots), gate_up.transpose(1, 2), ends)
        gate, up = both.chunk(2, dim=-1)
        out = products.rows(silu(gate).mul_(up), down.transpose(1, 2), ends)
        ctx.products = products
        ctx.save_for_backward(x, both, order, place, ends, weights, gate_up, down)
        return embedding_bag(place, out, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, both, order, place, ends, weights, gate_up, down = ctx.saved_tensors
        products: _Products = ctx.products
        _, _, need_weights, need_gate_up, need_down, _ = ctx.needs_input_grad
        token = order // place.shape[1]
        dy = grads[0].index_select(0, token)
        gate_of_row = weights.flatten()[order, None]
        gate, up = both.chunk(2, dim=-1)
        inner = silu(gate)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, dim=-1)
        d_inner = products.rows(dy, down, ends)
        d_up.copy_(d_inner).mul_(inner)
        d_weights = None
        if need_weights:  # a slot's gate multiplies its row: their product's sum
            d_weights = (d_up * up).sum(dim=-1)[place.flatten()].view_as(place)
        d_down = None
        if need_down:
            d_down = products.matrices(dy, inner.mul_(up).mul_(gate_of_row), ends)
        d_inner.mul_(up).mul_(gate_of_row)
        d_gate.copy_(torch.ops.aten.silu_backward(d_inner, gate))
        d_up.mul_(gate_of_row)
        d_gate_up = (
            products.matrices(d_both, x.index_select(0, token), ends) if need_gate_up else None
        )
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = embedding_bag(place, products.rows(d_both, gate_up, ends), mode="sum")
        return d_x, None, d_weights, d_gate_up, d_down, None


def _by_expert(ids: Tensor) -> Tensor:
    """The order of all slots by expert, those of an expert in the order of their tokens."""
    flat = ids.flatten()
    if (
        flat.device.type == "cpu" and not torch.compiler.is_compiling()
    ):  # numpy sorts 16 bits by radix
        return torch.from_numpy(flat.to(torch.int16).numpy().argsort(kind="stable"))
    return flat.argsort(stable=True)


def _numbers(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def _each_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    out = rows.new_empty(len(rows), matrices.shape[2])
    counts = _counts(ends)
    for one, result, matrix in zip(
        rows.split(counts), out.split(counts), matrices.unbind(), strict=True
    ):
        if len(one):
            torch.mm(one, matrix, out=result)
    return out


def _each_matrices(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    out = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    counts = _counts(ends)
    for one, two, result in zip(left.split(counts), right.split(counts), out.unbind(), strict=True):
        if len(one):
            torch.mm(one.T, two, out=result)
    return out


def _counts(ends: Tensor) -> list[int]:
    return torch.diff(ends, prepend=ends.new_zeros(1)).tolist()


def _grouped_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(rows, matrices, offs=ends)


def _grouped_matrices(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(left.T, right, offs=ends)


def _sorted(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return _with(_Products(_each_rows, _each_matrices), x, ids, weights, gate_up, down)


def _grouped(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """With the framework's kernel; widths are padded to the 16 bytes that it asks for."""
    width, hidden = x.shape[1], down.shape[-1]
    gates = _pad(gate_up.unflatten(1, (2, hidden)), 2, 3).flatten(1, 2)
    products = _Products(_grouped_rows, _grouped_matrices)
    y = _with(products, _pad(x, 1), ids, weights, gates, _pad(down, 1, 2))
    return y[:, :width]


def _with(
    products: _Products, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    # a dropped slot goes to the last expert with gate 0: so all rows belong to one
    dropped = ids >= len(down)
    weights = weights.to(x.dtype).masked_fill(dropped, 0.0)
    ids = ids.masked_fill(dropped, len(down) - 1)
    with torch.autocast(x.device.type, enabled=False):
        return _Experts.apply(x, ids, weights, gate_up, down, products)  # pyright: ignore


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


BACKENDS: dict[Any, Callable[..., Tensor]] = {
    "reference": _reference,
    "grouped": _grouped,
    "sorted": _sorted,
    "batched": _batched,
}
