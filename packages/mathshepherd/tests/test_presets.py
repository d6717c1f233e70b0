"""Presets: every command of their scripts is one that the package takes, in an order that chains."""

import os
import shlex
import subprocess

import pytest
import yaml
from cyclopts.config import Dict
from mathshepherd.cli import app
from mathshepherd.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_each_command_is_understood(name, command, tmp_path, monkeypatch):
    out = tmp_path / "preset"
    code, said, err = command("preset", name, "--out", out)
    assert code == 0, err
    assert "bash" in said
    text = (out / "run.sh").read_text().replace("\\\n", " ")
    made = set()
    for line in text.splitlines():
        if "|| mathshepherd" not in line:
            continue
        words = shlex.split(line.partition("|| mathshepherd")[2])
        place, file = words[-1], words[words.index("--config") + 1]
        assert {word for word in words[:-1] if word.startswith("runs/")} <= made
        made.add(place)
        options = yaml.safe_load((out / file).read_text())
        assert options == PRESETS[name].stages[len(made) - 1].options
        at = words.index("--config")
        with monkeypatch.context() as patch:
            patch.setattr(app, "config", (Dict(options, use_commands_as_keys=False, source=file),))
            _, bound, unused = app.parse_args(
                words[:at] + words[at + 2 :], exit_on_error=False, print_error=False
            )[:3]  # fmt: skip
        assert bound.arguments
        assert not unused
    assert made == {f"runs/{stage.run}" for stage in PRESETS[name].stages}
    assert command("preset", name, "--out", out)[0] == 2


def test_the_script_asks_for_files_and_passes_over_what_has_run(tmp_path, command):
    out = tmp_path / "preset"
    assert command("preset", "released-prm", "--out", out)[0] == 0
    bare = {"PATH": os.environ["PATH"]}
    run = subprocess.run(["bash", out / "run.sh"], env=bare, capture_output=True, text=True)
    assert run.returncode != 0
    assert "TEST" in run.stderr
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "mathshepherd"
    stand_in.write_text('#!/bin/sh\necho "$*" >> calls\n')
    stand_in.chmod(0o755)
    (out / "runs" / "candidates").mkdir(parents=True)
    (out / "runs" / "candidates" / "result.json").write_text("{}")
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TEST": "test.jsonl"}
    subprocess.run(["bash", out / "run.sh"], env=env, cwd=tmp_path, check=True)
    calls = (out / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["score", "verify"]
    # a file is found from where the script is called, a hub id is left as it is
    (tmp_path / "test.jsonl").write_text("")
    (out / "runs" / "candidates" / "result.json").unlink()
    for named, meant in (("test.jsonl", str((tmp_path / "test.jsonl").resolve())), ("a/b", "a/b")):
        (out / "calls").unlink()
        env["TEST"] = named
        subprocess.run(["bash", out / "run.sh"], env=env, cwd=tmp_path, check=True)
        first = (out / "calls").read_text().splitlines()[0].split()
        assert first[first.index("--data") + 1] == meant
