"""The committed lock names no host, whichever index it was made with."""

import shutil
import subprocess
import sys

import pytest

HEAD = """\
version = 1
revision = 3
requires-python = ">=3.11"

"""
OPTIONS = """\
[options]
exclude-newer = "2026-01-01T00:00:00Z"

"""
MANIFEST = """\
[manifest]
members = [
    "octavo",
]

[[package]]
name = "first"
version = "1.0"
source = { registry = "REGISTRY" }
dependencies = [
    { name = "second", marker = "sys_platform == 'linux'" },
]
sdist = { url = "FILES/packages/ab/first-1.0.tar.gz", hash = "sha256:aa", size = 1 }
wheels = [
    { url = "FILES/packages/cd/first-1.0-py3-none-any.whl", hash = "sha256:bb", size = 2 },
]

[package.optional-dependencies]
extra = [
    { name = "second" },
]

[[package]]
name = "octavo"
source = { editable = "shared" }

[package.dev-dependencies]
dev = [
    { name = "first" },
]

"""
METADATA = """\
[package.metadata]
requires-dist = [{ name = "first", specifier = ">=1" }]
provides-extras = ["extra"]

[package.metadata.requires-dev]
dev = [
    { name = "first", index = "REGISTRY" },
]

"""
SECOND = """\
[[package]]
name = "second"
version = "2.0é"
source = { registry = "REGISTRY" }
wheels = [
    { url = "FILES/packages/ef/second-2.0-py3-none-any.whl", hash = "sha256:cc" },
]
"""
METADATA_AT_THE_END = """
[package.metadata]
requires-dist = [
    { name = "second" },
]
"""

#: In two parts, so that this file too passes the search for addresses of indexes.
HTTPS = "https:" + "//"

#: Registry and place of the files: one host for both, or two, with ports and users.
PLACES = [
    (f"{HTTPS}one.example/simple", f"{HTTPS}files.one.example"),
    (f"{HTTPS}user:word@two.example:8443/root/index/", "http://two.example:8443"),
    ("file:///srv/index", "file://"),
]


def filled(text: str, place: tuple[str, str]) -> str:
    return text.replace("REGISTRY", place[0]).replace("FILES", place[1])


def written(place: tuple[str, str]) -> str:
    """A lock as uv writes it."""
    return filled(HEAD + OPTIONS + MANIFEST + METADATA + SECOND + METADATA_AT_THE_END, place)


#: The same without hosts and tables; all other bytes are kept.
PORTABLE = filled(HEAD + MANIFEST + SECOND + "\n", ("index", ""))


@pytest.fixture
def lock(load_script, root):
    return load_script(root / ".ci" / "lock.py")


@pytest.mark.parametrize("place", PLACES)
def test_hosts_and_tables_go_and_the_rest_stays(lock, place):
    assert lock.clean(written(place)) == PORTABLE
    assert "://" not in PORTABLE


def test_table_at_the_end_without_a_newline_goes(lock):
    assert lock.clean(written(PLACES[0]).removesuffix("\n")) == PORTABLE


def test_table_below_options_goes(lock):
    below = '[options.exclude-newer-package]\nfirst = "2026-01-02T00:00:00Z"\n\n'
    assert lock.clean(HEAD + OPTIONS + below + MANIFEST) == lock.clean(HEAD + MANIFEST)


def test_cleaning_twice_changes_nothing(lock):
    assert lock.clean(PORTABLE) == PORTABLE


def test_path_below_the_host_is_kept(lock):
    below = lock.clean(written((f"{HTTPS}a.example/simple", f"{HTTPS}a.example/mirror")))
    assert below == PORTABLE.replace('"/packages', '"/mirror/packages')


def test_newlines_and_letters_pass_through_the_process(root):
    done = subprocess.run(
        [sys.executable, str(root / ".ci" / "lock.py"), "clean"],
        input=written(PLACES[0]).encode(),
        capture_output=True,
        check=True,
    )
    assert done.stdout == PORTABLE.encode()


def test_unknown_word_is_refused(root):
    done = subprocess.run([sys.executable, str(root / ".ci" / "lock.py"), "clear"], check=False)
    assert done.returncode == 2


def make_setup(folder):
    """`make setup` without what uv does in it."""
    nothing = shutil.which("true")
    assert nothing
    make = ["make", "--silent", "setup", f"UV={nothing}"]
    done = subprocess.run(make, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def scratch(tmp_path, root, git):
    """A repository set up by make, with a lock committed."""
    for name in (".ci/lock.py", ".gitattributes", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    git(tmp_path, "init", "--quiet")
    make_setup(tmp_path)
    (tmp_path / "uv.lock").write_bytes(written(PLACES[0]).encode())
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "Lock")
    return tmp_path


@pytest.fixture
def clone(scratch, tmp_path_factory, git):
    """A fresh clone of it, set up too, in which the lock is still as committed."""
    folder = tmp_path_factory.mktemp("clone")
    git(folder, "clone", "--quiet", str(scratch), ".")
    make_setup(folder)
    assert (folder / "uv.lock").read_bytes() == PORTABLE.encode()
    return folder


def test_git_commits_the_portable_form(scratch, git):
    assert git(scratch, "show", "HEAD:uv.lock") == PORTABLE


@pytest.mark.parametrize("place", PLACES)
def test_clone_stays_clean_when_the_lock_is_filled_in(clone, git, place):
    (clone / "uv.lock").write_bytes(written(place).encode())
    make_setup(clone)  # git takes a file of another size for changed until it is looked at again
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "show", ":uv.lock") == PORTABLE


def test_git_sees_a_changed_version(clone, git):
    changed = written(PLACES[1]).replace('version = "1.0"', 'version = "1.1"')
    (clone / "uv.lock").write_bytes(changed.encode())
    make_setup(clone)
    assert git(clone, "status", "--porcelain") == " M uv.lock\n"


def test_check_tells_a_lock_out_of_step(scratch, lock, monkeypatch):
    monkeypatch.chdir(scratch)
    assert lock.check() is None
    (scratch / "uv.lock").write_bytes(written(PLACES[0]).replace('"1.0"', '"1.1"').encode())
    assert "has changed" in lock.check()


def test_check_tells_a_committed_host(scratch, lock, git, monkeypatch):
    monkeypatch.chdir(scratch)
    (scratch / ".gitattributes").unlink()
    git(scratch, "add", ".")
    (scratch / "uv.lock").write_bytes(written(PLACES[1]).encode())
    git(scratch, "add", "uv.lock")
    assert "names a host" in lock.check()
