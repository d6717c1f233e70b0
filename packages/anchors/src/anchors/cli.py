"""The stations of the method as commands, each on the user's own model and rows."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.errors import ConfigError
from octavo.runtime import Runtime

from anchors.config import PromptOptions, ReweightConfig

app = make_app(
    "anchors",
    "See how in-context learning flows through a language model's label words, and use it.",
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
    from anchors.session import ready

    with ready("flow", model, options, runtime, {"per_head": per_head}) as session:
        rows = flow_rows(
            session.model, session.prompts, session.labels, options.batch_size, per_head
        )
        table = f"Saliency, mean of {len(session.prompts)} prompts (95 % interval)"
        return session.told({table: rows})


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
    from anchors.session import ready

    with ready("block", model, options, runtime, {"window": window}) as session:
        rows = block_rows(
            session.model, session.prompts, session.labels, window, runtime.seed, options.batch_size
        )
        table = f"Isolation, {len(session.prompts)} prompts (95 % interval)"
        return session.told({table: rows})


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
    from anchors.session import ready

    with ready("read", model, options, runtime, {"per_head": per_head}) as session:
        tables = read_tables(
            session.model, session.prompts, session.labels, options.batch_size, per_head
        )
        return session.told(tables)


@app.command
def view(
    model: str,
    options: Flat[PromptOptions],
    *,
    number: int = 0,
    text: str | None = None,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """The flow through one prompt, token by token; with --out as a page to explore in a browser.

    Args:
        model: Folder or hub id of a causal language model.
        number: Which of the texts drawn is shown, counted from 0.
        text: A text of your own instead; the model's own prediction is then taken for its label.
    """
    from octavo.rundir import write_text

    from anchors.session import ready
    from anchors.view import chosen_prompt, view_prompt

    with ready("view", model, options, runtime, {"number": number, "text": text}) as session:
        prompt, label = chosen_prompt(session, number, text)
        which = f"text {number} of {options.data}" if text is None else "a text of the user's own"
        about = (
            f"Model {model}; demonstrations of {options.train_data}, seed {runtime.seed}; {which}."
        )
        tables, page = view_prompt(
            session.model, session.tokenizer, session.drawn.task, prompt, label, about
        )
        return session.told(
            tables, lambda folder: write_text(folder / "view.html", page), "view.html"
        )


@app.command
def evaluate(
    model: str,
    options: Flat[PromptOptions],
    *,
    adapter: Path | None = None,
    cache: Path | None = None,
    rival_shots: int = 5,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Accuracy: as it is, with more demonstrations, calibrated; or with a saved adapter or cache.

    Args:
        model: Folder or hub id of a causal language model.
        adapter: Folder that `anchors reweight` saved; its task and demonstrations are used.
        cache: Folder that `anchors compress` saved; its task and demonstrations are used.
        rival_shots: Demonstrations of each class in a second, longer prompt; 0 for none.
    """
    from anchors import cache as caches
    from anchors import reweight as reweighting
    from anchors.comparisons import accuracy_rows
    from anchors.session import ready

    if rival_shots < 0:
        raise ConfigError(f"--rival-shots {rival_shots}: must be 0 or more")
    choice = {"adapter": adapter and str(adapter), "cache": cache and str(cache),
              "rival_shots": rival_shots}  # fmt: skip
    made = None
    if adapter or cache:
        made = caches.made_with(adapter, cache, options)
    with ready("evaluate", model, options, runtime, choice, made) as session:
        chosen = session.vanilla()
        found: dict[str, Any] = {"vanilla": chosen}
        if adapter:
            weighter = reweighting.Reweighter.load(adapter, session.model)
            chosen = session.predict(session.prompts, around=weighter.around(session.model))
            found["re-weighted"] = chosen
        elif cache:
            kept = caches.PromptCache.load(cache, session.model)
            chosen = session.predict(session.prompts, cache=kept)
            found["compressed"] = chosen
        else:
            found = session.rivals(chosen, rival_shots)
        return session.told(
            {f"Accuracy, {len(session.prompts)} texts": accuracy_rows(found, session.labels)},
            lambda folder: session.write_predictions(folder / "predictions.jsonl", chosen),
        )


@app.command
def reweight(
    model: str,
    options: Flat[PromptOptions],
    *,
    config: Flat[ReweightConfig] = ReweightConfig(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Learn how much of each label word each head should read, save it, and compare it with rivals.

    Args:
        model: Folder or hub id of a causal language model.
    """
    from anchors.cache import remember
    from anchors.comparisons import accuracy_rows
    from anchors.reweight import Reweighter
    from anchors.session import ready

    config.check()
    with ready("reweight", model, options, runtime, asdict(config)) as session:
        drawn = session.drawn
        rows = drawn.examples(config.train_per_class, runtime.seed)
        about = remember(drawn.task, drawn.shown) | {
            "trained on": f"{len(rows)} texts", "trained texts": [row.key for row in rows],
        }  # fmt: skip
        weighter = Reweighter(session.model, len(drawn.task.labels), about | asdict(config))
        losses = weighter.fit(
            session.model, session.prompts_of(drawn, rows), [row.label for row in rows],
            config.learning_rate, config.epochs, config.train_batch_size, runtime.seed,
        )  # fmt: skip
        found = session.rivals(session.vanilla(), options.shots + config.train_per_class)
        around = weighter.around(session.model)
        found["re-weighted"] = session.predict(session.prompts, around=around)
        table = accuracy_rows(found, session.labels)
        weighter.about |= {f"accuracy, {row['method']}": row.get("accuracy") for row in table}
        epochs = [{"epoch": n + 1, "loss": loss} for n, loss in enumerate(losses)]
        return session.told(
            {f"Accuracy, {len(session.prompts)} texts": table, "Training": epochs},
            lambda folder: weighter.save(folder / "adapter"),
        )


@app.command
def compress(
    model: str,
    options: Flat[PromptOptions],
    *,
    positions: Literal["original", "compact"] = "original",
    draws: int = 20,
    choose_on: int = 4,
    eight_bits: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Keep the demonstrations' label and format words only; with rivals, loyalty, memory and speed.

    Args:
        model: Folder or hub id of a causal language model.
        positions: What follows stays where it was (original), or moves up to the kept tokens (compact;
            with rotary positions that puts it before some of them).
        draws: Random sets of tokens that the best is chosen of; 0 for none.
        choose_on: Texts of each class of the training data that it is chosen on.
        eight_bits: Save the cache with 8 bits a number.
    """
    from anchors.cache import remember
    from anchors.comparisons import compress_rows
    from anchors.session import ready

    if draws < 0 or choose_on < 1:
        raise ConfigError(f"--draws {draws}, --choose-on {choose_on}: must be 0 and 1 or more")
    choice = {"positions": positions, "draws": draws, "choose_on": choose_on, "bits": eight_bits}
    with ready("compress", model, options, runtime, choice) as session:
        drawn, held = session.drawn, []
        if draws:
            rows = drawn.examples(choose_on, runtime.seed)
            held = session.prompts_of(drawn, rows)
        rows, kept = compress_rows(
            session.model, session.prompts, session.labels, held, positions, draws, runtime.seed,
            options.batch_size,
        )  # fmt: skip
        kept = replace(kept, about={**kept.about, **remember(drawn.task, drawn.shown)})
        kept = kept.quantized() if eight_bits else kept
        table = f"Compression, {len(session.prompts)} texts (95 % interval)"
        return session.told({table: rows}, lambda folder: kept.save(folder / "cache"))


@app.command
def diagnose(
    model: str,
    options: Flat[PromptOptions],
    *,
    variance: float = 0.9,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Which classes will be confused, as the anchors' keys tell it, and which really are.

    Args:
        model: Folder or hub id of a causal language model.
        variance: Share of the queries' variance that the principal directions kept must have.
    """
    from anchors.comparisons import diagnose_tables
    from anchors.diagnose import diagnose as compare
    from anchors.session import ready

    with ready("diagnose", model, options, runtime, {"variance": variance}) as session:
        found = compare(
            session.model,
            session.prompts,
            session.labels,
            variance,
            options.batch_size,
            seed=runtime.seed,
        )
        tables = diagnose_tables(found, session.drawn.task.labels)
        return session.told(tables)


@app.command
def report(runs: list[Path], *, out: Path, overwrite: bool = False) -> Outcome:
    """Put the results of several commands into one report.

    Args:
        runs: Folders that other commands wrote with --out.
        out: Folder of the report.
        overwrite: Start anew where a report already lies.
    """
    from anchors.report import combined

    return Outcome({}, note=f"Report: {combined(runs, out, overwrite)}")


@app.command
def demo(
    profile: Literal["quick", "full"] = "quick",
    *,
    data: Path | None = None,
    model: str | None = None,
    seeds: Seeds = (0,),
    out: Path = Path("anchors-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train a small model that learns in context, and judge the paper's claims on it, offline.

    Args:
        profile: quick (about a minute) or full (longer training, more prompts).
        data: Folder of real sets to analyse instead, with files like sst2_train.tsv and sst2_test.tsv.
        model: Folder or hub id of the model to analyse on them; by default a small stand-in.
        seeds: Seeds to repeat it with; claims are judged on their means, like 3,4,5.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from anchors.demo import run_demo
    from anchors.real import run_real

    if model and not data:
        raise ConfigError("--model: give the --data that it is to be analysed on")
    runtime.start()
    if data:
        return run_real(data, model, profile, seeds, out, overwrite, runtime)
    return run_demo(profile, seeds, out, overwrite, runtime)
