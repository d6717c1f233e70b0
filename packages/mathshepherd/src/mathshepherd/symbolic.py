"""Comparison of two formulas by `math-verify`, in one worker process that may be killed.

math-verify limits its time by alarm signals, which only a main thread receives, and cannot stop a
computation that stays inside one call. It therefore runs as the main thread of a process of its own
that speaks JSON lines: whoever asks (from any thread) waits no longer than asked for, and a worker
that does not answer in time, or dies, is killed and replaced at the next question.
"""

import atexit
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import TextIOBase
from typing import Any

from octavo.errors import ConfigError

log = logging.getLogger(__name__)

#: Seconds that a worker may take to import what it needs.
START = 120.0


def command() -> Sequence[str]:
    """What starts a worker; -P keeps the working directory's files from being taken for modules."""
    return (
        sys.executable,
        "-P",
        "-m",
        __name__ if __name__ != "__main__" else "mathshepherd.symbolic",
    )


@dataclass
class Counts:
    """What has been asked of the workers of this process.

    Attributes:
        compared: pairs.
        timed_out: pairs that took too long, and count as different.
        crashed: pairs at which the worker died, and that count as different.
    """

    compared: int = 0
    timed_out: int = 0
    crashed: int = 0


counts = Counts()


class _Worker:
    """A process and the thread that reads its answers."""

    def __init__(self) -> None:
        paths = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
        self.process = subprocess.Popen(
            list(command()), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            hello = self.next(START)
        except BaseException:
            self.kill()
            raise
        if hello is None or "error" in hello:
            self.kill()
            why = hello["error"] if hello else f"its process gave no sign within {START:.0f} s"
            raise ConfigError(
                f"math-verify does not start ({why}); install math-verify[antlr4-13-2], or compare "
                "answers with level `hendrycks`"
            )

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def next(self, timeout: float) -> dict[str, Any] | None:
        """The next answer; None where there is none in time, an empty one where the worker died."""
        try:
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            return None
        return json.loads(line) if line else {"error": "its process ended"}

    def ask(self, first: str, second: str, timeout: float) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        try:
            print(json.dumps([first, second, timeout]), file=self.process.stdin, flush=True)
        except OSError:
            return {"error": "its process ended"}
        return self.next(timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(OSError):  # what it was to be asked
            self.process.stdin.close()


_lock = threading.Lock()
_worker: _Worker | None = None


def same(first: str, second: str, timeout: float = 5.0) -> bool:
    """Whether two LaTeX formulas are worth the same.

    Args:
        first: without dollars.
        second: likewise; the order does not matter.
        timeout: seconds; a pair that takes longer counts as different.

    Raises:
        ConfigError: math-verify cannot be started.
    """
    global _worker
    with _lock:
        if _worker is None:
            _worker = _Worker()
        counts.compared += 1
        try:
            answer = _worker.ask(first, second, timeout)
        except BaseException:  # an interrupt: the answer still to come would be taken for another's
            _stop()
            raise
        if answer is None or "error" in answer:
            _stop()
            counts.timed_out += answer is None
            counts.crashed += answer is not None
            log.warning(
                "%r and %r count as different: %s", first[:80], second[:80],
                f"no result within {timeout:g} s" if answer is None else "the worker process died",
            )  # fmt: skip
            return False
        return bool(answer["same"])


def close() -> None:
    """End the worker; the next comparison starts another."""
    with _lock:
        _stop()


def _stop() -> None:
    global _worker
    worker, _worker = _worker, None
    if worker is not None:
        worker.kill()


def _forget() -> None:
    """A forked process must not share its parent's pipes, nor a lock that another thread held."""
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def serve(questions: Iterable[str], answers: TextIOBase) -> None:
    """The worker: a line [first, second, timeout] in, a line {"same": ...} out, until the end."""
    try:
        from math_verify import parse, verify
    except Exception as error:  # whatever it is, the parent tells it in one line
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    print(json.dumps({"ready": True}), file=answers, flush=True)

    @lru_cache(maxsize=4096)  # a right answer is compared many times
    def formula(text: str, whole: int) -> list[Any]:
        return parse(f"${text}$", parsing_timeout=whole)

    for line in questions:
        first, second, timeout = json.loads(line)
        _limit(timeout)
        whole = max(1, round(timeout))
        forms = [formula(text, whole) for text in (first, second)]
        found = all(forms) and (
            verify(forms[0], forms[1], timeout_seconds=whole)
            or verify(forms[1], forms[0], timeout_seconds=whole)
        )
        _limit(0)
        print(json.dumps({"same": bool(found)}), file=answers, flush=True)


def _limit(timeout: float) -> None:
    """Let the system end this process if it computes on and nobody is left to kill it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * timeout + 10 if timeout else 0)


def main() -> None:
    """Serve on the standard streams; what a library prints goes elsewhere."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
