"""rho by what a defender can see: the smallest whose clean accuracy stays above a floor."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from octavo import console
from octavo.rundir import RunDir
from octavo.runtime import is_main

from finepurify.bench import Bench
from finepurify.config import PurifyConfig, Strategy
from finepurify.shards import from_first
from finepurify.strategies import Evidence, Weights, purified, takes_rho

FILE = "sweep.jsonl"
NOTHING = PurifyConfig(strategy="none")
Row = dict[str, Any]
#: Numbers of the model as it is now that are added to a row.
Look = Callable[[Bench], Row]


def rows_of(run: RunDir) -> list[Row]:
    """The finished lines of a run's sweep."""
    file = run.path / FILE
    if not file.exists():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


@dataclass(frozen=True)
class Trial:
    """One purified model to be made.

    Attributes:
        name: of the strategy or its variant, as rows show it.
        rho: share that is kept.
        weights: gives the weights when asked.
    """

    name: str
    rho: float
    weights: Callable[[], Weights]


def trials(
    evidence: Evidence,
    config: PurifyConfig,
    strategies: Sequence[Strategy],
    grid: Sequence[float],
    name: str = "",
) -> list[Trial]:
    """Every strategy at every rho, the largest first; one without a rho once.

    Args:
        evidence: what the strategies look at.
        config: mode and scope; its strategy is replaced.
        strategies: to try.
        grid: values of rho.
        name: of a variant, instead of the strategy's own.
    """
    found = []
    for strategy in dict.fromkeys(strategies):
        chosen = replace(config, strategy=strategy)
        fixed = [0.0 if strategy == "reset" else 1.0]
        for rho in sorted(set(grid), reverse=True) if takes_rho(strategy) else fixed:
            found.append(Trial(name or strategy, rho, partial(purified, evidence, chosen, rho)))
    return found


def sweep(bench: Bench, plan: Sequence[Trial], look: Look | None = None) -> list[Row]:
    """Each trial, followed by the short fine-tuning and judged on the held rows.

    A killed sweep goes on after its last whole line, and ends the same. Fine-tuning alone (rho = 1) is
    always the first row: it sets the floor.

    Args:
        bench: the suspect and clean rows.
        plan: what to try.
        look: more to note of each model, for a study of the defence. Nothing here reads it.

    Returns:
        Rows with strategy, rho, ACC on the held rows (percent) with its interval, and what was reset.
    """
    run, done = bench.run, from_first(rows_of(bench.run))
    _mend(run, done)
    alone = Trial("none", 1.0, lambda: purified(Evidence(bench.pair), NOTHING, 1.0))
    plan = [alone, *(trial for trial in plan if trial.name != "none")]
    known = {(row["strategy"], row["rho"]): row for row in done}
    for trial in console.progress(plan, "sweep", unit="models"):
        key = trial.name, trial.rho
        if key in known:
            continue
        begin = time.perf_counter()
        weights = trial.weights()
        bench.defended(weights, f"{trial.name} {trial.rho:g}")
        bench.seconds = time.perf_counter() - begin
        share = bench.accuracy()
        low, high = share.interval()
        row: Row = {"strategy": trial.name, "rho": trial.rho}
        row |= {"ACC": share.percent, "low": low, "high": high}
        row |= weights.numbers | (look(bench) if look else {})
        known[key] = from_first(row)
        _append(run, row)
    return [known[trial.name, trial.rho] for trial in plan]


def floor_of(rows: Sequence[Row], drop: float) -> float:
    """The accuracy that must be kept, in percent: `drop` points below fine-tuning alone."""
    return next(row["ACC"] for row in rows if row["strategy"] == "none") - drop


def choose(rows: Sequence[Row], strategy: str, drop: float) -> Row | None:
    """The row of a strategy with the smallest rho whose accuracy is not below the floor.

    Args:
        rows: of `sweep`.
        strategy: whose.
        drop: points of accuracy, see `floor_of`.

    Returns:
        None where no rho keeps the floor.
    """
    floor = floor_of(rows, drop)
    good = [row for row in rows if row["strategy"] == strategy and row["ACC"] >= floor]
    return min(good, key=lambda row: row["rho"], default=None)


def _append(run: RunDir, row: Row) -> None:
    if not is_main():
        return
    with (run.path / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _mend(run: RunDir, rows: Sequence[Row]) -> None:
    """Take half a line away that a kill left."""
    if (run.path / FILE).exists():
        run.write_text(FILE, "".join(json.dumps(row) + "\n" for row in rows))
