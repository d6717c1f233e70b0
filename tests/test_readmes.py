"""What the READMEs tell the reader to type works."""

import importlib
import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
from octavo.cli import make_app

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<kind>.*)\n(?P<body>(?:.*\n)*?)(?P=indent)```", re.MULTILINE
)
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "(", ")"}
OTHER_NAMES = {"sh", "shell", "console", "shell-session", "zsh", "bash-test"}


@pytest.fixture(scope="session")
def apps(packages):
    return {one.name: importlib.import_module(f"{one.name}.cli").app for one in packages}


def blocks(text: str, kind: str) -> list[str]:
    return [
        textwrap.dedent(fence["body"])
        for fence in FENCE.finditer(text)
        if fence["kind"].strip() == kind
    ]


def run_blocks(text: str, folder: Path, commands: Path) -> subprocess.CompletedProcess[str]:
    """Run all test blocks in one shell, as a reader does who copies them one after the other."""
    script = "\n".join(blocks(text, "bash test"))
    path = os.pathsep.join([str(commands), os.environ.get("PATH", os.defpath)])
    return subprocess.run(
        ["bash", "-ex", "-o", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def simple_commands(block: str) -> list[list[str]]:
    """The words of each command: continued lines joined, comments and operators left out."""
    found: list[list[str]] = []
    for line in block.replace("\\\n", " ").splitlines():
        found.append([])
        for word in shell_words(line):
            if word in OPERATORS:
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


def shell_words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "#", True
    try:
        return list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return line.split()


def words_after(words: list[str], apps) -> tuple[str, list[str]] | None:
    """The package whose command this is, and its arguments."""
    for place, word in enumerate(words):
        before = words[:place]
        first = all(re.fullmatch(r"\$|\w+=.*", one) for one in before)
        if Path(word).name in apps and (first or before[-1] in ("-m", "run")):
            return Path(word).name, words[place + 1 :]
    return None


def known_options(app, command) -> set[str]:
    names = {"--help", "-h", "--version"}
    for one in (app.meta, command):
        if one.default_command is not None:
            given = one.assemble_argument_collection(default_parameter=app.default_parameter)
            names = names.union(*(argument.names for argument in given))
    return names


def commands_below(command) -> list[str]:
    """Names of a command's own commands; flags such as --help stand among them."""
    return [word for word in command if not word.startswith("-")]


def mistakes(text: str, apps) -> list[str]:
    """Commands and options in bash blocks that are not there."""
    found = []
    for words in [words for block in blocks(text, "bash") for words in simple_commands(block)]:
        called = words_after(words, apps)
        if called is None:
            continue
        name, arguments = called
        command, line = apps[name], " ".join([name, *arguments])
        while arguments and not arguments[0].startswith("-") and commands_below(command):
            if arguments[0] not in command:
                found.append(f"{line}: no command {arguments[0]}")
                break
            command, arguments = command[arguments[0]], arguments[1:]
        else:
            options = [
                word.partition("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)
            ]
            unknown = [one for one in options if one not in known_options(apps[name], command)]
            found += [f"{line}: no option {one}" for one in unknown]
    return found


@pytest.mark.untraced
def test_test_blocks_run(readme, tmp_path, commands_folder):
    done = run_blocks(readme.read_text(encoding="utf-8"), tmp_path, commands_folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_commands_and_options_exist(readme, apps):
    assert mistakes(readme.read_text(encoding="utf-8"), apps) == []


def test_commands_stand_in_checked_blocks(readme):
    kinds = {fence["kind"].strip() for fence in FENCE.finditer(readme.read_text(encoding="utf-8"))}
    assert kinds & OTHER_NAMES == set(), "fence commands with ```bash or ```bash test"


@pytest.fixture
def sample_apps():
    app = make_app("sample", "A sample.")

    @app.command
    def train(model: str, rate: float = 1.0) -> None:
        raise AssertionError

    return {"sample": app}


def readme_with(*lines: str, kind: str = "bash") -> str:
    return "\n".join(["# Sample", f"```{kind}", *lines, "```", "", "Words."])


@pytest.mark.parametrize(
    "line",
    [
        "sample train --model x --rate=2 --json > out.json",
        "sample train \\\n  --model x \\\n  --rate -1",
        "sample --help  # not --an-option",
        "echo sample --any && sample train --model 'a --b c'",
        "pip install ./shared ./packages/sample --quiet",
        "make demo PACKAGE=sample --any",
        "sample --version",
        "echo 'a quotation\nof two lines'",
    ],
)
def test_good_lines_pass(line, sample_apps):
    assert mistakes(readme_with(line), sample_apps) == []


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("sample train --modle x", "--modle"),
        ("sample train \\\n  --model x \\\n  --rates 2", "--rates"),
        ("sample train --model x --no-json", "--no-json"),
        ("sample train -m x", "-m"),
        ("sample trian --model x", "trian"),
        ("sample train --lr 2 'a quotation\nof two lines'", "--lr"),
        ("sample --no-such train", "--no-such"),
        ("cd here && sample train --lr 2", "--lr"),
        ("FAST=1 uv run sample train --lr 2 | tail", "--lr"),
        ("$ .venv/bin/sample train --lr 2", "--lr"),
        ("torchrun --nproc-per-node 2 -m sample train --lr 2", "--lr"),
    ],
)
def test_bad_lines_are_found(line, missing, sample_apps):
    found = mistakes(readme_with("echo first", line), sample_apps)
    assert len(found) == 1
    assert found[0].endswith(missing)


def test_indented_block_is_read(sample_apps):
    text = textwrap.indent(readme_with("sample train --lr 2"), "    ")
    assert len(mistakes(text, sample_apps)) == 1


def test_failing_test_block_fails(tmp_path, commands_folder):
    text = readme_with("touch made", "false", "touch after", kind="bash test")
    assert run_blocks(text, tmp_path, commands_folder).returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_test_blocks_follow_each_other(tmp_path, commands_folder):
    first = readme_with("mkdir inner", "cd inner", kind="bash test")
    second = readme_with("touch made", "command -v python", kind="bash test")
    skipped = readme_with("touch unwanted", "false")
    done = run_blocks(f"{first}\n{skipped}\n{second}\n", tmp_path, commands_folder)
    assert done.returncode == 0
    assert Path(done.stdout.strip()).parent == commands_folder
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["made"]


def test_tables_are_those_of_the_committed_results(readme: Path, root: Path, load_script):
    tables = load_script(root / ".ci" / "tables.py")
    assert tables.filled(readme) == readme.read_text(encoding="utf-8")


def test_a_changed_number_is_noticed(tmp_path: Path, root: Path, load_script):
    (tmp_path / "result.json").write_text('{"rows": [{"a": 1, "b": 2}]}')
    page = tmp_path / "README.md"
    page.write_text("x\n<!-- table result.json rows: a -->\n| a |\n| 9 |\n<!-- end -->\ny\n")
    right = load_script(root / ".ci" / "tables.py").filled(page)
    assert right != page.read_text()
    assert right == (
        "x\n<!-- table result.json rows: a -->\n| a |\n| --- |\n| 1 |\n<!-- end -->\ny\n"
    )
