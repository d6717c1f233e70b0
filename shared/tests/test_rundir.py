import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from octavo.errors import ConfigError, DataError, OctavoError
from octavo.rundir import RunDir, atomic, is_finished, options_of, refuse_existing, write_json


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_records_options_environment_and_metrics(tmp_path):
    with RunDir.open(tmp_path / "a" / "run", {"seed": 1, "model": ["x", "y"]}) as run:
        run.log(step=1, loss=0.5)
        run.log(step=2, loss=0.25)
        run.write_text("note.txt", "hello")
        run.write_json("value.json", {"a": 1})
        assert not is_finished(run.path)
    assert files(run.path) == [
        "config.yaml", "environment.json", "metrics.jsonl", "note.txt", "value.json"
    ]  # fmt: skip
    assert (run.path / "config.yaml").read_text() == "seed: 1\nmodel:\n- x\n- y\n"
    record = json.loads((run.path / "environment.json").read_text())
    assert record["status"] == "finished"
    assert record["versions"]["torch"]
    assert record["processes"] == 1
    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_a_finished_run_is_kept_unless_overwriting_is_asked_for(tmp_path):
    with RunDir.open(tmp_path / "run", {"seed": 1}) as run:
        run.write_text("old.txt", "")
    with pytest.raises(ConfigError, match="holds a finished run; choose another --out or --over"):
        RunDir.open(tmp_path / "run", {"seed": 1})
    with (
        pytest.raises(DataError),
        RunDir.open(tmp_path / "run", {"seed": 2}, overwrite=True),
    ):
        raise DataError("wrong after all")
    assert "old.txt" in files(run.path)
    with RunDir.open(tmp_path / "run", {"seed": 2}, overwrite=True) as run:
        assert "old.txt" not in files(run.path)
        assert not run.resumed
    assert files(tmp_path) == ["run"]


def test_a_crashed_run_is_resumed_by_the_same_options_only(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDir.open(tmp_path / "run", {"seed": 1}) as run:
        run.log(step=1)
        raise ZeroDivisionError
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    (run.path / ".part.123.tmp").write_text("half")
    (run.path / ".folder.123.tmp").mkdir()
    (run.path / ".model.123.old.tmp").mkdir()
    with pytest.raises(ConfigError, match=r"other options \(--seed\); use the same to resume"):
        RunDir.open(tmp_path / "run", {"seed": 2})
    again = RunDir.open(tmp_path / "run", {"seed": 1, "device": "cpu"})
    assert again.resumed
    assert again.metrics() == [{"step": 1}]
    assert files(again.path) == ["config.yaml", "environment.json", "metrics.jsonl", "model"]
    again.log(step=2)
    again.forget(lambda line: line["step"] < 2)
    assert again.metrics() == [{"step": 1}]


def test_other_folders_are_never_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "config.yaml").write_text("of: another program\n")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="exists and holds no run; choose another --out"):
            RunDir.open(tmp_path, {}, overwrite)
    assert files(tmp_path) == ["config.yaml", "mine.txt"]
    with pytest.raises(ConfigError, match="holds no run"):
        RunDir.open(tmp_path / "mine.txt", {})
    with pytest.raises(ConfigError, match="nothing can be written there"):
        RunDir.open(tmp_path / "mine.txt" / "run", {})
    (tmp_path / "empty").mkdir()
    assert not RunDir.open(tmp_path / "empty", {}).resumed


def test_wrong_input_leaves_no_folder_but_results_stay(tmp_path):
    with pytest.raises(DataError), RunDir.open(tmp_path / "run", {}):
        raise DataError("no such column")
    assert files(tmp_path) == []
    with pytest.raises(OctavoError), RunDir.open(tmp_path / "run", {}) as run:
        run.write_text("report.md", "it failed")
        raise OctavoError("the floor was not met")
    assert "report.md" in files(tmp_path / "run")


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with RunDir.open(tmp_path / "run", {}) as run:
        run.write_json("a.json", 1)
        run.write_text("a.txt", "")
        run.log(step=1)
    assert not (tmp_path / "run").exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "value.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert target.read_text() == "old"
    assert files(tmp_path) == ["value.txt"]
    with atomic(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    for content in ("one", "two"):
        with atomic(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert files(target) == [content]
    assert files(tmp_path) == ["model"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "value.json"
    write_json(target, "old")
    script = (
        "import sys, time; from pathlib import Path; from octavo.rundir import atomic\n"
        "with atomic(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('ha'); print('writing', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert json.loads(target.read_text()) == "old"


def test_paths_where_nothing_can_be_written(tmp_path):
    with pytest.raises(ConfigError, match="nothing can be written there"):
        write_json(Path("/dev/null/value.json"), 1)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_json(tmp_path / ("long" * 99), 1)
    with pytest.raises(ConfigError, match="nothing can be written below"):
        refuse_existing(Path("/dev/null/value.json"), overwrite=True)
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "x"):
        (tmp_path / "none").read_text()  # not about the path that is written
    refuse_existing(tmp_path / "new", overwrite=False)
    with pytest.raises(ConfigError, match="exists already; choose another name or add --overwrite"):
        refuse_existing(tmp_path, overwrite=False)
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        refuse_existing(tmp_path, overwrite=True)


@dataclass
class Options:
    learning_rate: float = 0.1
    out: Path = Path("here")


def test_options_are_named_as_on_the_command_line():
    options = options_of(Options(), {"seeds": (1, 2), "by_name": {"a": Path("b")}})
    assert options == {"learning-rate": 0.1, "out": "here", "seeds": [1, 2], "by-name": {"a": "b"}}


def test_time_stamps_tell_when(tmp_path):
    with RunDir.open(tmp_path / "run", {}) as run:
        pass
    record = json.loads((run.path / "environment.json").read_text())
    assert record["running_at"] <= record["finished_at"] <= time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextmanager
def held(folder, options, overwrite=False):
    """Another process has the run open; it is killed at the end."""
    ready, here = multiprocessing.Pipe(duplex=False)

    def hold():
        with RunDir.open(folder, options, overwrite):
            here.send("open")
            time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    here.close()
    assert ready.recv() == "open"
    try:
        yield
    finally:
        process.kill()
        process.join()


def content(folder):
    return {file.name: file.read_bytes() for file in folder.rglob("*")}


BUSY = "another process is writing this run; wait for it or stop it, or choose another --out"


def test_a_run_that_another_process_writes_is_left_alone_until_that_is_killed(
    tmp_path, monkeypatch
):
    place = tmp_path / "run"
    with held(place, {"seed": 1}):
        before = content(place)
        for options, overwrite in (({"seed": 1}, False), ({"seed": 2}, False), ({"seed": 1}, True)):
            with pytest.raises(ConfigError, match=f"^{place}: {BUSY}$"):
                RunDir.open(place, options, overwrite)
        assert content(place) == before
        assert files(tmp_path) == ["run"]
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")  # its first process may hold the lock
            RunDir.open(place, {"seed": 1})
    with RunDir.open(place, {"seed": 1}) as run:  # nothing was to be cleared away
        assert run.resumed
    assert files(place) == ["config.yaml", "environment.json"]


def test_of_two_processes_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    import yaml

    place = tmp_path / "run"
    write = yaml.safe_dump
    other = held(place, {"seed": 1})

    def meanwhile(*words, **options):
        monkeypatch.setattr(yaml, "safe_dump", write)
        other.__enter__()
        return write(*words, **options)

    monkeypatch.setattr(yaml, "safe_dump", meanwhile)  # after it was seen that nothing lies there
    try:
        with pytest.raises(ConfigError, match=BUSY):
            RunDir.open(place, {"seed": 2})
        assert (place / "config.yaml").read_text() == "seed: 1\n"
    finally:
        other.__exit__(None, None, None)


def test_a_run_is_free_for_its_own_process_and_once_it_is_closed(tmp_path):
    place = tmp_path / "run"
    first = RunDir.open(place, {})
    with RunDir.open(place, {}) as again:
        assert again.resumed
    del first
    with held(place, {}, overwrite=True):
        pass
    with pytest.raises(ZeroDivisionError), RunDir.open(place, {}):
        raise ZeroDivisionError
    with held(place, {}):
        pass


@pytest.mark.parametrize("missing", ["fcntl", "locks"])
def test_where_there_are_no_such_locks_a_run_is_opened_as_it_is(tmp_path, monkeypatch, missing):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    place = tmp_path / "run"
    with held(place, {}):
        if missing == "fcntl":
            monkeypatch.setitem(sys.modules, "fcntl", None)
        else:
            monkeypatch.setattr(fcntl, "lockf", none)
        assert RunDir.open(place, {}).resumed


def test_a_run_whose_options_cannot_be_written(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ConfigError, match=r"config.yaml: cannot be written \(Permission denied"):
        RunDir.open(tmp_path / "run", {})
