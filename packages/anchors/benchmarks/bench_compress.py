"""Classification on compressed demonstrations against its bound, and what re-weighting costs.

python packages/anchors/benchmarks/bench_compress.py

GPT-2's small shape with random weights (12 layers, width 768), 8 prompts of 200 tokens, 66 of which
follow the demonstrations, one thread; medians of interleaved runs. The bound is the ratio of tokens
run. The strongest rival keeps the whole demonstrations' cache.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anchors.cache import beginning, prefill
from anchors.compress import compress
from anchors.evaluate import predict
from anchors.prompts import Prompt
from anchors.reweight import Reweighter
from bench_attention import make_case, medians
from octavo.rundir import environment, write_json

RESULTS = Path(__file__).parent / "results"


def measure(layers: int, width: int, length: int, count: int, tries: int) -> dict[str, Any]:
    """Seconds of each way, and the ratios; a whole cache must answer as the whole prompt."""
    model, prompts = make_case(layers, width, length, count)
    first = prompts[0]  # all prompts get its demonstrations
    prompts = [
        Prompt(
            first.input_ids[: first.query] + one.input_ids[one.query :], one.labels, one.classes,
            one.format, one.query, one.target, one.answers,
        )
        for one in prompts
    ]  # fmt: skip
    whole, kept = prefill(model, beginning(prompts)), compress(model, prompts[0])
    plain = predict(model, prompts, count)
    assert np.allclose(plain.scores, predict(model, prompts, count, cache=whole).scores, atol=1e-4)
    weighter = Reweighter(model, 2)
    around = weighter.around(model)
    assert np.allclose(plain.scores, predict(model, prompts, count, around).scores, atol=1e-4)
    model.set_attn_implementation("eager")
    eager = partial(predict, model, prompts, count)
    seconds = medians({"eager": eager, "re-weighted": partial(eager, around)}, tries)
    model.set_attn_implementation("sdpa")
    run = partial(predict, model, prompts, count)
    seconds |= medians(
        {"whole prompt": run, "whole prompt, cached": partial(run, cache=whole),
         "hidden anchors": partial(run, cache=kept)}, tries,
    )  # fmt: skip
    bound = sum(map(len, prompts)) / sum(len(one) - one.query for one in prompts)
    speed = seconds["whole prompt"] / seconds["hidden anchors"]
    cached = seconds["whole prompt, cached"] / seconds["hidden anchors"]
    cost = seconds["re-weighted"] / seconds["eager"]
    ratios = [
        {"what": "whole prompt / hidden anchors", "ratio": speed,
         "bar": f"{0.85 * bound:.2f} or more (85 % of the bound {bound:.2f})"},
        {"what": "whole prompt, cached / hidden anchors", "ratio": cached, "bar": "no bar"},
        {"what": "re-weighted / eager", "ratio": cost, "bar": "1.15 or less"},
    ]  # fmt: skip
    return {"ratios": ratios, "seconds": seconds}


def main() -> None:
    """Measure and keep the result."""
    torch.set_num_threads(1)
    write_json(
        RESULTS / "compress.json",
        measure(12, 768, 200, 8, 5) | {"environment": environment()},
    )


if __name__ == "__main__":
    main()
