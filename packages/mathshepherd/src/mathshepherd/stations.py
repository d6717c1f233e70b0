"""The stations of the method on files: each reads rows and models, and leaves a run's folder.

What one leaves is what the next takes: a folder of rows (`solutions.jsonl`) or of a model (`model`).
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octavo.console import counter
from octavo.data import iter_rows
from octavo.errors import ConfigError, DataError
from octavo.models import load_tokenizer, save_model
from octavo.rundir import RunDir, refuse_existing, write_text
from octavo.runtime import Runtime, world_size
from octavo.training import TrainOptions, discard_checkpoints

from mathshepherd import convert, quality, verify
from mathshepherd.annotate import RolloutStore, shard
from mathshepherd.annotate import annotate as label
from mathshepherd.config import (
    AnnotateConfig,
    Engine,
    PPOConfig,
    RewardConfig,
    Sampling,
    SearchConfig,
    Shaping,
)
from mathshepherd.engines import open_engine
from mathshepherd.records import (
    ROWS,
    Problem,
    Solution,
    by_problem,
    key_of,
    load_problems,
    load_solutions,
    with_scores,
    without_doubles,
    write_solutions,
)
from mathshepherd.reward_model import (
    Reading,
    Readout,
    StepRewardModel,
    model_folder,
    score_solutions,
)
from mathshepherd.rules import by_calculator, by_numbers
from mathshepherd.sample import sample_solutions
from mathshepherd.search import beam_search, stop_words
from mathshepherd.sft import finetune, open_generator, right_solutions, worked
from mathshepherd.steps import StepFormat, save_format, saved_format
from mathshepherd.train_rm import train_reward

if TYPE_CHECKING:
    from mathshepherd.monitor import Alarm

Tables = dict[str, list[dict[str, Any]]]


#: Solutions that are scored before they are on the disk.
AT_ONCE = 4096


def problems_of(source: str, limit: int = 0, known: bool = False) -> list[Problem]:
    """Problems of a file or hub id, the first `limit` of them (0: all).

    Raises:
        DataError: a right answer is needed and missing, or as `load_problems`.
    """
    found = load_problems(source)
    found = found[:limit] if limit else found
    for one in found:
        if known and one.answer is None:
            raise DataError(f"{source}: problem {one.id} has no answer")
    return found


def sft(
    run: RunDir, source: str, data: str, form: StepFormat, options: TrainOptions, runtime: Runtime,
    add_words: bool = False, max_length: int = 512, limit: int = 0, lora_rank: int = 0,
) -> Tables:  # fmt: skip
    """Fine-tune a generator on worked solutions: problems with a `solution`, or rows of steps."""
    form = saved_format(model_folder(source), form)
    rows = shown_rows(data, form)
    return _finetuned(
        run, source, rows[:limit] if limit else rows, form, options, runtime, add_words, max_length,
        lora_rank,
    )  # fmt: skip


def shown_rows(data: str, form: StepFormat) -> list[tuple[str, Sequence[str]]]:
    """Questions with the steps shown for them: worked solutions of problems, or rows of steps."""
    if next(iter_rows(_rows(data), {"steps": list | None}), {}).get("steps") is not None:
        return [(one.question, one.steps) for one in load_solutions(data)]
    return list(worked(problems_of(data), form))


def rft(
    run: RunDir, source: str, data: Sequence[str], form: StepFormat, options: TrainOptions,
    runtime: Runtime, max_length: int = 512, sft_data: str | None = None, lora_rank: int = 0,
) -> Tables:  # fmt: skip
    """Fine-tune on a generator's own right solutions (rejection sampling), each text once."""
    rows = right_solutions(without_doubles(load_solutions(data)))
    if not rows:
        raise DataError(f"{', '.join(data)}: no solution is right: there is nothing to learn")
    form = saved_format(model_folder(source), form)
    rows += shown_rows(sft_data, form) if sft_data else []
    return _finetuned(run, source, rows, form, options, runtime, False, max_length, lora_rank)


def _rows(source: str) -> str | Path:
    return Path(source) / ROWS if (Path(source) / ROWS).is_file() else source


def _finetuned(
    run: RunDir, source: str, rows: Sequence[tuple[str, Sequence[str]]], form: StepFormat,
    options: TrainOptions, runtime: Runtime, add_words: bool, max_length: int, lora_rank: int,
) -> Tables:  # fmt: skip
    runtime.start()
    folder = model_folder(source)
    model, tokenizer = open_generator(folder, form, add_words)
    new_words = range(len(load_tokenizer(folder)), len(tokenizer))
    model, dropped = finetune(
        model, tokenizer, rows, form, run, options, runtime, max_length, lora_rank=lora_rank,
        new_words=new_words,
    )  # fmt: skip
    save_generator(run, model, tokenizer, form)
    discard_checkpoints(run, "sft")
    return {
        "Fine-tuning": [
            {"solutions": len(rows) - dropped, "too long": dropped, "epochs": options.epochs}
        ]
    }


def save_generator(run: RunDir, model: Any, tokenizer: Any, form: StepFormat) -> None:
    """Write a generator into a run's folder `model`, with how it writes solutions."""
    save_model(run.path / "model", model, tokenizer)
    save_format(run.path / "model", form)


def sample(
    run: RunDir, source: str, data: str, samples: int, sampling: Sampling, form: StepFormat,
    runtime: Runtime, engine: Engine = Engine(), limit: int = 0, part: str = "1/1",
) -> Tables:  # fmt: skip
    """Sample solutions of problems, graded where answers are known; a killed run goes on."""
    alone("sample")
    if samples < 1:
        raise ConfigError(f"--samples {samples}: must be 1 or more")
    problems = shard(problems_of(data, limit), part)
    form = saved_format(model_folder(source), form)
    generator = open_engine(source, sampling, runtime, engine)
    found = in_parts(
        run, problems, many(engine),
        lambda part: sample_solutions(
            part, generator, form, samples, runtime.seed, chunk=len(part)
        ),
    )  # fmt: skip
    return {"Solutions": [sample_row(problems, found)]}


def search(
    run: RunDir, source: str, reward: str, data: str, config: SearchConfig, sampling: Sampling,
    form: StepFormat, runtime: Runtime, engine: Engine = Engine(), family: str | None = None,
    name: str = "prm", limit: int = 0, part: str = "1/1", allow_pickle: bool = False,
) -> Tables:  # fmt: skip
    """Find solutions by a search over steps that a reward model guides; a killed run goes on."""
    from mathshepherd.adapters import open_scorer

    alone("search")
    problems = shard(problems_of(data, limit), part)
    form = saved_format(model_folder(source), form)
    device = runtime.start()
    scorer = open_scorer(reward, family, device, runtime.torch_dtype(), allow_pickle)
    if isinstance(scorer, StepRewardModel) and scorer.reading.scope == "outcome":
        raise ConfigError(
            f"--reward {reward}: judges whole solutions, and a search needs its steps'"
        )
    generator = open_engine(source, sampling, runtime, engine, stop_words(form))
    found = in_parts(
        run, problems, many(engine),
        lambda part: beam_search(
            part, generator, scorer, config, form, runtime.seed, name=name,
            max_tokens=sampling.max_new_tokens,
        )[0],
    )  # fmt: skip
    each = list(by_problem(found).values())
    best = [some[0] for some in each]
    return {"Search": [{
        "problems": len(problems), "solutions": len(found),
        "steps": sum(len(one.steps) for one in best) / len(best),
        "answered": _share(one.predicted is not None for one in best),
        "best right": _share(one.correct for one in best if one.correct is not None),
        "some right": _share(
            any(one.correct for one in some) for some in each if some[0].correct is not None
        ),
    }]}  # fmt: skip


def in_parts(
    run: RunDir, problems: Sequence[Problem], size: int,
    make: Callable[[Sequence[Problem]], list[Solution]],
) -> list[Solution]:  # fmt: skip
    """Solutions of problems, so many problems at once, each part on the disk before the next.

    What a killed run has is not made again, but for the last problem, whose rows may not be all.
    """
    partial = run.path / "partial.jsonl"
    found = unfinished(partial)
    if found:
        found = [one for one in found if one.problem != found[-1].problem]
        write_solutions(partial, found)
    left = problems[len({one.problem for one in found}) :]
    with counter("solving", len(left), "problems") as advance:
        for start in range(0, len(left), size):
            made = make(left[start : start + size])
            append_rows(partial, made)
            found += made
            advance(len(left[start : start + size]))
    write_solutions(run.path / ROWS, found)
    partial.unlink(missing_ok=True)
    return found


def many(engine: Engine) -> int:
    """Texts handed to an engine at once; one that fills its own batches gets more."""
    return 64 if engine.engine == "local" else 512


def append_rows(file: Path, solutions: Sequence[Solution]) -> None:
    """Add rows to a file; they are on the disk when this returns."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(one.row(), ensure_ascii=False) + "\n" for one in solutions))
        opened.flush()
        os.fsync(opened.fileno())


def unfinished(file: Path) -> list[Solution]:
    """The whole rows that a killed run left; half a line at the end is taken off."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    with file.open("rb+") as opened:
        opened.truncate(len(whole))
    return load_solutions(file) if whole else []


def alone(command: str) -> None:
    """Refuse several processes where there is nothing for them to share.

    Raises:
        ConfigError: there are several.
    """
    if world_size() > 1:
        raise ConfigError(f"{command}: runs in one process; start several with --shard 1/4 to 4/4")


def sample_row(problems: Sequence[Problem], solutions: Sequence[Solution]) -> dict[str, Any]:
    """What sampled solutions are like, as a row of a table."""
    known = [one.correct for one in solutions if one.correct is not None]
    return {
        "problems": len(problems), "solutions": len(solutions),
        "different": len(without_doubles(solutions)),
        "finished": _share(one.finished for one in solutions),
        "answered": _share(one.predicted is not None for one in solutions),
        "right": _share(known), "steps": sum(len(one.steps) for one in solutions) / len(solutions),
    }  # fmt: skip


def _share(values: Iterable[Any]) -> float | None:
    found = [bool(one) for one in values]
    return sum(found) / len(found) if found else None


def annotate(
    run: RunDir, source: str, data: Sequence[str], config: AnnotateConfig, sampling: Sampling,
    form: StepFormat, runtime: Runtime, engine: Engine = Engine(), part: str = "1/1", limit: int = 0,
) -> Tables:  # fmt: skip
    """Label the steps of solutions by rollouts; a killed run makes no completion twice."""
    alone("annotate")
    solutions = load_solutions(data)
    solutions = shard(solutions[:limit] if limit else solutions, part)
    form = saved_format(model_folder(source), form)
    store = RolloutStore(run.path / "rollouts.jsonl")
    generator = open_engine(source, sampling, runtime, engine)
    labelled, cost = label(
        solutions, generator, config, form, store, runtime.seed, chunk=8 * many(engine)
    )
    write_solutions(run.path / ROWS, labelled)
    return {"Labels": [label_row(labelled)], "Cost": [cost.row()]} | truth_tables(
        labelled, config, store
    )


def label_row(solutions: Sequence[Solution]) -> dict[str, Any]:
    """The mix of labels, as a row of a table."""
    hard = [
        value for one in solutions if one.labels for value in one.labels.hard if value is not None
    ]
    return {"solutions": len(solutions), "right": _share(one.correct for one in solutions),
            "steps": len(hard), "good": _share(hard)}  # fmt: skip


def truth_tables(
    solutions: Sequence[Solution], config: AnnotateConfig, store: RolloutStore | None = None
) -> Tables:
    """Quality of the labels where the truth is known; by number of rollouts where all were made."""
    if not all(one.truth for one in solutions):
        return {}
    tables = {"Quality of the labels": [quality.label_quality(solutions)]}
    if store and config.estimation != "hard":
        counts = [2**k for k in range(20) if 2**k <= config.rollouts]
        tables["Quality by rollouts"] = quality.quality_by_rollouts(solutions, store, counts)
    return tables


def rules(
    run: RunDir, data: Sequence[str], rule: Literal["calculator", "numbers"], references: str | None
) -> Tables:
    """Label the steps of solutions by a rule: the paper's baselines, which complete nothing."""
    solutions = load_solutions(data)
    known: dict[str, list[str]] = {}
    if references:
        known = {one.id: [one.solution] for one in problems_of(references) if one.solution}
        if not known:
            raise DataError(f"{references}: no problem has a `solution` to compare with")
    elif rule == "numbers":
        for one in solutions:
            if one.correct and one.finished:
                known.setdefault(one.problem, []).append("\n".join(one.steps))
    labelled = []
    for one in solutions:
        if rule == "calculator":
            labelled.append(replace(one, labels=by_calculator(one)))
        elif one.problem in known:
            with suppress(DataError):  # no number to compare with
                labelled.append(replace(one, labels=by_numbers(one, known[one.problem])))
    judged = [
        one for one in labelled if one.labels and any(hard is not None for hard in one.labels.hard)
    ]
    if not judged:
        raise DataError(f"{', '.join(data)}: the rule {rule} has nothing to say of any step")
    write_solutions(run.path / ROWS, judged)
    left = {"solutions": len(solutions), "not judged": len(solutions) - len(judged)}
    return {"Labels": [label_row(judged)], "Left out": [left]} | truth_tables(
        judged, AnnotateConfig()
    )


def consensus(run: RunDir, data: Sequence[str], judge: Sequence[str]) -> Tables:
    """Keep the labelled solutions whose first bad step another source of labels confirms."""
    solutions, judged = load_solutions(data), load_solutions(judge)
    kept, row = quality.agreeing(solutions, judged)
    write_solutions(run.path / ROWS, kept)
    return {"Consensus": [row], "Labels": [label_row(kept)]} | truth_tables(kept, AnnotateConfig())


def train(
    run: RunDir, source: str, data: Sequence[str], scope: Literal["steps", "outcome"],
    config: RewardConfig, options: TrainOptions, form: StepFormat, runtime: Runtime,
    readout: Readout = "tokens", lora_rank: int = 0,
) -> Tables:  # fmt: skip
    """Train a process (`steps`) or outcome reward model, both from the same start."""
    form = saved_format(model_folder(source), form)
    solutions = load_solutions(data)
    if scope == "outcome":
        solutions = without_doubles(
            one for one in solutions if one.finished and one.predicted is not None
        )
    runtime.start()
    model, tokenizer = open_generator(model_folder(source), form)
    reward = StepRewardModel(
        model, tokenizer, Reading(readout=readout, scope=scope, form=replace(form, plain=False))
    )
    counts = train_reward(reward, solutions, config, run, options, runtime, lora_rank=lora_rank)
    reward.save(run.path / "model")
    discard_checkpoints(run, "reward")
    return {"Training": [counts]}


def score(
    run: RunDir, source: str, data: Sequence[str], name: str, runtime: Runtime,
    family: str | None = None, batch_tokens: int = 16384, skip_long: bool = False,
    allow_pickle: bool = False,
) -> Tables:  # fmt: skip
    """Put a reward model's scores to solutions' steps, under a name; a killed run goes on."""
    from mathshepherd.adapters import open_scorer
    from mathshepherd.report import steps_page

    alone("score")
    if not name.strip():
        raise ConfigError("--name: name the scores, like prm")
    solutions = load_solutions(data)
    device, dtype = runtime.start(), runtime.torch_dtype()
    scorer = open_scorer(source, family, device, dtype, allow_pickle)
    partial = run.path / "partial.jsonl"
    scored = unfinished(partial)
    for start in range(len(scored), len(solutions), AT_ONCE):
        part = solutions[start : start + AT_ONCE]
        scores = score_solutions(scorer, part, batch_tokens, skip_long)
        new = [with_scores(one, name, found) for one, found in zip(part, scores, strict=True)]
        append_rows(partial, new)
        scored += new
    long = sum(bool(one.steps) and not one.scores[name] for one in scored)
    if long and long == sum(bool(one.steps) for one in scored):
        raise DataError(f"{', '.join(data)}: every solution is longer than the model's context")
    write_solutions(run.path / ROWS, scored)
    partial.unlink()
    page = steps_page(scored[:40], name, f"Steps and their scores by {name}")
    write_text(run.path / "steps.html", page)
    row = verify.position_of_minimum(scored, name) | {"too long": long}
    return {"Scores": [row]} | _step_tables(scored, [name])


def _step_tables(solutions: Sequence[Solution], names: Iterable[str]) -> Tables:
    if not any(one.truth for one in solutions):
        return {}
    return {"Steps told apart": [verify.step_quality(solutions, name) for name in names]}


def methods_of(
    solutions: Sequence[Solution], aggregates: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """A method for each score and aggregate.

    Raises:
        DataError: the solutions have no scores.
    """
    names = list(dict.fromkeys(name for one in solutions for name in one.scores))
    if not names:
        raise DataError("the solutions have no scores; run `mathshepherd score` on them")
    return {f"{name} {how}": (name, how) for name in names for how in aggregates}


def apart(source: str, questions: Sequence[str], other: str, seen: Sequence[str]) -> None:
    """Refuse questions that are to be unseen and are not.

    Raises:
        DataError: some are in both.
    """
    known = {key_of(one) for one in seen}
    if shared := {key_of(one): one for one in questions if key_of(one) in known}:
        like = " ".join(next(iter(shared.values())).split())[:60]
        raise DataError(
            f"{source}: {len(shared)} of its questions are in {other} too, like {like!r}"
        )


def questions_of(sources: Sequence[str]) -> list[str]:
    """The questions of rows or of problems."""
    found: list[str] = []
    for source in sources:
        rows = next(iter_rows(_rows(source), {"steps": list | None}), {}).get("steps") is not None
        read = load_solutions(source) if rows else load_problems(source)
        found += [one.question for one in read]
    return found


def verify_pool(
    data: Sequence[str], aggregates: Sequence[str], sizes: Sequence[int],
    draws: int, seed: int, train_data: Sequence[str] = (),
) -> Tables:  # fmt: skip
    """Best-of-N and votes for all N from one pool of scored candidates."""
    if draws < 1:
        raise ConfigError(f"--draws {draws}: must be 1 or more")
    solutions = load_solutions(data)
    asked = [one.question for one in solutions]
    apart(", ".join(data), asked, "--train-data", questions_of(train_data))
    methods = methods_of(solutions, aggregates)
    rows = verify.curves(solutions, methods, sizes, draws, seed)
    names = {score for score, _ in methods.values()}
    minima = [verify.position_of_minimum(solutions, name) for name in sorted(names)]
    return {"Best of N": rows, "Lowest score": minima} | _step_tables(solutions, sorted(names))


def ppo(
    run: RunDir, source: str, reward: str | None, data: str, dev_data: str | None, config: PPOConfig,
    shaping: Shaping, form: StepFormat, runtime: Runtime, limits: "Alarm | None", limit: int = 0,
) -> tuple[Tables, str]:  # fmt: skip
    """Reinforce a generator by its steps' rewards; also why it was stopped, where it was."""
    from mathshepherd.ppo import reinforce

    problems = problems_of(data, limit, known=shaping.answer_weight != 0)
    dev = problems_of(dev_data) if dev_data else []
    apart(
        str(dev_data), [one.question for one in dev], "--data", [one.question for one in problems]
    )
    form = saved_format(model_folder(source), form)
    device = runtime.start()
    model, tokenizer = open_generator(model_folder(source), form)
    judge = None
    if reward:
        judge = StepRewardModel.load(reward, device=device, dtype=runtime.torch_dtype())
    found = reinforce(
        model, tokenizer, problems, judge, run, config, shaping, form, runtime, dev, limits
    )
    save_generator(run, found.policy, tokenizer, form)
    discard_checkpoints(run, "ppo")
    last = {"iteration": found.iteration, "stopped": found.stopped or "no"}
    return {"Policy": [last], "Checks": found.history}, found.stopped


def processbench(
    run: RunDir, source: str, data: Sequence[str], runtime: Runtime, threshold: float | None = None,
    choose_on: str | None = None, family: str | None = None, limit: int = 0, batch_tokens: int = 16384,
    allow_pickle: bool = False,
) -> Tables:  # fmt: skip
    """Score ProcessBench's solutions, or PRMBench's, and find their wrong steps."""
    from mathshepherd import processbench as bench
    from mathshepherd.adapters import open_scorer

    device, dtype = runtime.start(), runtime.torch_dtype()
    scorer = open_scorer(source, family, device, dtype, allow_pickle)
    subsets: dict[str, bench.Subset] = {}
    tables: Tables = {}
    for file in data:
        columns = {"error_steps": list | None, "steps": list | None}
        is_prmbench = next(iter_rows(file, columns), {}).get("error_steps") is not None
        solutions = convert.read(file, "prmbench" if is_prmbench else "processbench")
        solutions = from_all_over(solutions, limit, 2 if is_prmbench else 1)
        scores = scorer.step_scores(
            [one.question for one in solutions], [one.steps for one in solutions],
            batch_tokens=batch_tokens,
        )  # fmt: skip
        scored = [
            with_scores(one, "model", found) for one, found in zip(solutions, scores, strict=True)
        ]
        name = Path(file).name.split(".")[0]
        write_solutions(run.path / f"{name}.jsonl", scored)
        if is_prmbench:
            errors = [
                [n for n, good in enumerate(one.truth or (), 1) if not good] for one in scored[::2]
            ]
            rows = bench.evaluate_prmbench(
                [one.scores["model"] for one in scored[::2]], errors,
                [one.problem.partition(":")[0] for one in scored[::2]],
                [one.scores["model"] for one in scored[1::2]], threshold or 0.5,
            )  # fmt: skip
            tables[f"PRMBench, {name}"] = [asdict(row) for row in rows]
        else:
            subsets[name] = bench.Subset.of(scored, "model")
    if subsets:
        found = bench.evaluate_processbench(subsets, threshold, choose_on)
        tables["ProcessBench"] = [
            {k: v for k, v in asdict(row).items() if k != "interval"}
            | dict(zip(("low", "high"), row.interval or (None, None), strict=True))
            for row in found
        ]
    return tables


def from_all_over(
    solutions: Sequence[Solution], limit: int, together: int = 1
) -> Sequence[Solution]:
    """So many groups of solutions at even distances (0: all): benchmarks are sorted by outcome."""
    groups = len(solutions) // together
    if not limit or limit >= groups:
        return solutions
    firsts = [n * groups // limit * together for n in range(limit)]
    return [one for first in firsts for one in solutions[first : first + together]]


def convert_rows(
    data: str, source: str, target: str, out: Path, labels: str = "hard", overwrite: bool = False
) -> Tables:
    """Turn labelled steps from one format into another; `rows` is this package's own."""
    for name, known in (("source", convert.FORMATS), ("target", convert.WRITABLE)):
        if (given := {"source": source, "target": target}[name]) not in ("rows", *known):
            raise ConfigError(f"--{name} {given}: is none of rows, {', '.join(known)}")
    refuse_existing(out, overwrite)
    solutions = load_solutions(data) if source == "rows" else convert.read(data, source)
    if target == "rows":
        write_solutions(out, solutions)
        count = len(solutions)
    else:
        count = convert.write(solutions, out, target, labels)
    return {
        "Converted": [{"from": source, "to": target, "solutions": len(solutions), "rows": count}]
    }


def result_of(folder: Path) -> dict[str, Any]:
    """What a station left in a run's folder.

    Raises:
        DataError: it holds no result.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return {"command": str(result["command"]), "tables": result["tables"]} | result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: holds no result of a command ({error})") from None
