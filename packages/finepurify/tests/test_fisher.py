"""The Fisher diagonal against autograd one example at a time, hand-worked numbers and brute force."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finepurify import fisher, hooks
from finepurify.fisher import diagonal
from finepurify.hutchinson import hessian_diagonal
from finepurify.likelihood import sample
from octavo.errors import ConfigError, DataError, ModelError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    Qwen2Config,
    RobertaConfig,
)  # fmt: skip

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 24, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}  # fmt: skip
RELATIVE: dict[str, Any] = {
    "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL),
    "distilbert": DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24,
        initializer_range=0.3,
    ),
    "deberta": DebertaV2Config(**SMALL, relative_attention=True, type_vocab_size=0, **RELATIVE),
    "modernbert": ModernBertConfig(**SMALL, local_attention=8, cls_token_id=1, sep_token_id=2),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24, pad_token_id=0,
        initializer_range=0.3,
    ),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=False),
}  # fmt: skip
PAIRS = {"bert"}
LOOPED = {"deberta": "more than once"}


def model_of(family, causal=False, **options):
    torch.manual_seed(0)
    config = CONFIGS[family]
    if causal:
        return AutoModelForCausalLM.from_config(config)
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # biases and norms away from 0 and 1
        for one in model.parameters():
            one.add_(torch.randn_like(one) * 0.05)
    return model


def batch_of(family="bert", count=5, causal=False):
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 4, 7, 1, 6][:count] if not causal else [9, 4, 7, 2, 6][:count]
    mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 40, (count, 9), generator=generator) * mask
    ids[:, 0] = 7  # the same word in every example, and twice in some
    ids[0, 3] = ids[0, 5] = 7
    labels = ids.clone() if causal else torch.arange(count) % 3
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    if family in PAIRS:
        batch["token_type_ids"] = ((torch.arange(9) > 2) & mask).long()
    return batch


def split(batch, *sizes):
    """The batch in parts, each cut to its longest example."""
    parts = zip(*(one.split(sizes) for one in batch.values()), strict=True)
    for part in parts:
        found = dict(zip(batch, part, strict=True))
        longest = int(found["attention_mask"].sum(1).max())
        yield {name: one[:, :longest] if one.dim() > 1 else one for name, one in found.items()}


def assert_equal(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == one.shape
        off = (found[name] - one).abs().max()
        # key biases are rounding noise: there only the noise's size is compared
        assert off <= tolerance * one.max() + 1e-10, (name, off, one.max())


class Logistic(nn.Module):
    """Two classes by one linear layer; dropout, which must not act."""

    def __init__(self, weight):
        super().__init__()
        self.score = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.9)
        self.score.weight.data = torch.tensor(weight)
        self.score.bias.data.zero_()

    def forward(self, features):
        return SimpleNamespace(logits=self.score(self.drop(features)))


HAND = {"features": torch.tensor([[1.0, 2.0], [3.0, -1.0]]), "labels": torch.tensor([0, 1])}


@pytest.mark.parametrize("engine", ["loop", "hooks", "vmap"])
def test_a_logistic_regression_by_hand(engine):
    """At w = 0, p = 1/2 each: d log p_y / d w_c = (1[c = y] - 1/2) x, so squares are x^2 / 4."""
    model = Logistic([[0.0, 0.0], [0.0, 0.0]])
    for kind in ("empirical", "exact", "sampled"):
        found = diagonal(model, [HAND], kind=kind, engine=engine)
        mean = [(1 + 9) / 8, (4 + 1) / 8]
        torch.testing.assert_close(found["score.weight"], torch.tensor([mean, mean]))
        torch.testing.assert_close(found["score.bias"], torch.tensor([0.25, 0.25]))


def test_kinds_differ_where_the_model_is_sure():
    """x = (1, 0), w_00 = log 3: p = (3/4, 1/4). Label 0: (1/4)^2; 1: (3/4)^2; expected: 3/16."""
    model = Logistic([[float(torch.tensor(3.0).log()), 0.0], [0.0, 0.0]])
    for label, wanted in ((0, 1 / 16), (1, 9 / 16)):
        one = {"features": torch.tensor([[1.0, 0.0]]), "labels": torch.tensor([label])}
        assert diagonal(model, [one])["score.bias"].tolist() == pytest.approx([wanted, wanted])
        exact = diagonal(model, [one], kind="exact")["score.bias"].tolist()
        assert exact == pytest.approx([3 / 16, 3 / 16])


def test_a_batch_mean_squared_is_something_else():
    """Two examples alike but for their label: the mean derivative is 0, the diagonal 1/4."""
    model = Logistic([[0.0, 0.0], [0.0, 0.0]])
    batch = {"features": torch.ones(2, 2), "labels": torch.tensor([0, 1])}
    model.eval()
    nn.functional.cross_entropy(
        model(**{"features": batch["features"]}).logits, batch["labels"]
    ).backward()
    assert model.score.weight.grad is not None
    assert model.score.weight.grad.square().max() == 0
    for engine in ("loop", "hooks"):
        assert diagonal(model, [batch], engine=engine)["score.weight"].min() == 0.25


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["empirical", "exact", "sampled"])
def test_hooks_equal_the_loop(family, kind):
    model, batch = model_of(family), batch_of(family)
    engine = "auto" if family in LOOPED else "hooks"
    found = diagonal(model, split(batch, 3, 2), kind=kind, engine=engine)
    wanted = diagonal(model, split(batch, 1, 1, 1, 1, 1), kind=kind, engine="loop")
    assert_equal(found, wanted)
    assert {name for name, _ in model.named_parameters()} == found.keys()
    used = [name for name, one in found.items() if one.max() > 1e-8]
    assert len(used) > 0.8 * len(found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("kind", ["empirical", "sampled"])
def test_a_language_model_sums_over_tokens(family, kind):
    model, batch = model_of(family, causal=True), batch_of(causal=True)
    tied = family == "gpt2"
    found = diagonal(model, [batch], kind=kind, engine="auto" if tied else "hooks")
    wanted = diagonal(model, split(batch, 2, 3), kind=kind, engine="loop")
    assert_equal(found, wanted)


def test_a_language_model_s_log_p_is_the_library_s():
    model, batch = model_of("llama", causal=True), batch_of(causal=True, count=1)
    batch = {name: one[:, :9] for name, one in batch.items()}
    batch["labels"][0, :4] = -100
    loss = model.eval()(**batch).loss * 5  # the mean over the five tokens left
    loss.backward()
    found = diagonal(model, [batch])
    for name, one in model.named_parameters():
        assert one.grad is not None
        torch.testing.assert_close(found[name], one.grad.square(), rtol=1e-4, atol=1e-9)


def test_padding_in_labels_does_not_count():
    model, batch = model_of("llama", causal=True), batch_of(causal=True)
    masked = batch | {"labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)}
    assert_equal(diagonal(model, [batch]), diagonal(model, [masked]), 0)


def test_finite_differences():
    model, batch = model_of("bert"), batch_of(count=2)
    model = model.double().eval()
    found = diagonal(model, [batch], engine="loop")
    hooked = diagonal(model, [batch], engine="hooks")
    inputs = {name: one for name, one in batch.items() if name != "labels"}

    def log_p():
        with torch.no_grad():
            return model(**inputs).logits.log_softmax(-1)[torch.arange(2), batch["labels"]]

    for name, place in (
        ("bert.embeddings.word_embeddings.weight", (7, 3)),
        ("bert.embeddings.position_embeddings.weight", (2, 5)),
        ("bert.encoder.layer.0.attention.self.key.weight", (4, 9)),
        ("bert.encoder.layer.1.output.LayerNorm.weight", (6,)),
        ("classifier.bias", (1,)),
    ):
        weight = model.get_parameter(name).data
        values = []
        for step in (1e-5, -2e-5):
            weight[place] += step
            values.append(log_p())
        weight[place] += 1e-5
        slope = (values[0] - values[1]) / 2e-5
        wanted = slope.square().mean().item()
        assert found[name][place].item() == pytest.approx(wanted, rel=1e-4)
        assert hooked[name][place].item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_neither_batches_nor_order_matter(kind):
    model, batch = model_of("roberta"), batch_of("roberta")
    once = diagonal(model, [batch], kind=kind)
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = {name: one[order] for name, one in batch.items()}
    assert_equal(diagonal(model, split(turned, 1, 4), kind=kind), once)


def test_draws_do_not_depend_on_batches():
    for causal in (False, True):
        model, batch = model_of("llama", causal), batch_of(causal=causal)
        once = diagonal(model, [batch], kind="sampled", seed=3)
        assert_equal(diagonal(model, split(batch, 1, 3, 1), kind="sampled", seed=3), once)
        other = diagonal(model, [batch], kind="sampled", seed=4)
        assert any((other[name] - one).abs().max() > 1e-3 * one.max() for name, one in once.items())


def test_draws_are_exact_on_average():
    """p = (3/4, 1/4): a draw's square is 1/16 or 9/16, sd 0.2165; 4000 draws, four errors: 0.0137."""
    model = Logistic([[float(torch.tensor(3.0).log()), 0.0], [0.0, 0.0]])
    one = {"features": torch.tensor([[1.0, 0.0]]).repeat(100, 1)}
    found = [
        diagonal(model, [one], kind="sampled", seed=seed)["score.bias"][0] for seed in range(40)
    ]
    assert torch.stack(found).mean().item() == pytest.approx(3 / 16, abs=0.0137)


def test_a_drawn_text_is_exact_on_average():
    """Two words with logits (b, 0): d log p / d b is 1[word = 0] - p, summed over the tokens."""

    class Coin(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor(1.0))

        def forward(self, input_ids):
            zeros = torch.zeros(input_ids.shape)
            return torch.stack((zeros + self.b, zeros), -1)

    words = {"input_ids": torch.zeros(4000, 4).long(), "labels": torch.zeros(4000, 4).long()}
    words["labels"][:, 2] = -100  # two tokens are predicted: 1 and 3
    p = torch.tensor(1.0).sigmoid()
    found = diagonal(Coin(), [words], kind="sampled", engine="vmap")["b"]
    # the square of a sum of two: mean 2 p (1 - p) = 0.393, sd below 0.56; four errors
    assert found.item() == pytest.approx(2 * (p * (1 - p)).item(), abs=4 * 0.56 / 4000**0.5)


def test_dropout_is_off_and_modes_come_back():
    model, batch = model_of("bert"), batch_of()
    model.train()
    model.bert.pooler.eval()
    modes = [one.training for one in model.modules()]
    flags = [one.requires_grad for one in model.parameters()]
    once, again = (diagonal(model, [batch], engine="hooks") for _ in range(2))
    assert_equal(again, once, 0)
    assert [one.training for one in model.modules()] == modes
    assert [one.requires_grad for one in model.parameters()] == flags
    assert all(one.grad is None for one in model.parameters())
    assert not any(one._forward_hooks for one in model.modules())
    assert not model.bert.embeddings.word_embeddings.sparse
    assert_equal(diagonal(model.eval(), [batch], engine="loop"), once)


def test_key_biases_are_noise():
    """Softmax does not see a constant added to its logits."""
    found = diagonal(model_of("bert"), [batch_of()])
    for layer in range(2):
        base = f"bert.encoder.layer.{layer}.attention.self"
        assert found[f"{base}.key.bias"].max() < 1e-10
        assert found[f"{base}.query.bias"].max() > 1e-5


def test_frozen_parameters_are_left_out_and_unused_ones_zero():
    model, batch = model_of("bert"), batch_of()
    batch.pop("token_type_ids")
    whole = diagonal(model, [batch])
    assert whole["bert.embeddings.position_embeddings.weight"][9:].max() == 0
    assert whole["bert.embeddings.word_embeddings.weight"][0].max() == 0  # the padding's row
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    model.classifier.weight.requires_grad_(False)
    model.spare = nn.Linear(2, 2)
    found = diagonal(model, [batch], engine="hooks")
    kept = {name for name, one in model.named_parameters() if one.requires_grad}
    assert found.keys() == kept
    assert found.pop("spare.weight").max() == 0
    found.pop("spare.bias")
    assert_equal(found, {name: whole[name] for name in found})
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


def test_vmap_is_a_cross_check():
    batch = batch_of()
    with pytest.raises(ModelError, match=r"vmap cannot run .*use engine='hooks'"):
        diagonal(model_of("bert"), [batch], engine="vmap")
    model = model_of("bert")
    plain = {name: batch_of()[name][:1] for name in ("input_ids", "token_type_ids", "labels")}
    for kind in ("empirical", "exact"):
        assert_equal(
            diagonal(model, [plain], kind=kind, engine="vmap"),
            diagonal(model, [plain], kind=kind, engine="hooks"),
        )


class Twice(nn.Module):
    """One layer used twice: by calls, by its weight alone, or by rows that are no examples."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.one = nn.Linear(2, 2)
        self.two = nn.Linear(2, 2)
        if way == "tied":
            self.two.weight = self.one.weight
        if way == "own":
            self.scale = nn.Parameter(torch.ones(2))

    def forward(self, features):
        if self.way == "calls":
            return self.two(self.one(self.one(features)))
        if self.way == "weight":
            return self.two(self.one(features)) @ self.one.weight
        if self.way == "rows":
            return self.two(self.one(features.repeat(2, 1))[: len(features)])
        if self.way == "turned":  # positions first: pairs of examples look like pairs of positions
            both = torch.stack((features, features * 2))
            return self.two(self.one(both)).prod(0)
        if self.way == "own":
            return self.two(self.one(features)) * self.scale
        if self.way == "overwritten":
            hidden = features * 1
            found = self.one(hidden)
            hidden += 1
            return self.two(found)
        return self.two(self.one(features))


def test_a_model_is_checked_once_until_its_parameters_or_inputs_change(monkeypatch):
    checks = []
    check = hooks.check
    monkeypatch.setattr(fisher, "check", lambda *given: checks.append(check(*given)))
    model, batch = model_of("bert"), batch_of()
    once = diagonal(model, [batch])
    with torch.no_grad():
        model.classifier.weight.mul_(2)  # the next point of a segment
    twice = diagonal(model, [batch])
    assert len(checks) == 1
    assert not torch.equal(once["classifier.bias"], twice["classifier.bias"])
    assert_equal(twice, diagonal(model, [batch], engine="loop"))
    diagonal(model, [{name: batch[name] for name in ("input_ids", "labels")}])
    model.classifier.bias.requires_grad_(False)
    diagonal(model, [batch])
    assert len(checks) == 3


def test_the_check_sees_tokens_that_both_examples_have():
    batch = batch_of()
    found = sample(batch, 3)
    assert found["input_ids"].tolist() == batch["input_ids"][[0, 2], :3].tolist()
    assert found["labels"].tolist() == [0, 2]
    left = {name: one.flip(1) if one.dim() > 1 else one for name, one in batch.items()}
    assert sample(left)["input_ids"].tolist() == left["input_ids"][[0, 2], 2:].tolist()
    one = {name: value[:1] for name, value in batch.items()}
    assert sample(one)["labels"].tolist() == [0, 0]
    apart = {"attention_mask": torch.eye(2).long(), "labels": torch.tensor([0, 1])}
    assert sample(apart)["attention_mask"].tolist() == [[1, 0], [0, 1]]


def test_the_benchmark_s_ways_agree(benchmark_file):
    found = benchmark_file("bench_fisher").measure(1, 16, 50, 4, 8, 1)
    assert [row["what"] for row in found["ratios"]] == [
        f"{kind}: loop / hooks, batch 8{when}"
        for kind in ("empirical", "exact")
        for when in ("", ", again")
    ]
    assert found["largest difference"] < 1e-4


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("calls", r"one \(Linear\).*more than once"),
        ("weight", r"every use of one\.weight"),
        ("rows", r"one \(Linear\).*4 rows for 2 examples"),
        ("turned", r"every use of "),
        ("tied", r"two \(Linear\).*shares a parameter with one"),
        ("own", r"the model itself \(Twice\).*without a rule"),
        ("overwritten", r"one \(Linear\).*overwritten"),
    ],
)
def test_what_hooks_cannot_see_is_looped(way, says, caplog):
    torch.manual_seed(0)
    model = Twice(way)
    with pytest.raises(ModelError, match=says):
        diagonal(model, [HAND], engine="hooks")
    with caplog.at_level(logging.INFO, "finepurify"):
        try:
            found = diagonal(model, [HAND])
        except RuntimeError:
            assert way == "overwritten"  # autograd refuses it too
            return
    assert "an example at a time: hooks" in caplog.text
    assert_equal(found, diagonal(model, [HAND], engine="loop"))
    assert all(one.requires_grad for one in model.parameters())


def test_embeddings_with_a_rule_of_their_own():
    class Words(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.words = nn.Embedding(5, 2, **options)

        def forward(self, input_ids):
            return self.words(input_ids).sum(1)

    torch.manual_seed(0)
    batch = {
        "input_ids": torch.tensor([[1, 1, 2, 0], [1, 3, 2, 0]]),
        "labels": torch.tensor([0, 1]),
    }
    for options in ({}, {"padding_idx": 0}):
        model = Words(**options)
        found = diagonal(model, [batch], engine="hooks")
        assert_equal(found, diagonal(model, [batch], engine="loop"))
        assert (found["words.weight"][0].max() == 0) == bool(options)
    with pytest.raises(ModelError, match="without a rule"):
        diagonal(Words(scale_grad_by_freq=True), [batch], engine="hooks")


def test_half_precision_is_added_up_in_float32():
    model, batch = model_of("llama"), batch_of("llama")
    wanted = diagonal(model, [batch])
    found = diagonal(model.bfloat16(), [batch], engine="hooks")
    for name, one in wanted.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - one).norm() <= 0.2 * one.norm() + 1e-6


def test_hutchinson_meets_the_whole_hessian():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, features):
            return self.layers(features)

    model = Small()
    batch = {"features": torch.randn(6, 3), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    names = [name for name, _ in model.named_parameters()]
    weights = tuple(one.detach() for one in model.parameters())

    def loss(*values):
        logits = torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), batch["features"]
        )
        return nn.functional.cross_entropy(logits, batch["labels"])

    whole = torch.autograd.functional.hessian(loss, weights)
    parts = [
        {name: one[rows] for name, one in batch.items()} for rows in (slice(0, 2), slice(2, 6))
    ]
    found = hessian_diagonal(model, parts, probes=1500, seed=1)
    signed = 0
    for number, name in enumerate(names):
        exact = whole[number][number].reshape(weights[number].numel(), -1).diagonal()
        signed += int((exact < 0).sum())
        # Var = the sum of the row's other squares over the probes: five errors
        row = torch.cat([one.reshape(weights[number].numel(), -1) for one in whole[number]], 1)
        error = ((row.square().sum(1) - exact.square()) / 1500).sqrt()
        assert ((found[name].flatten() - exact).abs() <= 5 * error + 1e-6).all()
    assert signed
    clamped = diagonal(model, parts, kind="hutchinson", probes=1500, seed=1)
    assert_equal(clamped, {name: one.clamp(min=0) for name, one in found.items()}, 0)


def test_hutchinson_runs_through_attention_and_ignores_batches():
    model, batch = model_of("bert"), batch_of()
    model.spare = nn.Linear(2, 2)
    found = hessian_diagonal(model, [batch], probes=2)
    again = hessian_diagonal(model, split(batch, 4, 1), probes=2)
    for name, one in found.items():
        assert (again[name] - one).abs().max() < 1e-3 * one.abs().max() + 1e-6
    assert found["bert.encoder.layer.0.output.dense.weight"].abs().max() > 1e-3
    assert found["spare.weight"].max() == 0


def test_errors():
    model, batch = model_of("bert"), batch_of()
    for engine in ("hooks", "loop", "vmap"):
        with pytest.raises(ConfigError, match=r'language model.*use kind="sampled"'):
            causal = batch_of(causal=True)
            causal.pop("attention_mask")
            diagonal(model_of("llama", causal=True), [causal], kind="exact", engine=engine)
    with pytest.raises(ConfigError, match="engine of its own"):
        diagonal(model, [batch], kind="hutchinson", engine="hooks")
    with pytest.raises(ConfigError, match="needs one or more"):
        diagonal(model, [batch], kind="hutchinson", probes=0)
    with pytest.raises(DataError, match="no examples"):
        diagonal(model, [])
    with pytest.raises(DataError, match="no examples"):
        diagonal(model, [], kind="hutchinson")
    with pytest.raises(DataError, match=r'needs "labels".*each example; found none'):
        diagonal(model, [{name: one for name, one in batch.items() if name != "labels"}])
    with pytest.raises(DataError, match=r"found torch.Size\(\[2, 7\]\)"):
        diagonal(model, [batch | {"labels": batch["input_ids"]}])
    with pytest.raises(DataError, match="label 3 is out of range: the model knows 0 to 2"):
        diagonal(model, [batch | {"labels": torch.tensor([0, 1, 2, 3, 0])}])
    with pytest.raises(DataError, match="one row an example"):
        diagonal(model, [batch | {"labels": torch.tensor([0])}], engine="loop")
    with pytest.raises(ModelError, match="no parameter that requires gradients"):
        diagonal(model_of("bert").requires_grad_(False), [batch])
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ModelError, match=r"has no log p\(y\|x\)"):
        diagonal(model, [batch])
    model.config.problem_type = None
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        diagonal(model, [batch])
