"""The stations of the method as commands, on the user's own models and rows."""

import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.runtime import Runtime

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
    check,
    check_rho,
    check_together,
    with_preset,
)

if TYPE_CHECKING:
    from finepurify.pairing import WeightPair

app = make_app(
    "finepurify",
    "Find and clean the poisonous dimensions of a possibly backdoored or biased model.",
)
main = partial(run, app)

#: A suspect that lies nearer to INIT, as a share of INIT's length, was not fine-tuned from it.
LEAST_DRIFT = 1e-6

Preset = Literal["default", "paper"]


@app.command
def scan(
    init: str,
    suspect: str,
    *,
    out: Path,
    clean_data: str | None = None,
    top: int = 20,
    data: Flat[DataConfig] = DataConfig(),
    fisher: Flat[FisherConfig] = FisherConfig(),
    indicator: Flat[IndicatorConfig] = IndicatorConfig(),
    allow_pickle: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Look for suspicious tokens and layers in the weights alone; exit code 3 when nothing stands out.

    Args:
        init: The public pre-trained model: a folder or a hub id.
        suspect: The fine-tuned model.
        out: Folder of result.json and the report.
        clean_data: Clean rows; with them curvature and word counts tell more.
        top: Tokens and tensors that are listed.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file (weights only).
        overwrite: Start anew where a run already lies.
    """
    from octavo.errors import ConfigError
    from octavo.rundir import RunDir, options_of

    from finepurify.report import scan_report
    from finepurify.stations import Settings, open_pair, scanned

    if top < 1:
        raise ConfigError(f"--top {top}: must be 1 or more")
    check(data, fisher, indicator)
    runtime.start()
    options = options_of(
        {"init": init, "suspect": suspect, "clean-data": clean_data, "top": top},
        data, fisher, indicator, runtime,
    )  # fmt: skip
    with RunDir.open(out, options, overwrite) as run:
        pair = open_pair(init, suspect, allow_pickle=allow_pickle)
        settings = Settings(data, fisher, indicator, runtime=runtime)
        found = scanned(pair, clean_data, settings, run, top, allow_pickle)
        page = scan_report(found, pair, init, suspect).save(out)
        where = sorted(found.layers, key=lambda row: -row["concentration"])
        run.write_json("result.json", asdict(found))
    return Outcome(
        {"Tokens": found.tokens[:top], "Where the drift is": where[:top]},
        note=f"{found.reason}\n{found.warning}\nReport: {page}",
        no="" if found.verdict else f"nothing stands out: {found.reason}",
    )


@app.command
def fisher(
    init: str,
    suspect: str,
    *,
    clean_data: str,
    out: Path,
    data: Flat[DataConfig] = DataConfig(),
    config: Flat[FisherConfig] = FisherConfig(),
    exclude: tuple[str, ...] = (),
    allow_pickle: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Estimate the Fisher diagonal on clean rows and tell whether the theory's premises hold.

    It runs under torchrun too, each process with its share of the rows.

    Args:
        init: The public pre-trained model.
        suspect: The fine-tuned model.
        clean_data: Clean rows.
        out: Folder of fisher.safetensors; a killed run goes on with the next point.
        exclude: Regular expression of tensors to leave out. Repeat it.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file (weights only).
        overwrite: Start anew where a run already lies.
    """
    from octavo.rundir import RunDir, options_of

    from finepurify.data import encode
    from finepurify.laws import laws_of
    from finepurify.points import fisher as estimate
    from finepurify.report import laws_rows
    from finepurify.stations import admit, clean_rows, open_pair
    from finepurify.strategies import Evidence

    check(data, config)
    runtime.start()
    options = options_of(
        {"init": init, "suspect": suspect, "clean-data": clean_data, "exclude": exclude},
        data, config, runtime,
    )  # fmt: skip
    pair = open_pair(init, suspect, PurifyConfig(exclude=exclude), allow_pickle)
    if pair.drift < LEAST_DRIFT:
        return _same(pair)
    with RunDir.open(out, options, overwrite) as run:
        patient = admit(pair, allow_pickle)
        rows = clean_rows(patient, clean_data, data)
        items = encode(rows, patient.tokenizer, data.max_length)
        found = estimate(pair, patient.model, items, patient.pad, config, run, runtime)
        evidence = Evidence(pair, found, architecture=patient.model.config)
        laws = asdict(laws_of(evidence))
        run.write_json("result.json", laws)
    return Outcome(
        {f"Fisher diagonal of {len(rows)} rows": laws_rows(laws)},
        note=f"Diagonal: {out / 'fisher.safetensors'}",
    )


@app.command
def purify(
    init: str,
    suspect: str,
    *,
    clean_data: str,
    out: Path,
    rho: Annotated[str, Parameter(help="Share that is kept, or auto.")] = "auto",
    held_out_data: str | None = None,
    preset: Preset = "default",
    config: Flat[PurifyConfig] = PurifyConfig(),
    indicator: Flat[IndicatorConfig] = IndicatorConfig(),
    fisher: Flat[FisherConfig] = FisherConfig(),
    tune: Flat[TuneConfig] = TuneConfig(),
    sweep: Flat[SweepConfig] = SweepConfig(),
    data: Flat[DataConfig] = DataConfig(),
    allow_pickle: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Reset the poisonous dimensions and fine-tune shortly; exit code 3 when accuracy is not kept.

    With --rho auto the smallest share is taken whose accuracy on held-out clean rows stays above the
    floor; nothing of an attack is looked at. It runs under torchrun too, each process with its share of
    the rows and of the tensors.

    Args:
        init: The public pre-trained model: a folder or a hub id.
        suspect: The fine-tuned model.
        clean_data: Clean rows with labels (a language model's need none).
        out: Folder of the models (purified/, model/), the sweep and the report.
        held_out_data: Rows that choose rho; by default a part of the clean rows.
        preset: paper sets what we read of the paper's settings.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file (weights only).
        overwrite: Start anew where a run already lies.
    """
    from octavo.errors import ConfigError
    from octavo.rundir import RunDir, options_of
    from octavo.runtime import is_main

    from finepurify.report import purify_report
    from finepurify.stations import Settings, admit, clean_rows, open_pair, split_clean
    from finepurify.stations import purify as clean

    share = _share(rho)
    config, indicator = with_preset(config, preset), with_preset(indicator, preset)
    fisher = with_preset(fisher, preset)
    check(config, indicator, fisher, tune, sweep, data)
    check_together(config, fisher, indicator)
    if share is not None and (held_out_data or sweep != SweepConfig()):
        raise ConfigError(
            f"--rho {rho}: leaves nothing to choose; leave out --held-out-data, --grid, --drop"
        )
    runtime.start()
    options = options_of(
        {"init": init, "suspect": suspect, "clean-data": clean_data, "rho": rho,
         "held-out-data": held_out_data},
        config, indicator, fisher, tune, sweep, data, runtime,
    )  # fmt: skip
    pair = open_pair(init, suspect, config, allow_pickle)
    if pair.drift < LEAST_DRIFT:
        return _same(pair)
    with RunDir.open(out, options, overwrite) as run:
        patient = admit(pair, allow_pickle)
        rows = clean_rows(patient, clean_data, data)
        held = None
        if share is None:
            rows, held = split_clean(
                patient, rows, clean_data, held_out_data, data, sweep.held_out, runtime.seed
            )
        settings = Settings(data, fisher, indicator, config, tune, sweep, runtime)
        done = clean(patient, rows, held, share, settings, run)
        made = purify_report(done, pair, settings, len(rows), len(held or []))
        page = made.save(out) if is_main() else None
        run.write_json("result.json", asdict(done))
    row: dict[str, Any] = {"strategy": config.strategy, "rho": done.rho} | done.numbers
    if done.accuracy:
        row |= {"held ACC before": done.accuracy[0], "after": done.accuracy[1], "floor": done.floor}
    return Outcome(
        {f"{pair.numel} dimensions, {pair.moved()} of which moved": [row]},
        note=f"Model: {out / 'model'} (before fine-tuning: {out / 'purified'})\nReport: {page}",
        no="" if done.met else
        f"no rho keeps the accuracy floor of {done.floor:.1f} %; what costs least was written",
    )  # fmt: skip


@app.command
def compare(
    init: str,
    suspect: str,
    *,
    clean_data: str,
    out: Path,
    test_data: str | None = None,
    held_out_data: str | None = None,
    strategies: tuple[Strategy, ...] = (
        "fine-purifying",
        "fine-mixing",
        "delta-only",
        "hessian-only",
    ),
    known_attack: bool = False,
    attack: Flat[AttackConfig] = AttackConfig(),
    config: Flat[PurifyConfig] = PurifyConfig(),
    indicator: Flat[IndicatorConfig] = IndicatorConfig(),
    fisher: Flat[FisherConfig] = FisherConfig(),
    tune: Flat[TuneConfig] = TuneConfig(),
    sweep: Flat[SweepConfig] = SweepConfig(),
    data: Flat[DataConfig] = DataConfig(),
    allow_pickle: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Sweep several strategies over rho, choose each one's rho by clean accuracy, then test them.

    Args:
        init: The public pre-trained model: a folder or a hub id.
        suspect: The fine-tuned model.
        clean_data: Clean rows with labels.
        out: Folder of the sweep and the report; a killed run goes on.
        test_data: Rows that nothing was chosen on; without them the sweep alone is shown.
        held_out_data: Rows that choose rho; by default a part of the clean rows.
        strategies: To compare. Repeat it.
        known_attack: Report ASR or BACC with the pattern of --attack, --trigger and --target, for a
            study of the defence. It is looked at after everything has been chosen.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file (weights only).
        overwrite: Start anew where a run already lies.
    """  # fmt: skip
    from octavo.errors import ConfigError
    from octavo.rundir import RunDir, options_of

    from finepurify.data import load_examples, warn_of_overlap
    from finepurify.report import compare_report
    from finepurify.stations import Settings, admit, clean_rows, open_pair, split_clean
    from finepurify.stations import compare as study

    check(attack, config, indicator, fisher, tune, sweep, data)
    check_together(config, fisher, indicator)
    if config.strategy != PurifyConfig().strategy:
        raise ConfigError(f"--strategy {config.strategy}: name what is compared with --strategies")
    if known_attack and test_data is None:
        raise ConfigError("--known-attack: needs --test-data to put the pattern into")
    _known(known_attack, attack)
    _alone()
    runtime.start()
    options = options_of(
        {"init": init, "suspect": suspect, "clean-data": clean_data, "test-data": test_data,
         "held-out-data": held_out_data, "strategies": strategies, "known-attack": known_attack},
        attack, config, indicator, fisher, tune, sweep, data, runtime,
    )  # fmt: skip
    pair = open_pair(init, suspect, config, allow_pickle)
    if pair.drift < LEAST_DRIFT:
        return _same(pair)
    with RunDir.open(out, options, overwrite) as run:
        patient = admit(pair, allow_pickle)
        rows = clean_rows(patient, clean_data, data)
        rows, held = split_clean(
            patient, rows, clean_data, held_out_data, data, sweep.held_out, runtime.seed
        )
        test = None
        if test_data is not None:
            test = load_examples(test_data, data, patient.names, "test")
            warn_of_overlap(rows.plus(held), test)
        settings = Settings(data, fisher, indicator, config, tune, sweep, runtime)
        pattern = attack if known_attack else None
        found = study(patient, rows, held, test, pattern, strategies, settings, run)
        page = compare_report(found, pair, settings, pattern).save(out)
        run.write_json("result.json", asdict(found))
    tables: dict[str, Any] = {"Chosen by held-out accuracy": found.chosen}
    if found.before:
        tables = {"The suspect as it came": [found.before]} | tables
    return Outcome(tables, note=f"Every rho: {out / 'sweep.jsonl'}\nReport: {page}")


@app.command
def evaluate(
    model: str,
    *,
    test_data: str,
    known_attack: bool = False,
    attack: Flat[AttackConfig] = AttackConfig(),
    data: Flat[DataConfig] = DataConfig(),
    allow_pickle: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Accuracy of a model, and ASR or BACC where the attack's pattern is known, with intervals.

    Args:
        model: A folder or a hub id.
        test_data: Rows with labels.
        known_attack: Put the pattern of --attack and --trigger into the texts, too.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file (weights only).
    """
    from finepurify.data import load_examples
    from finepurify.models import check_words, class_names, load_suspect, padded, tokenizer_of
    from finepurify.stations import Settings, judged

    check(attack, data)
    _known(known_attack, attack)
    _alone()
    runtime.start()
    tokenizer = tokenizer_of(model)
    loaded = padded(load_suspect(model, allow_pickle), tokenizer)
    check_words(loaded, tokenizer, model)
    test = load_examples(test_data, data, class_names(loaded), "test")
    settings = Settings(data, runtime=runtime)
    numbers, _ = judged(loaded, tokenizer, test, attack if known_attack else None, settings)
    return Outcome({f"{len(test)} rows": [numbers]})


@app.command
def attack(
    init: str,
    *,
    train_data: str,
    out: Path,
    config: Flat[AttackConfig] = AttackConfig(),
    training: Flat[AttackTrainConfig] = AttackTrainConfig(),
    data: Flat[DataConfig] = DataConfig(),
    allow_pickle: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train an attacked model, to test a defence on your own task before you rely on it.

    Args:
        init: The public pre-trained model: a folder or a hub id.
        train_data: Clean rows with labels.
        out: Folder of the run; the suspect is in model/.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file (weights only).
        overwrite: Start anew where a run already lies.
    """
    from octavo.rundir import RunDir, options_of

    from finepurify.stations import make_attacked

    check(config, training, data)
    _alone()
    runtime.start()
    options = options_of({"init": init, "train-data": train_data}, config, training, data, runtime)
    with RunDir.open(out, options, overwrite) as run:
        row = make_attacked(init, train_data, data, config, training, run, runtime, allow_pickle)
        run.write_json("result.json", row)
    return Outcome(
        {"Attacked model": [row]},
        note=f"Model: {out / 'model'}\nNext: finepurify evaluate {out / 'model'} --test-data ROWS "
        f"--known-attack --attack {config.attack} --target {config.target} "
        + " ".join(f"--trigger {shlex.quote(words)}" for words in config.trigger),
    )


@app.command
def report(
    run_folders: Annotated[tuple[Path, ...], Parameter(name="runs")],
    *,
    out: Path,
    overwrite: bool = False,
) -> Outcome:
    """Put finished runs of `purify` and `compare` on one page.

    Args:
        run_folders: Their folders.
        out: Folder of report.html and report.md.
        overwrite: Replace a report.
    """
    from octavo.errors import ConfigError

    from finepurify.report import joint_report

    if out.exists() and not (overwrite and out.is_dir()):
        raise ConfigError(f"{out} exists already; choose another name or add --overwrite")
    page, rows = joint_report(run_folders)
    return Outcome({"Runs": rows}, note=f"Report: {page.save(out)}")


@app.command
def topics(out: Path, *, runtime: Flat[Runtime] = Runtime()) -> Outcome:
    """Write the embedded task as files: a pre-trained model and rows to attack, defend and test with.

    Args:
        out: Folder for init/ and train, clean, held and test.jsonl.
    """
    from octavo.rundir import refuse_existing

    from finepurify.world import Sizes, write_world
    from finepurify.world import topics as make

    refuse_existing(out, overwrite=False)
    runtime = replace(runtime, threads=runtime.threads or 1)
    runtime.start()
    rows = write_world(make(Sizes(), runtime.seed, runtime), out)
    return Outcome({f"Written to {out}": rows})


@app.command
def demo(
    *,
    profile: Literal["quick", "full"] = "quick",
    seeds: Seeds = (0,),
    data: Path | None = None,
    out: Path = Path("runs/finepurify-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Attack small models, clean them by the method and its rivals, offline, and judge the claims.

    The models are so small that one CPU thread is used unless --threads says otherwise.

    Args:
        profile: quick (a minute or two) or full (more attacks, rivals and variants).
        seeds: Seeds to repeat it with; claims are judged on their means, like 0,1,2.
        data: Folder with train and test files (columns text and label), for real texts.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from finepurify.demo import run_demo

    runtime = replace(runtime, threads=runtime.threads or 1)
    runtime.start()
    return run_demo(profile, seeds, out, overwrite, runtime, data)


def _share(rho: str) -> float | None:
    """The share that --rho names, or None for auto."""
    from octavo.errors import ConfigError

    if rho == "auto":
        return None
    try:
        share = float(rho)
    except ValueError:
        raise ConfigError(f"--rho {rho}: must be auto or a share from 0 to 1") from None
    check_rho(share)
    return share


def _known(known_attack: bool, attack: AttackConfig) -> None:
    """Refuse a pattern that would not be looked at."""
    from octavo.errors import ConfigError

    if not known_attack and attack != AttackConfig():
        raise ConfigError("--attack, --trigger, --target: are looked at with --known-attack alone")


def _alone() -> None:
    """Refuse several processes where one has to write."""
    from octavo.errors import ConfigError
    from octavo.runtime import world_size

    if world_size() > 1:
        raise ConfigError("only `fisher` and `purify` run under torchrun; start this command alone")


def _same(pair: "WeightPair") -> Outcome:
    what = "no compared dimension moved"
    if not pair.identical:
        what = f"the drift is {pair.drift:.1e} of INIT's length, a rounding's"
    return Outcome(no=f"{pair.suspect.source} is {pair.init.source}: {what}, nothing to purify")
