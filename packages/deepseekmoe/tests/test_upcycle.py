"""Dense models upcycled: their logits kept where the construction promises it."""

from typing import Any

import pytest
import torch
from deepseekmoe import hub
from deepseekmoe.accounting import count_parameters
from deepseekmoe.layer import moe_layers
from deepseekmoe.upcycle import load_dense, upcycle
from octavo.errors import ConfigError, ModelError
from octavo.tiny import Shape, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def llama(**changes) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@torch.no_grad()
def gap(dense, model):
    """Largest difference of logits, which are several units wide here."""
    wanted = dense(input_ids=IDS).logits
    assert wanted.std() > 1
    return float((model(input_ids=IDS).logits - wanted).abs().max())


def equal_gates(model):
    """The same experts chosen, each with gate 1 / N'."""

    def equal(_gate, _inputs, output):
        routing, logits = output
        weights = torch.full_like(routing.weights, 1 / model.config.n_routed_experts)
        return routing._replace(weights=weights), logits

    for layer in moe_layers(model):
        layer.gate.register_forward_hook(equal)
    return model


@pytest.mark.parametrize(
    ("routed", "shared", "active", "pieces"),
    [
        (8, 0, 2, 1), (8, 2, 6, 1), (7, 1, 1, 1), (8, 3, 8, 1),  # copies
        (16, 0, 8, 4), (8, 0, 8, 4), (12, 4, 4, 4), (8, 4, 4, 2),  # whole FFNs are active
    ],
)  # fmt: skip
def test_the_first_logits_are_the_dense_models(routed, shared, active, pieces):
    dense = llama()
    new = upcycle(dense, routed=routed, shared=shared, active=active, granularity=pieces)
    assert gap(dense, new) < 2e-3  # gates differ by 1e-4 or so
    assert gap(dense, equal_gates(new)) < 1e-4


def test_pieces_that_make_no_whole_ffn_are_close_in_the_mean():
    """15 routed and 1 shared quarter, 7 active: 8 quarters answer, not each of two FFNs whole."""
    dense = llama()
    close = gap(dense, upcycle(dense, routed=15, shared=1, active=7, granularity=4))
    unscaled: Any = upcycle(dense, routed=15, shared=1, active=7, granularity=4)
    for layer in unscaled.model.layers:
        layer.mlp.experts.down_proj.data /= 15 * 4 / 8
    assert 1e-3 < close < gap(dense, unscaled)


def test_groups_of_pieces_add_up_to_the_ffn_and_differ():
    dense = llama()
    model: Any = upcycle(dense, routed=8, shared=0, active=4, granularity=4)
    bank, ffn = model.model.layers[0].mlp.experts, dense.model.layers[0].mlp
    gate, up = bank.gate_up_proj.chunk(2, dim=1)
    assert bank.down_proj.shape == (8, 32, 16)
    for group in (slice(0, 4), slice(4, 8)):
        rows = gate[group].flatten(0, 1)
        order = [int((ffn.gate_proj.weight == row).all(dim=1).nonzero()) for row in rows]
        assert sorted(order) == list(range(64))
        factor = (up[group].flatten(0, 1) / ffn.up_proj.weight[order]).flatten()
        assert factor.allclose(torch.tensor((8 * 4 / 4) ** 0.5), atol=1e-4)
    assert not gate[:4].equal(gate[4:])
    weight = model.model.layers[0].mlp.gate.weight
    assert weight[:4].equal(weight[:1].expand(4, -1))
    assert not weight[4].equal(weight[0])


@torch.no_grad()
def test_tokens_choose_several_groups_at_the_start():
    model: Any = upcycle(llama(), routed=8, shared=0, active=2, granularity=1)
    assert (model(input_ids=IDS).counts > 0).sum() > 8


def test_counts():
    model: Any = upcycle(llama(), routed=14, shared=2, active=6, granularity=4, dense_layers=1)
    config = model.config
    assert (config.moe_intermediate_size, config.first_k_dense_replace) == (16, 1)
    count = count_parameters(config)
    assert count.total == sum(weight.numel() for weight in model.parameters())
    assert count.experts == 4 * 3 * 32 * 64  # as many as four FFNs
    assert count.active_experts == 2 * 3 * 32 * 64


def test_a_dense_model_of_this_package_is_one_too(small):
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    torch.manual_seed(0)
    config = small(initializer_range=0.2, first_k_dense_replace=0).baseline("dense")
    dense = DeepseekMoeForCausalLM(config).eval()
    assert gap(dense, equal_gates(upcycle(dense, routed=4, shared=1, active=2))) < 1e-4


def test_tied_embeddings_and_scaled_positions_are_kept(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    dense = llama(tie_word_embeddings=True, rope_parameters=rope)
    new = equal_gates(upcycle(dense, routed=4, shared=0, active=2))
    assert gap(dense, new) < 1e-4
    new.save_pretrained(tmp_path / "new")
    assert gap(dense, equal_gates(hub.load(tmp_path / "new", tokenizer=False)[0])) < 1e-4


@pytest.fixture
def folder(tmp_path, chats):
    dense = llama()
    tokenizer = make_tokenizer(
        [chats.read_text(encoding="utf-8")], Shape(kind="llama", alphabet="bpe", vocabulary=300)
    )
    hub.save(tmp_path / "dense", dense.bfloat16(), tokenizer)
    return tmp_path / "dense"


def test_upcycle_load_and_tune_by_commands(command, folder, chats, tmp_path):
    out = tmp_path / "moe"
    code, _, err = command(
        "upcycle", folder, "--out", out, "--routed-experts", "8", "--shared-experts", "0",
        "--active-experts", "4", "--granularity", "2",
    )  # fmt: skip
    assert code == 0, err
    hub.check_folder(out)
    model, tokenizer = hub.load(out, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert tokenizer is not None
    code, _, err = command("upcycle", folder, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err
    code, _, err = command(
        "sft", out, "--data", chats, "--out", tmp_path / "run", "--epochs", "1", "--length", "64"
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--granularity", "5"], "--granularity 5: must divide the FFN's width 64"),
        (["--granularity", "0"], "--granularity 0: must divide"),
        (["--granularity", "4"], "2 shared and 64 routed experts"),
        (["--routed-experts", "0"], "there must be routed ones"),
        (["--routed-experts", "2"], "num_experts_per_tok 6 of n_routed_experts 2"),
    ],
)
def test_numbers_that_do_not_fit_are_told_in_one_line(command, folder, tmp_path, options, words):
    code, out, err = command("upcycle", folder, "--out", tmp_path / "moe", *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not (tmp_path / "moe").exists()


def test_what_is_no_dense_llama_is_refused(command, trained, tmp_path, small):
    from transformers import GPT2Config, GPT2LMHeadModel

    code, _, err = command("upcycle", trained / "model", "--out", tmp_path / "moe")
    assert (code, err.count("\n")) == (2, 1)
    assert "without routed experts" in err
    GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="model_type 'gpt2' cannot be upcycled"):
        load_dense(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="mlp_bias"):
        upcycle(llama(mlp_bias=True))
    with pytest.raises(ConfigError, match="hidden_act 'gelu'"):
        upcycle(llama(hidden_act="gelu"))
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    shapes = {"n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 1}
    mixed = DeepseekMoeForCausalLM(small(**shapes, moe_intermediate_size=48))
    with pytest.raises(ModelError, match="several widths: 48, 64"):
        upcycle(mixed)
