"""With a key step taken out, the claims must fail: they measure the method and not the task."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from cascadebert import experiment, measure, policy, risk
from cascadebert.config import FoldConfig
from cascadebert.demo import REAL, deal, judge
from cascadebert.experiment import LARGE, SMALL, Profile, run_seed
from cascadebert.train import stage_loss, train_cascade
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from safetensors.torch import load_file

TINY = Profile(
    3_000, 800, 1_500, batch_size=32, models={SMALL: (4e-3, 5.0), LARGE: (2e-3, 4.0)}, resplits=5,
    exit_epochs=2.0,
)  # fmt: skip

#: So few calibration words hit a speed-up less well.
MARGINS = dataclasses.replace(REAL, speedup_error=0.25)
SPEED = "The speed-up chosen on calibration words holds on test words"
HARM = "Harm of"
ORDER = "Difficulty-aware regularization improves the order (DIS)"
ERROR = "It lowers the calibration error"

#: Enough new splits that one more or less tells nothing.
SPLITS = dataclasses.replace(TINY, resplits=60)

#: Enough to run through; what the regularization gains is shown by the demo's full profile.
FEW = dataclasses.replace(
    TINY, regularized=300, regularized_epochs=3.0, folds=FoldConfig(folds=2, fold_seeds=(0,))
)


def verdicts(folder, profile=TINY):
    """Run a small experiment, or measure anew what one trained, and give each claim's verdict."""
    run = RunDir(folder, resumed=True) if folder.exists() else RunDir.open(folder, {})
    found = run_seed(profile, deal(profile, 0, None), 0, run, Runtime(device="cpu"))
    return {
        claim.claim.partition(" a")[0]: claim.passed for claim in judge([found.numbers], MARGINS)
    }


@pytest.fixture(scope="module", autouse=True)
def untimed():
    """No claim here is about the clock: nothing is run for its sake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_clock", lambda work: 1.0)
        yield


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A small experiment as it should be; two kinds of sabotage measure its models anew."""
    folder = tmp_path_factory.mktemp("sabotage") / "run"
    return folder, verdicts(folder)


@pytest.fixture
def models(trained_once, tmp_path):
    """A copy of its trained models."""
    return shutil.copytree(trained_once[0], tmp_path / "run")


@pytest.mark.untraced
def test_unharmed_the_claims_hold_even_at_this_size(trained_once):
    _, found = trained_once
    for claim in ("It is better than its small model", "Its confidence knows what to defer", SPEED):
        assert found[claim]


@pytest.mark.untraced
def test_random_confidence_fails(models, monkeypatch):
    def noise(logits, *rest):
        generator = torch.Generator().manual_seed(len(logits))
        return torch.randn(len(logits), generator=generator, dtype=torch.float64)

    monkeypatch.setattr(policy, "score", noise)
    monkeypatch.setattr(measure, "score", noise)
    monkeypatch.setattr(measure, "log_odds", noise)
    assert verdicts(models)["Its confidence knows what to defer"] is False


@pytest.mark.untraced
def test_thresholds_of_other_confidences_miss_the_speed_up(models, monkeypatch):
    """Confidence that is higher on calibration words, as after training on them."""
    fit = policy.fit_policy

    @functools.wraps(fit)
    def surer(logits, *rest, **options):
        return fit([3 * logits[0], *logits[1:]], *rest, **options)

    monkeypatch.setattr(measure, "fit_policy", surer)
    found = verdicts(models)
    assert found[SPEED] is False


@pytest.mark.untraced
def test_shuffled_training_labels_fail(tmp_path, monkeypatch):
    def shuffled(examples, *rest):
        turned = dataclasses.replace(examples, labels=examples.labels[1:] + examples.labels[:1])
        return train_cascade(turned, *rest)

    monkeypatch.setattr(experiment, "train_cascade", shuffled)
    short = dataclasses.replace(TINY, models={SMALL: (4e-3, 2.0), LARGE: (2e-3, 1.0)})
    found = verdicts(tmp_path / "run", short)
    assert found["It is better than its small model"] is False


@pytest.mark.untraced
def test_without_a_large_model_there_is_nothing_to_gain(trained_once, tmp_path, monkeypatch):
    small = trained_once[0] / "seed-0" / "complete" / "stage-1"

    def train_large(examples, config, run, *rest):
        shutil.copytree(small, run.path / "stage-1")  # which is then not trained again
        return train_cascade(examples, config, run, *rest)

    monkeypatch.setattr(experiment, "train_cascade", train_large)
    untrained = {SMALL: TINY.models[SMALL], LARGE: (1e-6, 0.1)}
    found = verdicts(tmp_path / "run", dataclasses.replace(TINY, models=untrained))
    assert found["It is better than its small model"] is False


@pytest.mark.untraced
def test_a_risk_that_is_not_shown_is_not_kept(models, monkeypatch):
    """Learn-then-Test that takes what it measures for the truth, or walks on while there is hope."""
    assert verdicts(models, SPLITS)[HARM]
    walk = risk.walk
    for step, broken in {
        "binomial_p": lambda failures, items, alpha: np.where(failures <= items * alpha, 0.0, 1.0),
        "walk": lambda p_values, delta: walk(p_values, 1 - delta),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(risk, step, broken)
            assert verdicts(models, SPLITS)[HARM] is False


def test_without_its_weight_the_regularization_does_nothing(models, monkeypatch):
    """Then "+ DAR" is the plain model again: no order is gained and no calibration error lost."""

    def weightless(config, *rest):
        return stage_loss(dataclasses.replace(config, dar_weight=0.0), *rest)

    monkeypatch.setattr(experiment, "stage_loss", weightless)
    found = verdicts(models, FEW)
    assert (found[ORDER], found[ERROR]) == (False, False)
    place = models / "seed-0" / "regularized"
    plain, folds = (load_file(place / name / "model.safetensors") for name in ("plain", "folds"))
    assert all(torch.equal(plain[name], folds[name]) for name in plain)
