"""The stations of the method as commands, each on the user's own model and rows."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.errors import ConfigError
from octavo.rundir import RunDir, options_of
from octavo.runtime import Runtime
from octavo.training import TrainOptions

from mathshepherd.config import (
    AnnotateConfig,
    Engine,
    PPOConfig,
    RewardConfig,
    Sampling,
    SearchConfig,
    Shaping,
)
from mathshepherd.steps import StepFormat

app = make_app(
    "mathshepherd",
    "Label solution steps by rollouts, train process reward models, verify and reinforce with them.",
)
main = partial(run, app)

#: Training of a generator and of a reward model where nothing else is said: 32 solutions an update,
#: 8 at once, so that 7B models fit.
SFT = TrainOptions(learning_rate=1e-5, epochs=3, batch_size=8, accumulate=4)
REWARD = TrainOptions(learning_rate=1e-6, epochs=1, batch_size=8, accumulate=4)


def _ended(run: RunDir, command: str, tables: dict[str, Any], note: str, no: str = "") -> Outcome:
    """The outcome, also written into the run's folder for `report`."""
    run.write_json("result.json", {"command": command, "tables": tables})
    return Outcome(tables, note=note, no=no)


@app.command
def sft(
    model: str,
    *,
    data: str,
    out: Path,
    add_words: bool = False,
    max_length: int = 512,
    lora_rank: int = 0,
    limit: int = 0,
    overwrite: bool = False,
    form: Flat[StepFormat] = StepFormat(),
    options: Flat[TrainOptions] = SFT,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Fine-tune a generator that writes its solutions in steps, a tag behind each.

    Args:
        model: Folder or hub id of a causal language model.
        data: Problems with worked solutions (GSM8K's and MATH's columns are known), or rows of steps.
        out: Folder of the run; the generator lies in its `model`.
        add_words: Add the tag and the verdicts to the tokenizer where they are not one token.
        max_length: Tokens; longer solutions are left out and counted, never cut.
        lora_rank: Train an adapter of this rank instead of all weights, and merge it; 0 for all weights.
        limit: The first so many rows; 0 for all.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    choice = {"model": model, "data": data, "add_words": add_words, "max_length": max_length,
              "lora_rank": lora_rank, "limit": limit}  # fmt: skip
    with RunDir.open(out, options_of(form, options, runtime, choice), overwrite) as run:
        tables = stations.sft(
            run, model, data, form, options, runtime, add_words, max_length, limit, lora_rank
        )
        return _ended(run, "sft", tables, f"Generator: {out / 'model'}")


@app.command
def sample(
    model: str,
    *,
    data: str,
    out: Path,
    samples: int = 8,
    shard: str = "1/1",
    limit: int = 0,
    overwrite: bool = False,
    sampling: Flat[Sampling] = Sampling(),
    engine: Flat[Engine] = Engine(),
    form: Flat[StepFormat] = StepFormat(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Sample solutions of problems: a pool to label, or candidates to verify.

    Args:
        model: Folder or hub id of a generator, or its name on the server.
        data: Problems; graded where they have answers.
        out: Folder of the run; the solutions lie in its `solutions.jsonl`.
        samples: Solutions of each problem.
        shard: Which part of the problems, like 1/4; parts are named together where they are read.
        limit: The first so many problems; 0 for all.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    choice = {"model": model, "data": data, "samples": samples, "shard": shard,
              "limit": limit}  # fmt: skip
    with RunDir.open(out, options_of(form, sampling, engine, runtime, choice), overwrite) as run:
        tables = stations.sample(
            run, model, data, samples, sampling, form, runtime, engine, limit, shard
        )
        return _ended(run, "sample", tables, f"Solutions: {out}")


@app.command
def annotate(
    model: str,
    *,
    data: list[str],
    out: Path,
    shard: str = "1/1",
    limit: int = 0,
    overwrite: bool = False,
    config: Flat[AnnotateConfig] = AnnotateConfig(),
    sampling: Flat[Sampling] = Sampling(),
    engine: Flat[Engine] = Engine(),
    form: Flat[StepFormat] = StepFormat(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Label each step by whether completions from it reach the right answer.

    A run that was killed goes on where it stopped, and ends as if it had not been. Parts made by
    several machines (--shard 1/4 to 4/4) are named together where labels are read: --data a --data b.

    Args:
        model: Folder or hub id of the completer, or its name on the server.
        data: Solutions with right answers, of `sample`; several times for several.
        out: Folder of the run; the labelled solutions lie in its `solutions.jsonl`.
        shard: Which part of the problems to label, like 1/4.
        limit: The first so many solutions; 0 for all.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    choice = {"model": model, "data": data, "shard": shard, "limit": limit}
    given = options_of(form, sampling, engine, config, runtime, choice)
    with RunDir.open(out, given, overwrite) as run:
        tables = stations.annotate(
            run, model, data, config, sampling, form, runtime, engine, shard, limit
        )
        return _ended(run, "annotate", tables, f"Labelled solutions: {out}")


@app.command
def rules(
    *,
    data: list[str],
    rule: Literal["calculator", "numbers"],
    out: Path,
    references: str | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Label steps by a rule instead of rollouts: the paper's baselines, free and without a model.

    Args:
        data: Solutions; several times for several.
        rule: calculator checks the notes <<3+4=7>>; numbers asks whether a step's result occurs in a
            right solution of the same problem.
        out: Folder of the run; the labelled solutions lie in its `solutions.jsonl`.
        references: Problems with worked solutions, for numbers; without them the right ones in --data.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    if references and rule != "numbers":
        raise ConfigError("--references: are for --rule numbers")
    choice = {"data": data, "rule": rule, "references": references}
    with RunDir.open(out, options_of(choice), overwrite) as run:
        tables = stations.rules(run, data, rule, references)
        return _ended(run, "rules", tables, f"Labelled solutions: {out}")


@app.command
def consensus(*, data: list[str], judge: list[str], out: Path, overwrite: bool = False) -> Outcome:
    """Keep the labelled solutions whose first bad step a second source of labels confirms.

    Args:
        data: Labelled solutions, of `annotate`; several times for several.
        judge: The same solutions with other labels, of `rules`, `convert` or a judge of your own; a step
            that it does not judge counts as good.
        out: Folder of the run; what both agree on lies in its `solutions.jsonl`.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    with RunDir.open(out, options_of({"data": data, "judge": judge}), overwrite) as run:
        tables = stations.consensus(run, data, judge)
        return _ended(run, "consensus", tables, f"Labelled solutions: {out}")


@app.command
def train_prm(
    model: str,
    *,
    data: list[str],
    out: Path,
    readout: Literal["tokens", "head"] = "tokens",
    lora_rank: int = 0,
    overwrite: bool = False,
    config: Flat[RewardConfig] = RewardConfig(),
    form: Flat[StepFormat] = StepFormat(),
    options: Flat[TrainOptions] = REWARD,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train a process reward model: the verdict on each step is read at its tag.

    Args:
        model: Folder or hub id of a causal language model, the generator for one.
        data: Labelled solutions, of `annotate` or `convert`; several times for several.
        out: Folder of the run; the reward model lies in its `model`.
        readout: The two verdict words' logits, or a head of its own.
        lora_rank: Train an adapter of this rank instead of all weights, and merge it; 0 for all weights.
        overwrite: Start anew where a run already lies.
    """
    return _train(
        "train-prm", model, data, out, readout, lora_rank, overwrite, config, form, options, runtime
    )


@app.command
def train_orm(
    model: str,
    *,
    data: list[str],
    out: Path,
    readout: Literal["tokens", "head"] = "tokens",
    lora_rank: int = 0,
    overwrite: bool = False,
    config: Flat[RewardConfig] = RewardConfig(),
    form: Flat[StepFormat] = StepFormat(),
    options: Flat[TrainOptions] = REWARD,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Train an outcome reward model, from the same start and read in the same way.

    Args:
        model: Folder or hub id of a causal language model, the generator for one.
        data: Graded solutions, of `sample`; several times for several.
        out: Folder of the run; the reward model lies in its `model`.
        readout: The two verdict words' logits, or a head of its own.
        lora_rank: Train an adapter of this rank instead of all weights, and merge it; 0 for all weights.
        overwrite: Start anew where a run already lies.
    """
    return _train(
        "train-orm", model, data, out, readout, lora_rank, overwrite, config, form, options, runtime
    )


def _train(
    command: str, model: str, data: list[str], out: Path, readout: Any, lora_rank: int,
    overwrite: bool, config: RewardConfig, form: StepFormat, options: TrainOptions, runtime: Runtime,
) -> Outcome:  # fmt: skip
    from mathshepherd import stations

    choice = {"command": command, "model": model, "data": data, "readout": readout,
              "lora_rank": lora_rank}  # fmt: skip
    with RunDir.open(out, options_of(form, config, options, runtime, choice), overwrite) as run:
        scope = "steps" if command == "train-prm" else "outcome"
        tables = stations.train(
            run, model, data, scope, config, options, form, runtime, readout, lora_rank
        )
        return _ended(run, command, tables, f"Reward model: {out / 'model'}")


@app.command
def score(
    model: str,
    *,
    data: list[str],
    out: Path,
    name: str = "prm",
    family: Literal["math-shepherd", "rlhflow", "skywork", "qwen"] | None = None,
    batch_tokens: int = 16384,
    skip_long: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Score the steps of solutions, one pass a solution.

    Args:
        model: Folder or hub id of a reward model.
        data: Solutions; several times for several.
        out: Folder of the run; the scored solutions lie in its `solutions.jsonl`.
        name: Of the scores among others of the same solutions.
        family: Of a public reward model; none for one that was trained here.
        batch_tokens: Tokens in one pass, padding included.
        skip_long: Give no scores to a solution that is longer than the model's context; it then never
            wins while another has an answer. Without this it is an error; nothing is ever cut.
        allow_pickle: Load a checkpoint that is only a pickle, which can run any code.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    if batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {batch_tokens}: must be 1 or more")
    choice = {"model": model, "data": data, "name": name, "family": family, "tokens": batch_tokens,
              "skip_long": skip_long}  # fmt: skip
    with RunDir.open(out, options_of(runtime, choice), overwrite) as run:
        tables = stations.score(
            run, model, data, name, runtime, family, batch_tokens, skip_long, allow_pickle
        )
        return _ended(run, "score", tables, f"Scored solutions: {out}")


@app.command
def search(
    model: str,
    *,
    reward: str,
    data: str,
    out: Path,
    family: Literal["math-shepherd", "rlhflow", "skywork", "qwen"] | None = None,
    name: str = "prm",
    shard: str = "1/1",
    limit: int = 0,
    allow_pickle: bool = False,
    overwrite: bool = False,
    config: Flat[SearchConfig] = SearchConfig(),
    sampling: Flat[Sampling] = Sampling(),
    engine: Flat[Engine] = Engine(),
    form: Flat[StepFormat] = StepFormat(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Solve problems step by step, a reward model choosing what to go on from (a small beam search).

    Args:
        model: Folder or hub id of a generator, or its name on the server.
        reward: Folder or hub id of a process reward model.
        data: Problems; graded where they have answers.
        out: Folder of the run; the solutions lie in its `solutions.jsonl`, each problem's best first.
        family: Of a public reward model; none for one that was trained here.
        name: Of the scores in the rows.
        shard: Which part of the problems, like 1/4; parts are named together where they are read.
        limit: The first so many problems; 0 for all.
        allow_pickle: Load a reward model that is only a pickle, which can run any code.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    choice = {"model": model, "reward": reward, "data": data, "family": family, "name": name,
              "shard": shard, "limit": limit}  # fmt: skip
    given = options_of(form, sampling, engine, config, runtime, choice)
    with RunDir.open(out, given, overwrite) as run:
        tables = stations.search(
            run, model, reward, data, config, sampling, form, runtime, engine, family, name, limit,
            shard, allow_pickle,
        )  # fmt: skip
        return _ended(run, "search", tables, f"Solutions: {out}")


@app.command
def verify(
    *,
    data: list[str],
    train_data: list[str] | None = None,
    out: Path | None = None,
    aggregate: tuple[Literal["min", "prod", "mean", "last", "geometric"], ...] = (
        "min", "prod", "mean", "last",
    ),
    sizes: Seeds = (),
    draws: int = 64,
    seed: int = 0,
    overwrite: bool = False,
) -> Outcome:  # fmt: skip
    """Best-of-N by each reward model, votes, and votes weighted by it, for all N from one pool.

    Args:
        data: Scored and graded candidates, of `score`; several times for several.
        train_data: What the models were trained on; candidates for the same questions are refused.
        out: Folder for the curves and their report; without it they are only printed.
        aggregate: Step scores to a solution's score; several times for several.
        sizes: Numbers of candidates, like 1,4,16; by default 1, 2, 4 and so on.
        draws: Random sets of each size, the same for every method.
        seed: Of these.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations
    from mathshepherd.report import result_report

    def found() -> dict[str, Any]:
        return stations.verify_pool(data, aggregate, sizes, draws, seed, train_data or ())

    if out is None:
        return Outcome(found())
    choice = {"data": data, "aggregate": aggregate, "sizes": sizes, "draws": draws, "seed": seed,
              "train_data": train_data}  # fmt: skip
    with RunDir.open(out, options_of(choice), overwrite) as run:
        tables = found()
        outcome = _ended(run, "verify", tables, "")
        page = result_report([{"command": "verify", "tables": tables}]).save(out)
        return replace(outcome, note=f"Report: {page}")


@app.command
def rft(
    model: str,
    *,
    data: list[str],
    out: Path,
    sft_data: str | None = None,
    max_length: int = 512,
    lora_rank: int = 0,
    overwrite: bool = False,
    form: Flat[StepFormat] = StepFormat(),
    options: Flat[TrainOptions] = SFT,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Fine-tune a generator on its own right solutions (rejection sampling).

    Args:
        model: Folder or hub id of the generator.
        data: Graded solutions, of `sample`; several times for several.
        out: Folder of the run; the generator lies in its `model`.
        sft_data: What the generator was fine-tuned on, to be kept beside them (Yuan et al. 2023).
        max_length: Tokens; longer solutions are left out and counted, never cut.
        lora_rank: Train an adapter of this rank instead of all weights, and merge it; 0 for all weights.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    choice = {"model": model, "data": data, "sft_data": sft_data, "max_length": max_length,
              "lora_rank": lora_rank}  # fmt: skip
    with RunDir.open(out, options_of(form, options, runtime, choice), overwrite) as run:
        tables = stations.rft(
            run, model, data, form, options, runtime, max_length, sft_data, lora_rank
        )
        return _ended(run, "rft", tables, f"Generator: {out / 'model'}")


@app.command
def ppo(
    model: str,
    *,
    data: str,
    out: Path,
    reward: str | None = None,
    dev_data: str | None = None,
    keep_going: bool = False,
    limit: int = 0,
    overwrite: bool = False,
    config: Flat[PPOConfig] = PPOConfig(),
    shaping: Flat[Shaping] = Shaping(),
    form: Flat[StepFormat] = StepFormat(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Reinforce a generator by the rewards of its own steps.

    The run is watched on held-out problems and stopped where its reward rises while accuracy falls,
    or its responses grow or lose their answers; the best policy on them is then kept (exit code 3).

    Args:
        model: Folder or hub id of the generator.
        data: Problems; answers are needed for --answer-weight alone.
        out: Folder of the run; the policy lies in its `model`.
        reward: Folder of a process or outcome reward model; none for the answers' reward alone.
        dev_data: Held-out problems that the run is watched on.
        keep_going: Do not stop a run that looks like reward hacking.
        limit: The first so many problems; 0 for all.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations
    from mathshepherd.monitor import Alarm

    choice = {"model": model, "data": data, "reward": reward, "dev_data": dev_data,
              "keep_going": keep_going, "limit": limit}  # fmt: skip
    given = options_of(form, config, shaping, runtime, choice)
    with RunDir.open(out, given, overwrite) as run:
        tables, stopped = stations.ppo(
            run, model, reward, data, dev_data, config, shaping, form, runtime,
            None if keep_going else Alarm(), limit,
        )  # fmt: skip
        no = f"stopped: {stopped}; the best policy so far is kept" if stopped else ""
        return _ended(run, "ppo", tables, f"Policy: {out / 'model'}", no)


@app.command
def rounds(
    model: str,
    *,
    data: str,
    out: Path,
    dev_data: str | None = None,
    count: int = 2,
    samples: int = 8,
    pool_temperature: float = 1.0,
    learning_rate_reward: float = 1e-6,
    epochs_reward: float = 1.0,
    batch_size_reward: int = 8,
    keep_going: bool = False,
    limit: int = 0,
    overwrite: bool = False,
    labels: Flat[AnnotateConfig] = AnnotateConfig(),
    config: Flat[PPOConfig] = PPOConfig(),
    shaping: Flat[Shaping] = Shaping(),
    form: Flat[StepFormat] = StepFormat(),
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Sample, label, train a reward model and reinforce, several times, each from the last policy.

    Args:
        model: Folder or hub id of the generator to begin with.
        data: Problems with answers.
        out: Folder of the runs; the last policy lies in its `round-N/ppo`.
        dev_data: Held-out problems that reinforcement is watched on.
        count: Rounds.
        samples: Solutions of each problem that are labelled in a round.
        pool_temperature: Of their sampling; completions are drawn at --temperature.
        learning_rate_reward: Of the reward model's training.
        epochs_reward: Passes over the labelled solutions.
        batch_size_reward: Solutions at once; four times as many make an update.
        keep_going: Do not stop a reinforcement that looks like reward hacking.
        limit: The first so many problems; 0 for all.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import rounds as loop
    from mathshepherd.monitor import Alarm
    from mathshepherd.stations import alone

    alone("rounds")
    if count < 1 or samples < 1:
        raise ConfigError(f"--count {count}, --samples {samples}: must be 1 or more")
    options = TrainOptions(
        learning_rate=learning_rate_reward, epochs=epochs_reward, batch_size=batch_size_reward,
        accumulate=4, gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    pool = Sampling(temperature=pool_temperature, max_new_tokens=config.max_new_tokens)
    completions = replace(pool, temperature=config.temperature)
    choice = {"model": model, "data": data, "dev_data": dev_data, "count": count, "samples": samples,
              "pool_temperature": pool_temperature, "limit": limit, "keep_going": keep_going,
              "reward": asdict(options)}  # fmt: skip
    given = options_of(labels, config, shaping, form, runtime, choice)
    with RunDir.open(out, given, overwrite) as run:
        tables, stopped = loop.rounds(
            run, model, data, dev_data, count, samples, pool, completions, labels, RewardConfig(),
            options, config, shaping, form, runtime, None if keep_going else Alarm(), limit,
        )  # fmt: skip
        no = f"stopped: {stopped}; the best policy so far is kept" if stopped else ""
        return _ended(run, "rounds", tables, f"Rounds: {out}", no)


@app.command
def processbench(
    model: str,
    *,
    data: list[str],
    out: Path,
    threshold: float | None = None,
    choose_on: str | None = None,
    family: Literal["math-shepherd", "rlhflow", "skywork", "qwen"] | None = None,
    limit: int = 0,
    allow_pickle: bool = False,
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """Find the first wrong step of ProcessBench's solutions, or PRMBench's wrong steps.

    Args:
        model: Folder or hub id of a reward model.
        data: Files as the benchmarks have them, one a subset; several times for several.
        out: Folder of the run.
        threshold: A step scored below it is wrong; 0.5 where nothing is said.
        choose_on: Subset on which the threshold is chosen instead, by its file's name.
        family: Of a public reward model; none for one that was trained here.
        limit: So many solutions from all over each file; 0 for all.
        allow_pickle: Load a checkpoint that is only a pickle, which can run any code.
        overwrite: Start anew where a run already lies.
    """
    from mathshepherd import stations

    choice = {"model": model, "data": data, "threshold": threshold, "choose_on": choose_on,
              "family": family, "limit": limit}  # fmt: skip
    with RunDir.open(out, options_of(runtime, choice), overwrite) as run:
        tables = stations.processbench(
            run, model, data, runtime, threshold, choose_on, family, limit,
            allow_pickle=allow_pickle,
        )  # fmt: skip
        return _ended(run, "processbench", tables, f"Run: {out}")


@app.command
def convert(
    data: str,
    *,
    source: str,
    target: str,
    out: Path,
    labels: Literal["hard", "soft"] = "hard",
    overwrite: bool = False,
) -> Outcome:
    """Turn labelled steps into another format; `rows` is this package's own.

    Args:
        data: File in the source's format.
        source: rows, mathshepherd, prm800k, trl, openrlhf, rlhflow, math-aps, processbench, prmbench.
        target: rows, mathshepherd, prm800k, trl, openrlhf, rlhflow or math-aps.
        out: File to write.
        labels: Which are written.
        overwrite: Replace a file that lies there.
    """
    from mathshepherd import stations

    return Outcome(
        stations.convert_rows(data, source, target, out, labels, overwrite), note=f"Rows: {out}"
    )


@app.command
def preset(name: Literal["gsm8k-1.5b", "paper-mistral", "released-prm"], *, out: Path) -> Outcome:
    """Write a whole run at real size: a script of these commands, and their options to edit.

    Args:
        name: gsm8k-1.5b: everything with Qwen2.5-Math-1.5B on one GPU; paper-mistral: the published
            numbers; released-prm: rank candidates with the authors' reward model, without training.
        out: A new folder, for `run.sh` and a file of options for each of its commands.
    """
    from mathshepherd.presets import write_preset

    asked = " ".join(f"{name}=FILE" for name in write_preset(name, out))
    return Outcome({}, note=f"{asked} bash {out / 'run.sh'}")


@app.command
def report(runs: list[Path], *, out: Path, overwrite: bool = False) -> Outcome:
    """Put the results of several commands into one report.

    Args:
        runs: Folders that other commands wrote.
        out: Folder of the report.
        overwrite: Start anew where a report already lies.
    """
    from mathshepherd.report import combined

    return Outcome({}, note=f"Report: {combined(runs, out, overwrite)}")


@app.command
def demo(
    profile: Literal["quick", "full"] = "quick",
    *,
    seeds: Seeds = (0,),
    out: Path = Path("mathshepherd-demo"),
    overwrite: bool = False,
    runtime: Flat[Runtime] = Runtime(),
) -> Outcome:
    """From fine-tuning to reinforcement on a toy shop's problems, offline, and the paper's claims on it.

    Args:
        profile: quick (about a minute) or full (about five).
        seeds: Seeds to repeat it with; claims are judged on their means, like 3,4,5.
        out: Folder of the report.
        overwrite: Start anew where a demo already lies.
    """
    from mathshepherd.demo import run_demo

    runtime.start()
    return run_demo(profile, seeds, out, overwrite, runtime)
