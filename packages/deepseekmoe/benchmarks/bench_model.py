"""Whole models: tokens a second when decoding, and a training step, beside what the device could do.

    python packages/deepseekmoe/benchmarks/bench_model.py

Both bounds are measured in the same run: decoding one text reads every active weight once a token, so
that a copy's bandwidth bounds it; a training step's FLOPs, by the rule of `deepseekmoe params`, are held
against one large matrix product. On a CUDA device the released 16B shape is decoded and the preset 2b is
trained, both in bfloat16 and with random weights; else models of a few million weights in float32.
"""

from pathlib import Path
from typing import Any

import torch
from bench_layer import best_of
from deepseekmoe.accounting import count_parameters, training_flops
from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.config import OptimizeConfig
from deepseekmoe.modeling import DeepseekMoeForCausalLM
from deepseekmoe.optimize import make_optimizer
from octavo.rundir import environment, write_json

RESULTS = Path(__file__).parent / "results" / "model.json"

SMALL = DeepseekMoeConfig.preset(
    "2b", num_hidden_layers=4, hidden_size=256, intermediate_size=704, moe_intermediate_size=176,
    num_attention_heads=4, head_dim=64, vocab_size=1024,
)  # fmt: skip

#: Of the bound that is aimed at when decoding one text.
DECODED = 0.4


def bandwidth(device: str, dtype: torch.dtype, size: int, tries: int) -> float:
    """Bytes a second that are read, from summing a tensor of `size` values."""
    values = torch.ones(size, device=device, dtype=dtype)
    return values.nbytes / best_of({"sum": values.sum}, tries, device)["sum"]


def matrix_rate(device: str, dtype: torch.dtype, size: int, tries: int) -> float:
    """FLOPs a second of a square matrix product."""
    one = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / best_of({"product": lambda: one @ one}, tries, device)["product"]


def random_model(config: DeepseekMoeConfig, device: str, dtype: torch.dtype) -> Any:
    """A model with random weights, made where it is used."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return DeepseekMoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def decode(
    config: DeepseekMoeConfig, device: str, dtype: torch.dtype, tokens: int, tries: int
) -> list[dict[str, Any]]:
    """Rows of both caches: tokens a second of one text, and their share of the bound."""
    model = random_model(config, device, dtype).eval()
    prompt = torch.randint(config.vocab_size, (1, 16), device=device)
    count = count_parameters(config)
    size = 2**28 if device == "cuda" else 2**24
    bound = bandwidth(device, dtype, size, tries) / (
        (count.active - count.embedding) * dtype.itemsize
    )
    rows = []
    for cache in ("dynamic", "static"):

        def run(cache: str = cache) -> None:
            out = model.generate(
                prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                cache_implementation=cache, pad_token_id=0,
            )  # fmt: skip
            assert out.shape[1] == 16 + tokens

        rate = tokens / best_of({cache: run}, tries, device)[cache]
        rows.append(
            {"what": f"decoding, {cache} cache", "tokens a second": rate, "bound": bound,
             "share": rate / bound, "aim": DECODED}
        )  # fmt: skip
    return rows


def step(
    config: DeepseekMoeConfig, device: str, dtype: torch.dtype, batch: int, length: int, tries: int
) -> list[dict[str, Any]]:
    """A row of a training step: forward, backward, AdamW."""
    model = random_model(config, device, torch.float32).train()
    optimizer = make_optimizer(model, OptimizeConfig())
    ids = torch.randint(config.vocab_size, (batch, length), device=device)

    def run() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = best_of({"step": run}, tries, device)["step"]
    bound = matrix_rate(device, dtype, 8192 if device == "cuda" else 1024, tries)
    most = bound * length / training_flops(config, length)
    rate = batch * length / seconds
    return [
        {"what": f"training step, {batch} x {length} tokens", "tokens a second": rate, "bound": most,
         "share": rate / most, "aim": ""}
    ]  # fmt: skip


def main() -> None:
    """Measure and write the result."""
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    if cuda:
        rows = decode(DeepseekMoeConfig.preset("16b"), "cuda", torch.bfloat16, 128, 3)
        torch.cuda.empty_cache()
        rows += step(DeepseekMoeConfig.preset("2b"), "cuda", torch.bfloat16, 8, 2048, 10)
    else:
        torch.set_num_threads(1)
        rows = decode(SMALL, "cpu", torch.float32, 64, 3)
        rows += step(SMALL, "cpu", torch.float32, 4, 256, 5)
    result = {
        "rows": rows,
        "environment": environment()
        | {"command": "python packages/deepseekmoe/benchmarks/bench_model.py"},
    }
    write_json(RESULTS.with_name("model-gpu.json") if cuda else RESULTS, result)


if __name__ == "__main__":
    main()
