"""One directory for each run, in which a reader never sees half a file.

    with RunDir.open(out, options, overwrite=False) as run:
        run.write_json("metrics.json", {"accuracy": 0.9})

A run that stopped is resumed by the same options; a finished one is never overwritten unasked, and
one process at a time has it open.
"""

import json
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError, OctavoError
from octavo.runtime import is_main, world_size

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"

#: Options that may change when a run is resumed.
VOLATILE = {"device", "threads", "out", "overwrite", "report-to", "gradient-checkpointing", "rows"}
VOLATILE |= {"micro-batch-size", "retries", "tensor-parallel", "server"}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file or folder written there gets its final name when done.

    Args:
        path: the final name. A file that lay there stays until it is replaced; a folder is moved
            aside for the moment of the renaming.

    Raises:
        ConfigError: nothing can be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _make_folder(path.parent)
    try:
        with _replacing(temporary, path):
            yield temporary
    except OSError as error:
        if error.filename not in (str(path), str(temporary)):
            raise  # the caller's own affair
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: nothing can be written there ({error.strerror})") from None


@contextmanager
def _replacing(temporary: Path, path: Path) -> Iterator[None]:
    try:
        yield
        if temporary.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Stop, before any work is done, where an output would replace something or cannot be.

    Raises:
        ConfigError: the path exists and overwriting was not asked for, it is a folder, or nothing
            can be written there.
    """
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already; choose another name or add --overwrite")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{path}: nothing can be written below {above}")


def options_of(*parts: Any) -> dict[str, Any]:
    """Dataclasses and mappings merged into plain options, named as on the command line."""
    options: dict[str, Any] = {}
    for part in parts:
        fields: Mapping[str, Any] = part if isinstance(part, Mapping) else asdict(part)
        for name, value in fields.items():
            options[name.replace("_", "-")] = _plain(value)
    return options


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class RunDir:
    """A folder with `config.yaml`, `environment.json`, `metrics.jsonl` and a run's artefacts.

    Open it with `RunDir.open`. Under torchrun every rank may hold one; rank 0 alone writes, and it
    alone keeps other processes out.

    Attributes:
        path: the folder.
        resumed: whether an earlier, unfinished run is being continued.
    """

    def __init__(self, path: Path, resumed: bool = False) -> None:
        self.path = path
        self.resumed = resumed
        self._aside: Path | None = None  # the run that is being replaced, until this one is done
        self._unlock: Callable[[], object] = lambda: None

    @classmethod
    def open(cls, path: Path, options: Mapping[str, Any], overwrite: bool = False) -> "RunDir":
        """Create the folder, or take up the run in it.

        Args:
            path: the folder; its parents are made.
            options: what decides the result; written to `config.yaml`, compared on resuming.
            overwrite: start anew where a run already lies.

        Raises:
            ConfigError: the folder holds a finished run, one with other options, one that another
                process has open, or no run at all.
        """
        import yaml

        run = cls(path)
        if not is_main():
            return run
        run.resumed = path.exists() and run._check_existing(options, overwrite)
        if path.exists() and not run.resumed:
            run._aside = path.with_name(f".{path.name}.replaced")
            shutil.rmtree(run._aside, ignore_errors=True)
            path.rename(run._aside)
        if run.resumed:
            run._mend()
        else:
            _make_folder(path)
            text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
            os.write(run._lock(), text.encode())  # locked before it is written: none is quicker
        run._record(status="running", resumed=run.resumed)
        return run

    def _check_existing(self, options: Mapping[str, Any], overwrite: bool) -> bool:
        """Whether the run that lies there is to be resumed (True) or replaced (False); locks it."""
        import yaml

        path = self.path
        if path.is_dir() and not any(path.iterdir()):
            return False
        if not path.is_dir() or not (path / CONFIG).is_file() or not _status(path):
            raise ConfigError(f"{path} exists and holds no run; choose another --out")
        # before the lock, which ends when its process closes that file, opened in whatever way
        text = (path / CONFIG).read_text(encoding="utf-8")
        self._lock()
        if overwrite:
            return False
        if is_finished(path):
            raise ConfigError(f"{path} holds a finished run; choose another --out or --overwrite")
        earlier = yaml.safe_load(text) or {}
        keys = (set(earlier) | set(options)) - VOLATILE
        changed = sorted(key for key in keys if earlier.get(key) != options.get(key))
        if changed:
            raise ConfigError(
                f"{path} holds an unfinished run with other options "
                f"({', '.join('--' + key for key in changed)}); use the same to resume it, "
                "another --out, or --overwrite"
            )
        return True

    def _lock(self) -> int:
        """Hold the run against other processes, and give its `config.yaml` opened.

        The kernel undoes it at the process's end, however that comes. It is POSIX's kind of lock,
        which forked workers, that may outlive a killed run, do not inherit.
        """
        self._unlock()  # that of the run which is being replaced
        file = self.path / CONFIG
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be written ({error.strerror})") from None
        self._unlock = weakref.finalize(self, os.close, descriptor)
        try:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"{self.path}: another process is writing this run; wait for it or stop it, or "
                "choose another --out"
            ) from None
        except (ImportError, OSError):
            pass  # a system, or a file system, without such locks
        return descriptor

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not is_main():
            return
        if error is None:
            self._record(status="finished")
        self._unlock()
        if error is None and self._aside:
            shutil.rmtree(self._aside)
        elif isinstance(error, OctavoError) and not self.resumed and self._is_bare():
            shutil.rmtree(self.path)  # wrong input leaves no folder behind
            if self._aside:
                self._aside.rename(self.path)

    def _is_bare(self) -> bool:
        return {file.name for file in self.path.iterdir()} <= {CONFIG, ENVIRONMENT}

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the run (rank 0 alone)."""
        if is_main():
            write_text(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the run (rank 0 alone)."""
        if is_main():
            write_json(self.path / name, value)

    def log(self, **metrics: Any) -> None:
        """Append one line to `metrics.jsonl` (rank 0 alone)."""
        if is_main():
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`."""
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def forget(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines of `metrics.jsonl` that a resumed training will write again (rank 0 alone)."""
        lines = self.metrics() if is_main() else []
        if (kept := [line for line in lines if keep(line)]) != lines:
            write_text(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def _mend(self) -> None:
        """Clear away what a kill left half done."""
        for old in self.path.glob(".*.old.tmp"):  # killed between the two renames of a folder
            final = self.path / old.name[1:].rsplit(".", 3)[0]
            if not final.exists():
                old.rename(final)
        for leftover in self.path.glob(".*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        file = self.path / METRICS
        if file.exists():
            whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
            write_text(file, whole + "\n" if whole else "")

    def _record(self, **changes: Any) -> None:
        file = self.path / ENVIRONMENT
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else environment()
        stamp = {f"{changes['status']}_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_json(file, record | changes | stamp)


def is_finished(path: Path) -> bool:
    """Whether the folder holds a run that came to its end."""
    return _status(path) == "finished"


def _status(path: Path) -> str:
    """How far the run in a folder came; empty where there is none."""
    try:
        record = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
        return str(record["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, for whoever wants to reproduce a run."""
    import platform
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    import torch

    names = ["octavo", "torch", "transformers", "datasets", "accelerate", "numpy", "scikit-learn"]
    program = Path(sys.argv[0]).stem
    versions = {}
    for name in [program, *names]:
        try:
            versions[name] = version(name)
        except (PackageNotFoundError, ValueError):
            continue
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "command": [program, *sys.argv[1:]],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": world_size(),
        "commit": commit,
        "versions": versions,
    }
