"""`make help`, and what `make demo` does whatever the demos do."""

import json
import re
import subprocess
import sys

import pytest

TARGETS = "setup demo test lint bench docs dist dist-check clean help".split()


def make(root, *arguments):
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_help_describes_every_target(root):
    lines = [line.split(maxsplit=1) for line in make(root, "help").splitlines()]
    assert sorted(line[0] for line in lines) == sorted(TARGETS)
    assert all(len(line) == 2 for line in lines)


def test_help_is_the_default(root):
    assert make(root) == make(root, "help")


def test_every_target_is_phony(root):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    phony = " ".join(re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)).split()
    assert sorted(phony) == sorted(TARGETS)


@pytest.mark.parametrize("arguments", [(), ("PACKAGE=some*", "PROFILE=full")])
def test_demo_target_calls_the_script(root, arguments):
    planned = make(root, "--dry-run", "demo", *arguments)
    package, profile = ("some*", "full") if arguments else ("*", "quick")
    assert f".ci/demo.py --packages '{package}' --profile {profile}" in planned


#: A stand-in for a console command: tells what it was asked, then acts as its package is to.
COMMAND = """\
#!{python}
import json, sys
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--out") + 1])
print("own table of", *sys.argv[1:])
print("log of {package}", file=sys.stderr)
claims = json.loads({claims!r})
if claims is not None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.json").write_text(json.dumps({{"claims": claims, "seconds": 1.0}}))
    (folder / "report.html").write_text("report")
sys.exit({exit_code})
"""


def claim(words, passed):
    verdict = {True: "PASS", False: "FAIL", None: "not shown at this size"}[passed]
    return {
        "claim": words,
        "measured": f"{words} measured",
        "criterion": "any",
        "passed": passed,
        "verdict": verdict,
    }


@pytest.fixture
def workspace(tmp_path):
    """A folder with `packages/`, `bin/` and a function that adds a package with its command."""

    def add(package, claims, exit_code):
        (tmp_path / "packages" / package).mkdir(parents=True)
        (tmp_path / "packages" / package / "pyproject.toml").touch()
        command = tmp_path / "bin" / package
        command.parent.mkdir(exist_ok=True)
        command.write_text(
            COMMAND.format(
                python=sys.executable,
                package=package,
                claims=json.dumps(claims),
                exit_code=exit_code,
            )
        )
        command.chmod(0o755)

    add.folder = tmp_path  # pyright: ignore[reportFunctionMemberAccess]
    return add


@pytest.fixture
def run_demos(workspace, load_script, root, capfd):
    """Run the script in the folder: exit code, lines of the table, stderr, the index page."""
    script = load_script(root / ".ci" / "demo.py")
    folder = workspace.folder

    def run(*arguments):
        code = script.main(arguments, folder / "packages", folder / "bin", folder / "runs" / "demo")
        printed = capfd.readouterr()
        rows = [
            [cell.strip() for cell in line.split("│")[1:-1]]
            for line in printed.out.splitlines()
            if line.startswith("│")
        ]
        index = folder / "runs" / "demo" / "index.html"
        return code, rows, printed.err, index.read_text() if index.exists() else ""

    return run


def without_seconds(rows):
    assert all(re.fullmatch(r"\d+(\.\d+)?|", row[-1]) for row in rows)
    return [row[:-1] for row in rows]


def links(index):
    return re.findall(r'href="([^"]*report\.html)"', index)


def test_all_demos_pass(workspace, run_demos):
    workspace("beta", [claim("one", True), claim("two", None)], 0)
    workspace("alpha", [claim("three", True)], 0)
    code, rows, log, index = run_demos()
    assert code == 0
    assert without_seconds(rows) == [
        ["alpha", "three", "three measured", "PASS"],
        ["beta", "one", "one measured", "PASS"],
        ["beta", "two", "two measured", "not shown at this size"],
    ]
    assert [bool(row[-1]) for row in rows] == [True, True, False]  # seconds once a demo
    assert log.splitlines() == [
        "[1/2] alpha demo --profile quick",
        "log of alpha",
        "[2/2] beta demo --profile quick",
        "log of beta",
    ]
    assert links(index) == ["alpha/report.html", "beta/report.html"]
    assert "two measured" in index


def test_every_demo_runs_though_others_fail(workspace, run_demos):
    workspace("answers-no", [claim("one", True), claim("two", False)], 3)
    workspace("crashes", None, 1)
    workspace("passes", [claim("three", True)], 0)
    code, rows, _, index = run_demos()
    assert code == 1
    assert without_seconds(rows) == [
        ["answers-no", "one", "one measured", "PASS"],
        ["answers-no", "two", "two measured", "FAIL"],
        ["crashes", "the demo runs to its end", "did not finish (exit code 1)", "FAIL"],
        ["passes", "three", "three measured", "PASS"],
    ]
    assert links(index) == ["answers-no/report.html", "passes/report.html"]
    assert "did not finish (exit code 1)" in index


@pytest.mark.parametrize(
    ("claims", "exit_code"),
    [
        ([claim("one", True)], 3),
        ([claim("one", False)], 0),
        ([claim("one", True)], 1),
        ([], 0),
        (None, 0),
    ],
)
def test_a_demo_at_odds_with_itself_fails(workspace, run_demos, claims, exit_code):
    workspace("alpha", claims, exit_code)
    assert run_demos()[0] == 1


def test_result_of_an_earlier_run_is_not_shown(workspace, run_demos):
    workspace("alpha", None, 1)
    folder = workspace.folder / "runs" / "demo" / "alpha"
    folder.mkdir(parents=True)
    (folder / "claims.json").write_text(json.dumps({"claims": [claim("old", True)], "seconds": 1}))
    (folder / "report.html").write_text("old report")
    code, rows, _, index = run_demos()
    assert code == 1
    assert [row[3] for row in rows] == ["FAIL"]
    assert "old" not in index
    assert links(index) == []


def test_command_that_is_not_installed_fails(workspace, run_demos):
    workspace("alpha", [claim("one", True)], 0)
    (workspace.folder / "bin" / "alpha").unlink()
    code, rows, log, _ = run_demos()
    assert code == 1
    assert rows[0][2] == "did not finish (exit code 127)"
    assert "make setup" in log


def test_one_package_alone_with_a_profile(workspace, run_demos):
    workspace("alpha", [claim("one", True)], 0)
    workspace("beta", [claim("two", True)], 0)
    code, rows, _, index = run_demos("--packages", "beta", "--profile", "full")
    assert code == 0
    assert [row[0] for row in rows] == ["beta"]
    assert links(index) == ["beta/report.html"]
    runs = workspace.folder / "runs" / "demo"
    assert (runs / "beta.log").read_text().split() == [
        *"own table of demo --profile full --out".split(),
        str(runs / "beta"),
        "--overwrite",
    ]


def test_unmatched_name_lists_the_packages(workspace, run_demos):
    workspace("alpha", [claim("one", True)], 0)
    workspace("beta", [claim("two", True)], 0)
    code, rows, log, index = run_demos("--packages", "gamma*")
    assert (code, rows, index) == (2, [], "")
    assert log == "no package is named gamma*; there are: alpha, beta\n"
