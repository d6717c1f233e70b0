"""The commands on the real files: GSM8K end to end, ProcessBench, and labelled samples of others."""

import gzip
import json
import re

import pytest
from mathshepherd.answers import equivalent
from mathshepherd.cli import app
from mathshepherd.records import Solution, load_problems, load_solutions, write_solutions
from mathshepherd.reward_model import StepRewardModel
from octavo import tiny
from octavo.cli import run
from octavo.rundir import is_finished

QUIET = ("--device", "cpu", "--quiet")
SHORT = ("--max-new-tokens", "24", *QUIET)
TRAIN = ("--learning-rate", "3e-3", "--epochs", "1", "--batch-size", "16", *QUIET)

#: Real rows in formats of others: folder, what a file's name holds, format, solutions in it.
SAMPLES = (
    ("step_labels", "openr_samples_math-shepherd.jsonl.gz", "mathshepherd", 7),
    ("step_labels", "openr_samples_prm800k.jsonl.gz", "prm800k", 6),
    ("step_labels", "openr_samples_math-aps.jsonl.gz", "math-aps", 124),
    ("step_labels", "openr_samples_math-aps-tree.jsonl.gz", "math-aps", 242),
    ("step_labels", "prmbench_subset400.jsonl.gz", "prmbench", 788),
    ("processbench", "gsm8k.json.gz", "processbench", 400),
)


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("gsm8k")


@pytest.fixture
def generator(data_folder, kept):
    """A small Llama from scratch, fine-tuned on 200 of GSM8K's worked solutions; made once."""
    out = kept / "sft"
    if not is_finished(out):
        train = data_folder / "gsm8k" / "train.jsonl.gz"
        texts = [f"{one.question}\n{one.solution}" for one in load_problems(train)[:200]]
        shape = tiny.Shape(kind="llama", width=32, alphabet="bpe", vocabulary=600, max_length=4096)
        words = ("sft", tiny.checkpoint(texts, shape), "--data", train, "--limit", 200,
                 "--add-words", "--out", out, *TRAIN)  # fmt: skip
        assert run(app, [*map(str, words)]) == 0
    return out


@pytest.fixture
def converted(data_folder, command, tmp_path):
    """Rows of the released set, in this package's own layout."""
    out = tmp_path / "released.jsonl"
    source = data_folder / "step_labels" / "openr_samples_math-shepherd.jsonl.gz"
    words = ("convert", source, "--source", "mathshepherd", "--target", "rows", "--out", out)
    assert command(*words)[0] == 0
    return out


def example_solutions(data, count):
    """GSM8K's own example solutions, four of each of its first test problems."""
    with gzip.open(data / "gsm8k" / "example_model_solutions.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    for number, row in enumerate(rows):
        answer = row["ground_truth"].rpartition("A:")[2].strip()
        kinds = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
        for sample, kind in enumerate(kinds):
            text, _, found = row[kind]["solution"].rpartition("\nA:")
            steps = text.split("\n")
            steps[-1] += f" The answer is: {found.strip()}"
            right = row[kind]["is_correct"]
            assert equivalent(found.strip(), answer) == right
            yield Solution(f"test-{number}", sample, row["question"], tuple(steps), answer,
                           found.strip(), right)  # fmt: skip


@pytest.mark.realdata
@pytest.mark.untraced
def test_gsm8k_from_fine_tuning_to_verification(
    data_folder, command, generator, converted, tmp_path
):
    def walk(name, *words):
        code, out, err = command(*words, "--out", tmp_path / name, "--json")
        assert code == 0, err
        return json.loads(out)

    test = data_folder / "gsm8k" / "test.jsonl.gz"
    (sampled,) = walk(
        "candidates", "sample", generator, "--data", test, "--limit", 6, "--samples", 4, *SHORT
    )["Solutions"]
    assert (sampled["problems"], sampled["solutions"]) == (6, 24)

    given = list(example_solutions(data_folder, 6))
    assert {one.correct for one in given} == {True, False}
    write_solutions(tmp_path / "examples.jsonl", given)
    tables = walk("labels", "annotate", generator, "--data", tmp_path / "examples.jsonl",
                  "--rollouts", 2, "--estimation", "both", *SHORT)  # fmt: skip
    (cost,) = tables["Cost"]
    labelled = load_solutions(tmp_path / "labels")
    assert cost["rollouts"] == 2 * cost["prefixes"] <= cost["plain"]
    assert cost["steps"] == sum(len(one.steps) - 1 for one in labelled)
    for one in labelled:
        assert one.labels
        assert one.labels.hard[-1] == one.correct
        assert one.labels.tried == (*[2] * (len(one.steps) - 1), 1)

    (counts,) = walk("prm", "train-prm", generator, "--data", tmp_path / "labels",
                     "--data", converted, *TRAIN)["Training"]  # fmt: skip
    assert counts["solutions"] + counts["too long"] == len(labelled) + 7
    assert 0 < counts["good tags"] < counts["tags"]
    walk("scored", "score", tmp_path / "prm", "--data", tmp_path / "candidates", *QUIET)
    assert all(
        len(one.scores["prm"]) == len(one.steps) for one in load_solutions(tmp_path / "scored")
    )
    rows = walk("verified", "verify", "--data", tmp_path / "scored")["Best of N"]
    assert {row["n"] for row in rows} == {1, 2, 4}
    assert (tmp_path / "verified" / "report.html").is_file()


@pytest.mark.realdata
@pytest.mark.untraced
def test_first_errors_of_processbench(data_folder, command, generator, converted, tmp_path):
    words = ("train-prm", generator, "--data", converted, "--out", tmp_path / "prm", *TRAIN)
    assert command(*words)[0] == 0
    names = ("gsm8k", "math", "olympiadbench", "omnimath")
    files = [
        word for name in names
        for word in ("--data", data_folder / "processbench" / f"{name}.json.gz")
    ]  # fmt: skip
    files += ["--data", data_folder / "step_labels" / "prmbench_subset400.jsonl.gz"]
    words = ("processbench", tmp_path / "prm", *files, "--limit", 6, "--choose-on", "gsm8k")
    code, out, err = command(*words, "--out", tmp_path / "found", "--json", *QUIET)
    assert code == 0, err
    tables = json.loads(out)
    assert tables["PRMBench, prmbench_subset400"][-1]["solutions"] == 6
    rows = tables["ProcessBench"]
    assert [row["subset"] for row in rows] == [*names, "average"]
    assert all(row["errors"] and row["correct"] for row in rows[:4])
    assert [row["tuned"] for row in rows[:4]] == [True, False, False, False]
    assert len({row["threshold"] for row in rows[:4]}) == 1
    reward = StepRewardModel.load(tmp_path / "prm")
    for name in names:
        for one in load_solutions(tmp_path / "found" / f"{name}.jsonl"):
            (again,) = reward.step_scores([one.question], [one.steps])
            assert one.scores["model"] == pytest.approx(again.tolist(), abs=1e-5)


@pytest.mark.realdata
@pytest.mark.untraced
@pytest.mark.parametrize(("folder", "name", "kind", "count"), SAMPLES)
def test_samples_of_others_become_rows(data_folder, command, tmp_path, folder, name, kind, count):
    out = tmp_path / "rows.jsonl"
    words = ("convert", data_folder / folder / name, "--source", kind, "--target", "rows")
    code, printed, err = command(*words, "--out", out, "--json")
    assert code == 0, err
    (row,) = json.loads(printed)["Converted"]
    found = load_solutions(out)
    assert row["solutions"] == row["rows"] == len(found) == count
    assert not any(re.search(r"ки", step) for one in found for step in one.steps)
    if kind in ("mathshepherd", "prm800k", "math-aps"):
        again = tmp_path / "trl.jsonl"
        words = ("convert", out, "--source", "rows", "--target", "trl", "--out", again)
        assert command(*words)[0] == 0
        rows = [json.loads(line) for line in again.read_text(encoding="utf-8").splitlines()]
        assert [tuple(map(int, row["labels"])) for row in rows] == [
            one.labels.hard for one in found if one.labels
        ]
