"""Quality of labels by the number of rollouts, where luck is rare and where it is not.

python packages/mathshepherd/benchmarks/bench_labels.py

Steps of the toy shop's sampled solutions, whose truth is known, with 1 to 32 completions each: once with
states up to 20, and once with states modulo 10 (`clock`), where one wrong way in ten ends at the right
answer. More completions find more ways to the right answer and more lucky ones. The paper's hard labels
get worse from some number on; here the false negatives that are mended have outweighed the false
positives up to 32 completions, in both worlds.
"""

from dataclasses import replace
from typing import Any

import torch
from bench_rollouts import RESULTS, trained
from mathshepherd.annotate import RolloutStore, annotate, prefixes
from mathshepherd.config import AnnotateConfig, Sampling
from mathshepherd.experiment import SIZES
from mathshepherd.generate import LocalGenerator
from mathshepherd.quality import quality_by_rollouts
from mathshepherd.sample import sample_solutions
from mathshepherd.shop import FORMAT, Shop, make_world
from octavo.rundir import environment, write_json


def measure(
    demonstrations: int = 2000, epochs: float = 10, problems: int = 60, samples: int = 3,
    most: int = 32, seeds: tuple[int, ...] = (0,), shape: tuple[int, int] = (3, 64),
    tokens: int = 48, sizes: Shop = SIZES["quick"].shop,
) -> dict[str, Any]:  # fmt: skip
    """Quality for each number of rollouts, world and seed; fewer ones must be the first of the many."""
    rows: list[dict[str, Any]] = []
    counts = [2**k for k in range(10) if 2**k <= most]
    for clock in (0, 10):
        for seed in seeds:
            world = make_world(replace(sizes, clock=clock), demonstrations, problems, 0, 0, seed)
            model, tokenizer = trained(world, *shape, epochs, seed=seed)
            drawn = {
                warm: LocalGenerator(
                    model, tokenizer, Sampling(temperature=warm, max_new_tokens=tokens)
                )
                for warm in (1.2, 0.7)
            }
            pool = sample_solutions(world.pool, drawn[1.2], FORMAT, samples, seed)
            store = RolloutStore()
            soft = AnnotateConfig(rollouts=most, estimation="both")
            labelled, _ = annotate(pool, drawn[0.7], soft, FORMAT, store, seed)
            few = AnnotateConfig(rollouts=min(2, most))
            for one in annotate(pool, drawn[0.7], few, FORMAT, None, seed)[0]:
                assert one.labels
                assert one.labels.hard[:-1] == tuple(
                    int(any(store.hits[prefix.key][: few.rollouts])) for prefix in prefixes(one)
                )
            known = [world.with_truth(one) for one in labelled]
            rows += [
                {"clock": clock, "seed": seed} | row
                for row in quality_by_rollouts(known, store, counts)
            ]
    return {"quality": rows, "means": means(rows)}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds."""
    found = []
    for clock, count in dict.fromkeys((row["clock"], row["rollouts"]) for row in rows):
        some = [row for row in rows if (row["clock"], row["rollouts"]) == (clock, count)]
        values = {
            name: [row[name] for row in some if row[name] is not None]
            for name in ("accuracy", "false positives", "false negatives", "CE of soft")
        }
        found.append(
            {"clock": clock, "rollouts": count}
            | {name: sum(each) / len(each) if each else None for name, each in values.items()}
        )
    return found


def main() -> None:
    """Measure and keep the result."""
    torch.set_num_threads(1)
    write_json(RESULTS / "labels.json", measure() | {"environment": environment()})


if __name__ == "__main__":
    main()
