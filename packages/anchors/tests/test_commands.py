"""The commands on a saved model and rows of the user's own, with good input and bad."""

import json

import pytest

OWN = ("--template", "Review: {text}\\nMood:{label}", "--labels", "good", "--labels", "bad",
       "--labels", "middling", "--samples", "6", "--device", "cpu", "--quiet")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"), [("flow", "--per-head"), ("block", "--window=1"), ("read", "--per-head")]
)
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
