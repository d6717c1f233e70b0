"""A killed run goes on and ends as one that was not killed: the same bytes in every file that counts."""

import json

import pytest
from finepurify.points import FILE as FISHER
from finepurify.sweep import FILE as SWEEP

SHORT = ("--batch-size", 8, "--steps", 2, "--learning-rate", "1e-3", "--points", 0.25,
         "--points", 0.75, "--drop", 100, "--grid", 0.5, "--grid", 0.7, "--grid", 0.9,
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


def test_purify_killed_in_the_sweep(world, whole, command, killed, tmp_path):
    line = (*words(world, "purify"), "--out", tmp_path / "run")
    killed(*line, once=lambda: lines(tmp_path / "run") >= 2)
    assert 2 <= lines(tmp_path / "run") < 4
    assert not (tmp_path / "run" / "model").exists()
    code, _, err = command(*line)
    assert code == 0, err
    assert same(tmp_path / "run", whole) == []
    assert lines(whole) == 4
    assert not leftovers(tmp_path / "run")
    assert command(*line)[0] == 2  # it is finished now


def test_purify_killed_between_two_points(world, whole, command, killed, tmp_path):
    line = (*words(world, "purify"), "--out", tmp_path / "run")
    first = tmp_path / "run" / "fisher-0.safetensors"
    killed(*line, once=first.exists)
    if first.exists():  # it may have been quick
        first.touch()
        then = first.stat().st_ino
        assert not (tmp_path / "run" / FISHER).exists()
        assert then
    code, _, err = command(*line)
    assert code == 0, err
    assert same(tmp_path / "run", whole) == []
    assert not list((tmp_path / "run").glob("fisher-*"))


def test_other_options_do_not_take_a_run_up(world, command, killed, tmp_path):
    line = (*words(world, "purify"), "--out", tmp_path / "run")
    killed(*line, once=lambda: (tmp_path / "run" / FISHER).exists())
    code, _, err = command(*line, "--mode", "posterior")
    assert (code, err.count("\n")) == (2, 1)
    assert "unfinished run with other options (--mode)" in err


def test_a_torn_line_of_the_sweep_is_mended(world, whole, command, killed, tmp_path):
    line = (*words(world, "purify"), "--out", tmp_path / "run")
    killed(*line, once=lambda: lines(tmp_path / "run") >= 1)
    file = tmp_path / "run" / SWEEP
    known = file.read_text()
    file.write_text(known + '{"strategy": "fine-purifying", "rho": 0.5, "ACC": 1')
    code, _, err = command(*line)
    assert code == 0, err
    assert same(tmp_path / "run", whole) == []


def test_what_the_sweep_knows_is_not_tried_again(world, whole, command, killed, tmp_path, monkeypatch):
    from finepurify.bench import Bench

    line = (*words(world, "purify"), "--out", tmp_path / "run")
    killed(*line, once=lambda: lines(tmp_path / "run") >= 3)
    left = 4 - lines(tmp_path / "run")
    tried, plain = [], Bench.defended

    def counted(bench, weights, name):
        tried.append(name)
        return plain(bench, weights, name)

    monkeypatch.setattr(Bench, "defended", counted)
    assert command(*line)[0] == 0
    rho = json.loads((whole / "result.json").read_text())["rho"]
    assert tried[left:] == [f"fine-purifying {rho:g}"]  # the one that is written
    assert len(tried) == left + 1
    assert same(tmp_path / "run", whole) == []


def test_compare_killed_in_the_sweep_with_and_without_the_attack(world, command, killed, tmp_path):
    strategies = ("--strategies", "fine-purifying", "--strategies", "fine-mixing")
    blind = (*words(world, "compare", *strategies), "--out", tmp_path / "blind")
    assert command(*blind)[0] == 0
    known = (*words(world, "compare", *strategies), "--out", tmp_path / "known", "--test-data",
             world.test, "--known-attack")  # fmt: skip
    killed(*known, once=lambda: lines(tmp_path / "known") >= 3)
    assert lines(tmp_path / "known") < 7
    code, _, err = command(*known)
    assert code == 0, err
    assert lines(tmp_path / "known") == 7
    results = []
    for run in ("blind", "known"):
        results.append(json.loads((tmp_path / run / "result.json").read_text()))
        for file in (SWEEP, FISHER):
            assert (tmp_path / run / file).read_bytes() == (tmp_path / "blind" / file).read_bytes()
    chosen = [[(row["strategy"], row["rho"]) for row in found["chosen"]] for found in results]
    assert chosen[0] == chosen[1]
    assert "ASR" not in (tmp_path / "known" / SWEEP).read_text()
    assert results[1]["before"]["ASR"] > 95  # of the suspect as it came, a resumed sweep or not
