"""The embedded default: the paper's comparison in small, trained on the spot, offline.

A two-layer model of width 64 on five unlike domains; experts together are 16 feed-forward networks in
every model but the dense one, and the paper's claims are judged on held-out text.
"""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from octavo.console import Outcome
from octavo.report import Claim, save_claims
from octavo.rundir import RunDir, options_of, write_text
from octavo.runtime import Runtime

from deepseekmoe.ablate import SUITES, Cell, cell_folder, train_cells
from deepseekmoe.analyze import (
    disable_top,
    lifts,
    specialization,
    swap_shared,
    sweep_active,
    trace_routing,
)
from deepseekmoe.config import CorpusConfig, ModelConfig, PretrainConfig
from deepseekmoe.corpus import Tokens, documents, tokenize, train_tokenizer
from deepseekmoe.domains import domain_texts
from deepseekmoe.report import demo_report, models_table


@dataclass(frozen=True)
class Profile:
    """Size of a demo.

    Attributes:
        steps: updates of each model.
        rows: windows of 128 tokens a step.
        models: cells of the suite of baselines that are trained beside DeepSeekMoE.
        dev_tokens: held-out tokens that everything is measured on, at the most.
    """

    steps: int
    models: tuple[str, ...]
    dev_tokens: int
    rows: int = 15


PROFILES = {
    "quick": Profile(200, ("gshard",), 15_000),
    "full": Profile(600, ("dense", "hash", "switch", "gshard", "gshard-x1.5"), 40_000),
}


@dataclass(frozen=True)
class Margins:
    """What a claim must reach, in nats a token unless said otherwise; fixed before the reported run.

    None where a profile is too short to tell.
    """

    gshard: float | None = 0.010
    wider: float = 0.010
    hash: float = 0.010
    switch: float = 0.04
    dense: float = 0.04
    fewer: float | None = 0.005
    swap: float = 0.03
    specialization: float = 1.1
    divergence: float = 0.05
    disabled: float = 0.15
    violation: float = 2.0
    unbalanced: float = 1.2


TOO_SHORT = "so few steps cannot tell it from the spread of seeds; --profile full can"

#: As the method was specified, for folders of natural text.
GIVEN = Margins()

#: For the embedded domains; set on seeds 0 to 2, which are not reported.
EMBEDDED = {
    "quick": Margins(
        gshard=None, fewer=None, swap=0.02, disabled=0.08, violation=2.0, unbalanced=1.4
    ),
    "full": Margins(),
}


def run_demo(
    profile: Literal["quick", "full"],
    seeds: Sequence[int],
    out: Path,
    overwrite: bool = False,
    runtime: Runtime = Runtime(),
    data: Path | None = None,
) -> Outcome:
    """Train the models, analyse them and judge, once a seed; the claims are judged on the means.

    Args:
        profile: sizes.
        seeds: of weights and of the order of windows.
        out: folder of the runs and the report.
        overwrite: start anew where a demo already lies.
        runtime: device, precision, threads; its seed is replaced by each of `seeds`.
        data: folder of texts, one file a domain; the embedded domains by default.

    Raises:
        DataError: the folder holds no texts.
    """
    begin = time.perf_counter()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    sizes = PROFILES[profile]
    options = options_of({"profile": profile, "seeds": list(seeds), "data": str(data or "")})
    with RunDir.open(out, options, overwrite) as run:
        tokenizer, train, dev = _texts(run, sizes, data)
        found = [
            _run_seed(sizes, tokenizer, train, dev, seed, run, replace(runtime, seed=seed))
            for seed in seeds
        ]
        for seed, one in zip(seeds, found, strict=True):
            run.write_json(f"seed-{seed}.json", asdict(one))
        margins = EMBEDDED[profile] if data is None else GIVEN
        claims = judge([one.numbers for one in found], margins)
        seconds = time.perf_counter() - begin
        where = f"the texts of {data}" if data else "embedded domains"
        intro = (
            f"Profile {profile}, seeds {', '.join(map(str, seeds))}, {where}, Python "
            f"{platform.python_version()}, PyTorch {version('torch')} (embedded domains are of them). "
            f"{len(train)} training tokens, {len(dev)} held-out ones of {len(set(dev.domains))} "
            f"domains; every model sees the same {sizes.steps} batches of {sizes.rows} x 128 tokens."
        )
        page = demo_report(intro, found, claims, NOT_HERE).save(out)
        save_claims(claims, seconds, out)
    failed = [claim.claim for claim in claims if claim.passed is False]
    many = f"mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return Outcome(
        {
            f"Held-out loss, {many}": models_table(found),
            f"Claims, {many}": [claim.row() for claim in claims],
        },
        note=f"Report: {page} ({seconds:.0f} s)",
        no=f"{len(failed)} of {len(claims)} claims failed" if failed else "",
    )


@dataclass(frozen=True)
class Found:
    """What one seed gave.

    Attributes:
        numbers: what claims are about, by name.
        tables: rows by table name.
        curves: points and matrices for figures.
    """

    numbers: dict[str, float]
    tables: dict[str, list[dict[str, Any]]]
    curves: dict[str, Any]


def _texts(run: RunDir, sizes: Profile, data: Path | None) -> tuple[Any, Tokens, Tokens]:
    """A BPE of 1,024 tokens trained on the domains, and their tokens."""
    if data is None:
        data = run.path / "domains"
        for name, text in domain_texts().items():
            if text and not (data / f"{name}.txt").is_file():
                write_text(data / f"{name}.txt", text)
    corpus = CorpusConfig(data=str(data))
    tokenizer = train_tokenizer(documents(corpus, "train"), 1024)
    train = tokenize(documents(corpus, "train"), tokenizer, run.path / "tokens-train")
    dev = tokenize(documents(corpus, "dev"), tokenizer, run.path / "tokens-dev")
    return tokenizer, train, head(dev, sizes.dev_tokens)


def head(tokens: Tokens, most: int) -> Tokens:
    """The beginning of each document, all of them equally long and together no more than `most`."""
    each = most // max(1, len(tokens.starts))
    ends = np.append(tokens.starts[1:], len(tokens))
    parts = [
        tokens.values[start : min(end, start + each)]
        for start, end in zip(tokens.starts, ends, strict=True)
    ]
    sizes = np.array([len(part) for part in parts])
    shares = sizes / np.maximum(1, ends - tokens.starts)
    return Tokens(
        np.concatenate(parts), np.cumsum([0, *sizes[:-1]]), tokens.domains,
        np.round(tokens.text_bytes * shares).astype(np.int64),
    )  # fmt: skip


def _run_seed(
    sizes: Profile, tokenizer: Any, train: Tokens, dev: Tokens, seed: int, run: RunDir,
    runtime: Runtime,
) -> Found:  # fmt: skip
    folder = RunDir(run.path / f"seed-{seed}")
    config = PretrainConfig(out=folder.path, steps=sizes.steps, batch_size=sizes.rows, length=128)
    wanted = {name: SUITES["baselines"][name] for name in (*sizes.models, "deepseekmoe")}
    wanted["no balance loss"] = {"balance": "none"}
    cells = train_cells(wanted, ModelConfig(), tokenizer, train, dev, config, folder, runtime)
    by_name = {cell.name: cell for cell in cells}
    numbers = {f"loss {cell.name}": cell.row["loss"] for cell in cells}
    numbers["MaxVio"] = by_name["deepseekmoe"].row["MaxVio"]
    numbers["MaxVio none"] = by_name["no balance loss"].row["MaxVio"]
    tables = {"models": [cell.row for cell in cells]}
    curves: dict[str, Any] = {"loss": {}}
    for cell in cells:
        place = RunDir(cell_folder(folder, cell.name))
        curves["loss"][cell.name] = [(one["step"], one["lm_loss"]) for one in place.metrics()]
        curves[f"load {cell.name}"] = [
            {"step": one["step"], "load": one["load"]} for one in place.metrics() if "load" in one
        ]
    _analyse(by_name, dev, config.length, numbers, tables, curves)
    return Found(numbers, tables, curves)


def _analyse(
    cells: Mapping[str, Cell], dev: Tokens, length: int, numbers: dict[str, float],
    tables: dict[str, list[dict[str, Any]]], curves: dict[str, Any],
) -> None:  # fmt: skip
    ours = cells["deepseekmoe"].model
    rivals = [name for name in ("gshard-x1.5", "gshard") if name in cells]
    tables["disabled"] = []
    for name in ("deepseekmoe", rivals[0]):
        rows = disable_top(cells[name].model, dev, length)
        tables["disabled"] += [{"model": name} | row for row in rows]
        numbers[f"disabled {name}"] = rows[1]["rise"]
        numbers[f"disabled most {name}"] = rows[-1]["rise"]
    tables["swap"] = swap_shared(ours, dev, length)
    numbers["swap"] = tables["swap"][1]["rise"]
    tables["active"] = sweep_active(ours, dev, length)
    for row in tables["active"]:
        numbers[f"active {row['active']}"] = row["loss"]
    tables["domains"] = []
    for name in ("gshard", "deepseekmoe"):
        trace = trace_routing(cells[name].model, dev, length)
        rows = specialization(trace)
        values = [row["JS divergence (bits)"] for row in rows]
        numbers[f"JS {name}"] = float(np.mean(values))
        tables["domains"] += [{"model": name} | row for row in rows]
        shares = trace.counts / trace.counts.sum(axis=-1, keepdims=True)
        curves[f"domains {name}"] = {"names": trace.domains, "shares": shares.tolist()}
        curves[f"lifts {name}"] = lifts(trace).tolist()
        curves[f"sums {name}"] = [] if trace.sums is None else trace.sums.tolist()


def judge(found: Sequence[Mapping[str, float]], margins: Margins = GIVEN) -> list[Claim]:
    """The claims, on the means over seeds.

    Args:
        found: the numbers of each seed.
        margins: what each claim must reach.
    """
    mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    ours = mean["loss deepseekmoe"]
    wins = sum(one["loss deepseekmoe"] < one["loss gshard"] for one in found)
    needed = -(-2 * len(found) // 3)
    claims = [
        Claim(
            "DeepSeekMoE beats GShard at equal expert parameters",
            f"{ours:.4f} against {mean['loss gshard']:.4f}, better on {wins} of {len(found)} seeds",
            TOO_SHORT
            if margins.gshard is None
            else f"by {margins.gshard:g} or more, on two thirds of the seeds",
            None
            if margins.gshard is None
            else mean["loss gshard"] - ours >= margins.gshard and wins >= needed,
        )
    ]
    if "loss gshard-x1.5" in mean:
        claims.append(
            Claim(
                "It is level with GShard whose experts are 1.5 times as wide",
                f"{ours:.4f} against {mean['loss gshard-x1.5']:.4f}",
                f"at most {margins.wider:g} worse",
                ours <= mean["loss gshard-x1.5"] + margins.wider,
            )
        )
    for name, title in (
        ("hash", "a hash layer"), ("switch", "Switch"), ("dense", "a dense model"),
    ):  # fmt: skip
        if f"loss {name}" in mean:
            claims.append(_below(mean, name, title, getattr(margins, name)))
    claims += [
        Claim(
            "With 4 of its 7 routed experts it is as good as GShard",
            f"{mean['active 4']:.4f} against {mean['loss gshard']:.4f}",
            TOO_SHORT if margins.fewer is None else f"at most {margins.fewer:g} worse",
            None
            if margins.fewer is None
            else mean["active 4"] <= mean["loss gshard"] + margins.fewer,
        ),
        Claim(
            "A routed expert cannot replace the shared one",
            f"{mean['swap']:+.3f} when one does",
            f"at least {margins.swap:+g}",
            mean["swap"] >= margins.swap,
        ),
        Claim(
            "Its experts are more specialised in domains than GShard's",
            f"JS divergence {mean['JS deepseekmoe']:.3f} against {mean['JS gshard']:.3f} bits",
            f"at least {margins.specialization:g} times, and {margins.divergence:g} bits",
            mean["JS deepseekmoe"] >= margins.specialization * mean["JS gshard"]
            and mean["JS deepseekmoe"] >= margins.divergence,
        ),
        Claim(
            "Without its best sixteenth of experts it suffers",
            f"{mean['disabled deepseekmoe']:+.3f}",
            f"at least {margins.disabled:+g}",
            mean["disabled deepseekmoe"] >= margins.disabled,
        ),
        Claim(
            "The balance loss keeps the load even",
            f"MaxVio {mean['MaxVio']:.2f} with it, {mean['MaxVio none']:.2f} without",
            f"below {margins.violation:g}, and {margins.unbalanced:g} times as large without",
            mean["MaxVio"] < margins.violation
            and mean["MaxVio none"] >= margins.unbalanced * mean["MaxVio"],
        ),
    ]
    rival = "gshard-x1.5" if "disabled most gshard-x1.5" in mean else "gshard"
    claims.append(
        Claim(
            "Its experts are less redundant: without them it suffers more than GShard x1.5",
            f"at 4/16 {mean['disabled most deepseekmoe']:+.3f} against "
            f"{mean[f'disabled most {rival}']:+.3f} ({rival})",
            "the paper's Figure 4 is of 2B models; two layers and toy text do not show it",
            None,
        )
    )
    return claims


def _below(mean: Mapping[str, float], name: str, title: str, margin: float) -> Claim:
    ours, theirs = mean["loss deepseekmoe"], mean[f"loss {name}"]
    return Claim(
        f"It beats {title}",
        f"{ours:.4f} against {theirs:.4f}",
        f"by {margin:g} or more",
        theirs - ours >= margin,
    )


#: What two layers on toy text cannot show, whatever they give.
NOT_HERE = (
    "Not to be had at this size: lower redundancy than GShard x1.5 (Figure 4), a gain from the shared "
    "expert as such (0 + 64 experts may be better than 1 + 63), Dense x16 as the upper bound (it is "
    "undertrained), hash routing worse than Switch, and the size of the loss when the shared expert "
    "is swapped (1.808 to 2.414 in the paper). Losses are nats a token of a BPE of 1,024; the paper's "
    "are of the Pile: compare orders, not numbers."
)
