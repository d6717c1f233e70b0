"""The embedded default: the whole method on generated spellings, offline, with the paper's claims.

The task is the number of syllables of a word from its letters: short sequences, no label noise, and
depth pays, so that a small and a large complete model differ as they do on real tasks.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from octavo.console import Outcome
from octavo.report import Claim, Report, save_claims
from octavo.rundir import RunDir, is_finished, options_of
from octavo.runtime import Runtime

from cascadebert.cascade import Cascade
from cascadebert.config import TrainConfig
from cascadebert.data import Examples
from cascadebert.evaluate import compare, dis
from cascadebert.policy import Policy, sweep
from cascadebert.scores import log_odds
from cascadebert.train import train_cascade
from cascadebert.words import generate_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Profile:
    """Sizes of a demo: words, models and their training."""

    train: int
    dev: int
    test: int
    models: tuple[str, ...] = ("scratch:2x32", "scratch:6x64")
    learning_rate: tuple[float, ...] = (4e-3, 2e-3)
    epochs: tuple[float, ...] = (10.0, 5.0)
    batch_size: int = 64


PROFILES = {
    "quick": Profile(8_000, 2_000, 4_000),
    "full": Profile(30_000, 4_000, 8_000, batch_size=128),
}


@dataclass(frozen=True)
class Margins:
    """What a claim must reach, in points, fixed before the reported run."""

    target_speedup: float = 3.0
    loss_against_large: float = 2.0
    gain_over_small: float = 1.0
    gain_over_chance: float = 1.0
    dis: float = 70.0
    speedup_error: float = 0.1


MARGINS = Margins()


def run_demo(
    profile: Literal["quick", "full"],
    seeds: Sequence[int],
    out: Path,
    overwrite: bool = False,
    runtime: Runtime = Runtime(),
) -> Outcome:
    """Train, calibrate, predict and judge, once a seed; the claims are judged on the means.

    Args:
        profile: sizes.
        seeds: of words, models and training.
        out: folder of the runs and the report.
        overwrite: start anew where a demo already lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.
    """
    begin = time.perf_counter()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    options = options_of({"profile": profile, "seeds": list(seeds)})
    with RunDir.open(out, options, overwrite) as run:
        found = [_one_seed(PROFILES[profile], seed, run, runtime) for seed in seeds]
        claims = judge([one.numbers for one in found])
        seconds = time.perf_counter() - begin
        page = _report(profile, seeds, found, claims).save(out)
        save_claims(claims, seconds, out)
    failed = [claim.claim for claim in claims if claim.passed is False]
    return Outcome(
        {
            f"Seed {seeds[0]}, test words": found[0].table,
            f"Claims, mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}": [
                claim.row() for claim in claims
            ],
        },
        note=f"Report: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


@dataclass(frozen=True)
class Found:
    """What one seed gave: the numbers that claims are about, and what the report draws."""

    numbers: dict[str, float]
    table: list[dict[str, Any]]
    curve: pd.DataFrame
    policy: Policy


def _one_seed(profile: Profile, seed: int, run: RunDir, runtime: Runtime) -> Found:
    words = generate_words(profile.train + profile.dev + profile.test, seed)
    train, dev, test = _parts(words, profile.train, profile.dev, profile.test)
    config = TrainConfig(
        model=profile.models,
        train_data="generated words",
        out=run.path / f"seed-{seed}",
        learning_rate=profile.learning_rate,
        epochs=profile.epochs,
        batch_size=profile.batch_size,
        max_length=16,
        alphabet="char",
    )
    runtime = replace(runtime, seed=seed)
    if not is_finished(config.out):
        with RunDir.open(config.out, options_of(config, runtime)) as inner:
            train_cascade(train, config, inner, runtime)
    cascade = Cascade.from_pretrained([config.out], runtime=runtime)
    policy = cascade.calibrate(dev, MARGINS.target_speedup)
    table = compare(cascade, policy, test)
    small, large = cascade.logits(0, test), cascade.logits(len(cascade.stages) - 1, test)
    right = torch.tensor(cascade.class_numbers(test))
    accuracies = [row["accuracy %"] for row in table]
    answered = table[-1]
    deferred = answered["to last stage %"] / 100
    numbers = {
        "small": accuracies[0],
        "large": accuracies[-2],
        "cascade": accuracies[-1],
        "chance": (1 - deferred) * accuracies[0] + deferred * accuracies[-2],
        "speedup": answered[f"speed-up ({policy.cost})"],
        "dis": dis(log_odds(small).numpy(), (small.argmax(dim=-1) != right).numpy()),
    }
    curve = sweep([small, large], right.tolist(), [policy.costs[0], policy.costs[-1]])
    return Found(numbers, table, curve, policy)


def _parts(words: Examples, *sizes: int) -> list[Examples]:
    ends = np.cumsum([0, *sizes]).tolist()
    return [words.at(range(start, end)) for start, end in pairwise(ends)]


def judge(found: Sequence[Mapping[str, float]], margins: Margins = MARGINS) -> list[Claim]:
    """The claims, on the means over seeds."""
    mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    target = margins.target_speedup
    loss = mean["large"] - mean["cascade"]
    gain = mean["cascade"] - mean["small"]
    chosen = mean["cascade"] - mean["chance"]
    error = abs(mean["speedup"] / target - 1)
    return [
        Claim(
            f"At {target:g}x the cascade keeps the large model's accuracy",
            f"{mean['cascade']:.1f} % against {mean['large']:.1f} %",
            f"at most {margins.loss_against_large:g} points less",
            loss <= margins.loss_against_large,
        ),
        Claim(
            "It is better than its small model alone",
            f"{gain:+.1f} points",
            f"at least {margins.gain_over_small:+g}",
            gain >= margins.gain_over_small,
        ),
        Claim(
            "Its confidence knows what to defer",
            f"{chosen:+.1f} points over deferring as many at random",
            f"at least {margins.gain_over_chance:+g}",
            chosen >= margins.gain_over_chance,
        ),
        Claim(
            "A complete small model orders items by difficulty",
            f"DIS {mean['dis']:.1f}",
            f"at least {margins.dis:g} (50 is chance)",
            mean["dis"] >= margins.dis,
        ),
        Claim(
            "The speed-up chosen on calibration words holds on test words",
            f"{mean['speedup']:.2f}x for {target:g}x, counted in FLOPs",
            f"within {100 * margins.speedup_error:g} %",
            error <= margins.speedup_error,
        ),
    ]


def _report(
    profile: str, seeds: Sequence[int], found: Sequence[Found], claims: Sequence[Claim]
) -> Report:
    report = Report("CascadeBERT: embedded demo")
    report.text(
        f"Profile {profile}, seeds {', '.join(map(str, seeds))}. The task is the number of syllables "
        "of a generated word from its spelling. Accuracy is on test words that neither training nor "
        "calibration saw. The speed-up in FLOPs is what the account says, the one on the clock what "
        "this machine took in the same engine; the two differ where small models are bound by "
        "overhead rather than by arithmetic."
    )
    report.claims(claims)
    for seed, one in zip(seeds, found, strict=True):
        report.table(f"Seed {seed}: each model alone, and the cascade", one.table)
    report.figure("Accuracy over speed-up, first seed", _curve_figure(found[0]))
    return report


def _curve_figure(one: Found) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    curve, numbers = one.curve, one.numbers
    axes.plot(curve["speedup"], 100 * curve["accuracy"], label="cascade, every threshold (test)")
    axes.plot(numbers["speedup"], numbers["cascade"], "o", label="threshold from calibration")
    axes.axhline(numbers["large"], color="gray", linestyle="--", label="large model alone")
    axes.axhline(numbers["small"], color="gray", linestyle=":", label="small model alone")
    axes.set_xlabel("speed-up over the large model (FLOPs)")
    axes.set_ylabel("accuracy, %")
    axes.legend()
    return figure
