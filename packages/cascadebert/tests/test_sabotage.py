"""With a key step taken out, the claims must fail: they measure the method and not the task."""

import dataclasses

import pytest
import torch
from cascadebert import cascade, demo, policy
from cascadebert.demo import Profile
from octavo.runtime import Runtime

SMALL = Profile(
    3_000, 1_000, 2_000, ("scratch:1x32", "scratch:2x64"), (4e-3, 2e-3), (4.0, 10.0), 32
)


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """Run a small demo and give the verdict on each claim."""
    monkeypatch.setitem(demo.PROFILES, "quick", SMALL)

    def judged():
        outcome = demo.run_demo("quick", [0], tmp_path / "run", runtime=Runtime(device="cpu"))
        (*_, claims) = outcome.tables.values()
        return [claim["verdict"] for claim in claims], outcome.no

    return judged


def test_random_confidence_fails(verdicts, monkeypatch):
    def noise(logits):
        generator = torch.Generator().manual_seed(len(logits))
        return torch.randn(len(logits), generator=generator, dtype=torch.float64)

    for module in (cascade, policy, demo):
        monkeypatch.setattr(module, "log_odds", noise)
    found, no = verdicts()
    assert found[2] == found[3] == "FAIL"
    assert no


def test_shuffled_training_labels_fail(verdicts, monkeypatch):
    from cascadebert.train import train_cascade as train

    def shuffled(examples, *rest):
        turned = dataclasses.replace(examples, labels=examples.labels[1:] + examples.labels[:1])
        return train(turned, *rest)

    monkeypatch.setattr(demo, "train_cascade", shuffled)
    found, _ = verdicts()
    assert found[1] == found[2] == "FAIL"


def test_without_a_large_model_there_is_nothing_to_gain(verdicts, monkeypatch):
    twice = dataclasses.replace(
        SMALL, models=("scratch:1x32", "scratch:1x32"), learning_rate=(4e-3,), epochs=(4.0,)
    )
    monkeypatch.setitem(demo.PROFILES, "quick", twice)
    monkeypatch.setattr(demo, "MARGINS", dataclasses.replace(demo.MARGINS, target_speedup=0.9))
    found, _ = verdicts()
    assert found[1] == found[2] == "FAIL"
