"""Measure one seed of the embedded experiment: every method alike, into tables, curves and numbers.

Every threshold is chosen on the calibration words by the same rule (the highest that is as fast as
wanted) and judged on the test words.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from octavo.stats import bootstrap_interval, mcnemar
from torch import Tensor

from cascadebert.cascade import Cascade
from cascadebert.data import Examples
from cascadebert.early_exit import EarlyExit, Signal, exit_sweep, patience_exits, patience_table
from cascadebert.evaluate import oracle_point, points, random_curve
from cascadebert.metrics import (
    dis,
    ece,
    fit_temperature,
    performance_gap_recovered,
    quality,
    reliability_table,
)
from cascadebert.policy import Policy, fit_policy, running_maximum, sweep
from cascadebert.risk import item_losses, risk_sums, safe_threshold
from cascadebert.scores import log_odds, score
from cascadebert.stage import Stage

if TYPE_CHECKING:
    import pandas as pd

    from cascadebert.config import Score

#: Signals of early exit, by the name of their score.
RULES: dict[Signal, str] = {"entropy": "entropy", "max_probability": "confidence"}


@dataclass(frozen=True)
class Found:
    """What one seed gave.

    Attributes:
        numbers: what claims are about, by name.
        tables: rows by table name.
        curves: points by method and axis, for figures.
    """

    numbers: dict[str, float]
    tables: dict[str, list[dict[str, Any]]]
    curves: dict[str, Any]


@dataclass(frozen=True)
class Split:
    """Words and the class numbers of their labels."""

    words: Examples
    labels: list[int]


class Measured:
    """The tables of one seed, filled one by one from logits that are computed once.

    Args:
        names: of the complete models, LAYERSxWIDTH, the large one last.
        targets: speed-ups at which methods are compared.
        cascade: of these models.
        dev: where thresholds are chosen.
        test: where they are judged.
    """

    def __init__(
        self,
        names: Sequence[str],
        targets: Sequence[float],
        cascade: Cascade,
        dev: Split,
        test: Split,
    ) -> None:
        self.names, self.targets = list(names), targets
        self.cascade, self.dev, self.test = cascade, dev, test
        self.logits = {
            name: (cascade.logits(i, dev.words), cascade.logits(i, test.words))
            for i, name in enumerate(self.names)
        }
        lengths = cascade.lengths(dev.words)
        self.flops = dict(zip(self.names, [c.flops for c in cascade.costs(lengths)], strict=True))
        self.large = self.names[-1]
        self.exits: dict[str, tuple[EarlyExit, list[Tensor], list[Tensor]]] = {}
        self.numbers: dict[str, float] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.curves: dict[str, Any] = {"accuracy over speed-up": {}}
        for name in self.names:
            self.numbers[f"accuracy {name}"] = self._accuracy(self.logits[name][1])

    def _accuracy(self, logits: Tensor) -> float:
        return 100 * float((logits.argmax(dim=-1).numpy() == np.asarray(self.test.labels)).mean())

    def _costs(self, members: Sequence[str]) -> list[float]:
        return [float(self.flops[name]) for name in members]

    def add_exits(self, name: str, rival: EarlyExit) -> None:
        """Take in an early-exit model."""
        self.exits[name] = (rival, rival.logits(self.dev.words), rival.logits(self.test.words))

    def sub(self, members: Sequence[str]) -> Cascade:
        """A cascade of some of the models."""
        stages = [self.cascade.stages[self.names.index(name)] for name in members]
        return Cascade(stages, self.cascade.labels, self.cascade.batch_tokens)

    def fit(self, members: Sequence[str], target: float, separate: bool = False) -> Policy:
        """Thresholds for a speed-up, from the calibration words."""
        logits = [self.logits[name][0] for name in members]
        return fit_policy(logits, self.dev.labels, self._costs(members), target, separate=separate)

    def speed_table(self) -> None:
        """Accuracy of every method at every target, with what speed it reached on test words."""
        right = {}
        rows: list[dict[str, Any]] = []
        clock = _clock(lambda: self.sub([self.large]).predict(self.test.words, Policy([])))
        pairs = [(small, self.large) for small in self.names[:-1] if small in ("2x32", "1x64")]
        for target in self.targets:
            for members in pairs:
                name = f"cascade {members[0]}"
                if self.flops[self.large] / self.flops[members[0]] < target:
                    continue
                policy = self.fit(members, target)
                chosen = self.sub(members)
                seconds = _clock(lambda c=chosen, p=policy: c.predict(self.test.words, p))
                answers = chosen.decide([self.logits[m][1] for m in members], policy)
                hits = self._hits(answers.logits)
                shares = np.bincount(answers.stages.numpy(), minlength=2) / len(hits)
                costs = self._costs(members)
                reached = costs[-1] / float((shares * np.cumsum(costs)).sum())
                right[name, target] = hits
                rows.append(self._row(name, target, hits, reached, clock / seconds))
                if members[0] == "2x32":
                    self.numbers[f"reached {target:g}"] = reached
                    self._chance(target, shares[1])
            for method, (rival, dev, test) in self.exits.items():
                for rule in RULES:
                    table = exit_sweep(dev, self.dev.labels, rule)
                    if table["speedup"].to_numpy(dtype=float).max() < target:
                        continue
                    bar = _bar(table, target)
                    classes, exits = _leave(test, rule, bar)
                    hits = classes.numpy() == np.asarray(self.test.labels)
                    seconds = _clock(
                        lambda r=rival, k=rule, b=bar: r.predict(self.test.words, k, b)
                    )
                    reached = len(test) / float((exits + 1).double().mean())
                    name = f"{method} {RULES[rule]}"
                    right[name, target] = hits
                    rows.append(self._row(name, target, hits, reached, clock / seconds))
            rows += self._patience(target)
        for row in rows:
            base = right.get(("cascade 2x32", row["target"]))
            mine = right.get((row["method"], row["target"]))
            if base is not None and mine is not None and row["method"] != "cascade 2x32":
                row["p against cascade 2x32"] = mcnemar(mine, base)
        self._alone(rows)
        self.tables["speed"] = rows
        self._curves(pairs)

    def _row(
        self, name: str, target: float, hits: np.ndarray, reached: float, clock: float
    ) -> dict[str, Any]:
        low, high = bootstrap_interval(hits)
        accuracy = 100 * float(hits.mean())
        self.numbers[f"{name} at {target:g}"] = accuracy
        return {
            "method": name,
            "target": target,
            "accuracy %": accuracy,
            "95 % from": 100 * low,
            "to": 100 * high,
            "speed-up (nominal)": reached,
            "speed-up (clock)": clock,
        }

    def _hits(self, logits: Tensor) -> np.ndarray:
        return logits.argmax(dim=-1).numpy() == np.asarray(self.test.labels)

    def _chance(self, target: float, deferred: float) -> None:
        """What deferring as many at random would give."""
        small, large = self.numbers["accuracy 2x32"], self.numbers[f"accuracy {self.large}"]
        self.numbers[f"random at {target:g}"] = (1 - deferred) * small + deferred * large

    def _patience(self, target: float) -> list[dict[str, Any]]:
        """The reachable point of PABEE that is nearest to a target, if it is near at all."""
        if "joint" not in self.exits:
            return []
        _, dev, test = self.exits["joint"]
        table = patience_table(dev, self.dev.labels)
        speeds = table["speedup"].to_numpy(dtype=float)
        row = int(np.abs(speeds - target).argmin())
        patience = int(table["patience"].to_numpy()[row])
        self.numbers["PABEE fastest"] = float(speeds.max())
        if abs(speeds[row] / target - 1) > 0.2:
            return [{"method": "PABEE (joint)", "target": target, "note": "cannot be reached"}]
        answers = torch.stack([exit.argmax(dim=-1) for exit in test])
        exits = patience_exits(answers, patience)
        given = answers[exits, torch.arange(answers.shape[1])].numpy()
        return [
            {
                "method": "PABEE (joint)",
                "target": target,
                "accuracy %": 100 * float((given == np.asarray(self.test.labels)).mean()),
                "speed-up (nominal)": len(test) / float((exits + 1).double().mean()),
                "note": f"patience {patience}",
            }
        ]

    def _alone(self, rows: list[dict[str, Any]]) -> None:
        for name in self.names:
            rows.append(
                {
                    "method": f"{name} alone",
                    "accuracy %": self.numbers[f"accuracy {name}"],
                    "speed-up (nominal)": self.flops[self.large] / self.flops[name],
                }
            )

    def _curves(self, pairs: Sequence[tuple[str, str]]) -> None:
        curves = self.curves["accuracy over speed-up"]
        for members in pairs:
            table = sweep(
                [self.logits[m][1] for m in members], self.test.labels, self._costs(members)
            )
            curves[f"cascade {members[0]}"] = points(table)
            if members[0] == "2x32":
                small, large = (self.numbers[f"accuracy {m}"] / 100 for m in members)
                self.numbers["gap recovered"] = performance_gap_recovered(
                    table["speedup"].to_numpy(), table["accuracy"].to_numpy(), small, large
                )
        for method, (_, _, test) in self.exits.items():
            for rule, word in RULES.items():
                curves[f"{method} {word}"] = points(exit_sweep(test, self.test.labels, rule))
        members, hits = ["2x32", self.large], []
        for name in members:
            hits.append(self._hits(self.logits[name][1]))
        costs, accuracies = self._costs(members), [100 * float(hit.mean()) for hit in hits]
        curves["deferred at random"] = random_curve(costs, *accuracies)
        curves["oracle 2x32"] = oracle_point(costs, hits)

    def order_table(self) -> None:
        """DIS of every layer's exit and of the complete models: the paper's heat map."""
        labels = np.asarray(self.test.labels)
        rows = []
        for method, (_, _, test) in self.exits.items():
            row: dict[str, Any] = {"DIS": method}
            accuracy: dict[str, Any] = {"DIS": f"{method}, accuracy %"}
            for number, logits in enumerate(test, 1):
                wrong = logits.argmax(dim=-1).numpy() != labels
                row[f"layer {number}"] = dis(log_odds(logits).numpy(), wrong)
                accuracy[f"layer {number}"] = 100 * float((~wrong).mean())
                self.numbers[f"DIS {method} {number}"] = row[f"layer {number}"]
            rows += [row, accuracy]
        for name in self.names:
            logits = self.logits[name][1]
            value = dis(log_odds(logits).numpy(), logits.argmax(dim=-1).numpy() != labels)
            self.numbers[f"DIS complete {name}"] = value
            layer = name.split("x")[0]
            rows.append({"DIS": f"complete {name}", f"layer {layer}": value})
        self.tables["order"] = rows

    def exited_table(self, shallow: Mapping[int, Stage]) -> None:
        """On the items that DeeBERT lets go at layer k: its accuracy, BERT-kL's and a complete one's."""
        _, dev, test = self.exits["DeeBERT"]
        bar = _bar(exit_sweep(dev, self.dev.labels, "entropy"), 4.0)
        classes, exits = _leave(test, "entropy", bar)
        labels = torch.tensor(self.test.labels)
        rows = []
        for count, stage in shallow.items():
            here = exits == count - 1
            complete = f"{count}x{self.large.split('x')[1]}"
            if int(here.sum()) < 30 or complete not in self.names:
                continue
            first = stage.run(stage.encode(self.test.words), 8192).argmax(dim=-1)
            whole = self.logits[complete][1].argmax(dim=-1)
            row = {
                "layer": count,
                "items": int(here.sum()),
                "DeeBERT": 100 * float((classes == labels)[here].double().mean()),
                "first k layers": 100 * float((first == labels)[here].double().mean()),
                "complete": 100 * float((whole == labels)[here].double().mean()),
            }
            rows.append(row)
            for name in ("DeeBERT", "first k layers", "complete"):
                self.numbers[f"exited {count} {name}"] = row[name]
        self.tables["exited"] = rows

    def quality_table(self) -> None:
        """Order and calibration of each complete model, and reliability of the small one."""
        rows = []
        for name in self.names:
            rows.append({"model": name} | quality(self.logits[name][1], self.test.labels))
        self.tables["quality"] = rows
        small = self.logits["2x32"]
        temperature = fit_temperature(small[0], self.dev.labels)
        self.curves["reliability"] = {
            "as trained": reliability_table(small[1], self.test.labels),
            f"temperature {temperature:.2f}": reliability_table(
                small[1] / temperature, self.test.labels
            ),
        }

    def shares_tables(self) -> None:
        """Who leaves early at 4x, by the length of the word and by its class; each score's accuracy."""
        members = ["2x32", self.large]
        policy = self.fit(members, 4.0)
        answers = self.sub(members).decide([self.logits[m][1] for m in members], policy)
        early, hits = (answers.stages == 0).numpy(), self._hits(answers.logits)
        lengths = np.array([len(word) for word in self.test.words.texts])
        names = np.array(self.test.words.labels)
        self.tables["shares"] = [
            {"words": f"{low} to {high} letters"}
            | _share(early, hits, (lengths >= low) & (lengths <= high))
            for low, high in ((3, 5), (6, 8), (9, 13))
        ] + [
            {"words": f"{label} syllables"} | _share(early, hits, names == label)
            for label in self.cascade.labels
        ]
        rows = []
        kinds: list[Score] = ["max_probability", "margin", "entropy", "energy"]
        for kind in kinds:
            form = Policy([], score=kind)
            row: dict[str, Any] = {"score": kind}
            for target in self.targets:
                logits = [self.logits[m][0] for m in members]
                chosen = fit_policy(
                    logits, self.dev.labels, self._costs(members), target, form=form
                )
                found = self.sub(members).decide([self.logits[m][1] for m in members], chosen)
                row[f"accuracy % at {target:g}x"] = 100 * float(self._hits(found.logits).mean())
            rows.append(row)
        self.tables["scores"] = rows

    def risk_table(self, seed: int, resplits: int, alpha: float = 0.01, delta: float = 0.1) -> None:
        """Harm of at most 1 % with confidence 90 %: each method's price, and how often it fails."""
        members = ["2x32", self.large]
        both = [torch.cat(self.logits[m]) for m in members]
        labels = np.array([*self.dev.labels, *self.test.labels])
        answers = np.stack([logits.argmax(dim=-1).numpy() for logits in both])
        losses = item_losses("harm", answers, labels)
        reach = running_maximum([log_odds(both[0])])
        costs, size = self._costs(members), len(self.dev.labels)
        draw = np.random.default_rng(seed)
        methods = ("empirical", "ltt", "crc")
        harms: dict[str, list[float]] = {method: [] for method in methods}
        speeds: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(resplits):
            order = draw.permutation(len(labels))
            here, there = order[:size], order[size:]
            for method in methods:
                bar = safe_threshold(
                    reach[:, here], losses[:, here], alpha, method=method, delta=delta
                )
                harm = risk_sums(reach[:, there], losses[:, there], np.array([bar]))[0]
                harms[method].append(float(harm) / len(there))
                deferred = float((reach[0, there] <= bar).mean())
                speeds[method].append(costs[1] / (costs[0] + deferred * costs[1]))
        self.tables["risk"] = [
            {
                "method": method,
                "harm on new words %": 100 * float(np.mean(harms[method])),
                "resplits above 1 %": 100 * float(np.mean(np.array(harms[method]) > alpha)),
                "speed-up": float(np.mean(speeds[method])),
            }
            for method in methods
        ]
        for row in self.tables["risk"]:
            self.numbers[f"violations {row['method']}"] = row["resplits above 1 %"]
            self.numbers[f"harm {row['method']}"] = row["harm on new words %"]

    def stages_table(self) -> None:
        """Three stages against two at equal cost, with a shared threshold and with separate ones."""
        if "3x48" not in self.names:
            return
        rows = []
        two, three = ["2x32", self.large], ["2x32", "3x48", self.large]
        for target in self.targets:
            for name, members, separate in (
                ("two stages", two, False),
                ("three, shared threshold", three, False),
                ("three, separate thresholds", three, True),
            ):
                policy = self.fit(members, target, separate)
                answers = self.sub(members).decide([self.logits[m][1] for m in members], policy)
                shares = np.bincount(answers.stages.numpy(), minlength=len(members))
                costs = self._costs(members)
                paid = float((shares / shares.sum() * np.cumsum(costs)).sum())
                rows.append(
                    {
                        "cascade": name,
                        "target": target,
                        "accuracy %": 100 * float(self._hits(answers.logits).mean()),
                        "speed-up (nominal)": costs[-1] / paid,
                    }
                )
        self.tables["stages"] = rows

    def regularized_table(self, stages: Mapping[str, Stage], levels: Sequence[int]) -> None:
        """The small model on few words, without and with difficulty-aware regularization."""
        rows = []
        cost = [float(self.flops["2x32"]), float(self.flops[self.large])]
        titles = {
            "plain": "cross-entropy",
            "folds": "+ DAR, out of fold",
            "online": "+ DAR, online",
        }
        for name, stage in stages.items():
            dev, test = (
                stage.run(stage.encode(split.words), 8192) for split in (self.dev, self.test)
            )
            temperature = fit_temperature(dev, self.dev.labels)
            row: dict[str, Any] = {"small model": titles[name]}
            wrong = test.argmax(dim=-1).numpy() != np.asarray(self.test.labels)
            row["accuracy %"] = 100 * float((~wrong).mean())
            row["DIS"] = dis(log_odds(test).numpy(), wrong)
            row["ECE %"] = 100 * ece(test, self.test.labels)
            row["DIS with temperature"] = dis(log_odds(test / temperature).numpy(), wrong)
            row["ECE % with temperature"] = 100 * ece(test / temperature, self.test.labels)
            for target in (2.0, 3.0, 4.0):
                pair = [dev, self.logits[self.large][0]]
                policy = fit_policy(pair, self.dev.labels, cost, target)
                answers = self.cascade.decide([test, self.logits[self.large][1]], policy)
                row[f"cascade % at {target:g}x"] = 100 * float(self._hits(answers.logits).mean())
            rows.append(row)
            self.numbers |= {
                f"DIS {name}": row["DIS"],
                f"ECE {name}": row["ECE %"],
                f"ECE {name} scaled": row["ECE % with temperature"],
                f"small-data accuracy {name}": row["accuracy %"],
            }
        self.tables["regularized"] = rows
        self.curves["difficulty"] = {
            str(level): int(np.sum(np.asarray(levels) == level)) for level in sorted(set(levels))
        }
        self.numbers["hard %"] = 100 * float(np.mean(np.asarray(levels) > 0))


def _share(early: np.ndarray, hits: np.ndarray, here: np.ndarray) -> dict[str, Any]:
    count = int(here.sum())
    if not count:
        return {"items": 0}
    return {
        "items": count,
        "answered by the small model %": 100 * float(early[here].mean()),
        "accuracy %": 100 * float(hits[here].mean()),
    }


def _bar(table: "pd.DataFrame", target: float) -> float:
    """The highest threshold of a sweep that is as fast as wanted."""
    fast = table["speedup"].to_numpy(dtype=float) >= target * (1 - 1e-12)
    return float(table["threshold"].to_numpy(dtype=float)[fast][-1])


def _leave(logits: Sequence[Tensor], rule: Signal, bar: float) -> tuple[Tensor, Tensor]:
    """Classes and exits of given logits of all exits."""
    above = torch.stack([score(exit, rule) > bar for exit in logits[:-1]])
    last = torch.ones_like(above[:1])
    exits = torch.cat([above, last]).int().argmax(dim=0)
    answers = torch.stack([exit.argmax(dim=-1) for exit in logits])
    return answers[exits, torch.arange(answers.shape[1])], exits


def _clock(work: Callable[[], Any], tries: int = 3) -> float:
    """Seconds of the best of some tries, fewer where they are long."""
    seconds: list[float] = []
    while len(seconds) < tries and sum(seconds) < 5:
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
