"""The analyses against hand-worked numbers, and on models whose answer is known."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from deepseekmoe.analyze import (
    SUM_BINS,
    Trace,
    coactivation,
    disable_top,
    jensen_shannon,
    saturation,
    specialization,
    swap_shared,
    sweep_active,
    trace_routing,
    vocabulary_specialization,
)
from deepseekmoe.corpus import Tokens
from deepseekmoe.evaluate import evaluate_domains, evaluate_lm
from deepseekmoe.layer import intervene
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from octavo.errors import ConfigError, DataError, ModelError


@pytest.fixture
def model(small):
    torch.manual_seed(0)
    made = DeepseekMoeForCausalLM(small(first_k_dense_replace=0)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return made


@pytest.fixture
def tokens():
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.integers(2, 100, 80), draw.integers(150, 300, 80)])
    return Tokens(
        values.astype(np.uint32), np.array([0, 80]), ["low", "high"], np.array([200, 300])
    )


def test_loss_and_bits_a_byte_by_hand(model, tokens):
    found = evaluate_lm(model, tokens, 16, batch_size=3)
    ids = torch.from_numpy(tokens.values.astype(np.int64)).view(10, 16)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    assert found["loss"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert found["tokens"] == 150
    assert found["ppl"] == pytest.approx(np.exp(found["loss"]))
    # 158 of 160 tokens stand for 500 bytes: the first of each document is never predicted
    assert found["bpb"] == pytest.approx(found["loss"] / np.log(2) * 158 / 500)


def test_domains_and_all_of_them(model, tokens):
    rows = evaluate_domains(model, tokens, 16)
    assert [row["domain"] for row in rows] == ["low", "high", "all"]
    assert rows[2]["loss"] == pytest.approx((rows[0]["loss"] + rows[1]["loss"]) / 2)


def test_domains_that_fill_no_window_are_told(model, tokens, caplog):
    short = dataclasses.replace(tokens, starts=np.array([0, 150]))
    rows = evaluate_domains(model, short, 16)
    assert [row["domain"] for row in rows] == ["low"]
    assert "left out, as they fill no window of 16 tokens: high (10 tokens)" in caplog.text
    with pytest.raises(
        DataError, match=r"no domain fills a window of 90 tokens: low \(80 tokens\)"
    ):
        evaluate_domains(model, tokens, 90)


def test_a_batch_without_a_predicted_token_spoils_nothing(model):
    values = np.array([5, 6, 7, 8, 9, 10], dtype=np.uint32)
    starts = np.array([0, 1, 2])  # the first two windows of two begin a document with every token
    tokens = Tokens(values, starts, ["a"] * 3, np.array([1, 1, 4]))
    found = evaluate_lm(model, tokens, 2, batch_size=1)
    whole = evaluate_lm(model, tokens, 2, batch_size=3)
    assert found["tokens"] == whole["tokens"] == 2
    assert found["loss"] == pytest.approx(whole["loss"])
    alone = Tokens(values, np.arange(6), ["a"] * 6, np.ones(6))
    with pytest.raises(DataError, match="no token is predicted"):
        evaluate_lm(model, alone, 2)


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        ("model.layers.1.mlp.gate.weight", "layer 1 gives NaN or infinity"),
        ("model.layers.0.mlp.experts.down_proj", "layer 0 gives"),
        ("model.embed_tokens.weight", "the embedding gives"),
        ("lm_head.weight", "the output layer gives"),
    ],
)
def test_a_model_of_no_numbers_is_told_by_its_layer(model, tokens, weight, told):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter(weight).fill_(float("nan"))
    for analysis in (evaluate_lm, evaluate_domains, trace_routing, disable_top, swap_shared):
        with pytest.raises(ModelError, match=told):
            analysis(model, tokens, 16)
    for pair in ((model, twin), (twin, model)):
        with pytest.raises(ModelError, match=told):
            saturation(*pair, tokens, 16)


def test_disabling_rounds_to_whole_experts(model, tokens):
    rows = disable_top(model, tokens, 16)
    assert [row["disabled"] for row in rows] == ["0/8", "0/8", "1/8", "2/8", "2/8"]
    assert rows[0]["rise"] == rows[1]["rise"] == 0
    with intervene(model, disable_top=1):
        wanted = evaluate_lm(model, tokens, 16)["loss"]
    assert rows[2]["loss"] == wanted != rows[0]["loss"]
    with pytest.raises(ConfigError, match="3 experts a token of 8 with 6 disabled"):
        disable_top(model, tokens, 16, rates=(0.75,))


def test_the_swap_silences_shared_experts_and_adds_routed_ones(model, tokens):
    plain, swapped = swap_shared(model, tokens, 16)
    assert plain["active"] == "2 shared + 3 routed"
    assert swapped["active"] == "0 shared + 5 routed"
    with intervene(model, shared=False, active=5):
        assert swapped["loss"] == evaluate_lm(model, tokens, 16)["loss"]
    with intervene(model, shared=False):  # without the extra routed experts it is another number
        assert swapped["loss"] != evaluate_lm(model, tokens, 16)["loss"]
    assert swapped["rise"] == pytest.approx(swapped["loss"] - plain["loss"])


def test_layers_are_numbered_as_in_the_model(small, tokens):
    later = DeepseekMoeForCausalLM(small(num_hidden_layers=3)).eval()  # the first one is dense
    trace = trace_routing(later, tokens, 16)
    assert trace.layers == [1, 2]
    assert [row["layer"] for row in specialization(trace)] == [1, 2]
    twin = copy.deepcopy(later)
    assert [row["layer"] for row in saturation(twin, later, tokens, 16)] == [1, 2]


def test_the_sweep_ends_at_the_trained_number(model, tokens):
    rows = sweep_active(model, tokens, 16)
    assert [row["active"] for row in rows] == [1, 2, 3]
    assert rows[-1]["trained"]
    assert rows[-1]["loss"] == evaluate_lm(model, tokens, 16)["loss"]
    assert [row["active"] for row in sweep_active(model, tokens, 16, active=[8])] == [8]


def test_the_trace_counts_every_slot(model, tokens, tmp_path):
    trace = trace_routing(model, tokens, 16, batch_size=2, words=True)
    assert trace.domains == ["low", "high"]
    assert trace.counts.shape == (2, 2, 8)
    assert (trace.counts.sum(-1) == 80 * 3).all()
    assert (np.diagonal(trace.pairs, axis1=1, axis2=2) == trace.counts.sum(0)).all()
    assert (trace.pairs.sum((1, 2)) == 160 * 9).all()
    assert trace.words is not None
    assert (trace.words.sum(1) == trace.counts.sum(0)).all()
    assert (trace.gates.sum(-1) < 80).all()  # gates of a token sum to less than one
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.domains == trace.domains
    assert (again.counts == trace.counts).all()
    assert again.words is not None
    with pytest.raises(DataError, match="no domain fills a window of 90"):
        trace_routing(model, tokens, 90)


def test_the_sums_of_gates_are_counted(model, tokens):
    trace = trace_routing(model, tokens, 16, batch_size=3)
    assert trace.sums is not None
    assert trace.sums.shape == (2, SUM_BINS)
    assert trace.sums.sum(axis=1).tolist() == [160, 160]
    middle = (np.arange(SUM_BINS) + 0.5) / SUM_BINS
    mean = trace.gates.sum(axis=(0, 2)) / 160
    assert (trace.sums @ middle / 160).tolist() == pytest.approx(mean.tolist(), abs=0.5 / SUM_BINS)


def test_a_trace_is_saved_and_loaded_whole(model, tokens, tmp_path):
    file = tmp_path / "trace.npz"
    for words in (True, False):
        trace = trace_routing(model, tokens, 16, words=words)
        trace.save(file)
        again = Trace.load(file)
        assert (again.domains, again.layers) == (trace.domains, trace.layers)
        for name in ("counts", "gates", "pairs", "words", "sums"):
            one, two = getattr(trace, name), getattr(again, name)
            assert (one is two is None) or (one.dtype == two.dtype and (one == two).all())
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_a_file_that_is_no_trace_is_told(tmp_path):
    file = tmp_path / "trace.npz"
    hand_trace().save(file)
    data = file.read_bytes()
    whole = dict(np.load(file))

    def told(words=r"trace\.npz: is no routing trace"):
        with pytest.raises(DataError, match=words):
            Trace.load(file)

    for bad in (b"", b"nothing", data[:-30], data[: len(data) // 2], data[60:]):
        file.write_bytes(bad)
        told()
    middle = len(data) // 3
    file.write_bytes(data[:middle] + b"\0" * 40 + data[middle + 40 :])
    told()
    with file.open("wb") as opened:
        np.save(opened, np.zeros(3))
    told()
    for changed in (
        {"counts": np.zeros((2, 1))},
        {"gates": np.zeros((2, 1, 4))},
        {"layers": np.zeros(2, dtype=int)},
        {"sums": np.zeros(3)},
        {"words": np.zeros((1, 5, 4))},
        {"pairs": np.full((1, 3, 3), "x")},
        {"pairs": np.full((1, 3, 3), None)},  # a pickle
    ):
        arrays: dict[str, Any] = {**whole, **changed}
        np.savez(file, **arrays)
        told()
    np.savez(file, counts=whole["counts"], gates=whole["gates"])
    told()
    file.unlink()
    told(r"trace\.npz: No such file")


def test_jensen_shannon_by_hand():
    one, two = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert jensen_shannon(one, two) == pytest.approx(1.0)
    assert jensen_shannon(one, one) == pytest.approx(0.0)
    half = np.array([0.5, 0.5])
    assert jensen_shannon(one, half) == pytest.approx(0.8112781 - 0.5)  # H(3/4) - (0 + 1)/2


def hand_trace():
    counts = np.array([[[8, 0, 2]], [[0, 8, 2]]])
    pairs = np.array([[[8, 0, 2], [0, 8, 2], [2, 2, 4]]])
    return Trace(["a", "b"], counts, counts * 0.5, pairs, [0])


def test_specialization_by_hand():
    (row,) = specialization(hand_trace())
    assert row["JS divergence (bits)"] == pytest.approx(0.8)
    with pytest.raises(ConfigError, match="two or more"):
        specialization(dataclasses.replace(hand_trace(), domains=["a"]))


def test_coactivation_is_over_independence(model, tokens):
    trace = trace_routing(model, tokens, 16)
    rows = coactivation(trace, most=1000)
    total = 160
    for row in rows[:5]:
        first, second = (int(expert) for expert in row["experts"].split(" + "))
        load = np.diag(trace.pairs[row["layer"]])
        assert row["lift"] == pytest.approx(row["tokens"] * total / load[first] / load[second])
    first = [row["lift"] for row in rows if row["layer"] == 0]
    assert first == sorted(first, reverse=True)


def test_vocabulary_names_the_tokens_of_an_expert(model):
    values = np.array([7] * 40 + [9] * 40, dtype=np.uint32)
    tokens = Tokens(values, np.array([0]), ["a"], np.array([80]))
    rows = vocabulary_specialization(trace_routing(model, tokens, 16, words=True), str)
    named = " ".join(row["tokens"] for row in rows)
    assert "'7' 100 %" in named
    with pytest.raises(ConfigError, match="words=True"):
        vocabulary_specialization(trace_routing(model, tokens, 16), str)


def test_a_model_is_saturated_beside_itself_and_not_beside_another(model, tokens, small):
    twin = copy.deepcopy(model)
    assert all(
        row["saturation %"] == pytest.approx(100) for row in saturation(twin, model, tokens, 16)
    )
    other = DeepseekMoeForCausalLM(small(first_k_dense_replace=0)).eval()
    assert all(row["saturation %"] < 80 for row in saturation(other, model, tokens, 16))
    fewer = DeepseekMoeForCausalLM(small()).eval()
    with pytest.raises(ConfigError, match="other layers or experts"):
        saturation(fewer, model, tokens, 16)


def test_a_model_without_routed_or_shared_experts_is_told(tokens, small):
    dense = DeepseekMoeForCausalLM(small(n_routed_experts=0, num_experts_per_tok=0)).eval()
    for analysis in (disable_top, sweep_active, swap_shared, trace_routing):
        with pytest.raises(ConfigError, match="no routed experts"):
            analysis(dense, tokens, 16)
    alone = DeepseekMoeForCausalLM(small(n_shared_experts=0)).eval()
    with pytest.raises(ConfigError, match="no shared experts to swap"):
        swap_shared(alone, tokens, 16)
