"""The routed experts, forward and backward: our backends against transformers' and the dense bound.

    python packages/deepseekmoe/benchmarks/bench_layer.py

Same tensors, same routing, outputs and gradients compared first. The bound is the single dense product
of the same FLOPs, T K rows of d by 3h, forward and backward. Rivals: transformers' own MoE block (eager
and grouped_mm) and a loop that indexes the stacked weights, as the released training code does. On a
CUDA device the released 16B layer's shape is measured in bfloat16, else small shapes in float32.
Times are the best of some tries, taken in turns.
"""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepseekmoe.experts import moe_forward
from octavo.rundir import environment, write_json
from torch import Tensor
from torch.nn.functional import linear, silu

RESULTS = Path(__file__).parent / "results" / "layer.json"

#: Tokens, width, experts, hidden width, experts a token.
CPU_SHAPES = ((2048, 64, 63, 32, 7), (2048, 256, 63, 64, 7), (2048, 256, 16, 256, 2))
GPU_SHAPES = ((16384, 2048, 64, 1408, 6), (4096, 2048, 64, 1408, 6))

#: What is aimed at, by width: times faster than the eager loop with 64 experts, share of the bound.
OVER_EAGER = {64: 2.0, 256: 3.0}
OF_THE_BOUND = {64: 0.6, 256: 0.85}


def make(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one layer and a routing by random scores."""
    tokens, width, experts, hidden, slots = shape
    torch.manual_seed(0)
    scores = torch.randn(tokens, experts, device=device).softmax(dim=-1)
    weights, ids = scores.topk(slots, dim=-1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    return {
        "x": normal(tokens, width).requires_grad_(),
        "ids": ids,
        "weights": weights.requires_grad_(),
        "gate_up": (normal(experts, 2 * hidden, width) / width**0.5).requires_grad_(),
        "down": (normal(experts, width, hidden) / hidden**0.5).requires_grad_(),
    }


def transformers_block(given: dict[str, Tensor], kind: str) -> Callable[[], Tensor]:
    """The library's own experts (DeepSeek-V2's class) on the same weights."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

    experts, width, hidden = given["down"].shape
    config: Any = SimpleNamespace(
        num_experts=experts, hidden_size=width, moe_intermediate_size=hidden, hidden_act="silu",
        _experts_implementation=kind,
    )  # fmt: skip
    block: Any = DeepseekV2Experts(config)
    block.gate_up_proj = torch.nn.Parameter(given["gate_up"].detach())
    block.down_proj = torch.nn.Parameter(given["down"].detach())
    given[f"{kind} gate_up"], given[f"{kind} down"] = block.gate_up_proj, block.down_proj
    return lambda: block(given["x"], given["ids"], given["weights"].to(given["x"].dtype))


def indexing_loop(given: dict[str, Tensor]) -> Tensor:
    """A loop over experts that indexes the stacked weights: each index's gradient is a full tensor."""
    x, ids, weights = given["x"], given["ids"], given["weights"]
    total = torch.zeros_like(x)
    for expert in range(len(given["down"])):
        token, slot = torch.where(ids == expert)
        gate, up = linear(x[token], given["gate_up"][expert]).chunk(2, dim=-1)
        rows = linear(silu(gate) * up, given["down"][expert]) * weights[token, slot, None]
        total = total.index_add(0, token, rows.to(x.dtype))
    return total


def measure(shape: tuple[int, ...], device: str, dtype: torch.dtype, tries: int) -> dict[str, Any]:
    """Rows and targets of one shape.

    Raises:
        AssertionError: two ways do not agree.
    """
    given = make(shape, device, dtype)
    tokens, width, _, hidden, slots = shape
    dy = torch.randn(tokens, width, device=device).to(dtype)
    layer = [given[key] for key in ("x", "ids", "weights", "gate_up", "down")]
    ways: dict[str, Callable[[], Tensor]] = {
        f"ours, {name}": lambda name=name: moe_forward(*layer, backend=name)
        for name in ("auto", "sorted")
    }
    ways["transformers, eager"] = transformers_block(given, "eager")
    ways["transformers, grouped_mm"] = transformers_block(given, "grouped_mm")
    ways["indexing loop"] = lambda: indexing_loop(given)
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    exact = {"reference": lambda: moe_forward(*layer, backend="reference")}
    compare(exact | ways, leaves, dy, 1e-4 if dtype == torch.float32 else 0.05)
    rows = torch.randn(tokens * slots, width, device=device).to(dtype).requires_grad_()
    matrix = torch.randn(width, 3 * hidden, device=device).to(dtype).requires_grad_()
    dz = torch.randn(tokens * slots, 3 * hidden, device=device).to(dtype)

    def run(way: Callable[[], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        way().backward(dy)

    def dense() -> None:
        rows.grad = matrix.grad = None
        (rows @ matrix).backward(dz)

    work = {name: (lambda way=way: run(way)) for name, way in ways.items()} | {"bound": dense}
    seconds = best_of(work, tries, device)
    bound = seconds.pop("bound")
    eager = seconds["transformers, eager"]
    name = "T {} d {} E {} h {} K {}".format(*shape)
    table = [
        {"shape": name, "way": way, "ms": 1e3 * value, "of the bound": bound / value,
         "over transformers eager": eager / value}
        for way, value in seconds.items()
    ]  # fmt: skip
    ours = seconds["ours, auto"]
    targets = [_target(name, "share of the dense bound", bound / ours, OF_THE_BOUND.get(width))]
    if shape[2] > 60:
        aim = OVER_EAGER.get(width)
        targets.append(_target(name, "over transformers eager", eager / ours, aim))
    return {"rows": table, "targets": targets}


def _target(shape: str, what: str, value: float, aim: float | None) -> dict[str, Any]:
    met = "" if aim is None else "met" if value >= aim else "missed"
    return {"shape": shape, "what": what, "measured": value, "aim": aim, "verdict": met}


def compare(
    ways: dict[str, Callable[[], Tensor]], leaves: list[Tensor], dy: Tensor, tolerance: float
) -> None:
    """Outputs and every gradient of all ways agree with the first way's.

    Some have weights of their own with the same values: gradients are compared in their order.
    """
    wanted: list[Tensor] = []
    for name, way in ways.items():
        for leaf in leaves:
            leaf.grad = None
        y = way()
        y.backward(dy)
        grads = [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
        found = [y.detach().float(), *grads]
        wanted = wanted or found
        for one, two in zip(found, wanted, strict=True):
            error = float((one - two).abs().max() / two.abs().max())
            assert error <= tolerance, (name, error)


def best_of(work: dict[str, Callable[[], Any]], tries: int, device: str) -> dict[str, float]:
    """Seconds of the best try of each, taken in turns."""
    best = dict.fromkeys(work, float("inf"))
    for number in range(tries + 1):
        for name, one in work.items():
            begin = time.perf_counter()
            one()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first is for warming up
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def main() -> None:
    """Measure and write the result."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    torch.set_num_threads(1)
    parts = [measure(shape, device, dtype, 20) for shape in (GPU_SHAPES if cuda else CPU_SHAPES)]
    result = {
        "rows": [row for part in parts for row in part["rows"]],
        "targets": [row for part in parts for row in part["targets"]],
        "environment": environment()
        | {"command": "python packages/deepseekmoe/benchmarks/bench_layer.py"},
    }
    write_json(RESULTS.with_name("layer-gpu.json") if cuda else RESULTS, result)


if __name__ == "__main__":
    main()
