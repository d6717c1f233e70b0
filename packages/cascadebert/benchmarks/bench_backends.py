"""What runs a stage, how its batches are padded, and the searches over many items: speed and answers.

    python packages/cascadebert/benchmarks/bench_backends.py [DIR]

1. One BERT of 12 layers, width 768, random weights, in every backend, against PyTorch in float32. Its
   bias is set so that half of the texts get either label: labels hang on differences far smaller than
   a trained model's, so that agreement is the least one can expect.
2. The same model on texts of SST-2's lengths: batches of like lengths within a budget of tokens,
   against batches of 32 in their order, padded to the longest, and all of them padded to 128 tokens.
   DIR holds full/sst2.validation.jsonl.gz (forest-snow/alps has it as data/SST-2/test.tsv; a line
   {"text_a": ...} each); without it, made-up texts of 13 words on average.
3. The sweep over all thresholds and DIS on a million items, in seconds.

Times are the best of some tries, taken in turns.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_engine import BATCH_TOKENS, make_texts, timed
from cascadebert.config import Backend
from cascadebert.data import Examples
from cascadebert.metrics import dis
from cascadebert.onnx import PLAIN, export_stage
from cascadebert.policy import sweep, sweep_separate
from cascadebert.scores import log_odds
from cascadebert.stage import Encoded, Stage, load_stage
from octavo import tiny
from octavo.data import load_rows
from octavo.rundir import environment, write_json
from octavo.runtime import Runtime
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

RESULTS = Path(__file__).parent / "results" / "backends.json"

#: What is aimed at.
OVER_PADDING, OVER_TORCH, SECONDS = 3.0, 1.5, 1.0

#: Each backend with its precision, by the name that a policy knows it by.
BACKENDS: dict[str, tuple[Backend, Runtime]] = {
    "torch-float32": ("torch", PLAIN),
    "compile-float32": ("compile", PLAIN),
    "torch-bfloat16": ("torch", Runtime(device="cpu", dtype="bfloat16")),
    "onnx-float32": ("onnx", PLAIN),
    "onnx-int8": ("onnx-int8", PLAIN),
}


def make_model(folder: Path, texts: Examples, layers: int, width: int) -> None:
    """BERT with random weights, its bias set so that half of the texts get either label."""
    tokenizer = tiny.make_tokenizer(texts.texts, tiny.Shape(kind="bert", max_length=128))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width, initializer_range=0.05,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stage = load_stage(str(folder), None, None, runtime=PLAIN)
    logits = stage.run(stage.encode(texts), BATCH_TOKENS)
    with torch.no_grad():
        model.classifier.bias[0] += (logits[:, 1] - logits[:, 0]).quantile(0.5)
    model.save_pretrained(folder)


def measure_backends(
    items: int = 64,
    layers: int = 12,
    width: int = 768,
    tries: int = 3,
    names: Sequence[str] = tuple(BACKENDS),
) -> list[dict[str, Any]]:
    """A row a backend: time, speed beside PyTorch in float32, and how far its answers are the same."""
    texts = make_texts(items)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        make_model(source, texts, layers, width)
        plain = load_stage(folder, None, None, runtime=PLAIN)
        for name in set(names) & {"onnx-float32", "onnx-int8"}:
            export_stage(plain, source, int8=name == "onnx-int8")
        stages = {name: load_stage(folder, None, None, *_arguments(name)) for name in names}
        rows = plain.encode(texts)
        outputs: dict[str, Tensor] = {}
        first: dict[str, float] = {}
        for name, stage in stages.items():
            assert stage.backend == name
            begin = time.perf_counter()
            outputs[name] = stage.run(rows, BATCH_TOKENS)
            first[name] = time.perf_counter() - begin
        took = timed(
            {name: lambda stage=stage: stage.run(rows, BATCH_TOKENS)
             for name, stage in stages.items()},
            tries,
        )  # fmt: skip
    wanted = outputs["torch-float32"]
    clear = log_odds(wanted) > 1e-4
    result = []
    for name, seconds in took.items():
        equal = outputs[name].argmax(dim=-1) == wanted.argmax(dim=-1)
        if name.endswith("float32"):
            assert equal[clear].all(), f"{name} answers otherwise"
        result.append({
            "backend": name,
            "ms a text": 1000 * seconds / items,
            "speed-up": took["torch-float32"] / seconds,
            "first run s": first[name],
            "equal labels %": 100 * float(equal.double().mean()),
            "largest difference": float((outputs[name] - wanted).abs().max()),
        })  # fmt: skip
    return result


def _arguments(name: str) -> tuple[Backend, bool, Runtime]:
    backend, runtime = BACKENDS[name]
    return backend, False, runtime


def sst2_texts(folder: Path | None, items: int) -> Examples:
    """Texts of SST-2's validation part, or made-up ones of like lengths."""
    if folder is not None:
        source = folder / "full" / "sst2.validation.jsonl.gz"
        rows = load_rows(str(source), {"text_a": str})
        return Examples([row["text_a"] for row in rows][:items])
    words = "one two three four five six seven eight nine ten".split()
    generator = torch.Generator().manual_seed(0)
    exponential = torch.empty(2, items).exponential_(generator=generator)
    lengths = (6.5 * exponential.sum(dim=0)).round().clamp(1, 52).int().tolist()  # gamma, mean 13
    return Examples(
        [" ".join(words[(7 * i + k * k) % 10] for k in range(n)) for i, n in enumerate(lengths)]
    )


def measure_padding(
    folder: Path | None = None,
    items: int = 64,
    layers: int = 12,
    width: int = 768,
    tries: int = 2,
) -> list[dict[str, Any]]:
    """A row a way of making batches: time, and how many times faster than padding all to 128."""
    texts = sst2_texts(folder, items)
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place), texts, layers, width)
        stage = load_stage(place, None, 128, runtime=PLAIN)
    wide = replace(stage, multiple=128)
    rows = stage.encode(texts)
    ways = {
        "like lengths, token budget": lambda: stage.run(rows, BATCH_TOKENS),
        "batches of 32, padded to the longest": lambda: in_order(stage, rows),
        "batches of 32, padded to 128": lambda: in_order(wide, rows),
    }
    outputs = [work() for work in ways.values()]
    for other in outputs[1:]:
        assert torch.allclose(outputs[0], other, atol=1e-4)
    took = timed(ways, tries)
    slowest = took["batches of 32, padded to 128"]
    mean = sum(rows.lengths) / len(rows)
    return [
        {
            "batches": name,
            "tokens a text": mean,
            "ms a text": 1000 * seconds / len(rows),
            "speed-up": slowest / seconds,
        }
        for name, seconds in took.items()
    ]


def in_order(stage: Stage, rows: Encoded, size: int = 32) -> Tensor:
    """Logits in batches of so many texts, as they come."""
    with torch.inference_mode():
        parts = [
            stage.forward(stage.pad(rows.rows[start : start + size]))[:, stage.classes]
            for start in range(0, len(rows), size)
        ]
    return torch.cat(parts)


def measure_search(items: int = 1_000_000, tries: int = 3) -> list[dict[str, Any]]:
    """A row a search: seconds for so many items, its result checked beside a plain count."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(items, 3, generator=generator) * scale for scale in (1, 2, 3)]
    labels = torch.randint(3, (items,), generator=generator).tolist()
    right = (logits[0].argmax(dim=-1) == torch.tensor(labels)).numpy()
    levels = torch.randint(5, (items,), generator=generator).numpy()
    scores = [log_odds(stage) for stage in logits]
    sure, two = scores[0].numpy(), logits[:2]

    table = sweep(two, labels, [1.0, 6.0])
    middle = table.iloc[len(table) // 2]
    leave = scores[0] > float(middle["threshold"])
    answers = torch.where(leave, two[0].argmax(dim=-1), two[1].argmax(dim=-1))
    accuracy = float((answers == torch.tensor(labels)).double().mean())
    assert abs(accuracy - float(middle["accuracy"])) < 1e-9, "sweep counts otherwise"
    for difficulty in (~right, levels):
        few = slice(0, 300)
        easier = difficulty[few][:, None] < difficulty[few][None, :]
        above = sure[few][:, None] > sure[few][None, :]
        plain = 100 * above[easier].mean()
        assert abs(plain - dis(sure[few], difficulty[few])) < 1e-9, "DIS counts otherwise"

    took = timed(
        {
            "sweep, 2 stages": lambda: sweep(two, labels, [1.0, 6.0]),
            "sweep, 3 stages, a threshold each": lambda: sweep_separate(
                logits, labels, [1.0, 3.0, 6.0], scores[:2]
            ),
            "DIS, right and wrong": lambda: dis(sure, ~right),
            "DIS, 5 levels": lambda: dis(sure, levels),
        },
        tries,
    )
    return [{"search": name, "items": items, "seconds": value} for name, value in took.items()]


def main() -> None:
    """Measure, print and write the result."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    search = measure_search()
    padding = measure_padding(folder)
    backends = measure_backends()
    int8 = next(row for row in backends if row["backend"] == "onnx-int8")
    targets = [
        ("like lengths over padding to 128", padding[0]["speed-up"], OVER_PADDING, True),
        ("onnx-int8 over torch-float32", int8["speed-up"], OVER_TORCH, True),
        *((f"{row['search']}, seconds", row["seconds"], SECONDS, False) for row in search),
    ]
    result = {
        "command": "python packages/cascadebert/benchmarks/bench_backends.py"
        + " DIR" * (folder is not None),
        "threads": torch.get_num_threads(),
        "backends": backends,
        "texts": "SST-2 validation" if folder else "made up",
        "padding": padding,
        "search": search,
        "targets": [
            {"what": what, "measured": value, "target": bar,
             "met": value >= bar if more else value <= bar}
            for what, value, bar, more in targets
        ],
    }  # fmt: skip
    recorded = environment()
    recorded["command"] = recorded["command"][:1] + ["DIR"] * (folder is not None)
    write_json(RESULTS, result | {"machine": platform.machine(), "environment": recorded})
    print(json.dumps(result, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
