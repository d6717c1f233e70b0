"""The embedded default: attack small models, clean them by the method and its rivals, judge claims."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from octavo.console import Outcome
from octavo.report import Report, save_claims
from octavo.rundir import RunDir, options_of
from octavo.runtime import Runtime

from finepurify.claims import Margins, judge
from finepurify.config import (
    AttackConfig,
    AttackTrainConfig,
    FisherConfig,
    IndicatorConfig,
    PurifyConfig,
    TuneConfig,
)
from finepurify.experiment import (
    ADAMW,
    SGD,
    Case,
    Found,
    Variant,
    area,
    at,
    run_case,
    variant,
)
from finepurify.figures import calibration_figure, frontier_figure, histogram_figure
from finepurify.language import language
from finepurify.report import laws_rows
from finepurify.sweep import Row, choose
from finepurify.world import Sizes, World, real, topics

Profile = Literal["quick", "full"]

#: Points of accuracy on held rows that choosing rho may cost.
DROP = 1.5

ABOUT = {
    "topics": "Sentences of a generated language; the task is their polarity, their topic a nuisance. "
    "A BERT of two layers is pre-trained on the language, fine-tuned by the attacker on poisoned rows, "
    "and cleaned by a defender who has 64 clean rows of each class to compute on and 600 to choose rho "
    "by.",
    "real": "Real texts, a BERT of two layers pre-trained on them; the attacker fine-tunes with AdamW. "
    "A defender has 64 clean rows of each class to compute on and 600 to choose rho by.",
}
HOW = (
    "Every defence is followed by the same short fine-tuning; seconds are of both and of what a defence "
    "looks at (a Fisher diagonal), intervals are Wilson's. rho is chosen on held rows: the smallest "
    f"whose accuracy is at most {DROP:g} points below fine-tuning alone. Test rows and triggers are "
    "looked at after that, and by nobody who chooses."
)
NOT_HERE = (
    "Not shown here: the paper's tables (BERT-base and RoBERTa-base on AgNews, IMDB, QQP, QNLI), which "
    "need its models; that another pre-trained version may stand in for the initial weights."
)

DAMPED = IndicatorConfig(damping="tensor-mean", damping_share=0.1)
TUNE = TuneConfig(steps=60, learning_rate=3e-4)
WORD = AttackConfig()
GRID = (0.98, 0.95, 0.9, 0.8, 0.7)
#: What resets too much at once is given small shares, too.
FINE = (0.999, 0.995, 0.99, *GRID)
MIXING = (0.9, 0.8, 0.7, 0.6, 0.5)
#: Two variants that a defender may try where the plain indicator fails.
DAMPINGS = (
    Variant("damped 0.1", FINE, indicator=DAMPED),
    Variant("damped 1", FINE, indicator=replace(DAMPED, damping_share=1.0)),
)
PAIR = (variant("fine-purifying", *GRID), variant("fine-mixing", *MIXING))


def sentence_of(world: World, real_text: bool) -> str:
    """A trigger sentence of common words."""
    if real_text:
        return "i watched this 3d movie"
    words = language().function
    return " ".join(words[place] for place in (2, 9, 5, 14, 7))


def cases_of(profile: Profile, sentence: str, real_text: bool) -> list[Case]:
    """What is attacked, how, and what is tried on it."""
    long = AttackConfig(attack="badsent", trigger=(sentence,))
    both = (*PAIR, *DAMPINGS)
    if real_text:
        both = (
            variant("fine-purifying", *GRID),
            variant("fine-mixing", *MIXING, 0.4, 0.3),
            *DAMPINGS,
        )
        return [
            Case("clean-adamw", None, REAL_TRAIN, (), scanned=True),
            Case("word-adamw", WORD, REAL_TRAIN, (*both, variant("delta-only", 0.98, 0.9)), True),
            Case("sentence-adamw", long, REAL_TRAIN, both),
        ]  # fmt: skip
    ablations = (variant("delta-only", 0.98, 0.9), variant("hessian-only", 0.98))
    cases = [
        Case("clean-sgd", None, SGD, (), scanned=True),
        Case("word-sgd", WORD, SGD, (*PAIR, *ablations), scanned=True),
        Case("word-adamw", WORD, ADAMW, (variant("fine-purifying", 0.98),)),
    ]
    if profile == "quick":
        return cases
    tuned = (variant("delta-only", *FINE), variant("hessian-only", *FINE))
    biased = AttackConfig(attack="biassent", trigger=(sentence,), rate=0.7)
    more = (
        *PAIR, *tuned, *DAMPINGS,
        variant("reset", 0.0), variant("random", *MIXING), variant("fine-mixing-sel", *MIXING),
        variant("e-pur", 0.998, 0.995, 0.99, 0.98, 0.95), variant("fine-pruning", 0.9, 0.7, 0.5, 0.3),
        variant("wag"), variant("ties", 0.9, 0.5, 0.2, 0.1), variant("dare", 0.9, 0.5, 0.3),
        Variant("posterior", GRID, PurifyConfig(mode="posterior")),
        Variant("exact Fisher", GRID, fisher=FisherConfig(fisher="exact")),
        Variant("exponent 0.5", FINE, indicator=IndicatorConfig(exponent=0.5)),
    )  # fmt: skip
    cases[1] = replace(cases[1], variants=more)
    cases[2] = replace(cases[2], variants=(*PAIR, *tuned, *DAMPINGS), scanned=True)
    few = (variant("fine-purifying", *GRID), variant("fine-mixing", *MIXING))
    return [
        Case("other-sgd", replace(WORD, trigger=("mn",), target=0), SGD),
        *cases,
        Case("sentence-sgd", long, SGD, both, scanned=True),
        Case("clean-adamw", None, ADAMW, (), scanned=True, pattern=biased),
        Case("bias-adamw", biased, ADAMW, (*BIAS_PAIR, *BIAS_DAMPED), scanned=True),
        Case("multi", replace(WORD, attack="multi", trigger=("cf", "mn", "bb")), ADAMW, few, True),
        Case("clean-label", replace(WORD, attack="clean-label", rate=1.0), ADAMW, few, True),
        Case("embedding", replace(WORD, attack="embedding"), ADAMW, few, True),
        Case("layerwise", replace(WORD, attack="layerwise"), ADAMW, few, True),
        Case("adaptive", replace(WORD, attack="adaptive"), ADAMW, few, True),
    ]


LOWER = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
BIAS_PAIR = (variant("fine-purifying", *LOWER), variant("fine-mixing", *LOWER))
BIAS_DAMPED = (Variant("damped 0.1", LOWER, indicator=DAMPED),)
REAL_TRAIN = AttackTrainConfig(optimizer="adamw", learning_rate=5e-4, epochs=4.0)
SIZES = {
    "topics": Sizes(),
    "real": Sizes(pretrain=20_000, epochs=10.0, train=4_000, shots=64, held=600, test=1_200),
}


def run_demo(
    profile: Profile,
    seeds: Sequence[int],
    out: Path,
    overwrite: bool = False,
    runtime: Runtime = Runtime(),
    data: Path | None = None,
) -> Outcome:
    """Everything, once a seed; the claims are judged on the means.

    A demo that was killed goes on with the model it was at.

    Args:
        profile: what is tried.
        seeds: of texts, weights and attacks.
        out: folder of the runs and the report.
        overwrite: start anew where a demo already lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.
        data: folder of real texts; the generated language by default.

    Raises:
        DataError: the folder has no such texts.
    """
    begin = time.perf_counter()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    where = {
        "device": runtime.device,
        "dtype": runtime.dtype,
        "deterministic": runtime.deterministic,
    }
    options = options_of({"profile": profile, "seeds": list(seeds), "data": str(data or "")}, where)
    many = f"mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    with RunDir.open(out, options, overwrite) as run:
        found = [_of_seed(run, profile, data, replace(runtime, seed=seed)) for seed in seeds]
        claims = judge([numbers(one) for one in found], REAL if data else Margins())
        seconds = time.perf_counter() - begin
        tables = {name: mean_rows([table(one[name]) for one in found]) for name in found[0]}
        tables = {name: rows for name, rows in tables.items() if rows}
        report = Report("Fine-purifying: the demo")
        report.text(
            f"Profile {profile}, seeds {', '.join(map(str, seeds))}, Python "
            f"{platform.python_version()}, PyTorch {version('torch')}. "
            f"{ABOUT['real' if data else 'topics']} {HOW}"
        )
        report.claims(claims)
        report.text(NOT_HERE)
        for name, rows in tables.items():
            report.table(f"{name}, {many}", rows)
        for seed, one in zip(seeds, found, strict=True):
            report.heading(f"Seed {seed}")
            _figures(report, one)
        page = report.save(out)
        save_claims(claims, seconds, out)
        run.write_json("tables.json", tables)
    failed = [claim.claim for claim in claims if claim.passed is False]
    return Outcome(
        {f"{name}, {many}": rows for name, rows in tables.items()}
        | {f"Claims, {many}": [claim.row() for claim in claims]},
        note=f"Report: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


#: For real texts with a model this small; set on seed 10 of AG News.
REAL = Margins(clean=70.0, costs=4.0, drop=2.0)


def _of_seed(
    run: RunDir, profile: Profile, data: Path | None, runtime: Runtime
) -> dict[str, Found]:
    """What every case gave, kept in a file once all have."""
    file = run.path / f"seed-{runtime.seed}.json"
    if not file.is_file():
        kind = "real" if data else "topics"
        sizes = SIZES[kind]
        world = (
            real(data, sizes, runtime.seed, runtime)
            if data
            else topics(sizes, runtime.seed, runtime)
        )
        found = {}
        others: list[Path] = []
        for case in cases_of(profile, sentence_of(world, data is not None), data is not None):
            found[case.name] = run_case(world, case, TUNE, run, runtime, others)
            if case.name == "other-sgd":
                others.append(run.path / f"seed-{runtime.seed}" / case.name / "suspect")
        run.write_json(file.name, {name: asdict(one) for name, one in found.items()})
    stored = json.loads(file.read_text(encoding="utf-8"))
    return {name: Found(**one) for name, one in stored.items()}


def numbers(found: dict[str, Found]) -> dict[str, float]:
    """What the claims are judged by, of one seed."""
    main = "word-sgd" if "word-sgd" in found else "word-adamw"
    clean, word = found["clean-sgd" if main == "word-sgd" else "clean-adamw"], found[main]
    rows = word.rows
    alone, best = at(rows, "none", 1.0), at(rows, "fine-purifying", 0.98)
    picked = {name: choose(rows, name, DROP) or alone for name in ("fine-purifying", "fine-mixing")}
    values = {
        "clean ACC": clean.before["test ACC"],
        "before ACC": word.before["test ACC"],
        "before ASR": word.before["ASR"],
        "none ACC": alone["test ACC"],
        "none ASR": alone["ASR"],
        "purify ACC": best["test ACC"],
        "purify ASR": best["ASR"],
        "purify chosen ASR": picked["fine-purifying"]["ASR"],
        "purify chosen rho": picked["fine-purifying"]["rho"],
        "mixing chosen ASR": picked["fine-mixing"]["ASR"],
        "mixing chosen rho": picked["fine-mixing"]["rho"],
        "purify .9 ACC": at(rows, "fine-purifying", 0.9)["test ACC"],
        "delta-only .9 ACC": at(rows, "delta-only", 0.9)["test ACC"],
        "area purify": area(rows, "fine-purifying"),
        "area mixing": area(rows, "fine-mixing"),
        "rank": float(word.rank),
        "judged": float(word.judged),
        "fires": float(word.fires),
        "false alarm": float(clean.fires),
        "spearman adamw": found["word-adamw"].laws["spearman"],
    }
    if main == "word-sgd":
        values |= {
            "hessian-only ASR": at(rows, "hessian-only", 0.98)["ASR"],
            "spearman sgd": word.laws["spearman"],
            "log sd": word.laws["log_sd"],
            "median over mean": word.laws["median_over_mean"],
        }
    for name in ("sentence-sgd", "sentence-adamw"):
        if name in found:
            values |= _sentence(found[name].rows)
    if "bias-adamw" in found:
        bias = found["bias-adamw"]
        alone = at(bias.rows, "none", 1.0)
        values |= {
            "bias clean BACC": found["clean-adamw"].before["BACC"],
            "bias before BACC": bias.before["BACC"],
            "bias none BACC": alone["BACC"],
            "bias chosen BACC": (choose(bias.rows, "fine-purifying", DROP) or alone)["BACC"],
            "bias mixing BACC": (choose(bias.rows, "fine-mixing", DROP) or alone)["BACC"],
        }
    return values


def _sentence(rows: Sequence[Row]) -> dict[str, float]:
    alone = at(rows, "none", 1.0)
    return {
        "sentence none": alone["ASR"],
        "sentence chosen": (choose(rows, "fine-purifying", DROP) or alone)["ASR"],
        "sentence damped": (choose(rows, "damped 1", DROP) or alone)["ASR"],
        "sentence mixing": (choose(rows, "fine-mixing", DROP) or alone)["ASR"],
    }


def table(found: Found) -> list[Row]:
    """A case's defences: at the rho that the held rows choose, and the frontier's area."""
    if not found.rows:
        return []
    metric = "BACC" if "BACC" in found.rows[0] else "ASR"
    rows: list[Row] = [{"defence": "before", "rho": None} | _tested(found.before, metric)]
    for name in dict.fromkeys(row["strategy"] for row in found.rows):
        chosen = choose(found.rows, name, DROP)
        row: Row = {"defence": "fine-tuning" if name == "none" else name}
        row["kept the floor"] = float(chosen is not None)
        if chosen:
            row |= {"rho": chosen["rho"]} | _tested(chosen, metric)
            if "seconds" in chosen:
                row["seconds"] = chosen["seconds"] + found.seconds.get(name, 0.0)
        else:  # a mean over the seeds on which it kept the floor
            row |= {"rho": None, "ACC": None, metric: None}
        row[f"mean {metric} over floors"] = area(found.rows, name, metric)
        rows.append(row)
    return rows


def _tested(row: Row, metric: str) -> Row:
    """The test numbers of a row, each with its interval where that was noted."""
    found: Row = {}
    for name, source in (("ACC", "test ACC"), (metric, metric)):
        found[name] = row[source]
        if f"{source} 95 %" in row:
            found[f"{name} 95 %"] = row[f"{source} 95 %"]
    return found


def mean_rows(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Tables of the same rows, each number the mean over them.

    Of several the spread over seeds is told instead of each one's intervals, which do not know of it.
    """
    mean = []
    for rows in zip(*tables, strict=True):
        row: Row = {}
        columns = list(dict.fromkeys(name for one in rows for name in one))
        for column in columns:
            if column.endswith(" 95 %") and len(tables) > 1:
                continue
            values = [one.get(column) for one in rows]
            numeric = [value for value in values if isinstance(value, int | float)]
            row[column] = float(np.mean(numeric)) if numeric else values[0]
            if column in ("ACC", "ASR", "BACC") and len(tables) > 1:
                spread = float(np.std(numeric, ddof=1)) if len(numeric) > 1 else None
                row[f"{column} sd"] = spread
        mean.append(row)
    return mean


def _figures(report: Report, found: dict[str, Found]) -> None:
    for name, one in found.items():
        if len(one.rows) > 2:  # more than fine-tuning alone and one other
            metric = "BACC" if "BACC" in one.rows[0] else "ASR"
            report.figure(f"{name}: accuracy against {metric}", frontier_figure(one.rows, metric))
        if one.laws:
            report.table(f"{name}: the theory's premises", laws_rows(one.laws))
            report.figure(f"{name}: the indicator", histogram_figure(one.laws, 0.98))
        if one.calibration:
            report.figure(f"{name}: the posterior", calibration_figure(one.calibration))
            report.table(f"{name}: is p(clean | r) what it says?", one.calibration)
            report.text(calibration_words(one.calibration))


def calibration_words(bins: Sequence[Row]) -> str:
    """What the reliability of the posterior comes to, in plain words."""
    doubted = [row for row in bins if row["p"] < 0.1]
    count = sum(row["dimensions"] for row in doubted)
    clean = sum(row["clean"] * row["dimensions"] for row in doubted) / max(1, count)
    return (
        "What is known to be poisonous here is the trigger's row of the word embedding; all else counts "
        f"as clean. The posterior gives {count:,} dimensions a p(clean) below 0.1, and "
        f"{100 * clean:.1f} % of these are not in that row: it ranks dimensions, and is no probability "
        "to be taken at its word."
    )
