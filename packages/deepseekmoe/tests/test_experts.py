"""Every backend gives the reference's numbers, in output and in each gradient."""

import pytest
import torch
from deepseekmoe import experts
from deepseekmoe.experts import BACKENDS, backend_table, choose_backend, moe_forward
from deepseekmoe.routing import limit_capacity, route
from octavo.errors import ConfigError
from transformers.integrations.moe import ExpertsInterface

FAST = [name for name in BACKENDS if name != "reference"]


def case(tokens=40, width=24, hidden=8, count=6, slots=2, dtype=torch.float32, seed=0, drop=None):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=draw) * scale).to(dtype).requires_grad_()

    routing = route(torch.randn(tokens, count, generator=draw), slots)
    if drop is not None:
        routing = limit_capacity(routing, drop)
    weights = routing.weights.to(dtype).requires_grad_()
    return (
        normal(tokens, width), routing.ids, weights,
        normal(count, 2 * hidden, width, scale=width**-0.5),
        normal(count, width, hidden, scale=hidden**-0.5),
    )  # fmt: skip


def run(backend, given, dy=None):
    leaves = [tensor for tensor in given if tensor.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    y = moe_forward(*given, backend=backend)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype) if dy is None else dy
    y.backward(dy)
    return [y.detach(), *[leaf.grad for leaf in leaves]]


def same(first, second, tolerance=1e-5):
    for one, two in zip(first, second, strict=True):
        assert (one - two).abs().max() <= tolerance * max(1.0, float(two.abs().max()))


def test_the_reference_is_the_formula():
    x, ids, weights, gate_up, down = case(tokens=3)
    y = moe_forward(x, ids, weights, gate_up, down, "reference")
    for token in range(3):
        total = torch.zeros(24)
        for expert, gate in zip(ids[token].tolist(), weights[token], strict=True):
            both = gate_up[expert] @ x[token]
            inner = torch.nn.functional.silu(both[:8]) * both[8:]
            total = total + gate * (down[expert] @ inner)
        assert y[token].allclose(total, atol=1e-6)


@pytest.mark.parametrize("backend", [*FAST, "auto"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"width": 30, "hidden": 7},  # no multiple of 16 bytes
        {"tokens": 1, "slots": 1},
        {"tokens": 3, "count": 16},  # experts without a token
        {"count": 2, "slots": 2},
        {"drop": 0.6},
        {"drop": 0.01, "tokens": 9},
    ],
    ids=lambda shape: "-".join(f"{key}{value}" for key, value in shape.items()) or "plain",
)
def test_backends_equal_the_reference(backend, shape):
    same(run(backend, case(**shape)), run("reference", case(**shape)))


@pytest.mark.parametrize("backend", FAST)
def test_a_sum_gives_an_expanded_gradient(backend):
    found = []
    for name in (backend, "reference"):
        given = case()
        moe_forward(*given, backend=name).sum().backward()
        found.append([leaf.grad for leaf in given if leaf.requires_grad])
    same(found[0], found[1])


@pytest.mark.parametrize("backend", FAST)
def test_strided_input_and_frozen_experts(backend):
    _x, ids, weights, gate_up, down = case()
    strided = torch.randn(24, 40).T.requires_grad_()
    frozen = gate_up.detach(), down.detach()
    found = [run(name, (strided, ids, weights, *frozen)) for name in (backend, "reference")]
    same(found[0], found[1])


@pytest.mark.parametrize("backend", ["sorted", "batched"])  # grouped_mm knows no float64
def test_gradcheck(backend):
    given = case(tokens=5, width=6, hidden=3, count=4, dtype=torch.float64, drop=0.8)
    x, ids, weights, gate_up, down = given

    def function(x, weights, gate_up, down):
        return moe_forward(x, ids, weights, gate_up, down, backend)

    assert torch.autograd.gradcheck(function, (x, weights, gate_up, down))


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_and_autocast(backend):
    exact = run("reference", case())
    half = case(dtype=torch.bfloat16)
    assert moe_forward(*half, backend=backend).dtype == torch.bfloat16
    same([one.float() for one in run(backend, half)], exact, tolerance=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_forward(*case(), backend=backend)
    assert y.dtype == torch.float32  # as the residual beside it
    assert (y - exact[0]).abs().max() < 0.1 * exact[0].abs().max()
    assert (y - exact[0]).abs().max() > 0  # it did compute in half precision


def test_no_tokens():
    x, ids, weights, gate_up, down = case(tokens=4)
    y = moe_forward(x[:0], ids[:0], weights[:0], gate_up, down)
    assert y.shape == (0, 24)


def test_unknown_backend_is_named():
    with pytest.raises(ConfigError, match="no backend 'fast'; there are auto, reference"):
        moe_forward(*case(), backend="fast")


def test_a_missing_kernel_is_told(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    with pytest.raises(ConfigError, match=r"backend grouped: torch .* has no grouped_mm"):
        moe_forward(*case(), backend="grouped")
    rows = {row["backend"]: row for row in backend_table(torch.device("cpu"), torch.float32)}
    assert rows["grouped"]["works"] == "no"
    assert "has no grouped_mm" in rows["grouped"]["reason"]
    assert rows["sorted"]["works"] == "yes"
    same(run("auto", case()), run("reference", case()))


def test_auto_decodes_a_few_tokens_by_gathering(monkeypatch):
    monkeypatch.setattr(experts, "unavailable", lambda *_: "")
    small, wide = torch.zeros(8, 16, 8), torch.zeros(8, 2**10, 2**10, device="meta")
    few = torch.zeros(2, 2, dtype=torch.long)
    with torch.no_grad():
        assert choose_backend(few, small) == "batched"
        assert choose_backend(few, wide) == "grouped"  # on a CPU one row's product is slow
        assert choose_backend(few.to("meta"), wide) == "batched"
        assert choose_backend(torch.zeros(3, 2, device="meta"), wide) == "grouped"
    assert choose_backend(few, small) == "grouped"


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("drop", [None, 0.6])
def test_implementations_of_transformers_can_be_borrowed(name, drop):
    same(run(f"transformers:{name}", case(drop=drop)), run("reference", case(drop=drop)))


def test_a_users_implementation_registered_with_transformers_is_used():
    def mine(module, x, ids, weights):
        return BACKENDS["reference"](x, ids, weights, module.gate_up_proj, module.down_proj)

    ExpertsInterface.register("mine", mine)
    try:
        same(run("transformers:mine", case()), run("reference", case()))
        assert "transformers:mine" in {row["backend"] for row in table()}
    finally:
        ExpertsInterface._global_mapping.pop("mine")
    with pytest.raises(ConfigError, match="backend transformers:mine: transformers has no such"):
        run("transformers:mine", case())


def table():
    return backend_table(torch.device("cpu"), torch.float32)


def test_the_doctor_tries_each_backend():
    rows = {row["backend"]: row for row in table()}
    assert rows["reference"]["difference"] == 0
    assert 0 <= rows["grouped"]["difference"] < 1e-5
    assert rows["transformers:grouped_mm"]["works"] == "yes"
    assert rows["transformers:sonicmoe"]["works"] == "no"
    assert rows["transformers:sonicmoe"]["reason"]


def test_the_doctor_finds_a_wrong_backend(monkeypatch):
    def wrong(*given):
        return 1.1 * BACKENDS["reference"](*given)

    monkeypatch.setitem(BACKENDS, "wrong", wrong)
    assert {row["backend"]: row for row in table()}["wrong"]["difference"] > 0.05


def test_little_is_kept_for_the_backward_pass():
    """One row of 2h a slot, not the gathered rows of d."""
    given = case(tokens=64, width=96, hidden=8, slots=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moe_forward(*given, backend="grouped")
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in kept if tensor.is_floating_point()}
    weights = given[3].numel() + given[4].numel()
    assert sum(sizes.values()) - weights <= 64 * 96 + 64 * 4 * (2 * 8) + 3 * 64 * 4
