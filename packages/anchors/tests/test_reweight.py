"""Re-weighting equals the attention it stands for, learns, and is saved and loaded."""

import json

import numpy as np
import pytest
import torch
from anchors.evaluate import predict
from anchors.prompts import collate
from anchors.reweight import Reweighter
from octavo.errors import ConfigError, DataError, ModelError

FAMILIES = ["gpt2", "gptj", "llama", "qwen2", "mistral", "gemma2", "gpt_neox"]


def random_weighter(model):
    weighter = Reweighter(model, 3)
    with torch.no_grad():
        weighter.beta.copy_(
            torch.randn(weighter.beta.shape, generator=torch.Generator().manual_seed(3))
        )
    return weighter


def by_hand(model, prompt, beta):
    """Logits of GPT-2 with A(q, p_i) multiplied by exp(beta), the forward pass written out."""
    body, size = model.transformer, model.config.hidden_size
    heads = model.config.num_attention_heads
    ids = torch.tensor([prompt.input_ids])
    state = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))[None]
    for number, part in enumerate(body.h):
        query, key, value = part.attn.c_attn(part.ln_1(state)).split(size, -1)
        query, key, value = (
            one.view(1, -1, heads, size // heads).transpose(1, 2) for one in (query, key, value)
        )
        scores = query @ key.transpose(-1, -2) / (size // heads) ** 0.5
        weights = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1)
        for kind, places in zip(prompt.classes, prompt.labels, strict=True):
            for place in places:
                weights[0, :, prompt.target, place] *= beta[number, :, kind].exp()
        state = state + part.attn.c_proj((weights @ value).transpose(1, 2).reshape(1, -1, size))
        state = state + part.mlp(part.ln_2(state))
    return model.lm_head(body.ln_f(state))[0, -1, list(prompt.answers)].log_softmax(-1)


def test_it_multiplies_the_attention_and_normalises_nothing(family, prompts):
    model = family("gpt2")
    weighter = random_weighter(model)
    found = predict(model, prompts, 2, weighter.around(model)).scores
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            assert np.allclose(found[number], by_hand(model, prompt, weighter.beta), atol=1e-4)
    assert not np.allclose(found, predict(model, prompts).scores, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_on_a_cache_equals_the_whole_pass(family, prompts, name):
    """The loss of the first epoch is that of whole passes, for grouped queries and windows too."""
    model, labels = family(name), [0, 1, 2, 0, 1]
    weighter = random_weighter(model)
    start = weighter.beta.detach().clone()
    scores = predict(model, prompts, 2, weighter.around(model)).scores
    losses = weighter.fit(model, prompts, labels, learning_rate=1e-12, epochs=1, batch_size=2)
    assert losses[0] == pytest.approx(-scores[range(5), labels].mean(), abs=1e-4)
    assert torch.allclose(weighter.beta, start, atol=1e-6)


def test_zeros_change_nothing(family, prompts):
    model = family("llama")
    around = Reweighter(model, 3).around(model)
    assert np.allclose(
        predict(model, prompts, 2, around).scores, predict(model, prompts, 2).scores, atol=1e-6
    )


def test_its_gradient_is_that_of_the_whole_pass(family, prompts):
    """By finite differences of the loss in whole passes."""
    model, labels = family("gpt2").double(), [0, 1, 2, 0, 1]
    weighter = random_weighter(model).double()
    found = []

    def loss():
        scores = predict(model, prompts, 5, weighter.around(model)).scores.astype(np.float64)
        return -scores[range(5), labels].mean()

    moved = weighter.beta.detach().clone()
    weighter.fit(model, prompts, labels, learning_rate=1e-12, epochs=1, batch_size=5)
    gradient = weighter.beta.grad
    assert gradient is not None
    with torch.no_grad():
        for place in [(0, 0, 0), (1, 2, 1), (2, 3, 2)]:
            ends = []
            for step in (1e-1, -1e-1):
                weighter.beta.copy_(moved)
                weighter.beta[place] += step
                ends.append(loss())
            found.append(((ends[0] - ends[1]) / 2e-1, float(gradient[place])))
    for numeric, exact in found:
        assert numeric == pytest.approx(exact, rel=0.02, abs=1e-6)


def test_it_learns_and_leaves_the_model_alone(family, prompts):
    model, labels = family("gpt2"), [0, 1, 2, 0, 1]
    before = {name: one.clone() for name, one in model.named_parameters()}
    weighter = Reweighter(model, 3)
    losses = weighter.fit(model, prompts, labels, 0.1, 15, seed=1)
    assert losses[-1] < losses[0] - 0.015
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    again = Reweighter(model, 3)
    assert again.fit(model, prompts, labels, 0.1, 15, seed=1) == losses


def test_generation_is_re_weighted_at_the_target_alone(family, prompts):
    model = family("llama")
    weighter, batch = random_weighter(model), collate(prompts)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    with weighter.applied(model, batch):
        found = model.generate(**inputs, **options)[:, -4:]
        with torch.no_grad():
            first = model(**batch.inputs()).logits[:, -1].argmax(-1)
    assert (found[:, 0] == first).all()
    assert found.shape == (5, 4)


def test_saving_leaves_other_files_alone(family, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    Reweighter(family("gpt2"), 3).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_saved_and_loaded(family, prompts, tmp_path):
    model = family("gpt2")
    weighter = random_weighter(model)
    weighter.save(tmp_path / "adapter")
    again = Reweighter.load(tmp_path / "adapter", model)
    assert torch.equal(weighter.beta, again.beta)
    assert "3 classes" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(ModelError, match="another model"):
        Reweighter.load(tmp_path / "adapter", family("llama"))
    file = tmp_path / "adapter" / "reweighter.json"
    content = json.loads(file.read_text())
    content["about"]["model"]["heads"] = 7
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="heads 7"):
        Reweighter.load(tmp_path / "adapter", model)
    with pytest.raises(DataError, match="holds no"):
        Reweighter.load(tmp_path, model)


def test_what_does_not_fit_is_refused(family, prompts):
    model = family("gpt2")
    with (
        pytest.raises(ConfigError, match="class 2"),
        Reweighter(model, 2).applied(model, collate(prompts)),
    ):
        pass
    other = Reweighter(family("gpt2", num_hidden_layers=2), 3)
    with pytest.raises(ModelError, match="not this model"):
        predict(model, prompts, 2, other.around(model))
    tails = collate([prompts[0].tail()])
    with (
        pytest.raises(ConfigError, match="without demonstrations"),
        Reweighter(model, 3).applied(model, tails),
    ):
        pass
    with pytest.raises(DataError, match="0 prompts"):
        other.fit(model, [], [])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="smaller"):
        Reweighter(model, 3).fit(model, prompts, [0, 1, 2, 0, 1])
