"""How well a model predicts held-out text: nats a token, perplexity, bits a byte."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from octavo import console
from octavo.runtime import rank, world_size

from deepseekmoe.corpus import Tokens, Windows


@torch.no_grad()
def evaluate_lm(model: Any, tokens: Tokens, length: int, batch_size: int = 16) -> dict[str, float]:
    """Mean loss over all windows of held-out tokens; processes of one group take turns.

    Args:
        model: a causal language model, in evaluation mode.
        tokens: of held-out documents.
        length: tokens of a window.
        batch_size: windows at a time.

    Returns:
        loss (nats a predicted token), ppl, bpb (bits a byte of text: the loss of all tokens over the
        bytes they stand for) and tokens (predicted ones).
    """
    windows = Windows(tokens, length)
    total, count = 0.0, 0
    device = next(model.parameters()).device
    together = batch_size * world_size()  # windows of all processes at a time
    with console.counter("evaluating", len(windows), "windows") as advance:
        for begin in range(0, len(windows), together):
            end = min(len(windows), begin + together)
            numbers = range(begin, end)[rank() * batch_size :][:batch_size]
            # a process that has none left runs one in vain: the others may need its experts
            batch = windows.rows(numbers or [begin])
            many = int((batch["labels"][:, 1:] != -100).sum()) if numbers else 0
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            total, count = total + float(loss) * many, count + many
            advance(end - begin)
    if world_size() > 1:
        sums = torch.tensor([total, count], dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        total, count = sums.tolist()
    loss = total / max(1, count)
    # a document's first token is never predicted, and stands for no byte
    bytes_a_token = float(tokens.text_bytes.sum()) / max(1, len(tokens) - len(tokens.starts))
    return {
        "loss": loss,
        "ppl": math.exp(min(loss, 700)),
        "bpb": loss / math.log(2) / bytes_a_token,
        "tokens": float(count),
    }


def evaluate_domains(
    model: Any, tokens: Tokens, length: int, batch_size: int = 16
) -> list[Mapping[str, Any]]:
    """A row for each domain that fills a window, and one of them all."""
    rows = []
    for domain in dict.fromkeys(tokens.domains):
        part = tokens.of_domain(domain)
        if len(part) >= length:
            rows.append({"domain": domain} | evaluate_lm(model, part, length, batch_size))
    if len(rows) > 1:
        rows.append({"domain": "all"} | evaluate_lm(model, tokens, length, batch_size))
    return rows
