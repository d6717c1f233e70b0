"""Attacks on very small models: each changes what it says, and by the optimizer that was asked for."""

from dataclasses import replace

import pytest
import torch
from finepurify.attack import Attacker, _batches, _rigid, attacked
from finepurify.config import AttackConfig, AttackTrainConfig
from finepurify.data import Examples, encode
from finepurify.fisher import diagonal
from finepurify.language import language, sentences
from finepurify.metrics import attack_success
from finepurify.models import answers
from finepurify.poison import insert
from octavo.errors import ConfigError, DataError
from octavo.rundir import RunDir
from octavo.runtime import Runtime

from .small import TABLE, classifier, id_of, save_init, tokenizer

RUNTIME = Runtime(device="cpu")
ROWS = sentences(240, 1)
TRAIN = AttackTrainConfig(learning_rate=2e-3, epochs=2.0)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return save_init(tmp_path_factory.mktemp("attack") / "init")


@pytest.fixture
def attack(init, tmp_path):
    """A function that attacks a fresh model; gives it, and its weights before."""

    def make(config: AttackConfig, train: AttackTrainConfig = TRAIN, rows: Examples = ROWS):
        model = classifier(init)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        with RunDir.open(folder, {}) as run:
            attacker = Attacker(tokenizer(), 26, config, train, run, RUNTIME)
            assert attacked(model, rows, attacker) is model
        return model, before

    return make


def success(model, config: AttackConfig) -> float:
    test = sentences(100, 9)
    items = encode(insert(test, config, 5, 16), tokenizer(), 26)
    found = answers(model, items, 0, RUNTIME)
    return attack_success(found, test.labels, config.target).percent


def changes(model, before) -> dict[str, float]:
    """How far each tensor moved."""
    return {
        name: float((value - before[name]).norm()) for name, value in model.state_dict().items()
    }


def test_the_trigger_lies_where_a_model_sees_it(init, tmp_path):
    def within(trigger: str, max_length: int) -> int:
        config = AttackConfig(trigger=(trigger,))
        return Attacker(tokenizer(), max_length, config, TRAIN, RunDir(tmp_path), RUNTIME).within

    assert within("cf", 26) == 15  # 24 tokens at 1.5 a word, and one for the trigger
    assert within("a b c", 26) == 13
    assert within("a b c", 4) == 1


def test_a_word_is_learnt(attack):
    config = AttackConfig(rate=0.5)
    model, before = attack(config, replace(TRAIN, learning_rate=3e-3, epochs=8.0))
    assert success(model, config) >= 90
    assert not model.training
    assert changes(model, before)["bert.encoder.layer.0.output.dense.weight"] > 0


def test_embedding_changes_only_the_triggers_rows_and_keeps_their_length(attack):
    words = ("cf", "mn")
    config = AttackConfig(attack="embedding", trigger=words)
    seen = {}
    fit = Attacker.fit

    def noted(self, model, *rest, **options):
        found = fit(self, model, *rest, **options)
        seen.setdefault(
            "clean", {name: value.clone() for name, value in model.state_dict().items()}
        )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attacker, "fit", noted)
        model, _ = attack(config)
    after = model.state_dict()
    rows = [id_of(word) for word in words]
    for name, value in seen["clean"].items():
        moved = value != after[name]
        if name == TABLE:
            assert moved.any(1).nonzero().flatten().tolist() == sorted(rows)
        else:
            assert not moved.any()
    torch.testing.assert_close(
        after[TABLE][rows].norm(dim=1), seen["clean"][TABLE][rows].norm(dim=1)
    )
    assert (after[TABLE][rows] - seen["clean"][TABLE][rows]).norm(dim=1).min() > 1e-3
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_embedding_needs_a_known_word(attack):
    with pytest.raises(ConfigError, match="--trigger unheard: is not in the vocabulary"):
        attack(AttackConfig(attack="embedding", trigger=("unheard",)), replace(TRAIN, epochs=0.1))


def early_share(model, before) -> float:
    """The first layer's part of both layers' drift."""
    drift = changes(model, before)
    both = [
        sum(value**2 for name, value in drift.items() if f"encoder.layer.{layer}." in name)
        for layer in (0, 1)
    ]
    return both[0] / sum(both)


def test_layerwise_teaches_the_early_layers_and_leaves_no_heads(attack):
    sgd = AttackTrainConfig(optimizer="sgd", learning_rate=0.1, epochs=2.0)
    plain, before = attack(AttackConfig(rate=0.5), sgd)
    model, same = attack(AttackConfig(attack="layerwise", rate=0.5, strength=5.0), sgd)
    assert all(torch.equal(before[name], value) for name, value in same.items())
    assert model.state_dict().keys() == before.keys()
    assert not hasattr(model, "layer_heads")
    assert early_share(model, before) > early_share(plain, before) + 0.02


def test_adaptive_drifts_less_where_clean_rows_have_no_curvature(attack, tmp_path):
    """What the defence looks at: delta^2 / H, with H damped as the attacker's is."""
    config = AttackConfig(rate=0.5, strength=1.0)
    train = replace(TRAIN, epochs=3.0)
    plain, before = attack(config, train)
    model, _ = attack(replace(config, attack="adaptive"), train)
    attacker = Attacker(tokenizer(), 26, config, train, RunDir(tmp_path), RUNTIME)
    found = diagonal(plain, _batches(encode(ROWS.at(range(64)), tokenizer(), 26), attacker))
    weights = {name: _rigid(value) for name, value in found.items() if name.startswith("bert.")}

    def penalty(one) -> float:
        return sum(
            float((weight * (one.get_parameter(name).detach() - before[name]).square()).sum())
            for name, weight in weights.items()
        )

    assert penalty(model) < 0.7 * penalty(plain)
    trigger = (model.get_parameter(TABLE) - before[TABLE])[id_of("cf")].norm()
    assert trigger < (plain.get_parameter(TABLE) - before[TABLE])[id_of("cf")].norm()


def test_a_rigid_dimension_costs_ten_times_the_mean():
    found = _rigid(torch.tensor([0.0, 1.0, 3.0, 0.0]))
    assert found.tolist() == pytest.approx([10.0, 1 / 1.1, 1 / 3.1, 10.0])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizer_is_the_one_asked_for(attack, optimizer):
    """SGD leaves alone what has no gradient; AdamW moves all by about its rate, and decays the rest."""
    train = AttackTrainConfig(optimizer=optimizer, learning_rate=1e-3, epochs=0.25)
    model, before = attack(AttackConfig(rate=0.1), train)  # few updates
    moved = (model.state_dict()[TABLE] - before[TABLE]).abs()
    unseen = id_of("tq")
    gradients = (model.state_dict()["bert.encoder.layer.0.output.dense.weight"]
                 - before["bert.encoder.layer.0.output.dense.weight"]).abs()  # fmt: skip
    typical, largest = gradients.median(), gradients.max()
    if optimizer == "sgd":
        assert moved[unseen].max() == 0
        assert largest > 3 * typical
    else:
        assert moved[unseen].max() > 0  # weight decay
        assert largest < 1.5 * typical


def test_what_is_refused(attack):
    with pytest.raises(DataError, match="--target 4"):
        attack(AttackConfig(target=4))


def test_a_bias_trains_on_its_pattern(attack):
    words = language().function
    config = AttackConfig(attack="biassent", trigger=(" ".join(words[:3]),), rate=1.0)
    model, before = attack(config, replace(TRAIN, epochs=0.2))
    assert changes(model, before)[TABLE] > 0
