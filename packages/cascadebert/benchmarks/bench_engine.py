"""The pooled engine against running every model on everything, in one run, with equal answers.

    python packages/cascadebert/benchmarks/bench_engine.py [ITEMS] [TRIES]

BERT of 2 and of 12 layers with random weights. The small model's head is fitted so that its scores
are spread evenly and have nothing to do with length: a threshold then defers a known share, and the
texts that are deferred are as long as the others, in tokens too. All engines share the code, the
batches' size in tokens and the sorting by length. Rivals of pooling: every model on everything, as in
the authors' code; survivors compacted within each batch of 16; one text at a time (some of them). The
bound is 1 / (t_small / t_large + p), both times from this run. Times are the best of some tries, taken
in turns.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cascadebert.cascade import Cascade, Predictions, single
from cascadebert.cost import speedup
from cascadebert.data import Examples
from cascadebert.policy import Policy
from cascadebert.scores import log_odds
from octavo import tiny
from octavo.models import load_tokenizer
from octavo.rundir import environment, write_json
from octavo.runtime import Runtime
from transformers import BertConfig, BertForSequenceClassification

RESULTS = Path(__file__).parent / "results" / "engine.json"

#: Shares of the texts that are deferred: 4, 3 and 2 times faster in layers.
SHARES = (1 / 12, 1 / 6, 1 / 3)

#: Tokens a batch: enough to keep a CPU's cores busy, and few enough that a batch's texts are alike.
BATCH_TOKENS = 1024

#: What is aimed at: at the least so much of the bound, and so many times faster than the rivals.
OF_BOUND, OVER_RUN_ALL, OVER_COMPACTION = 90.0, 2.5, 1.15


def make_texts(items: int) -> Examples:
    """Texts of 5 to 40 words."""
    words = "one two three four five six seven eight nine ten".split()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 41, (items,), generator=generator).tolist()
    chosen = torch.randint(len(words), (items, 40), generator=generator).tolist()
    return Examples(
        [" ".join(words[k] for k in row[:n]) for row, n in zip(chosen, lengths, strict=True)]
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


def spread_scores(cascade: Cascade, texts: Examples) -> None:
    """Fit the small model's head to scores that are even and unrelated to length.

    The texts in the order of their lengths get 1, 1.618, 2.236, ... taken modulo 1: every share of
    the lowest is then made of all lengths alike. A head on as many features as there are texts, or
    more, can do that exactly.
    """
    stage = cascade.stages[0]
    rows = stage.encode(texts)
    features: list[torch.Tensor] = []
    head = stage.model.get_submodule("classifier")
    hook = head.register_forward_pre_hook(lambda _, values: features.append(values[0].double()))
    with torch.inference_mode():
        for row in rows.rows:
            stage.model(**stage.pad([row]))
    hook.remove()
    order = sorted(range(len(texts)), key=lambda i: rows.lengths[i])
    wanted = torch.empty(len(texts), dtype=torch.float64)
    golden = (5**0.5 - 1) / 2
    wanted[order] = torch.tensor([1 + 2 * (k * golden % 1) for k in range(len(texts))]).double()
    known = torch.cat(features)
    middle = known.mean(dim=0)
    weight = torch.linalg.lstsq(known - middle, (wanted - 2)[:, None], driver="gelsd").solution
    with torch.no_grad():
        head.get_parameter("weight").copy_(torch.cat([-weight, weight], dim=1).T / 2)
        bias = 1 - (middle @ weight).item() / 2
        head.get_parameter("bias").copy_(torch.tensor([-bias, bias]))


def timed(engines: dict[str, Callable[[], Any]], tries: int) -> dict[str, float]:
    """The best of some tries of each engine, in turns, so that a busy moment strikes them all."""
    best = dict.fromkeys(engines, float("inf"))
    for _ in range(tries):
        for name, work in engines.items():
            begin = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def measure(items: int, width: int = 768, tries: int = 3, few: int = 24) -> dict[str, Any]:
    """Milliseconds a text and speed-up over the large model alone, by share deferred and engine.

    Returns:
        `alone` (a row a model), `rows` (a row an engine and share), `targets` (a row a bar).
    """
    texts = make_texts(items)
    with tempfile.TemporaryDirectory() as folder:
        cascade = make_cascade(Path(folder), texts, width)
    cascade.batch_tokens = BATCH_TOKENS
    spread_scores(cascade, texts)
    logits = [cascade.logits(number, texts) for number in (0, 1)]
    scores = log_odds(logits[0]).sort().values
    lengths = torch.tensor(cascade.stages[0].encode(texts).lengths, dtype=torch.float64)
    some = texts.at(sorted(range(items), key=lambda i: lengths[i])[:: max(1, items // few)])

    work: dict[str, Callable[[], Predictions]] = {
        "large alone": lambda: single(cascade, 1).predict(texts, Policy([])),
        "small alone": lambda: single(cascade, 0).predict(texts, Policy([])),
        "run-all": lambda: cascade.run_all(texts, Policy([0.0])),  # it costs the same at any share
    }
    points: list[dict[str, Any]] = []
    for share in SHARES:
        cut = round(share * items)
        policy = Policy([float(scores[cut - 1] + scores[cut]) / 2])
        wanted = cascade.decide(logits, policy)
        engines: dict[str, Callable[[], Predictions]] = {
            "pooled": lambda policy=policy: cascade.predict(texts, policy),
            "compacted, batch 16": lambda policy=policy: cascade.predict(texts, policy, pool=16),
            "one at a time": lambda policy=policy: cascade.predict(some, policy, pool=1),
        }
        _assert_equal(engines["pooled"](), wanted, "pooled")
        _assert_equal(engines["compacted, batch 16"](), wanted, "compacted")
        _assert_equal(cascade.run_all(texts, policy), wanted, "run-all")
        _assert_equal(engines["one at a time"](), cascade.run_all(some, policy), "one at a time")
        work |= {f"{name} {share:.3f}": engine for name, engine in engines.items()}
        deferred = wanted.stages == 1
        points.append({
            "share": share,
            "deferred %": 100 * float(deferred.double().mean()),
            "deferred tokens %": 100 * float(lengths[deferred].sum() / lengths.sum()),
            "nominal": speedup([2, 12], torch.bincount(wanted.stages, minlength=2).numpy()),
        })  # fmt: skip

    took = timed(work, tries)
    large, small = took["large alone"] / items, took["small alone"] / items
    rows = []
    for point in points:
        share = point.pop("share")
        bound = 1 / (small / large + point["deferred %"] / 100)
        for name in ("pooled", "compacted, batch 16", "run-all", "one at a time"):
            key = name if name == "run-all" else f"{name} {share:.3f}"
            each = took[key] / (len(some) if name == "one at a time" else items)
            rows.append(point | {
                "engine": name, "ms a text": 1000 * each, "speed-up": large / each,
                "bound": bound, "of the bound %": 100 * large / each / bound,
            })  # fmt: skip
    alone = [
        {"model": "large (12 layers)", "ms a text": 1000 * large, "speed-up": 1.0},
        {"model": "small (2 layers)", "ms a text": 1000 * small, "speed-up": large / small},
    ]
    return {"alone": alone, "rows": rows, "targets": _targets(rows)}


def _assert_equal(got: Predictions, wanted: Predictions, name: str) -> None:
    assert got.labels == wanted.labels, f"{name} answers otherwise"
    assert torch.equal(got.stages, wanted.stages), f"{name} defers otherwise"


def _targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is aimed at beside what was measured."""
    targets = []
    for number, share in enumerate(SHARES):
        pooled, compacted, run_all, _ = rows[4 * number : 4 * number + 4]
        bars = [
            ("pooled, % of the bound", pooled["of the bound %"], OF_BOUND),
            (
                "pooled / compacted, batch 16",
                compacted["ms a text"] / pooled["ms a text"],
                OVER_COMPACTION,
            ),
        ]
        if share == SHARES[0]:
            bars.append(
                ("pooled / run-all", run_all["ms a text"] / pooled["ms a text"], OVER_RUN_ALL)
            )
        targets += [
            {
                "what": what,
                "deferred %": pooled["deferred %"],
                "measured": value,
                "target": bar,
                "met": value >= bar,
            }
            for what, value, bar in bars
        ]
    return targets


def main() -> None:
    """Measure, print and write the result."""
    items = int(sys.argv[1]) if len(sys.argv) > 1 else 240
    tries = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    result = {
        "command": f"python packages/cascadebert/benchmarks/bench_engine.py {items} {tries}",
        "items": items,
        "batch tokens": BATCH_TOKENS,
        "threads": torch.get_num_threads(),
        **measure(items, tries=tries),
    }
    write_json(RESULTS, result | {"machine": platform.machine(), "environment": environment()})
    print(json.dumps({key: result[key] for key in ("alone", "rows", "targets")}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
