"""Versions, licences and what the repository may not name."""

import importlib
import re
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

HEADING = re.compile(r"^## \[?(\d+\.\d+\.\d+)\b", re.MULTILINE)

#: How the addresses of package indexes look; the patterns name none.
INDEX_ADDRESSES = [
    re.compile(pattern)
    for pattern in (
        r"://[^\s\"'`<>]*/simple\b",
        r"registry = \"[a-z+.-]+://",
        r"://files\.[a-z]",
        r"\bpyp.\.[a-z]{2}",
        r"\bfiles\.python[a-z]*\.",
    )
]


def newest_in_changelog(text: str) -> str | None:
    heading = HEADING.search(text)
    return heading[1] if heading else None


def forbidden(text: str, folder: str) -> list[str]:
    """Addresses of package indexes in a text, and the folder as an absolute path."""
    here = re.compile(rf"(?<![\w.~/-]){re.escape(folder)}(?![\w.-])")
    return [found[0] for pattern in [*INDEX_ADDRESSES, here] for found in pattern.finditer(text)]


@pytest.fixture(scope="session")
def tracked(root, git):
    """Text of every file that git tracks, uv.lock in its committed form."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    names = [name for name in git(root, "ls-files", "-z").split("\0") if name]
    texts = {
        name: (root / name).read_bytes().decode(errors="replace")
        for name in names
        if (root / name).is_file()
    }
    return texts | {"uv.lock": git(root, "show", ":uv.lock")}


def test_versions_agree(member):
    changelog = (member.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    declared = member.project["version"]
    assert newest_in_changelog(changelog) == declared
    assert version(member.name) == declared
    assert importlib.import_module(member.name).__version__ == declared


@pytest.mark.parametrize(
    ("changelog", "newest"),
    [
        ("# Changes\n\n## 0.2.0\n\n## 0.1.0\n", "0.2.0"),
        ("## [1.10.3] - 2026-01-01\n## 1.10.2\n", "1.10.3"),
        ("# Changes\n\n### 0.1.0\n", None),
    ],
)
def test_newest_version_is_read(changelog, newest):
    assert newest_in_changelog(changelog) == newest


def test_package_bounds_octavo_from_above(package, root):
    requirements = [Requirement(line) for line in package.project["dependencies"]]
    (octavo,) = [one for one in requirements if one.name == "octavo"]
    assert {one.operator for one in octavo.specifier} & {"<", "<=", "==", "~="}
    assert octavo.specifier.contains(version("octavo"))


def test_licence_is_the_workspaces(member, root):
    assert (member.folder / "LICENSE").read_bytes() == (root / "LICENSE").read_bytes()
    assert member.project["license"] == "Apache-2.0"


def test_python_versions_agree(members):
    assert len({member.project["requires-python"] for member in members}) == 1


def test_no_file_names_an_index_or_this_folder(tracked, root):
    found = {name: forbidden(text, str(root)) for name, text in tracked.items()}
    assert {name: what for name, what in found.items() if what} == {}


def test_committed_lock_names_no_host(tracked):
    assert "[[package]]" in tracked["uv.lock"]
    assert "://" not in tracked["uv.lock"]


#: In parts, so that this file itself passes.
HTTPS, HOST = "https:" + "//", "mirror.example"


@pytest.mark.parametrize(
    "text",
    [
        f"index-url = {HTTPS}{HOST}/simple",
        f'--index-url "{HTTPS}user@{HOST}:8080/root/simple/" torch',
        f'source = {{ registry = "{HTTPS}{HOST}/index" }}',
        f"{HTTPS}files.{HOST}/packages/a.whl",
        "see py" + "pi.org for it",
        "cd /some/where/clone && make",
        "path: '/some/where/clone/packages'",
    ],
)
def test_forbidden_words_are_found(text):
    assert forbidden(text, "/some/where/clone")


@pytest.mark.parametrize(
    "text",
    [
        "a simple https:" + "//example.org/page/simplest",
        "/some/where/clone-of-it and /else/some/where/clone",
        'registry = "index"',
        'url = "/packages/files.txt"',
    ],
)
def test_other_words_are_not(text):
    assert forbidden(text, "/some/where/clone") == []
