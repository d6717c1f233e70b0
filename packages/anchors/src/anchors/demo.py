"""The embedded default: a small model that learns in context, and the paper's claims on it."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from octavo.console import Outcome
from octavo.models import load_model, save_model
from octavo.report import Claim, Report, save_claims
from octavo.rundir import RunDir, options_of
from octavo.runtime import Runtime

from anchors.analyses import block_rows, flow_rows, isolate, read_tables
from anchors.blocking import What
from anchors.config import Task
from anchors.evaluate import label_loyalty, predict
from anchors.prompts import Prompt
from anchors.report import block_figure, compress_figure, flow_figure, read_figure
from anchors.saliency import PARTS
from anchors.trials import compression, confusion, prompt_of, reweighting
from anchors.view import view_prompt
from anchors.world import TASKS as TEMPLATES
from anchors.world import WORLDS, World, episodes, make_tokenizer, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Prompts that everything is measured on.
PROMPTS = {"quick": 200, "full": 400}

#: Sets of demonstrations of the applications' trials.
SETS = {"quick": 12, "full": 40}

#: What the second model is called among the numbers.
ALONE = "accuracy 3 without the topic loss"

#: Whether a second model is trained without the topic loss, to be shown beside.
WITHOUT = {"quick": False, "full": True}


@dataclass(frozen=True)
class Margins:
    """What a claim must reach; given with the method, before anything was run.

    Attributes:
        gate: accuracy at two and at three classes.
        isolation: how many times the label loyalty that random isolation costs.
        last: label loyalty that isolation must leave more in the last layer than in the first ones.
        auc: of the best layer.
        loyalty: label loyalty that hidden anchors must have above text anchors and random ones.
        recovered: share of what an imposed label bias cost that re-weighting must give back.
        bias: accuracy that the bias must cost, or there is nothing to give back.
        spearman: rank correlation of predicted and real confusion.
    """

    gate: float = 0.8
    isolation: float = 3.0
    last: float = 0.1
    auc: float = 0.75
    loyalty: float = 0.1
    recovered: float = 0.5
    bias: float = 0.05
    spearman: float = 0.5


def run_demo(
    profile: Literal["quick", "full"],
    seeds: Sequence[int],
    out: Path,
    overwrite: bool = False,
    runtime: Runtime = Runtime(),
) -> Outcome:
    """Train, analyse and judge, once a seed; the claims are judged on the means.

    Args:
        profile: sizes.
        seeds: of weights, training episodes and prompts.
        out: folder of the runs and the report.
        overwrite: start anew where a demo already lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.
    """
    begin = time.perf_counter()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    world = WORLDS[profile]
    with RunDir.open(out, options_of({"profile": profile, "seeds": list(seeds)}), overwrite) as run:
        found = []
        for seed in seeds:
            here = replace(runtime, seed=seed)
            one = run_seed(world, PROMPTS[profile], SETS[profile], seed, run, here)
            if WITHOUT[profile]:
                bare = _model(replace(world, topic_loss=0.0), run, "model-without", here)
                one.numbers[ALONE] = _accuracy(bare, world, PROMPTS[profile], 3, seed)
            run.write_json(f"seed-{seed}.json", {"numbers": one.numbers, "tables": one.tables})
            found.append(one)
        claims = judge([one.numbers for one in found])
        seconds = time.perf_counter() - begin
        report = Report("Label words are anchors: the demo")
        report.text(
            f"Profile {profile}, seeds {', '.join(map(str, seeds))}, Python "
            f"{platform.python_version()}, PyTorch {version('torch')}. {ABOUT}"
        )
        report.claims(claims)
        report.text(NOT_HERE)
        if ALONE in found[0].numbers:
            alone = np.mean([one.numbers[ALONE] for one in found])
            report.text(
                f"Accuracy at three classes of a model without the topic loss: {alone:.3f}."
            )
        for seed, one in zip(seeds, found, strict=True):
            report.heading(f"Seed {seed}, three classes")
            report.text(f"view-{seed}.html beside this page shows one prompt token by token.")
            for caption, rows in one.tables.items():
                report.table(caption, rows)
            for draw, table in FIGURES:
                report.figure(f"{table}, seed {seed}", draw(one.tables[table]))
        page = report.save(out)
        save_claims(claims, seconds, out)
    failed = [claim.claim for claim in claims if claim.passed is False]
    many = f"mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return Outcome(
        {f"Claims, {many}": [claim.row() for claim in claims]},
        note=f"Report: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


@dataclass(frozen=True)
class Found:
    """What one seed gave: the numbers that claims are about, and the tables."""

    numbers: dict[str, float]
    tables: dict[str, list[dict[str, Any]]]


def run_seed(
    world: World, count: int, sets: int, seed: int, run: RunDir, runtime: Runtime
) -> Found:
    """Train a model, or take the one a stopped run has saved, analyse and apply it."""
    model, tokenizer = _model(world, run, "model", runtime), make_tokenizer(world)
    numbers = {f"accuracy {n}": _accuracy(model, world, count, n, seed) for n in (2, 3)}
    prompts, labels = world_prompts(world, tokenizer, count, 3, seed)
    tables = analyse(model, prompts, labels, seed, numbers)
    for name, trial, many in (
        ("Compression", compression, sets), ("Re-weighting", reweighting, count),
        ("Confusion", confusion, sets),
    ):  # fmt: skip
        more, tables[name] = trial(world, model, tokenizer, many, seed)
        numbers |= more
    one = episodes(world, count, 3, 1, seed)[0]
    task = Task(TEMPLATES[one.task][0], one.words)
    about = f"The demo's model of seed {seed}."
    _, page = view_prompt(model, tokenizer, task, prompts[0], labels[0], about)
    run.write_text(f"view-{seed}.html", page)
    return Found(numbers, tables)


def _model(world: World, run: RunDir, name: str, runtime: Runtime) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    folder = run.path / f"seed-{runtime.seed}" / name
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        tokenizer = make_tokenizer(world)
        save_model(folder, train(world, tokenizer, runtime, RunDir(folder.parent)), tokenizer)
    return load_model(AutoModelForCausalLM, folder).to(runtime.torch_device())  # pyright: ignore


def _accuracy(model: "PreTrainedModel", world: World, count: int, classes: int, seed: int) -> float:
    prompts, labels = world_prompts(world, make_tokenizer(world), count, classes, seed)
    return predict(model, prompts, 50).accuracy(labels)


def world_prompts(
    world: World, tokenizer: Any, count: int, classes: int, seed: int
) -> tuple[list[Prompt], list[int]]:
    """Prompts with one demonstration a class whose mapping no training episode had."""
    drawn = episodes(world, count, classes, 1, seed)
    return [prompt_of(tokenizer, one) for one in drawn], [one.label for one in drawn]


def analyse(
    model: "PreTrainedModel", prompts: list[Prompt], labels: list[int], seed: int,
    numbers: dict[str, float], batch_size: int = 50,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The tables of the three analyses; what the claims need of them is added to `numbers`."""
    half = model.config.num_hidden_layers // 2
    last = model.config.num_hidden_layers - 1
    flow = flow_rows(model, prompts, labels, batch_size)
    block = block_rows(model, prompts, labels, half, seed, batch_size)
    (reading, *_) = read_tables(model, prompts, labels, batch_size).values()
    before = predict(model, prompts, batch_size)
    cuts: tuple[tuple[str, What, Sequence[int]], ...] = (
        ("labels first", "labels", range(half)),
        ("random first", "random", range(half)),
        ("labels last", "labels", range(half, last + 1)),
    )
    for name, what, layers in cuts:
        after = isolate(model, prompts, what, layers, seed, batch_size)
        numbers[f"loyalty {name}"] = float(label_loyalty(before, after).mean())
    # in the last layer S_wp is zero in every model: only the target's row reaches the loss
    for place, name in ((0, "first"), (last - 1, "deep")):
        numbers |= {f"{part} {name}": flow[place][part] for part in PARTS}
    numbers["R steps"] = _steps([row["R"] for row in reading])
    aucs = [np.nan if row["AUC"] is None else row["AUC"] for row in reading]
    numbers["AUC"], numbers["AUC layer"] = max(aucs), float(np.argmax(aucs))
    numbers["AUC deep"] = max(aucs[half:])
    share = reading[half - 1]["R"]
    numbers["R half"] = np.nan if share is None else share
    return {"Saliency": flow, "Isolation": block, "Reading": reading}


def judge(found: Sequence[Mapping[str, float]], margins: Margins = Margins()) -> list[Claim]:
    """The claims, on the means over seeds.

    Args:
        found: the numbers of each seed.
        margins: what each claim must reach.
    """
    mean = means(found)
    gate = Claim(
        "The model learns in context",
        f"accuracy {mean['accuracy 2']:.3f} at two classes, {mean['accuracy 3']:.3f} at three",
        f"{margins.gate:g} or more at both, on mappings no training episode had",
        min(mean["accuracy 2"], mean["accuracy 3"]) >= margins.gate,
    )
    claims = [*flow_claims(mean, margins), compression_claim(mean, margins)]
    return behind(gate, claims + application_claims(mean, margins))


def means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each number's mean."""
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def behind(gate: Claim, claims: Sequence[Claim]) -> list[Claim]:
    """A gate and the claims behind it, which mean nothing where it is closed."""
    if gate.passed:
        return [gate, *claims]
    why = "the model does not learn in context, so that its flows mean nothing"
    return [gate, *(replace(one, criterion=why, passed=None) for one in claims)]


def flow_claims(mean: Mapping[str, float], margins: Margins) -> list[Claim]:
    """The claims about where information flows."""
    cost = 1 - mean["loyalty labels first"]
    control = 1 - mean["loyalty random first"]
    return [
        Claim(
            "Information gathers in label words in shallow layers",
            f"layer 0: S_wp {mean['S_wp first']:.3g}, S_pq {mean['S_pq first']:.3g}, "
            f"S_ww {mean['S_ww first']:.3g}",
            "S_wp above S_pq and S_ww in the first layer",
            mean["S_wp first"] > max(mean["S_pq first"], mean["S_ww first"]),
        ),
        Claim(
            "In deep layers the prediction is read from label words",
            f"last layer but one: S_pq {mean['S_pq deep']:.3g}, S_wp {mean['S_wp deep']:.3g}, "
            f"S_ww {mean['S_ww deep']:.3g}",
            "S_pq above S_wp and S_ww there; in the last layer S_wp is zero by construction",
            mean["S_pq deep"] > max(mean["S_wp deep"], mean["S_ww deep"]),
        ),
        Claim(
            "Isolating label words in the first half of the layers hurts most",
            f"label loyalty {1 - cost:.3f} against {1 - control:.3f} with random tokens isolated",
            f"costs {margins.isolation:g} times as much as random tokens, or more",
            cost > 0 and cost >= margins.isolation * control,
        ),
        Claim(
            "Isolating them in the deeper half hurts less",
            f"label loyalty {mean['loyalty labels last']:.3f} against {1 - cost:.3f}",
            f"by {margins.last:g} or more; in the last layer alone it does nothing by construction",
            mean["loyalty labels last"] >= 1 - cost + margins.last,
        ),
        Claim(
            "The target's attention on label words tells the prediction",
            f"AUC {mean['AUC deep']:.3f} in the best layer of the deeper half "
            f"({mean['AUC']:.3f} in the best of all, layer {mean['AUC layer']:.1f} on average)",
            f"{margins.auc:g} or more in the deeper half",
            mean["AUC deep"] >= margins.auc,
        ),
        Claim(
            "Reading happens late: R rises in the deeper half",
            f"{mean['R half']:.3f} of R is reached in the first half of the layers",
            "less than half of it (equal reading in all layers but the first would give 0.333)",
            mean["R half"] < 0.5,
        ),
        Claim(
            "R is convex: each layer reads more than the one before",
            f"the smallest gain of R over the gain before is {mean['R steps']:.3f}",
            "no gain smaller than the one before"
            if mean["R steps"] >= 0
            else "of four layers the second begins to read and the last has nothing left to do",
            True if mean["R steps"] >= 0 else None,
        ),
    ]


def _steps(shares: Sequence[float | None]) -> float:
    """The smallest difference of R's gain in a layer and in the one before; convex if not negative."""
    values = [np.nan if share is None else share for share in shares]
    return float(np.min(np.diff(np.diff([0.0, *values]))))


def compression_claim(mean: Mapping[str, float], margins: Margins) -> Claim:
    """The claim about hidden anchors."""
    hidden = mean["loyalty hidden anchors"]
    rivals = {
        name.removeprefix("loyalty "): value for name, value in mean.items()
        if name.startswith(("loyalty text", "loyalty hidden random"))
    }  # fmt: skip
    return Claim(
        "Label words and format stand for the demonstrations",
        f"label loyalty {hidden:.3f} of hidden anchors; "
        + ", ".join(f"{name} {value:.3f}" for name, value in rivals.items()),
        f"{margins.loyalty:g} or more above each of the others",
        hidden >= max(rivals.values()) + margins.loyalty,
    )


def application_claims(mean: Mapping[str, float], margins: Margins) -> list[Claim]:
    """The claims about re-weighting and confusion."""
    lost = mean["accuracy unbiased"] - mean["accuracy biased"]
    won = mean["accuracy re-weighted"] - mean["accuracy biased"]
    bias = "an imposed label bias"
    return [
        Claim(
            f"Re-weighting gives back what {bias} cost",
            f"accuracy {mean['accuracy unbiased']:.3f} without, {mean['accuracy biased']:.3f} with "
            f"the bias, {mean['accuracy re-weighted']:.3f} re-weighted",
            f"{margins.recovered:g} of the loss or more"
            if lost >= margins.bias
            else f"the bias cost less than {margins.bias:g}: there is nothing to give back",
            won >= margins.recovered * lost if lost >= margins.bias else None,
        ),
        Claim(
            "Distances of anchors tell which classes are confused",
            f"Spearman {mean['spearman']:.3f}; siblings at {mean['siblings']:.3f} of the greatest "
            f"distance, others at {mean['no siblings']:.3f}",
            f"above {margins.spearman:g}, and sibling topics nearest",
            mean["spearman"] > margins.spearman and mean["siblings"] < mean["no siblings"],
        ),
    ]


#: What is drawn of each seed.
FIGURES = (
    (flow_figure, "Saliency"), (block_figure, "Isolation"), (read_figure, "Reading"),
    (compress_figure, "Compression"),
)  # fmt: skip

#: How the model came to be, which the claims must be read with.
ABOUT = (
    "A decoder of four layers is trained on generated episodes in which only the demonstrations tell "
    "which label word belongs to which topic. Two things help it to learn in seconds, and the first of "
    "them also favours what the claims are about: while training, the state after the first layer must "
    "tell words of the topic at every position of a demonstration, label word or not; and attention "
    "begins with equal query and key matrices, and with value and output matrices that are each other's "
    "transposes. No attention mask is used."
)

#: What is not judged here.
NOT_HERE = (
    "A model of four layers and generated words shows directions, not sizes: the paper's models have 28 "
    "to 48 layers and natural text. Where in depth the reading happens is a property of this model."
)
