"""Sampling: each completion depends on its seed alone, and is what a plain loop would draw."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd.config import Sampling
from mathshepherd.generate import (
    LocalGenerator,
    Request,
    context,
    continue_tokens,
    draw,
    encode,
    end_tokens,
    seed_of,
    uniforms,
)
from octavo.errors import DataError
from octavo.tiny import Shape, make_tokenizer
from scipy.stats import chisquare
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip

#: Model type -> what its configuration needs besides the sizes; windows are shorter than the texts.
FAMILIES = {
    "gpt2": {}, "llama": {}, "qwen2": {}, "mistral": {"sliding_window": 6}, "gpt_neox": {},
    "gemma2": {"head_dim": 8, "sliding_window": 6}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15], [16], [17, 18, 19, 20, 21, 22], [23, 24, 25]]
SEEDS = [(3, 2**62), (4,), (5, 6, 7), (8,), (9, 9)]
ENDS = frozenset({1, 2, 3, 4})


def make(name, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | FAMILIES[name] | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger weights, so that attention and predictions are not uniform
        for part, parameter in model.named_parameters():
            if parameter.ndim == 2 and "position" not in part and "wpe" not in part:
                parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def models():
    found = {}
    return lambda name: found.setdefault(name, make(name))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["0123456789 +-=x?abcdefghijk"], Shape(kind="llama", alphabet="char"))


@torch.no_grad()
def plain_loop(model, prompt, seed, sampling, ends, room):
    """One continuation by full passes over the whole text, drawn by inverse distribution function."""
    ids = list(prompt)
    for number in uniforms([seed], room)[0]:
        logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        if sampling.temperature:
            weights = np.exp((logits - logits.max()) / sampling.temperature)
            order = np.argsort(-weights, kind="stable") if sampling.top_p < 1 else range(30)
            total = np.cumsum(weights[order] / weights.sum())
            if sampling.top_p < 1:
                total = total[: np.searchsorted(total, sampling.top_p) + 1]
            ids.append(int(order[np.searchsorted(total, number * total[-1], side="right")]))
        else:
            ids.append(int(logits.argmax()))
        if ids[-1] in ends:
            return ids[len(prompt) :], True
    return ids[len(prompt) :], False


def pairs(groups):
    return [[(one.ids, one.finished) for one in group] for group in groups]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, max_new_tokens=14),
        Sampling(temperature=1.5, top_p=0.7, max_new_tokens=14),
    ],
)
def test_it_draws_what_a_plain_loop_draws(name, sampling, models):
    model = models(name)
    expected = [
        [plain_loop(model, prompt, seed, sampling, ENDS, 14) for seed in seeds]
        for prompt, seeds in zip(PROMPTS, SEEDS, strict=True)
    ]
    flat = [one for group in expected for one in group]
    assert len({len(ids) for ids, _ in flat}) > 2  # rows end at different times
    assert len({tuple(ids) for ids, _ in flat}) > 5
    assert pairs(continue_tokens(model, PROMPTS, SEEDS, sampling, ENDS)) == expected
    for prompt, seeds, group in zip(PROMPTS, SEEDS, expected, strict=True):  # without any padding
        assert pairs(continue_tokens(model, [prompt], [seeds], sampling, ENDS)) == [group]
    assert expected[4][0] == expected[4][1]


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_temperature_0_is_the_librarys_greedy_search(name, models):
    model = models(name)
    sampling = Sampling(temperature=0, max_new_tokens=12)
    found = continue_tokens(model, PROMPTS, [(1,)] * 5, sampling, ENDS)
    for prompt, (one,) in zip(PROMPTS, found, strict=True):
        whole = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0,
            eos_token_id=sorted(ENDS), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )  # fmt: skip
        assert one.ids == whole[0, len(prompt) :].tolist()
        assert one.finished == (one.ids[-1] in ENDS)


def test_a_completion_depends_on_its_seed_alone(models, tokenizer):
    model = models("llama")
    sampling = Sampling(temperature=1.0, max_new_tokens=20)
    requests = [
        Request("1 + 2 = ", (1, 2, 3)), Request("7", (4,)), Request("8", ()),
        Request("3 x 4 - 5 + 6 = ?", (5, 6, 7, 8, 9, 10)), Request("7", (1,)),
    ]  # fmt: skip
    generate = LocalGenerator(model, tokenizer, sampling)
    expected = generate(requests)
    assert [len(group) for group in expected] == [3, 1, 0, 6, 1]
    assert len({one.text for group in expected for one in group}) == 11
    for rows in (1, 2, 4, 11):
        widths = []
        hook = model.lm_head.register_forward_hook(
            lambda _, inputs, output, seen=widths: seen.append(len(inputs[0]))
        )
        assert LocalGenerator(model, tokenizer, sampling, rows)(requests) == expected
        hook.remove()
        assert max(widths) <= rows
    assert generate(requests[::-1]) == expected[::-1]
    for request, group in zip(requests, expected, strict=True):
        for seed, one in zip(request.seeds, group, strict=True):
            assert generate([Request(request.text, (seed,))]) == [[one]]
    assert generate([]) == []
    longer = LocalGenerator(model, tokenizer, Sampling(temperature=1.0, max_new_tokens=40))
    for one, other in zip(*(made([requests[0]])[0] for made in (generate, longer)), strict=True):
        assert other.text.startswith(one.text)


def test_texts_end_at_end_tokens_and_at_the_limit(models, tokenizer):
    model = models("gpt2")
    sampling = Sampling(temperature=1.5, max_new_tokens=10)
    assert end_tokens(model, tokenizer) == {1, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = [6, 7]
    try:
        assert end_tokens(model, tokenizer) == {6, 7, tokenizer.eos_token_id}
        generate = LocalGenerator(model, tokenizer, sampling)
        (found,) = generate([Request("1 + ", tuple(range(60)))])
    finally:
        model.generation_config.eos_token_id = 1
    ends = tokenizer.convert_ids_to_tokens([6, 7, tokenizer.eos_token_id])
    assert {one.finished for one in found} == {True, False}
    for one in found:
        assert not any(end in one.text for end in ends)
        ids = tokenizer(one.text, add_special_tokens=False)["input_ids"]
        assert len(ids) + one.finished == one.tokens
        assert one.finished or one.tokens == 10
    (one,) = LocalGenerator(model, tokenizer, Sampling(max_new_tokens=1))([Request("1", (1, 2))])
    assert [done.tokens for done in one] == [1, 1]
    without = continue_tokens(model, [[5]], [(1,)], sampling, frozenset())
    assert (len(without[0][0].ids), without[0][0].finished) == (10, False)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_full_context_ends_each_text_by_itself(name, models):
    model = models(name)
    prompts = [list(range(5, 28)) * 2 + [7] * 15, [8] * 30, [9] * 63]
    sampling = Sampling(temperature=0.7, max_new_tokens=40)
    found = continue_tokens(model, prompts, [(1, 2)] * 3, sampling, frozenset())
    assert [[len(one.ids) for one in group] for group in found] == [[3, 3], [34, 34], [1, 1]]
    for prompt, group in zip(prompts, found, strict=True):
        alone = continue_tokens(model, [prompt], [(1, 2)], sampling, frozenset())
        assert pairs(alone) == pairs([group])
    expected = plain_loop(model, prompts[1], 1, sampling, (), 34)
    assert (found[1][0].ids, found[1][0].finished) == expected


def test_texts_that_cannot_be_continued_are_refused(models, tokenizer):
    generate = LocalGenerator(models("gpt2"), tokenizer)
    with pytest.raises(DataError, match=r"a text of 64 tokens leaves no room .* context \(64\)"):
        generate([Request("1", (1,)), Request("1" * 64, (1,))])
    with pytest.raises(DataError, match="an empty text cannot be continued"):
        generate([Request("", (1,))])
    config = AutoConfig.for_model("bloom", hidden_size=8, n_layer=1, n_head=1, vocab_size=4)
    assert context(AutoModelForCausalLM.from_config(config)) == 10**9  # knows no limit


def test_a_text_is_begun_once_and_not_ended(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    begin, end = "<|endoftext|>", "[PAD]"
    ids = [(token, other.convert_tokens_to_ids(token)) for token in (begin, end)]
    other.eos_token = end
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=ids
    )
    assert other("1")["input_ids"][-1] == ids[1][1]
    assert encode(other, "1") == [ids[0][1], *encode(tokenizer, "1")]
    assert encode(other, f"{begin}1") == encode(other, "1")
    assert encode(tokenizer, f"1{begin}")[-1] == tokenizer.eos_token_id  # written by the caller


# What is drawn.


def test_numbers_are_splitmix64():
    def number(seed, position):
        mask = 2**64 - 1
        state = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return ((state ^ (state >> 31)) >> 11) / 2**53

    seeds = [0, 1, 2**63 - 1]
    assert uniforms(seeds, 5).tolist() == [[number(seed, n) for n in range(5)] for seed in seeds]
    assert number(1234567, 0) == (6457827717110365317 >> 11) / 2**53  # a published value


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(1, 20))
def test_numbers_are_counted_from_each_seed(seeds, count):
    found = uniforms(seeds, count)
    assert ((found >= 0) & (found < 1)).all()
    np.testing.assert_array_equal(found[-1], uniforms(seeds[-1:], count + 3)[0, :count])


def test_seeds_tell_completions_apart():
    assert seed_of("a", 1) == seed_of("a", 1)
    found = {seed_of("a", 1), seed_of("a1"), seed_of("a", 11), seed_of("a", 1, 1), seed_of(1, "a")}
    assert len(found) == 5
    assert max(seed_of(n) for n in range(100)) < 2**63


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.5)])
def test_tokens_come_as_often_as_they_should(temperature, top_p):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, 1.0])
    probabilities = torch.softmax(logits.double() / temperature, -1).numpy()
    order = np.argsort(-probabilities)
    kept = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p - 1e-12) + 1]
    expected = np.zeros(6)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    noise = torch.from_numpy(uniforms([seed_of("draw", n) for n in range(4000)], 5)).float()
    sampling = Sampling(temperature=temperature, top_p=top_p)
    found = draw(logits.expand(20000, 6), noise.flatten(), sampling).bincount(minlength=6).numpy()
    assert (found[expected == 0] == 0).all()
    assert chisquare(found[expected > 0], 20000 * expected[expected > 0]).pvalue > 0.01


def test_a_models_tokens_come_as_often_as_they_should(models):
    model, seeds = models("gpt2"), [seed_of("first", n) for n in range(4000)]
    sampling = Sampling(temperature=3.0, max_new_tokens=1)
    (found,) = continue_tokens(model, [[5, 6, 7]], [seeds], sampling, frozenset())
    counts = np.bincount([one.ids[0] for one in found], minlength=30)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = 4000 * torch.softmax(logits.double() / 3.0, -1).numpy()
    assert expected.min() > 5
    assert expected.max() > 2 * expected.min()
    assert chisquare(counts, expected).pvalue > 0.01


def test_draws_at_the_edges():
    logits = torch.tensor([[0.0, 0.0, -1e4], [0.0, 1.0, -1e4]])
    nearly_one = torch.tensor([1 - 2**-53, 1 - 2**-53], dtype=torch.float64).float()  # is 1
    assert draw(logits, nearly_one, Sampling(temperature=1.0)).tolist() == [1, 1]
    assert draw(logits, nearly_one, Sampling(temperature=1.0, top_p=0.6)).tolist() == [1, 1]
    assert draw(logits, torch.zeros(2), Sampling(temperature=1.0)).tolist() == [0, 0]
    assert draw(logits, torch.zeros(2), Sampling(temperature=1.0, top_p=1e-9)).tolist() == [0, 1]
    assert draw(logits * 1e3, torch.zeros(2), Sampling(temperature=1e-38)).tolist() == [0, 1]
