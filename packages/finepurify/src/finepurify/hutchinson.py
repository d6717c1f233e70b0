"""The diagonal of the Hessian of -log p by Hutchinson's estimate: the mean of v * Hv over random signs.

Unlike the Fisher diagonal it can be negative away from a minimum. The Gauss-Newton diagonal, which
cannot, is for a softmax the exact Fisher's: take that instead.
"""

from collections.abc import Iterable

import torch
from octavo.errors import ConfigError, DataError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finepurify.likelihood import (
    Batch,
    evaluating,
    given_labels,
    log_likelihood,
    read_logits,
    size_of,
    to_device,
    trainable,
)  # fmt: skip


def hessian_diagonal(
    model: nn.Module, batches: Iterable[Batch], *, probes: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """The Hessian diagonal of the mean of -log p(y|x, w) over examples, at the present weights.

    Every batch meets the same probes, so that the estimate is that of the whole data's Hessian whatever
    the batches; its error falls with the square root of `probes` and grows with the off-diagonal part.

    Args:
        model: as `fisher.diagonal` takes it; run in eval mode with the attention that can be
            differentiated twice.
        batches: dicts of tensors with `labels`; read once.
        probes: vectors of random signs; each costs a backward pass through the gradient.
        seed: of the probes, drawn on the CPU.

    Returns:
        float32 by the parameter's name, signed; zeros where the second derivative does not exist or the
        parameter is unused; frozen parameters are left out.

    Raises:
        ConfigError: `probes` is below 1.
        DataError: no examples, or wrong labels.
        ModelError: no trainable parameter, no log p(y|x), or logits that are not finite.

    Source: Hutchinson 1990; Bekas et al. 2007 for the diagonal.
    """
    if probes < 1:
        raise ConfigError(f"probes={probes}: Hutchinson's estimate needs one or more")
    parameters = trainable(model)
    weights = list(parameters.values())
    totals = [torch.zeros_like(one, dtype=torch.float32) for one in weights]
    count = 0
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            batch = to_device(batch, weights[0].device)
            logits = read_logits(model, batch)
            loss = -log_likelihood(logits, given_labels(logits, batch)).sum()
            slopes = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            curved = [
                number for number, one in enumerate(slopes) if one is not None and one.requires_grad
            ]
            for probe in range(probes):
                signs = _signs(weights, seed, probe)
                products = torch.autograd.grad(
                    [slopes[number] for number in curved], weights,
                    [signs[number] for number in curved],  # pyright: ignore[reportArgumentType]
                    retain_graph=True, allow_unused=True,
                )  # fmt: skip
                for total, sign, product in zip(totals, signs, products, strict=True):
                    if product is not None:
                        total.addcmul_(sign.float(), product.float())
            count += size_of(batch)
    if not count:
        raise DataError("there are no examples to take the Hessian diagonal over")
    return {
        name: total.div_(count * probes) for name, total in zip(parameters, totals, strict=True)
    }


def _signs(weights: list[nn.Parameter], seed: int, probe: int) -> list[Tensor]:
    """A probe: +1 or -1 for each weight."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + probe)
    return [
        (torch.randint(0, 2, one.shape, generator=generator) * 2 - 1).to(one.device, one.dtype)
        for one in weights
    ]
