"""rho by what a defender can see: the smallest whose clean accuracy stays above a floor."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from octavo import console
from octavo.rundir import RunDir

from finepurify.bench import Bench
from finepurify.config import PurifyConfig, Strategy
from finepurify.strategies import Evidence, purified, takes_rho

FILE = "sweep.jsonl"
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


def sweep(
    bench: Bench,
    evidence: Evidence,
    config: PurifyConfig,
    strategies: Sequence[Strategy],
    grid: Sequence[float],
    look: Look | None = None,
) -> list[Row]:
    """Every strategy at every rho, each followed by the short fine-tuning and judged on the held rows.

    A killed sweep goes on after its last whole line, and ends the same. Fine-tuning alone (rho = 1) is
    always the first row: it sets the floor.

    Args:
        bench: the suspect and clean rows.
        evidence: what the strategies look at.
        config: mode and scope; its strategy is replaced.
        strategies: to try; those without a rho are tried once.
        grid: values of rho.
        look: more to note of each model, for a study of the defence. Nothing here reads it.

    Returns:
        Rows with strategy, rho, ACC on the held rows (percent) with its interval, and what was reset.
    """
    run, done = bench.run, rows_of(bench.run)
    _mend(run, done)
    plan: list[tuple[Strategy, float]] = [("none", 1.0)]
    for strategy in strategies:
        if strategy != "none":
            shares = sorted(set(grid), reverse=True) if takes_rho(strategy) else [_fixed(strategy)]
            plan += [(strategy, rho) for rho in shares]
    known = {(row["strategy"], row["rho"]) for row in done}
    for strategy, rho in console.progress(plan, "sweep", unit="models"):
        if (strategy, rho) in known:
            continue
        weights = purified(evidence, replace(config, strategy=strategy), rho)
        bench.defended(weights, f"{strategy} {rho:g}")
        share = bench.accuracy()
        low, high = share.interval()
        row: Row = {
            "strategy": strategy,
            "rho": rho,
            "ACC": share.percent,
            "low": low,
            "high": high,
        }
        row |= {name: value for name, value in weights.numbers.items()}
        row |= look(bench) if look else {}
        done.append(row)
        _append(run, row)
    order = {step: at for at, step in enumerate(plan)}
    return sorted(
        (row for row in done if (row["strategy"], row["rho"]) in order),
        key=lambda row: order[row["strategy"], row["rho"]],
    )


def _fixed(strategy: Strategy) -> float:
    """The rho that a strategy without one is noted under."""
    return 0.0 if strategy == "reset" else 1.0


def floor_of(rows: Sequence[Row], drop: float) -> float:
    """The accuracy that must be kept, in percent: `drop` points below fine-tuning alone."""
    return next(row["ACC"] for row in rows if row["strategy"] == "none") - drop


def choose(rows: Sequence[Row], strategy: Strategy, drop: float) -> Row | None:
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
    with (run.path / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _mend(run: RunDir, rows: Sequence[Row]) -> None:
    """Take half a line away that a kill left."""
    if (run.path / FILE).exists():
        run.write_text(FILE, "".join(json.dumps(row) + "\n" for row in rows))
