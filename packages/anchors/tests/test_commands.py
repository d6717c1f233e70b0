"""The commands on a saved model and rows of the user's own, with good input and bad."""

import json

import pytest
from anchors import session
from anchors.config import Task
from anchors.data import load_examples
from octavo.errors import ConfigError

OWN = ("--template", "Review: {text}\\nMood:{label}", "--labels", "good", "--labels", "bad",
       "--labels", "middling", "--samples", "6", "--device", "cpu", "--quiet")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flow", "--per-head"), ("block", "--window=1"), ("read", "--per-head"),
        ("evaluate", "--rival-shots=2"), ("reweight", "--train-per-class=2"),
        ("diagnose", "--variance=0.8"),
    ],
)  # fmt: skip
def test_a_command_writes_its_result_and_report(command, saved, rows, tmp_path, name, more):
    words = (name, saved, "--train-data", rows, "--data", rows, *OWN, more)
    code, printed, err = command(*words, "--json")
    assert code == 0, err
    tables = {key: rows for key, rows in json.loads(printed).items() if key not in ("note", "no")}
    assert all(tables.values())
    out = tmp_path / "out"
    code, printed, err = command(*words, "--out", out)
    assert code == 0, err
    assert json.loads((out / "result.json").read_text())["tables"] == tables
    assert "<img" in (out / "report.html").read_text()
    assert command(*words, "--out", out)[0] == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("--data", "nowhere.tsv"), "nowhere.tsv"),
        (("--labels", "unheardofword"), "is none of"),
        (("--shots", "9"), "has 6 texts"),
        (("--shots", "0"), "--shots 0"),
        (("--text-column", "texts"), "no column 'texts'"),
        (("--dtype", "float64"), "--dtype"),
    ],
)
def test_wrong_input_is_one_line(command, saved, rows, tmp_path, changes, named):
    words = dict(zip(OWN[:-1:2], OWN[1::2], strict=False))
    words.pop("--labels")
    words |= {"--train-data": rows, "--data": rows} | dict([changes])
    if changes[0] != "--labels":
        labels = ["--labels", "good", "--labels", "bad", "--labels", "middling"]
    else:
        labels = ["--labels", "bad"]
    given = [part for pair in words.items() for part in pair]
    code, printed, err = command("flow", saved, *given, *labels, "--quiet")
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert named in err


def test_a_prompt_longer_than_the_context(command, saved, tmp_path):
    rows = tmp_path / "long.tsv"
    rows.write_text("label\ttext\n" + "".join(f"{i % 3}\t{'film ' * 200}{i}\n" for i in range(9)))
    code, _, err = command("read", saved, "--train-data", rows, "--data", rows, *OWN)
    assert code == 2
    assert "the model takes 256" in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--task", "mnli"), "is none of sst2"),
        (("--labels", "x"), "give the --template"),
        (("--template", "{text}:{label}"), "name its label words"),
    ],
)
def test_tasks_that_are_none(command, saved, rows, words, named):
    code, _, err = command("read", saved, "--train-data", rows, "--data", rows, *words)
    assert code == 2
    assert named in err


def test_a_label_word_that_the_rows_do_not_have(command, saved, tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("label\ttext\ngood\ta\nBad\tb\ngood\tc\nterrible\td\n")
    code, _, err = command("flow", saved, "--train-data", file, "--data", file, *OWN)
    assert code == 2
    assert "line 5" in err
    assert "'terrible'" in err


def test_a_cache_and_an_adapter_are_used_again(command, saved, rows, tmp_path):
    """The demonstrations are those it was made with; what was saved answers as what was measured."""
    given = (saved, "--train-data", rows, "--data", rows, *OWN, "--seed", "3")
    for name, more, folder in (
        ("compress", ("--draws", "2", "--choose-on", "2"), "cache"),
        ("reweight", ("--train-per-class", "2"), "adapter"),
    ):
        out = tmp_path / name
        code, _, err = command(name, *given, "--out", out, *more)
        assert code == 0, err
        shown = json.loads((out / "result.json").read_text())["tables"]
        first = {row.get("kept", row.get("method")): row for row in next(iter(shown.values()))}
        words = ("evaluate", saved, f"--{folder}", out / folder, "--data", rows, "--samples", "6",
                 "--seed", "3", "--device", "cpu", "--quiet")  # fmt: skip
        code, printed, err = command(*words, "--json")
        assert code == 0, err
        vanilla, used = next(iter(json.loads(printed).values()))
        assert (
            vanilla["accuracy"]
            == first[{"cache": "whole prompt"}.get(folder, "vanilla, 1 shot")]["accuracy"]
        )
        assert (
            used["accuracy"]
            == first[{"cache": "hidden anchors"}.get(folder, "re-weighted")]["accuracy"]
        )
        again = tmp_path / f"again-{name}"
        assert command(*words, "--out", again)[0] == 0
        lines = (again / "predictions.jsonl").read_text().splitlines()
        assert len(lines) == 6
        assert sum(json.loads(lines[0])["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    runs = (tmp_path / "compress", tmp_path / "reweight")
    code, printed, err = command("report", *runs, "--out", tmp_path / "report")
    assert code == 0, err
    assert (tmp_path / "report" / "report.html").read_text().count("<img") == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("evaluate", "--adapter", "a", "--cache", "b"), "give one of them"),
        (("evaluate", "--adapter", "a"), "has its own template"),
        (("evaluate", "--rival-shots", "-1"), "--rival-shots -1"),
        (("reweight", "--epochs", "0"), "--epochs 0"),
        (("reweight", "--learning-rate", "0"), "--learning-rate"),
        (("reweight", "--train-per-class", "9"), "class 0 has"),
        (("compress", "--draws", "-1"), "--draws -1"),
        (("diagnose", "--variance", "2"), "--variance 2"),
        (("view", "--number", "99"), "--number 99"),
    ],
)
def test_wrong_options_of_the_applications(command, saved, rows, words, named):
    name, *more = words
    code, printed, err = command(name, saved, "--train-data", rows, "--data", rows, *OWN, *more)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert named in err


def test_saved_folders_that_are_none(command, saved, rows, tmp_path):
    for name, file in (("adapter", "reweighter.json"), ("cache", "cache.json")):
        code, _, err = command("evaluate", saved, f"--{name}", tmp_path, "--data", rows)
        assert (code, f"holds no {file}" in err) == (2, True)
    (tmp_path / "cache").mkdir()
    words = ("evaluate", saved, "--cache", tmp_path / "cache", "--data", rows, "--out", tmp_path)
    code, _, err = command(*words, "--overwrite")
    assert (code, "lies in it" in err) == (2, True)


def test_a_finished_run_is_refused_before_the_model_is_loaded(
    command, saved, rows, tmp_path, monkeypatch
):
    words = ("read", saved, "--train-data", rows, "--data", rows, *OWN, "--out", tmp_path / "out")
    assert command(*words)[0] == 0
    monkeypatch.setattr(session, "load_model", None)
    code, _, err = command(*words)
    assert (code, "holds a finished run" in err) == (2, True)


def test_texts_that_an_adapter_was_trained_on_are_not_labelled(command, saved, rows, tmp_path):
    given = (
        "reweight",
        saved,
        "--train-data",
        rows,
        "--data",
        rows,
        *OWN,
        "--out",
        tmp_path / "one",
    )
    assert command(*given, "--train-per-class", "2")[0] == 0
    code, printed, err = command(
        "evaluate", saved, "--adapter", tmp_path / "one" / "adapter", "--data", rows,
        "--samples", "0", "--device", "cpu", "--quiet", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "Accuracy, 9 texts" in json.loads(printed)  # of 18, 3 are shown and 6 were trained on


def test_label_words_that_are_numbers(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text("label\ttext\n1\tbad\n2\tso\n3\tgood\n")
    stars = Task("{text} Stars:{label}", (" 1", " 2", " 3"))
    assert [one.label for one in load_examples(str(file), stars)] == [0, 1, 2]
    with pytest.raises(ConfigError, match="case aside"):
        Task("{text} is:{label}", (" Good", " good"))


def test_no_rows_to_demonstrate_with(command, saved, rows):
    code, _, err = command("flow", saved, "--data", rows, *OWN)
    assert code == 2
    assert "--train-data: name the rows" in err


def test_folders_that_hold_no_result(command, tmp_path):
    code, _, err = command("report", tmp_path, "--out", tmp_path / "report")
    assert code == 2
    assert "holds no result.json" in err
    (tmp_path / "result.json").write_text("[]")
    assert "is not the result" in command("report", tmp_path, "--out", tmp_path / "report")[2]
    assert not (tmp_path / "report").exists()
    (tmp_path / "result.json").write_text('{"about": {}, "tables": {}}')
    assert "lies in it" in command("report", tmp_path, "--out", tmp_path, "--overwrite")[2]


def test_turns_of_a_dialogue_are_joined(command, saved, tmp_path):
    file = tmp_path / "rows.tsv"
    lines = [f"{n % 3}\thow are {n}\tgood\tfine {n}" for n in range(9)]
    file.write_text("\n".join(["label\tturn1\tturn2\tturn3", *lines]) + "\n")
    words = ("evaluate", saved, "--train-data", file, "--data", file, *OWN, "--rival-shots", "0")
    code, _, err = command(*words, "--text-column", "turn1,turn2,turn3", "--out", tmp_path / "out")
    assert code == 0, err
    line = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert " good fine " in line["text"]


def test_a_demo_on_a_folder_without_sets(command, tmp_path):
    code, _, err = command("demo", "--data", tmp_path, "--out", tmp_path / "out")
    assert (code, "holds no files like" in err) == (2, True)
    code, _, err = command("demo", "--model", "x", "--out", tmp_path / "out")
    assert (code, "give the --data" in err) == (2, True)
    assert not (tmp_path / "out").exists()
