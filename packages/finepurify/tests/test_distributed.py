"""The Fisher diagonal of two processes is that of one, and the first alone writes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

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
