"""Attack, defend, compare: one seed of the embedded default, with what only the experimenter knows."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from octavo.models import load_tokenizer, save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, seed_everything

from finepurify.attack import Attacker, attacked
from finepurify.bench import Bench, activity, frequencies
from finepurify.config import (
    AttackConfig,
    AttackTrainConfig,
    FisherConfig,
    IndicatorConfig,
    PurifyConfig,
    Strategy,
    TuneConfig,
)
from finepurify.data import encode
from finepurify.indicator import posterior_clean, split_means
from finepurify.laws import laws_of
from finepurify.metrics import accuracy, attack_success
from finepurify.models import load_suspect, new_classifier, pad_of
from finepurify.pairing import WeightPair
from finepurify.points import fisher
from finepurify.poison import BIASES, SENTENCES, insert
from finepurify.scan import scan
from finepurify.strategies import Evidence, scores, word_embedding
from finepurify.sweep import Row, choose, sweep, trials
from finepurify.world import World

SGD = AttackTrainConfig(optimizer="sgd", learning_rate=0.3, epochs=8.0)
ADAMW = AttackTrainConfig(optimizer="adamw", learning_rate=5e-4, epochs=4.0)
#: Points of accuracy below fine-tuning alone, over which a frontier is averaged.
DROPS = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Variant:
    """A strategy with settings of its own, as a row of the tables.

    Attributes:
        name: as tables show it.
        grid: values of rho.
        purify: strategy, mode, scope.
        indicator: dampings.
        fisher: kind and points.
    """

    name: str
    grid: tuple[float, ...]
    purify: PurifyConfig = field(default_factory=PurifyConfig)
    indicator: IndicatorConfig = field(default_factory=IndicatorConfig)
    fisher: FisherConfig = field(default_factory=FisherConfig)


def variant(strategy: Strategy, *grid: float) -> Variant:
    """A strategy as it is."""
    return Variant(strategy, grid or (1.0,), PurifyConfig(strategy=strategy))


@dataclass(frozen=True)
class Case:
    """One suspect and what is tried on it.

    Attributes:
        name: of the case.
        attack: what was done to the suspect, or None for a clean model.
        train: how it was fine-tuned.
        variants: what is tried on it.
        scanned: whether the weights are scanned.
        pattern: what a clean model's texts are tested with, instead of a word trigger.
    """

    name: str
    attack: AttackConfig | None
    train: AttackTrainConfig
    variants: tuple[Variant, ...] = ()
    scanned: bool = False
    pattern: AttackConfig | None = None


@dataclass
class Found:
    """What one case gave.

    Attributes:
        before: ACC, and ASR or BACC, of the suspect as it came, each with Wilson's interval.
        rows: of the sweep, with test numbers beside the held accuracy, and what each trial took.
        laws: correlation and Gamma law, where a Fisher diagonal was computed.
        calibration: of the posterior, the trigger's rows being what is known to be poisonous.
        rank: of the trigger's first word among the scanned tokens, 1 the first; 0 where nothing was.
        judged: how many tokens were.
        fires: whether the scan found something.
        seconds: what a variant's evidence took (a Fisher diagonal, counts), by its name.
    """

    before: Row
    rows: list[Row] = field(default_factory=list)
    laws: dict[str, Any] = field(default_factory=dict)
    calibration: list[Row] = field(default_factory=list)
    rank: int = 0
    judged: int = 0
    fires: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


def run_case(
    world: World,
    case: Case,
    tune: TuneConfig,
    run: RunDir,
    runtime: Runtime,
    others: Sequence[Path] = (),
) -> Found:
    """Make the suspect, defend it by every variant, and measure all on the test rows.

    The suspect, the Fisher diagonals and each row are kept in the run, so that a killed one goes on.

    Args:
        world: model and rows.
        case: suspect and variants.
        tune: the short fine-tuning.
        run: of the whole demo; the case has a folder in it.
        runtime: seed, device, precision.
        others: folders of further fine-tuned models, for merges.
    """
    folder = run.path / f"seed-{runtime.seed}" / case.name
    work = RunDir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    suspect = make_suspect(world, case, work, runtime)
    tokenizer = load_tokenizer(suspect)
    pad, model = pad_of(tokenizer), load_suspect(suspect)
    attack = case.attack or case.pattern or AttackConfig()
    biased = attack.attack in BIASES
    attacker = Attacker(tokenizer, world.max_length, attack, case.train, work, runtime)
    test = encode(world.test, tokenizer, world.max_length)
    lured = insert(world.test, attack, runtime.seed, attacker.within)
    lured_items = encode(lured, tokenizer, world.max_length)

    def look(bench: Bench) -> Row:
        plain, fooled = bench.answers(test), bench.answers(lured_items)
        shares = {"test ACC": accuracy(plain, world.test.labels)}
        if biased:
            shares["BACC"] = accuracy(fooled, world.test.labels)
        else:
            shares["ASR"] = attack_success(fooled, world.test.labels, attack.target)
        numbers = {name: share.percent for name, share in shares.items()}
        intervals = {f"{name} 95 %": share.within for name, share in shares.items()}
        return numbers | intervals | {"seconds": bench.seconds}

    pair = WeightPair.load(world.init, suspect)
    bench = Bench(
        pair, model, pad, encode(world.clean, tokenizer, world.max_length),
        encode(world.held, tokenizer, world.max_length), world.held.labels, tune, work, runtime,
    )  # fmt: skip
    found = Found(look(bench))
    plan, diagonals = [], {}
    for chosen in case.variants:
        begin = time.perf_counter()
        strategy = chosen.purify.strategy
        evidence = Evidence(
            pair, config=chosen.indicator, seed=runtime.seed, architecture=model.config
        )
        if strategy in ("fine-purifying", "hessian-only"):
            place = RunDir(folder / f"fisher-{chosen.fisher.fisher}")
            place.path.mkdir(exist_ok=True)
            curvature = fisher(pair, model, bench.items, pad, chosen.fisher, place, runtime)
            evidence = replace(evidence, fisher=curvature)
        elif strategy == "e-pur":
            evidence = replace(evidence, frequency=frequencies(bench.items))
        elif strategy == "fine-pruning":
            busy = activity(model, pair, bench.items, pad, runtime)
            evidence = replace(evidence, activity=busy)
        elif strategy in ("wag", "ties", "dare"):
            evidence = replace(
                evidence, others=[WeightPair.load(world.init, each) for each in others]
            )
        spent = time.perf_counter() - begin
        if evidence.fisher:  # computed for the first variant of its kind, needed by each
            spent = diagonals.setdefault(chosen.fisher.fisher, spent)
        found.seconds[chosen.name] = spent
        if not found.laws and strategy == "fine-purifying":
            found.laws = asdict(laws_of(evidence))
            found.calibration = calibration(evidence, trigger_rows(tokenizer, attack))
        plan += trials(evidence, chosen.purify, [strategy], chosen.grid, chosen.name)
    if case.scanned:
        report = scan(pair, tokenizer, frequency=frequencies(bench.items), top=pair.numel)
        order = [row["token"] for row in report.tokens]
        first = tokenizer.tokenize(attack.trigger[0])[0]
        found.rank = 1 + order.index(first) if first in order else len(order)
        found.judged, found.fires = report.judged, report.verdict
    if plan:
        found.rows = sweep(bench, plan, look)
    return found


def trigger_rows(tokenizer: Any, attack: AttackConfig) -> list[int]:
    """The rows of the word embedding that a trigger has; none of a sentence, whose words are common."""
    if attack.attack in SENTENCES:
        return []
    words = tokenizer(list(attack.trigger), add_special_tokens=False)["input_ids"]
    return sorted({piece for pieces in words for piece in pieces})


def calibration(evidence: Evidence, rows: Sequence[int], rho: float = 0.98) -> list[Row]:
    """How often dimensions are clean, by the posterior that says so.

    Args:
        evidence: with the Fisher diagonal.
        rows: of the word embedding that are known to be poisonous; all else counts as clean.
        rho: the prior.

    Returns:
        A row a tenth of p: mean `p`, share `clean`, number of `dimensions`; none without known rows.
    """
    if not rows:
        return []
    pair, values = evidence.pair, scores(evidence, PurifyConfig())
    split = split_means(pair.names, values, rho)
    sums = torch.zeros(3, 10, dtype=torch.float64)
    for name in pair.names:
        p = posterior_clean(values(name), split.k_clean, split.k_poison, rho).double()
        clean = torch.ones_like(p)
        if name == word_embedding(pair):
            clean[list(rows)] = 0.0
        tenth = (p * 10).long().clamp(max=9).flatten()
        for at, weight in enumerate((p, clean, torch.ones_like(p))):
            sums[at].index_add_(0, tenth, weight.flatten())
    return [
        {"p": float(p / n), "clean": float(clean / n), "dimensions": int(n)}
        for p, clean, n in sums.T
        if n
    ]


def make_suspect(world: World, case: Case, work: RunDir, runtime: Runtime) -> Path:
    """The folder of a case's suspect, trained unless it is there."""
    folder = work.path / "suspect"
    if not folder.is_dir():
        tokenizer = load_tokenizer(world.init)
        attacker = Attacker(
            tokenizer, world.max_length, case.attack or AttackConfig(), case.train, work, runtime
        )
        seed_everything(runtime.seed)  # the new classifier's weights
        model = new_classifier(world.init, world.train.names)
        if case.attack is None:
            attacker.fit(model, world.train, "clean")
        else:
            attacked(model, world.train, attacker)
        save_model(folder, model, tokenizer)
    return folder


def frontier(rows: Sequence[Row], name: str, metric: str = "ASR") -> dict[float, float]:
    """What a defender gets who keeps accuracy within so many points: the metric by the drop allowed.

    rho is chosen on held rows alone. Where no rho keeps the floor, the suspect is only fine-tuned.

    Args:
        rows: of the sweep.
        name: of the variant.
        metric: `ASR` or `BACC`, on test rows.
    """
    alone = next(row for row in rows if row["strategy"] == "none")
    return {drop: (choose(rows, name, drop) or alone)[metric] for drop in DROPS}


def area(rows: Sequence[Row], name: str, metric: str = "ASR") -> float:
    """The frontier's mean over the drops that are allowed."""
    return float(np.mean(list(frontier(rows, name, metric).values())))


def at(rows: Sequence[Row], name: str, rho: float) -> Row:
    """One row."""
    return next(row for row in rows if row["strategy"] == name and row["rho"] == rho)
