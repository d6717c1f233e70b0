"""The analyses against brute force and hand-worked numbers."""

import numpy as np
import pytest
import torch
from anchors.analyses import block_rows, flow_rows, interval, read_tables
from anchors.blocking import edges_before, isolated
from anchors.evaluate import Predictions, label_loyalty, predict, word_loyalty
from anchors.prompts import collate
from anchors.reading import reading, target_attention
from anchors.saliency import saliency, saliency_matrices
from octavo.errors import ConfigError, ModelError


def gradients_by_hand(model, prompt, label, layer):
    """A * dL/dA of one layer of GPT-2, with the forward pass written out after its description."""
    body, size = model.transformer, model.config.hidden_size
    heads = model.config.num_attention_heads
    ids = torch.tensor([prompt.input_ids])
    state = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))[None]
    kept = None
    for number, part in enumerate(body.h):
        query, key, value = part.attn.c_attn(part.ln_1(state)).split(size, -1)
        query, key, value = (
            one.view(1, -1, heads, size // heads).transpose(1, 2) for one in (query, key, value)
        )
        scores = query @ key.transpose(-1, -2) / (size // heads) ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
        weights = scores.softmax(-1)
        if number == layer:
            kept = weights
            kept.retain_grad()
        mixed = (weights @ value).transpose(1, 2).reshape(1, -1, size)
        state = state + part.attn.c_proj(mixed)
        state = state + part.mlp(part.ln_2(state))
    logits = model.lm_head(body.ln_f(state))[0, -1, list(prompt.answers)]
    torch.nn.functional.cross_entropy(logits[None], torch.tensor([label])).backward()
    assert kept is not None
    assert kept.grad is not None
    return (kept * kept.grad)[0].detach()


def test_saliency_is_that_of_a_plain_forward_pass(family, prompts):
    model, prompt = family("gpt2"), prompts[0]
    matrices = saliency_matrices(model, prompt, 1)
    for layer in range(3):
        by_hand = gradients_by_hand(model, prompt, 1, layer).sum(0).abs().fill_diagonal_(0)
        assert torch.allclose(matrices[layer], by_hand, atol=1e-6, rtol=1e-4)
    assert matrices.sum() > 0


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "gemma2"])
def test_the_parts_are_means_over_their_edges(family, prompts, name):
    model, labels = family(name), [0, 1, 2, 0, 1]
    found = saliency(model, prompts, labels, batch_size=3)
    assert found.shape == (5, 3, 3)
    for number, prompt in enumerate(prompts):
        flows = saliency_matrices(model, prompt, labels[number])
        label_words = [places[0] for places in prompt.labels]
        into = [(p, j) for p in label_words for j in range(p)]
        out = [(prompt.target, p) for p in label_words]
        rest = {(i, j) for i in range(len(prompt)) for j in range(i)} - {*into} - {*out}
        for part, edges in enumerate((into, out, rest)):
            expected = np.mean(
                [[flows[layer][edge] for edge in edges] for layer in range(3)], axis=1
            )
            assert np.allclose(found[number, :, part], expected, rtol=1e-3, atol=1e-8)


def test_one_head_alone_is_its_own_sum(family, prompts):
    model = family("llama", num_attention_heads=1, num_key_value_heads=1)
    together, apart = (saliency(model, prompts, [0] * 5, per_head=one) for one in (False, True))
    assert np.allclose(together, apart[:, :, 0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_that_overflows_is_told(family, prompts):
    model = family("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="--dtype float32"):
        saliency(model, prompts, [0] * 5)
    with pytest.raises(ModelError, match="--dtype float32"):
        predict(model, prompts)


def test_auc_and_its_share_by_hand():
    # layer 0 tells nothing, layer 1 half, layer 2 everything
    attention = np.array([[[1, 1], [2, 1], [3, 0]], [[1, 1], [1, 1], [2, 1]],
                          [[1, 1], [1, 1], [1, 2]], [[1, 1], [0, 1], [0, 3]]], float)  # fmt: skip
    predicted = np.array([0, 0, 1, 1])
    auc, share = reading(attention, predicted)
    # class 0 in layer 1: of four pairs three are right and one is even; class 1: all are even
    assert np.allclose(auc, [0.5, (0.875 + 0.5) / 2, 1.0])
    assert np.allclose(share, [0, 0.1875 / 0.6875, 1.0])
    assert np.isnan(reading(attention, np.zeros(4, int))[0]).all()


def test_attention_of_the_target_is_the_models(family, prompts):
    model = family("llama")
    model.set_attn_implementation("eager")
    found = target_attention(model, prompts, 3)
    with torch.no_grad():
        own = model(torch.tensor([prompts[2].input_ids]), output_attentions=True).attentions
    for layer in range(3):
        for kind, places in zip(prompts[2].classes, prompts[2].labels, strict=True):
            expected = own[layer][0, :, -1, list(places)].sum(-1)
            assert np.allclose(found[2, layer, :, kind], expected, atol=1e-6)


def test_what_is_isolated(prompts):
    prompt = prompts[0]
    assert isolated(prompt, "labels") == [list(places) for places in prompt.labels]
    random = isolated(prompt, "random", 1)
    assert random == isolated(prompt, "random", 1) != isolated(prompt, "random", 2)
    assert len(random) == 3
    places = {place for group in random for place in group}
    assert not places & {place for group in prompt.labels for place in group}
    assert all(0 < place < prompt.query for place in places)
    assert {place for group in isolated(prompt, "format") for place in group} <= set(prompt.format)
    batch = collate(prompts)
    edges = edges_before(batch, lambda one: one.labels)
    assert int(edges[0].sum()) == sum(places[0] for places in prompt.labels)
    assert not edges[0, :, : batch.shifts[0]].any()


def test_loyalties_by_hand():
    before = Predictions(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1, 2, 3, 4, 5]] * 2))
    after = Predictions(
        np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1, 2, 3, 4, 6], [1, 2, 3, 4, 5]])
    )
    assert label_loyalty(before, after).tolist() == [0, 1]
    assert word_loyalty(before, after).tolist() == [4 / 6, 1]
    assert before.accuracy([1, 1]) == 0.5


def test_tables(family, prompts):
    model, labels = family("llama"), [0, 1, 2, 0, 1]
    flow = flow_rows(model, prompts, labels, per_head=True)
    assert [(row["layer"], row["head"]) for row in flow[:5]] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
    ]
    block = block_rows(model, prompts, labels, window=9)
    assert [row.get("layers") for row in block] == [None, *["first 3"] * 3, *["last 3"] * 3, None]
    assert block[1]["label loyalty"] == block[4]["label loyalty"]
    assert block[-1]["accuracy"] == block[-1]["label loyalty"] == 1 / 3
    tables = read_tables(model, prompts, labels, per_head=True)
    assert [row["layer"] for row in tables["AUC of each head"]] == [0, 1, 2]
    with pytest.raises(ConfigError, match="--window 0"):
        block_rows(model, prompts, labels, window=0)
    assert interval([1.0]) == ""
