"""What a command found as a page: plain words, tables, and figures.

A defender knows accuracy on clean rows, and nothing else decides anything; how often an attack
succeeds takes the attack. Every page keeps the two apart, and says what was not touched.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError
from octavo.report import Report
from octavo.rundir import CONFIG, is_finished

from finepurify.config import AttackConfig, Head
from finepurify.figures import (
    Rows,
    frontier_figure,
    heat_figure,
    histogram_figure,
    kind_of,
    rho_figure,
)
from finepurify.laws import THEORY
from finepurify.sweep import floor_of

if TYPE_CHECKING:
    from finepurify.pairing import WeightPair
    from finepurify.scan import ScanReport
    from finepurify.stations import Cleaned, Comparison, Settings

Row = dict[str, Any]

UNKNOWN = (
    "What a defender can know is accuracy on clean rows; it alone may choose rho. What a defender "
    "cannot know is how often an attack still succeeds (ASR), or how much a bias still costs "
    "(BACC): both take the attacker's pattern."
)
READING = (
    "The body of the paper was not available to us. That drift is compared with curvature, r = "
    "delta^2 / H, and that p(clean | r) follows from two Gamma laws is our reading of it; where H "
    "is estimated, how it is damped, that a threshold is the default and how rho is chosen are "
    "our decisions. No number on this page is the paper's."
)


#: What became of the tensors that INIT lacks.
HEADS = {
    "keep": "it is the attacker's, and only fine-tuning on clean rows goes over it",
    "reset": "it was drawn anew, and learnt in the fine-tuning on clean rows",
    "retrain": "it was drawn anew, and learnt on clean rows, alone first",
}

# --- tables --------------------------------------------------------------------------------------


def laws_rows(laws: Mapping[str, Any]) -> list[Row]:
    """The premises of the theory beside what was measured, in plain words.

    Args:
        laws: a `Laws` as a mapping; empty where no Fisher diagonal was computed.
    """
    if not laws:
        return []
    total = max(1, laws["dimensions"])
    correlation = laws["spearman"]
    follows = "cannot be told" if math.isnan(correlation) else (
        "drift follows curvature, as under SGD" if correlation >= 0.2 else
        "drift hardly follows curvature, as under Adam: compare with delta-only"
    )  # fmt: skip

    def row(measure: str, found: float, theory: float | str, meaning: str) -> Row:
        return {"measure": measure, "measured": found, "theory": theory, "meaning": meaning}

    def count(measure: str, of: str, meaning: str) -> Row:
        share = f"{100 * laws[of] / total:.3g} % of {laws['dimensions']}"
        return row(measure, laws[of], "", f"{share}; {meaning}")

    return [
        row("Spearman of delta^2 and H", correlation, "SGD: above 0; Adam: about 0", follows),
        row("sd of log r", laws["log_sd"], THEORY["log_sd"], "more: k differs between dimensions"),
        row("median / mean of r", laws["median_over_mean"], THEORY["median_over_mean"],
            "less: a few dimensions drifted far more than the rest"),
        row("KS distance from Gamma", laws["ks_distance"], 0.0, "0 is the law, 1 is nothing like it"),
        row("k, mean of r", laws["k"], "", "how fast fine-tuning drifted"),
        count("dimensions that never moved", "unmoved", "resetting them changes nothing"),
        count("dimensions with H = 0", "flat", "clean rows do not use them: epsilon decides their r"),
        count("neutral dimensions", "neutral", "attention key biases, kept: they change nothing"),
        row("% of the top 1 % of r in the word embedding", 100 * laws["top_in_embedding"], "",
            "these are rows of words, not layers"),
    ]  # fmt: skip


def _names(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _counted(rows: Rows) -> list[Row]:
    """Rows in which what was reset is a count, to be shown to the last digit."""
    return [dict(row) | ({"reset": int(row["reset"])} if "reset" in row else {}) for row in rows]


def _untouched(report: Report, pair: "WeightPair", head: Head = "keep") -> None:
    """What of the suspect was not compared, so that nobody takes it for cleaned."""
    report.heading("What was not touched")
    reasons: dict[str, list[str]] = {}
    for name, reason in pair.kept.items():
        if not reason.startswith("tied to "):
            reasons.setdefault(reason, []).append(name)
    if reasons:
        report.text(
            "These tensors of the suspect were neither compared nor reset. A head has no "
            f"counterpart in INIT: {HEADS[head]}."
        )
        report.table(
            "Not compared",
            [{"reason": reason, "tensors": len(names), "dimensions": sum(map(pair.suspect.numel, names)),
              "names": _names(names)} for reason, names in reasons.items()],
        )  # fmt: skip
    else:
        report.text("Every tensor of the suspect has a counterpart in INIT and was compared.")
    tied = [name for name, reason in pair.kept.items() if reason.startswith("tied to ")]
    if tied:
        report.text(f"Counted once and given their twin's values, being tied: {_names(tied)}.")
    if pair.dropped:
        report.text(f"Of INIT alone, not looked at: {_names(pair.dropped)}.")
    if pair.grown:
        how = "INIT's mean row" if pair.extra_rows == "mean" else "nothing: they were kept"
        report.table(
            f"Rows that INIT lacks, compared with {how}",
            [{"tensor": name, "rows more": rows} for name, rows in pair.grown.items()],
        )


def _premises(report: Report, laws: Mapping[str, Any], rho: float | None) -> None:
    """Whether the theory holds for this pair, where curvature was computed."""
    if not laws:
        return
    report.heading("Do the theory's premises hold?")
    report.table("Drift, curvature and the law of r", laws_rows(laws))
    report.text(
        f"{100 * laws['top_in_embedding']:.1f} % of the highest 1 % of r lie in the word "
        "embedding. The larger this is, the less it may be said that layers were cleaned: rows of "
        "single words were."
    )
    if rho is not None and sum(laws["histogram"]):
        zeros = laws["dimensions"] - sum(laws["histogram"])
        report.figure(
            f"Indicators r, and both Gamma laws at rho = {rho:g}", histogram_figure(laws, rho)
        )
        report.text(
            f"{zeros} dimensions have r = 0 (unmoved or neutral); a logarithm cannot show them, "
            "while the curves are of all dimensions."
        )


def _shares(report: Report, pair: "WeightPair", over: str) -> None:
    """What rho is a share of, and how many of these dimensions never moved."""
    still = pair.numel - pair.moved()
    of = "those that moved" if over == "moved" else "all compared dimensions"
    report.text(
        f"rho is a share of {of}. {pair.numel} dimensions were compared; {still} of them "
        f"({100 * still / pair.numel:.1f} %) never moved in fine-tuning, and resetting those "
        "changes nothing."
    )


def _reading(report: Report, settings: "Settings") -> None:
    report.heading("What is our reading")
    report.text(READING)
    fisher, indicator, purify = settings.fisher, settings.indicator, settings.purify
    damping = f"epsilon {indicator.epsilon:g}"
    if indicator.damping != "absolute":
        damping += f" and {indicator.damping_share:g} of its {indicator.damping}"
    report.text(
        f"This run: {fisher.fisher} Fisher diagonal at "
        f"{', '.join(f'{p:g}' for p in fisher.points)} of the way from INIT to the suspect; "
        f"{damping} added to H, to the power of {indicator.exponent:g}; mode {purify.mode}, scope "
        f"{purify.scope}; fine-tuning of {settings.tune.steps} steps at "
        f"{settings.tune.learning_rate:g}."
    )


# --- pages ---------------------------------------------------------------------------------------


def scan_report(found: "ScanReport", pair: "WeightPair", init: str, suspect: str) -> Report:
    """The page of `scan`: which tokens and tensors drifted out of the ordinary.

    Args:
        found: by the scan.
        pair: the weights.
        init: the pre-trained model, as it was named.
        suspect: the fine-tuned one.
    """
    report = Report(f"Scan of {suspect}")
    report.text(f"{'Something' if found.verdict else 'Nothing'} stands out: {found.reason}.")
    report.text(found.warning)
    report.text(
        f"Compared with {init}, weight by weight. Nothing was changed, and no trigger was tried: "
        "the most this page can name is where to look."
    )
    _shares(report, pair, "all")
    if found.tokens:
        report.heading("Tokens")
        report.table("Rows of the word embedding, the most suspicious first", found.tokens)
    if found.layers:
        report.heading("Where the drift is")
        if all("top share" in row for row in found.layers):
            top = 0.01 * sum(row["dimensions"] for row in found.layers)
            rows = [row | {"reset": row["top share"] * top} for row in found.layers]
            report.figure(
                "Share of each module that is among the 1 % of dimensions with the highest r "
                "(delta^2 without clean "
                "rows)",
                heat_figure(rows, "among the highest 1 %"),
            )
            inside = sum(
                r["top share"] for r in rows if kind_of(r["tensor"])[0] == "word embedding"
            )
            report.text(
                f"{100 * inside:.1f} % of that 1 % lie in the word embedding: rows of words, not "
                "layers."
            )
        report.table("Tensors", found.layers)
    _untouched(report, pair)
    return report


def purify_report(
    done: "Cleaned", pair: "WeightPair", settings: "Settings", n_clean: int, n_held: int
) -> Report:
    """The page of `purify`: what was reset, what it cost, and what cannot be said of it.

    Args:
        done: by the station.
        pair: the weights.
        settings: of all stations.
        n_clean: rows that were computed on.
        n_held: rows that chose rho; 0 where it was given.
    """
    strategy = settings.purify.strategy
    report = Report(f"Purified: {pair.suspect.source}")
    reset = int(done.numbers["reset"])
    way = " more than half of the way" if "mean p" in done.numbers else ""
    report.text(
        f"{strategy} at rho = {done.rho:g} set {reset} of {pair.numel} compared dimensions "
        f"({100 * reset / pair.numel:.2f} %){way} back to {pair.init.source}, and "
        f"{settings.tune.steps} steps of fine-tuning on {n_clean} clean rows followed."
    )
    if not done.met:
        report.text(
            f"No rho that was tried keeps the accuracy floor of {done.floor:.1f} %. What costs "
            "least accuracy was written; do not take it for a success."
        )
    report.heading("What was known, and what was not")
    report.text(UNKNOWN)
    report.text(
        "So nothing here shows that the attack is gone. Test the model with whatever trigger you "
        "suspect: finepurify evaluate MODEL --known-attack."
    )
    row: Row = {"strategy": strategy, "rho": done.rho} | done.numbers | {"reset": reset}
    if done.accuracy:
        row |= {"held ACC before": done.accuracy[0], "held ACC after": done.accuracy[1]}
        row |= {"floor": done.floor, "floor kept": done.met}
    report.table("Result", [row])
    _shares(report, pair, settings.purify.rho_over)
    if done.rows:
        report.figure(
            f"Accuracy on {n_held} held-out rows over rho, with 95 % intervals",
            rho_figure(done.rows, done.floor, {strategy: done.rho}),
        )
        report.table("Every rho that was tried", _counted(done.rows))
        if done.met:
            report.text(
                "The chosen rho is the smallest above the floor, so its own accuracy is a little "
                "flattered: rows that nothing was chosen on would tell it fairly."
            )
    else:
        report.text("rho was given, not chosen: no accuracy was measured.")
    if done.tensors:
        _places(report, done)
    _untouched(report, pair, settings.purify.head)
    _premises(report, done.laws, done.rho)
    _reading(report, settings)
    return report


def _places(report: Report, done: "Cleaned") -> None:
    """Where the reset dimensions lie."""
    report.heading("Where it was reset")
    if "mean p" in done.numbers:
        report.text(
            "The posterior weighs every dimension and cuts none off; what follows counts the share "
            "1 - rho with the highest r, which it sets back furthest."
        )
    tensors = done.tensors
    total = max(1, sum(row["reset"] for row in tensors))
    words = [row for row in tensors if kind_of(row["tensor"])[0] == "word embedding"]
    inside = 100 * sum(row["reset"] for row in words) / total
    size = 100 * sum(row["dimensions"] for row in words) / sum(row["dimensions"] for row in tensors)
    report.text(
        f"{inside:.1f} % of what was reset lie in the word embedding, which holds {size:.1f} % of "
        "the dimensions. "
        + ("To say that layers were cleaned would be wrong: rows of words were."
           if inside >= 50 else "The rest lies in the layers and other tables.")
    )  # fmt: skip
    report.figure("Share of each kind of module that was reset, by layer", heat_figure(tensors))
    most = sorted(tensors, key=lambda row: row["reset"], reverse=True)[:20]
    report.table("Tensors with most reset dimensions", most)


def compare_report(
    found: "Comparison", pair: "WeightPair", settings: "Settings", pattern: AttackConfig | None
) -> Report:
    """The page of `compare`: strategies side by side, each at the rho that held-out accuracy gave.

    Args:
        found: by the station.
        pair: the weights.
        settings: of all stations.
        pattern: of the attack, where it was known.
    """
    report = Report(f"Strategies compared on {pair.suspect.source}")
    report.heading("What was known, and what was not")
    report.text(UNKNOWN)
    if pattern is None:
        report.text("No pattern was given: this page cannot tell which strategy removes an attack.")
    else:
        trigger = ", ".join(repr(words) for words in pattern.trigger)
        report.text(
            f"The pattern of this study ({pattern.attack}: {trigger}, class {pattern.target}) was "
            "looked at only after every rho had been chosen."
        )
    if found.before:
        report.table("The suspect as it came", [found.before])
    report.table("Each strategy at its chosen rho", _counted(found.chosen))
    if any(str(name).startswith("p against ") for row in found.chosen for name in row):
        report.text(
            "p: of McNemar's exact test, that both are right (or withstand) on the same texts "
            "equally often. A row without rho: none keeps the floor."
        )
    metric = _metric(found.chosen)
    if metric:
        report.figure(
            f"Accuracy and {metric} of each strategy at its chosen rho",
            frontier_figure(found.chosen, metric, "ACC"),
        )
    _shares(report, pair, settings.purify.rho_over)
    report.heading("What the defender saw")
    picked = {row["strategy"]: row["rho"] for row in found.chosen}
    floor = floor_of(found.rows, settings.sweep.drop)
    report.figure("Accuracy on held-out rows over rho", rho_figure(found.rows, floor, picked))
    report.table("Every rho that was tried", _counted(found.rows))
    _untouched(report, pair)
    _premises(report, found.laws, picked.get("fine-purifying"))
    _reading(report, settings)
    return report


def _metric(rows: Rows) -> str | None:
    return next((name for name in ("ASR", "BACC") if any(name in row for row in rows)), None)


def joint_report(folders: Sequence[Path]) -> tuple[Report, list[Row]]:
    """Finished runs of `purify` and `compare` on one page.

    Args:
        folders: of the runs.

    Returns:
        The page, and a row a run and strategy.

    Raises:
        ConfigError: there is no folder, or one holds no finished run of these commands.
    """
    if not folders:
        raise ConfigError("no run was named; give the folders of finished runs")
    runs = {str(folder): _run(Path(folder)) for folder in folders}
    rows = [row for name, (options, result) in runs.items() for row in _rows(name, options, result)]
    report = Report("Runs of finepurify")
    report.text(UNKNOWN)
    report.table("Runs", rows)
    known = {name: options for name, (options, _) in runs.items()}
    options = dict.fromkeys(option for each in known.values() for option in each)
    differ = [
        {"option": option} | {name: str(each.get(option, "")) for name, each in known.items()}
        for option in options
        if len({str(each.get(option, "")) for each in known.values()}) > 1
    ]
    if differ:
        report.table("Options in which the runs differ", differ)
        report.text(
            "Where models or rows differ, numbers of different runs cannot be set side by side."
        )
    for metric in ("ASR", "BACC"):
        judged = [r | {"strategy": f"{r['run']}: {r['strategy']}"} for r in rows if metric in r]
        if judged:
            report.figure(
                f"Accuracy and {metric} on test rows", frontier_figure(judged, metric, "ACC")
            )
    for name, (options, result) in runs.items():
        report.heading(name)
        own = {row["strategy"]: row["rho"] for row in rows if row["run"] == name}
        if result["rows"]:
            floor = floor_of(result["rows"], options["drop"])
            report.figure(
                f"{name}: held-out accuracy over rho", rho_figure(result["rows"], floor, own)
            )
        if result["laws"]:
            report.table(f"{name}: do the premises hold?", laws_rows(result["laws"]))
        else:
            report.text("No curvature was computed.")
    return report, rows


def _run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and result of a run.

    Raises:
        ConfigError: it is none of these commands, or not finished.
    """
    import yaml

    what = "no finished run of `purify` or `compare`"
    try:
        options = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise ConfigError(f"{folder}: holds {what}; name the folder that --out named") from None
    known = isinstance(options, dict) and isinstance(result, dict) and is_finished(folder)
    if not known or not {"rows", "laws"} < set(result) or not {"chosen", "rho"} & set(result):
        raise ConfigError(f"{folder}: holds {what}; name the folder that --out named")
    return options, result


def _rows(name: str, options: Mapping[str, Any], result: Mapping[str, Any]) -> list[Row]:
    """A run as rows of the joint table."""
    suspect = options.get("suspect")
    if "chosen" in result:
        return [{"run": name, "suspect": suspect} | row for row in result["chosen"]]
    row: Row = {"run": name, "suspect": suspect, "strategy": options.get("strategy")}
    row |= {"rho": result["rho"], "reset": int(result["numbers"]["reset"])}
    if result["accuracy"]:
        row |= {
            "held ACC": result["accuracy"][1],
            "floor": result["floor"],
            "floor kept": result["met"],
        }
    return [row]
