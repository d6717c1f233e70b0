"""The layer: shared and routed experts, interventions, what is returned and what is not remembered."""

from typing import Any

import pytest
import torch
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.balance import expert_balance_loss
from deepseekmoe.layer import DeepseekMoeLayer, intervene, moe_layers, record_routing
from octavo.errors import ConfigError


def make(config, seed=0) -> Any:
    torch.manual_seed(seed)
    layer = DeepseekMoeLayer(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


def states(batch=2, seq=5, width=32):
    return torch.randn(batch, seq, width, generator=torch.Generator().manual_seed(1))


def test_hidden_is_shared_plus_gated_routed(small):
    layer = make(small())
    x = states()
    flat = x.view(-1, 32)
    scores = (flat @ layer.gate.weight.T).softmax(-1)
    wanted = layer.shared_experts(flat)
    for token, row in enumerate(scores):
        for expert in row.topk(3).indices:
            both = layer.experts.gate_up_proj[expert] @ flat[token]
            inner = torch.nn.functional.silu(both[:16]) * both[16:]
            wanted[token] = wanted[token] + row[expert] * (layer.experts.down_proj[expert] @ inner)
    assert layer(x).hidden.view(-1, 32).allclose(wanted, atol=1e-5)


def test_two_shared_experts_are_one_wide_network(small):
    layer = make(small())
    mlp, x = layer.shared_experts, states().view(-1, 32)
    halves = 0
    for rows in (slice(0, 16), slice(16, 32)):
        inner = torch.nn.functional.silu(x @ mlp.gate_proj.weight[rows].T) * (
            x @ mlp.up_proj.weight[rows].T
        )
        halves = halves + inner @ mlp.down_proj.weight[:, rows].T
    assert mlp(x).allclose(halves, atol=1e-5)


def test_without_routed_or_without_shared_experts(small):
    x = states()
    dense = make(small(n_routed_experts=0, num_experts_per_tok=0))
    assert dense(x).hidden.allclose(dense.shared_experts(x))
    assert dense(x).counts.shape == (0,)
    alone = make(small(n_shared_experts=0))
    assert not hasattr(alone, "shared_experts")
    assert alone(x).hidden.abs().sum() > 0


def test_losses_and_load_leave_padding_out(small):
    config = small(device_loss_alpha=0.1, n_devices=4, comm_loss_alpha=0.1, z_loss_alpha=0.1)
    layer = make(config).train()
    x = states()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    padded = layer(x, mask)
    other = x.clone()
    other[~mask] = 100.0
    assert padded.losses.allclose(layer(other, mask).losses)
    assert padded.counts.sum() == 8 * 3
    assert (padded.losses > 0).all()
    assert not padded.losses.allclose(layer(x).losses)


def test_the_scope_of_the_loss(small):
    x = states()
    found = {}
    for scope in ("sequence", "batch"):
        layer = make(small(aux_loss_scope=scope)).train()
        found[scope] = float(layer(x).losses[0])
        with record_routing_of(layer) as routings:
            layer(x)
        (routing,) = routings
        rows = torch.arange(2).repeat_interleave(5)
        wanted = expert_balance_loss(routing.scores, routing.ids, sequence_ids=rows, scope=scope)
        assert found[scope] == pytest.approx(float(wanted))
    assert found["sequence"] > found["batch"]  # a stricter demand


def record_routing_of(layer):
    from contextlib import contextmanager

    @contextmanager
    def only():
        with record_routing(layer) as found:
            yield found[0]

    return only()


def test_alpha_zero_works_and_costs_nothing(small):
    layer = make(small(aux_loss_alpha=0.0)).train()
    out = layer(states())
    assert out.losses.tolist() == [0, 0, 0, 0]
    out.hidden.sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0


def test_evaluation_mode_keeps_gradients(small):
    layer = make(small()).eval()
    layer(states()).hidden.sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0
    assert layer.experts.down_proj.grad.abs().sum() > 0


def test_the_router_computes_in_float32(small):
    layer = make(small()).to(torch.bfloat16)
    x = states().to(torch.bfloat16)
    _, logits = layer.gate(x.view(-1, 32))
    assert logits.dtype == torch.float32
    mimic = make(small(router_dtype="checkpoint")).to(torch.bfloat16)
    routing, logits = mimic.gate(x.view(-1, 32))
    assert logits.dtype == torch.bfloat16
    assert routing.scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        _, logits = make(small()).gate(x.float().view(-1, 32))
    assert logits.dtype == torch.float32


def test_hash_layers_need_tokens(small):
    layer = make(small(n_hash_layers=2, num_experts_per_tok=1))
    with pytest.raises(ConfigError, match="layer 0 routes by a hash of the token"):
        layer(states())
    tokens = torch.arange(10).view(2, 5)
    out = layer(states(), token_ids=tokens)
    assert out.counts.sum() == 10
    assert not hasattr(layer.gate, "weight")


def test_a_layer_of_its_own_is_ready_to_train():
    layer = DeepseekMoeLayer(DeepseekMoeConfig.preset("tiny"))
    assert float(layer.gate.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(layer.experts.down_proj.detach().std()) == pytest.approx(0.02, rel=0.1)
    out = layer(torch.randn(2, 5, 64))
    assert out.hidden.isfinite().all()


def test_capacity_drops_nothing_behind_training(small):
    full, tight = make(small()).eval(), make(small(capacity_factor=0.3)).eval()
    x = states()
    assert full(x).hidden.equal(tight(x).hidden)


def test_capacity_drops_tokens(small):
    full, tight = make(small()), make(small(capacity_factor=0.3))
    x = states()
    assert not full(x).hidden.allclose(tight(x).hidden)
    assert full(x).counts.equal(tight(x).counts)  # what they wanted, not what they got
    loose = make(small(capacity_factor=8.0))
    assert full(x).hidden.allclose(loose(x).hidden, atol=1e-6)


def test_interventions_change_and_put_back(small):
    layer = make(small()).eval()
    x = states()
    plain = layer(x).hidden
    with intervene(layer, shared=False, active=5):
        assert not layer(x).hidden.allclose(plain)
        assert layer(x).counts.sum() == 50
    with pytest.raises(RuntimeError, match="stop"), intervene(layer, disable_top=2):
        with record_routing(layer) as (routings,):
            layer(x)
        best = routings[0].scores.topk(2).indices
        assert not (routings[0].ids[:, :, None] == best[:, None, :]).any()
        raise RuntimeError("stop")
    assert layer(x).hidden.equal(plain)
    with (
        pytest.raises(ConfigError, match="3 experts a token of 8 with 6 disabled"),
        intervene(layer, disable_top=6),
    ):
        pass


def test_recording_leaves_no_hook(small):
    layer = make(small())
    with record_routing(layer) as found:
        layer(states())
        layer(states())
    assert len(found[0]) == 2
    assert not layer.gate._forward_hooks
    assert moe_layers(layer) == [layer]
