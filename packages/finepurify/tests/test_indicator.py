"""The indicator, what is neutral, and the law that indicators should follow."""

import math
from typing import Any

import pytest
import torch
from finepurify.indicator import (
    LOG_SD,
    MEDIAN,
    Split,
    gamma_fit,
    global_mean,
    indicator,
    neutral,
    neutral_mask,
    posterior_clean,
    spearman,
    split_means,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
)

DELTA = torch.tensor([[1.0, 2.0, 0.0], [-3.0, 0.5, 0.0]])
FISHER = torch.tensor([[0.5, 2.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"epsilon": 1e-8}, [[2.0, 2.0, 0.0], [9e8, 2.5e7, 0.0]]),
        ({"damping": "absolute", "epsilon": 0.5}, [[1.0, 1.6, 0.0], [18.0, 0.5, 0.0]]),
        # the mean of the tensor is 3.5 / 6
        ({"damping": "tensor-mean", "strength": 6 / 7}, [[1.0, 1.6, 0.0], [18.0, 0.5, 0.0]]),
        # those of the rows are 2.5 / 3 and 1 / 3
        ({"damping": "row-mean", "strength": 0.6}, [[1.0, 1.6, 0.0], [45.0, 1.25, 0.0]]),
        (
            {"damping": "global-mean", "global_mean": 5.0, "strength": 0.1},
            [[1.0, 1.6, 0.0], [18.0, 0.5, 0.0]],
        ),
        ({"epsilon": 0.25, "exponent": 0.5}, [[1 / 0.75**0.5, 4 / 1.5, 0.0], [18.0, 0.5, 0.0]]),
        ({"exponent": 0.0}, [[1.0, 4.0, 0.0], [9.0, 0.25, 0.0]]),
    ],
)
def test_by_hand(options, wanted):
    found = indicator(DELTA, FISHER, **options)
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_a_tensor_without_rows_is_one_row():
    delta, fisher = DELTA[0], FISHER[0]
    one = indicator(delta, fisher, damping="row-mean")
    assert torch.equal(one, indicator(delta, fisher, damping="tensor-mean"))
    assert indicator(torch.ones(()), torch.ones(()), damping="row-mean", strength=1).item() == 0.5
    assert indicator(torch.ones(0), torch.ones(0), damping="tensor-mean").shape == (0,)


def test_rows_of_more_dimensions():
    fisher = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    found = indicator(torch.ones(2, 1, 2), fisher, damping="row-mean", strength=1, epsilon=1.0)
    assert found.tolist() == [[[0.25, pytest.approx(1 / 6)]], [[1.0, 1.0]]]


def test_half_precision_is_computed_in_single():
    found = indicator(DELTA.bfloat16(), FISHER.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, indicator(DELTA, FISHER))


def test_negative_curvature_counts_as_none_and_nothing_is_infinite():
    found = indicator(torch.tensor([1.0, 1e19]), torch.tensor([-5.0, 0.0]), epsilon=1e-3)
    assert found[0].item() == pytest.approx(1e3)
    assert found[1].item() == torch.finfo(torch.float32).max


def test_the_mean_over_all_tensors():
    tensors = {
        "a": torch.tensor([1.0, 5.0]),
        "b": torch.tensor([[-4.0], [0.0]]),
        "c": torch.ones(0),
    }
    assert global_mean(list(tensors), tensors.__getitem__) == 1.5
    assert global_mean([], tensors.__getitem__) == 0


@pytest.mark.parametrize(
    ("fisher", "options", "message"),
    [
        (torch.ones(2), {}, r"delta is \[3\], its Fisher diagonal \[2\]"),
        (torch.tensor([1.0, math.nan, math.nan]), {}, "2 of 3 indicators are NaN"),
        (torch.ones(3), {"epsilon": 0.0}, "epsilon 0.0 must be above 0"),
        (torch.ones(3), {"strength": -1.0}, "strength -1.0 at least 0"),
        (torch.ones(3), {"damping": "global-mean"}, "needs global_mean"),
    ],
)
def test_what_cannot_be_is_refused(fisher, options, message):
    with pytest.raises(ValueError, match=message):
        indicator(torch.ones(3), fisher, **options)


SMALL: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
HALF: Any = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}


def debertas(terms: list[str]) -> Any:
    return DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=terms, position_biased_input=False
    )


@pytest.mark.parametrize(
    ("config", "name", "rest", "count"),
    [
        (BertConfig(**SMALL), "self.key.bias", "self.query.bias", 8),
        (RobertaConfig(**{**SMALL, "pad_token_id": 1}), "self.key.bias", "self.query.bias", 8),
        (
            DistilBertConfig(vocab_size=30, dim=8, n_layers=1, n_heads=2, hidden_dim=16),
            "k_lin.bias", "q_lin.bias", 8,
        ),
        (OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=8), "k_proj.bias", "q_proj.bias", 8),
        (
            GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16, pad_token_id=0),
            "c_attn.bias", "c_attn.bias", 8,
        ),
        (GPTNeoXConfig(**SMALL, rope_parameters=HALF), "key_value.bias", "key_value.bias", 4),
        (Qwen2Config(**SMALL, num_key_value_heads=2), "k_proj.bias", "q_proj.bias", 0),
        (debertas(["p2c", "c2p"]), ".key_proj.bias", ".query_proj.bias", 0),
        (debertas(["c2p"]), ".key_proj.bias", ".query_proj.bias", 8),
    ],
    ids="bert roberta distilbert opt gpt2 neox qwen2 deberta deberta-c2p".split(),
)  # fmt: skip
def test_neutral_dimensions_have_no_gradient_and_no_others(config, name, rest, count):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ids = torch.randint(2, 30, (4, 9))
    model.eval()(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    slopes = {
        each: parameter.grad.abs() for each, parameter in model.named_parameters()
        if parameter.grad is not None
    }  # fmt: skip
    ((key, slope),) = [(each, found) for each, found in slopes.items() if each.endswith(name)]
    ((_, query),) = [(each, found) for each, found in slopes.items() if each.endswith(rest)]
    mask = neutral_mask(key, len(slope), config)
    noise = 1e-5 * query.max()  # some softmax is in float32
    assert torch.equal(mask, slope < noise)
    assert neutral(key, config) == bool(mask.any())
    assert int(mask.sum()) == count
    others = [each for each in slopes if each != key]
    assert not any(neutral(each, config) for each in others)


def test_without_a_configuration_the_name_decides():
    names = "a.key.bias a.k_lin.bias a.k_proj.bias h.0.attn.c_attn.bias".split()
    assert all(map(neutral, names))
    others = (
        "a.key.weight a.query.bias a.key_proj.bias a.c_proj.bias a.query_key_value.bias monkey.bias"
    )
    assert not any(map(neutral, others.split()))
    assert neutral_mask("a.key.bias", 3).all()
    assert not neutral_mask("a.query.bias", 3).any()
    assert (
        neutral_mask("h.0.attn.c_attn.bias", 6).tolist() == [False] * 2 + [True] * 2 + [False] * 2
    )


TWO = {"a": torch.tensor([[1.0, 8.0], [2.0, 30.0]]), "b": torch.tensor([2.0, 0.0, 3.0, 10.0])}


def test_both_scales_by_hand():
    names, values = list(TWO), TWO.__getitem__
    assert split_means(names, values, 0.5) == Split(5 / 4, 51 / 4, 4)
    assert split_means(names, values, 3 / 8) == Split(1.0, 53 / 5, 3)  # one of the two 2s
    median = split_means(names, values, 0.5, statistic="median")
    assert median == Split(1 / MEDIAN, 8 / MEDIAN, 4)
    for statistic in ("mean", "median"):
        every = split_means(names, values, 1.0, statistic=statistic)
        none = split_means(names, values, 0.0, statistic=statistic)
        assert every.k_clean == every.k_poison == none.k_clean == none.k_poison
    assert every.count == 8
    assert split_means(names, values, 1.0).k_clean == 7
    with pytest.raises(ValueError, match=r"rho 1\.5: must be from 0 to 1"):
        split_means(names, values, 1.5)
    with pytest.raises(ValueError, match="no indicators"):
        split_means([], values, 0.5)


def test_the_posterior_by_hand():
    r = torch.tensor([0.0, 1.0, 4.0, 8.0])
    found = posterior_clean(r, 1.0, 4.0, 0.8)
    # odds of poison: 0.25 * 0.5 * exp(3 r / 8)
    wanted = [1 / (1 + 0.125 * math.exp(0.375 * each)) for each in r.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_the_posterior_is_that_of_the_two_densities():
    r = torch.logspace(-3, 2, 50)
    clean, poison = (stats.gamma.pdf(r.numpy(), 0.5, scale=2 * k) for k in (0.7, 9.0))
    wanted = 0.9 * clean / (0.9 * clean + 0.1 * poison)
    assert posterior_clean(r, 0.7, 9.0, 0.9).numpy() == pytest.approx(wanted, rel=1e-4)


@given(
    st.lists(st.floats(0, 1e30), min_size=2, max_size=20),
    st.floats(1e-20, 1e20), st.floats(1, 1e12), st.floats(0, 1),
)  # fmt: skip
def test_the_posterior_falls_and_never_overflows(values, k, ratio, rho):
    r = torch.tensor(sorted(values), dtype=torch.float32)
    found = posterior_clean(r, k, k * ratio, rho)
    assert found.isfinite().all()
    assert ((found >= 0) & (found <= 1)).all()
    assert (found.diff() <= 0).all()


def test_the_posteriors_ends():
    r = torch.tensor([0.0, 1e30])
    assert posterior_clean(r, 1e-12, 1.0, 0.5).tolist() == [pytest.approx(1, abs=1e-5), 0.0]
    assert posterior_clean(r, 0.0, 1.0, 0.5).tolist() == [1.0, 0.0]
    assert posterior_clean(r, 0.0, 0.0, 0.5).tolist() == [0.5, 0.5]
    assert posterior_clean(r, 2.0, 2.0, 0.25).tolist() == [0.25, 0.25]
    assert posterior_clean(r, 1.0, 2.0, 1.0).tolist() == [1.0, 1.0]
    assert posterior_clean(r, 1.0, 2.0, 0.0).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"rho -1\.0"):
        posterior_clean(r, 1.0, 2.0, -1.0)
    for clean, poison in ((2.0, 1.0), (-1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="k_clean"):
            posterior_clean(r, clean, poison, 0.5)


def drawn(k: float, size: int, seed: int) -> torch.Tensor:
    """From Gamma(1/2, 2k)."""
    found = stats.gamma(0.5, scale=2 * k).rvs(size, random_state=seed)
    return torch.tensor(found, dtype=torch.float32)


def test_the_law_is_recovered_from_its_own_samples():
    tensors = {
        "a": drawn(3.0, 60_000, 0).reshape(200, 300),
        "zeros": torch.zeros(5),
        "b": drawn(3.0, 40_000, 1),
    }
    names, values = list(tensors), tensors.__getitem__
    fit = gamma_fit(names, values)
    assert fit.k == pytest.approx(3, rel=0.03)
    assert fit.per_tensor == {name: pytest.approx(3, rel=0.03) for name in "ab"}
    assert fit.moved == 100_000
    assert fit.log_sd == pytest.approx(LOG_SD, rel=0.02)
    assert fit.median_over_mean == pytest.approx(MEDIAN, rel=0.05)
    assert fit.ks_distance < 0.01
    law: Any = stats.gamma(0.5, scale=2 * fit.k)
    both = torch.cat([tensors["a"].reshape(-1), tensors["b"]]).double().numpy()
    assert fit.ks_distance == pytest.approx(stats.kstest(both, law.cdf)[0], abs=1e-6)
    less = gamma_fit(names, values, sample=10_000)
    assert less == gamma_fit(names, values, sample=10_000)
    assert less.k == fit.k
    assert less.median_over_mean == pytest.approx(fit.median_over_mean, rel=0.1)


def test_other_laws_are_far_from_it():
    mixed = {"a": drawn(0.01, 20_000, 0), "b": drawn(10.0, 20_000, 1)}
    fit = gamma_fit(["a", "b"], mixed.__getitem__)
    assert fit.log_sd > LOG_SD + 1
    assert fit.median_over_mean < MEDIAN / 2
    assert fit.ks_distance > 0.3
    assert fit.per_tensor["b"] > 900 * fit.per_tensor["a"]
    with pytest.raises(ValueError, match="no dimension moved"):
        gamma_fit(["a"], lambda name: torch.zeros(3))


def test_both_parts_of_a_mixture_are_told_apart():
    tensors = {"clean": drawn(1.0, 9000, 0), "poison": drawn(1e6, 1000, 1)}
    found = split_means(["clean", "poison"], tensors.__getitem__, 0.9)
    assert found.k_clean == pytest.approx(1, rel=0.1)
    assert found.k_poison == pytest.approx(1e6, rel=0.15)
    right = {
        name: posterior_clean(each, found.k_clean, found.k_poison, 0.9).mean().item()
        for name, each in tensors.items()
    }
    assert right["clean"] > 0.99
    assert right["poison"] < 0.05


def test_the_rank_correlation_is_scipys():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(4000, generator=generator).mul(3).round()  # many ties
    other = one.square() + torch.randn(4000, generator=generator)
    parts = {"a": (one[:10], other[:10]), "b": (one[10:].reshape(2, -1), other[10:].reshape(2, -1))}
    wanted = stats.spearmanr(one.numpy(), other.numpy())[0]
    assert spearman(["a", "b"], parts.__getitem__) == pytest.approx(wanted, abs=1e-9)
    assert spearman(["a"], lambda name: (one, -one)) == pytest.approx(-1)
    assert math.isnan(spearman(["a"], lambda name: (one, torch.ones(4000))))


def test_a_subsample_is_the_same_in_every_run():
    one = torch.arange(20_000.0)
    other = one + 3000 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    tensors = {
        "a": (one[:5000], other[:5000]),
        "none": (one[:0], one[:0]),
        "b": (one[5000:], other[5000:]),
    }
    found = spearman(list(tensors), tensors.__getitem__, sample=2000)
    assert found == spearman(list(tensors), tensors.__getitem__, sample=2000)
    assert found == pytest.approx(spearman(list(tensors), tensors.__getitem__), abs=0.03)
