"""The embedded default: small models taught the bundled lexicon, with and without formations."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from octavo.console import Outcome
from octavo.report import Report, save_claims
from octavo.rundir import RunDir, options_of
from octavo.runtime import Runtime
from octavo.stats import bootstrap_interval
from octavo.tiny import Shape

from formbert.baselines import BASELINES, ORACLES
from formbert.claims import judge
from formbert.config import FitOptions
from formbert.disambiguator import Disambiguator
from formbert.experiment import (
    ADDED,
    BI_ENCODER,
    BI_PLAIN,
    GLOSS_ONLY,
    INTERACTING,
    PARTS_OF_SPEECH,
    TAUGHT_ALONG,
    World,
    choices_changed,
    folder_of,
    predictor_of,
    run_system,
)
from formbert.figures import accuracy_figure, confusion_figure, reliability_figure
from formbert.inventory import Inventory
from formbert.lexicon import HELD_OUT, group_of, mini_instances, mini_inventory
from formbert.metrics import outcomes
from formbert.predictions import Prediction
from formbert.tagger import Tagger

Profile = Literal["quick", "full"]
Row = dict[str, Any]
Answers = Mapping[str, Sequence[Prediction]]

KNOWN = "dev"
PARTS = {"test_frames": "new frames", "test_words": "new words"}
ABOUT = (
    "65 words of two senses, taught by sentences made from frames. Contrast words' senses differ in how "
    "the word is formed, control words' do not. New frames: known words in sentences of a kind never "
    "seen; new words: words of which nothing was seen but their glosses. All systems have the same "
    "small encoder from scratch, the same data, epochs and rates."
)
NOT_HERE = (
    "Not shown here: the paper's tables, whose data set was never released. The lexicon teaches, it is "
    "no gold standard, and its senses are balanced; nearly every contrast in formation is one in part "
    "of speech too, so that the two cannot be told apart on it: on real data they can "
    "(`formbert demo --data`)."
)
TEXTS = (
    "他去银行存款，这笔存款是他的。",
    "妈妈正在厨房炒饭，桌上放着一盘炒饭。",
    "读者来信说，这封来信写了很久。",
    "编辑正在编辑一本新书。",
    "这件事还没有眉目。",
)
RULES = {
    "first sense": BASELINES["first-sense"], "Lesk, TF-IDF": BASELINES["lesk-tfidf"],
    "formation oracle": ORACLES["formation-oracle"], "part-of-speech oracle": ORACLES["pos-oracle"],
}  # fmt: skip
SYSTEMS = {
    "quick": (GLOSS_ONLY, ADDED, INTERACTING),
    "full": (
        GLOSS_ONLY, TAUGHT_ALONG, ADDED, INTERACTING, PARTS_OF_SPEECH, BI_PLAIN, BI_ENCODER,
    ),
}  # fmt: skip
#: Chosen for the plain cross-encoder, on frames and words held out of the training data for that.
FITS = {
    "quick": FitOptions(
        learning_rate=1e-3, formation_learning_rate=4e-3, batch_size=24, epochs=16, warmup=0.1
    ),
    "full": FitOptions(
        learning_rate=5e-4, formation_learning_rate=2e-3, batch_size=24, epochs=20, warmup=0.1
    ),
}
SHAPES = {
    "quick": Shape(kind="bert", layers=2, width=64, alphabet="char", max_length=64),
    "full": Shape(kind="bert", layers=2, width=128, alphabet="char", max_length=64),
}


def world_of(profile: Profile) -> World:
    """The bundled lexicon, and an encoder's size."""
    parts = mini_instances()
    tests = {name: parts[name] for name in (KNOWN, *PARTS)}
    inventory = mini_inventory()
    return World(inventory, parts["train"], parts["dev"], tests, SHAPES[profile], FITS[profile])


def run_demo(
    profile: Profile,
    seeds: Sequence[int],
    out: Path,
    overwrite: bool = False,
    runtime: Runtime = Runtime(),
) -> Outcome:
    """Teach, answer and judge, once a seed; the claims are judged on the means.

    A demo that was killed goes on with the system it was at.

    Args:
        profile: which systems, and how large.
        seeds: of weights and batches.
        out: folder of the runs and the report.
        overwrite: start anew where a demo already lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.
    """
    begin = time.perf_counter()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    world = world_of(profile)
    many = f"mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    with RunDir.open(out, options_of({"profile": profile, "seeds": list(seeds)}), overwrite) as run:
        found = [of_seed(profile, world, run, replace(runtime, seed=seed)) for seed in seeds]
        claims = judge([one["numbers"] | of_table(one["table"]) for one in found])
        table = mean_table([one["table"] for one in found])
        seconds = time.perf_counter() - begin
        report = Report("FormBERT: the demo")
        report.text(
            f"Profile {profile}, seeds {', '.join(map(str, seeds))}, Python "
            f"{platform.python_version()}, PyTorch {version('torch')}. {ABOUT}"
        )
        report.claims(claims)
        report.text(NOT_HERE)
        report.table(f"Accuracy, %, {many}", table)
        report.figure("Accuracy on contrast words", accuracy_figure(table, "contrast"))
        for seed, one in zip(seeds, found, strict=True):
            report.heading(f"Seed {seed}")
            report.table(
                "Against gloss only: points, 95 % interval and p by word", one["differences"]
            )
            report.table("Sentences tagged", one["tagged"])
            report.table("Formations of new words, from the gloss", one["formations"])
            report.figure(
                "Formations from the context, new words", confusion_figure(one["confusion"])
            )
            report.figure(
                "Reliability of token + agreement", reliability_figure(one["reliability"])
            )
        page = report.save(out)
        save_claims(claims, seconds, out)
    failed = [claim for claim in claims if claim.passed is False]
    return Outcome(
        {f"Accuracy, %, {many}": table, f"Claims, {many}": [claim.row() for claim in claims]},
        note=f"Report: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


def of_seed(profile: Profile, world: World, run: RunDir, runtime: Runtime) -> dict[str, Any]:
    """All that one seed gave, kept in a file."""
    file = run.path / f"seed-{runtime.seed}.json"
    if not file.is_file():
        answers: dict[str, Answers] = {name: _rule(rule, world) for name, rule in RULES.items()}
        for system in SYSTEMS[profile]:
            answers |= run_system(system, world, run, runtime)
        right = {
            name: np.concatenate([outcomes(parts[part], world.tests[part]) for part in PARTS])
            for name, parts in answers.items()
        }
        table = [{"system": name} | accuracies(one, world) for name, one in right.items()]
        run.write_json(file.name, {
            "table": table, "differences": differences(right, world),
            **shown(world, run, runtime, answers[INTERACTING.name]),
            "numbers": numbers(world, run, runtime)
            | {"gloss only, known": known(answers[GLOSS_ONLY.name], world)},
        })  # fmt: skip
    return json.loads(file.read_text(encoding="utf-8"))


def _rule(rule: Any, world: World) -> Answers:
    return {part: rule(rows, world.inventory, world.train) for part, rows in world.tests.items()}


def groups(world: World) -> dict[str, np.ndarray]:
    """Which instances of both parts, one after the other, are in each column of the table."""
    rows = [(part, group_of(one.word)) for part in PARTS for one in world.tests[part]]
    kinds = {
        "all": ("contrast", "control-pos", "control-same"), "contrast": ("contrast",),
        "control": ("control-pos", "control-same"),
    }  # fmt: skip
    columns = {
        f"{words} ({kind})": np.array([one == part and group in chosen for one, group in rows])
        for part, words in PARTS.items() for kind, chosen in kinds.items()
    }  # fmt: skip
    return columns | {
        kind: np.array([group in kinds[kind] for _, group in rows])
        for kind in ("contrast", "control")
    }


def accuracies(right: np.ndarray, world: World) -> dict[str, float]:
    """Percent right, by column."""
    return {name: 100 * float(right[members].mean()) for name, members in groups(world).items()}


def differences(right: Mapping[str, np.ndarray], world: World) -> list[Row]:
    """Every system against the plain one, paired by word: points, interval, p of a permutation.

    A frame's sentences differ in their fillers alone, so that words, not sentences, are drawn.
    """
    plain, rows = right[GLOSS_ONLY.name], []
    words = np.array([one.word for part in PARTS for one in world.tests[part]])
    for name, one in right.items():
        if name == GLOSS_ONLY.name or name in RULES:
            continue
        for kind in ("contrast", "control"):
            members = groups(world)[kind]
            gains = one[members].astype(float) - plain[members]
            each = [gains[words[members] == word] for word in np.unique(words[members])]
            total = np.array([gain.sum() for gain in each])
            count = np.array([len(gain) for gain in each])
            low, high = bootstrap_interval(total, count, statistic=_ratio)
            flips = np.random.default_rng(0).choice([-1, 1], (9999, len(total)))
            p = (1 + (np.abs(flips @ total) >= abs(total.sum()) - 1e-9).sum()) / 10_000
            rows.append({
                "system": name, "words": kind, "n": len(total), "sentences": int(members.sum()),
                "difference": 100 * float(gains.mean()), "low": 100 * low, "high": 100 * high,
                "p": float(p),
            })  # fmt: skip
    return rows


def _ratio(total: np.ndarray, count: np.ndarray, axis: int = -1) -> Any:
    return total.sum(axis=axis) / count.sum(axis=axis)


def shown(world: World, run: RunDir, runtime: Runtime, answers: Answers) -> dict[str, Any]:
    """Sentences tagged, formations told, and what the figures are drawn from."""
    folder = folder_of(INTERACTING, run, runtime)
    wsd = Disambiguator.from_pretrained(folder, world.inventory, runtime=runtime)
    tagged = [
        {"text": text, "word": token.text, "start": token.start, "gloss": token.prediction.gloss,
         "formation": token.prediction.formation, "probability": token.prediction.probability}
        for text, tokens in zip(TEXTS, Tagger(wsd).tag_many(TEXTS), strict=True)
        for token in tokens if token.prediction
    ]  # fmt: skip
    senses = [one for word in HELD_OUT[:5] for one in world.inventory[word]]
    told = predictor_of(world, run, runtime).predict(
        [one.word for one in senses], glosses=[one.gloss for one in senses], top_k=1
    )
    formations = [
        {"word": sense.word, "gloss": sense.gloss, "formation": one.formation.zh,
         "probability": one.probability, "annotated": sense.formation.zh if sense.formation is not None
         else ""}
        for sense, one in zip(senses, told, strict=True)
    ]  # fmt: skip
    words = world.tests["test_words"]
    confidence = [one.probability for part in PARTS for one in answers[part]]
    right = np.concatenate([outcomes(answers[part], world.tests[part]) for part in PARTS])
    return {
        "tagged": tagged, "formations": formations,
        "confusion": [[_formation(world.inventory, one.gold[0]), guess]
                      for one, guess in zip(words, wsd.formations(words), strict=True)],
        "reliability": [[float(p), bool(r)] for p, r in zip(confidence, right, strict=True)],
    }  # fmt: skip


def _formation(inventory: Inventory, sense_id: str) -> str:
    formation = inventory.by_id[sense_id].formation
    return "" if formation is None else formation.zh


def known(answers: Answers, world: World) -> float:
    """Percent right on known words in known frames."""
    return 100 * float(outcomes(answers[KNOWN], world.tests[KNOWN]).mean())


def of_table(table: Sequence[Row]) -> dict[str, float]:
    """What the claims are judged by that a seed's table tells."""
    by = {row["system"]: row for row in table}
    short = {
        "gloss only": GLOSS_ONLY.name, "annotated": INTERACTING.name,
        "predicted": next(iter(INTERACTING.tested)), "added": ADDED.name,
        "parts of speech": PARTS_OF_SPEECH.name, "taught along": TAUGHT_ALONG.name,
    }  # fmt: skip
    found = {
        "first sense, new words": by["first sense"]["new words (all)"],
        "gloss only, new words": by[GLOSS_ONLY.name]["new words (all)"],
    }
    for name, system in short.items():
        if system in by:
            found |= {
                f"{name}, {kind}": by[system][kind]
                for kind in ("contrast", "control", "new words (contrast)")
            }
    return found


def numbers(world: World, run: RunDir, runtime: Runtime) -> dict[str, float]:
    """What the claims are judged by beside that, of one seed."""
    words = world.tests["test_words"]
    wsd = Disambiguator.from_pretrained(
        folder_of(INTERACTING, run, runtime), world.inventory, runtime=runtime
    )
    gold = [_formation(world.inventory, one.gold[0]) for one in words]
    told = wsd.formations(words)
    taught = [_formation(world.inventory, one.gold[0]) for one in world.train]
    commonest = max(sorted(set(taught)), key=taught.count)
    found = {
        "context predictor": 100
        * float(np.mean([a == b for a, b in zip(gold, told, strict=True)])),
        "commonest formation": 100 * gold.count(commonest) / len(gold),
    }
    for name, system in (("added", ADDED), ("annotated", INTERACTING)):
        differ, many = choices_changed(system, world, "test_words", run, runtime)
        found[f"{name}, changed"] = 100 * differ / many
    return found


def mean_table(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Tables of the same rows, each number the mean over them."""
    return [
        {column: float(np.mean([row[column] for row in rows])) if column != "system" else value
         for column, value in rows[0].items()}
        for rows in zip(*tables, strict=True)
    ]  # fmt: skip
