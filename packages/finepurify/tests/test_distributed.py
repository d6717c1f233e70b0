"""Two processes find and clean what one does, and the first alone writes."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from finepurify.cli import app
from finepurify.config import PurifyConfig
from finepurify.shards import owners
from finepurify.strategies import Evidence, kept
from octavo.cli import run
from safetensors.torch import load_file

from .small import pair_of

FILE = "fisher.safetensors"


@pytest.mark.untraced
def test_two_processes_are_as_one(world, command, tmp_path, measured):
    words = ["fisher", world.init, world.suspect, "--clean-data", world.clean, "--points", 0.25,
             "--points", 0.75, "--device", "cpu", "--quiet", "--json"]  # fmt: skip
    code, out, err = command(*words, "--out", tmp_path / "one")
    assert code == 0, err
    stale = tmp_path / "two"
    code, _, err = command(*words, "--out", stale, "--exclude", "embeddings")  # to be replaced
    assert code == 0, err
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "finepurify", *map(str, words), "--out", str(tmp_path / "two"), "--overwrite"],
        capture_output=True, text=True, timeout=240,
        env=os.environ | measured | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # once
    one, two = tmp_path / "one", tmp_path / "two"
    assert {path.name for path in one.rglob("*")} == {path.name for path in two.rglob("*")}
    wanted, found = load_file(one / FILE), load_file(two / FILE)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)
    (table,) = [name for name in printed if name not in ("note", "no")]
    assert table in json.loads(out)
    laws = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    assert laws[0].keys() == laws[1].keys()
    record = json.loads((two / "environment.json").read_text())
    assert (record["processes"], record["status"]) == (2, "finished")


def as_ranks(work, *arguments):
    """Call a function in two processes that are told what torchrun tells; gives what they return.

    They are forked from this one: of their own they would take seconds to import torch.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    def begin(number):
        from accelerate.state import AcceleratorState

        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)  # it knows of one process
        results.put((number, work(*arguments)))
        torch.distributed.destroy_process_group()

    both = [context.Process(target=begin, args=(number,)) for number in (0, 1)]
    for each in both:
        each.start()
    found = dict(results.get(timeout=240) for _ in both)
    for each in both:
        each.join()
    return [found[number] for number in (0, 1)]


CHOICES = [
    (PurifyConfig(strategy=strategy, scope=scope), rho)
    for strategy in ("delta-only", "fine-purifying", "random")
    for scope in ("global", "tensor")
    for rho in (0.0, 0.3, 0.5, 0.97, 1.0)
] + [(PurifyConfig(strategy="delta-only", rho_over="moved"), 0.5)]


@pytest.fixture
def evidence(tmp_path):
    """Five tensors of sizes that do not divide, their drift of few values: ties everywhere."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (3,), "c": (50, 4), "d": (1,), "e": (11,)}
    init = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    suspect = {
        name: value + torch.randint(-2, 3, value.shape, generator=generator) / 4
        for name, value in init.items()
    }
    fisher = {
        name: torch.randint(0, 2, shape, generator=generator).float()
        for name, shape in shapes.items()
    }
    return Evidence(pair_of(tmp_path, init, suspect), fisher=fisher)


def choose(evidence):
    from octavo.runtime import Runtime

    Runtime(device="cpu").wait_for_everyone()
    return [
        {name: mask.tolist() for name, mask in kept(evidence, config, rho).items()}
        for config, rho in CHOICES
    ]


def test_the_masks_of_two_processes_are_those_of_one(evidence):
    whole = choose(evidence)
    assert whole[5] != whole[6] != whole[7]
    assert as_ranks(choose, evidence) == [whole, whole]


def test_a_process_scores_its_own_tensors_alone(evidence, monkeypatch):
    from finepurify import strategies

    def scored(evidence):
        names = set()
        plain = strategies.SCORES["delta-only"]
        strategies.SCORES["delta-only"] = lambda about, name, delta: (
            names.add(name) or plain(about, name, delta)
        )
        choose(evidence)
        return sorted(names)

    assert as_ranks(scored, evidence) == [["a", "b"], ["c", "d", "e"]]


def test_neighbours_of_about_equal_size_go_to_one_process():
    assert owners([10, 10, 10, 10], 2) == [0, 0, 1, 1]
    assert owners([100, 1, 1], 2) == [0, 1, 1]
    assert owners([1, 1, 100], 3) == [0, 0, 1]
    assert owners([5], 4) == [2]
    assert owners([0, 0], 2) == [0, 0]


@pytest.mark.untraced
def test_purify_by_two_processes_is_as_by_one(world, command, tmp_path):
    """From one and the same diagonal: what follows is chosen alike to the last bit."""
    words = ["purify", world.init, world.suspect, "--clean-data", world.clean, "--held-out-data",
             world.held, "--grid", 0.5, "--grid", 0.9, "--steps", 2, "--batch-size", 8, "--points", 0.5,
             "--drop", 100, "--device", "cpu", "--quiet"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert command(*words, "--out", one)[0] == 0
    two.mkdir()  # as if it had been killed once the diagonal was there
    for name in (FILE, "config.yaml", "environment.json"):
        shutil.copy(one / name, two / name)
    record = json.loads((two / "environment.json").read_text())
    (two / "environment.json").write_text(json.dumps(record | {"status": "running"}))
    assert as_ranks(run, app, [str(word) for word in (*words, "--out", two)]) == [0, 0]
    assert {path.name for path in one.rglob("*")} == {path.name for path in two.rglob("*")}
    weights = "purified/model.safetensors"
    assert (one / weights).read_bytes() == (two / weights).read_bytes()
    swept = [[json.loads(line) for line in (run / "sweep.jsonl").read_text().splitlines()]
             for run in (one, two)]  # fmt: skip
    keys = ("strategy", "rho", "reset")
    assert [[row[key] for key in keys] for row in swept[0]] == [
        [row[key] for key in keys] for row in swept[1]
    ]
    tuned, other = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    suspect = load_file(world.suspect / "model.safetensors")
    for name, value in tuned.items():
        torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-4, msg=name)
    assert not torch.equal(tuned["classifier.weight"], suspect["classifier.weight"])
    assert steps(one) == steps(two) == [2, 2, 2]  # as many updates, of shared batches


def steps(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train_runtime" in line]
