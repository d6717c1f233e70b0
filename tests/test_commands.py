"""The contract of every package's command line."""

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from cyclopts import App, Parameter
from octavo.cli import make_app, run

COMMON_OPTIONS = ("--config", "--json", "--verbose", "--quiet", "--log-file")
LONG_NAME = re.compile(r"--[a-z][a-z0-9]*(-[a-z0-9]+)*")
HEAVY = ("torch", "transformers", "pandas")


@pytest.fixture
def app(package):
    return importlib.import_module(f"{package.name}.cli").app


def commands_of(app: App, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], App]:
    """Every command by the words that call it, those of groups of commands too."""
    found = {}
    for word in app:
        if not word.startswith("-"):
            found[*path, word] = app[word]
            found |= commands_of(app[word], (*path, word))
    return found


def arguments_of(app: App, command: App) -> list:
    """What a command takes and shows; the common options are those of `app.meta`."""
    if command.default_command is None:
        return []
    arguments = command.assemble_argument_collection(
        default_parameter=app.default_parameter, parse_docstring=True
    )
    return [argument for argument in arguments if argument.show]


def faults(app: App) -> list[str]:
    """What the contract forbids, a line each."""
    commands = commands_of(app)
    found = [f"{' '.join(words)}: no help" for words, one in commands.items() if not one.help]
    for words, command in {(): app.meta, **commands}.items():
        for argument in arguments_of(app, command):
            where = " ".join([*words, argument.name])
            if not (argument.parameter.help or "").strip():
                found.append(f"{where}: no help")
            options = [name for name in argument.names if name.startswith("-")]
            found += [f"{where}: {name}" for name in options if not LONG_NAME.fullmatch(name)]
    return found


def run_process(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "100"}
    )


def imported_modules(import_times: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in import_times.splitlines()}


def complaint(app, arguments, capsys) -> str:
    """The one line that a command prints when the user's input is wrong."""
    assert run(app, arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"{app.name[0]}: ")
    return printed.err


def test_every_command_and_option_has_help_and_a_long_name(app):
    assert commands_of(app)
    assert faults(app) == []


def test_faults_are_found():
    app = make_app("octavo", "A sample.")

    def silent(given, short=0):
        raise AssertionError

    app.command(silent)
    app["silent"].default_parameter = Parameter(name_transform=lambda name: f"{name}_of_it")
    assert "silent: no help" in faults(app)
    assert "silent --given_of_it: --given_of_it" in faults(app)
    assert "silent --short_of_it: no help" in faults(app)


def test_demo_is_there(app):
    options = {name for argument in arguments_of(app, app["demo"]) for name in argument.names}
    assert {"--profile", "--seeds", "--out", "--overwrite"} <= options


def test_every_help_page_lists_the_common_options(app, capsys, undisturbed):
    for words in [(), *commands_of(app)]:
        assert run(app, [*words, "--help"]) == 0
        page = capsys.readouterr().out
        missing = [option for option in COMMON_OPTIONS if not re.search(rf"{option}\b", page)]
        assert missing == [], words


def test_console_command_answers(package, commands_folder):
    command = str(commands_folder / package.name)
    page = run_process(command, "--help")
    assert page.returncode == 0, page.stderr
    assert f"Usage: {package.name} " in page.stdout
    answer = run_process(command, "--version")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [package.name, version(package.name)]


def test_exit_code_leaves_the_process(package, commands_folder):
    done = run_process(str(commands_folder / package.name), "demo", "--no-such-option")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_module_answers_like_the_command(package):
    answer = run_process(sys.executable, "-m", package.name, "--version")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [package.name, version(package.name)]


def test_help_imports_nothing_heavy(package):
    done = run_process(sys.executable, "-X", "importtime", "-m", package.name, "--help")
    imported = imported_modules(done.stderr)
    assert done.returncode == 0
    assert f"{package.name}.cli" in imported
    assert imported & set(HEAVY) == set()


def test_unknown_option_is_named(app, capsys, undisturbed):
    assert "--no-such-option" in complaint(app, ["demo", "--no-such-option"], capsys)


def test_every_command_refuses_an_unknown_option(app, capsys, undisturbed):
    for words in commands_of(app):
        complaint(app, [*words, "--no-such-option", "1"], capsys)
    assert list(undisturbed.iterdir()) == []


def test_unknown_command_is_named(app, capsys, undisturbed):
    assert "no-such-command" in complaint(app, ["no-such-command"], capsys)


def test_missing_config_is_named(app, capsys, undisturbed):
    assert "missing.yaml" in complaint(app, ["demo", "--config", "missing.yaml"], capsys)
    assert list(undisturbed.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"seed: [1, 2", "bad.yaml, line "),
        (b"- seed\n- device\n", "bad.yaml"),
        (b"seed: \xff\n", "bad.yaml"),
        (b"no-such-option: 1\n", "no-such-option"),
        (b"seed: many\n", "seed"),
    ],
)
def test_bad_config_is_named(app, content, named, capsys, undisturbed):
    (undisturbed / "bad.yaml").write_bytes(content)
    assert named in complaint(app, ["demo", "--config", "bad.yaml"], capsys)
    assert [path.name for path in undisturbed.iterdir()] == ["bad.yaml"]
