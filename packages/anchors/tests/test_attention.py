"""Instrumented attention on every family equals the model's own, and leaves no trace."""

import pytest
import torch
from anchors.attention import Edit, instrument
from anchors.blocking import block, edges_before, isolated
from anchors.prompts import collate
from octavo.errors import ConfigError, ModelError

NAMES = [
    "gpt2",
    "gptj",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
]


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch.inputs(), use_cache=False).logits


def watching(store):
    def watch(layer, weights, value, output):
        store[layer] = weights
        return output

    return watch


@pytest.mark.parametrize("name", NAMES)
def test_a_watched_model_is_itself(family, prompts, name):
    model, batch, seen = family(name), collate(prompts, side="right"), {}
    before = logits_of(model, batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(**batch.inputs(), use_cache=False, output_attentions=True).attentions
    model = family(name)
    implementation = model.config._attn_implementation
    state = [set(vars(module)) for module in model.modules()]
    with instrument(model, Edit(after=watching(seen))):
        watched = logits_of(model, batch)
    real = batch.attention_mask
    assert torch.allclose(before[real], watched[real], atol=1e-5)
    for layer, weights in enumerate(own):
        rows = real[:, None, :, None].expand_as(weights)
        assert torch.allclose(weights[rows], seen[layer][rows], atol=1e-6)
    assert model.config._attn_implementation == implementation
    assert torch.allclose(logits_of(model, batch), before, atol=1e-6)
    assert [set(vars(module)) for module in model.modules()] == state


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_is_the_same(family, prompts, name):
    model, found = family(name), []
    for side in ("left", "right"):
        batch = collate(prompts, side=side)
        edges = edges_before(batch, lambda prompt: isolated(prompt, "labels"))
        with block(model, edges, [0, 1]):
            rows = torch.arange(len(prompts))
            found.append(logits_of(model, batch)[rows, batch.targets])
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "mistral"])
def test_blocked_edges_carry_nothing(family, prompts, name):
    model, batch, seen = family(name), collate(prompts[:2]), {}
    edges = edges_before(batch, lambda prompt: isolated(prompt, "labels"))
    with block(model, edges, [1], heads=[2]), instrument(model, Edit(after=watching(seen))):
        logits_of(model, batch)
    where = edges[:, None].expand(-1, 4, -1, -1)
    assert seen[1][:, 2:3][where[:, 2:3]].abs().sum() == 0
    assert seen[1][:, :2][where[:, :2]].sum() > 0
    assert seen[0][where].sum() > 0
    real = batch.attention_mask[:, None].expand(-1, 4, -1)
    assert torch.allclose(seen[1].sum(-1)[real], torch.ones(()), atol=1e-5)


def test_an_exception_leaves_the_model_alone(family, prompts):
    for name in ("gptj", "llama"):
        model, batch = family(name), collate(prompts)
        before, implementation = logits_of(model, batch), model.config._attn_implementation
        with pytest.raises(ZeroDivisionError), instrument(model, Edit()):
            raise ZeroDivisionError
        assert model.config._attn_implementation == implementation
        assert not any("_attn" in vars(module) for module in model.modules())
        assert torch.allclose(logits_of(model, batch), before, atol=1e-6)


def test_generation_goes_on_after_an_edited_prompt(family, prompts):
    model, batch = family("llama"), collate(prompts[:1])
    edges = edges_before(batch, lambda prompt: isolated(prompt, "labels"))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with block(model, edges):
        first = logits_of(model, batch)[0, -1].argmax()
        made = model.generate(
            batch.input_ids, attention_mask=batch.attention_mask.long(), **options
        )
    assert made.shape[1] == batch.input_ids.shape[1] + 4
    assert made[0, batch.input_ids.shape[1]] == first


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_other_attention_is_refused(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        name, vocab_size=50, hidden_size=16, n_head=2, num_hidden_layers=1, n_layer=1, state_size=4
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="cannot be instrumented"), instrument(model, Edit()):
        raise AssertionError


def test_half_a_pass_is_refused(family, prompts):
    model, batch = family("llama"), collate(prompts[:1])
    with torch.no_grad():
        cache = model(batch.input_ids[:, :5], use_cache=True).past_key_values
        with instrument(model, Edit()), pytest.raises(ModelError, match="empty DynamicCache"):
            model(batch.input_ids[:, 5:], past_key_values=cache)


def test_wrong_blocks_are_refused(family):
    model = family("llama")
    with pytest.raises(ConfigError, match="cut from itself"), block(model, torch.ones(4, 4).bool()):
        raise AssertionError
    with (
        pytest.raises(ConfigError, match="layers 0 to 2"),
        block(model, torch.zeros(4, 4).bool(), [3]),
    ):
        raise AssertionError
