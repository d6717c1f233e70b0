"""What the workspace's tests share. A test that takes `member`, `package` or `readme` runs for each."""

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A git hook that runs the tests points git at its own repository.
for variable in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[variable]


@dataclass(frozen=True)
class Member:
    """A distribution of the workspace: `name` is what is installed and imported."""

    name: str
    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.name

    @property
    def project(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))[
            "project"
        ]


def members_on_disk() -> list[Member]:
    files = [ROOT / "shared" / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
    projects = [(tomllib.loads(file.read_text(encoding="utf-8")), file.parent) for file in files]
    return [Member(content["project"]["name"], folder) for content, folder in projects]


MEMBERS = members_on_disk()
PACKAGES = [member for member in MEMBERS if member.folder.parent.name == "packages"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    readmes = {member.name: member.folder / "README.md" for member in MEMBERS}
    for argument, values in {
        "member": {member.name: member for member in MEMBERS},
        "package": {package.name: package for package in PACKAGES},
        "readme": {"workspace": ROOT / "README.md"} | readmes,
    }.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, values.values(), ids=values.keys())


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def members() -> list[Member]:
    return MEMBERS


@pytest.fixture(scope="session")
def packages() -> list[Member]:
    return PACKAGES


@pytest.fixture(scope="session")
def commands_folder() -> Path:
    """Where the console commands of the running environment lie."""
    return Path(sys.executable).parent


def imported_names(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                found.add(module)
    return {name.partition(".")[0] for name in found} - {""}


@pytest.fixture(scope="session")
def imports() -> Callable[[str], set[str]]:
    """Top-level names that a source imports, wherever in it the import stands."""
    return imported_names


@pytest.fixture(scope="session")
def imports_below() -> Callable[[Path], set[str]]:
    """Top-level names imported by any source file below a folder."""

    def collect(folder: Path) -> set[str]:
        files = [file for file in folder.rglob("*.py*") if file.suffix in (".py", ".pyi")]
        assert files, f"no source files in {folder}"
        return set().union(*(imported_names(file.read_text(encoding="utf-8")) for file in files))

    return collect


@pytest.fixture
def load_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], ModuleType]:
    """Import a file that belongs to no package."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def git() -> Callable[..., str]:
    """Run git in a folder, whatever the user has set."""
    settings = ["user.name=Tests", "user.email=tests@localhost", "commit.gpgsign=false"]
    settings += ["core.autocrlf=false", f"core.hooksPath={os.devnull}", "init.defaultBranch=main"]
    command = ["git", *(word for setting in settings for word in ("-c", setting))]

    def call(folder: Path, *arguments: str) -> str:
        done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode(errors="replace")

    return call


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty current folder; loggers that a command sets up are put back afterwards."""
    import logging

    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(member.name) for member in MEMBERS]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield tmp_path
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
