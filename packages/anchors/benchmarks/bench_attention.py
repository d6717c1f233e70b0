"""Saliency of all layers in one pass against one pass a layer; what blocking costs over eager attention.

python packages/anchors/benchmarks/bench_attention.py

GPT-2's small shape with random weights (12 layers, width 768), 4 prompts of 200 tokens, one thread;
medians of interleaved runs. The rival keeps each layer's attention of the library's eager path and its
gradient, one layer at a time, as code with hooks on a layer does.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anchors.blocking import block, edges_before
from anchors.prompts import Prompt, collate
from anchors.saliency import saliency
from octavo.rundir import environment, write_json
from transformers import GPT2Config, GPT2LMHeadModel

RESULTS = Path(__file__).parent / "results"


def make_case(layers: int, width: int, length: int, count: int) -> tuple[Any, list[Prompt]]:
    """A random GPT-2 and prompts of two demonstrations."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 16 if width < 64 else width // 64,
        vocab_size=1000, n_positions=length,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(
            tuple(draw.integers(0, 1000, length).tolist()),
            ((length // 3,), (2 * length // 3,)), (0, 1), (), 2 * length // 3 + 2, length - 1, (5, 6),
        )
        for _ in range(count)
    ]  # fmt: skip
    return model, prompts


def layer_by_layer(model: Any, prompts: list[Prompt]) -> np.ndarray:
    """S_wp, S_pq and S_ww by a forward and a backward pass for each layer."""
    model.set_attn_implementation("eager")
    found = np.zeros((len(prompts), model.config.n_layer, 3))
    batch = collate(prompts)
    for layer in range(model.config.n_layer):
        out = model(**batch.inputs(), use_cache=False, output_attentions=True)
        scores = out.logits[:, -1][:, list(prompts[0].answers)]
        loss = torch.nn.functional.cross_entropy(
            scores, torch.zeros(len(prompts)).long(), reduction="sum"
        )
        weights = out.attentions[layer]
        (gradient,) = torch.autograd.grad(loss, weights)
        flows = (weights * gradient).sum(1).abs().detach()
        for row, prompt in enumerate(prompts):
            into = torch.zeros_like(flows[row], dtype=torch.bool)
            out_of = into.clone()
            for (place,) in prompt.labels:
                into[place, :place] = True
                out_of[prompt.target, place] = True
            rest = torch.ones_like(into).tril(-1) & ~into & ~out_of
            parts = [flows[row][edges].mean().item() for edges in (into, out_of, rest)]
            found[row, layer] = parts
    model.set_attn_implementation("sdpa")
    return found


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    """Measure both ratios."""
    torch.set_num_threads(1)
    model, prompts = make_case(12, 768, 200, 4)
    ours, theirs = saliency(model, prompts, [0] * 4), layer_by_layer(model, prompts)
    assert np.allclose(ours, theirs, rtol=1e-3, atol=1e-9)
    seconds = medians(
        {
            "one pass": lambda: saliency(model, prompts, [0] * 4),
            "layer by layer": lambda: layer_by_layer(model, prompts),
        },
        2,
    )
    batch = collate(prompts)
    edges = edges_before(batch, lambda prompt: prompt.labels)
    model.set_attn_implementation("eager")

    def run() -> None:
        with torch.no_grad():
            model(**batch.inputs(), use_cache=False)

    with block(model, edges):
        pass

    def blocked() -> None:
        with block(model, edges):
            run()

    cost = medians({"eager": run, "blocked": blocked}, 5)
    saved = seconds["layer by layer"] / seconds["one pass"]
    rows = [
        {"what": "saliency, layer by layer / one pass", "ratio": saved, "bar": "3 or more"},
        {
            "what": "blocking / eager",
            "ratio": cost["blocked"] / cost["eager"],
            "bar": "1.15 or less",
        },
    ]
    result = {"ratios": rows, "seconds": seconds | cost, "environment": environment()}
    write_json(RESULTS / "attention.json", result)


if __name__ == "__main__":
    main()
