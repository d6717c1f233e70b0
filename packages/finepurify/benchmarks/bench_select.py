"""The k-th smallest of many values in several tensors, against sorting and partial sorting.

python packages/finepurify/benchmarks/bench_select.py [--size 30000000]

Indicators drawn after our reading of the paper (Gamma of shape 1/2, whose scale differs from tensor to
tensor), in tensors of very different size as a model has them; one thread, medians of interleaved runs
in CPU seconds. The rivals need all values in one tensor, and the time to put them together counts; each
then takes the k-th smallest for k = 90 % of them. All must give the same value, bit for bit.

numpy's partition swings most between runs, with what the system charges for its fresh memory: three runs
on one machine gave 0.84, 8.3 and 2.9 times our seconds. Where memory comes free it is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finepurify.select import threshold
from octavo.rundir import environment, write_json
from torch import Tensor

RESULTS = Path(__file__).parent / "results"

#: Shares of the values in each tensor: an embedding, matrices, biases.
SHARES = (0.4, 0.25, 0.2, 0.1, 0.049, 0.001)


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


def indicators(size: int, seed: int = 0) -> dict[str, Tensor]:
    """About so many values, in several tensors."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-4, 2, len(SHARES))
    return {
        f"tensor {n}": scale * torch.randn(int(size * share), generator=generator).square()
        for n, (share, scale) in enumerate(zip(SHARES, scales, strict=True))
    }


def measure(size: int = 30_000_000, tries: int = 5) -> dict[str, Any]:
    """Seconds of each way and their ratios; the values must be equal."""
    tensors = indicators(size)
    names, parts = list(tensors), list(tensors.values())
    total = sum(map(len, parts))
    count = int(0.9 * total)
    ways: dict[str, Callable[[], float]] = {
        "two histograms": lambda: threshold(names, tensors.__getitem__, count).value,
        "kthvalue": lambda: torch.kthvalue(torch.cat(parts), count).values.item(),
        "sort": lambda: torch.sort(torch.cat(parts)).values[count - 1].item(),
        "partition": lambda: float(
            np.partition(np.concatenate([part.numpy() for part in parts]), count - 1)[count - 1]
        ),
    }
    assert len({way() for way in ways.values()}) == 1
    seconds = medians(ways, tries)
    ours = seconds["two histograms"]
    rivals = (
        ("torch.kthvalue", "kthvalue", "above 1"),
        ("torch.sort", "sort", "above 1"),
        ("numpy.partition", "partition", "no bar"),
    )
    ratios = [
        {"what": f"{what} / two histograms", "ratio": seconds[name] / ours, "bar": bar}
        for what, name, bar in rivals
    ]
    memory = {
        "MiB of all values": total * 4 / 2**20,
        "MiB of the largest tensor": max(map(len, parts)) * 4 / 2**20,
    }
    return {"values": total, "ratios": ratios, "seconds": seconds, "memory": memory}


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=30_000_000, help="values in all")
    size = parser.parse_args().size
    torch.set_num_threads(1)
    write_json(RESULTS / "select.json", measure(size) | {"environment": environment()})


if __name__ == "__main__":
    main()
