"""Each member's wheel carries all it needs, and its command answers with nothing else from here."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement


@pytest.fixture(scope="session")
def wheels(members, tmp_path_factory):
    """The wheel of each member by name, built once."""
    folder = tmp_path_factory.mktemp("wheels")
    for member in members:
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        done = subprocess.run(build, cwd=member.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    built = {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}
    assert sorted(built) == sorted(member.name for member in members)
    return built


@pytest.fixture
def installed(package, wheels, tmp_path):
    """A fresh folder into which plain pip put the package's wheel, octavo's and nothing else."""
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install"]
    chosen = [str(wheels["octavo"]), str(wheels[package.name])]
    subprocess.run(
        [*pip, "--quiet", "--no-deps", "--no-index", "--target", str(target), *chosen], check=True
    )
    return target


def run_installed(target: Path, *arguments: str) -> str:
    """Run Python on the fresh folder and the third-party packages.

    Without `site` the path files of the editable installs are not read, so the workspace is out of
    reach; `-P` keeps the current folder and the script's out too.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(target), *third_party_folders()]),
    }
    done = subprocess.run(
        [sys.executable, "-S", "-P", *arguments],
        cwd=target.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def third_party_folders() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def distribution_key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(imported: set[str], declared: set[str]) -> set[str]:
    """Imported names for which no distribution that provides them is declared."""
    providers = packages_distributions()
    return {
        name
        for name in imported - sys.stdlib_module_names
        if not declared & {distribution_key(one) for one in [*providers.get(name, []), name]}
    }


def test_code_comes_from_the_wheel(package, installed):
    code = f"import octavo.cli, {package.name}.cli; print(octavo.cli.__file__, {package.name}.__file__)"
    files = run_installed(installed, "-c", code).split()
    assert len(files) == 2
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_command_answers_from_the_wheel(package, installed):
    command = str(installed / "bin" / package.name)
    assert package.name in run_installed(installed, command, "--help")
    version = run_installed(installed, command, "--version").split()
    assert version == [package.name, package.project["version"]]


def test_workspace_is_out_of_reach(package, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code = f"import importlib.util; print(importlib.util.find_spec({package.name!r}))"
    assert run_installed(empty, "-c", code).strip() == "None"


def test_wheel_holds_the_source_and_nothing_else(member, wheels):
    with zipfile.ZipFile(wheels[member.name]) as archive:
        names = set(archive.namelist())
    held = {name for name in names if ".dist-info/" not in name}
    source = {
        file.relative_to(member.source.parent).as_posix()
        for file in member.source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == source
    assert f"{member.name}/py.typed" in held


def test_wheel_holds_the_licence(member, wheels, root):
    with zipfile.ZipFile(wheels[member.name]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        assert archive.read(name) == (root / "LICENSE").read_bytes()


def test_every_import_is_declared(member, wheels, imports_below):
    requirements = metadata(wheels[member.name]).get_all("Requires-Dist") or []
    declared = {distribution_key(Requirement(line).name) for line in requirements}
    imported = imports_below(member.source) - {member.name}
    assert undeclared(imported, declared) == set()


def test_undeclared_import_is_found():
    imported = {"os", "yaml", "sklearn", "nowhere_installed"}
    assert undeclared(imported, {"pyyaml"}) == {"sklearn", "nowhere_installed"}
    assert undeclared(imported, {"pyyaml", "scikit-learn", "nowhere-installed"}) == set()
