"""The service against `Cascade.predict` on the same texts and cores, in one run, with equal answers.

    python packages/cascadebert/benchmarks/bench_serve.py [TEXTS]

BERT of 2 and of 12 layers with random weights, a sixth deferred. Throughput: many connections send
calls of many texts, as fast as they are answered. Latency: single texts come at a steady rate, 70 % of
what the service takes of them; those that leave at the first stage are compared with a server where
all do, at the same rate and at 70 % of what that one takes. OMP_NUM_THREADS says how many cores both
get, shared among the stages; the client runs beside them.
"""

import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch
from bench_engine import make_cascade, make_texts
from cascadebert.cascade import Cascade, Predictions
from cascadebert.policy import FAR, Policy
from cascadebert.scores import log_odds
from octavo.rundir import environment, write_json

RESULTS = Path(__file__).parent / "results" / "serve.json"
LOAD = 0.7


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this thread, and what it starts, on so many cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everything)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, everything)


@contextmanager
def served(folder: Path, policies: Sequence[Path], threads: int) -> Iterator[str]:
    """The address of a server in a process of its own, ready."""
    command = [
        *(sys.executable, "-m", "cascadebert", "serve", "--port", "0", "--device", "cpu"),
        *("--model", str(folder / "small"), "--model", str(folder / "large")),
        *(word for path in policies for word in ("--policy", str(path))),
        *("--log-file", str(folder / "serve.log"), "--deadline", "600"),
    ]
    with on_cores(threads):
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        log = folder / "serve.log"
        while not (log.exists() and re.search(r"\bready\n", log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(log.read_text() if log.exists() else "the server did not start")
            time.sleep(0.1)
        found = re.search(r"http://\S+", log.read_text())
        assert found
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


def ask_all(url: str, texts: list[str], point: str, size: int, connections: int) -> list[dict]:
    """Answers to all texts, asked in calls of so many over so many connections."""
    calls = [texts[start : start + size] for start in range(0, len(texts), size)]
    with httpx.Client(base_url=url, timeout=600) as client:

        def ask(call: list[str]) -> list[dict]:
            body = {"texts": call, "operating_point": point}
            return client.post("/v1/classify", json=body).raise_for_status().json()["answers"]

        with ThreadPoolExecutor(connections) as pool:
            return [answer for answers in pool.map(ask, calls) for answer in answers]


def check(answers: Sequence[dict], offline: Predictions) -> None:
    """Refuse a benchmark of other answers."""
    stages = [answer["stage"] - 1 for answer in answers]
    assert [answer["label"] for answer in answers] == offline.labels
    assert stages == offline.stages.tolist()


def exited_p95(url: str, texts: list[str], point: str, rate: float, seconds: float) -> float:
    """Milliseconds within which 95 % of the first stage's answers come, texts coming steadily."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            begin = loop.time() + 0.1

            async def ask(number: int) -> float:
                due = begin + number / rate
                await asyncio.sleep(due - loop.time())
                body = {"texts": [texts[number % len(texts)]], "operating_point": point}
                response = await client.post("/v1/classify", json=body)
                (answer,) = response.raise_for_status().json()["answers"]
                return loop.time() - due if answer["stage"] == 1 else np.nan

            return await asyncio.gather(*(ask(number) for number in range(int(rate * seconds))))

    return 1000 * float(np.nanpercentile(asyncio.run(main()), 95))


def single_rate(url: str, texts: list[str], point: str, connections: int = 32) -> float:
    """Texts a second that are answered in calls of one text."""
    begin = time.perf_counter()
    ask_all(url, texts[:256], point, 1, connections)
    return min(256, len(texts)) / (time.perf_counter() - begin)


def measure(
    items: int,
    width: int = 768,
    share: float = 1 / 6,
    tries: int = 3,
    size: int = 64,
    connections: int = 16,
    seconds: float = 8.0,
) -> list[dict]:
    """A row a way of asking: texts a second and their share of offline; latencies where `seconds`."""
    texts = make_texts(items)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cascade: Cascade = make_cascade(folder, texts, width)
        threshold = log_odds(cascade.logits(0, texts)).quantile(share).item()
        policies = {"cascade": threshold, "small": -FAR}
        for point, value in policies.items():
            policy = Policy([value], models=cascade.hashes, backend=cascade.backend)
            policy.save(folder / f"{point}.json")
        policy = Policy([threshold])
        best: dict[str, float] = {}

        def note(engine: str, begin: float) -> None:
            best[engine] = min(best.get(engine, float("inf")), time.perf_counter() - begin)

        with served(folder, [folder / f"{point}.json" for point in policies], threads) as url:
            for _ in range(tries):  # in turns, so that a busy moment strikes them all
                with on_cores(threads):
                    begin = time.perf_counter()
                    offline = cascade.predict(texts, policy)
                    note("offline", begin)
                begin = time.perf_counter()
                answers = ask_all(url, texts.texts, "cascade", size, connections)
                note("service", begin)
                check(answers, offline)
                begin = time.perf_counter()
                ask_all(url, texts.texts, "small", size, connections)
                note("service, small model only", begin)
            rows: list[dict] = [
                {
                    "engine": engine,
                    "texts a second": items / took,
                    "of offline %": 100 * best["offline"] / took if engine == "service" else None,
                }
                for engine, took in best.items()
            ]
            if seconds:
                rate, own = (LOAD * single_rate(url, texts.texts, name) for name in policies)
                for engine, point, speed in (
                    ("exited texts of the cascade", "cascade", rate),
                    ("small model only, same rate", "small", rate),
                    ("small model only, its own 70 %", "small", own),
                ):
                    p95 = exited_p95(url, texts.texts, point, speed, seconds)
                    rows.append({"engine": engine, "texts a second": speed, "p95 ms": p95})
    return rows


def main() -> None:
    """Measure, print and write the result."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    rows = measure(items)
    result = {"items": items, "rows": rows, "cores": torch.get_num_threads()}
    write_json(RESULTS, result | {"machine": platform.machine(), "environment": environment()})
    print(json.dumps(rows, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
