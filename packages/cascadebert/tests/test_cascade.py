import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cascadebert.cascade import Cascade, single
from cascadebert.config import CalibrateConfig
from cascadebert.data import Examples, seen_before
from cascadebert.evaluate import bench_engines, compare, oracle_point, random_curve
from cascadebert.policy import Policy
from cascadebert.scores import log_odds
from cascadebert.stage import Stage
from octavo.errors import ConfigError, DataError, ModelError
from octavo.runtime import Runtime
from transformers import AutoModelForSequenceClassification

LABELS = ["no", "yes", "maybe"]
FAMILIES = ["bert", "modernbert", "roberta", "distilbert", "deberta-v2"]
CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, classifier):
    """Two stages of other families, widths and label orders."""
    folder = tmp_path_factory.mktemp("pair")
    small = classifier(folder / "small", "distilbert", layers=1, width=16, seed=1)
    turned = ["maybe", "no", "yes"]
    large = classifier(folder / "large", "bert", layers=3, width=32, labels=turned, seed=2)
    return [small, large]


def between(scores):
    """The middle of the two scores around the median, so that no score lies on it."""
    ordered = scores.sort().values
    return float((ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2)


def middle(cascade, examples):
    """A policy that defers half of the examples."""
    return Policy([between(cascade.predict(examples, Policy([-1e9])).scores)])


@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_pooled_batched_and_run_all_answer_alike(pair, batch_tokens, texts):
    examples = Examples(texts)
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    policy = middle(cascade, examples)
    everything = cascade.run_all(examples, policy)
    assert 0 < everything.stages.sum() < len(texts)
    cascade.batch_tokens = batch_tokens
    pooled = cascade.predict(examples, policy)
    assert pooled.labels == everything.labels
    assert torch.equal(pooled.stages, everything.stages)
    assert torch.allclose(pooled.logits, everything.logits, atol=1e-5)
    assert torch.allclose(pooled.scores, everything.scores, atol=1e-4)


def test_one_at_a_time_answers_alike(pair, texts):
    examples = Examples(texts)
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    policy = middle(cascade, examples)
    together = cascade.predict(examples, policy)
    alone = [cascade.predict(examples.at([i]), policy) for i in range(len(examples))]
    assert [one.labels[0] for one in alone] == together.labels
    assert [one.stages.item() for one in alone] == together.stages.tolist()


def test_the_large_model_sees_only_what_is_deferred(pair, monkeypatch, texts):
    examples = Examples(texts)
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    policy = middle(cascade, examples)
    seen = []
    forward = cascade.stages[1].model.forward

    def counting(*args, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(cascade.stages[1].model, "forward", counting)
    answers = cascade.predict(examples, policy)
    assert sum(seen) == int((answers.stages == 1).sum()) < len(texts)
    seen.clear()
    cascade.predict(examples, Policy([-1e9]))
    assert seen == []


def test_logits_are_the_models_own_in_the_order_of_the_label_names(pair, texts):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    assert cascade.labels == LABELS
    model = AutoModelForSequenceClassification.from_pretrained(pair[1]).eval()
    stage = cascade.stages[1]
    batch = stage.tokenizer(texts[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        own = model(**batch).logits
    assert torch.allclose(cascade.logits(1, Examples(texts[:3])), own[:, [1, 2, 0]], atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_encoder_of_the_hub_can_be_a_stage(tmp_path, kind, classifier, texts):
    small = classifier(tmp_path / "small", "bert")
    large = classifier(tmp_path / "large", kind, layers=2, width=32)
    cascade = Cascade.from_pretrained([small, large], runtime=CPU)
    examples = Examples(texts, pairs=texts[::-1])
    policy = middle(cascade, examples)
    pooled, everything = cascade.predict(examples, policy), cascade.run_all(examples, policy)
    assert pooled.labels == everything.labels
    assert torch.equal(pooled.stages, everything.stages)
    small_cost, large_cost = cascade.costs([16, 16])
    assert large_cost.flops > 2 * small_cost.flops
    assert (small_cost.layers, large_cost.layers) == (1, 2)
    assert large_cost.parameters > small_cost.parameters


def test_half_precision_keeps_the_policy_valid(pair, texts):
    full = Cascade.from_pretrained(pair, runtime=CPU)
    half = Cascade.from_pretrained(pair, runtime=Runtime(device="cpu", dtype="bfloat16"))
    assert next(half.stages[0].model.parameters()).dtype == torch.bfloat16
    assert half.hashes == full.hashes
    examples = Examples(texts)
    assert torch.allclose(half.logits(1, examples), full.logits(1, examples), atol=1.0)


def test_other_weights_have_other_hashes(pair, tmp_path, classifier):
    other = classifier(tmp_path / "other", "distilbert", seed=5)
    first = Cascade.from_pretrained(pair, runtime=CPU).hashes
    assert Cascade.from_pretrained([other, pair[1]], runtime=CPU).hashes[0] != first[0]
    assert Cascade.from_pretrained(pair, runtime=CPU).hashes == first


def test_long_texts_are_cut_to_what_the_model_takes(tmp_path, classifier):
    folder = classifier(tmp_path / "roberta", "roberta")
    cascade = Cascade.from_pretrained([folder, folder], runtime=CPU)
    assert cascade.stages[0].max_length == 64  # 66 positions, two of them for padding
    assert len(cascade.stages[0].encode(Examples(["one " * 500])).rows[0]["input_ids"]) == 64
    short = Cascade.from_pretrained([folder, folder], max_length=8, runtime=CPU)
    assert len(short.stages[0].encode(Examples(["one " * 500])).rows[0]["input_ids"]) == 8


def test_models_that_do_not_belong_together(tmp_path, pair, classifier):
    other = classifier(tmp_path / "other", labels=["a", "b", "c"])
    with pytest.raises(ModelError, match=r"other: its labels \(a, b, c\) are not those of the fi"):
        Cascade.from_pretrained([pair[0], other], runtime=CPU)
    one = classifier(tmp_path / "one", labels=["only"])
    with pytest.raises(ModelError, match="a regression head has no softmax confidence"):
        Cascade.from_pretrained([pair[0], one], runtime=CPU)
    with pytest.raises(ModelError, match=r"no cascade there \(cascade.json is missing\)"):
        Cascade.from_pretrained([pair[0]], runtime=CPU)


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path, pair, classifier):
    """The authors' code fills the missing layers with noise (section 2 of the method page)."""
    folder = classifier(tmp_path / "deep", "bert", layers=1)
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


def test_comparison_by_hand(pair, texts):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    examples = Examples(texts, labels=["no", "yes", "maybe"] * 15)
    policy = middle(cascade, examples)
    policy = replace(policy, costs={"flops": [1.0, 4.0], "layers": [1.0, 3.0]})
    small, large, both = compare(cascade, policy, examples)
    answers = cascade.run_all(examples, policy)
    right = [a == b for a, b in zip(answers.labels, examples.labels or [], strict=True)]
    share = float((answers.stages == 1).float().mean())
    assert both["accuracy %"] == pytest.approx(100 * sum(right) / 45)
    assert both["to last stage %"] == pytest.approx(100 * share)
    assert both["speed-up (flops)"] == pytest.approx(4 / (1 + 4 * share))
    assert both["speed-up (layers)"] == pytest.approx(3 / (1 + 3 * share))
    assert (small["speed-up (flops)"], large["speed-up (flops)"]) == (4, 1)
    assert large["speed-up (clock)"] == 1
    assert small["95 % from"] <= small["accuracy %"] <= small["to"]


def test_nothing_is_reported_on_the_calibration_rows(pair, texts):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    examples = Examples(texts, labels=["no", "yes", "maybe"] * 15)
    policy = cascade.calibrate(examples, 1.5)
    turned = examples.at(list(reversed(range(len(examples)))))
    more = Examples([*texts, "new"], labels=["no", "yes", "maybe"] * 15 + ["no"])
    for same in (examples, turned, more, examples.at(range(9))):
        with pytest.raises(ConfigError, match="are rows the policy was calibrated on"):
            compare(cascade, policy, same)
    assert compare(cascade, policy, examples, allow_same_split=True)
    new = Examples([f"{text} zwei" for text in texts], labels=examples.labels)
    assert compare(cascade, policy, new)


def test_costs_follow_each_stages_own_tokens(tmp_path, classifier):
    long = classifier(tmp_path / "long")
    short = classifier(tmp_path / "short", max_position_embeddings=6)
    cascade = Cascade.from_pretrained([long, short], runtime=CPU)
    lengths = cascade.lengths(Examples(["one two three four five six seven"]))
    assert lengths == [9, 6]
    assert cascade.costs(lengths)[0].flops > cascade.costs(lengths)[1].flops


def test_labels_without_names_are_their_numbers(tmp_path, classifier):
    folder = classifier(tmp_path / "one", labels=["LABEL_0", "LABEL_1"])
    assert Cascade.from_pretrained([folder, folder], runtime=CPU).labels == ["0", "1"]


def test_logits_that_are_not_finite_are_an_error(tmp_path, classifier):
    folder = classifier(tmp_path / "one")
    cascade = Cascade.from_pretrained([folder, folder], runtime=CPU)
    for weight in cascade.stages[0].model.parameters():
        torch.nn.init.constant_(weight, float("nan"))
    with pytest.raises(ModelError, match="one: gives logits that are not finite"):
        cascade.predict(Examples(["one"]), Policy([0.0]))


def test_a_broken_description_is_an_error(tmp_path):
    for content in ("{", "[]", '{"stages": 1}'):
        (tmp_path / "cascade.json").write_text(content)
        with pytest.raises(ModelError, match="not a cascade's description"):
            Cascade.from_pretrained([tmp_path], runtime=CPU)


def test_the_manifest_names_stages_relative_to_its_folder(trained, tmp_path):
    import shutil

    moved = shutil.copytree(trained, tmp_path / "moved")
    assert Cascade.from_pretrained([moved], runtime=CPU).labels == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("pool", [1, 7, 16, 1000])
def test_the_size_of_the_pool_changes_nothing(pair, pool, texts):
    cascade, examples = Cascade.from_pretrained(pair, runtime=CPU), Examples(texts)
    policy = middle(cascade, examples)
    pooled, parts = cascade.predict(examples, policy), cascade.predict(examples, policy, pool=pool)
    assert parts.labels == pooled.labels
    assert torch.equal(parts.stages, pooled.stages)
    assert torch.equal(parts.truncated, pooled.truncated)
    assert torch.allclose(parts.logits, pooled.logits, atol=1e-5)


def test_a_third_stage_sees_what_two_deferred(pair, tmp_path, classifier, texts):
    third = classifier(tmp_path / "third", "modernbert", layers=2, width=32, seed=3)
    cascade, examples = Cascade.from_pretrained([*pair, third], runtime=CPU), Examples(texts)
    first, second = (cascade.logits(number, examples) for number in (0, 1))
    bars = [between(log_odds(first)), between(log_odds(second))]
    answers = cascade.predict(examples, Policy(bars))
    assert set(answers.stages.tolist()) == {0, 1, 2}
    everything = cascade.run_all(examples, Policy(bars))
    assert answers.labels == everything.labels
    assert torch.equal(answers.stages, everything.stages)
    expected = [0 if a > bars[0] else 1 if b > bars[1] else 2
                for a, b in zip(log_odds(first), log_odds(second), strict=True)]  # fmt: skip
    assert answers.stages.tolist() == expected


def test_temperatures_change_confidence_and_no_answer(pair, texts):
    cascade, examples = Cascade.from_pretrained(pair, runtime=CPU), Examples(texts)
    plain = cascade.predict(examples, Policy([1e9]))
    cooled = cascade.predict(examples, Policy([1e9], temperatures=[1.0, 4.0]))
    assert cooled.labels == plain.labels
    assert (cooled.confidence < plain.confidence).all()
    assert torch.allclose(cooled.logits * 4, plain.logits, atol=1e-4)


def test_texts_are_tokenised_once_where_stages_read_alike(pair, monkeypatch, texts):
    examples, asked = Examples(texts), []
    encode = Stage.encode
    monkeypatch.setattr(
        Stage, "encode", lambda self, some: asked.append(len(some)) or encode(self, some)
    )
    for models, times in ((pair, 2), ([pair[1], pair[1]], 1)):  # distilbert takes no token types
        cascade = Cascade.from_pretrained(models, runtime=CPU)
        policy = middle(cascade, examples)
        expected = cascade.run_all(examples, policy)
        asked.clear()
        assert cascade.predict(examples, policy).labels == expected.labels
        assert len(asked) == times


def test_cut_texts_are_told(pair):
    cascade = Cascade.from_pretrained(pair, max_length=8, runtime=CPU)
    answers = cascade.predict(Examples(["one two", "one " * 6, "one " * 7]), Policy([0.0]))
    assert answers.truncated.tolist() == [False, False, True]


def test_there_are_as_many_of_each():
    with pytest.raises(DataError, match="1 texts and 2 pairs"):
        Examples(["one"], ["two", "three"])


def test_texts_must_be_texts():
    """In a process of its own: the tests' own type checks would answer first."""
    program = (
        "from cascadebert import Examples\n"
        "for texts, labels in (['one', None], None), (['one', float('nan')], None), (['a'], [3]):\n"
        "    try: Examples(texts, labels=labels)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "DataError row 1: its text must be a string, not None",
        "DataError row 1: its text must be a string, not nan",
        "DataError row 0: its label must be a string, not 3",
    ]


def test_pairs_and_single_texts_are_not_mixed_up(pair):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    assert cascade.predict(Examples(["a"], ["b"]), Policy([0.0])).labels  # nothing is known
    cascade.pairs = True
    with pytest.raises(DataError, match="trained on pairs of texts; name the --pair-column"):
        cascade.predict(Examples(["a"]), Policy([0.0]))
    cascade.pairs = False
    with pytest.raises(DataError, match="trained on single texts; leave --pair-column away"):
        cascade.logits(0, Examples(["a"], ["b"]))


def test_a_partial_checkpoint_loads_only_on_request(tmp_path, pair, classifier):
    folder = classifier(tmp_path / "deep", "bert", layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match="lacks"):
        Cascade.from_pretrained([pair[0], folder], runtime=CPU)
    assert Cascade.from_pretrained([pair[0], folder], allow_partial=True, runtime=CPU)


def test_calibration_knows_all_costs_and_its_rows(pair, texts):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    examples = Examples(texts, labels=["no", "yes", "maybe"] * 15)
    policy = cascade.calibrate(examples, 1.5)
    assert set(policy.costs) == {"layers", "flops", "parameters", "latency"}
    assert policy.costs["layers"] == [1, 3]
    assert all(price > 0 for costs in policy.costs.values() for price in costs)
    assert policy.backend == "torch-float32"
    assert len(policy.calibration["deciles"]) == 9
    assert seen_before(examples, policy.calibration["row_hashes"]) == len(texts)
    assert seen_before(Examples(["new", texts[3]]), policy.calibration["row_hashes"]) == 1


@pytest.mark.parametrize("score", ["margin", "entropy", "energy", "learned"])
def test_every_score_is_calibrated_and_run_alike(pair, score, texts):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    examples = Examples(texts * 2, labels=(["no", "yes", "maybe"] * 30))
    wanted = CalibrateConfig(target_speedup=1.5, score=score, temperature=True)
    policy = cascade.calibrate(examples, config=wanted)
    assert policy.score == score
    assert len(policy.temperatures) == 2
    assert policy.achieved["speedup"] >= 1.5
    answers, everything = cascade.predict(examples, policy), cascade.run_all(examples, policy)
    assert answers.labels == everything.labels
    assert 0 < int(answers.stages.sum()) < len(examples)


def test_a_stage_that_does_not_pay_is_named(pair):
    cascade = Cascade.from_pretrained([pair[0], pair[0], pair[1]], runtime=CPU)
    asked = Examples([f"one {n} two" * (1 + n % 7) for n in range(80)])
    truth = [LABELS[number] for number in cascade.logits(2, asked).argmax(-1)]
    policy = cascade.calibrate(Examples(asked.texts, labels=truth), 1.3)
    assert policy.calibration["superfluous"] == [1]  # the same model again


def test_a_policy_knows_length_tokenizer_and_class_order(pair):
    whole = Cascade.from_pretrained(pair, runtime=CPU)
    assert Cascade.from_pretrained(pair, max_length=8, runtime=CPU).hashes != whole.hashes
    again = Cascade.from_pretrained(pair, runtime=CPU)
    assert again.hashes == whole.hashes
    again.stages[1].classes = again.stages[1].classes[::-1]
    assert again.hashes[0] == whole.hashes[0]
    assert again.hashes[1] != whole.hashes[1]


def test_a_guarantee_is_shown_on_rows_that_nothing_was_fitted_on(pair, texts):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    asked = Examples(texts * 4)
    truth = [LABELS[number] for number in cascade.logits(1, asked).argmax(-1)]
    wanted = CalibrateConfig(max_risk=0.5, temperature=True)
    policy = cascade.calibrate(Examples(asked.texts, labels=truth), config=wanted)
    assert policy.guarantee["rows"] == len(asked) // 2
    plain = cascade.calibrate(
        Examples(asked.texts, labels=truth), config=replace(wanted, temperature=False)
    )
    assert plain.guarantee["rows"] == len(asked)


def test_a_target_and_a_configuration_are_joined(pair, texts):
    cascade = Cascade.from_pretrained(pair, runtime=CPU)
    wanted = CalibrateConfig(cost="layers", score="margin")
    policy = cascade.calibrate(Examples(texts), 1.2, config=wanted)
    assert (policy.target, policy.cost, policy.score) == ({"speedup": 1.2}, "layers", "margin")
    with pytest.raises(DataError, match="calibration needs rows"):
        cascade.calibrate(Examples([]), 1.2)


def test_models_are_joined_into_one_folder(pair, texts, tmp_path):
    cascade, examples = Cascade.from_pretrained(pair, runtime=CPU), Examples(texts)
    policy = middle(cascade, examples)
    cascade.save_pretrained(tmp_path / "joined")
    again = Cascade.from_pretrained(tmp_path / "joined", runtime=CPU)
    assert again.hashes == cascade.hashes
    assert again.predict(examples, policy).labels == cascade.predict(examples, policy).labels
    with pytest.raises(ConfigError, match="exists already"):
        cascade.save_pretrained(tmp_path / "joined")


def test_ways_to_run_a_cascade_are_timed_and_agree(pair, texts, monkeypatch):
    cascade, examples = Cascade.from_pretrained(pair, runtime=CPU), Examples(texts)
    policy = middle(cascade, examples)
    rows = {row["engine"]: row for row in bench_engines(cascade, policy, examples, 1)}
    assert list(rows) == ["stage 1 alone", "stage 2 alone", "pooled", "compacted, batch 16",
                          "run-all", "bound"]  # fmt: skip
    assert rows["stage 2 alone"]["speed-up"] == 1
    deferred = float((cascade.run_all(examples, policy).stages == 1).double().mean())
    expected = 1 / (1 / rows["stage 1 alone"]["speed-up"] + deferred)
    assert rows["bound"]["speed-up"] == pytest.approx(expected)
    monkeypatch.setattr(Cascade, "run_all", lambda self, some, _: self.predict(some, Policy([1e9])))
    with pytest.raises(ModelError, match="run-all: answers"):
        bench_engines(cascade, policy, examples, 1)


def test_curves_that_bound_a_cascade():
    right = [np.array([True, False, False, True]), np.array([True, True, False, False])]
    best = oracle_point([1.0, 4.0], right)
    assert best == {"speedup": [pytest.approx(16 / (2 * 1 + 2 * 5))], "accuracy": [75.0]}
    random = random_curve([1.0, 4.0], 50.0, 80.0)
    assert (random["speedup"][0], random["accuracy"][0]) == (4.0, 50.0)
    assert (random["speedup"][-1], random["accuracy"][-1]) == (pytest.approx(0.8), 80.0)


def test_calibration_without_labels(pair, texts):
    cascade, unlabelled = Cascade.from_pretrained(pair, runtime=CPU), Examples(texts * 10)
    policy = cascade.calibrate(unlabelled, 1.2)
    assert "accuracy" not in policy.achieved
    agreement = CalibrateConfig(max_risk=0.5, risk="disagreement")
    policy = cascade.calibrate(unlabelled, config=agreement)
    assert policy.guarantee["risk"] == "disagreement"
    assert policy.guarantee["measured"] <= 0.5
    wrong: dict
    for wrong in ({"max_risk": 0.5}, {"min_accuracy": 0.5}, {"temperature": True},
                  {"score": "learned"}):  # fmt: skip
        with pytest.raises(ConfigError, match="needs labels"):
            cascade.calibrate(unlabelled, config=CalibrateConfig(**wrong))
