"""With a key step taken out, the claims must fail: they measure the method and not the task."""

import dataclasses
import functools

import pytest
import torch
from cascadebert import demo, experiment, policy
from cascadebert.experiment import LARGE, SMALL, Profile
from octavo.runtime import Runtime

TINY = Profile(
    2_500, 800, 1_500, batch_size=32, models={SMALL: (4e-3, 5.0), LARGE: (2e-3, 4.0)}, resplits=5,
    exit_epochs=2.0,
)  # fmt: skip


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """Run a small demo and give the verdict on each claim."""

    def judged(profile=TINY):
        monkeypatch.setitem(demo.PROFILES, "quick", profile)
        outcome = demo.run_demo("quick", [0], tmp_path / "run", runtime=Runtime(device="cpu"))
        (*_, claims) = outcome.tables.values()
        return {row["claim"].partition(" a")[0]: row["verdict"] for row in claims}, outcome.no

    return judged


def test_random_confidence_fails(verdicts, monkeypatch):
    def noise(logits, *rest):
        generator = torch.Generator().manual_seed(len(logits))
        return torch.randn(len(logits), generator=generator, dtype=torch.float64)

    monkeypatch.setattr(policy, "score", noise)
    monkeypatch.setattr(experiment, "score", noise)
    monkeypatch.setattr(experiment, "log_odds", noise)
    found, no = verdicts()
    assert found["Its confidence knows what to defer"] == "FAIL"
    assert found["A complete small model orders items better than"] == "FAIL"
    assert no


def test_shuffled_training_labels_fail(verdicts, monkeypatch):
    from cascadebert.train import train_cascade as train

    def shuffled(examples, *rest):
        turned = dataclasses.replace(examples, labels=examples.labels[1:] + examples.labels[:1])
        return train(turned, *rest)

    monkeypatch.setattr(experiment, "train_cascade", shuffled)
    found, _ = verdicts()
    assert found["It is better than its small model"] == "FAIL"
    assert found["Its confidence knows what to defer"] == "FAIL"


def test_without_a_large_model_there_is_nothing_to_gain(verdicts):
    untrained = {SMALL: TINY.models[SMALL], LARGE: (1e-6, 0.1)}
    found, _ = verdicts(dataclasses.replace(TINY, models=untrained))
    assert found["It is better than its small model"] == "FAIL"
    assert found["Its confidence knows what to defer"] == "FAIL"


def test_thresholds_of_the_wrong_rows_miss_the_speed_up(verdicts, monkeypatch):
    """Confidence that is higher on calibration words, as after training on them."""
    fit = policy.fit_policy

    @functools.wraps(fit)
    def surer(logits, *rest, **options):
        return fit([3 * logits[0], *logits[1:]], *rest, **options)

    monkeypatch.setattr(experiment, "fit_policy", surer)
    found, _ = verdicts()
    assert found["The speed-up chosen on calibration words holds on test words"] == "FAIL"
