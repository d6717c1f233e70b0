import json
import random

import pytest
import torch
from cascadebert.cascade import Cascade, single
from cascadebert.data import Examples
from cascadebert.evaluate import compare
from cascadebert.policy import Policy
from octavo import tiny
from octavo.errors import ConfigError, DataError, ModelError
from octavo.runtime import Runtime
from transformers import AutoConfig, AutoModelForSequenceClassification

WORDS = "one two three four five six seven eight nine ten".split()
TEXTS = [
    "",
    *(" ".join(random.Random(i).choices(WORDS, k=1 + i % 9)) for i in range(43)),
    "one " * 99,
]
LABELS = ["no", "yes", "maybe"]
FAMILIES = ["bert", "modernbert", "roberta", "distilbert", "deberta-v2"]
CPU = Runtime(device="cpu")


def save_classifier(folder, kind="bert", layers=1, width=16, labels=LABELS, seed=0, **settings):
    """A classifier with random weights and its tokenizer, as a fine-tuned one lies on the hub."""
    shape = tiny.Shape(kind="bert", vocabulary=100, max_length=64)
    tokenizer = tiny.make_tokenizer(TEXTS, shape)
    if kind not in ("bert", "deberta-v2"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": 2, "intermediate_size": 2 * width, "max_position_embeddings": 66,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
        "sep_token_id": 3, "initializer_range": 0.5,
    }  # fmt: skip
    if kind == "distilbert":
        sizes |= {"dim": width, "n_layers": layers, "n_heads": 2, "hidden_dim": 2 * width}
    torch.manual_seed(seed)
    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    config = AutoConfig.for_model(kind, **(sizes | names | settings))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two stages of other families, widths and label orders."""
    folder = tmp_path_factory.mktemp("pair")
    small = save_classifier(folder / "small", "distilbert", layers=1, width=16, seed=1)
    turned = ["maybe", "no", "yes"]
    large = save_classifier(folder / "large", "bert", layers=3, width=32, labels=turned, seed=2)
    return [small, large]


def middle(cascade, examples):
    scores = cascade.predict(examples, -1e9).scores.sort().values
    return float((scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2)


@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_pooled_batched_and_run_all_answer_alike(pair, batch_tokens):
    examples = Examples(TEXTS)
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    threshold = middle(cascade, examples)
    everything = cascade.run_all(examples, threshold)
    assert 0 < everything.stages.sum() < len(TEXTS)
    cascade.batch_tokens = batch_tokens
    pooled = cascade.predict(examples, threshold)
    assert pooled.labels == everything.labels
    assert torch.equal(pooled.stages, everything.stages)
    assert torch.allclose(pooled.logits, everything.logits, atol=1e-5)
    assert torch.allclose(pooled.scores, everything.scores, atol=1e-4)


def test_one_at_a_time_answers_alike(pair):
    examples = Examples(TEXTS)
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    threshold = middle(cascade, examples)
    together = cascade.predict(examples, threshold)
    alone = [cascade.predict(examples.at([i]), threshold) for i in range(len(examples))]
    assert [one.labels[0] for one in alone] == together.labels
    assert [one.stages.item() for one in alone] == together.stages.tolist()


def test_the_large_model_sees_only_what_is_deferred(pair, monkeypatch):
    examples = Examples(TEXTS)
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    threshold = middle(cascade, examples)
    seen = []
    forward = cascade.stages[1].model.forward

    def counting(*args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(cascade.stages[1].model, "forward", counting)
    answers = cascade.predict(examples, threshold)
    assert sum(seen) == int((answers.stages == 1).sum()) < len(TEXTS)
    seen.clear()
    cascade.predict(examples, -1e9)
    assert seen == []


def test_logits_are_the_models_own_in_the_order_of_the_label_names(pair):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    assert cascade.labels == LABELS
    model = AutoModelForSequenceClassification.from_pretrained(pair[1]).eval()
    stage = cascade.stages[1]
    batch = stage.tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        own = model(**batch).logits
    assert torch.allclose(cascade.logits(1, Examples(TEXTS[:3])), own[:, [1, 2, 0]], atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_encoder_of_the_hub_can_be_a_stage(tmp_path, kind):
    small = save_classifier(tmp_path / "small", "bert")
    large = save_classifier(tmp_path / "large", kind, layers=2, width=32)
    cascade = Cascade.from_pretrained([small, large], runtime=CPU)
    examples = Examples(TEXTS, pairs=TEXTS[::-1])
    threshold = middle(cascade, examples)
    pooled, everything = cascade.predict(examples, threshold), cascade.run_all(examples, threshold)
    assert pooled.labels == everything.labels
    assert torch.equal(pooled.stages, everything.stages)
    small_cost, large_cost = cascade.costs([16, 16])
    assert large_cost.flops > 2 * small_cost.flops
    assert (small_cost.layers, large_cost.layers) == (1, 2)
    assert large_cost.parameters > small_cost.parameters


def test_half_precision_keeps_the_policy_valid(pair):
    full = Cascade.from_pretrained(pair, runtime=CPU)
    half = Cascade.from_pretrained(pair, runtime=Runtime(device="cpu", dtype="bfloat16"))
    assert next(half.stages[0].model.parameters()).dtype == torch.bfloat16
    assert half.hashes == full.hashes
    examples = Examples(TEXTS)
    assert torch.allclose(half.logits(1, examples), full.logits(1, examples), atol=1.0)


def test_other_weights_have_other_hashes(pair, tmp_path):
    other = save_classifier(tmp_path / "other", "distilbert", seed=5)
    first = Cascade.from_pretrained(pair, runtime=CPU).hashes
    assert Cascade.from_pretrained([other, pair[1]], runtime=CPU).hashes[0] != first[0]
    assert Cascade.from_pretrained(pair, runtime=CPU).hashes == first


def test_long_texts_are_cut_to_what_the_model_takes(tmp_path):
    folder = save_classifier(tmp_path / "roberta", "roberta")
    cascade = Cascade.from_pretrained([folder, folder], runtime=CPU)
    assert cascade.stages[0].max_length == 64  # 66 positions, two of them for padding
    assert len(cascade.stages[0].encode(Examples(["one " * 500]))[0]["input_ids"]) == 64
    short = Cascade.from_pretrained([folder, folder], max_length=8, runtime=CPU)
    assert len(short.stages[0].encode(Examples(["one " * 500]))[0]["input_ids"]) == 8


def test_models_that_do_not_belong_together(tmp_path, pair):
    other = save_classifier(tmp_path / "other", labels=["a", "b", "c"])
    with pytest.raises(ModelError, match=r"other: its labels \(a, b, c\) are not those of the fi"):
        Cascade.from_pretrained([pair[0], other], runtime=CPU)
    one = save_classifier(tmp_path / "one", labels=["only"])
    with pytest.raises(ModelError, match="a regression head has no confidence"):
        Cascade.from_pretrained([pair[0], one], runtime=CPU)
    with pytest.raises(ModelError, match=r"no cascade there \(cascade.json is missing\)"):
        Cascade.from_pretrained([pair[0]], runtime=CPU)


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path, pair):
    """The authors' code fills the missing layers with noise (section 2 of the method page)."""
    folder = save_classifier(tmp_path / "deep", "bert", layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"the checkpoint lacks bert\.encoder\.layer\.1"):
        Cascade.from_pretrained([pair[0], folder], runtime=CPU)


def test_labels_and_stages_that_do_not_exist(pair):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    with pytest.raises(
        DataError, match="label 'perhaps' is not one of the model's: no, yes, maybe"
    ):
        cascade.class_numbers(Examples(["x"], labels=["perhaps"]))
    with pytest.raises(ConfigError, match="there is no stage 3 of 2"):
        single(cascade, 2)


def test_comparison_by_hand(pair):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    examples = Examples(TEXTS, labels=["no", "yes", "maybe"] * 15)
    threshold = middle(cascade, examples)
    policy = Policy(threshold, "flops", [1.0, 4.0], 2.0, {}, cascade.hashes, {"hash": "other"})
    small, large, both = compare(cascade, policy, examples)
    answers = cascade.run_all(examples, threshold)
    right = [a == b for a, b in zip(answers.labels, examples.labels or [], strict=True)]
    share = float((answers.stages == 1).float().mean())
    assert both["accuracy %"] == pytest.approx(100 * sum(right) / 45)
    assert both["to last stage %"] == pytest.approx(100 * share)
    assert both["speed-up (flops)"] == pytest.approx(4 / (1 + 4 * share))
    assert (small["speed-up (flops)"], large["speed-up (flops)"]) == (4, 1)
    assert large["speed-up (clock)"] == 1
    assert small["95 % from"] <= small["accuracy %"] <= small["to"]


def test_nothing_is_reported_on_the_calibration_rows(pair):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    examples = Examples(TEXTS, labels=["no", "yes", "maybe"] * 15)
    policy = cascade.calibrate(examples, 1.5)
    turned = examples.at(list(reversed(range(len(examples)))))
    for same in (examples, turned):
        with pytest.raises(ConfigError, match="the rows the policy was calibrated on"):
            compare(cascade, policy, same)
    assert compare(cascade, policy, examples, allow_same_split=True)
    assert compare(cascade, policy, examples.at(range(40)))


def test_costs_follow_each_stages_own_tokens(tmp_path):
    long = save_classifier(tmp_path / "long")
    short = save_classifier(tmp_path / "short", max_position_embeddings=6)
    cascade = Cascade.from_pretrained([long, short], runtime=CPU)
    lengths = cascade.lengths(Examples(["one two three four five six seven"]))
    assert lengths == [9, 6]
    assert cascade.costs(lengths)[0].flops > cascade.costs(lengths)[1].flops


def test_labels_without_names_are_their_numbers(tmp_path):
    folder = save_classifier(tmp_path / "one", labels=["LABEL_0", "LABEL_1"])
    assert Cascade.from_pretrained([folder, folder], runtime=CPU).labels == ["0", "1"]


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    folder = save_classifier(tmp_path / "one")
    cascade = Cascade.from_pretrained([folder, folder], runtime=CPU)
    for weight in cascade.stages[0].model.parameters():
        torch.nn.init.constant_(weight, float("nan"))
    with pytest.raises(ModelError, match="one: gives logits that are not finite"):
        cascade.predict(Examples(["one"]), 0.0)


def test_a_broken_description_is_an_error(tmp_path):
    for content in ("{", "[]", '{"stages": 1}'):
        (tmp_path / "cascade.json").write_text(content)
        with pytest.raises(ModelError, match="not a cascade's description"):
            Cascade.from_pretrained([tmp_path], runtime=CPU)


def test_the_manifest_names_stages_relative_to_its_folder(trained, tmp_path):
    import shutil

    moved = shutil.copytree(trained, tmp_path / "moved")
    assert Cascade.from_pretrained([moved], runtime=CPU).labels == ["1", "2", "3", "4", "5"]
