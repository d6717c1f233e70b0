"""The Fisher diagonal by hooks over whole batches, against an example at a time.

python packages/finepurify/benchmarks/bench_fisher.py [tiny]

A BERT of 4 x 256 with random weights and BERT-base's 30,522 words, 32 examples of 8 to 64 tokens in
batches of 8 sorted by length, one thread; best of three of interleaved runs in CPU seconds (on CUDA
wall seconds, and batches of 32 too). The loop gets each example alone and unpadded, which is the best
it can have; the hooks' time has their check on two examples in it, which a model needs once: `again` is
without it, as at the later points of a segment. `exact` is over the model's own two labels.
nngeometry's diagonal is measured where it is installed.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from finepurify import fisher
from finepurify.fisher import Engine, diagonal
from finepurify.likelihood import Kind
from octavo.rundir import environment, write_json
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

RESULTS = Path(__file__).parent / "results"
NOISE = ".key.bias"  # rounding noise: the softmax does not see them
Batch = dict[str, Tensor]


def make_model(
    layers: int, width: int, vocabulary: int, device: str
) -> BertForSequenceClassification:
    """A classifier of two classes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), intermediate_size=4 * width,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    return model


def make_batches(count: int, size: int, longest: int, vocabulary: int, device: str) -> list[Batch]:
    """Examples of mixed lengths, sorted, each batch padded to its longest."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(min(8, longest // 2), longest + 1, (count,), generator=generator)
    lengths = lengths.sort(descending=True).values
    place = torch.arange(longest)
    mask = (place < lengths[:, None]).long()
    ids = torch.randint(1, vocabulary, (count, longest), generator=generator) * mask
    labels = torch.randint(0, 2, (count,), generator=generator)
    return [
        {
            "input_ids": ids[at : at + size, : lengths[at]].to(device),
            "attention_mask": mask[at : at + size, : lengths[at]].to(device),
            "labels": labels[at : at + size].to(device),
        }
        for at in range(0, count, size)
    ]


def best(ways: dict[str, Callable[[], Any]], device: str, tries: int) -> dict[str, float]:
    """Least seconds of each way, run in turns; the processor's own on a CPU."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(tries):
        for name, way in ways.items():
            begin = clock()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], clock() - begin)
    return seconds


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, relative to the tensor's largest value."""
    return max(
        ((found[name] - one).abs().max() / one.max().clamp(min=1e-30)).item()
        for name, one in wanted.items()
        if not name.endswith(NOISE)
    )


def by_nngeometry(model: BertForSequenceClassification, batches: list[Batch]) -> Callable[[], Any]:
    """Its empirical diagonal by its own loader and representation."""
    from nngeometry.metrics import FIM  # pyright: ignore[reportMissingImports]
    from nngeometry.object import PMatDiag  # pyright: ignore[reportMissingImports]

    def log_p(*batch: Tensor) -> Tensor:
        ids, mask, labels = batch
        logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        return logits.gather(1, labels[:, None])

    def run() -> Any:
        return [
            FIM(
                model=model, loader=[tuple(batch.values())], representation=PMatDiag,
                variant="classif_logits", function=log_p,
            )
            for batch in batches
        ]  # fmt: skip

    return run


def measure(
    layers: int = 4, width: int = 256, vocabulary: int = 30_522, count: int = 32, longest: int = 64,
    tries: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of each way and their ratios; the diagonals must be equal."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(layers, width, vocabulary, device)
    alone = make_batches(count, 1, longest, vocabulary, device)
    sizes = (8, 32) if device == "cuda" else (8,)
    ratios, seconds, off = [], {}, 0.0
    kinds: tuple[Kind, ...] = ("empirical", "exact")
    for kind in kinds:
        ways: dict[str, Callable[[], Any]] = {}

        def add(
            name: str,
            batches: list[Batch],
            engine: Engine,
            again: bool = False,
            kind: Kind = kind,
            ways=ways,
        ) -> None:
            def run() -> dict[str, Tensor]:
                if not again:
                    fisher._checked.clear()
                return diagonal(model, batches, kind=kind, engine=engine)

            ways[f"{kind}, {name}"] = run

        add("loop", alone, "loop")
        for size in sizes:
            batches = make_batches(count, size, longest, vocabulary, device)
            add(f"hooks, batch {size}", batches, "hooks")
            add(f"hooks, batch {size}, again", batches, "hooks", again=True)
        wanted, *others = (way() for way in ways.values())
        off = max(off, *(difference(found, wanted) for found in others))
        assert off < 1e-4
        taken = best(ways, device, tries)
        seconds |= taken
        loop, first, *others = taken
        bars = {first: "2 or more, 2.5 aimed at"} if kind == "empirical" else {}
        ratios += [
            {
                "what": f"{kind}: loop / {name.partition(', ')[2]}",
                "ratio": taken[loop] / taken[name],
                "bar": bars.get(name, "no bar"),
            }
            for name in (first, *others)
        ]
    rival = "not installed: not measured"
    if importlib.util.find_spec("nngeometry"):
        batches = make_batches(count, 8, longest, vocabulary, device)
        name = "empirical, nngeometry"
        seconds |= best({name: by_nngeometry(model, batches)}, device, tries)
        rival = "measured"
        ratios.append(
            {"what": "empirical: nngeometry / hooks, batch 8",
             "ratio": seconds[name] / seconds["empirical, hooks, batch 8"], "bar": "2 or more"}
        )  # fmt: skip
    return {
        "command": "python packages/finepurify/benchmarks/bench_fisher.py",
        "device": device, "ratios": ratios, "seconds": seconds, "largest difference": off,
        "nngeometry": rival,
    }  # fmt: skip


def main() -> None:
    """Measure and keep the result; `tiny` only runs it."""
    torch.set_num_threads(1)
    if sys.argv[1:] == ["tiny"]:
        measure(1, 16, 50, 4, 8, 1)
        return
    write_json(RESULTS / "fisher.json", measure() | {"environment": environment()})


if __name__ == "__main__":
    main()
