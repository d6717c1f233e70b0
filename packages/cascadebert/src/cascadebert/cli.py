"""The stations of the method as commands; each does what its name says on the user's own data."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.runtime import Runtime

from cascadebert.config import CalibrateConfig, CascadeConfig, DataConfig, TrainConfig

if TYPE_CHECKING:
    from cascadebert.cascade import Cascade

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
    from octavo.rundir import RunDir, options_of

    from cascadebert.data import load_examples
    from cascadebert.train import check_models, train_cascade

    runtime.start()
    check_models(config)
    examples = load_examples(config.train_data, data, split="train")
    options = options_of(config, data, runtime)
    with RunDir.open(config.out, options, config.overwrite) as run:
        labels = train_cascade(examples, config, run, runtime)
    rows = [
        {"stage": number, "model": model, "folder": str(config.out / f"stage-{number}")}
        for number, model in enumerate(config.model, 1)
    ]
    return Outcome(
        {f"Trained on {len(examples)} rows, labels {', '.join(labels)}": rows},
        note=f"Next: cascadebert calibrate --model {config.out} --dev-data ROWS",
    )


@app.command
def calibrate(
    cascade: Flat[CascadeConfig],
    config: Flat[CalibrateConfig],
    data: Flat[DataConfig] = DataConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Choose the threshold for a wanted speed-up on held-out rows and write the policy."""
    from octavo.rundir import refuse_existing

    from cascadebert.data import load_examples

    runtime.start()
    out = config.out or _policy_path(cascade)
    refuse_existing(out, config.overwrite)
    models = _load(cascade, runtime)
    examples = load_examples(config.dev_data, data, split="validation", labels=models.labels)
    policy = models.calibrate(examples, config.target_speedup, config.cost)
    policy.save(out)
    row = {
        "threshold (probability)": policy.threshold_probability,
        "threshold (log-odds)": policy.threshold,
        "accuracy %": 100 * policy.achieved["accuracy"],
        f"speed-up ({policy.cost})": policy.achieved["speedup"],
    }
    for number in range(1, len(models.stages) + 1):
        row[f"stage {number} answers %"] = 100 * policy.achieved[f"share_{number}"]
    return Outcome({f"On the {len(examples)} calibration rows": [row]}, note=f"Policy: {out}")


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
    chosen = Policy.load(policy or _policy_path(cascade), models.hashes)
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
    from cascadebert.evaluate import compare
    from cascadebert.policy import Policy

    runtime.start()
    models = _load(cascade, runtime)
    chosen = Policy.load(policy or _policy_path(cascade), models.hashes)
    examples = load_examples(test_data, data, split="test", labels=models.labels)
    rows = compare(models, chosen, examples, allow_same_split=allow_same_split)
    return Outcome({f"On {len(examples)} test rows": rows})


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
    out: Path = Path("runs/cascadebert-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Run the method from end to end offline and judge the paper's claims.

    The models are so small that one CPU thread is used unless --threads says otherwise: a second
    one gains little, and loses much beside other work.

    Args:
        profile: quick (about a minute on two cores) or full (about five).
        seeds: Seeds to repeat it with; claims are judged on their means, like 0,1,2.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from cascadebert.demo import run_demo

    runtime = replace(runtime, threads=runtime.threads or 1)
    runtime.start()
    return run_demo(profile, seeds, out, overwrite, runtime)


def _load(config: CascadeConfig, runtime: Runtime) -> "Cascade":
    from cascadebert.cascade import Cascade

    return Cascade.from_pretrained(
        config.model,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        runtime=runtime,
    )


def _policy_path(cascade: CascadeConfig) -> Path:
    """Where a cascade's policy lies unless the user says otherwise."""
    from octavo.errors import ConfigError

    if len(cascade.model) > 1:
        raise ConfigError("several models have no common folder: name the policy file")
    return Path(*cascade.model) / "policy.json"
