"""One whole `purify` of a BERT-base-sized pair: 32 texts, four points, rho fixed, no fine-tuning.

Weights are random: what is measured is time and memory, by stage, not a defence. Beside it stands what
300 evaluations of the same texts would cost, as rivals need that search over modules.

    python packages/finepurify/benchmarks/bench_purify.py          # BERT-base, about two minutes
    python packages/finepurify/benchmarks/bench_purify.py tiny     # seconds, another file
"""

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from finepurify.config import FisherConfig, PurifyConfig
from finepurify.data import encode, first_of_each
from finepurify.language import POLARITIES, language, sentences
from finepurify.models import answers, load_suspect, pad_of, tokenizer_of
from finepurify.pairing import WeightPair
from finepurify.points import fisher
from finepurify.pretrain import word_tokenizer
from finepurify.strategies import Evidence, purified
from octavo.models import save_model
from octavo.rundir import RunDir, environment, write_json
from octavo.runtime import Runtime, seed_everything
from transformers import BertConfig, BertForSequenceClassification

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "base": {"vocab_size": 30_522, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12},
    "tiny": {"vocab_size": 640, "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2},
}  # fmt: skip
#: Candidates of such a search: modules are tried one by one, in several rounds.
CANDIDATES = 300


def make_pair(size: str, place: Path) -> None:
    """INIT and SUSPECT of random weights, the one a little off the other."""
    tokenizer = word_tokenizer(language().words, 64)
    shape: dict[str, Any] = SHAPES[size]
    config = BertConfig(**shape, intermediate_size=4 * shape["hidden_size"])
    config.id2label = dict(enumerate(POLARITIES))
    seed_everything(0)
    model = BertForSequenceClassification(config)
    save_model(place / "init", model, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    save_model(place / "suspect", model, tokenizer)


def measure(size: str) -> dict[str, Any]:
    """Seconds of each stage, and the peak memory of the process."""
    runtime = Runtime(device="auto", dtype="float32")
    stages: list[dict[str, Any]] = []

    def stage(name: str, begin: float) -> float:
        now = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        stages.append({"stage": name, "seconds": round(now - begin, 2), "peak GiB": round(peak, 2)})
        return now

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_pair(size, place)
        with RunDir.open(place / "run", {}) as run:
            first = now = time.perf_counter()
            pair = WeightPair.load(place / "init", place / "suspect")
            now = stage("pair the checkpoints, check every value", now)
            model, tokenizer = load_suspect(place / "suspect"), tokenizer_of(place / "suspect")
            rows = first_of_each(sentences(200, 1), 16, 0)
            items, pad = encode(rows, tokenizer, 64), pad_of(tokenizer)
            now = stage("load the suspect, encode 32 texts", now)
            curvature = fisher(pair, model, items, pad, FisherConfig(), run, runtime)
            now = stage("Fisher diagonal at four points", now)
            evidence = Evidence(pair, curvature, architecture=model.config)
            weights = purified(evidence, PurifyConfig(), 0.9)
            now = stage("select the highest tenth of r", now)
            pair.write(place / "run" / "purified", weights.tensor)
            now = stage("write the purified model", now)
            whole = now - first
            answers(model, items, pad, runtime)
            one = time.perf_counter() - now
    stages.append({"stage": "all", "seconds": round(whole, 2), "peak GiB": stages[-1]["peak GiB"]})
    return {
        "dimensions": pair.numel,
        "reset": int(weights.numbers["reset"]),
        "stages": stages,
        "ratios": [
            {
                "what": f"{CANDIDATES} evaluations of the 32 texts / purify",
                "ratio": round(CANDIDATES * one / whole, 1),
            }
        ],
    }


def main() -> None:
    """Measure and write the result."""
    size = "tiny" if "tiny" in sys.argv[1:] else "base"
    name = "purify.json" if size == "base" else "purify-tiny.json"
    found = measure(size) | {"threads": torch.get_num_threads(), "environment": environment()}
    write_json(RESULTS / name, found)


if __name__ == "__main__":
    main()
