"""What is killed goes on and ends as if it had not been; two processes train as one."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from functools import partial

import pytest
import torch
from formbert import answers
from formbert.data import read_instances, write_instances
from formbert.disambiguator import Disambiguator
from safetensors.torch import load_file

WEIGHTS = "model/model.safetensors"


@pytest.fixture
def slow(monkeypatch):
    """Answers in small parts, each of which takes its time: there is one to be killed in."""
    plain = Disambiguator.batch

    def batch(wsd, questions):
        time.sleep(0.05)
        return plain(wsd, questions)

    def begin(name, chunk):
        monkeypatch.setattr(answers, name, partial(getattr(answers, name), chunk=chunk))
        monkeypatch.setattr(Disambiguator, "batch", batch)

    return begin


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def cut_and_resumed(command, killed, monkeypatch, words, place, at):
    """The bytes of a run that nobody disturbed, and of one killed once `at` lines were there."""
    whole, cut = place / "whole.jsonl", place / "cut.jsonl"
    killed(*words, "--out", cut, once=lambda: lines(cut) >= at)
    left = lines(cut)
    with cut.open("a", encoding="utf-8") as file:  # as if it had been killed while it wrote
        file.write('{"id": "cut off in the wri')
    asked, plain = [], Disambiguator.batch
    monkeypatch.setattr(
        Disambiguator, "batch", lambda wsd, some: asked.append(len(some)) or plain(wsd, some)
    )
    code, _, err = command(*words, "--out", whole)
    assert code == 0, err
    everything = sum(asked)
    asked.clear()
    code, out, err = command(*words, "--out", cut, "--resume")
    assert code == 0, err
    assert f"{lines(whole) - left} " in out
    assert at <= left < lines(whole)
    assert sum(asked) < everything
    return whole.read_bytes(), cut.read_bytes()


@pytest.mark.parametrize("arch", ["cross", "bi"])
def test_predict(command, killed, taught, files, tmp_path, slow, monkeypatch, arch):
    slow("predicted", 6)
    words = (
        "predict",
        taught[arch],
        files.test,
        "--inventory",
        "mini",
        "--device",
        "cpu",
        "--quiet",
    )
    whole, resumed = cut_and_resumed(command, killed, monkeypatch, words, tmp_path, 12)
    assert whole == resumed
    rows = [json.loads(line) for line in resumed.decode().splitlines()]
    assert [row["id"] for row in rows] == [one.key for one in read_instances(files.test)]


def test_tag(command, killed, taught, files, tmp_path, slow, monkeypatch):
    slow("tagged", 5)
    text = tmp_path / "text.txt"
    texts = [one.text for one in read_instances(files.test)]
    text.write_text("\n".join([*texts[:20], "", *texts[20:60]]) + "\n", encoding="utf-8")
    words = ("tag", taught["bi"], text, "--inventory", "mini", "--device", "cpu", "--quiet")
    whole, resumed = cut_and_resumed(command, killed, monkeypatch, words, tmp_path, 10)
    assert whole == resumed
    assert [json.loads(line)["text"] for line in resumed.decode().splitlines()] == (
        text.read_text(encoding="utf-8").splitlines()
    )


def test_resume_of_what_was_not_begun_and_of_what_is_done(command, taught, files, tmp_path):
    out = tmp_path / "deep" / "out.jsonl"
    words = ("predict", taught["bi"], files.dev, "--inventory", "mini", "--out", out, "--resume")
    assert command(*words)[0] == 0
    content = out.read_bytes()
    assert lines(out) == len(read_instances(files.dev))
    code, printed, _ = command(*words)
    assert (code, "0 answers" in printed) == (0, True)
    assert out.read_bytes() == content


@pytest.fixture
def few(files, tmp_path):
    """Files of 24 instances to learn from and 12 to choose by."""
    for name, every in (("train", 10), ("dev", 5)):
        rows = read_instances(getattr(files, name))[::every][:24]
        write_instances(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def training(encoder, few, files, *more):
    return ("train", encoder, "--train-data", few / "train.jsonl", "--held-out-data",
            few / "dev.jsonl", "--inventory", files.senses, "--max-length", 48, "--learning-rate",
            "2e-3", "--device", "cpu", "--quiet", *more)  # fmt: skip


@pytest.mark.untraced
def test_train(command, killed, encoder, few, files):
    """Dropout and hidden annotations are drawn as they would have been, too."""
    words = training(encoder, few, files, "--epochs", 6, "--batch-size", 6, "--gloss-noise", 1)
    whole, cut = few / "whole", few / "cut"
    code, _, err = command(*words, "--out", whole)
    assert code == 0, err
    killed(*words, "--out", cut, once=lambda: any(cut.glob("**/checkpoint-*/trainer_state.json")))
    assert not (cut / "model").exists()
    code, _, err = command(*words, "--out", cut, "--formation-weight", 0.1)
    assert (code, "other options (--formation-weight)" in err) == (2, True)
    code, _, err = command(*words, "--out", cut)
    assert code == 0, err
    wanted, found = load_file(whole / WEIGHTS), load_file(cut / WEIGHTS)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    for name in ("evaluation.json", "config.yaml", "model/config.json", "model/README.md"):
        assert (whole / name).read_text() == (cut / name).read_text(), name
    assert not list(cut.glob("**/*.tmp"))
    assert json.loads((cut / "environment.json").read_text())["status"] == "finished"
    assert command(*words, "--out", cut)[0] == 2  # it is done


def as_ranks(words, folder):
    """Run a command in two processes that are told what torchrun tells.

    They are forked from this one: of their own they would take seconds to import torch.

    Returns:
        Of each its exit code, and what it wrote, made or renamed in the folder.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    def begin(number):
        from accelerate.state import AcceleratorState
        from formbert.cli import app
        from octavo.cli import run

        written = []

        def watch(event, arguments):
            if event == "open" and isinstance(arguments[2], int):
                changes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            else:
                changes = event in ("os.mkdir", "os.rename", "os.remove")
            if changes and str(arguments[0]).startswith(str(folder)):
                written.append(str(arguments[0]))

        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)  # it knows of one process
        sys.addaudithook(watch)
        results.put((number, (run(app, [str(word) for word in words]), written)))
        torch.distributed.destroy_process_group()

    both = [context.Process(target=begin, args=(number,)) for number in (0, 1)]
    for each in both:
        each.start()
    found = dict(results.get(timeout=240) for _ in both)
    for each in both:
        each.join()
    return [found[number] for number in (0, 1)]


@pytest.mark.untraced
@pytest.mark.parametrize("arch", ["cross", "bi"])
def test_two_processes_train_as_one(command, encoder, few, files, arch):
    """Twice as many instances a step are learnt from, where nothing is drawn."""
    calm = shutil.copytree(encoder, few / "calm")
    config = json.loads((calm / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (calm / "config.json").write_text(json.dumps(config))
    words = training(calm, few, files, "--epochs", 20, "--dropout", 0, "--annotation-drop", 0,
                     "--arch", arch)  # fmt: skip
    one, two = few / "one", few / "two"
    code, _, err = command(*words, "--batch-size", 24, "--out", one)
    assert code == 0, err
    (first, wrote), (second, own) = as_ranks((*words, "--batch-size", 12, "--out", two), two)
    assert (first, second) == (0, 0)
    assert any(path.endswith("config.yaml") for path in wrote)
    # a checkpoint holds the state of each process's random numbers
    assert [path for path in own if not path.startswith(str(two / "checkpoints"))] == []
    assert {path.relative_to(one) for path in one.rglob("*")} == {
        path.relative_to(two) for path in two.rglob("*")
    }
    steps = [list(map(json.loads, (run / "metrics.jsonl").open())) for run in (one, two)]
    (loss,), (other,) = [[row["loss"] for row in rows if "loss" in row] for rows in steps]
    assert other == pytest.approx(loss, abs=1e-5)  # the mean of 20 steps
    scores, others = [[row["eval_score"] for row in rows if "eval_score" in row] for rows in steps]
    assert others == scores
    assert len(set(scores)) > 1
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert (one / "evaluation.json").read_text() == (two / "evaluation.json").read_text()
