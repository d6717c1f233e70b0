"""The stations of the method as commands; each does what its name says on the user's own data."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.runtime import Runtime

from deepseekmoe.analyses import alone, analyze, model_and_tokens, what_was_read
from deepseekmoe.config import CorpusConfig, EvaluateConfig, ModelConfig, PretrainConfig
from deepseekmoe.tuning import convert, esft_select, sft, upcycle

app = make_app(
    "deepseekmoe",
    "Language models with fine-grained and shared experts: train, analyse, load and run them.",
)
main = partial(run, app)

Models = Literal["2b", "16b", "145b", "tiny"]


@app.command
def train(
    corpus: Flat[CorpusConfig],
    config: Flat[PretrainConfig],
    model: Flat[ModelConfig] = ModelConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Pre-train a language model on texts, from scratch; under torchrun on several processes."""
    from octavo.rundir import RunDir, options_of
    from octavo.runtime import is_main

    from deepseekmoe.accounting import count_parameters
    from deepseekmoe.card import save_card
    from deepseekmoe.evaluate import evaluate_domains
    from deepseekmoe.parallel import main_first, processes
    from deepseekmoe.pretrain import pretrain

    runtime.start()
    options = options_of(corpus, model, config, runtime)
    with (
        processes(runtime),
        main_first(lambda: RunDir.open(config.out, options, config.overwrite)) as opened,
    ):
        trained = pretrain(model, corpus, config, opened, runtime)
        rows: Any = []
        if trained.dev is not None:
            rows = evaluate_domains(trained.model, trained.dev, config.length, config.batch_size)
            opened.write_json("evaluation.json", rows)
        if is_main():
            made = f"Trained from random weights on `{corpus.data}`, {config.steps} updates."
            save_card(config.out / "model", trained.model.config, made, rows)
    count = count_parameters(trained.model.config)
    folder = config.out / "model"
    return Outcome(
        {"Held-out text": rows},
        note=f"{count.total:,} parameters, {count.active:,} of them active a token\n"
        f"Next: deepseekmoe analyze specialization --model {folder} --data {corpus.data}",
    )


@app.command
def evaluate(
    model: str,
    corpus: Flat[CorpusConfig],
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Loss, perplexity and bits a byte of a model on texts, by domain.

    Args:
        model: Folder or hub id, in the layout of deepseek-moe-16b-base.
    """
    from deepseekmoe.evaluate import evaluate_domains

    runtime.start()
    loaded, tokens, length = model_and_tokens(model, corpus, config, runtime)
    rows: Any = evaluate_domains(loaded, tokens, length, config.batch_size)
    return Outcome({f"Windows of {length} tokens": rows}, note=what_was_read(corpus, tokens))


@app.command
def trace(
    model: str,
    corpus: Flat[CorpusConfig],
    config: Flat[EvaluateConfig] = EvaluateConfig(),
    *,
    out: Path,
    words: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Record where a model sends held-out texts, for `analyze` and `esft-select`.

    Args:
        model: Folder or hub id.
        out: File of the trace, npz.
        words: Count by token of the vocabulary too, for `analyze vocabulary`.
        overwrite: Replace the file.
    """
    from octavo.rundir import refuse_existing

    from deepseekmoe.analyze import trace_routing

    refuse_existing(out, overwrite)
    runtime.start()
    loaded, tokens, length = model_and_tokens(model, corpus, config, runtime)
    found = trace_routing(loaded, tokens, length, config.batch_size, words)
    found.save(out)
    slots = found.counts[:, 0].sum(axis=-1)
    rows = [
        {"domain": name, "layers": len(found.layers), "experts": found.counts.shape[-1],
         "tokens": int(many) // loaded.config.num_experts_per_tok}
        for name, many in zip(found.domains, slots, strict=True)
    ]  # fmt: skip
    note = f"{what_was_read(corpus, tokens)}\nNext: deepseekmoe analyze coactivation --trace {out}"
    return Outcome({"Traced": rows}, note=note)


app.command(analyze)


@app.command
def ablate(
    suite: Literal["baselines", "granularity", "shared-ratio", "balance", "half-active"],
    corpus: Flat[CorpusConfig],
    config: Flat[PretrainConfig],
    model: Flat[ModelConfig] = ModelConfig(),
    *,
    seeds: Seeds = (0,),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train models that differ in one thing at equal budgets, and compare them on held-out text.

    Args:
        suite: What differs: baselines (tables 1 and 2), granularity (figure 3), shared-ratio (section
            4.4), balance, or half-active (figure 6).
        seeds: Seeds to repeat it with; the table shows means, like 0,1,2.
    """
    from octavo.errors import ConfigError
    from octavo.rundir import RunDir, options_of

    from deepseekmoe.ablate import SUITES, train_cells
    from deepseekmoe.pretrain import open_corpus
    from deepseekmoe.report import suite_report, with_spread

    alone()
    runtime.start()
    for seed in seeds:
        replace(runtime, seed=seed).check()
    if config.keep_every:
        raise ConfigError("--keep-every: only `train` keeps models on the way; leave it out")
    if not corpus.dev_share:
        raise ConfigError("--dev-share 0: models are compared on held-out text; hold some out")
    options = options_of(corpus, model, config, runtime, {"suite": suite, "seeds": list(seeds)})
    with RunDir.open(config.out, options, config.overwrite) as opened:
        tokenizer, training, dev = open_corpus(corpus, config, opened)
        assert dev is not None
        tables = []
        for seed in seeds:
            place, here = RunDir(config.out / f"seed-{seed}"), replace(runtime, seed=seed)
            cells = train_cells(SUITES[suite], model, tokenizer, training, dev, config, place, here)
            tables.append([cell.row for cell in cells])
        rows = with_spread(tables)
        opened.write_json("table.json", rows)
        page = suite_report(suite, tables).save(config.out)
    many = f"mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return Outcome({f"{suite}, {many}": rows}, note=f"Report: {page}")


app.command(sft)
app.command(esft_select, name="esft-select")
app.command(upcycle)
app.command(convert)


@app.command
def params(
    model: str | None = None,
    *,
    preset: tuple[Models, ...] = (),
    baseline: tuple[str, ...] = (),
    baselines: bool = False,
    length: int | None = None,
) -> Outcome:
    """Total and active parameters, FLOPs and memory, from the configuration alone.

    Args:
        model: Folder or hub id of a model; by default presets.
        preset: Presets to count; by default 2b, 16b and 145b, beside baselines 2b.
        baseline: Baselines to count beside each, with experts in standard FFNs; `train` names them.
        baselines: All of them.
        length: Tokens of a sequence; by default what the model was made for.
    """
    from deepseekmoe.accounting import budget_row, cost_row
    from deepseekmoe.architecture import BASELINES, DeepseekMoeConfig
    from deepseekmoe.hub import load_moe_config

    alone()
    rivals = tuple(BASELINES) if baselines else baseline
    presets = preset or (("2b",) if rivals else ("2b", "16b", "145b"))
    configs = (
        {model: load_moe_config(model)}
        if model
        else {name: DeepseekMoeConfig.preset(name) for name in presets}
    )
    rows = []
    for name, config in configs.items():
        if not rivals:
            rows.append({"model": name} | cost_row(config, length))
            continue
        cells = {name: config} | {f"{name}, {rival}": config.baseline(rival) for rival in rivals}
        rows += [
            {"model": label} | budget_row(cell, config) | cost_row(cell, length)
            for label, cell in cells.items()
        ]
    return Outcome({"What it is made of and costs": rows})


@app.command
def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Continue a text, or answer in the released chat model's format.

    Args:
        model: Folder or hub id.
        prompt: The text to continue.
        max_new_tokens: Tokens to add at the most.
        temperature: Of sampling; 0 takes the most probable token.
        chat: Frame the prompt as a user's turn.
    """
    from octavo.errors import ConfigError

    from deepseekmoe.hub import continue_text, load

    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError("--max-new-tokens must be 1 or more, and --temperature 0 or more")
    alone()
    runtime.start()
    loaded, tokenizer = load(model, dtype=runtime.torch_dtype())
    loaded.to(runtime.torch_device())  # pyright: ignore[reportArgumentType]
    text = continue_text(loaded, tokenizer, prompt, max_new_tokens, temperature, chat)
    return Outcome({"Text": [{"prompt": prompt, "continuation": text}]})


@app.command
def check(model: str) -> Outcome:
    """Compare a checkpoint's tensors with its configuration, by name and shape, without loading it.

    Args:
        model: Folder in the layout of deepseek-moe-16b-base.
    """
    from octavo.errors import ModelError

    from deepseekmoe.accounting import cost_row, tensors
    from deepseekmoe.hub import check_folder

    alone()
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{model}: no such folder")
    config = check_folder(folder)
    row = {"tensors": len(tensors(config))} | cost_row(config)
    return Outcome({f"{model} is whole": [row]})


@app.command
def doctor(runtime: Flat[Runtime] = Runtime()) -> Outcome:
    """Which ways to compute experts work on this machine, and why others do not."""
    from deepseekmoe.experts import backend_table

    alone()
    runtime.start()
    rows: Any = backend_table(runtime.torch_device(), runtime.torch_dtype())
    return Outcome({f"Backends on {runtime.torch_device()}, {runtime.torch_dtype()}": rows})


@app.command
def demo(
    *,
    profile: Literal["quick", "full"] = "quick",
    seeds: Seeds = (3,),
    data: Path | None = None,
    out: Path = Path("runs/deepseekmoe-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train DeepSeekMoE and its rivals in small, offline, and judge the paper's claims.

    The models are so small that one CPU thread is used unless --threads says otherwise.

    Args:
        profile: quick (GShard beside DeepSeekMoE) or full (all baselines, longer).
        seeds: Seeds to repeat it with; claims are judged on their means, like 3,4,5.
        data: Folder of texts, one .txt file a domain; by default texts that any machine has.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from deepseekmoe.demo import run_demo

    alone()
    runtime = replace(runtime, threads=runtime.threads or 1)
    runtime.start()
    return run_demo(profile, seeds, out, overwrite, runtime, data)
