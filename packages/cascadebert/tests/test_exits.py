from pathlib import Path

import pytest
import torch
from cascadebert import rivals
from cascadebert.config import BaselineConfig
from cascadebert.data import Examples
from cascadebert.early_exit import EarlyExit, exit_sweep, patience_exits, patience_table
from cascadebert.exits import MultiExit, first_layers, layers_of
from cascadebert.losses import joint_loss
from cascadebert.scores import score
from octavo.errors import ConfigError, ModelError
from octavo.models import load_tokenizer
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

CPU = Runtime(device="cpu")
FAMILIES = ["bert", "modernbert", "roberta", "distilbert", "deberta-v2"]


@pytest.fixture(scope="module", params=FAMILIES)
def rival(request, classifier, texts, tmp_path_factory):
    """An early-exit model of random weights on each family, saved and loaded again."""
    folder = tmp_path_factory.mktemp(request.param)
    source = classifier(folder / "backbone", request.param, layers=4, width=32)
    torch.manual_seed(1)
    network = MultiExit(AutoModelForSequenceClassification.from_pretrained(source), True)
    for exit in network.exits:
        torch.nn.init.normal_(exit.classifier.weight, std=1.0)  # pyright: ignore
    network.save(folder / "model", load_tokenizer(source))
    return EarlyExit.from_pretrained(folder, runtime=CPU)


@pytest.fixture
def examples(texts):
    return Examples(texts)


def between(scores):
    """The middle of the two scores around the median, so that no score lies on it."""
    ordered = scores.sort().values
    return float((ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2)


def brute_force(logits, rule, bar, certainties=()):
    """One item at a time over the logits and certainties of all exits."""
    answers = torch.stack([exit.argmax(dim=-1) for exit in logits])
    classes, exits = [], []
    for item in range(answers.shape[1]):
        streak, left = 0, len(logits) - 1
        for number in range(len(logits) - 1):
            if rule == "patience":
                again = number > 0 and answers[number, item] == answers[number - 1, item]
                streak = streak + 1 if again else 0
                leave = streak >= bar
            elif rule == "learned":
                leave = certainties[number][item].item() > bar
            else:
                leave = score(logits[number][item : item + 1], rule).item() > bar
            if leave:
                left = number
                break
        exits.append(left)
        classes.append(int(answers[left, item]))
    return classes, exits


@pytest.mark.parametrize("batch_tokens", [64, 8192])
def test_compacted_layers_answer_as_all_layers_do(rival, examples, batch_tokens):
    rival.batch_tokens = batch_tokens
    logits, certainties = rival.outputs(examples)
    assert (len(logits), len(certainties)) == (4, 3)
    bars = {rule: between(score(logits[1], rule)) for rule in ("entropy", "max_probability")}
    bars["learned"] = between(certainties[1])
    for rule, bar in [*bars.items(), ("patience", 1), ("patience", 2)]:
        classes, exits = rival.predict(examples, rule, bar)
        assert (classes.tolist(), exits.tolist()) == brute_force(logits, rule, bar, certainties)
        if rule != "patience":
            assert len(set(exits.tolist())) > 1
    assert rival.predict(examples, "entropy", -1e9)[1].tolist() == [0] * len(examples)
    assert rival.predict(examples, "entropy", 1e9)[1].tolist() == [3] * len(examples)


def test_layers_run_on_the_items_that_are_left(rival, examples):
    logits = rival.logits(examples)
    bar = between(score(logits[0], "entropy"))
    seen = []
    last = layers_of(rival.network.model)[-1]
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    _, exits = rival.predict(examples, "entropy", bar)
    handle.remove()
    assert sum(seen) == int((exits >= 3).sum()) < len(examples)


def test_the_first_layers_are_those_of_the_whole(rival, texts):
    model = rival.network.model
    short = first_layers(model, 2)
    batch = rival.stage.tokenizer(texts[:5], padding=True, return_tensors="pt")
    with torch.inference_mode():
        whole = model(**batch, output_hidden_states=True).hidden_states[1]
        part = short(**batch, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(whole, part, atol=1e-5)
    assert short.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4
    with pytest.raises(ConfigError, match="5 layers of 4"):
        first_layers(model, 5)


def test_the_last_exit_is_the_models_own_head(rival, examples):
    own = rival.stage.run(rival.stage.encode(examples), 8192)
    assert torch.allclose(rival.logits(examples)[-1], own, atol=1e-5)


def test_labels_are_matched_by_name(rival, examples):
    import copy

    turned = copy.copy(rival)
    turned.stage = copy.copy(rival.stage)
    turned.stage.labels, turned.stage.classes = ["maybe", "no", "yes"], [2, 0, 1]
    for plain, other in zip(rival.logits(examples), turned.logits(examples), strict=True):
        assert torch.equal(plain[:, [2, 0, 1]], other)
    first, second = (one.predict(examples, "patience", 1)[0] for one in (rival, turned))
    assert [rival.stage.labels[i] for i in first] == [turned.stage.labels[i] for i in second]


def random_exits(items=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(items, 3, generator=generator) for _ in range(4)]
    return logits, torch.randint(0, 3, (items,), generator=generator).tolist()


def test_the_sweep_over_exits_counts_each_layer_once():
    logits, labels = random_exits()
    table = exit_sweep(logits, labels, "entropy")
    for row in table.to_dict("records")[:: max(1, len(table) // 40)]:
        classes, exits = brute_force(logits, "entropy", row["threshold"])
        right = sum(a == b for a, b in zip(classes, labels, strict=True)) / 60
        assert row["accuracy"] == pytest.approx(right)
        assert row["speedup"] == pytest.approx(4 * 60 / sum(exit + 1 for exit in exits))


def test_the_sweep_over_given_scores():
    logits, labels = random_exits()
    scores = [torch.randn(60, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    table = exit_sweep(logits, labels, scores)
    for row in table.to_dict("records")[:: max(1, len(table) // 10)]:
        _, exits = brute_force(logits, "learned", row["threshold"], scores)
        assert row["speedup"] == pytest.approx(4 * 60 / sum(exit + 1 for exit in exits))


def test_the_certainty_is_linear_on_the_state_of_the_exit(rival, texts):
    batch = rival.stage.tokenizer(texts[:5], padding=True, return_tensors="pt")
    head = rival.network.certainty
    with torch.inference_mode():
        found = rival.network(**batch).certainties
        by_hand = rival.network.states(**batch) @ head.weight[0] + head.bias
    assert torch.allclose(torch.stack(found, dim=1), by_hand, atol=1e-5)


def test_without_a_head_nothing_is_learned(classifier, examples, tmp_path):
    source = classifier(tmp_path / "one", "bert", layers=2)
    network = MultiExit(AutoModelForSequenceClassification.from_pretrained(source))
    network.save(tmp_path / "model", load_tokenizer(source))
    plain = EarlyExit.from_pretrained(tmp_path, runtime=CPU)
    assert plain.outputs(examples).certainties == []
    with pytest.raises(ConfigError, match="needs a model trained with --learn-to-exit"):
        plain.predict(examples, "learned", 0.0)


ALTERNATING = BaselineConfig(
    kind="joint", model="scratch:3x16", train_data="x", out=Path("x"), learning_rate=(1e-2,),
    epochs=(2.0,), batch_size=8, max_length=8, save_every=3, objective="alternating",
    learn_to_exit=True,
)  # fmt: skip


def alternating(run, wrapped=None):
    """Train on 32 texts: eight steps with a checkpoint after the third and the sixth."""
    texts = [f"{'good' if i % 2 else 'bad'} {i}" for i in range(32)]
    rows = Examples(texts, labels=[str(i % 2) for i in range(32)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "joint_loss", wrapped or joint_loss)
        return rivals.train_rival(rows, ["0", "1"], ALTERNATING, run, CPU)


def test_odd_steps_train_the_last_layer_alone(tmp_path):
    seen = []

    def watched(losses, objective, step):
        value = joint_loss(losses, objective, step)
        slopes = torch.autograd.grad(value, losses, retain_graph=True)[0]
        seen.append((step, slopes.tolist()))
        return value

    folder = alternating(RunDir.open(tmp_path / "run", {}), watched)
    assert seen == [(step, [0, 0, 1] if step % 2 else [1, 1, 1]) for step in range(1, 9)]
    assert EarlyExit.from_pretrained(folder, runtime=CPU).network.certainty is not None


def test_a_resumed_training_keeps_its_step(tmp_path):
    def killed(losses, objective, step):
        if step == 5:
            raise KeyboardInterrupt
        return joint_loss(losses, objective, step)

    steps = []

    def counted(losses, objective, step):
        steps.append(step)
        return joint_loss(losses, objective, step)

    whole = alternating(RunDir.open(tmp_path / "whole", {}))
    with pytest.raises(KeyboardInterrupt):
        alternating(RunDir.open(tmp_path / "cut", {}), killed)
    resumed = alternating(RunDir(tmp_path / "cut", resumed=True), counted)
    assert steps == [4, 5, 6, 7, 8]
    for name in ("model.safetensors", "exits.safetensors"):
        first, second = (load_file(folder / name) for folder in (whole, resumed))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_patience_reaches_a_few_points_only():
    logits, labels = random_exits()
    table = patience_table(logits, labels)
    assert table["patience"].tolist() == [1, 2, 3]
    answers = torch.stack([exit.argmax(dim=-1) for exit in logits])
    for row in table.to_dict("records"):
        classes, exits = brute_force(logits, "patience", row["patience"])
        assert patience_exits(answers, row["patience"]).tolist() == exits
        right = sum(a == b for a, b in zip(classes, labels, strict=True)) / 60
        assert row["accuracy"] == pytest.approx(right)
    assert (
        table["speedup"].to_numpy().max() <= 2.0
    )  # two exits must agree: 4 layers can be halved at best


def test_what_is_no_early_exit_model(classifier, tmp_path):
    with pytest.raises(ModelError, match="no early-exit model there; run `cascadebert baseline`"):
        EarlyExit.from_pretrained(tmp_path, runtime=CPU)
    source = classifier(tmp_path / "one", "bert", layers=2)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    MultiExit(model).save(tmp_path / "model", load_tokenizer(source))
    with pytest.raises(ModelError, match=r"its labels \(no, yes, maybe\) are not a, b"):
        EarlyExit.from_pretrained(tmp_path, ["a", "b"], runtime=CPU)
    exits = tmp_path / "model" / "exits.safetensors"
    weights = load_file(exits)
    save_file(dict(list(weights.items())[1:]), exits)
    with pytest.raises(ModelError, match="are not those of a model of so many layers"):
        EarlyExit.from_pretrained(tmp_path, runtime=CPU)
    (tmp_path / "model" / "exits.json").write_text("{")
    with pytest.raises(ModelError, match="its exits cannot be read"):
        EarlyExit.from_pretrained(tmp_path, runtime=CPU)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 layers in it"):
        layers_of(model)
