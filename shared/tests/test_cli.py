import io
import json
import logging
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from octavo import console
from octavo.cli import Flat, Seeds, make_app, run
from octavo.console import Outcome
from octavo.errors import DataError
from octavo.runtime import Runtime

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Options:
    learning_rate: float = 0.1
    """How fast."""

    models: tuple[str, ...] = ()
    """Which."""


app = make_app("octavo", "An app for tests.")


@app.command
def show(
    options: Flat[Options] = Options(),
    runtime: Flat[Runtime] = Runtime(),
    *,
    seeds: Seeds = (0,),
) -> Outcome:
    """Show the options."""
    logging.getLogger("octavo").info("at work")
    row = {
        "rate": options.learning_rate,
        "models": list(options.models),
        "seed": runtime.seed,
        "seeds": list(seeds),
    }
    return Outcome({"Options": [row]}, note="That is all.")


@app.command
def fail(kind: str) -> Outcome:
    """Fail in one way or another."""
    if kind == "data":
        raise DataError("rows.csv, line 3:\n  the label is empty")
    if kind == "claim":
        return Outcome({"Claims": [{"claim": "a"}]}, no="1 of 1 claims failed")
    if kind == "interrupt":
        raise KeyboardInterrupt
    raise ZeroDivisionError


def shown(capsys, *words):
    code = run(app, [*words, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out)["Options"][0], err


def test_dataclasses_become_options(capsys):
    code, row, err = shown(
        capsys, "show", "--learning-rate", "3e-5", "--models", "a", "--models", "b",
        "--seed", "7", "--seeds", "0,1,2",
    )  # fmt: skip
    assert (code, err) == (0, "at work\n")
    assert row == {"rate": 3e-5, "models": ["a", "b"], "seed": 7, "seeds": [0, 1, 2]}


def test_a_file_gives_options_and_the_command_line_wins(capsys, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("learning-rate: 3e-5\nseed: 5\nmodels: [x, y]\n")
    code, row, _ = shown(capsys, "show", "--config", str(file), "--seed", "7")
    assert code == 0
    assert row == {"rate": 3e-5, "models": ["x", "y"], "seed": 7, "seeds": [0]}
    file.write_text("learning_rate: 0.5\nquiet: true\n")
    assert shown(capsys, "show", "--config", str(file))[2] == ""
    assert shown(capsys, "show", "--config", str(file))[1]["rate"] == 0.5
    assert shown(capsys, "show")[1]["rate"] == 0.1


def test_results_are_a_table_for_people(capsys):
    assert run(app, ["show", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "Options" in out
    assert "0.1" in out
    assert out.endswith("That is all.\n")
    assert err == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["fail", "data"], 2, "octavo: rows.csv, line 3: the label is empty"),
        (["fail", "claim"], 3, "octavo: 1 of 1 claims failed"),
        (["fail", "interrupt"], 130, "octavo: interrupted; a started run is resumed"),
        (["show", "--learning-rate", "fast"], 2, "--learning-rate"),
        (["show", "--learning-rat", "1"], 2, "Did you mean --learning-rate?"),
        (["sho"], 2, 'Unknown command "sho"'),
        (["fail"], 2, "requires an argument"),
        (["show", "--config", "nowhere.yaml"], 2, "--config nowhere.yaml: No such file"),
        (["show", "--device", "gpu", "--dtype", "float8"], 2, "float8"),
    ],
)
def test_each_error_is_one_line_and_a_code(capsys, words, code, message):
    assert run(app, words) == code
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "line 1: not YAML"),
        (b"- 1\n", "must map option names to values"),
        (b"\xff", "not YAML"),
        (b"unknown: 1\n", "unknown"),
        (b"seed: one\n", "seed"),
        (b"when: 2020-13-45\n", "not YAML"),
        (b"show: {seed: 1}\n", "must be a value or a list"),
    ],
)
def test_a_wrong_file_of_options_is_named(capsys, tmp_path, content, message):
    file = tmp_path / "options.yaml"
    file.write_bytes(content)
    assert run(app, ["show", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "options.yaml" in err
    assert len(err.strip().splitlines()) == 1


def test_a_crash_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(app, ["fail", "crash"])


def test_codes_of_a_real_process(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from test_cli import app, run\nsys.exit(run(app))\n"
    )
    for words, code, words_seen in (
        (["fail", "data"], 2, "the label is empty"),
        (["fail", "crash"], 1, "Traceback"),
        (["show"], 0, "at work"),
    ):
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
        assert done.returncode == code
        assert words_seen in done.stderr


def test_logs_go_to_a_file_too(capsys, tmp_path):
    log = tmp_path / "log.txt"
    assert run(app, ["show", "--quiet", "--log-file", str(log)]) == 0
    assert run(app, ["show", "--verbose", "--log-file", str(log)]) == 0
    assert "octavo INFO at work" in log.read_text()
    assert len(log.read_text().splitlines()) == 1
    capsys.readouterr()
    assert run(app, ["show", "--log-file", str(tmp_path / "no" / "log.txt")]) == 2
    assert "--log-file" in capsys.readouterr().err


def test_help_lists_the_commands_in_their_order(capsys):
    assert run(app, ["--help"]) == 0
    page = capsys.readouterr().out
    assert page.index("show") < page.index("fail")
    assert run(app, ["show", "--help"]) == 0
    page = capsys.readouterr().out
    for option in ("--learning-rate", "--seed", "--config", "--json", "--log-file"):
        assert option in page
    assert run(app, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("octavo 0.")


def test_json_holds_plain_values_only():
    import numpy as np

    row = {
        "a": np.float32(0.5),
        "b": float("nan"),
        "c": Path("x"),
        "d": (1, None),
        "e": np.int64(3),
    }
    content = json.loads(Outcome({"t": [row]}).as_json())
    assert content["t"] == [{"a": 0.5, "b": None, "c": "x", "d": [1, None], "e": 3}]


def test_only_the_first_rank_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(app, ["show"]) == 0
    assert capsys.readouterr() == ("", "")


def test_progress_yields_everything_and_is_silent_off_a_terminal(capsys):
    console.start("octavo")
    assert list(console.progress(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert list(console.progress(iter("ab"), "letters", total=2)) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_progress_shows_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console.start("octavo")
    assert list(console.progress([1, 2], "counting", unit="items")) == [1, 2]
    assert "counting" in terminal.getvalue()
    console.start("octavo", logging.WARNING)
    terminal.truncate(0)
    assert list(console.progress([1, 2], "counting")) == [1, 2]
    assert terminal.getvalue().strip("\0") == ""


def test_interrupt_of_a_real_process(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(
        "import sys, time\nfrom octavo.cli import make_app, run\n"
        "app = make_app('octavo', 'x')\n"
        "@app.command\ndef wait():\n    print('ready', flush=True); time.sleep(60)\n"
        "sys.exit(run(app))\n"
    )
    waiting = subprocess.Popen(
        [sys.executable, str(script), "wait"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert waiting.stdout
    assert waiting.stdout.readline() == "ready\n"
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert "interrupted" in err
