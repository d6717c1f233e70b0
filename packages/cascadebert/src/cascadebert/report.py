"""Pages of tables and figures: of the demo's seeds, and of a user's own cascade and rivals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from octavo.report import Claim, Report

from cascadebert.cascade import Cascade
from cascadebert.data import Examples
from cascadebert.evaluate import (
    compare,
    oracle_point,
    points,
    random_curve,
    refuse_calibration_rows,
    stage_quality,
)
from cascadebert.metrics import (
    call_performance_threshold,
    dis,
    performance_gap_recovered,
    reliability_table,
)
from cascadebert.policy import Policy, sweep
from cascadebert.scores import log_odds
from cascadebert.stage import Stage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from cascadebert.early_exit import EarlyExit
    from cascadebert.measure import Found

Curve = Mapping[str, Sequence[float]]

#: Steps of confidence with fewer items are left out of a figure: their accuracy is chance.
FEW = 10

#: What nominal speed-ups count where cascades stand beside early exit.
NOMINAL = "FLOPs for cascades, layers for exits"


def demo_report(
    title: str, intro: str, found: Sequence["Found"], claims: Sequence[Claim], exception: str
) -> Report:
    """The page of an experiment: claims, then seven parts, tables as means over the seeds.

    Args:
        title: of the page.
        intro: what the task is and how it was run.
        found: of each seed.
        claims: judged on the means.
        exception: where the cascade does not win, in words.
    """
    report = Report(title)
    report.text(intro)
    report.claims(claims)
    first = found[0]

    def table(name: str, caption: str) -> None:
        if name in first.tables:
            report.table(caption, mean_rows([one.tables[name] for one in found]))

    report.heading("1. Accuracy at equal speed-up")
    report.text(
        "Every threshold is the highest that is as fast as wanted on the calibration words. The clock "
        "is this machine's, each method with the same batching and with items dropped as they leave. "
        "Interval and p-value are of the first seed."
    )
    table("speed", f"Accuracy at each target, mean over seeds; nominal speed-up: {NOMINAL}")
    curves = first.curves["accuracy over speed-up"]
    report.figure("Accuracy over speed-up, first seed, test words", curve_figure(curves, NOMINAL))
    report.figure("Nominal and measured speed-up, first seed", clock_figure(first.tables["speed"]))
    report.heading("2. Difficulty inversion, and what early exit answers")
    table("order", "DIS (100 is perfect order, 50 chance) by method and layer")
    report.figure("DIS by method and layer, first seed", heat_figure(first.tables["order"]))
    table("exited", "Accuracy on the items that DeeBERT lets go after layer k at 4x")
    if first.tables.get("exited"):
        report.figure("The same, first seed", bar_figure(first.tables["exited"]))
    report.heading("3. Difficulty-aware regularization, on few words")
    if "regularized" in first.tables:
        table("regularized", "The small model without and with it, and temperature scaling")
        report.figure("Rows by difficulty, first seed", count_figure(first.curves["difficulty"]))
    else:
        report.text("Not run in this profile: it needs a dozen models more (--profile full).")
    table("quality", "Order and calibration of the complete models")
    report.figure("Reliability of the small model", reliability_figure(first.curves["reliability"]))
    report.heading("4. Who leaves early at 4x")
    table("shares", "By length and by class")
    report.figure("Answered by the small model", share_figure(first.tables["shares"]))
    table("scores", "Accuracy by score of confidence")
    report.heading("5. Harm of at most 1 % with confidence 90 %")
    report.text(
        "Thresholds from new splits of calibration and test words. The empirical one keeps the harm of "
        "the calibration words and fails in about half of the splits; Learn-then-Test may fail in one "
        "of ten; conformal risk control holds on average. What it costs is speed."
    )
    table("risk", "By method")
    report.heading("6. Three stages against two at equal cost")
    if "stages" in first.tables:
        table("stages", "Accuracy on test words")
    else:
        report.text("Not run in this profile: it needs a third model (--profile full).")
    report.heading("7. Where the cascade does not win")
    report.text(exception)
    return report


def user_report(
    cascade: Cascade,
    policy: Policy,
    examples: Examples,
    rivals: Mapping[str, "EarlyExit | Stage"],
    *,
    allow_same_split: bool = False,
) -> tuple[Report, list[dict[str, Any]]]:
    """The page of a user's cascade on labelled rows that its policy was not fitted on.

    Args:
        cascade: the models.
        policy: the thresholds.
        examples: labelled rows.
        rivals: early-exit models and shallow classifiers by name; their curves are of these rows too.
        allow_same_split: report on the calibration rows all the same.

    Returns:
        The page, and the rows of its first table.
    """
    from cascadebert.early_exit import exit_sweep, patience_table

    refuse_calibration_rows(policy, examples, allow_same_split)
    labels = cascade.class_numbers(examples)
    rows = compare(cascade, policy, examples, allow_same_split=allow_same_split)
    everything = [cascade.logits(number, examples) for number in range(len(cascade.stages))]
    costs = policy.costs.get(policy.cost) or [
        price.of(policy.cost) for price in cascade.costs(cascade.lengths(examples), measured=True)
    ]
    scores = [policy.score_of(i, logits) for i, logits in enumerate(everything[:-1])]
    table = sweep(everything, labels, costs, scores)
    curves = {"cascade": points(table)}
    right = [logits.argmax(dim=-1).numpy() == np.asarray(labels) for logits in everything]
    small, large = (100 * float(right[i].mean()) for i in (0, -1))
    if len(everything) > 1:
        curves["deferred at random"] = random_curve([costs[0], costs[-1]], small, large)
        curves["oracle"] = oracle_point(costs, right)
    order = []
    deepest = int(cascade.stages[-1].model.config.num_hidden_layers)
    for name, rival in rivals.items():
        if isinstance(rival, Stage):
            shallow = rival.run(rival.encode(examples), cascade.batch_tokens).argmax(dim=-1).numpy()
            layers = int(rival.model.config.num_hidden_layers)
            accuracy = 100 * float((shallow == np.asarray(labels)).mean())
            curves[name] = {"speedup": [deepest / layers], "accuracy": [accuracy]}
            continue
        exits, certainties = rival.outputs(examples)
        curves[f"{name} entropy"] = points(exit_sweep(exits, labels, "entropy"))
        curves[f"{name} confidence"] = points(exit_sweep(exits, labels, "max_probability"))
        if certainties:
            curves[f"{name} learned"] = points(exit_sweep(exits, labels, certainties))
        curves[f"{name} patience"] = points(patience_table(exits, labels))
        row: dict[str, Any] = {"DIS": name}
        for number, logits in enumerate(exits, 1):
            wrong = logits.argmax(dim=-1).numpy() != np.asarray(labels)
            row[f"layer {number}"] = dis(log_odds(logits).numpy(), wrong)
        order.append(row)
    row = {"DIS": "cascade, by stage"}
    for stage, logits in zip(cascade.stages, everything, strict=True):
        wrong = logits.argmax(dim=-1).numpy() != np.asarray(labels)
        row[f"layer {stage.model.config.num_hidden_layers}"] = dis(log_odds(logits).numpy(), wrong)
    order.append(row)
    report = Report("A cascade and what it is worth")
    report.text(
        f"On {len(examples)} rows. Target {policy.target}; thresholds as probabilities "
        f"{', '.join(f'{value:.3f}' for value in policy.probabilities)}; backend {policy.backend}. "
        f"{policy.guarantee.get('text', 'No guarantee was asked for.')}"
    )
    report.table("Each model alone, and the cascade", rows)
    unit = policy.cost + " for the cascade, layers for rivals" * bool(rivals)
    report.figure("Accuracy over speed-up", curve_figure(curves, unit))
    recovered = performance_gap_recovered(
        table["speedup"].to_numpy(), table["accuracy"].to_numpy(), small / 100, large / 100
    )
    report.text(
        "Share of the gap between the first and the last stage that the curve recovers, averaged over "
        f"cost (0.5 is deferring at random): {recovered:.3f}."
        if recovered == recovered
        else "The last stage is no better than the first here: there is no gap to recover."
    )
    if recovered == recovered:
        report.table(
            "Rows in % that must reach the last stage to recover 50 and 80 % of the gap",
            [call_row(table, len(everything), small / 100, large / 100)],
        )
    report.table("Difficulty inversion score by layer", order)
    report.table("Confidence of each stage", stage_quality(cascade, policy, examples))
    for number, logits in enumerate(everything, 1):
        scaled = logits / policy.temperature(number - 1)
        report.table(f"Reliability of stage {number}", reliability_table(scaled, labels))
    first = everything[0] / policy.temperature(0)
    report.figure(
        "Reliability of the first stage",
        reliability_figure({"stage 1": reliability_table(first, labels)}),
    )
    answers = cascade.decide(everything, policy)
    names = np.asarray(examples.labels)
    report.table("Who leaves where, by class", exit_shares(answers.stages.numpy(), names))
    return report, rows


def call_row(table: "pd.DataFrame", stages: int, small: float, large: float) -> dict[str, float]:
    """CPT(50) and CPT(80) of a sweep, in percent of its items.

    Args:
        table: from `sweep`, with accuracies.
        stages: how many the cascade has.
        small: accuracy of the first stage alone, 0 to 1.
        large: accuracy of the last stage alone.
    """
    shares, accuracies = (table[name].to_numpy() for name in (f"share_{stages}", "accuracy"))
    return {
        f"CPT({part})": 100
        * call_performance_threshold(shares, accuracies, small, large, part / 100)
        for part in (50, 80)
    }


def exit_shares(stages: np.ndarray, groups: np.ndarray) -> list[dict[str, Any]]:
    """Which share of each group left at each stage."""
    count = int(stages.max()) + 1 if len(stages) else 0
    return [
        {"group": str(group), "items": int((groups == group).sum())}
        | {
            f"stage {number + 1} %": 100 * float((stages[groups == group] == number).mean())
            for number in range(count)
        }
        for group in np.unique(groups)
    ]


def mean_rows(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the first table with the means over all, matched by their words.

    Intervals and p-values stay those of the first; rows that a seed lacks are left out of its mean.
    """
    fixed = ("95 % from", "to")

    def key(row: Mapping[str, Any]) -> tuple:
        words = [value for value in row.values() if isinstance(value, str)]
        return (*words[:1], row.get("target"), row.get("layer"))

    others = [{key(row): row for row in table} for table in tables]
    result = []
    for row in tables[0]:
        mean = dict(row)
        for name, value in row.items():
            if isinstance(value, float) and name not in fixed and not name.startswith("p against"):
                found = [table[key(row)].get(name) for table in others if key(row) in table]
                numbers = [number for number in found if isinstance(number, int | float)]
                mean[name] = float(np.mean(numbers))
        result.append(mean)
    return result


def _axes(width: float = 7, height: float = 4) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def curve_figure(curves: Mapping[str, Curve], unit: str) -> "Figure":
    """Accuracy over speed-up, a line a method; few points are marks.

    Args:
        curves: speed-ups over the large model and accuracies in percent, by method.
        unit: what the speed-ups are counted in.
    """
    figure, axes = _axes()
    for name, curve in curves.items():
        few = len(curve["speedup"]) < 20  # points that a rule can reach, and no line
        axes.plot(curve["speedup"], curve["accuracy"], "*" if few else "-", label=name)
    axes.set_xlabel(f"speed-up over the large model ({unit})")
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize=8)
    return figure


def diagonal_figure(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], x: str, y: str, through: float
) -> "Figure":
    """One column over another, a line a table, beside the diagonal where both are equal.

    Args:
        tables: rows by name; a row that lacks one of the columns is left out.
        x: the column across, which names the axis.
        y: the column upwards.
        through: a point of the diagonal that is to be seen.
    """
    figure, axes = _axes()
    for name, rows in tables.items():
        points = [(row[x], row[y]) for row in rows if row.get(x) and row.get(y) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.axline((through, through), slope=1, color="gray", linestyle=":")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
    return figure


def heat_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """DIS by method and layer."""
    rows = [row for row in rows if "accuracy" not in row["DIS"]]
    names = {name for row in rows for name in row if name.startswith("layer ")}
    layers = sorted(names, key=lambda name: int(name.removeprefix("layer ")))
    values = np.array([[row.get(layer, np.nan) for layer in layers] for row in rows], dtype=float)
    figure, axes = _axes(7, 0.6 + 0.4 * len(rows))
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(rows)), [row["DIS"] for row in rows])
    for y, x in np.argwhere(~np.isnan(values)):
        dark = values[y, x] < np.nanmean(values)
        color = "white" if dark else "black"
        axes.text(x, y, f"{values[y, x]:.1f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axes)
    return figure


def bar_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """The paper's bars: accuracy on what early exit lets go, by layer and method."""
    figure, axes = _axes()
    methods = ("DeeBERT", "first k layers", "complete")
    for number, method in enumerate(methods):
        places = np.arange(len(rows)) + 0.25 * (number - 1)
        axes.bar(places, [row[method] for row in rows], 0.25, label=method)
    axes.set_xticks(range(len(rows)), [f"layer {row['layer']}" for row in rows])
    axes.set_ylabel("accuracy, %")
    axes.legend(loc="lower center")
    return figure


def count_figure(counts: Mapping[str, int]) -> "Figure":
    """How many rows have each difficulty."""
    figure, axes = _axes(5, 3)
    axes.bar(list(counts), list(counts.values()))
    axes.set_xlabel("difficulty")
    axes.set_ylabel("rows")
    return figure


def reliability_figure(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Accuracy over confidence."""
    enough = {
        name: [row for row in rows if row.get("items", FEW) >= FEW] for name, rows in tables.items()
    }
    return diagonal_figure(enough, "mean confidence %", "accuracy %", through=100)


def clock_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Measured over nominal speed-up, a mark a row that has both, a line a method."""
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["method"], []).append(row)
    figure = diagonal_figure(tables, "speed-up (nominal)", "speed-up (clock)", through=1)
    figure.axes[0].set_xlabel(f"nominal speed-up ({NOMINAL})")
    return figure


def share_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Which share of each group the small model answers."""
    figure, axes = _axes()
    here = [row for row in rows if row["items"]]
    axes.barh(
        [row["words"] for row in here], [row["answered by the small model %"] for row in here]
    )
    axes.set_xlabel("answered by the small model, %")
    return figure


def write_report(report: Report, out: Path) -> Path:
    """Write the page into a folder that is made."""
    out.mkdir(parents=True, exist_ok=True)
    return report.save(out)
