"""The embedded default: fine-tune, label, train reward models, verify and reinforce on the toy shop."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from octavo.console import Outcome
from octavo.report import Report, save_claims
from octavo.rundir import RunDir, options_of
from octavo.runtime import Runtime

from mathshepherd.claims import MARGINS, judge
from mathshepherd.experiment import SIZES, Experiment, Size
from mathshepherd.records import load_solutions
from mathshepherd.report import (
    checks_figure,
    curves_figure,
    rollouts_figure,
    scores_figure,
    sizes_figure,
)

ABOUT = (
    "Word problems of a toy shop, whose demonstrator often does something else than two kinds of "
    "events ask for. So the generator is wrong in a way that a majority vote cannot mend, while it "
    "takes the right step often enough for the others to find it: that is how the task is made, and "
    "it is the case the method is for. Everything is trained from scratch."
)
NOT_HERE = (
    "Not shown here: that PPO beats fine-tuning on right solutions alone (a slip is one choice, which "
    "either unlearns; RFT as it is defined keeps the demonstrations, slips and all); that a process "
    "reward model is much better than an outcome one (chains are short, as in the paper's GSM8K "
    "columns); that hard labels get worse with many rollouts (false negatives fall faster than false "
    "positives rise, in benchmarks/bench_labels.py also where answers are hit by luck)."
)

#: What is drawn of the tables, in their order.
FIGURES = (rollouts_figure, curves_figure, sizes_figure, checks_figure, None)


def run_demo(
    profile: Literal["quick", "full"],
    seeds: Sequence[int],
    out: Path,
    overwrite: bool = False,
    runtime: Runtime = Runtime(),
) -> Outcome:
    """The whole method, once a seed; the claims are judged on the means.

    A demo that was killed goes on with the seed it was at.

    Args:
        profile: sizes.
        seeds: of problems, weights and samples.
        out: folder of the runs and the report.
        overwrite: start anew where a demo already lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.
    """
    begin = time.perf_counter()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    with RunDir.open(out, options_of({"profile": profile, "seeds": list(seeds)}), overwrite) as run:
        found = [_of_seed(run, SIZES[profile], replace(runtime, seed=seed)) for seed in seeds]
        claims = judge([one["numbers"] for one in found], MARGINS[profile])
        seconds = time.perf_counter() - begin
        report = Report("Math-Shepherd: the demo")
        report.text(
            f"Profile {profile}, seeds {', '.join(map(str, seeds))}, Python "
            f"{platform.python_version()}, PyTorch {version('torch')}. {ABOUT}"
        )
        report.claims(claims)
        report.text(NOT_HERE)
        for seed, one in zip(seeds, found, strict=True):
            report.heading(f"Seed {seed}")
            for caption, rows in one["tables"].items():
                if rows:
                    report.table(caption, rows)
        for seed, one in zip(seeds, found, strict=True):
            for (caption, rows), draw in zip(one["tables"].items(), FIGURES, strict=False):
                if draw and rows:
                    report.figure(f"{caption}, seed {seed}", draw(rows))
            scored = load_solutions(run.path / f"seed-{seed}")
            report.figure(f"Scores of steps, seed {seed}", scores_figure(scored, "prm"))
        page = report.save(out)
        save_claims(claims, seconds, out)
    failed = [claim.claim for claim in claims if claim.passed is False]
    many = f"mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return Outcome(
        {f"Claims, {many}": [claim.row() for claim in claims]},
        note=f"Report: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


def _of_seed(run: RunDir, size: Size, runtime: Runtime) -> dict[str, Any]:
    file = run.path / f"seed-{runtime.seed}.json"
    if not file.is_file():
        run.write_json(file.name, Experiment(run, size, runtime).everything())
    return json.loads(file.read_text(encoding="utf-8"))
