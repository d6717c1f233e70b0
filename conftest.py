"""What all tests share: shape checks switched on, the real data, and an offline environment."""

import importlib
import importlib.util
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from functools import wraps
from inspect import isclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent
DATA = REPOSITORY.parent / "shared" / "data"
SOURCES = [*REPOSITORY.glob("shared/src/*"), *REPOSITORY.glob("packages/*/src/*")]

# Before any member is imported: every annotated call is checked, tensor shapes included; an int is
# a float there, as it is for type checkers. jaxtyping's own decorator binds a call's arguments in
# Python and checks them twice, shapes or not, which took as long as all that is tested.
check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
scope = jaxtyping.jaxtyped


def resolved(hint: Any, names: dict[str, Any]) -> Any:
    """A hint without forward references; anything goes where one is for type checkers alone."""
    holder = SimpleNamespace(__annotations__={"hint": hint})
    try:
        return get_type_hints(holder, names, include_extras=True)["hint"]
    except NameError:
        return Any


def has_shape(hint: Any) -> bool:
    """Whether a hint is, or is made of, an array's with its shape."""
    return isinstance(hint, type(jaxtyping.AbstractArray)) or any(map(has_shape, get_args(hint)))


def checked(thing: Any) -> Any:
    """Have a function's calls checked, or a dataclass's; a letter means one size within a call."""
    if isclass(thing):
        if is_dataclass(thing):
            thing.__init__ = checked(thing.__init__)
        return thing
    hints = thing.__annotations__
    hints.update({name: resolved(hint, thing.__globals__) for name, hint in hints.items()})
    within = check(thing)
    if not any(map(has_shape, hints.values())):
        return within

    @wraps(thing)
    def call(*arguments: Any, **options: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return thing(*arguments, **options)
        with scope("context"):
            return within(*arguments, **options)

    return call


jaxtyping.jaxtyped = lambda typechecker: checked  # what the hook decorates every function with
jaxtyping.install_import_hook([source.name for source in SOURCES], None)

# No test is timed against the wall clock, and none fails by chance.
settings.register_profile("octavo", deadline=None, derandomize=True)
settings.load_profile("octavo")

# The models are tiny: a second thread gains little, and loses much beside another process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

skipped_data = pytest.StashKey[set[str]]()

#: Variables by which coverage has a process measured from its start.
MEASURED = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
for_measured = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session, and each of its workers, a cache of its own unless the caller named one."""
    config.stash[skipped_data] = set()
    config.stash[for_measured] = {}
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # two at once would make the same folders
        os.environ["OCTAVO_CACHE"] = str(Path(os.environ["OCTAVO_CACHE"]) / worker)
        # a process that a test starts would take seconds longer to import torch
        config.stash[for_measured] = {
            name: os.environ.pop(name) for name in MEASURED if name in os.environ
        }
    if "OCTAVO_CACHE" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="octavo-cache-")
        os.environ["OCTAVO_CACHE"] = cache.name
        config.add_cleanup(cache.cleanup)


@pytest.fixture(autouse=True)
def plain_loggers() -> None:
    """Loggers that no command has set up: one of an earlier test may have left them quiet."""
    for source in SOURCES:
        logger = logging.getLogger(source.name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> dict[str, str]:
    """Variables for a process whose lines no test runs in this one, to have them counted."""
    return request.config.stash[for_measured]


@contextmanager
def untraced() -> Iterator[None]:
    """Count no lines and check no types here: both cost most in the inner calls of long runs.

    The tracer sees the lines of every library too, and a checked call binds its arguments twice.
    """
    trace, unchecked = sys.gettrace(), jaxtyping.config.jaxtyping_disable
    sys.settrace(None)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", unchecked)
        sys.settrace(trace)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold long runs: none is left for the end, when one process waits."""
    long = {item.path for item in items if item.get_closest_marker("untraced")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test of which quicker tests run the same lines without counting and checking them."""
    with untraced() if item.get_closest_marker("untraced") else nullcontext():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def few_steps_traced() -> Iterator[None]:
    """Of a training count and check its first steps and a few later ones: they are all alike."""
    coverage = sys.modules.get("coverage")
    if coverage is None or coverage.Coverage.current() is None:
        yield
        return
    from transformers import Trainer

    plain = Trainer.training_step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        done = self.state.global_step
        with nullcontext() if done < 3 or done % 16 == 0 else untraced():
            return plain(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", step)
        yield


def data_of(test: Path) -> Path | None:
    """Where the real data lies of the package that a test file belongs to."""
    match test.resolve().relative_to(REPOSITORY).parts:
        case ["packages", package, "tests", *_]:
            return DATA / package
    return None


@pytest.fixture
def data_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of real data of the test's package; the test is skipped where it is not there."""
    folder = data_of(request.path)
    if folder is None:
        pytest.fail("data_folder is for tests in packages/<package>/tests")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def benchmark_file(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], ModuleType]:
    """A function that imports a benchmark of the test's package; they may import each other.

    Two packages may name a benchmark alike, so that none is taken over from an earlier test.
    """
    folder = request.path.parents[1] / "benchmarks"

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(folder)
        for file in folder.glob("*.py"):
            monkeypatch.delitem(sys.modules, file.stem, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture
def command(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command of the test's package in this process; gives the exit code, stdout and stderr."""
    from octavo.cli import run

    app = importlib.import_module(f"{request.path.parents[1].name}.cli").app

    def call(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(app, [str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def killed(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Begin a command of the test's package in a process, and have it killed once something is true.

    The process is forked from this one: of its own it would take seconds to import torch.
    """
    from octavo.cli import run

    app = importlib.import_module(f"{request.path.parents[1].name}.cli").app

    def work(words: list[str]) -> None:
        with untraced():
            sys.exit(run(app, words))

    def kill(*words: Any, once: Callable[[], object]) -> None:
        line = [str(word) for word in words]
        process = multiprocessing.get_context("fork").Process(target=work, args=(line,))
        process.start()
        deadline = time.monotonic() + 300
        while not once():
            assert process.is_alive(), "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()

    return kill


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Callable[[str], ModuleType]:
    """A function that imports an example of the test's package."""
    folder = request.path.parents[1] / "examples"

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_example", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def visit(tmp_path: Path) -> Callable[[Path], tuple[str, list[str], list[str]]]:
    """A page as Chromium sees it, what it said, and what it asked the network for."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")

    def look(page: Path) -> tuple[str, list[str], list[str]]:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        log = folder / "net.json"
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
             f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
             "--enable-logging=stderr", "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)},
        )  # fmt: skip
        messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        asked = re.findall(
            r'"initiator":"(?!not an origin)[^"]*".*?"url":"(https?:[^"]*)"', log.read_text()
        )
        return done.stdout, messages, sorted(set(asked))

    return look


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note a real-data test that was skipped."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("realdata"):
        note_skip(item)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Note a whole file that was skipped with the real-data tests in it."""
    report = yield
    if report.skipped and collector.path.is_file() and "realdata" in collector.path.read_text():
        note_skip(collector)
    return report


def note_skip(node: pytest.Item | pytest.Collector) -> None:
    """Remember what was skipped although its data is there."""
    folder = data_of(node.path)
    if folder is not None and folder.is_dir():
        node.config.stash[skipped_data].add(node.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker noted."""
    node.config.stash[skipped_data].update(
        getattr(node, "workeroutput", {}).get("skipped_data", [])
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session in which that happened."""
    output = getattr(session.config, "workeroutput", {})  # what a worker sends home
    output["skipped_data"] = sorted(session.config.stash[skipped_data])
    without_failure = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if session.config.stash[skipped_data] and without_failure:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why it failed."""
    if names := sorted(terminalreporter.config.stash[skipped_data]):
        line = f"FAILED: skipped though the real data is there: {', '.join(names)}"
        terminalreporter.write_line(line, red=True)
