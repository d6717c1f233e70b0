"""The stations of the method as commands; each does what its name says on the user's own data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.runtime import Runtime

from cascadebert.config import (
    BaselineConfig,
    CalibrateConfig,
    CascadeConfig,
    DataConfig,
    DifficultyConfig,
    ServeConfig,
    TrainConfig,
    with_preset,
)

if TYPE_CHECKING:
    from octavo.rundir import RunDir

    from cascadebert.cascade import Cascade
    from cascadebert.data import Examples
    from cascadebert.policy import Policy

app = make_app(
    "cascadebert",
    "Classification several times faster by a calibrated cascade of complete models.",
)
main = partial(run, app)


@app.command
def train(
    config: Flat[TrainConfig],
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Fine-tune two complete models or more of rising size on a labelled file."""
    from cascadebert.data import load_examples
    from cascadebert.train import check_models, train_cascade

    config = with_preset(config)
    with _training(config, data, runtime, partial(check_models, config)) as (examples, labels, run):
        dev = None
        if config.dev_data:
            anywhere = replace(data, split=None)
            dev = load_examples(config.dev_data, anywhere, "validation", labels)
        train_cascade(examples, config, run, runtime, dev)
    rows = [
        {"stage": number, "model": model, "folder": str(config.out / f"stage-{number}")}
        for number, model in enumerate(config.model, 1)
    ]
    return Outcome(
        {f"Trained on {len(examples)} rows, labels {', '.join(labels)}": rows},
        note=f"Next: cascadebert calibrate --model {config.out} --dev-data ROWS",
    )


@app.command
def difficulty(
    config: Flat[DifficultyConfig],
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Measure how difficult each training row is, by models that did not see it."""
    from cascadebert.difficulty import build_difficulty, check_folds
    from cascadebert.finetune import check_single, train_options

    checks = partial(check_single, config, config.model, config.out), partial(check_folds, config)
    with _training(config, data, runtime, *checks) as (examples, labels, run):
        (options,) = train_options(config)
        levels = build_difficulty(
            config.model, examples, labels, options, config, config, run, "difficulty", runtime
        )
    rows = [
        {"level": level, "rows": levels.count(level), "%": 100 * levels.count(level) / len(levels)}
        for level in sorted(set(levels))
    ]
    file = config.out / "difficulty" / "difficulty.jsonl"
    return Outcome({f"Difficulty of {len(levels)} rows": rows}, note=f"Levels: {file}")


@app.command
def baseline(
    config: Flat[BaselineConfig],
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train a rival on one backbone: early exit, two-stage or joint, or its first layers (BERT-kL)."""
    from cascadebert.finetune import check_single
    from cascadebert.rivals import train_rival

    checked = partial(check_single, config, config.model, config.out)
    with _training(config, data, runtime, checked) as (examples, labels, run):
        folder = train_rival(examples, labels, config, run, runtime)
    row = {"kind": config.kind, "backbone": config.model, "folder": str(folder)}
    return Outcome(
        {f"Trained on {len(examples)} rows": [row]},
        note=f"Next: cascadebert report --model CASCADE --test-data ROWS --rival {config.out}",
    )


@app.command
def calibrate(
    dev_data: str,
    cascade: Flat[CascadeConfig],
    config: Flat[CalibrateConfig] = CalibrateConfig(),
    *,
    out: Path | None = None,
    overwrite: bool = False,
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Choose thresholds on held-out rows and write the policy: a speed-up, an accuracy or a risk.

    Rows without labels will do for a speed-up, a budget and --risk disagreement; --label-column none
    says that there are none.

    Args:
        dev_data: Calibration rows, none of which may be reported on later.
        out: The policy file; policy.json in the cascade's folder by default.
        overwrite: Replace a policy file.
    """
    from octavo.rundir import refuse_existing

    from cascadebert.data import load_examples

    runtime.start()
    out = out or _policy_path(cascade)
    refuse_existing(out, overwrite)
    models = _load(cascade, runtime)
    labelled = data.label_column != "none"
    examples = load_examples(
        dev_data, data, split="validation", labels=models.labels, labelled=labelled
    )
    policy = models.calibrate(examples, config=config)
    policy.save(out)
    row: dict[str, object] = {
        f"threshold {number} (probability)": value
        for number, value in enumerate(policy.probabilities, 1)
    }
    if "accuracy" in policy.achieved:
        row["accuracy %"] = 100 * policy.achieved["accuracy"]
    row |= {f"speed-up ({unit})": value for unit, value in _achieved_speedups(policy).items()}
    for number in range(1, len(models.stages) + 1):
        row[f"stage {number} answers %"] = 100 * policy.achieved[f"share_{number}"]
    note = f"Policy: {out}"
    if policy.guarantee:
        note += f"\nGuarantee: {policy.guarantee['text']}"
    for stage in policy.calibration.get("superfluous", []):
        note += f"\nStage {stage + 1} adds nothing at this speed: a cascade without it does as well"
    slower = policy.achieved["speedup"] < 1
    chosen_on = policy.calibration["chosen_on"]
    part = f"{chosen_on} of " if chosen_on < len(examples) else ""
    return Outcome(
        {f"On {part}the {len(examples)} calibration rows": [row]},
        note=note,
        no="the last stage alone is faster: too few rows leave early for this target" * slower,
    )


@app.command
def export(
    *,
    model: tuple[str, ...],
    int8: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Write every stage as ONNX into its folder, for --backend onnx or onnx-int8.

    Each file is compared with its model on random texts: the largest difference of a logit, and the
    share of equal labels. A backend has its own confidences: calibrate again with it.

    Args:
        model: A folder that `train` made, or fine-tuned models, smallest first. Repeat it.
        int8: Quantise the matrix products to 8 bits.
        allow_partial: Load checkpoints although weights are missing or unused; they are listed.
        overwrite: Replace earlier exports.
    """
    from cascadebert.onnx import PLAIN, export_cascade

    runtime.start()
    config = CascadeConfig(model=model, allow_partial=allow_partial)
    models = _load(config, replace(runtime, device=PLAIN.device, dtype=PLAIN.dtype))
    given = [Path(source).expanduser() for source in model]
    folders = given if len(given) > 1 else [given[0] / stage.name for stage in models.stages]
    rows = [
        {
            "stage": number,
            "file": str(done.file),
            "MB": done.megabytes,
            "largest difference": done.difference,
            "equal labels %": 100 * done.agreement,
        }
        for number, done in enumerate(export_cascade(models.stages, folders, int8, overwrite), 1)
    ]
    words = " ".join(f"--model {source}" for source in model)
    backend = "onnx-int8" if int8 else "onnx"
    note = f"Next: cascadebert calibrate {words} --backend {backend} --dev-data ROWS"
    return Outcome({"Exported, beside PyTorch in float32": rows}, note=note)


@app.command
def predict(
    source: Annotated[str, Parameter(name="--data")],
    out: Path,
    cascade: Flat[CascadeConfig],
    *,
    policy: Path | None = None,
    chunk: int = 20_000,
    overwrite: bool = False,
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Answer a file of texts through the cascade, a line of JSON each, in their order.

    Args:
        source: Rows to answer: a file (csv, tsv, jsonl, json, txt, parquet) or a hub id.
        out: The answers, as jsonl; a killed run goes on from the last whole chunk.
        policy: The policy file; policy.json in the cascade's folder by default.
        chunk: Rows that are pooled at a time.
        overwrite: Replace the answers of a finished run.
    """
    from octavo.rundir import refuse_existing

    from cascadebert.policy import Policy
    from cascadebert.predict import predict_file

    runtime.start()
    refuse_existing(out, overwrite)
    models = _load(cascade, runtime)
    chosen = Policy.load(policy or _policy_path(cascade), models.hashes, models.backend)
    exits = predict_file(models, chosen, source, out, data, chunk)
    total = sum(exits)
    rows = [
        {"stage": number, "answers": count, "%": 100 * count / max(1, total)}
        for number, count in enumerate(exits, 1)
    ]
    return Outcome({f"{total} answers in {out}": rows})


@app.command
def evaluate(
    test_data: str,
    cascade: Flat[CascadeConfig],
    *,
    policy: Path | None = None,
    allow_same_split: bool = False,
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Accuracy and speed-up of the cascade against each of its models alone.

    Args:
        test_data: Labelled rows that the policy was not calibrated on.
        policy: The policy file; policy.json in the cascade's folder by default.
        allow_same_split: Report on the calibration rows all the same.
    """
    from cascadebert.data import load_examples
    from cascadebert.evaluate import compare, stage_quality
    from cascadebert.policy import Policy

    runtime.start()
    models = _load(cascade, runtime)
    chosen = Policy.load(policy or _policy_path(cascade), models.hashes, models.backend)
    examples = load_examples(test_data, data, split="test", labels=models.labels)
    rows = compare(models, chosen, examples, allow_same_split=allow_same_split)
    order = stage_quality(models, chosen, examples)
    return Outcome({f"On {len(examples)} test rows": rows, "Confidence of each stage": order})


@app.command
def bench(
    source: Annotated[str, Parameter(name="--data")],
    cascade: Flat[CascadeConfig],
    *,
    policy: Path | None = None,
    tries: int = 3,
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Time the pooled engine against other ways to run the same cascade, on your texts and machine.

    Args:
        source: Rows with texts; a few hundred are enough.
        policy: The policy file; policy.json in the cascade's folder by default.
        tries: Of each way; the best counts.
    """
    from octavo.errors import ConfigError

    from cascadebert.data import load_examples
    from cascadebert.evaluate import bench_engines
    from cascadebert.policy import Policy

    if tries < 1:
        raise ConfigError(f"--tries {tries}: must be 1 or more")
    runtime.start()
    models = _load(cascade, runtime)
    chosen = Policy.load(policy or _policy_path(cascade), models.hashes, models.backend)
    examples = load_examples(source, data, split="test", labelled=False)
    rows = bench_engines(models, chosen, examples, tries)
    return Outcome({f"{len(examples)} texts, backend {models.backend}": rows})


@app.command
def report(
    test_data: str,
    out: Path,
    cascade: Flat[CascadeConfig],
    *,
    rival: tuple[Path, ...] = (),
    policy: Path | None = None,
    allow_same_split: bool = False,
    overwrite: bool = False,
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Write a page of tables and figures on a cascade, beside early-exit rivals if there are any.

    Args:
        test_data: Labelled rows that the policy was not calibrated on.
        out: Folder of report.html and report.md.
        rival: Folder that `baseline` made. Repeat it.
        policy: The policy file; policy.json in the cascade's folder by default.
        allow_same_split: Report on the calibration rows all the same.
        overwrite: Replace a report.
    """
    from octavo.rundir import refuse_existing

    from cascadebert.data import load_examples
    from cascadebert.early_exit import load_rival
    from cascadebert.policy import Policy
    from cascadebert.report import user_report, write_report

    runtime.start()
    refuse_existing(out, overwrite)
    models = _load(cascade, runtime)
    chosen = Policy.load(policy or _policy_path(cascade), models.hashes, models.backend)
    rivals = {
        str(folder): load_rival(folder, models.labels, cascade.max_length, runtime)
        for folder in rival
    }
    examples = load_examples(test_data, data, split="test", labels=models.labels)
    page, rows = user_report(models, chosen, examples, rivals, allow_same_split=allow_same_split)
    return Outcome(
        {f"On {len(examples)} test rows": rows}, note=f"Report: {write_report(page, out)}"
    )


@app.command
def words(out: Path, *, train: int = 8000, dev: int = 2000, test: int = 4000, seed: int = 0):
    """Write the embedded task as files: words and their number of syllables.

    Args:
        out: Folder for train.jsonl, dev.jsonl and test.jsonl.
        train: Training words.
        dev: Words to calibrate on.
        test: Words to report on.
        seed: The same seed gives the same words.
    """
    from octavo.rundir import refuse_existing

    from cascadebert.words import write_words

    refuse_existing(out, overwrite=False)
    sizes = {"train": train, "dev": dev, "test": test}
    write_words(out, list(sizes.items()), seed)
    rows = [{"split": name, "words": size} for name, size in sizes.items()]
    return Outcome({f"Written to {out}": rows})


@app.command
def demo(
    *,
    profile: Literal["quick", "full"] = "quick",
    seeds: Seeds = (0,),
    data: Path | None = None,
    out: Path = Path("runs/cascadebert-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Run the method from end to end offline and judge the paper's claims.

    The models are so small that one CPU thread is used unless --threads says otherwise: a second
    one gains little, and loses much beside other work.

    Args:
        profile: quick (one or two minutes) or full (a quarter of an hour, with every rival).
        seeds: Seeds to repeat it with; claims are judged on their means, like 0,1,2.
        data: Folder with a pronouncing dictionary (cmudict.dict or .gz), for real words.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from cascadebert.demo import run_demo

    runtime = replace(runtime, threads=runtime.threads or 1)
    runtime.start()
    return run_demo(profile, seeds, out, overwrite, runtime, data)


@app.command
def serve(
    cascade: Flat[CascadeConfig],
    config: Flat[ServeConfig] = ServeConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> None:
    """Answer over HTTP; each stage batches what all callers send it or earlier stages defer to it.

    The stages compute at the same time: --threads is of each, by default they share the cores.
    """
    from cascadebert.serving.process import check_serve, run_service

    check_serve(config)
    runtime.start()
    policies = config.policy or (_policy_path(cascade),)
    run_service(lambda: _load(cascade, runtime), policies, config, runtime.threads)


@contextmanager
def _training(
    config: TrainConfig | DifficultyConfig | BaselineConfig,
    data: DataConfig,
    runtime: Runtime,
    check_options: Callable[[], object],
    check_rows: Callable[[int], object] = lambda rows: None,
) -> Iterator[tuple["Examples", list[str], "RunDir"]]:
    """Labelled rows, their label names and the open run, once everything has been checked.

    Args:
        config: names the rows and the run's folder.
        data: how the rows are read.
        runtime: started here.
        check_options: raises before rows are read.
        check_rows: raises for so many rows, before anything is written.
    """
    from octavo.rundir import RunDir, options_of

    from cascadebert.data import label_names, load_examples

    runtime.start()
    check_options()
    examples = load_examples(config.train_data, data, split="train")
    check_rows(len(examples))
    labels = label_names(examples, config.train_data)
    with RunDir.open(config.out, options_of(config, data, runtime), config.overwrite) as run:
        yield examples, labels, run


def _load(config: CascadeConfig, runtime: Runtime) -> "Cascade":
    from octavo.errors import ConfigError
    from octavo.runtime import world_size

    from cascadebert.cascade import Cascade

    if world_size() > 1:
        raise ConfigError(
            "only `train`, `difficulty` and `baseline` run under torchrun; start it alone"
        )
    return Cascade.from_pretrained(
        config.model,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        backend=config.backend,
        allow_partial=config.allow_partial,
        runtime=runtime,
    )


def _achieved_speedups(policy: "Policy") -> dict[str, float]:
    """What the calibration rows gave in every unit of cost."""
    from cascadebert.cost import speedup

    shares = [policy.achieved[f"share_{i}"] for i in range(1, len(policy.thresholds) + 2)]
    return {unit: speedup(costs, shares) for unit, costs in policy.costs.items()}


def _policy_path(cascade: CascadeConfig) -> Path:
    """Where a cascade's policy lies unless the user says otherwise."""
    from octavo.errors import ConfigError

    if len(cascade.model) > 1:
        raise ConfigError("several models have no common folder: name the policy file")
    return Path(*cascade.model) / "policy.json"
