import json

import pytest
from cascadebert.cli import app
from cascadebert.words import write_words
from octavo.cli import run

SIZES = {"train": 1200, "dev": 300, "test": 300}


@pytest.fixture
def command(capsys):
    """Run a command in this process; gives the exit code, stdout and stderr."""

    def call(*words):
        capsys.readouterr()
        code = run(app, [str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A folder of generated words."""
    folder = tmp_path_factory.mktemp("words") / "words"
    write_words(folder, list(SIZES.items()))
    return folder


@pytest.fixture(scope="session")
def trained(words, tmp_path_factory):
    """A cascade of two small models trained on them, good enough to be told from chance."""
    out = tmp_path_factory.mktemp("trained") / "cascade"
    code = run(app, [
        "train", "--model", "scratch:1x16", "--model", "scratch:2x32",
        "--train-data", str(words), "--out", str(out), "--alphabet", "char",
        "--max-length", "16", "--learning-rate", "4e-3", "--epochs", "4", "--epochs", "10",
        "--batch-size", "32", "--quiet",
    ])  # fmt: skip
    assert code == 0
    return out


@pytest.fixture(scope="session")
def calibrated(trained, words):
    """The same with a policy for 2x."""
    code = run(app, ["calibrate", "--model", str(trained), "--dev-data", str(words / "dev.jsonl"),
                     "--target-speedup", "2", "--quiet"])  # fmt: skip
    assert code == 0
    assert json.loads((trained / "policy.json").read_text())["target_speedup"] == 2
    return trained
