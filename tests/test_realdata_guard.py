"""A test of real data may be skipped only where there is none."""

import shutil
import subprocess
import sys

import pytest

READS_DATA = """\
import pytest

@pytest.mark.realdata
def test_reads(data_folder):
    assert [path.name for path in data_folder.iterdir()] == ["rows.csv"]
"""
SKIPS = """\
import pytest

@pytest.mark.realdata
def test_skips():
    pytest.skip("of its own accord")
"""
SKIPS_WHOLE_FILE = """\
import pytest

pytest.skip("of its own accord", allow_module_level=True)

@pytest.mark.realdata
def test_never_seen(data_folder):
    pass
"""
SKIPS_OTHERS = """\
import pytest

def test_skips():
    pytest.skip("needs an accelerator")

@pytest.mark.realdata
@pytest.mark.xfail(reason="not yet")
def test_fails_as_foreseen(data_folder):
    assert not data_folder.exists()
"""
OUTSIDE = """\
def test_has_no_package(data_folder):
    pass
"""


@pytest.fixture
def session(tmp_path, root):
    """Run a test file of the package `alpha` in a scratch workspace, with or without its data."""
    repository = tmp_path / "main"

    def run(test, with_data, folder="packages/alpha/tests", options=()):
        (repository / folder).mkdir(parents=True)
        (repository / folder / "test_it.py").write_text(test)
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(root / name, repository / name)
        if with_data:
            data = tmp_path / "shared" / "data" / "alpha"
            data.mkdir(parents=True)
            (data / "rows.csv").touch()
        pytest_command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            *options,
            folder,
        ]
        done = subprocess.run(
            pytest_command, cwd=repository, capture_output=True, text=True, check=False
        )
        guard = [line for line in done.stdout.splitlines() if "real data is there" in line]
        return done.returncode, guard, done.stdout

    return run


def test_data_is_read_where_it_is(session):
    code, guard, output = session(READS_DATA, with_data=True)
    assert (code, guard) == (0, [])
    assert "1 passed" in output


def test_test_is_skipped_where_it_is_not(session):
    code, guard, output = session(READS_DATA, with_data=False)
    assert (code, guard) == (0, [])
    assert "1 skipped" in output
    assert "no real data at" in output


@pytest.mark.parametrize("options", [(), ("-n", "2")])
@pytest.mark.parametrize("test", [SKIPS, SKIPS_WHOLE_FILE])
def test_skip_beside_the_data_fails_the_session(session, test, options):
    code, guard, output = session(test, with_data=True, options=options)
    assert code == 1
    assert len(guard) == 1
    assert "packages/alpha/tests/test_it.py" in guard[0]
    assert "1 skipped" in output


@pytest.mark.parametrize("test", [SKIPS, SKIPS_WHOLE_FILE])
def test_skip_without_the_data_is_allowed(session, test):
    code, guard, _ = session(test, with_data=False)
    assert guard == []
    assert code == (0 if test == SKIPS else pytest.ExitCode.NO_TESTS_COLLECTED)


def test_other_skips_are_allowed(session):
    code, guard, output = session(SKIPS_OTHERS, with_data=True)
    assert (code, guard) == (0, [])
    assert "1 skipped, 1 xfailed" in output


def test_fixture_outside_a_package_says_so(session):
    code, _, output = session(OUTSIDE, with_data=True, folder="tests")
    assert code == 1
    assert "data_folder is for tests in packages/<package>/tests" in output
