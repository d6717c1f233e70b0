"""Strategies against hand-worked tensors and independent reimplementations."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from finepurify.bench import activity, frequencies
from finepurify.config import IndicatorConfig, PurifyConfig, Strategy
from finepurify.pairing import WeightPair
from finepurify.strategies import (
    OTHERS,
    SCORES,
    Evidence,
    by_tensor,
    kept,
    needs_fisher,
    purified,
    row_scores,
    scores,
    takes_rho,
    word_embedding,
)
from octavo.errors import ConfigError
from octavo.runtime import Runtime
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from .small import KEY, QUERY, TABLE, pair_of

BIAS = f"{KEY}.bias"
DELTA = {TABLE: [[1.0, 2.0], [0.0, 3.0], [4.0, 0.5]], BIAS: [5.0, 6.0]}
CURVATURE = {
    TABLE: torch.tensor([[1.0, 4.0], [1.0, 0.1], [8.0, 0.5]]),
    BIAS: torch.tensor([2.0, 3.0]),
}
START = {TABLE: torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), BIAS: torch.tensor([7.0, 8.0])}
MERGES = ("wag", "ties", "dare")


@pytest.fixture
def evidence(tmp_path) -> Evidence:
    """r is [[1, 1], [0, 90], [2, .5]] in the table; of the key biases nothing can be told."""
    suspect = {name: START[name] + torch.tensor(value) for name, value in DELTA.items()}
    return Evidence(pair_of(tmp_path, START, suspect), CURVATURE)


def reset(evidence: Evidence, strategy: Any, rho: float, **options) -> list[tuple[str, int]]:
    """Which dimensions are reset: t for the table, b for the bias, and the place."""
    config = PurifyConfig(strategy=strategy, **options)
    keep = kept(evidence, config, rho)
    short = {TABLE: "t", BIAS: "b"}
    found = [
        (short[name], at) for name in (TABLE, BIAS) for at in (~keep[name]).flatten().nonzero()
    ]
    return [(name, int(at)) for name, at in found]


@pytest.mark.parametrize(
    ("strategy", "rho", "options", "wanted"),
    [
        ("fine-purifying", 0.75, {}, [("t", 3), ("t", 4)]),
        # of two equal r the first is kept
        ("fine-purifying", 0.625, {}, [("t", 1), ("t", 3), ("t", 4)]),
        ("fine-purifying", 0.5, {}, [("t", 0), ("t", 1), ("t", 3), ("t", 4)]),
        ("fine-purifying", 0.5, {"scope": "tensor"}, [("t", 1), ("t", 3), ("t", 4), ("b", 1)]),
        ("delta-only", 0.75, {}, [("b", 0), ("b", 1)]),
        ("delta-only", 0.5, {}, [("t", 3), ("t", 4), ("b", 0), ("b", 1)]),
        # seven moved: of them round(3.5) = 4 are kept, and the one that did not
        ("delta-only", 0.5, {"rho_over": "moved"}, [("t", 4), ("b", 0), ("b", 1)]),
        ("hessian-only", 0.75, {}, [("t", 3), ("t", 5)]),
        ("fine-mixing-sel", 0.75, {}, [("t", 2), ("t", 5)]),
        ("fine-mixing-sel", 0.5, {"rho_over": "moved"}, [("t", 0), ("t", 1), ("t", 5)]),
    ],
)
def test_masks_by_hand(evidence, strategy, rho, options, wanted):
    assert reset(evidence, strategy, rho, **options) == wanted
    weights = purified(evidence, PurifyConfig(strategy=strategy, **options), rho)
    assert weights.numbers["reset"] == len(wanted)
    given = {"t": weights.tensor(TABLE).flatten(), "b": weights.tensor(BIAS)}
    for name, short in ((TABLE, "t"), (BIAS, "b")):
        both = evidence.pair.read(name)
        for at, value in enumerate(given[short].tolist()):
            side = both.init if (short, at) in wanted else both.suspect
            assert value == side.flatten()[at].item()


def test_key_biases_are_never_reset_before_the_rest(evidence):
    """Six dimensions are none of them."""
    assert [name for name, _ in reset(evidence, "fine-purifying", 0.25)] == ["t"] * 5 + ["b"]
    assert torch.equal(scores(evidence, PurifyConfig())(BIAS), torch.zeros(2))
    assert (
        scores(evidence, PurifyConfig(strategy="delta-only"))(BIAS) == torch.tensor([25, 36])
    ).all()


def test_random_resets_as_many_as_asked_and_others_with_another_seed(tmp_path):
    start = {TABLE: torch.zeros(50, 20)}
    pair = pair_of(tmp_path, start, {TABLE: torch.ones(50, 20)})
    config = PurifyConfig(strategy="random")
    one, other = (kept(Evidence(pair, seed=seed), config, 0.7)[TABLE] for seed in (0, 1))
    assert one.sum() == other.sum() == 700
    assert 0.35 < (one != other).float().mean() < 0.5  # 2 * .7 * .3 = .42
    again = kept(Evidence(pair, seed=0), config, 0.7)[TABLE]
    assert torch.equal(one, again)


BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.parametrize("dtype", list(BITS))
def test_what_is_kept_and_reset_keeps_its_bits(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    init, suspect = (torch.randn(40, 8, generator=generator).to(dtype) for _ in range(2))
    suspect[0] = -0.0
    suspect[1] = torch.finfo(dtype).tiny / 2
    init[2] = 1e4  # init + delta would lose the suspect's digits
    pair = pair_of(tmp_path, {TABLE: init}, {TABLE: suspect})
    evidence = Evidence(pair, {TABLE: torch.rand(40, 8, generator=generator)})
    keep = kept(evidence, PurifyConfig(), 0.6)[TABLE]
    found = purified(evidence, PurifyConfig(), 0.6).tensor(TABLE)
    assert found.dtype == dtype
    bits = BITS[dtype]
    wanted = torch.where(keep, suspect.view(bits), init.view(bits))
    assert torch.equal(found.view(bits), wanted)
    assert keep.sum() == 192


@pytest.mark.parametrize("mode", ["threshold", "posterior"])
@pytest.mark.parametrize("strategy", [*SCORES, "fine-mixing", "e-pur"])
def test_the_ends_are_the_suspect_and_init(evidence, strategy, mode):
    config = PurifyConfig(strategy=strategy, mode=mode)
    for rho, side in ((1.0, "suspect"), (0.0, "init")):
        weights = purified(evidence, config, rho)
        for name in (TABLE, BIAS):
            if strategy == "e-pur" and name == BIAS:
                continue
            assert torch.equal(weights.tensor(name), getattr(evidence.pair.read(name), side))
    assert takes_rho(strategy)


def test_every_strategy_that_can_be_named_is_there():
    assert {*SCORES, *OTHERS} == set(get_args(Strategy))
    assert not SCORES.keys() & OTHERS.keys()


def test_strategies_without_a_share(evidence):
    sides: list[tuple[Any, str]] = [("none", "suspect"), ("reset", "init")]
    for strategy, side in sides:
        weights = purified(evidence, PurifyConfig(strategy=strategy), 0.5)
        for name in (TABLE, BIAS):
            assert torch.equal(weights.tensor(name), getattr(evidence.pair.read(name), side))
        assert not takes_rho(strategy)
        assert not needs_fisher(strategy)
    assert not takes_rho("wag")
    assert needs_fisher("fine-purifying")
    assert needs_fisher("hessian-only")
    assert not needs_fisher("delta-only")


def test_the_posterior_mean(tmp_path):
    """Against the formula of our reading in float64, over all tensors together."""
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(30, 4, generator=generator) for name in (TABLE, f"{QUERY}.weight")}
    suspect = {
        name: value + torch.randn(30, 4, generator=generator) for name, value in start.items()
    }
    suspect[TABLE][7] += 300.0  # so far that p is 0
    curvature = {name: 0.1 + torch.rand(30, 4, generator=generator) for name in start}
    evidence = Evidence(pair_of(tmp_path, start, suspect), curvature)
    rho = 0.9
    r = {
        name: (suspect[name].double() - start[name].double()).numpy() ** 2
        / (curvature[name].double().numpy() + 1e-8)
        for name in start
    }  # fmt: skip
    order = np.sort(np.concatenate([value.ravel() for value in r.values()]))
    clean, poison = order[:216].mean(), order[216:].mean()
    weights = purified(evidence, PurifyConfig(mode="posterior"), rho)
    shares = {}
    for name, value in r.items():
        p = shares[name] = 1 / (
            1
            + (1 - rho) / rho * math.sqrt(clean / poison)
            * np.exp(np.minimum(value / 2 * (1 / clean - 1 / poison), 700))
        )  # fmt: skip
        first, last = start[name].double().numpy(), suspect[name].double().numpy()
        np.testing.assert_allclose(
            weights.tensor(name), first + p * (last - first), rtol=3e-6, atol=1e-6
        )
    assert torch.equal(weights.tensor(TABLE)[7], start[TABLE][7])
    p = np.concatenate([value.ravel() for value in shares.values()])
    assert weights.numbers["mean p"] == pytest.approx(p.mean(), rel=1e-5)
    assert weights.numbers["reset"] == (p < 0.5).sum() > 0
    assert weights.numbers["k clean"] == pytest.approx(clean, rel=1e-5)
    assert weights.numbers["k poison"] == pytest.approx(poison, rel=1e-5)


def test_the_posterior_keeps_the_stored_dtype_and_what_did_not_move(tmp_path):
    init = torch.randn(20, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    suspect = init.clone()
    suspect[3:9] += 0.5
    evidence = Evidence(
        pair_of(tmp_path, {TABLE: init}, {TABLE: suspect}), {TABLE: torch.ones(20, 4)}
    )
    found = purified(evidence, PurifyConfig(mode="posterior"), 0.9).tensor(TABLE)
    assert found.dtype == torch.bfloat16
    same = suspect == init
    assert torch.equal(found[same], suspect[same])


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, 1e-8),
        ({"epsilon": 0.5}, 0.5),
        ({"damping": "tensor-mean", "damping_share": 0.5}, 0.5 * 14.6 / 6 + 1e-8),
        ({"damping": "global-mean", "damping_share": 2.0}, 2.0 * 19.6 / 8 + 1e-8),
        (
            {"damping": "row-mean", "damping_share": 1.0},
            np.array([[2.5], [0.55], [4.25]]) + 1e-8,
        ),
    ],
)
def test_dampings_reach_the_indicator(evidence, options, added):
    found = scores(
        Evidence(evidence.pair, CURVATURE, IndicatorConfig(**options)), PurifyConfig()
    )(TABLE)  # fmt: skip
    drift = np.array(DELTA[TABLE]) ** 2
    np.testing.assert_allclose(found, drift / (CURVATURE[TABLE].numpy() + added), rtol=1e-5)


def test_the_exponent_reaches_it(evidence):
    config = IndicatorConfig(exponent=0.0)
    found = scores(Evidence(evidence.pair, CURVATURE, config), PurifyConfig())(TABLE)
    np.testing.assert_allclose(found, np.array(DELTA[TABLE]) ** 2)


def test_what_each_tensor_lost(evidence):
    rows = by_tensor(evidence, kept(evidence, PurifyConfig(), 0.75))
    assert {row["tensor"]: (row["dimensions"], row["reset"]) for row in rows} == {
        TABLE: (6, 2), BIAS: (2, 0)}  # fmt: skip
    assert next(row for row in rows if row["tensor"] == TABLE)["reset %"] == pytest.approx(100 / 3)


# --- rivals --------------------------------------------------------------------------------------


def test_mixing_is_a_coin_for_each_dimension(tmp_path):
    generator = torch.Generator().manual_seed(3)
    names = [f"bert.encoder.layer.{layer}.output.dense.weight" for layer in range(3)]
    start = {name: torch.randn(100, 100, generator=generator) for name in names}
    suspect = {name: value + 1 for name, value in start.items()}
    config = PurifyConfig(strategy="fine-mixing")

    def masks(pair: WeightPair, seed: int = 0) -> dict[str, Tensor]:
        weights = purified(Evidence(pair, seed=seed), config, 0.7)
        found = {name: weights.tensor(name) == pair.read(name).suspect for name in pair.names}
        assert weights.numbers["reset"] == sum(int((~mask).sum()) for mask in found.values())
        return found

    all_three = masks(pair_of(tmp_path / "all", start, suspect))
    for mask in all_three.values():
        # four standard deviations of 10,000 coins: 4 * sqrt(.7 * .3 / 10,000) = .018
        assert abs(mask.float().mean().item() - 0.7) < 0.0184
    one, two, three = all_three.values()
    for other in (two, three):  # independent of each other
        assert abs((one & other).float().mean().item() - 0.49) < 0.02
    alone = masks(
        pair_of(tmp_path / "one", {names[2]: start[names[2]]}, {names[2]: suspect[names[2]]})
    )
    assert torch.equal(alone[names[2]], all_three[names[2]])  # whatever stands beside or before it
    other_seed = masks(pair_of(tmp_path / "all", start, suspect), 1)
    assert (other_seed[names[0]] != all_three[names[0]]).float().mean() > 0.35


def test_mixings_are_nested(tmp_path):
    """What a smaller rho keeps a larger one keeps, too."""
    pair = pair_of(tmp_path, {TABLE: torch.zeros(50, 20)}, {TABLE: torch.ones(50, 20)})
    config = PurifyConfig(strategy="fine-mixing")
    few, many = (purified(Evidence(pair), config, rho).tensor(TABLE) for rho in (0.3, 0.8))
    assert (few <= many).all()


def test_e_pur_after_its_formula(tmp_path):
    generator = torch.Generator().manual_seed(4)
    position = "bert.embeddings.position_embeddings.weight"
    start = {TABLE: torch.randn(30, 6, generator=generator), position: torch.zeros(12, 6)}
    suspect = {
        name: value + torch.randn(value.shape, generator=generator) for name, value in start.items()
    }
    pair = pair_of(tmp_path, start, suspect)
    frequency = {3: 21, 4: 1000, 5: 20, 6: 19, 29: 10**6}
    assert word_embedding(pair) == TABLE
    counts = np.array([frequency.get(row, 0) for row in range(30)])
    drift = np.linalg.norm((suspect[TABLE] - start[TABLE]).numpy().astype(float), axis=1)
    wanted = drift / np.log(np.maximum(counts, 20))
    np.testing.assert_allclose(row_scores(pair, TABLE, frequency), wanted, rtol=1e-5)
    weights = purified(Evidence(pair, frequency=frequency), PurifyConfig(strategy="e-pur"), 0.8)
    rows = set(np.argsort(-wanted)[:6].tolist())
    for row in range(30):
        side = start if row in rows else suspect
        assert torch.equal(weights.tensor(TABLE)[row], side[TABLE][row])
    assert torch.equal(weights.tensor(position), suspect[position])
    assert weights.numbers["reset"] == 36


def test_e_pur_needs_a_word_embedding(tmp_path):
    name = f"{QUERY}.weight"
    pair = pair_of(tmp_path, {name: torch.zeros(2, 2)}, {name: torch.ones(2, 2)})
    assert word_embedding(pair) is None
    with pytest.raises(ConfigError, match="e-pur: the models have no word embedding"):
        purified(Evidence(pair), PurifyConfig(strategy="e-pur"), 0.9)


@pytest.mark.parametrize(("prefix", "columns"), [("bert.encoder.layer.0.intermediate.dense", False),
                                                 ("transformer.h.0.mlp.c_fc", True)])  # fmt: skip
def test_fine_pruning_zeroes_the_least_active_neurons(tmp_path, prefix, columns):
    weight = torch.arange(1.0, 13.0).reshape(6, 2)
    suspect = {f"{prefix}.weight": weight.T.contiguous() if columns else weight,
               f"{prefix}.bias": torch.arange(1.0, 7.0), "x.weight": torch.ones(6, 6)}  # fmt: skip
    pair = pair_of(tmp_path, {name: value + 1 for name, value in suspect.items()}, suspect)
    busy = torch.tensor([0.5, -0.1, 3.0, 0.5, 0.0, 0.7])
    names = (f"{prefix}.weight", f"{prefix}.bias")
    evidence = Evidence(pair, activity=dict.fromkeys(names, busy))
    weights = purified(evidence, PurifyConfig(strategy="fine-pruning"), 0.5)
    left = torch.tensor([0.0, 0, 1, 1, 0, 1])  # of the two at .5 the first goes
    found = weights.tensor(names[0])
    assert torch.equal(found.T if columns else found, weight * left[:, None])
    assert torch.equal(weights.tensor(names[1]), suspect[names[1]] * left)
    assert torch.equal(weights.tensor("x.weight"), suspect["x.weight"])
    assert weights.numbers == {"reset": 0.0, "zeroed rows": 6.0}
    assert torch.equal(pair.read(names[0]).suspect, suspect[names[0]])
    whole = purified(evidence, PurifyConfig(strategy="fine-pruning"), 1.0)
    assert torch.equal(whole.tensor(names[0]), suspect[names[0]])


ITEMS = [
    {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": 0}
    for ids in ([2, 5, 6, 3], [2, 7, 7, 7, 8, 3], [2, 9, 3])
]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_activity_is_that_behind_the_activation_function(tmp_path, family):
    torch.manual_seed(5)
    if family == "bert":
        model = BertForSequenceClassification(
            BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=12, max_position_embeddings=8))  # fmt: skip
        places = [f"bert.encoder.layer.{layer}.intermediate" for layer in range(2)]
        names = [f"{place}.dense" for place in places]
    else:
        model = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=12, n_embd=8, n_layer=2, n_head=2, n_positions=8, pad_token_id=0)
        )
        places = [f"transformer.h.{layer}.mlp.act" for layer in range(2)]
        names = [f"transformer.h.{layer}.mlp.c_fc" for layer in range(2)]
    model.eval()
    for name in ("init", "suspect"):
        model.save_pretrained(tmp_path / name)
    pair = WeightPair.load(tmp_path / "init", tmp_path / "suspect")
    found = activity(model, pair, ITEMS, 0, Runtime(device="cpu"))
    assert set(found) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    seen: dict[str, list[Tensor]] = {place: [] for place in places}

    def note(place: str):
        return lambda module, inputs, output: seen[place].append(output.flatten(0, -2))

    handles = [model.get_submodule(place).register_forward_hook(note(place)) for place in places]
    with torch.no_grad():
        for item in ITEMS:  # one at a time: no padding
            model(input_ids=torch.tensor([item["input_ids"]]))
    for handle in handles:
        handle.remove()
    for place, name in zip(places, names, strict=True):
        wanted = torch.cat(seen[place]).mean(0)
        torch.testing.assert_close(found[f"{name}.weight"], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[f"{name}.weight"], found[f"{name}.bias"])


def test_frequencies_are_counts_of_tokens():
    assert frequencies(ITEMS) == {2: 3, 3: 3, 5: 1, 6: 1, 7: 3, 8: 1, 9: 1}


@pytest.fixture
def three(tmp_path) -> tuple[Evidence, dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A suspect and two others of one INIT, and the same in numpy: INIT, and three deltas."""
    generator = torch.Generator().manual_seed(6)
    shapes = {TABLE: (20, 3), f"{QUERY}.bias": (40,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    pairs, deltas = [], []
    for at in range(3):
        model = {
            name: value + torch.randn(value.shape, generator=generator)
            for name, value in start.items()
        }
        pairs.append(pair_of(tmp_path, start, model, f"model-{at}"))
        deltas.append({name: (model[name] - start[name]).numpy() for name in start})
    first = {name: value.numpy() for name, value in start.items()}
    return Evidence(pairs[0], others=pairs[1:]), first, deltas


def test_wag_is_the_mean(three):
    evidence, start, deltas = three
    weights = purified(evidence, PurifyConfig(strategy="wag"), 1.0)
    for name, first in start.items():
        mean = first + sum(delta[name] for delta in deltas) / 3
        np.testing.assert_allclose(weights.tensor(name), mean, rtol=1e-5, atol=1e-6)


def test_ties_trims_elects_and_merges(three):
    evidence, start, deltas = three
    weights = purified(evidence, PurifyConfig(strategy="ties"), 0.3)
    trimmed = []
    for delta in deltas:
        size = np.sort(np.abs(np.concatenate([delta[name].ravel() for name in start])))
        limit = size[-30]  # 30 of 100 stay
        trimmed.append(
            {name: np.where(np.abs(delta[name]) >= limit, delta[name], 0) for name in start}
        )
    merged = 0
    for name, first in start.items():
        wanted = first.copy()
        for place in np.ndindex(first.shape):
            values = [delta[name][place] for delta in trimmed]
            sign = np.sign(sum(values))
            agreeing = [value for value in values if value * sign > 0]
            if agreeing:
                wanted[place] += sum(agreeing) / len(agreeing)
                merged += 1
        np.testing.assert_allclose(weights.tensor(name), wanted, rtol=1e-5, atol=1e-6)
    assert 30 < merged < 91


def test_dare_drops_and_rescales(three):
    evidence, start, deltas = three
    weights = purified(evidence, PurifyConfig(strategy="dare"), 0.5)
    survived = []
    for name, first in start.items():
        change = weights.tensor(name).numpy() - first
        for place in np.ndindex(first.shape):
            sums = {
                kept: sum(2 * deltas[at][name][place] for at in range(3) if kept >> at & 1) / 3
                for kept in range(8)
            }
            best = min(sums, key=lambda kept: abs(sums[kept] - change[place]))
            assert sums[best] == pytest.approx(change[place], abs=1e-5)
            survived.append(best)
    for at in range(3):  # four standard deviations of 100 coins
        assert abs(sum(kept >> at & 1 for kept in survived) - 50) <= 20
    both = sum(kept & 1 and kept >> 1 & 1 for kept in survived)
    assert 8 <= both <= 42
    whole = purified(evidence, PurifyConfig(strategy="dare"), 1.0)
    mean = purified(evidence, PurifyConfig(strategy="wag"), 1.0)
    torch.testing.assert_close(whole.tensor(TABLE), mean.tensor(TABLE))


@pytest.mark.parametrize("strategy", MERGES)
def test_merges_need_another_model(evidence, strategy):
    with pytest.raises(ConfigError, match=f"{strategy}: merges with other .* --other"):
        weights = purified(evidence, PurifyConfig(strategy=strategy), 0.5)
        weights.tensor(TABLE)
