"""log p(y|x, w) of each example: what every estimate of the Fisher diagonal differentiates.

An estimate is a few terms an example, each a label and a weight: its squared derivatives add up to the
example's part of the diagonal. The given label weighs 1, so does a drawn one, and the expectation over C
classes is C terms that weigh the square root of their probability.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from octavo.errors import ConfigError, DataError, ModelError
from torch import Tensor, nn

Kind = Literal["empirical", "exact", "sampled", "hutchinson"]
Batch = Mapping[str, Any]

IGNORED = -100  # the library's mark of a token that is not predicted


@dataclass(frozen=True)
class Terms:
    """What is differentiated: each term is weight * log p(label).

    Attributes:
        labels: [terms, batch] classes, or [terms, batch, time] tokens, `IGNORED` where none counts.
        weights: [terms, batch].
    """

    labels: Int[Tensor, "terms batch ..."]
    weights: Float[Tensor, "terms batch"]

    def values(self, logits: Float[Tensor, "batch ... labels"]) -> Iterator[Tensor]:
        """Each term's [batch] of weighted log-likelihoods."""
        for labels, weights in zip(self.labels, self.weights, strict=True):
            yield weights * log_likelihood(logits, labels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name, each once.

    Raises:
        ModelError: there is none.
    """
    found = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no parameter that requires gradients; call requires_grad_()"
        )
    return found


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def size_of(batch: Batch) -> int:
    """How many examples a batch holds.

    Raises:
        DataError: it has no tensor, or its tensors differ in their number of rows.
    """
    sizes = {name: len(value) for name, value in batch.items() if isinstance(value, Tensor)}
    if len(set(sizes.values())) != 1:
        raise DataError(f"a batch is a dict of tensors with one row an example; found {sizes}")
    return next(iter(sizes.values()))


def rows(batch: Batch, numbers: list[int]) -> dict[str, Any]:
    """The batch of these examples alone."""
    return {
        name: value[numbers] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def sample(batch: Batch, places: int = 16) -> dict[str, Any]:
    """Two examples, cut to a few tokens that both have: enough to see how a model uses its layers.

    A batch without a mask over its tokens is not cut; a single example comes twice.
    """
    last = size_of(batch) - 1
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return rows(batch, [0, min(1, last)])
    order = mask.sum(1).argsort(descending=True).tolist()
    pair = rows(batch, [order[0], order[min(1, last)]])
    shape = pair["attention_mask"].shape
    kept = pair["attention_mask"].all(0).nonzero()[:places, 0]
    if not len(kept):
        return pair
    return {
        name: value[:, kept] if isinstance(value, Tensor) and value.shape == shape else value
        for name, value in pair.items()
    }


def read_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "batch ... labels"]:
    """The model's float32 logits; labels are kept from it, so that it computes no loss of its own.

    Raises:
        ModelError: they are not a classifier's or a causal language model's, or not finite.
    """
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    name = type(model).__name__
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if (
        logits is None
        or logits.dim() not in (2, 3)
        or logits.shape[-1] < 2
        or problem in ("regression", "multi_label_classification")
        or getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification")
    ):
        raise ModelError(
            f"{name} has no log p(y|x): a sequence classifier of two or more classes or a causal "
            "language model is needed"
        )
    if not logits.isfinite().all():
        raise ModelError(f"{name} gave NaN or infinite logits; load it in float32 and check it")
    return logits.float()


def log_likelihood(
    logits: Float[Tensor, "batch ... labels"], labels: Int[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """The log p of each example; a language model's is the sum over the tokens that are predicted."""
    if logits.dim() == 2:
        return -nn.functional.cross_entropy(logits, labels, reduction="none")
    losses = nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )
    return -losses.sum(-1)


def make_terms(
    kind: Kind, logits: Float[Tensor, "batch ... labels"], batch: Batch, first: int, seed: int
) -> Terms:
    """The terms of an estimate at the model's present logits.

    Args:
        kind: "empirical", "exact" or "sampled".
        logits: of the batch; no gradient flows through labels and weights.
        batch: with its labels, which "exact" and a classifier's "sampled" do not read.
        first: the number of the batch's first example, which keys its draws.
        seed: of the draws.

    Raises:
        ConfigError: "exact" for a language model.
        DataError: labels are missing, of the wrong shape or out of range.
    """
    logits = logits.detach()
    count = len(logits)
    ones = logits.new_ones(1, count)
    if kind == "exact":
        if logits.dim() == 3:
            raise ConfigError(
                'kind="exact" would sum over every sequence a language model can write; '
                'use kind="sampled"'
            )
        classes = torch.arange(logits.shape[1], device=logits.device)
        return Terms(classes[:, None].expand(-1, count), logits.softmax(-1).sqrt().T)
    if kind == "empirical":
        return Terms(given_labels(logits, batch)[None], ones)
    draws = [np.random.default_rng([seed, first + number]) for number in range(count)]
    if logits.dim() == 2:
        labels = torch.stack(
            [_draw(row[None], rng)[0] for row, rng in zip(logits, draws, strict=True)]
        )
        return Terms(labels[None], ones)
    labels = given_labels(logits, batch).clone()
    for row, example, rng in zip(logits, labels, draws, strict=True):
        counts = example[1:] != IGNORED
        example[1:][counts] = _draw(row[:-1][counts], rng)
    return Terms(labels[None], ones)


def given_labels(
    logits: Float[Tensor, "batch ... labels"], batch: Batch
) -> Int[Tensor, "batch ..."]:
    """The batch's labels, checked; a language model's are `IGNORED` where there is padding."""
    labels = batch.get("labels")
    shape, words = tuple(logits.shape[:-1]), logits.shape[-1]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or tuple(labels.shape) != shape:
        found = "none" if labels is None else f"{getattr(labels, 'shape', labels)}"
        each = "token" if logits.dim() == 3 else "example"
        raise DataError(f'a batch needs "labels", an integer for each {each}; found {found}')
    if logits.dim() == 3:
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)
    wrong = (labels < 0) | (labels >= words)
    if logits.dim() == 3:
        wrong &= labels != IGNORED
    if wrong.any():
        raise DataError(
            f"label {labels[wrong][0].item()} is out of range: the model knows 0 to {words - 1}"
        )
    return labels


def _draw(logits: Float[Tensor, "draws labels"], rng: np.random.Generator) -> Int[Tensor, " draws"]:
    """A label from each row's distribution, the same on every device."""
    points = torch.from_numpy(rng.random((len(logits), 1))).to(logits.device, torch.float32)
    sums = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, points * sums[:, -1:], right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )
