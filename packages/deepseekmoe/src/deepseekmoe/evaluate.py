"""How well a model predicts held-out text: nats a token, perplexity, bits a byte."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from octavo import console
from octavo.errors import DataError, ModelError
from octavo.runtime import is_main, rank, world_size
from torch import Tensor, nn

from deepseekmoe.corpus import Tokens, Windows
from deepseekmoe.parallel import main_first

log = logging.getLogger(__name__)


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

    Raises:
        DataError: the tokens do not fill a window, or none of them is predicted.
        ModelError: the loss is NaN or infinite; the first layer that makes it so is named.
    """
    windows = Windows(tokens, length)
    total, count, broken = 0.0, 0, None
    batch: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    together = batch_size * world_size()  # windows of all processes at a time
    with console.counter("evaluating", len(windows), "windows") as advance:
        for begin in range(0, len(windows), together):
            end = min(len(windows), begin + together)
            numbers = range(begin, end)[rank() * batch_size :][:batch_size]
            # a process that has none left runs one in vain: the others may need its experts
            batch = windows.rows(numbers or [begin])
            many = int((batch["labels"][:, 1:] != -100).sum()) if numbers else 0
            batch = {name: value.to(device) for name, value in batch.items()}
            loss = float(model(**batch).loss)
            if many:  # of no predicted token the mean is NaN
                total, count = total + loss * many, count + many
            if many and not math.isfinite(loss) and broken is None:
                broken = batch
            if broken is not None and world_size() == 1:
                break
            advance(end - begin)
    if world_size() > 1:
        sums = torch.tensor([total, count], dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        total, count = sums.tolist()
    if not math.isfinite(total):
        tell_break(model, broken or batch)
    if not count:
        raise DataError("no token is predicted: every document is one token long; give longer ones")
    loss = total / count
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
    """A row for each domain that fills a window, and one of them all; the others are told of.

    Raises:
        DataError: no domain fills a window.
        ModelError: the loss is NaN or infinite.
    """
    rows = []
    for domain in filling(tokens, length):
        part = tokens.of_domain(domain)
        rows.append({"domain": domain} | evaluate_lm(model, part, length, batch_size))
    if len(rows) > 1:
        rows.append({"domain": "all"} | evaluate_lm(model, tokens, length, batch_size))
    return rows


def filling(tokens: Tokens, length: int) -> list[str]:
    """The domains that fill a window; the others are told of.

    Args:
        tokens: of one domain or several.
        length: tokens of a window.

    Raises:
        DataError: there is none.
    """
    sizes = dict.fromkeys(tokens.domains, 0)
    ends = [*tokens.starts[1:], len(tokens)]
    for domain, begin, end in zip(tokens.domains, tokens.starts, ends, strict=True):
        sizes[domain] += int(end - begin)
    short = [f"{domain} ({size} tokens)" for domain, size in sizes.items() if size < length]
    if len(short) == len(sizes):
        raise DataError(
            f"no domain fills a window of {length} tokens: {', '.join(short)}; give more text or a "
            "smaller --length"
        )
    if short and is_main():
        log.warning("left out, as they fill no window of %d tokens: %s", length, ", ".join(short))
    return [domain for domain, size in sizes.items() if size >= length]


@torch.no_grad()
def tell_break(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Stop, and say which layer first gives a number that is none, on whichever process.

    Args:
        model: a causal language model; processes that share it call this together.
        batch: what it was given then, on its device.

    Raises:
        ModelError: always.
    """
    parts = {"the embedding": model.get_input_embeddings()}
    parts |= {f"layer {number}": layer for number, layer in enumerate(model.model.layers)}
    found = torch.tensor(len(parts))
    handles = []
    for number, part in enumerate(parts.values()):

        def look(_part: nn.Module, _inputs: Any, output: Any, number: int = number) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if not bool(state.isfinite().all()):
                found.clamp_(max=number)

        handles.append(part.register_forward_hook(look))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if world_size() > 1:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    where = [*parts, "the output layer"][int(found)]

    def stop() -> None:
        raise ModelError(f"{where} gives NaN or infinity: the model's weights are broken")

    main_first(stop)
