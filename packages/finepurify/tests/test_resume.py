"""A killed run goes on and ends as one that was not killed: the same bytes in every file that counts."""

import json

import pytest
from finepurify.points import FILE as FISHER
from finepurify.sweep import FILE as SWEEP

SHORT = ("--batch-size", 8, "--steps", 1, "--learning-rate", "1e-3", "--points", 0.25,
         "--points", 0.75, "--drop", 100, "--grid", 0.5, "--grid", 0.9,
         "--device", "cpu", "--quiet")  # fmt: skip
SAME = (SWEEP, FISHER, "result.json", "config.yaml", "purified/model.safetensors",
        "model/model.safetensors", "model/config.json", "purified/config.json")  # fmt: skip


def words(world, command, *more):
    held = ("--held-out-data", world.held)
    return (command, world.init, world.suspect, "--clean-data", world.clean, *held, *SHORT, *more)


def same(one, other):
    """Names of those files that both runs hold with other bytes, or one alone."""
    return [
        name
        for name in SAME
        if (one / name).exists() != (other / name).exists()
        or ((one / name).exists() and (one / name).read_bytes() != (other / name).read_bytes())
    ]


def lines(run):
    return (run / SWEEP).read_text().count("\n") if (run / SWEEP).exists() else 0


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run of `purify` that nobody disturbed."""
    from finepurify.cli import app
    from octavo.cli import run

    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(app, [str(word) for word in (*words(world, "purify"), "--out", out)]) == 0
    return out


def leftovers(run):
    return [path for path in run.rglob("*") if path.name.endswith(".tmp")]


def test_purify_killed_in_the_sweep(world, whole, command, killed, tmp_path, monkeypatch):
    from finepurify.bench import Bench

    run = tmp_path / "run"
    line = (*words(world, "purify"), "--out", run)
    killed(*line, once=lambda: lines(run) >= 2)
    left = 3 - lines(run)
    assert not (run / "model").exists()
    with (run / SWEEP).open("a") as file:  # as if it had been killed while it wrote
        file.write('{"strategy": "fine-purifying", "rho": 0.5, "ACC": 1')
    tried, plain = [], Bench.defended

    def counted(bench, weights, name):
        tried.append(name)
        return plain(bench, weights, name)

    monkeypatch.setattr(Bench, "defended", counted)
    code, _, err = command(*line)
    assert code == 0, err
    assert same(run, whole) == []
    assert lines(whole) == 3
    assert tried[left:] == ["fine-purifying 0.5"]  # what is written; nothing known was tried again
    assert len(tried) == left + 1
    assert not leftovers(run)
    assert command(*line)[0] == 2  # it is finished now


def test_fisher_killed_between_two_points(world, command, killed, tmp_path, monkeypatch):
    from finepurify.fisher import diagonal

    line = ("fisher", world.init, world.suspect, "--clean-data", world.train, "--fisher-batch-size", 64,
            "--points", 0.25, "--points", 0.5, "--points", 0.75, "--device", "cpu",
            "--quiet")  # fmt: skip
    assert command(*line, "--out", tmp_path / "whole")[0] == 0
    run = tmp_path / "run"
    killed(*line, "--out", run, once=(run / "fisher-0.safetensors").exists)
    assert not (run / FISHER).exists()
    stood = len(list(run.glob("fisher-*.safetensors")))
    asked = []

    def counted(*arguments, **options):
        asked.append(1)
        return diagonal(*arguments, **options)

    monkeypatch.setattr("finepurify.points.diagonal", counted)
    code, _, err = command(*line, "--out", run)
    assert code == 0, err
    assert len(asked) == 3 - stood
    assert (run / FISHER).read_bytes() == (tmp_path / "whole" / FISHER).read_bytes()
    assert (run / "result.json").read_bytes() == (tmp_path / "whole" / "result.json").read_bytes()
    assert not list(run.glob("fisher-*"))


def test_other_options_do_not_take_a_run_up(world, command, killed, tmp_path):
    line = (*words(world, "purify"), "--out", tmp_path / "run")
    killed(*line, once=lambda: (tmp_path / "run" / FISHER).exists())
    code, _, err = command(*line, "--mode", "posterior")
    assert (code, err.count("\n")) == (2, 1)
    assert "unfinished run with other options (--mode)" in err


def test_a_second_process_does_not_enter_a_run(world, command, killed, tmp_path):
    run = tmp_path / "run"
    line = (*words(world, "purify"), "--out", run)
    refused = []

    def meanwhile():
        if (run / "environment.json").exists():
            refused.append(command(*line))
        return refused

    killed(*line, once=meanwhile)
    code, _, err = refused[0]
    assert (code, err.count("\n")) == (2, 1)
    assert f"{run}: another process is writing this run" in err


def test_compare_killed_in_the_sweep_with_and_without_the_attack(world, command, killed, tmp_path):
    strategies = ("--strategies", "fine-purifying")
    blind = (*words(world, "compare", *strategies), "--out", tmp_path / "blind")
    assert command(*blind)[0] == 0
    known = (*words(world, "compare", *strategies), "--out", tmp_path / "known", "--test-data",
             world.test, "--known-attack")  # fmt: skip
    killed(*known, once=lambda: lines(tmp_path / "known") >= 2)
    code, _, err = command(*known)
    assert code == 0, err
    assert lines(tmp_path / "known") == 3
    results = []
    for run in ("blind", "known"):
        results.append(json.loads((tmp_path / run / "result.json").read_text()))
        for file in (SWEEP, FISHER):
            assert (tmp_path / run / file).read_bytes() == (tmp_path / "blind" / file).read_bytes()
    chosen = [[(row["strategy"], row["rho"]) for row in found["chosen"]] for found in results]
    assert chosen[0] == chosen[1]
    assert "ASR" not in (tmp_path / "known" / SWEEP).read_text()
    assert results[1]["before"]["ASR"] > 95  # of the suspect as it came, a resumed sweep or not
