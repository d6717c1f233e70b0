"""The language model in the ecosystem: parity, caches, packing, accumulation, checkpointing."""

from typing import Any

import pytest
import torch
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from octavo.errors import ConfigError


def make(config, seed=0, scale=0.2) -> Any:
    torch.manual_seed(seed)
    model = DeepseekMoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale)
    return model


def tokens(rows=2, length=12, seed=3, vocabulary=300):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (rows, length), generator=draw)


@pytest.mark.parametrize("seed", range(6))
def test_the_decoder_equals_transformers_own_block(seed):
    """DeepSeek-OCR-2's text model is this paper's block, written by others."""
    from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
    from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel

    draw = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    sizes = {
        "vocab_size": 120, "hidden_size": pick(16, 32), "intermediate_size": 48,
        "moe_intermediate_size": pick(8, 12), "num_hidden_layers": 3,
        "num_attention_heads": pick(2, 4), "n_shared_experts": pick(1, 2),
        "n_routed_experts": pick(6, 8), "num_experts_per_tok": pick(1, 3),
        "first_k_dense_replace": pick(0, 1), "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    ours = make(DeepseekMoeConfig(**sizes), seed).eval()
    kinds = ["sparse" if ours.config.is_moe_layer(layer) else "dense" for layer in range(3)]
    theirs = DeepseekOcr2TextModel(DeepseekOcr2TextConfig(**sizes, mlp_layer_types=kinds)).eval()
    missing, surplus = theirs.load_state_dict(ours.model.state_dict(), strict=False)
    assert (missing, surplus) == ([], [])
    ids = tokens(vocabulary=120)
    with torch.no_grad():
        one = ours.model(input_ids=ids).last_hidden_state
        two = theirs(input_ids=ids).last_hidden_state
    assert (one - two).abs().max() < 1e-5


def test_loss_is_cross_entropy_plus_every_alpha_times_its_loss(small):
    config = small(aux_loss_alpha=0.1, z_loss_alpha=0.01, first_k_dense_replace=0)
    model = make(config).train()
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    logits = out.logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert out.lm_loss.allclose(wanted)
    assert out.balance.shape == (2, 4)
    extra = 0.1 * out.balance[:, 0].sum() + 0.01 * out.balance[:, 3].sum()
    assert out.loss.allclose(wanted + extra)
    assert model.eval()(input_ids=ids, labels=ids).loss.allclose(wanted)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= 1e-5 * max(1, float(value.abs().max())), name


def test_accumulated_batches_equal_one(small):
    """With statistics of each sequence, two halves weigh as the whole, in gradients too."""
    model = make(small(aux_loss_alpha=0.5)).train()
    ids = tokens(rows=4)
    model(input_ids=ids, labels=ids).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    count = 4 * 11
    for half in (ids[:2], ids[2:]):
        model(input_ids=half, labels=half, num_items_in_batch=count).loss.backward()
    assert_same(whole, gradients(model))


def test_unequal_halves_weigh_as_the_whole(small):
    """A half with few labels has as many sequences, and as large a share of the balance loss."""
    model = make(small(aux_loss_alpha=0.5)).train()
    ids, labels = tokens(rows=4), tokens(rows=4)
    labels[:2, 3:] = -100
    count = int((labels[:, 1:] != -100).sum())
    model(input_ids=ids, labels=labels).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        out = model(
            input_ids=ids[part], labels=labels[part], num_items_in_batch=count, num_rows_in_batch=4
        )
        out.loss.backward()
    assert_same(whole, gradients(model))


def test_means_over_tokens_weigh_by_real_tokens(small):
    """A part of 3 real tokens and one of 12 give what all 15 give together."""
    model = make(small(aux_loss_alpha=0.0, z_loss_alpha=0.5)).train()
    ids, mask = tokens(rows=2), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 3:] = False
    labels = ids.masked_fill(~mask, -100)
    count = int((labels[:, 1:] != -100).sum())
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    for row in (slice(0, 1), slice(1, 2)):
        out = model(
            input_ids=ids[row], attention_mask=mask[row], labels=labels[row],
            num_items_in_batch=count, num_rows_in_batch=2, num_tokens_in_batch=15,
        )  # fmt: skip
        out.loss.backward()
    assert_same(whole, gradients(model))


def test_recomputing_layers_changes_nothing(small):
    model = make(small(aux_loss_alpha=0.5, first_k_dense_replace=0)).train()
    ids = tokens()
    plain = model(input_ids=ids, labels=ids)
    plain.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    again = model(input_ids=ids, labels=ids)
    again.loss.backward()
    assert again.counts.equal(plain.counts)
    assert again.loss.allclose(plain.loss)
    assert_same(wanted, gradients(model))


def test_mixed_precision_keeps_the_balance_loss_in_float32(small):
    model = make(small(aux_loss_alpha=0.5)).train()
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.balance.dtype == torch.float32
    exact = model(input_ids=ids, labels=ids)
    assert (out.balance - exact.balance).abs().max() < 0.05


def test_static_and_dynamic_caches_generate_what_a_full_pass_would(small):
    model = make(small()).eval()
    prompt = tokens(rows=2, length=5)
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    wanted = prompt
    with torch.no_grad():
        for _ in range(8):
            best = model(input_ids=wanted).logits[:, -1].argmax(-1, keepdim=True)
            wanted = torch.cat([wanted, best], dim=1)
    dynamic = model.generate(prompt, **options)
    assert dynamic[:, : wanted.shape[1]].equal(wanted[:, : dynamic.shape[1]])
    static = model.generate(prompt, cache_implementation="static", **options)
    assert static.equal(dynamic)


def test_left_padding_changes_no_answer(small):
    model = make(small()).eval()
    prompt = tokens(rows=1, length=5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(8) >= 3)[None].long()
    positions = (torch.arange(8) - 3).clamp_min(0)[None]
    with torch.no_grad():
        alone = model(input_ids=prompt).logits[:, -1]
        beside = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert alone.allclose(beside, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(small, attention):
    model = make(small(), scale=0.1).eval()
    model.set_attn_implementation(attention)
    first, second = tokens(1, 7, seed=1), tokens(1, 5, seed=2)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions).logits
        alone = model(input_ids=second).logits
        unaware = model(input_ids=torch.cat([first, second], 1)).logits
    assert packed[:, 7:].allclose(alone, atol=1e-5)
    assert not unaware[:, 7:].allclose(alone, atol=1e-3)


def test_hidden_states_and_attentions_are_given_on_request(small):
    model = make(small()).eval()
    model.set_attn_implementation("eager")
    out = model(input_ids=tokens(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    assert out.hidden_states[0].shape == (2, 12, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of n_routed_experts 8"),
        ({"n_group": 3}, "n_routed_experts 8 is no multiple of n_group 3"),
        ({"n_devices": 3}, "n_routed_experts 8 is no multiple of n_devices 3"),
        ({"n_group": 4, "topk_group": 1}, "1 groups of 2 experts hold fewer"),
        ({"n_group": 2, "topk_group": 3}, "topk_group 3 of n_group 2"),
        ({"num_experts_per_tok": 0}, "a routed expert is never used"),
        (
            {"n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 0},
            "neither shared",
        ),
        ({"scoring_func": "tanh"}, "scoring_func 'tanh'"),
        ({"topk_method": "best"}, "topk_method 'best'"),
        ({"aux_loss_scope": "token"}, "aux_loss_scope 'token'"),
        ({"router_dtype": "half"}, "router_dtype 'half'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"capacity_factor": 0.0}, "capacity_factor 0"),
        ({"aux_loss_alpha": -1.0}, "negative"),
        ({"n_hash_layers": 3}, "n_hash_layers 3 of 2 layers"),
        ({"n_devices": 0}, "n_devices 0: must be a whole number, 1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"moe_layer_freq": 0}, "moe_layer_freq 0"),
        ({"n_routed_experts": -8}, "n_routed_experts -8"),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    ],
)
def test_impossible_configurations_are_refused(small, changes, words):
    with pytest.raises(ConfigError, match=words):
        small(**changes)


def test_unknown_presets_and_baselines_are_refused(small):
    with pytest.raises(ConfigError, match="no preset '13b'"):
        DeepseekMoeConfig.preset("13b")
    with pytest.raises(ConfigError, match="no baseline 'mixtral'"):
        small().baseline("mixtral")
    with pytest.raises(ConfigError, match="first dense layer's width"):
        DeepseekMoeConfig.preset("16b").baseline("gshard")


@pytest.mark.parametrize("name", ["dense", "dense-x4", "hash", "switch", "gshard", "gshard-x1.5"])
def test_every_baseline_trains(name):
    config = DeepseekMoeConfig.preset("tiny", vocab_size=300).baseline(name)
    model = make(config, scale=0.1).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
