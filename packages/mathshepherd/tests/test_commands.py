"""The commands one after the other on files, each with good input and bad."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mathshepherd import stations
from mathshepherd.annotate import annotate
from mathshepherd.records import by_problem, load_solutions
from mathshepherd.reward_model import StepRewardModel, score_solutions
from octavo.rundir import is_finished
from safetensors.torch import load_file

QUIET = ("--device", "cpu", "--quiet")
SHORT = ("--max-new-tokens", "40", *QUIET)
TRAIN = ("--learning-rate", "3e-3", "--epochs", "2", "--batch-size", "8", *QUIET)
PPO = ("--iterations", "2", "--responses", "8", "--batch-size", "4", "--micro-batch-size", "3",
       "--learning-rate", "1e-3", "--monitor-every", "1", "--save-every", "1", *SHORT)  # fmt: skip


@pytest.fixture(scope="module")
def loop(files, generator, tmp_path_factory):
    """The loop walked once: the folder of each station."""
    from mathshepherd.cli import app
    from octavo.cli import run

    out = tmp_path_factory.mktemp("loop")

    def walk(name, *words):
        assert run(app, [*map(str, words), "--out", str(out / name)]) in (0, 3), name
        return out / name

    train, test = files / "train.jsonl", files / "test.jsonl"
    pool = walk(
        "pool", "sample", generator, "--data", train, "--samples", 4, "--temperature", 1, *SHORT
    )
    labels = walk("labels", "annotate", generator, "--data", pool, "--rollouts", 4, *SHORT)
    walk("prm", "train-prm", generator, "--data", labels, *TRAIN)
    walk("orm", "train-orm", generator, "--data", pool, *TRAIN)
    candidates = walk("candidates", "sample", generator, "--data", test, "--samples", 4, *SHORT)
    scored = walk("scored", "score", out / "prm", "--data", candidates, *QUIET)
    walk("both", "score", out / "orm", "--data", scored, "--name", "orm", *QUIET)
    walk("verified", "verify", "--data", out / "both", "--quiet")
    return out


def test_the_files_chain(loop):
    assert all(is_finished(folder) for folder in loop.iterdir())
    labelled = load_solutions(loop / "labels")
    assert all(one.labels and len(one.labels.hard) == len(one.steps) for one in labelled)
    both = load_solutions(loop / "both")
    assert {name for one in both for name in one.scores} == {"prm", "orm"}
    tables = json.loads((loop / "verified" / "result.json").read_text())["tables"]
    assert {row["n"] for row in tables["Best of N"]} == {1, 2, 4}
    assert {"SC", "pass", "prm min", "SC + prm min", "orm last"} <= {
        row["method"] for row in tables["Best of N"]
    }
    assert "<img" in (loop / "verified" / "report.html").read_text()
    assert StepRewardModel.load(loop / "orm").reading.scope == "outcome"


def test_the_readmes_lines_of_python(loop, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "runs").symlink_to(loop)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["scores"].shape == (2,)
    assert ((names["scores"] > 0) & (names["scores"] < 1)).all()


def test_a_finished_run_is_not_overwritten(command, files, generator, loop):
    words = ("sample", generator, "--data", files / "train.jsonl", "--out", loop / "pool", *SHORT)
    code, _, err = command(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds a finished run" in err


def test_several_files_of_labels_are_one(command, generator, loop, tmp_path):
    for part in ("1/2", "2/2"):
        words = ("annotate", generator, "--data", loop / "pool", "--rollouts", 4, "--shard", part)
        assert command(*words, "--out", tmp_path / part.replace("/", "of"), *SHORT)[0] == 0
    parts = load_solutions([tmp_path / "1of2", tmp_path / "2of2"])
    assert {one.key: one.labels for one in parts} == {
        one.key: one.labels for one in load_solutions(loop / "labels")
    }


def test_sft_learns_from_worked_solutions_too(command, files, tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    row = {"question": "Ann has 3 pens. buys 2. How many?", "answer": "3 + 2 = 5\n#### 5"}
    file.write_text(json.dumps(row) + "\n")
    words = ("sft", files / "model", "--data", file, "--out", tmp_path / "sft", *TRAIN)
    code, out, err = command(*words, "--json")
    assert code == 0, err
    assert json.loads(out)["Fine-tuning"][0]["solutions"] == 1
    assert (tmp_path / "sft" / "model" / "step_format.json").is_file()


def test_adapters_leave_plain_models(command, files, loop, tmp_path):
    lora, words = ("--lora-rank", "2", *TRAIN), ("--tag", "done", "--numbered=false", "--add-words")
    data = files / "demonstrations.jsonl"
    code, _, err = command(
        "sft", files / "model", "--data", data, "--out", tmp_path / "sft", *lora, *words
    )
    assert code == 0, err
    known = load_file(files / "model" / "model.safetensors")
    found = load_file(tmp_path / "sft" / "model" / "model.safetensors")
    assert found.keys() == known.keys()
    assert len(list((tmp_path / "sft" / "model").glob("adapter*"))) == 0
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name][:-1], known[name])
    assert len(found[name]) == len(known[name]) + 1  # the tag alone is new
    code, _, err = command(
        "train-prm", tmp_path / "sft", "--data", loop / "labels", "--out", tmp_path / "prm", *lora
    )
    assert code == 0, err
    reward = StepRewardModel.load(tmp_path / "prm")
    assert (reward.reading.form.tag, reward.words.tag) == ("done", len(known[name]))
    code, _, err = command("rft", files / "model", "--data", loop / "pool", "--out",
                           tmp_path / "rft", *TRAIN, "--lora-rank", "-1")  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert "--lora-rank -1: must be 0 or more" in err


def test_rft_keeps_what_the_generator_learnt(command, files, generator, loop, tmp_path):
    words = ("rft", generator, "--data", loop / "pool", "--out", tmp_path / "rft", *TRAIN, "--json")
    code, alone, err = command(*words)
    assert code == 0, err
    code, both, err = command(*words, "--overwrite", "--sft-data", files / "demonstrations.jsonl")
    assert code == 0, err
    counts = [json.loads(out)["Fine-tuning"][0]["solutions"] for out in (alone, both)]
    assert counts[1] == counts[0] + 120


@pytest.mark.parametrize(
    "more",
    [
        ("--critic", "shared"), ("--advantage", "grpo", "--group", "4"), ("--shaping", "min"),
        ("--answer-weight", "1"),
    ],
)  # fmt: skip
def test_ppo(command, files, generator, loop, tmp_path, more):
    words = ("ppo", generator, "--data", files / "train.jsonl", "--dev-data", files / "dev.jsonl",
             "--out", tmp_path / "ppo", "--keep-going", *PPO, *more)  # fmt: skip
    if "--answer-weight" not in more:
        words = (*words, "--reward", loop / "prm")
    code, out, err = command(*words, "--json")
    assert code == 0, err
    assert [row["iteration"] for row in json.loads(out)["Checks"]] == [0, 1, 2]
    assert (tmp_path / "ppo" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "ppo" / "checkpoints").exists()


def test_search_finds_solutions_that_can_be_verified(command, files, generator, loop, tmp_path):
    words = ("search", generator, "--reward", loop / "prm", "--data", files / "test.jsonl",
             "--beams", 2, "--width", 2, "--max-new-tokens", 40, "--device", "cpu",
             "--quiet")  # fmt: skip
    code, out, err = command(*words, "--out", tmp_path / "found")
    assert code == 0, err
    assert "best right" in out
    found = by_problem(load_solutions(tmp_path / "found"))
    assert len(found) == 10
    for some in found.values():
        worst = [min(one.scores["prm"]) for one in some]
        assert worst == sorted(worst, reverse=True)
    none = ("--max-steps", 0, "--out", tmp_path / "none")
    code, _, err = command(*words, *none)
    assert (code, "--max-steps 0" in err) == (2, True)


def test_rules_label_what_rollouts_do(command, loop, tmp_path):
    rules = ("rules", "--data", loop / "labels", "--rule", "numbers", "--out", tmp_path / "rules")
    code, out, err = command(*rules, "--json", "--quiet")
    assert code == 0, err
    left = json.loads(out)["Left out"][0]
    judged = load_solutions(tmp_path / "rules")
    assert len(judged) + left["not judged"] == left["solutions"]
    right = {one.problem for one in load_solutions(loop / "labels") if one.correct}
    assert {one.problem for one in judged} == right
    assert all(one.labels and one.labels.strategy == "numbers" for one in judged)
    assert all(one.labels and 0 not in one.labels.hard for one in judged if one.correct)
    both = ("consensus", "--data", loop / "labels", "--judge", tmp_path / "rules")
    code, out, err = command(*both, "--out", tmp_path / "both", "--json", "--quiet")
    assert code == 0, err
    row = json.loads(out)["Consensus"][0]
    assert row["kept"] == len(load_solutions(tmp_path / "both")) > 0
    assert row["solutions"] == row["kept"] + row["differ"] + row["not judged"]
    assert {one.labels for one in load_solutions(tmp_path / "both")} <= {
        one.labels for one in load_solutions(loop / "labels")
    }


def test_a_killed_scoring_goes_on(command, loop, tmp_path, monkeypatch):
    plain, asked = score_solutions, []

    def counted(scorer, solutions, *more):
        asked.append(len(solutions))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(scorer, solutions, *more)

    monkeypatch.setattr(stations, "score_solutions", counted)
    monkeypatch.setattr(stations, "AT_ONCE", 16)
    words = (
        "score",
        loop / "prm",
        "--data",
        loop / "candidates",
        "--out",
        tmp_path / "run",
        *QUIET,
    )
    assert command(*words)[0] == 130
    assert command(*words)[0] == 0
    assert asked == [16, 16, 16, 8]
    assert (tmp_path / "run" / "steps.html").is_file()
    for one, other in zip(*map(load_solutions, (tmp_path / "run", loop / "scored")), strict=True):
        assert one.steps == other.steps
        assert one.scores["prm"] == pytest.approx(other.scores["prm"], abs=1e-5)


def test_a_long_candidate_is_refused_or_passed_over(command, loop, tmp_path):
    rows = [json.loads(line) for line in (loop / "candidates" / "solutions.jsonl").open()]
    long = next(row for row in rows if row.get("predicted"))
    long["steps"] = ["3 + 4 = 7"] * 200 + long["steps"]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("score", loop / "prm", "--data", file, "--out", tmp_path / "scored", *QUIET)
    code, _, err = command(*words)
    assert (code, err.count("\n"), "leave it out" in err) == (2, 1, True)
    code, out, err = command(*words, "--skip-long", "--json", "--overwrite")
    assert code == 0, err
    assert json.loads(out)["Scores"][0]["too long"] == 1
    scored = load_solutions(tmp_path / "scored")
    assert [one.scores["prm"] for one in scored if len(one.steps) > 200] == [()]
    assert "not scored" in (tmp_path / "scored" / "steps.html").read_text()
    for row in rows:  # with truth the scores are judged, but for those there are not
        row["truth"] = [int(n % 2) for n in range(len(row["steps"]))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = command(*words, "--skip-long", "--json", "--overwrite")
    assert code == 0, err
    assert json.loads(out)["Steps told apart"][0]["steps"] == sum(
        len(one.steps) for one in scored if len(one.steps) < 200
    )
    code, _, err = command("verify", "--data", tmp_path / "scored", "--quiet")
    assert code == 0, err


def test_rounds(command, files, generator, tmp_path):
    words = ("rounds", generator, "--data", files / "train.jsonl", "--dev-data", files / "dev.jsonl",
             "--samples", 2, "--rollouts", 2, "--keep-going", "--learning-rate-reward", "1e-3",
             *PPO)  # fmt: skip
    code, out, err = command(*words, "--out", tmp_path / "rounds", "--json")
    assert code == 0, err
    assert [row["round"] for row in json.loads(out)["Rounds"]] == [1, 2]
    assert (tmp_path / "rounds" / "round-2" / "ppo" / "model").is_dir()


def test_formats_of_others_are_written_and_read(command, loop, tmp_path):
    for kind in ("mathshepherd", "trl", "openrlhf", "rlhflow", "prm800k", "math-aps"):
        file = tmp_path / f"{kind}.jsonl"
        words = (
            "convert",
            loop / "labels" / "solutions.jsonl",
            "--source",
            "rows",
            "--target",
            kind,
        )
        code, _, err = command(*words, "--out", file)
        assert code == 0, err
        back = (
            "convert",
            file,
            "--source",
            kind,
            "--target",
            "rows",
            "--out",
            tmp_path / f"{kind}.b.jsonl",
        )
        code, _, err = command(*back)
        assert code == 0, (kind, err)
        assert load_solutions(tmp_path / f"{kind}.b.jsonl")
    code, _, err = command(*words, "--out", file)
    assert code == 2
    assert "exists already" in err


def test_first_errors_are_found(command, loop, tmp_path):
    rows = [{"id": f"x-{n}", "problem": f"Ann has {n} pens. buys 2. How many?",
             "steps": [f"{n} + 2 = {n + 2}", f"The answer is: {n + n % 2}"],
             "final_answer_correct": False, "label": 1 if n % 2 else -1}
            for n in range(2, 8)]  # fmt: skip
    file = tmp_path / "gsm8k.json.gz"
    with gzip.open(file, "wt") as opened:
        json.dump(rows, opened)
    words = ("processbench", loop / "prm", "--data", file, *QUIET)
    code, out, err = command(*words, "--out", tmp_path / "a", "--json")
    assert code == 0, err
    (row,) = json.loads(out)["ProcessBench"]
    assert (row["subset"], row["errors"], row["threshold"]) == ("gsm8k", 3, 0.5)
    code, out, err = command(*words, "--out", tmp_path / "b", "--choose-on", "gsm8k", "--json")
    assert code == 0, err
    assert json.loads(out)["ProcessBench"][0]["tuned"] is True


def test_runs_make_one_report(command, loop, tmp_path, visit):
    words = ("report", loop / "labels", loop / "verified", "--out", tmp_path / "report")
    code, _, err = command(*words)
    assert code == 0, err
    dom, said, asked = visit(tmp_path / "report" / "report.html")
    assert (said, asked) == ([], [])
    assert "annotate (labels)" in dom


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("sample", "GEN", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("sample", "./none", "--data", "TRAIN"), "no such folder"),
        (("sample", "GEN", "--data", "TRAIN", "--samples", "0"), "--samples 0"),
        (("sample", "GEN", "--data", "TRAIN", "--temperature", "-1"), "--temperature -1"),
        (("train-prm", "GEN", "--data", "LABELS", "--tag", "two words"), "--tag 'two words': is"),
        (("annotate", "GEN", "--data", "TRAIN"), "'problem' is missing"),
        (("annotate", "GEN", "--data", "DEMOS"), "the right answer is not known"),
        (("annotate", "GEN", "--data", "POOL", "--schedule", "3"), "--schedule [3]"),
        (("annotate", "GEN", "--data", "POOL", "--shard", "5/4"), "--shard 5/4"),
        (("train-prm", "GEN", "--data", "POOL"), "has no hard labels"),
        (("train-prm", "GEN", "--data", "LABELS", "--labels", "soft"), "has no soft labels"),
        (("train-orm", "GEN", "--data", "DEMOS"), "none of"),
        (("train-prm", "GEN", "--data", "LABELS", "--max-length", "5"), "longer than 5"),
        (("search", "GEN", "--reward", "PRM", "--data", "TRAIN", "--beams", "0"), "--beams 0"),
        (("search", "GEN", "--reward", "none", "--data", "TRAIN"), "none"),
        (("search", "GEN", "--reward", "ORM", "--data", "TRAIN"), "judges whole solutions"),
        (("rules", "--data", "POOL", "--rule", "calculator"), "nothing to say of any step"),
        (("rules", "--data", "POOL", "--rule", "numbers", "--references", "TRAIN"), "has a `solution`"),
        (("rules", "--data", "POOL", "--rule", "calculator", "--references", "TRAIN"), "--references"),
        (("consensus", "--data", "POOL", "--judge", "LABELS"), "has no labels"),
        (("consensus", "--data", "LABELS", "--judge", "POOL"), "agree on no solution"),
        (("verify", "--data", "SCORED", "--train-data", "SCORED"), "in --train-data too"),
        (("score", "PRM", "--data", "POOL", "--name", " "), "--name"),
        (("score", "PRM", "--data", "POOL", "--family", "qwen"), "of another --family"),
        (("verify", "--data", "runs/none"), "runs/none: no such file, nor folder of a run"),
        (("verify", "--data", "POOL"), "have no scores"),
        (("verify", "--data", "SCORED", "--sizes", "1,99"), "--sizes [1, 99]"),
        (("rft", "GEN", "--data", "DEMOS"), "no solution is right"),
        (("ppo", "GEN", "--data", "TRAIN"), "there is no reward"),
        (("ppo", "GEN", "--data", "TRAIN", "--dev-data", "TRAIN", "--reward", "PRM"), "are in --data"),
        (("ppo", "GEN", "--data", "TRAIN", "--advantage", "rloo", "--reward", "PRM"), "--group of 2"),
        (("ppo", "GEN", "--data", "TRAIN", "--reward", "PRM"), "need 256 questions"),
        (("processbench", "PRM", "--data", "POOL"), "holds several files"),
        (("convert", "POOL", "--source", "rows", "--target", "xml"), "--target xml"),
        (("report", "DATA"), "holds no result"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(command, files, generator, loop, tmp_path, words, named):
    names = {"GEN": generator, "TRAIN": files / "train.jsonl", "DATA": files, "POOL": loop / "pool",
             "DEMOS": files / "demonstrations.jsonl", "LABELS": loop / "labels", "PRM": loop / "prm",
             "SCORED": loop / "scored", "ORM": loop / "orm"}  # fmt: skip
    out = tmp_path / "out"
    code, printed, err = command(*[names.get(word, word) for word in words], "--out", out)
    assert (code, printed, err.count("\n")) == (2, "", 1), err
    assert named in err
    assert not out.exists()


def test_a_killed_annotation_ends_like_one_that_was_not(
    command, killed, generator, loop, tmp_path, monkeypatch
):
    """Killed once some completions are on the disk; none of them is made again."""

    def line(out):
        return ["annotate", str(generator), "--data", str(loop / "pool"), "--rollouts", "4",
                "--estimation", "both", "--out", str(out), *SHORT]  # fmt: skip

    def one_by_one(*some, **more):
        return annotate(*some, **more | {"chunk": 1})

    monkeypatch.setattr(stations, "label", one_by_one)
    store = tmp_path / "killed" / "rollouts.jsonl"
    killed(
        *line(tmp_path / "killed"),
        once=lambda: store.exists() and store.read_bytes().count(b"\n") > 3,
    )
    assert not (tmp_path / "killed" / "solutions.jsonl").exists()
    before = store.read_text().splitlines()
    for name in ("killed", "whole"):
        assert command(*line(tmp_path / name))[0] == 0
    assert store.read_text().splitlines()[: len(before) - 1] == before[:-1]
    for name in ("solutions.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
