"""Counts, FLOPs and memory against the paper's tables and against real models."""

import pytest
from deepseekmoe.accounting import (
    budget_errors,
    count_parameters,
    memory,
    tensors,
    training_flops,
)
from deepseekmoe.architecture import BASELINES, DeepseekMoeConfig
from deepseekmoe.modeling import DeepseekMoeForCausalLM


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [("2b", 2.0e9, 0.3165e9), ("16b", 16.4e9, 2.829e9), ("145b", 144.6e9, 22.2e9)],
)
def test_parameters_are_the_papers(preset, total, active):
    count = count_parameters(DeepseekMoeConfig.preset(preset))
    assert count.total == pytest.approx(total, rel=0.02)
    assert count.active == pytest.approx(active, rel=0.02)


def test_exact_totals():
    assert count_parameters(DeepseekMoeConfig.preset("16b")).total == 16_375_728_128
    assert count_parameters(DeepseekMoeConfig.preset("145b")).total == 144_620_638_208


@pytest.mark.parametrize(
    ("preset", "baseline", "length", "tera"),
    [
        ("2b", "deepseekmoe", 2048, 4.3), ("2b", "gshard", 2048, 4.3), ("2b", "dense", 2048, 2.9),
        ("2b", "switch", 2048, 2.9), ("2b", "dense-x16", 2048, 24.6),
        ("2b", "gshard-x1.5", 2048, 5.8), ("16b", None, 4096, 74.4), ("145b", None, 4096, 585.6),
    ],
)  # fmt: skip
def test_flops_are_the_papers(preset, baseline, length, tera):
    config = DeepseekMoeConfig.preset(preset)
    config = config.baseline(baseline) if baseline else config
    assert training_flops(config, length) / 1e12 == pytest.approx(tera, rel=0.025)


def test_dense_llama_shapes_follow_the_same_rule():
    """DeepSeek 7B: 30 layers of width 4096, FFN 11008, vocabulary 102400; 183.5T in Table 3."""
    dense = DeepseekMoeConfig(
        num_hidden_layers=30, hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
        first_k_dense_replace=30,
    )  # fmt: skip
    assert training_flops(dense, 4096) / 1e12 == pytest.approx(183.5, rel=0.035)


def test_a_tied_embedding_is_a_product_too():
    tied = DeepseekMoeConfig.preset("tiny", tie_word_embeddings=True)
    assert training_flops(tied, 64) == training_flops(DeepseekMoeConfig.preset("tiny"), 64)


@pytest.mark.parametrize("preset", ["2b", "tiny"])
def test_baselines_have_the_papers_budgets(preset):
    assert budget_errors(DeepseekMoeConfig.preset(preset)) == []


def test_a_wrong_budget_is_found(monkeypatch):
    monkeypatch.setitem(BASELINES, "gshard", BASELINES["gshard"] | {"routed": 20})
    assert "gshard: experts in FFNs are 20.00, not 16" in budget_errors(
        DeepseekMoeConfig.preset("tiny")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"n_routed_experts": 0, "num_experts_per_tok": 0},
        {"n_shared_experts": 0, "moe_layer_freq": 2, "num_hidden_layers": 4},
        {"n_hash_layers": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 0},
        {"bias_update_rate": 1e-3},
    ],
)
def test_counts_equal_a_real_models(small, changes):
    config = small(**changes)
    model = DeepseekMoeForCausalLM(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_active_experts_by_hand(small):
    count = count_parameters(small())
    ffn = 3 * 32 * 16
    assert count.experts == 10 * ffn
    assert count.active_experts == 5 * ffn
    assert count.total - count.active == 5 * ffn


def test_memory_of_the_released_model():
    found = memory(DeepseekMoeConfig.preset("16b"), 4096)
    assert found["weights GB"] == pytest.approx(32.75, abs=0.01)
    assert found["AdamW states GB"] == pytest.approx(262, abs=0.1)
    assert found["KV cache GB"] == pytest.approx(2 * 28 * 2048 * 4096 * 2 / 1e9)


def test_tensor_names_are_the_released_ones():
    found = tensors(DeepseekMoeConfig.preset("16b"))
    assert found["model.layers.0.mlp.gate_proj.weight"] == (10944, 2048)
    assert found["model.layers.27.mlp.gate.weight"] == (64, 2048)
    assert found["model.layers.1.mlp.experts.63.down_proj.weight"] == (2048, 1408)
    assert found["model.layers.1.mlp.shared_experts.up_proj.weight"] == (2816, 2048)
    assert len(found) == 3 + 28 * 6 + 3 + 27 * (1 + 64 * 3 + 3)
