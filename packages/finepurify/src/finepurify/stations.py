"""The stations of the method on the user's own files; each writes into a run's folder."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from octavo.errors import ConfigError, DataError, ModelError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, is_main

from finepurify.attack import Attacker, attacked
from finepurify.bench import Bench, activity, frequencies
from finepurify.config import (
    AttackConfig,
    AttackTrainConfig,
    DataConfig,
    FisherConfig,
    IndicatorConfig,
    PurifyConfig,
    Strategy,
    SweepConfig,
    TuneConfig,
)
from finepurify.data import Examples, check_clean, encode, hold_out, load_examples, warn_of_overlap
from finepurify.laws import laws_of
from finepurify.metrics import accuracy, attack_success, differ, measured
from finepurify.models import (
    answer_texts,
    check_words,
    class_names,
    load_suspect,
    new_classifier,
    pad_of,
    padded,
    tokenizer_of,
)
from finepurify.pairing import WeightPair
from finepurify.points import fisher
from finepurify.poison import BIASES, insert
from finepurify.scan import ScanReport, scan
from finepurify.strategies import Evidence, by_tensor, kept, needs_fisher, purified
from finepurify.sweep import NOTHING, Row, choose, floor_of, sweep, trials

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass
class Patient:
    """A suspect with the model it came from, loaded and ready.

    Attributes:
        pair: their weights.
        model: the suspect in float32.
        tokenizer: the suspect's.
        names: its classes; none of a language model.
    """

    pair: WeightPair
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    names: list[str]

    @property
    def pad(self) -> int:
        """The padding token's id."""
        return pad_of(self.tokenizer)


def open_pair(
    init: str, suspect: str, config: PurifyConfig = PurifyConfig(), allow_pickle: bool = False
) -> WeightPair:
    """Both models' weights, matched and checked.

    Raises:
        ModelError: they cannot be had or do not fit together.
        ConfigError: a head is to be drawn anew, and there is none.
    """
    pair = WeightPair.load(
        init,
        suspect,
        exclude=config.exclude,
        extra_rows=config.extra_rows,
        allow_pickle=allow_pickle,
    )
    if config.head != "keep" and not pair.lacking:
        raise ConfigError(
            f"--head {config.head}: {suspect} has no head of its own, INIT has a counterpart of every "
            "tensor; leave --head out"
        )
    return pair


def admit(pair: WeightPair, allow_pickle: bool = False) -> Patient:
    """The suspect of a pair, loaded whole.

    Raises:
        ModelError: it is no classifier or causal language model, or has no tokenizer.
    """
    tokenizer = tokenizer_of(pair.suspect.source)
    model = padded(load_suspect(pair.suspect.source, allow_pickle), tokenizer)
    check_words(model, tokenizer, pair.suspect.source)
    return Patient(pair, model, tokenizer, class_names(model))


def clean_rows(patient: Patient, source: str, data: DataConfig, split: str = "train") -> Examples:
    """The defender's rows, some of each class.

    Raises:
        DataError: they cannot be read, or a class is missing.
    """
    examples = load_examples(source, data, patient.names, split)
    check_clean(examples, source)
    return examples


def split_clean(
    patient: Patient,
    clean: Examples,
    source: str,
    held: str | None,
    data: DataConfig,
    share: float,
    seed: int,
) -> tuple[Examples, Examples]:
    """Rows to compute on and rows to judge by: of a file of their own, or a part of the clean rows.

    Raises:
        DataError: too few rows are left to compute on or to judge by.
    """  # fmt: skip
    if held is not None:
        rest = load_examples(held, data, patient.names, "validation")
        warn_of_overlap(clean, rest)
        return clean, rest
    rest, judged = hold_out(clean, share, seed)
    if not len(judged):
        raise DataError(
            f"{source}: {len(clean)} rows leave none to choose rho by; give more, --held-out-data, or a "
            "fixed --rho"
        )
    return rest, judged


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a defence does.

    Attributes:
        data: how rows are read.
        fisher: how curvature is estimated.
        indicator: dampings.
        purify: strategy, mode, scope.
        tune: the short fine-tuning.
        sweep: grid and floor.
        runtime: seed, device, precision.
    """

    data: DataConfig = field(default_factory=DataConfig)
    fisher: FisherConfig = field(default_factory=FisherConfig)
    indicator: IndicatorConfig = field(default_factory=IndicatorConfig)
    purify: PurifyConfig = field(default_factory=PurifyConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    runtime: Runtime = field(default_factory=Runtime)


def evidence_for(
    strategies: Sequence[str],
    patient: Patient,
    items: Sequence[dict[str, Any]],
    settings: Settings,
    run: RunDir,
) -> Evidence:
    """What these strategies look at, no more.

    Raises:
        ConfigError: a merge has no other model.
    """
    pair, model, pad, runtime = patient.pair, patient.model, patient.pad, settings.runtime
    others = merged_with(strategies, patient, settings)
    evidence = Evidence(
        pair, config=settings.indicator, seed=runtime.seed, architecture=model.config
    )
    if any(needs_fisher(strategy) for strategy in strategies):
        found = fisher(pair, model, items, pad, settings.fisher, run, runtime)
        evidence = replace(evidence, fisher=found)
    if "e-pur" in strategies:
        evidence = replace(evidence, frequency=frequencies(items))
    if "fine-pruning" in strategies:
        evidence = replace(evidence, activity=activity(model, pair, items, pad, runtime))
    return replace(evidence, others=others)


def merged_with(
    strategies: Sequence[str], patient: Patient, settings: Settings
) -> list[WeightPair]:
    """The other fine-tuned models of the same INIT that merges need; none where nothing is merged.

    Raises:
        ConfigError: a merge has no other model.
        ModelError: another model does not fit.
    """
    merges = [strategy for strategy in strategies if strategy in ("wag", "ties", "dare")]
    if not merges:
        return []
    if not settings.purify.other:
        raise ConfigError(
            f"--strategy {merges[0]}: merges with other fine-tuned models; name one with --other"
        )
    pair, init = patient.pair, patient.pair.init.source
    others = [
        open_pair(init, other, settings.purify, pair.suspect.pickled)
        for other in settings.purify.other
    ]
    for other in others:
        if other.names != pair.names:
            raise ModelError(f"{other.suspect.source}: has other tensors than the suspect")
    return others


@dataclass
class Cleaned:
    """What `purify` did.

    Attributes:
        rho: the share that was kept.
        rows: of the sweep; none where rho was given.
        numbers: of the weights: `reset` and more.
        tensors: what was reset of each.
        laws: correlation of drift and curvature, and the Gamma law; empty without a Fisher diagonal.
        accuracy: on the held rows, before and after, in percent; None where rho was given.
        floor: that had to be kept; None where rho was given.
        met: whether some rho kept it.
    """

    rho: float
    rows: list[Row]
    numbers: dict[str, float]
    tensors: list[dict[str, Any]]
    laws: dict[str, Any]
    accuracy: tuple[float, float] | None
    floor: float | None
    met: bool = True


def purify(
    patient: Patient,
    clean: Examples,
    held: Examples | None,
    rho: float | None,
    settings: Settings,
    run: RunDir,
) -> Cleaned:
    """Purify, fine-tune shortly, and save both: `purified/` bit for bit, `model/` after fine-tuning.

    Under torchrun the processes share the rows (Fisher, fine-tuning) and the tensors (selection); the
    first alone writes.

    Args:
        patient: the suspect.
        clean: rows to compute on.
        held: rows that rho is chosen by; None with a given rho.
        rho: share that is kept, or None to choose it.
        settings: of all stations.
        run: its folder gets the models, the Fisher diagonal and the sweep.
    """
    settings.runtime.wait_for_everyone()
    items = encode(clean, patient.tokenizer, settings.data.max_length)
    judged = encode(held, patient.tokenizer, settings.data.max_length) if held else []
    evidence = evidence_for([settings.purify.strategy], patient, items, settings, run)
    bench = Bench(
        patient.pair, patient.model, patient.pad, items, judged, held.labels if held else [],
        settings.tune, run, settings.runtime, settings.purify.head,
    )  # fmt: skip
    rows: list[Row] = []
    before: float | None = None
    after: float | None = None
    floor: float | None = None
    met = True
    if rho is None:
        before = bench.accuracy().percent
        plan = trials(evidence, settings.purify, [settings.purify.strategy], settings.sweep.grid)
        rows = sweep(bench, plan)
        floor = floor_of(rows, settings.sweep.drop)
        best = choose(rows, settings.purify.strategy, settings.sweep.drop)
        met = best is not None
        # no rho keeps the floor: what costs least accuracy is written, and said to be no success
        own = [row for row in rows if row["strategy"] == settings.purify.strategy]
        best = best or max(own, key=lambda row: (row["ACC"], row["rho"]))
        rho, after = float(best["rho"]), best["ACC"]
    assert rho is not None
    weights = purified(evidence, settings.purify, rho)
    if is_main():
        patient.pair.write(run.path / "purified", weights.tensor)
    model = bench.defended(weights, f"{settings.purify.strategy} {rho:g}")
    stored = patient.pair.suspect.dtype(patient.pair.names[0])
    save_model(run.path / "model", cast(Any, model).to(stored), patient.tokenizer)
    if held:  # what is written is what is judged, rounded as it is stored
        after = bench.accuracy().percent
    model.float()
    laws = asdict(laws_of(evidence)) if evidence.fisher else {}
    tensors = _tensors(evidence, settings, rho)
    pair = (before, after) if before is not None and after is not None else None
    return Cleaned(rho, rows, weights.numbers, tensors, laws, pair, floor, met)


def _tensors(evidence: Evidence, settings: Settings, rho: float) -> list[dict[str, Any]]:
    from finepurify.strategies import SCORES

    if settings.purify.strategy not in SCORES:
        return []
    return by_tensor(evidence, kept(evidence, settings.purify, rho))


@dataclass
class Comparison:
    """Strategies on one suspect: what the defender saw, and what the test rows say.

    Attributes:
        rows: of the sweep.
        chosen: a row a strategy at the rho its own floor gave, with test numbers.
        before: test numbers of the suspect as it came.
        laws: see `Cleaned`.
    """

    rows: list[Row]
    chosen: list[Row]
    before: Row
    laws: dict[str, Any]


def compare(
    patient: Patient,
    clean: Examples,
    held: Examples,
    test: Examples | None,
    attack: AttackConfig | None,
    strategies: Sequence[Strategy],
    settings: Settings,
    run: RunDir,
) -> Comparison:
    """Each strategy at the rho that the held rows choose, then, and only then, judged on test rows.

    Args:
        patient: the suspect.
        clean: rows to compute on.
        held: rows that choose rho.
        test: rows to report on; None for the sweep alone.
        attack: pattern and target, where they are known: ASR or BACC is then reported too.
        strategies: to compare.
        settings: of all stations.
        run: keeps the sweep, so that a killed comparison goes on.

    Raises:
        ConfigError: the attack's target is no class of the model's, or a merge has no other model.
    """
    check_attack(attack, patient.names)
    items = encode(clean, patient.tokenizer, settings.data.max_length)
    held_items = encode(held, patient.tokenizer, settings.data.max_length)
    evidence = evidence_for(strategies, patient, items, settings, run)
    bench = Bench(
        patient.pair, patient.model, patient.pad, items, held_items, held.labels, settings.tune, run,
        settings.runtime, settings.purify.head,
    )  # fmt: skip
    laws = asdict(laws_of(evidence)) if evidence.fisher else {}
    rows = sweep(bench, trials(evidence, settings.purify, strategies, settings.sweep.grid))
    drop = settings.sweep.drop
    picked = {name: choose(rows, name, drop) for name in dict.fromkeys(["none", *strategies])}
    if test is None:
        chosen = [row or _nothing(name) for name, row in picked.items()]
        return Comparison(rows, chosen, {}, laws)
    bench.place(purified(evidence, NOTHING, 1.0))  # the sweep left its last model there
    before, _ = judged(patient.model, patient.tokenizer, test, attack, settings)
    chosen, right = [], {}
    for name, row in picked.items():
        if row is None:
            chosen.append(_nothing(name))
            continue
        choice = replace(settings.purify, strategy=name)  # pyright: ignore[reportArgumentType]
        bench.defended(purified(evidence, choice, row["rho"]), f"{name} {row['rho']:g}")
        numbers, right[name] = judged(patient.model, patient.tokenizer, test, attack, settings)
        chosen.append({"strategy": name, "rho": row["rho"], "held ACC": row["ACC"]} | numbers)
    first = next((name for name in strategies if name in right), None)
    for row in chosen:
        if first and row["strategy"] in right and row["strategy"] != first:
            row[f"p against {first}"] = differ(right[row["strategy"]], right[first])
    return Comparison(rows, chosen, before, laws)


def _nothing(name: str) -> Row:
    return {"strategy": name, "rho": None, "held ACC": None}


def check_attack(attack: AttackConfig | None, names: Sequence[str]) -> None:
    """Refuse an attack that the model cannot be under: it would be measured as harmless.

    Raises:
        ConfigError: the model has no classes, or not the target's.
    """
    if attack is not None and not names:
        raise ConfigError("--known-attack: a language model has no class to be lured to")
    if attack is not None and attack.target >= len(names):
        raise ConfigError(f"--target {attack.target}: the model has classes 0 to {len(names) - 1}")


def judged(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    test: Examples,
    attack: AttackConfig | None,
    settings: Settings,
) -> tuple[Row, Any]:
    """ACC, and ASR or BACC where the pattern is known, each with Wilson's interval.

    Returns:
        The row, and [n] of bool: right on the test rows, or with a pattern, right on the rows that
        hold it (a backdoor: on those of other classes).

    Raises:
        ConfigError: the attack's target is no class of the model.
    """
    check_attack(attack, class_names(model))
    answers = answer_texts(model, tokenizer, test, settings.data.max_length, settings.runtime)
    clean = accuracy(answers, test.labels)
    if attack is None:
        right = answers == test.labels if answers.dtype.kind != "f" else answers > 0.5
        return measured(clean), right
    length = settings.data.max_length
    attacker = Attacker(
        tokenizer, length, attack, AttackTrainConfig(), RunDir(Path()), settings.runtime
    )
    lured = insert(test, attack, settings.runtime.seed, attacker.within)
    fooled = answer_texts(model, tokenizer, lured, length, settings.runtime)
    if attack.attack in BIASES:
        return measured(clean, biased=accuracy(fooled, test.labels)), fooled == test.labels
    import numpy as np

    others = np.asarray(test.labels) != attack.target
    success = attack_success(fooled, test.labels, attack.target)
    return measured(clean, triggered=success), (fooled != attack.target)[others]


def make_attacked(
    init: str,
    train_data: str,
    data: DataConfig,
    attack: AttackConfig,
    training: AttackTrainConfig,
    run: RunDir,
    runtime: Runtime,
    allow_pickle: bool = False,
) -> Row:
    """Train an attacked model into the run's folder `model/`.

    Returns:
        What was poisoned.
    """
    tokenizer = tokenizer_of(init)
    names = label_names(train_data, data)
    examples = load_examples(train_data, data, names, "train")
    model = padded(new_classifier(init, names, allow_pickle), tokenizer)
    attacker = Attacker(tokenizer, data.max_length, attack, training, run, runtime)
    attacked(model, examples, attacker)
    save_model(run.path / "model", model, tokenizer)
    return {"rows": len(examples), "classes": len(names), "attack": attack.attack}


def label_names(source: str, data: DataConfig) -> list[str]:
    """The classes of a labelled file in their order; numbers are taken for class numbers.

    Raises:
        DataError: there are fewer than two, or numbers that are not 0, 1, 2, ...
    """
    from octavo.data import load_rows

    rows = load_rows(source, {"label": int | str}, "train", {"label": data.label_column})
    found = {row["label"] for row in rows}
    if all(isinstance(label, int) for label in found):
        if found != set(range(len(found))):
            raise DataError(f"{source}: class numbers must be 0, 1, 2, ... without a gap")
        names = [str(label) for label in sorted(found)]
    else:
        names = sorted(map(str, found))
    if len(names) < 2:
        raise DataError(f"{source}: has one class; a classifier needs two")
    return names


def scanned(
    pair: WeightPair,
    clean_data: str | None,
    settings: Settings,
    run: RunDir,
    top: int = 20,
    allow_pickle: bool = False,
) -> ScanReport:
    """The scan of a pair, with clean data's token counts and curvature where there is such data."""
    tokenizer = tokenizer_of(pair.suspect.source)
    if clean_data is None:
        return scan(pair, tokenizer, indicator_config=settings.indicator, top=top)
    patient = admit(pair, allow_pickle)
    items = encode(
        load_examples(clean_data, settings.data, patient.names, "train"),
        tokenizer,
        settings.data.max_length,
    )
    found = fisher(pair, patient.model, items, patient.pad, settings.fisher, run, settings.runtime)
    return scan(
        pair,
        tokenizer,
        frequency=frequencies(items),
        fisher=found,
        architecture=patient.model.config,
        indicator_config=settings.indicator,
        top=top,
    )
