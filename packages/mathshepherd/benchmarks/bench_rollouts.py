"""Rollouts by `LocalGenerator` against a plain loop over the library's `generate`.

python packages/mathshepherd/benchmarks/bench_rollouts.py

Beginnings of a toy shop's solutions, each continued 8 times at T = 0.7, 256 rows at once, one thread;
medians of interleaved runs in CPU seconds. Two Llamas, trained here on demonstrations: 3 x 64, and
4 x 256 for a few steps only. The loop takes the texts as they come, pads them on the left and waits for
each batch's longest row. `mixed` are the models' own lengths; `equal` has no end token, so that all rows
are as long.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mathshepherd import shop
from mathshepherd.config import Sampling
from mathshepherd.generate import LocalGenerator, Request, seed_of
from mathshepherd.sft import finetune
from mathshepherd.shop import FORMAT, Shop, World, make_world
from octavo.rundir import RunDir, environment, write_json
from octavo.training import TrainOptions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        demonstrations: to train on.
        problems: whose solutions are begun.
        samples: continuations of each beginning.
        rows: in one batch.
        tokens: in the longest continuation.
        tries: measured runs of each way.
        models: layers, width, epochs and batch size of the training of each.
    """

    demonstrations: int = 2000
    problems: int = 32
    samples: int = 8
    rows: int = 256
    tokens: int = 64
    tries: int = 3
    models: tuple[tuple[int, int, float, int], ...] = ((3, 64, 5, 64), (4, 256, 0.3, 16))


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each way, run in turns after a first round that does not count.

    On one thread these are what the way takes, whatever else the machine does meanwhile.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def trained(
    world: World, layers: int, width: int, epochs: float, batch_size: int = 64, seed: int = 0
) -> tuple[Any, Any]:
    """A generator of this shape, fine-tuned on the world's demonstrations, and its tokenizer."""
    tokenizer = shop.make_tokenizer(world.shop)
    model: Any = shop.make_model(tokenizer, seed, layers, width)
    rows = [(one.question, one.steps) for one in world.demonstrations]
    rate = 4e-3 * (64 / width) ** 0.5
    options = TrainOptions(learning_rate=rate, epochs=epochs, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        finetune(model, tokenizer, rows, FORMAT, RunDir(Path(folder)), options)
    return model.eval(), tokenizer


def beginnings(world: World) -> list[str]:
    """All inner prefixes of the pool's right solutions, problem by problem."""
    return [
        FORMAT.prefix(one.question, steps[:n])
        for one in world.pool
        for steps in [shop.solve(world.shop, world.tales[one.id])]
        for n in range(1, len(steps))
    ]


def plain_loop(
    model: Any, tokenizer: Any, texts: Sequence[str], sampling: Sampling, samples: int, rows: int
) -> list[list[str]]:
    """The library's `generate` over the texts as they come, padded on the left."""
    found: list[list[str]] = []
    tokenizer.padding_side = "left"
    end = tokenizer.eos_token
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    for start in range(0, len(texts), rows // samples):
        batch = tokenizer(
            list(texts[start : start + rows // samples]), return_tensors="pt", padding=True
        )
        made = model.generate(
            **batch, **drawn, max_new_tokens=sampling.max_new_tokens, num_return_sequences=samples,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        lines = [line.partition(end)[0] if end else line for line in tokenizer.batch_decode(made)]
        found += [lines[n : n + samples] for n in range(0, len(lines), samples)]
    return found


def ours(
    model: Any, tokenizer: Any, texts: Sequence[str], sampling: Sampling, samples: int, rows: int
) -> list[list[str]]:
    """This package's."""
    requests = [Request(text, tuple(seed_of(text, n) for n in range(samples))) for text in texts]
    made = LocalGenerator(model, tokenizer, sampling, rows)(requests)
    return [[one.text for one in some] for some in made]


def endless(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Both without an end token."""
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    return model, tokenizer


def measure(size: Size = Size()) -> dict[str, Any]:
    """Seconds of both ways on each model, and their ratios; greedy texts must be equal."""
    world = make_world(Shop(), size.demonstrations, size.problems, 0, 0, 0)
    texts = beginnings(world)
    sampling = Sampling(max_new_tokens=size.tokens)
    greedy = replace(sampling, temperature=0.0)
    rows, seconds = [], {}
    for layers, width, epochs, batch_size in size.models:
        own = trained(world, layers, width, epochs, batch_size)
        assert ours(*own, texts, greedy, 1, size.rows) == plain_loop(
            *own, texts, greedy, 1, size.rows
        )
        lengths = [
            len(own[1](one)["input_ids"])
            for some in ours(*own, texts, sampling, size.samples, size.rows) for one in some
        ]  # fmt: skip
        name = f"Llama {layers} x {width}"
        for kind, pair, bar in (
            ("mixed", own, "3 or more"), ("equal", endless(*own), "2 or more")
        ):  # fmt: skip
            given = (*pair, texts, sampling, size.samples, size.rows)
            found = medians(
                {"generate": lambda given=given: plain_loop(*given),
                 "ours": lambda given=given: ours(*given)}, size.tries,
            )  # fmt: skip
            seconds[f"{name}, {kind}"] = found
            rows.append(
                {
                    "what": f"{name}, {kind} lengths: generate / ours",
                    "ratio": found["generate"] / found["ours"],
                    "bar": bar,
                    "rollouts/s": len(texts) * size.samples / found["ours"],
                    "mean tokens": statistics.mean(lengths) if kind == "mixed" else size.tokens,
                }
            )
    return {"ratios": rows, "seconds": seconds}


def main() -> None:
    """Measure and keep the result."""
    torch.set_num_threads(1)
    write_json(RESULTS / "rollouts.json", measure() | {"environment": environment()})


if __name__ == "__main__":
    main()
