"""With a key step taken out, the claims must fail: they measure the method and not the task."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finepurify import attack, experiment, points, scan, strategies
from finepurify.claims import judge
from finepurify.demo import TUNE, WORD, numbers
from finepurify.experiment import ADAMW, Case, Found, run_case, variant
from finepurify.sweep import FILE
from finepurify.world import Sizes, World, topics
from octavo.rundir import RunDir
from octavo.runtime import Runtime

RUNTIME = Runtime(device="cpu", seed=3)
SIZES = Sizes(pretrain=8_000, train=1_500, held=300, test=400)
#: More poison and larger steps than the demo's: with half its rows the backdoor must be learnt, too.
TRAIN = dataclasses.replace(ADAMW, learning_rate=1e-3, epochs=5.0)
POISON = dataclasses.replace(WORD, rate=0.2)
CLEAN = Case("clean-adamw", None, TRAIN, (), scanned=True)
ATTACKED = Case(
    "word-adamw", POISON, TRAIN,
    (variant("fine-purifying", 0.98, 0.9), variant("fine-mixing", 0.9), variant("delta-only", 0.9)),
    scanned=True,
)  # fmt: skip

GATE = "The attack works, and fine-tuning on clean rows does not undo it"
REMOVES = "Fine-purifying (rho .98) removes the backdoor and keeps accuracy"
MIXING = "At the same accuracy floor Fine-mixing leaves more of it"
DRIFT = "Drift alone (delta-only, rho .9) resets what accuracy needs"
FRONTIER = "Its frontier of accuracy and attack success lies below Fine-mixing's"
SCAN = "The scan of the weights names the trigger first"
LAW = "Drift follows curvature under SGD, and not under AdamW"


@dataclasses.dataclass
class Trained:
    """A small experiment as it should be."""

    world: World
    folder: Path
    found: dict[str, Found]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("sabotage") / "run"
    world = topics(SIZES, RUNTIME.seed, RUNTIME)
    run = RunDir(folder)
    found = {case.name: run_case(world, case, TUNE, run, RUNTIME) for case in (CLEAN, ATTACKED)}
    return Trained(world, folder, found)


@pytest.fixture
def again(trained: Trained, tmp_path: Path) -> Any:
    """A function: measure the suspect anew by what no longer does its work, and judge."""

    def measure(afresh: tuple[str, ...] = ("fine-purifying",)) -> dict[str, bool | None]:
        place = Path(shutil.copytree(trained.folder, tmp_path / "run"))
        file = place / f"seed-{RUNTIME.seed}" / ATTACKED.name / FILE
        lines = file.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not any(f'"{name}"' in line for name in afresh)]
        file.write_text("".join(kept))
        found = run_case(trained.world, ATTACKED, TUNE, RunDir(place), RUNTIME)
        return verdicts(trained.found | {ATTACKED.name: found})

    return measure


def verdicts(found: dict[str, Found], **more: float) -> dict[str, bool | None]:
    return {claim.claim: claim.passed for claim in judge([numbers(found) | more])}


@pytest.mark.untraced
def test_unharmed_the_claims_hold_even_at_this_size(trained):
    assert verdicts(trained.found) == dict.fromkeys(
        (GATE, REMOVES, MIXING, DRIFT, FRONTIER, SCAN), True
    )


@pytest.mark.untraced
def test_random_selection_fails(again, monkeypatch):
    monkeypatch.setitem(strategies.SCORES, "fine-purifying", strategies.SCORES["random"])
    found = again()
    assert (found[REMOVES], found[MIXING], found[FRONTIER]) == (False, False, False)


@pytest.mark.untraced
def test_nothing_reset_fails(again, monkeypatch):
    def suspect(pair, keep):
        return strategies.Weights(lambda name: pair.read(name).suspect, {"reset": 0.0})

    monkeypatch.setattr(strategies, "_masked", suspect)
    found = again()
    assert (found[REMOVES], found[MIXING], found[FRONTIER]) == (False, False, False)


@pytest.mark.untraced
def test_the_curvature_of_other_dimensions_fails(again, monkeypatch):
    """A Fisher diagonal whose values lie at random places: r is delta^2 with noise."""
    own = points.fisher

    def shuffled(*rest):
        found = own(*rest)
        values = torch.cat([value.flatten() for value in found.values()])
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        parts = values[order].split([value.numel() for value in found.values()])
        return {name: part.view(found[name].shape) for name, part in zip(found, parts, strict=True)}

    monkeypatch.setattr(experiment, "fisher", shuffled)
    found = again()
    assert (found[REMOVES], found[FRONTIER]) == (False, False)


@pytest.mark.untraced
def test_an_attack_that_is_not_learnt_stops_at_the_gate(trained, tmp_path, monkeypatch):
    """Then no defence is praised for what was never there."""
    monkeypatch.setattr(attack, "poison", lambda examples, *rest: (examples, []))
    short = dataclasses.replace(TRAIN, epochs=1.0)
    none = dataclasses.replace(ATTACKED, train=short, variants=())
    found = run_case(trained.world, none, TUNE, RunDir(tmp_path / "run"), RUNTIME)
    rows = [row | {"ASR": found.before["ASR"]} for row in trained.found[ATTACKED.name].rows]
    found = dataclasses.replace(trained.found[ATTACKED.name], before=found.before, rows=rows)
    given = verdicts(trained.found | {ATTACKED.name: found})
    assert given[GATE] is False
    assert [given[claim] for claim in (REMOVES, MIXING, DRIFT)] == [None, None, None]


@pytest.mark.untraced
def test_a_scan_by_chance_does_not_name_the_trigger(again, monkeypatch):
    scores = scan._row_scores

    def noise(*rest):
        evidence, score = scores(*rest)
        return evidence, torch.rand(score.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(scan, "_row_scores", noise)
    assert again(())[SCAN] is False


def test_adamw_in_the_place_of_sgd_shows_no_law(trained):
    laws = trained.found[ATTACKED.name].laws
    more = {"spearman sgd": laws["spearman"], "log sd": laws["log_sd"],
            "median over mean": laws["median_over_mean"]}  # fmt: skip
    found = verdicts(trained.found, **more)
    assert found[LAW] is False
