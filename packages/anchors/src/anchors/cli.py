"""The stations of the method as commands, each on the user's own model and rows."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.runtime import Runtime

from anchors.config import PromptOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from anchors.prompts import Prompt

app = make_app(
    "anchors",
    "See how in-context learning flows through the label words of any causal language model.",
)
main = partial(run, app)


@app.command
def flow(
    model: str,
    options: Flat[PromptOptions],
    *,
    per_head: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Saliency of the flow into label words, from them to the target, and of the rest, by layer.

    Args:
        model: Folder or hub id of a causal language model.
        per_head: Keep heads apart.
    """
    from anchors.analyses import flow_rows
    from anchors.report import flow_figure

    loaded, prompts, labels = _ready(model, options, runtime)
    rows = flow_rows(loaded, prompts, labels, options.batch_size, per_head)
    table = f"Saliency, mean of {len(prompts)} prompts (95 % interval)"
    return _told("flow", model, options, runtime, {table: rows}, per_head, flow_figure)


@app.command
def block(
    model: str,
    options: Flat[PromptOptions],
    *,
    window: int = 5,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Isolate label words, or as many other tokens, in the first or last layers: what stays?

    Args:
        model: Folder or hub id of a causal language model.
        window: Layers isolated together, at most the model's.
    """
    from anchors.analyses import block_rows
    from anchors.report import block_figure

    loaded, prompts, labels = _ready(model, options, runtime)
    rows = block_rows(loaded, prompts, labels, window, runtime.seed, options.batch_size)
    table = f"Isolation, {len(prompts)} prompts (95 % interval)"
    return _told("block", model, options, runtime, {table: rows}, window, block_figure)


@app.command
def read(
    model: str,
    options: Flat[PromptOptions],
    *,
    per_head: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """How well the target's attention on label words tells the prediction, by layer: AUC and R.

    Args:
        model: Folder or hub id of a causal language model.
        per_head: Show the AUC of each head too.
    """
    from anchors.analyses import read_tables
    from anchors.report import read_figure

    loaded, prompts, labels = _ready(model, options, runtime)
    tables = read_tables(loaded, prompts, labels, options.batch_size, per_head)
    return _told("read", model, options, runtime, tables, per_head, read_figure)


@app.command
def demo(
    profile: Literal["quick", "full"] = "quick",
    *,
    seeds: Seeds = (0,),
    out: Path = Path("anchors-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train a small model that learns in context, and judge the paper's claims on it, offline.

    Args:
        profile: quick (about a minute) or full (longer training, more prompts).
        seeds: Seeds to repeat it with; claims are judged on their means, like 3,4,5.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from anchors.demo import run_demo

    runtime.start()
    return run_demo(profile, seeds, out, overwrite, runtime)


def _ready(
    source: str, options: PromptOptions, runtime: Runtime
) -> "tuple[PreTrainedModel, list[Prompt], list[int]]":
    """The model on its device, the prompts and their true classes."""
    from octavo.models import load_model, load_tokenizer
    from transformers import AutoModelForCausalLM

    from anchors.data import build_prompts

    options.check()
    options.chosen_task()
    device = runtime.start()
    tokenizer = load_tokenizer(source)
    model = load_model(AutoModelForCausalLM, source, dtype=runtime.torch_dtype()).to(device)  # pyright: ignore
    longest = getattr(model.config, "max_position_embeddings", None) or 10**9
    prompts, labels = build_prompts(options, tokenizer, runtime.seed, longest)
    return model, prompts, labels


def _told(
    name: str,
    model: str,
    options: PromptOptions,
    runtime: Runtime,
    tables: dict[str, Any],
    choice: Any,
    figure: Any,
) -> Outcome:
    """The outcome, and with --out its folder: `result.json`, `report.md` and `report.html`."""
    if options.out is None:
        return Outcome(tables)
    from octavo.report import Report
    from octavo.rundir import RunDir, options_of

    given = options_of(options, runtime, {"command": name, "model": model, "choice": choice})
    with RunDir.open(options.out, given, options.overwrite) as opened:
        opened.write_json("result.json", tables)
        report = Report(f"anchors {name}")
        report.text(f"Model {model}, texts {options.data}, seed {runtime.seed}.")
        for caption, rows in tables.items():
            report.table(caption, rows)
        report.figure(name, figure(next(iter(tables.values()))))
        page = report.save(options.out)
    return Outcome(tables, note=f"Report: {page}")
