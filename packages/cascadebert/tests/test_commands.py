import csv
import gzip
import json

import pytest
import torch
from cascadebert.cascade import Cascade
from safetensors.torch import load_file


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_a_labelled_file_to_answers(calibrated, words, command, tmp_path):
    out = tmp_path / "answers.jsonl"
    code, table, _ = command(
        "predict", "--model", calibrated, "--data", words / "test.jsonl", "--out", out
    )
    assert code == 0
    assert "300 answers" in table
    given = answers(out)
    truth = answers(words / "test.jsonl")
    right = sum(a["label"] == b["label"] for a, b in zip(given, truth, strict=True)) / 300
    assert right > 0.52  # the largest class has 47 %
    assert {row["stage"] for row in given} == {1, 2}
    assert all(0 <= row["confidence"] <= 1 for row in given)

    code, result, _ = command(
        "evaluate", "--model", calibrated, "--test-data", words / "test.jsonl", "--json"
    )
    assert code == 0
    rows = json.loads(result)["On 300 test rows"]
    assert [row["model"] for row in rows] == ["stage 1 alone", "stage 2 alone", "cascade"]
    assert rows[-1]["accuracy %"] == pytest.approx(100 * right)
    assert rows[-1]["speed-up (flops)"] == pytest.approx(2, rel=0.25)
    assert rows[0]["accuracy %"] < rows[-1]["accuracy %"]


def test_models_are_saved_as_the_ecosystem_does(trained):
    names = sorted(path.name for path in (trained / "stage-1").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert not list(trained.glob("**/*.bin"))
    config = json.loads((trained / "stage-1" / "config.json").read_text())
    assert config["id2label"] == {str(i): str(i + 1) for i in range(5)}
    assert not (trained / "checkpoints").exists()


def test_models_can_be_given_one_by_one(calibrated, words, command, tmp_path):
    models = ["--model", calibrated / "stage-1", "--model", calibrated / "stage-2"]
    policy = tmp_path / "policy.json"
    code, out, _ = command("calibrate", *models, "--dev-data", words / "dev.jsonl", "--out", policy,
                           "--cost", "layers", "--target-speedup", "1.6", "--json")  # fmt: skip
    assert code == 0
    stored = json.loads(policy.read_text())
    assert stored["costs"]["layers"] == [1, 2]
    assert stored["backend"] == "torch-float32"
    assert stored["calibration"]["rows"] == 300
    assert json.loads(out)["On the 300 calibration rows"][0]["speed-up (layers)"] >= 1.6
    code, _, err = command("predict", *models, "--data", words / "test.jsonl",
                           "--out", tmp_path / "a.jsonl")  # fmt: skip
    assert (code, "name the policy file" in err) == (2, True)
    code, _, _ = command("predict", *models, "--data", words / "test.jsonl", "--policy", policy,
                         "--out", tmp_path / "a.jsonl")  # fmt: skip
    assert code == 0


def test_plain_sentences_and_csv(calibrated, command, tmp_path):
    (tmp_path / "plain.txt").write_text("making\nbaked\n\nlion\n")
    with gzip.open(tmp_path / "table.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([["word", "other"], *([w, w] for w in ("making", "baked"))])
    for name, options, count in (
        ("plain.txt", [], 4),
        ("table.csv.gz", ["--text-column", "word"], 2),
    ):
        out = tmp_path / f"{len(options)}.jsonl"
        code, _, err = command("predict", "--model", calibrated, "--data", tmp_path / name,
                               "--out", out, *options)  # fmt: skip
        assert code == 0, err
        assert len(answers(out)) == count


def test_a_split_of_a_folder_is_chosen(calibrated, words, command, tmp_path):
    asked = ["predict", "--model", calibrated, "--data", words, "--out", tmp_path / "a.jsonl"]
    code, _, err = command(*asked)
    assert (code, "name one of them: dev, test, train" in err) == (2, True)
    code, _, err = command(*asked, "--split", "dev")
    assert code == 0, err
    assert len(answers(tmp_path / "a.jsonl")) == 300
    code, _, err = command(
        "evaluate", "--model", calibrated, "--test-data", words, "--split", "dev"
    )
    assert (code, "rows the policy was calibrated on" in err) == (2, True)


def test_what_is_odd_about_texts_is_told(calibrated, command, tmp_path):
    (tmp_path / "odd.txt").write_text("making\n\n   \n" + "a" * 40 + "\n")
    code, _, err = command("predict", "--model", calibrated, "--data", tmp_path / "odd.txt",
                           "--out", tmp_path / "out.jsonl")  # fmt: skip
    assert code == 0
    assert "2 of these texts are empty; they are answered all the same" in err
    assert "1 of these texts were cut to the stage's length" in err
    assert len(answers(tmp_path / "out.jsonl")) == 4


def test_two_processes_do_not_write_the_same_answers(calibrated, command, tmp_path):
    from filelock import FileLock

    (tmp_path / "rows.txt").write_text("making\n")
    words = ["predict", "--model", calibrated, "--data", tmp_path / "rows.txt",
             "--out", tmp_path / "out.jsonl"]  # fmt: skip
    with FileLock(tmp_path / ".out.jsonl.lock"):
        code, _, err = command(*words)
        assert (code, "another process is writing it" in err) == (2, True)
    assert command(*words)[0] == 0


def test_policies_for_other_targets(calibrated, words, command, tmp_path):
    asked = ["calibrate", "--model", calibrated, "--dev-data", words / "dev.jsonl", "--out"]
    for number, (options, key) in enumerate({
        ("--min-accuracy", 0.55): "accuracy",
        ("--max-cost", 0.9, "--cost", "latency", "--score", "learned"): "cost",
        ("--max-risk", 0.05, "--risk", "harm", "--temperature"): "risk",
        ("--target-speedup", 2.0, "--score", "learned"): "speedup",
        ("--max-risk", 0.1, "--risk", "disagreement", "--method", "crc", "--score", "entropy"): "risk",
    }.items()):  # fmt: skip
        out = tmp_path / f"{number}.json"
        code, shown, err = command(*asked, out, *options)
        if key == "cost" and code == 2:
            assert "--max-cost 0.9 is out of reach" in err  # a slow machine
            continue
        assert code in (0, 3), err
        part = "150 of " if "--temperature" in options or "learned" in options else ""
        assert f"On {part}the 300 calibration rows" in shown
        stored = json.loads(out.read_text())
        assert stored["target"] == {key: options[1]}
        assert bool(stored["guarantee"]) == (key == "risk")
        assert (key == "risk") == ("Guarantee: " in shown)
        code, result, err = command("evaluate", "--model", calibrated, "--policy", out, "--json",
                                    "--test-data", words / "test.jsonl")  # fmt: skip
        assert code == 0, err
        row = json.loads(result)["On 300 test rows"][-1]
        assert {"speed-up (layers)", "speed-up (flops)", "speed-up (parameters)",
                "speed-up (latency)", "speed-up (clock)"} <= set(row)  # fmt: skip


def test_calibration_without_labels(calibrated, words, command, tmp_path):
    rows = [json.dumps({"text": row["text"]}) for row in answers(words / "dev.jsonl")]
    (tmp_path / "unlabelled.jsonl").write_text("\n".join(rows))
    asked = ["calibrate", "--model", calibrated, "--dev-data", tmp_path / "unlabelled.jsonl",
             "--label-column", "none", "--out", tmp_path / "p.json"]  # fmt: skip
    code, shown, err = command(*asked, "--target-speedup", 2)
    assert code == 0, err
    assert "accuracy" not in shown
    code, _, err = command(*asked, "--max-risk", 0.05, "--overwrite")
    assert (code, "--risk harm: needs labels; --risk disagreement does without" in err) == (2, True)


def test_a_target_that_makes_it_slower_is_a_no(calibrated, words, command, tmp_path):
    code, _, err = command("calibrate", "--model", calibrated, "--dev-data", words / "dev.jsonl",
                           "--out", tmp_path / "p.json", "--target-speedup", 0.9)  # fmt: skip
    assert (code, "the last stage alone is faster" in err) == (3, True)


def test_the_engine_is_timed_on_own_texts(calibrated, words, command):
    asked = ["bench", "--model", calibrated, "--data", words / "test.jsonl"]
    code, shown, err = command(*asked, "--tries", 1)
    assert code == 0, err
    assert "compacted, batch 16" in shown
    code, _, err = command(*asked, "--tries", 0)
    assert (code, "--tries 0: must be 1 or more" in err) == (2, True)


def test_only_training_runs_in_several_processes(calibrated, words, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command("evaluate", "--model", calibrated, "--test-data", words / "test.jsonl")
    assert (code, "run under torchrun; start it alone" in err) == (2, True)


def test_an_empty_file_has_no_answers(calibrated, command, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    code, _, _ = command("predict", "--model", calibrated, "--data", tmp_path / "empty.txt",
                         "--out", tmp_path / "new" / "out.jsonl")  # fmt: skip
    assert code == 0
    code, _, _ = command("predict", "--model", calibrated, "--data", tmp_path / "empty.txt",
                         "--out", tmp_path / "out.jsonl")  # fmt: skip
    assert code == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_prediction_goes_on_after_a_bad_row_is_mended(calibrated, command, tmp_path, monkeypatch):
    rows = [json.dumps({"text": word}) for word in ("making", "baked", "lion", "boat", "apple")]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*rows[:4], "broken", ""]))
    words = ["predict", "--model", calibrated, "--data", source, "--out", out, "--chunk", 2]
    code, _, err = command(*words)
    assert code == 2
    assert "rows.jsonl, line 5" in err
    assert not out.exists()
    source.write_text("\n".join([*rows, ""]))
    asked = []
    predict = Cascade.predict

    def counting(self, examples, policy):
        asked.extend(examples.texts)
        return predict(self, examples, policy)

    monkeypatch.setattr(Cascade, "predict", counting)
    assert command(*words)[0] == 0
    assert asked == ["apple"]
    resumed = out.read_text()
    out.unlink()
    assert command(*words)[0] == 0
    assert out.read_text() == resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_prediction_begins_anew_when_answered_rows_change(calibrated, command, tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"text": word}) for word in ("making", "baked", "lion", "boat")]
    source.write_text("\n".join([*rows, "broken", ""]))
    words = ["predict", "--model", calibrated, "--data", source, "--out", out, "--chunk", 2]
    assert command(*words)[0] == 2
    begun = {path: path.read_text() for path in tmp_path.glob(".out*")}
    assert len(begun) == 2
    for changed in ([rows[3], *rows[1:]], rows[:1], [], [rows[1], rows[0], *rows[2:]]):
        for path, content in begun.items():
            path.write_text(content)
        source.write_text("".join(row + "\n" for row in changed))
        code, _, err = command(*words)
        assert code == 0
        assert "begun anew" in err
        resumed = answers(out)
        out.unlink()
        assert command(*words)[0] == 0
        assert answers(out) == resumed
        assert len(resumed) == len(changed)
        out.unlink()


def test_a_started_answer_file_of_other_options_is_begun_anew(calibrated, command, tmp_path):
    source, out = tmp_path / "rows.txt", tmp_path / "out.jsonl"
    source.write_text("making\nbaked\n")
    (tmp_path / ".out.jsonl.partial").write_text("of another run\n")
    (tmp_path / ".out.jsonl.partial.json").write_text(json.dumps({"source": "other"}))
    assert command("predict", "--model", calibrated, "--data", source, "--out", out)[0] == 0
    assert len(answers(out)) == 2


def train_words(words, out, *more):
    return ["train", "--model", "scratch:1x16", "--model", "scratch:1x32", "--train-data", words,
            "--out", out, "--alphabet", "char", "--max-length", 16, "--learning-rate", "4e-3",
            "--epochs", 2, "--save-every", 5, *more]  # fmt: skip


def test_a_killed_training_goes_on_and_ends_alike(words, command, killed, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*train_words(words, whole))[0] == 0
    checkpoint = cut / "checkpoints" / "stage-2" / "checkpoint-5"
    killed(*train_words(words, cut), once=(checkpoint / "trainer_state.json").exists)
    assert (cut / "stage-1").is_dir()
    assert not (cut / "cascade.json").exists()
    code, _, err = command("predict", "--model", cut, "--data", words / "test.jsonl",
                           "--out", tmp_path / "x")  # fmt: skip
    assert (code, "`cascadebert train` finished" in err) == (2, True)
    code, _, err = command(*train_words(words, cut, "--seed", 1))
    assert (code, "other options (--seed)" in err) == (2, True)
    code, _, err = command(*train_words(words, cut))
    assert code == 0
    assert "stage-1 is trained already" in err
    for stage in ("stage-1", "stage-2"):
        first, second = (load_file(run / stage / "model.safetensors") for run in (whole, cut))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_overwriting_loses_nothing_to_wrong_input(words, command, trained, tmp_path):
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    before = sorted(path.name for path in run.rglob("*"))
    for wrong in (["--batch-size", 0], ["--text-column", "none"], ["--model", "no/such"]):
        code, _, _ = command(*train_words(words, run, "--overwrite", *wrong))
        assert code == 2
        assert sorted(path.name for path in run.rglob("*")) == before
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_fine_tuning_starts_from_any_pretrained_encoder(words, command, tmp_path, trained):
    """A masked language model as the hub gives it, beside an already fine-tuned classifier."""
    from octavo import tiny

    shape = tiny.Shape(kind="bert", layers=1, width=32, alphabet="char", max_length=32)
    encoder = tiny.checkpoint(["abcdefghijklmnopqrstuvwxyz"], shape)
    out = tmp_path / "run"
    code, _, err = command("train", "--model", trained / "stage-1", "--model", encoder,
                           "--train-data", words, "--out", out, "--epochs", 1)  # fmt: skip
    assert code == 0, err
    assert "new weights: bert.pooler" in err
    assert "unused: cls.predictions" in err
    assert Cascade.from_pretrained([out]).stages[1].model.config.model_type == "bert"


def test_words_are_written_once(command, tmp_path):
    words = ["words", "--out", tmp_path / "words", "--train", 30, "--dev", 20, "--test", 10]
    assert command(*words)[0] == 0
    assert len(answers(tmp_path / "words" / "test.jsonl")) == 10
    code, _, err = command(*words)
    assert (code, "exists already" in err) == (2, True)


def bad_inputs(words, calibrated, tmp_path):
    (tmp_path / "bad.csv").write_text("text,label\nmaking,2\nbaked,\n")
    (tmp_path / "nine.csv").write_text("text,label\nmaking,2\nbaked,9\n")
    (tmp_path / "single.csv").write_text("text,label\nmaking,2\n")
    (tmp_path / "one.csv").write_text("text,label\nmaking,2\nbaked,2\n")
    train = ["train", "--model", "scratch:1x16", "--out", tmp_path / "out"]
    two = [*train, "--model", "scratch:1x32", "--train-data"]
    model = ["--model", calibrated]
    return {
        "a cascade needs two models": [*train, "--train-data", words],
        "write LAYERSxWIDTH": [*train, "--model", "scratch:big", "--train-data", words],
        "neither a folder here nor a model": [*train, "--model", "no/such", "--train-data", words],
        "--epochs: give one value, or one for each of the 2": [*two, words] + ["--epochs", 1] * 3,
        "--learning-rate -1.0: must be above 0": [*two, words, "--learning-rate=-1"],
        "no such file or folder": [*two, tmp_path / "none.csv"],
        "bad.csv, line 3: the label is empty": [*two, tmp_path / "bad.csv"],
        "needs two labels or more, it has ['2']": [*two, tmp_path / "one.csv"],
        "no column 'sentence'": [*two, tmp_path / "one.csv", "--text-column", "sentence"],
        "'texd' is missing": [*two, words, "--text-column", "texd"],
        "nine.csv, line 3: label '9' is not one of the model's": [
            "calibrate", *model, "--dev-data", tmp_path / "nine.csv", "--out", tmp_path / "p"],
        "out of reach: the first stage alone is": [
            "calibrate", *model, "--dev-data", words / "dev.jsonl", "--target-speedup", 999,
            "--out", tmp_path / "p"],
        "policy.json exists already": ["calibrate", *model, "--dev-data", words / "dev.jsonl"],
        "are rows the policy was calibrated on": [
            "evaluate", *model, "--test-data", words / "dev.jsonl"],
        "name one target": ["calibrate", *model, "--dev-data", words / "dev.jsonl", "--out",
                            tmp_path / "p", "--min-accuracy", 0.5, "--max-risk", 0.1],
        "it takes 2302 or more": ["calibrate", *model, "--dev-data", words / "dev.jsonl", "--out",
                                  tmp_path / "p", "--max-risk", 0.001],
        "leave --pair-column away": ["evaluate", *model, "--test-data", words / "test.jsonl",
                                     "--pair-column", "label"],
        "no early-exit model there": ["report", *model, "--test-data", words / "test.jsonl",
                                      "--out", tmp_path / "page", "--rival", words],
        "no cascade there": ["evaluate", "--model", words, "--test-data", words / "dev.jsonl"],
        "no policy there": ["predict", *model, "--data", words / "test.jsonl", "--out",
                            tmp_path / "x", "--policy", tmp_path / "none.json"],
        "--chunk 0: must be 1 or more": ["predict", *model, "--data", words / "test.jsonl",
                                         "--out", tmp_path / "x", "--chunk", 0],
        "holds no run; choose another --out": [*two[:4], tmp_path, *two[5:], words],
        "--max-length 2: must be 4": [*two, words, "--max-length", 2],
        "--max-length 0: must be 4": ["evaluate", *model, "--test-data", words, "--max-length", 0],
        "--batch-tokens 0": ["evaluate", *model, "--test-data", words, "--batch-tokens", 0],
        "--seed -1": [*two, words, "--seed=-1"],
        "needs two rows or more": ["evaluate", *model, "--test-data", tmp_path / "single.csv"],
        "is the file that is read": ["predict", *model, "--data", tmp_path / "one.csv", "--out",
                                     tmp_path / "one.csv", "--overwrite"],
        "nothing can be written below": ["predict", *model, "--data", words / "test.jsonl",
                                         "--out", tmp_path / "one.csv" / "x"],
        "lies in --out": ["train", "--model", "scratch:1x16", "--model", calibrated / "stage-1",
                          "--train-data", words, "--out", calibrated, "--overwrite"],
        "--train 0: must be 1 or more": ["words", "--out", tmp_path / "w", "--train", 0,
                                        "--dev", 0, "--test", 0],
        "one.csv/w: nothing can be written": ["words", "--out", tmp_path / "one.csv" / "w"],
    }  # fmt: skip


def test_bad_input_is_one_line_and_leaves_nothing(words, calibrated, command, tmp_path):
    cases = bad_inputs(words, calibrated, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for message, line in cases.items():
        code, out, err = command(*line, "--quiet")
        assert message in err
        assert (code, out) == (2, ""), message
        assert len(err.strip().splitlines()) == 1, err
        assert sorted(tmp_path.rglob("*")) == before, message


def test_a_policy_of_other_models_is_refused(calibrated, words, command, tmp_path):
    swapped = ["--model", calibrated / "stage-2", "--model", calibrated / "stage-1"]
    code, _, err = command("predict", *swapped, "--data", words / "test.jsonl", "--out",
                           tmp_path / "x", "--policy", calibrated / "policy.json")  # fmt: skip
    assert code == 2
    assert "made for other models" in err
