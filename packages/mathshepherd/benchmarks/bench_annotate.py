"""Labels by rollouts with shared prefixes and early exit, against the plain loop.

python packages/mathshepherd/benchmarks/bench_annotate.py

Solutions of the toy shop by a generator that is trained here, N = 8 at T = 0.7, one thread. The plain
loop completes each inner step of each solution N times, by the same generator and with the same seeds,
so that the labels must be equal and only the number of rollouts differs. Medians of CPU seconds. The
search for the first error (`binary`) asks less and gives other labels; it stands beside them.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from bench_rollouts import RESULTS, trained
from mathshepherd.annotate import annotate, labelable, prefixes
from mathshepherd.answers import equivalent
from mathshepherd.config import AnnotateConfig, Sampling
from mathshepherd.experiment import SIZES
from mathshepherd.generate import Generator, LocalGenerator, Request, seed_of
from mathshepherd.quality import label_quality
from mathshepherd.records import Solution
from mathshepherd.sample import answer_in, sample_solutions
from mathshepherd.shop import FORMAT, Shop, make_world
from octavo.rundir import environment, write_json


def plain_loop(
    solutions: Sequence[Solution], generator: Generator, rollouts: int, chunk: int = 512
) -> list[tuple[int, ...]]:
    """Hard labels of the steps, each inner one completed so many times, solution by solution."""
    inner = [prefix for one in solutions for prefix in prefixes(one)]
    hits: list[int] = []
    for start in range(0, len(inner), chunk):
        part = inner[start : start + chunk]
        requests = [
            Request(FORMAT.to_continue(one.question, one.steps),
                    tuple(seed_of("rollout", 0, one.key, n) for n in range(rollouts)))
            for one in part
        ]  # fmt: skip
        for one, made in zip(part, generator(requests), strict=True):
            right = (
                each.finished and equivalent(answer_in(each.text, FORMAT), one.answer)
                for each in made
            )
            hits.append(int(any(right)))
    found, labels = iter(hits), []
    for one in solutions:
        labels.append((*(next(found) for _ in one.steps[1:]), int(bool(one.correct))))
    return labels


def measure(
    demonstrations: int = 2000, epochs: float = 10, problems: int = 60, samples: int = 4,
    rollouts: int = 8, tries: int = 3, shape: tuple[int, int] = (3, 64), tokens: int = 48,
    sizes: Shop = SIZES["quick"].shop,
) -> dict[str, Any]:  # fmt: skip
    """Rollouts and CPU seconds of each way, and their ratios; the labels must be equal."""
    world = make_world(sizes, demonstrations, problems, 0, 0, 0)
    model, tokenizer = trained(world, *shape, epochs)

    def sampler(temperature: float) -> LocalGenerator:
        sampling = Sampling(temperature=temperature, max_new_tokens=tokens)
        return LocalGenerator(model, tokenizer, sampling)

    pool, _ = labelable(sample_solutions(world.pool, sampler(1.2), FORMAT, samples))
    ways = {
        "plain loop": lambda: (plain_loop(pool, sampler(0.7), rollouts), None),
        "sharing and early exit": lambda: annotate(
            pool, sampler(0.7), AnnotateConfig(rollouts=rollouts), FORMAT
        ),
        "binary": lambda: annotate(
            pool, sampler(0.7), AnnotateConfig(rollouts=rollouts, strategy="binary"), FORMAT
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for _ in range(tries):
        for name, way in ways.items():
            begin = time.process_time()
            found[name] = way()
            times[name].append(time.process_time() - begin)
    seconds = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
    labelled, cost = found["sharing and early exit"]
    assert [one.labels.hard for one in labelled] == found["plain loop"][0]
    searched, fewer = found["binary"]
    rows = [
        {"what": "plain loop / sharing and early exit, rollouts",
         "ratio": cost.plain / cost.rollouts, "bar": "2 or more"},
        {"what": "plain loop / sharing and early exit, seconds",
         "ratio": seconds["plain loop"] / seconds["sharing and early exit"], "bar": "no bar"},
        {"what": "plain loop / binary, rollouts", "ratio": cost.plain / max(fewer.rollouts, 1),
         "bar": "no bar (other labels)"},
    ]  # fmt: skip
    quality = {
        name: label_quality([world.with_truth(one) for one in some])
        for name, some in (("linear", labelled), ("binary", searched))
    }
    return {"ratios": rows, "seconds": seconds, "cost": cost.row(), "quality": quality}


def main() -> None:
    """Measure and keep the result."""
    torch.set_num_threads(1)
    write_json(RESULTS / "annotate.json", measure() | {"environment": environment()})


if __name__ == "__main__":
    main()
