"""The stations of the method as commands, each on the user's own texts and senses."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cyclopts import App
from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.errors import ConfigError
from octavo.runtime import Runtime

from formbert.config import (
    AnswerOptions,
    FitOptions,
    ModelOptions,
    ObjectiveOptions,
    Preset,
    SystemOptions,
)

app = make_app(
    "formbert", "Which sense a Chinese word has in a text, with the help of how words are formed."
)
data = App(
    name="data", help="Check files of senses and instances, or bring public sets into shape."
)
app.command(data)
main = partial(run, app)


@app.command
def demo(
    profile: Literal["quick", "full"] = "quick",
    *,
    data: Path | None = None,
    seeds: Seeds = (0,),
    out: Path = Path("formbert-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Teach small models the bundled lexicon, and judge what formations give, offline.

    Args:
        profile: quick (a minute or two) or full (all systems, longer training).
        data: Folder with MiCLS (inventory.jsonl.gz and instances.jsonl.gz) to use instead.
        seeds: Seeds to repeat it with; claims are judged on their means, like 3,4,5.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from formbert.demo import run_demo
    from formbert.real import run_real

    runtime.start()
    if data:
        return run_real(data, profile, seeds, out, overwrite, runtime)
    return run_demo(profile, seeds, out, overwrite, runtime)


@app.command
def train(
    encoder: str,
    *,
    train_data: str,
    inventory: str,
    out: Path,
    train_split: str = "train",
    held_out_data: str | None = None,
    held_out_split: str | None = None,
    formation_lexicon: str | None = None,
    formation_predictor: str | None = None,
    preset: Preset = "best",
    model: Flat[ModelOptions] = ModelOptions(),
    objective: Flat[ObjectiveOptions] = ObjectiveOptions(),
    options: Flat[FitOptions] = FitOptions(),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train a model on instances with right senses; it lies in OUT/model.

    Args:
        encoder: Folder or hub id of an encoder, like hfl/chinese-bert-wwm-ext.
        train_data: File of instances (jsonl, csv, tsv, parquet).
        train_split: Part of it, where it has a column `split`.
        inventory: File of senses, or `mini`.
        out: Folder of the run.
        held_out_data: Instances to choose the best epoch by; a tenth of the training texts by default.
        held_out_split: Part of them.
        formation_lexicon: File of words and formations, for senses without an annotation.
        formation_predictor: Folder or hub id of a formation predictor.
        preset: best, or as others have it: paper (the authors' code), glossbert, bem, ltrs.
        overwrite: Start anew where a run already lies.
    """
    from octavo.rundir import RunDir, options_of

    from formbert.config import check, with_preset
    from formbert.inventory import Inventory
    from formbert.stations import settings, trained
    from formbert.systems import sources_of

    model = with_preset(model, preset)
    objective, options = with_preset(objective, preset), with_preset(options, preset)
    check(model, objective)
    runtime.start()
    given = {
        "encoder": encoder, "train_data": train_data, "train_split": train_split,
        "held_out_data": held_out_data, "held_out_split": held_out_split,
        "inventory": inventory, "formation_lexicon": formation_lexicon,
        "formation_predictor": formation_predictor,
    }  # fmt: skip
    everything = options_of(settings(given, model, objective, options, runtime))
    with RunDir.open(out, everything, overwrite) as folder:
        senses = Inventory.load(inventory)
        sources = sources_of(formation_lexicon, formation_predictor)
        rows = trained(
            encoder, train_data, train_split, held_out_data, held_out_split, senses, folder, model,
            objective, options, sources,
            runtime,
        )  # fmt: skip
        folder.write_json("evaluation.json", rows)
    return Outcome({"Development data": rows}, note=f"Model: {out / 'model'}")


@app.command
def evaluate(
    model: str,
    *,
    test_data: str,
    out: Path,
    split: str | None = None,
    train_data: str | None = None,
    train_split: str = "train",
    system: Flat[SystemOptions],
    answer: Flat[AnswerOptions] = AnswerOptions(),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Accuracy with intervals: all, polysemous, where formations differ, new words; with predictions.

    Args:
        model: Folder or hub id of a trained model; or a baseline's name, like lesk-tfidf.
        test_data: File of instances with right senses.
        out: Folder of the results.
        split: Part of the file, where it has a column of parts.
        train_data: What was trained on, to tell new words and senses from seen ones.
        train_split: Part of it.
        overwrite: Start anew where results already lie.
    """
    from octavo.rundir import RunDir, options_of

    from formbert.stations import evaluated, settings
    from formbert.systems import system_or_baseline

    runtime.start()
    given = {"model": model, "test_data": test_data, "split": split, "train_data": train_data,
             "train_split": train_split}  # fmt: skip
    answer = replace(answer, top_k=0)  # what is measured takes all candidates
    everything = options_of(settings(given, system, answer, runtime))
    with RunDir.open(out, everything, overwrite) as folder:
        wsd = system_or_baseline(model, train_data, train_split, system, answer, runtime)
        rows, about = evaluated(wsd, test_data, train_data, train_split, split, folder)
    return Outcome(
        {"Accuracy, %": rows, "Of polysemous words, and of pairs": about},
        note=f"Predictions: {out}",
    )


@app.command
def predict(
    model: str,
    source: str | None = None,
    *,
    out: Path | None = None,
    system: Flat[SystemOptions],
    answer: Flat[AnswerOptions] = AnswerOptions(),
    resume: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """The senses of words: of a file, or of lines `text<TAB>word[:start]` or with the word in #.

    Args:
        model: Folder or hub id of a trained model.
        source: File of instances, or a .txt of such lines; standard input where none is named.
        out: File of answers (.jsonl), written as it goes; a table is printed without.
        resume: Go on with a file that a stopped run left.
        overwrite: Replace the file.
    """
    from formbert.answers import STDIN, predicted, questions_of
    from formbert.systems import system as make_system

    runtime.start()
    _check_out(out, resume, overwrite)
    wsd = make_system(model, system, answer, runtime)
    if out is None:
        rows = [_row(one) for one in wsd.stream(questions_of(source or STDIN))]
        return Outcome({"Senses": rows})
    count = predicted(wsd, source or STDIN, out, resume, overwrite)
    return Outcome(note=f"{count} answers: {out}")


def _check_out(out: Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse a file that would be lost, before any work is done."""
    from octavo.rundir import refuse_existing

    if out is None and resume:
        raise ConfigError("--resume: name the file to go on with by --out")
    if out is not None and not resume:
        refuse_existing(out, overwrite)


def _row(answer: Any) -> dict[str, Any]:
    return {
        "word": answer.word, "sense": answer.sense_id, "gloss": answer.gloss,
        "probability": answer.probability, "formation": answer.formation,
        "note": answer.reason or ("unsure" if answer.abstained else ""),
    }  # fmt: skip


@app.command
def tag(
    model: str,
    source: str,
    *,
    out: Path | None = None,
    segmenter: Literal["maxmatch", "jieba"] = "maxmatch",
    system: Flat[SystemOptions],
    answer: Flat[AnswerOptions] = AnswerOptions(),
    resume: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Find an inventory's words in running text, and the sense of each.

    Args:
        model: Folder or hub id of a trained model.
        source: Text file, a sentence or paragraph a line.
        out: File of tagged lines (.jsonl), written as it goes; a table is printed without.
        segmenter: maxmatch (the inventory's longest words), or jieba (its extra).
        resume: Go on with a file that a stopped run left.
        overwrite: Replace the file.
    """
    from formbert.answers import tag_table, tagged
    from formbert.systems import system as make_system

    runtime.start()
    _check_out(out, resume, overwrite)
    wsd = make_system(model, system, answer, runtime)
    if out is None:
        return Outcome({"Words": tag_table(wsd, source, segmenter)})
    count = tagged(wsd, source, segmenter, out, resume, overwrite)
    return Outcome(note=f"{count} lines: {out}")


@app.command
def margin(
    model: str,
    *,
    held_out_data: str,
    system: Flat[SystemOptions],
    answer: Flat[AnswerOptions] = AnswerOptions(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """The --margin at which asking the --second model only where the first is unsure costs little.

    Args:
        model: Folder or hub id of the fast model.
        held_out_data: Instances with right senses.
    """
    from formbert.systems import margin_for

    runtime.start()
    if system.second is None:
        raise ConfigError("--second: name the model that is to be asked")
    rows = margin_for(model, system, held_out_data, answer, runtime)
    return Outcome({"Asking again": rows})


@app.command
def formation(
    *words: str,
    model: str | None = None,
    file: Path | None = None,
    train_data: str | None = None,
    inventory: str | None = None,
    top_k: int = 3,
    out: Path | None = None,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """How words are formed, with probabilities; or train what tells it.

    Args:
        words: Words; those of --file come first.
        model: Folder of a predictor; without it, what an inventory's annotations say.
        file: File with a column `word` (and `gloss`, `pos` where known).
        train_data: Inventory with formations to train a predictor on, into --out.
        inventory: Inventory whose annotations answer first.
        top_k: Formations told a word.
        out: Folder of a predictor that is trained, or file (.jsonl) of the answers.
        overwrite: Replace it.
    """
    from formbert.formed import formed, train_formation

    runtime.start()
    if train_data:
        return train_formation(train_data, out, overwrite, runtime)
    return formed(words, model, file, inventory, top_k, out, overwrite)


@app.command
def cache(
    model: str,
    *,
    system: Flat[SystemOptions],
    answer: Flat[AnswerOptions] = AnswerOptions(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Compute the vectors of all glosses of an inventory once, for a bi-encoder's later calls.

    Args:
        model: Folder or hub id of a bi-encoder.
    """
    from formbert.systems import system as make_system

    runtime.start()
    if system.cache is None:
        raise ConfigError("--cache: name the folder of the glosses' vectors")
    count = make_system(model, system, answer, runtime).cache_glosses()
    return Outcome(note=f"{count} glosses: {system.cache}")


@data.command
def check(file: Path, *, inventory: str | None = None) -> Outcome:
    """All that is wrong with a file of senses or instances, line by line.

    Args:
        file: To be checked.
        inventory: Senses that instances must be of.
    """
    from formbert.check import check_data
    from formbert.inventory import Inventory

    problems = check_data(file, Inventory.load(inventory) if inventory else None)
    errors = sum(problem["severity"] == "error" for problem in problems)
    return Outcome(
        {"Problems": problems} if problems else {},
        note=f"{file}: {errors} errors, {len(problems) - errors} warnings",
        no=f"{file}: {errors} errors" if errors else "",
    )


@data.command(name="import")
def import_(kind: str, source: Path, *, out: Path, overwrite: bool = False) -> Outcome:
    """Bring a public set into shape: micls, micls-oov, ficls, mordis, sememewsd, mclwic, raganato, ...

    Args:
        kind: Its layout.
        source: Its file or folder.
        out: Folder of inventory.jsonl and instances.jsonl.
        overwrite: Replace what lies there.
    """
    from formbert.importers import import_data

    counts = import_data(kind, source, out, overwrite)
    return Outcome({"Met": [{"what": name, "count": many} for name, many in counts.items()]},
                   note=f"Files: {out}")  # fmt: skip


@app.command
def compare(
    first: Path,
    second: Path,
    *,
    test_data: str,
    inventory: str,
    split: str | None = None,
    train_data: str | None = None,
    train_split: str = "train",
) -> Outcome:
    """Two systems on the same instances: differences with intervals and p-values, subset by subset.

    Args:
        first: Folder of an evaluation, or file of predictions.
        second: The other one's.
        test_data: The instances, with right senses.
        inventory: File of senses, or `mini`.
        split: Part of the file, where it has a column of parts.
        train_data: What was trained on, to tell new words and senses from seen ones.
        train_split: Part of it.
    """
    from formbert.data import read_instances
    from formbert.inventory import Inventory
    from formbert.stations import compared

    senses = Inventory.load(inventory)
    known = read_instances(train_data, train_split, senses) if train_data else []
    rows = compared(first, second, test_data, senses, split, known)
    return Outcome({f"{second.name} against {first.name}, points": rows})


@app.command
def report(
    runs: list[Path],
    *,
    test_data: str,
    inventory: str,
    split: str | None = None,
    out: Path,
    overwrite: bool = False,
) -> Outcome:
    """Put several systems' evaluations into one report with figures.

    Args:
        runs: Folders that `formbert evaluate` wrote.
        test_data: The instances, with right senses.
        inventory: File of senses, or `mini`.
        split: Part of the file, where it has a column of parts.
        out: Folder of the report.
        overwrite: Start anew where a report already lies.
    """
    from formbert.inventory import Inventory
    from formbert.report import reported

    page = reported(runs, test_data, Inventory.load(inventory), split, out, overwrite)
    return Outcome(note=f"Report: {page}")


@app.command
def export(model: Path, *, int8: bool = False, overwrite: bool = False) -> Outcome:
    """Write a model as ONNX beside its weights, for serving on CPUs; checked against it first.

    Args:
        model: Folder of a trained model.
        int8: Weights in 8 bits.
        overwrite: Replace an export.
    """
    from formbert.export import export_model

    return Outcome({"Export": export_model(model, int8, overwrite)})


@app.command
def convert(
    source: Path, *, out: Path, allow_pickle: bool = False, overwrite: bool = False
) -> Outcome:
    """Turn a checkpoint of the authors' code into a model of this package.

    Args:
        source: Its folder.
        out: Folder of the model.
        allow_pickle: Read pytorch_model.bin where there is no safetensors file, weights alone.
        overwrite: Replace the folder.
    """
    from formbert.authors import convert as converted

    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists already; choose another name or add --overwrite")
    converted(source, out, allow_pickle)
    return Outcome(note=f"Model: {out}")
