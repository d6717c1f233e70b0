"""A cache of the demonstrations: whole it changes nothing, in parts it says what it leaves out."""

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from anchors.cache import PromptCache, beginning, prefill, sliding_windows
from anchors.compress import compress
from anchors.evaluate import predict
from anchors.prompts import build_prompt, collate
from octavo.errors import ConfigError, DataError, ModelError
from safetensors.torch import load_file

FAMILIES = ["gpt2", "gptj", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text",
            "gpt_neox"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_cache_changes_nothing(family, prompts, name):
    model = family(name)
    cache = prefill(model, beginning(prompts))
    whole, cached = predict(model, prompts, 3), predict(model, prompts, 3, cache=cache)
    assert np.allclose(whole.scores, cached.scores, atol=1e-4)
    assert (whole.top == cached.top).all()


def visible(model, prompt, kept):
    """Log-probabilities of one prompt in one pass, in which the tail sees kept tokens of the rest."""
    ids = torch.tensor([prompt.input_ids])
    time = ids.shape[1]
    seen = torch.ones(time, time, dtype=torch.bool).tril()
    hidden = [place for place in range(prompt.query) if place not in kept]
    seen[prompt.query :, hidden] = False
    windows = sliding_windows(model)
    from anchors.attention import Edit, instrument

    def cut(layer, query, mask):
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    assert len(windows) == 3
    with torch.no_grad(), instrument(model, Edit(before=cut)):
        logits = model(ids).logits[0, -1, list(prompt.answers)]
    return logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_are_seen_from_where_they_were(family, prompts, name):
    """By another way: the whole prompt in one pass, in which a mask hides what was not kept."""
    model, first = family(name), prompts[0]
    kept = sorted({*first.format, *(place for places in first.labels for place in places)})
    cache = prefill(model, beginning(prompts)).keep(kept)
    assert cache.start == first.query
    found = predict(model, prompts, 2, cache=cache).scores
    for number, prompt in enumerate(prompts):
        assert np.allclose(found[number], visible(model, prompt, kept), atol=1e-4), name


@pytest.mark.parametrize("name", ["mistral", "gemma2", "llama"])
@pytest.mark.parametrize("compressed", [False, True])
def test_who_shares_a_batch_changes_nothing(family, tokenizer, reviews, name, compressed):
    """Tails of very different lengths, longer together than the window."""
    model = family(name)
    shown = [("a fine film", 0), ("a dull one", 1), ("so so , good in parts", 2)]
    texts = ["so", "rain again", "a fine day for a dull film , so so in parts and again so", "a"]
    prompts = [build_prompt(reviews, tokenizer, shown, text) for text in texts]
    cache = prefill(model, beginning(prompts))
    cache = cache.keep([0, 1, *range(5, 20)]) if compressed else cache
    together, alone = (predict(model, prompts, size, cache=cache).scores for size in (4, 1))
    assert np.allclose(together, alone, atol=1e-5)
    if not compressed:
        assert np.allclose(together, predict(model, prompts, 4).scores, atol=1e-4)


def test_generation_sees_no_farther_than_the_window(family, prompts):
    """The first token that follows is the one that a pass with the same mask tells."""
    model, prompt = family("mistral"), prompts[0]
    kept = sorted({*prompt.format, *(place for places in prompt.labels for place in places)})
    cache = prefill(model, beginning(prompts)).keep(kept)
    batch = collate([prompt.tail()])
    with cache.windowed(model)(batch):
        found = model.generate(
            **cache.inputs(batch), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[0, -4:]
    ids = list(prompt.input_ids)
    for token in found.tolist():  # each by a whole pass in which a mask hides what was not kept
        again = replace(
            prompt, input_ids=tuple(ids), target=len(ids) - 1, answers=tuple(range(400))
        )
        assert int(visible(model, again, kept).argmax()) == token
        ids.append(token)


def test_windows_are_the_models(family):
    assert sliding_windows(family("llama")) == [None] * 3
    assert sliding_windows(family("mistral")) == [16] * 3
    assert set(sliding_windows(family("gemma2"))) == {16, None}


def test_generation_goes_on_from_a_cache(family, prompts):
    model = family("llama")
    cache = prefill(model, beginning(prompts))
    batch = collate([prompt.tail() for prompt in prompts])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(**cache.inputs(batch), **options)
    whole = collate(prompts)
    theirs = model.generate(whole.input_ids, attention_mask=whole.attention_mask.long(), **options)
    assert (ours[:, -5:] == theirs[:, -5:]).all()


def test_eight_bits_are_near_and_small(family, prompts):
    model = family("llama")
    cache = prefill(model, beginning(prompts))
    small = cache.quantized()
    assert small.quantized() is small
    assert small.bytes < 0.45 * cache.bytes  # one scale for 8 numbers here
    for layer, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
        back: Any = small.as_cache().layers[layer]
        assert (back.keys[0] - key).abs().max() <= key.abs().max() / 250
        assert (back.values[0] - value).abs().max() <= value.abs().max() / 250
    one, other = (predict(model, prompts, cache=each).scores for each in (cache, small))
    assert np.allclose(one, other, atol=0.1)


@pytest.mark.parametrize("rounded", [False, True])
def test_saved_and_loaded(family, prompts, tmp_path, rounded):
    model = family("gpt2")
    cache = prefill(model, beginning(prompts), {"kept": "all"})
    cache = (cache.quantized() if rounded else cache).keep([0, 3, 4])
    cache.save(tmp_path / "cache")
    again = PromptCache.load(tmp_path / "cache", model)
    assert (again.positions, again.start, again.about["kept"]) == (
        cache.positions, cache.start, "all",
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(again.keys, cache.keys, strict=True))
    ours, theirs = (predict(model, prompts, cache=one).scores for one in (cache, again))
    assert np.array_equal(ours, theirs)
    assert load_file(tmp_path / "cache" / "cache.safetensors")["layers.0.keys"].ndim == 3


def test_saving_leaves_other_files_alone(family, prompts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    prefill(family("gpt2"), beginning(prompts)).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_bfloat16_is_the_same_model(family, prompts, tmp_path):
    model = family("llama")
    prefill(model, beginning(prompts)).save(tmp_path / "cache")
    PromptCache.load(tmp_path / "cache", model.bfloat16())


def test_models_without_positions_keep_all_or_nothing(prompts):
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(
        BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4)
    ).eval()
    assert len(compress(model, prompts[0], "all")) == prompts[0].query
    with pytest.raises(ModelError, match="counts places"):
        compress(model, prompts[0])


def test_what_is_refused(family, prompts, tmp_path):
    model = family("gpt2")
    cache = prefill(model, beginning(prompts))
    cache.save(tmp_path / "cache")
    with pytest.raises(ModelError, match="another model"):
        PromptCache.load(tmp_path / "cache", family("llama"))
    other = family("gpt2")
    with torch.no_grad():
        other.transformer.h[1].attn.c_attn.weight.mul_(1.01)
    with pytest.raises(ModelError, match="its weights differ"):
        PromptCache.load(tmp_path / "cache", other)
    with pytest.raises(DataError, match=r"holds no cache\.json"):
        PromptCache.load(tmp_path, model)
    (tmp_path / "cache" / "cache.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read"):
        PromptCache.load(tmp_path / "cache", model)
    file = tmp_path / "cache" / "cache.json"
    with pytest.raises(DataError, match="does not begin with"):
        predict(model, [replace(prompts[0], input_ids=(1, *prompts[0].input_ids[1:]))], cache=cache)
    with pytest.raises(ConfigError, match="not both"):
        predict(model, prompts, 2, lambda batch: nullcontext(), cache)
    cache.save(tmp_path / "cache")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"positions": [0]}))
    with pytest.raises(DataError, match="does not hold 1 tokens"):
        PromptCache.load(tmp_path / "cache", model)
    file.write_text(json.dumps({"about": {}}))
    with pytest.raises(DataError, match="lacks positions"):
        PromptCache.load(tmp_path / "cache", model)
    with pytest.raises(DataError, match="different tokens"):
        beginning([prompts[0], prompts[0].tail()])
