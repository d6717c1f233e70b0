"""The pooled engine against running every model on everything, in one run, with equal answers.

    python packages/cascadebert/benchmarks/bench_engine.py [ITEMS]

Two BERT shapes with random weights and a threshold that defers a known share. Rivals: the large model
alone in the same engine (what a speed-up is measured against), every model on the whole batch as
in the authors' code, and survivors compacted within each batch of 16. The bound is
1 / (t_small / t_large + p) with both times from this run.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cascadebert.cascade import Cascade, single
from cascadebert.cost import speedup
from cascadebert.data import Examples
from cascadebert.scores import log_odds
from octavo import tiny
from octavo.models import load_tokenizer
from octavo.rundir import environment, write_json
from octavo.runtime import Runtime
from transformers import BertConfig, BertForSequenceClassification

RESULTS = Path(__file__).parent / "results" / "engine.json"


def make_texts(items: int) -> Examples:
    """Texts of 5 to 40 words."""
    words = "one two three four five six seven eight nine ten".split()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 41, (items,), generator=generator).tolist()
    return Examples(
        [" ".join(words[(i * 7 + k * k) % 10] for k in range(n)) for i, n in enumerate(lengths)]
    )


def make_cascade(folder: Path, texts: Examples, width: int) -> Cascade:
    """BERT of 2 and of 12 layers, random weights."""
    tokenizer = tiny.make_tokenizer(texts.texts, tiny.Shape(kind="bert", max_length=64))
    for name, layers in (("small", 2), ("large", 12)):
        torch.manual_seed(layers)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=width // 64, intermediate_size=4 * width, initializer_range=0.05,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    assert load_tokenizer(folder / "small")
    return Cascade.from_pretrained(
        [folder / "small", folder / "large"], runtime=Runtime(device="cpu")
    )


def compacted(cascade: Cascade, texts: Examples, threshold: float, size: int = 16) -> list[str]:
    """Survivors of each batch go to the large model by themselves."""
    labels: list[str] = []
    for start in range(0, len(texts), size):
        batch = texts.at(range(start, min(start + size, len(texts))))
        labels += cascade.predict(batch, threshold).labels
    return labels


def timed(engines: dict[str, Callable[[], list[str]]], tries: int) -> dict[str, float]:
    """The best of some tries of each engine, in turns, so that a busy moment strikes them all."""
    best = dict.fromkeys(engines, float("inf"))
    for _ in range(tries):
        for name, work in engines.items():
            begin = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def measure(items: int, width: int = 768, share: float = 1 / 6, tries: int = 3) -> list[dict]:
    """A row each: seconds, speed-up over the large model alone, and the share of the bound."""
    texts = make_texts(items)
    with tempfile.TemporaryDirectory() as folder:
        cascade = make_cascade(Path(folder), texts, width)
    threshold = log_odds(cascade.logits(0, texts)).quantile(share).item()
    stages = cascade.run_all(texts, threshold).stages
    deferred = float((stages == 1).float().mean())
    rivals: dict[str, Callable[[], list[str]]] = {
        "pooled": lambda: cascade.predict(texts, threshold).labels,
        "run-all": lambda: cascade.run_all(texts, threshold).labels,
        "compacted, batch 16": lambda: compacted(cascade, texts, threshold),
    }
    answers = {name: work() for name, work in rivals.items()}
    for name, labels in answers.items():
        assert labels == answers["pooled"], f"{name} answers otherwise"
    alone: dict[str, Callable[[], list[str]]] = {
        "large alone": lambda: single(cascade, 1).predict(texts, 0.0).labels,
        "small alone": lambda: single(cascade, 0).predict(texts, 0.0).labels,
    }
    took = timed(alone | rivals, tries)
    large = took["large alone"]
    bound = 1 / (took["small alone"] / large + deferred)
    rows: list[dict] = [
        {
            "engine": name,
            "seconds": value,
            "speed-up": large / value,
            "of the bound %": 100 * large / value / bound if name in rivals else None,
        }
        for name, value in took.items()
    ]
    nominal = speedup([2, 12], torch.bincount(stages, minlength=2).numpy())
    rows.append({"engine": "bound", "speed-up": bound})
    rows.append({"engine": "nominal (layers)", "speed-up": nominal})
    return rows


def main() -> None:
    """Measure, print and write the result."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rows = measure(items)
    result = {"items": items, "rows": rows, "threads": torch.get_num_threads()}
    write_json(RESULTS, result | {"machine": platform.machine(), "environment": environment()})
    print(json.dumps(rows, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
