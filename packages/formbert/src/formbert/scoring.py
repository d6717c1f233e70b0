"""Scores of instances' candidates: by length, in batches of so many tokens, each text and gloss once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from octavo.console import counter
from torch import Tensor

from formbert.cache import GlossCache
from formbert.encode import Row, by_tokens
from formbert.modeling import FormBert, FormBertBi, FormBertCross
from formbert.reader import Item, Reader

#: Tokens of a batch that a CPU's caches hold, and that keep an accelerator busy.
CPU_TOKENS, TOKENS = 1_024, 16_384


@dataclass(frozen=True)
class Scored:
    """What a model says of one instance.

    Attributes:
        scores: of its candidates, in the inventory's order.
        posterior: of the formations in its context; None without a predictor.
    """

    scores: np.ndarray
    posterior: np.ndarray | None


@torch.inference_mode()
def score(
    model: FormBert,
    reader: Reader,
    items: Sequence[Item],
    batch_tokens: int = 0,
    cache: GlossCache | None = None,
) -> list[Scored]:
    """Scores of items, the same whatever they are batched with.

    Args:
        model: in evaluation mode.
        reader: of its inventory.
        items: that `reader` read.
        batch_tokens: tokens a batch, padding included; 0 for what is fast on the model's device.
        cache: of glosses; for a bi-encoder.

    Returns:
        One for each item, in their order.
    """
    if not items:
        return []
    if isinstance(model, FormBertCross):
        return _cross(model, reader, items, batch_tokens)
    assert isinstance(model, FormBertBi)
    return _bi(model, reader, items, batch_tokens, cache)


@torch.inference_mode()
def posteriors(
    model: FormBert, reader: Reader, items: Sequence[Item], batch_tokens: int = 0
) -> np.ndarray:
    """Probabilities of the formations in each item's context, [items, labels]."""
    return _formation_logits(model, reader, items, batch_tokens).softmax(1).numpy()


def _formation_logits(
    model: FormBert, reader: Reader, items: Sequence[Item], budget: int
) -> Tensor:
    rows = reader.context_rows(items)
    logits = torch.empty(len(rows), len(reader.labels))
    for batch in _batches(model, reader, rows, budget, "formations"):
        found = model.formation_logits(_to(model, reader.batch([rows[at] for at in batch])))
        logits[batch] = found.float().cpu()
    return logits


def _cross(
    model: FormBertCross, reader: Reader, items: Sequence[Item], budget: int
) -> list[Scored]:
    logits = None
    if model.options.predictor != "none":
        logits = _formation_logits(model, reader, items, budget)
    pairs = [(at, sense) for at, item in enumerate(items) for sense in item.candidates]
    rows = reader.pair_rows(items, pairs)
    scores = np.empty(len(pairs))
    for batch in _batches(model, reader, rows, budget, "senses"):
        texts = [pairs[at][0] for at in batch]
        senses = [pairs[at][1] for at in batch]
        inputs = {
            "pairs": reader.batch([rows[at] for at in batch]),
            "text": torch.arange(len(batch)),
            "formations": reader.formations[senses],
            "known": reader.known[senses],
        }
        if logits is not None:
            inputs["logits"] = logits[texts].to(model.dtype)
        scores[batch] = model(**_to(model, inputs)).scores.float().cpu().numpy()
    return _by_item(items, scores, logits)


def _bi(
    model: FormBertBi, reader: Reader, items: Sequence[Item], budget: int, cache: GlossCache | None
) -> list[Scored]:
    senses = sorted({sense for item in items for sense in item.candidates})
    place = {sense: at for at, sense in enumerate(senses)}
    glosses = embed_glosses(model, reader, senses, budget, cache)
    shares = _shares(model, reader, senses)
    rows = reader.context_rows(items)
    scores: list[Any] = [None] * len(items)
    logits = (
        None if model.options.predictor == "none" else torch.empty(len(rows), len(reader.labels))
    )
    for batch in _batches(model, reader, rows, budget, "texts"):
        words, found = model.embed_contexts(_to(model, reader.batch([rows[at] for at in batch])))
        text = [at for at, item in enumerate(batch) for _ in items[item].candidates]
        which = [place[sense] for item in batch for sense in items[item].candidates]
        values = model.score(
            words[text], glosses[which], shares[which], None if found is None else found[text]
        )
        values = values.float().cpu().numpy()
        ends = np.cumsum([len(items[item].candidates) for item in batch])
        for item, part in zip(batch, np.split(values, ends[:-1]), strict=True):
            scores[item] = part
        if logits is not None and found is not None:
            logits[batch] = found.float().cpu()
    return _by_item(items, np.concatenate(scores), logits)


def embed_glosses(
    model: FormBertBi,
    reader: Reader,
    senses: Sequence[int],
    budget: int,
    cache: GlossCache | None = None,
) -> Tensor:
    """Vectors of glosses [senses, width] on the model's device; those in the cache are not computed."""
    keys = [] if cache is None else [cache.key(reader, sense) for sense in senses]
    known = {} if cache is None else cache.get(keys)
    missing = [at for at in range(len(senses)) if at not in known]
    width = model.config.encoder_config().hidden_size
    vectors = torch.empty(len(senses), width, dtype=model.dtype, device=model.device)
    for at, vector in known.items():
        vectors[at] = torch.from_numpy(np.array(vector)).to(vectors)
    rows = reader.gloss_rows(senses[at] for at in missing)
    for batch in _batches(model, reader, rows, budget, "glosses"):
        there = [missing[at] for at in batch]
        shares = _shares(model, reader, [senses[at] for at in there])
        inputs = _to(model, reader.batch([rows[at] for at in batch]))
        vectors[there] = model.embed_glosses(inputs, shares).to(vectors.dtype)
    if cache is not None and missing:
        fresh = vectors[missing].float().cpu().numpy()
        cache.add({keys[at]: row for at, row in zip(missing, fresh, strict=True)})
    return vectors


@torch.inference_mode()
def embed_contexts(
    model: FormBert, reader: Reader, items: Sequence[Item], batch_tokens: int = 0
) -> np.ndarray:
    """A vector of each word in its text, [items, width]: the mean of its states."""
    rows = reader.context_rows(items)
    vectors = np.empty((len(rows), model.config.encoder_config().hidden_size), np.float32)
    for batch in _batches(model, reader, rows, batch_tokens, "texts"):
        inputs = _to(model, reader.batch([rows[at] for at in batch]))
        vectors[batch] = model.words(inputs).float().cpu().numpy()
    return vectors


def _batches(model: FormBert, reader: Reader, rows: Sequence[Row], budget: int, what: str) -> Any:
    """Numbers of rows in batches, with a bar of progress."""
    budget = budget or (CPU_TOKENS if model.device.type == "cpu" else TOKENS)
    lengths = [reader.encoding.length if reader.options.authors else len(row.ids) for row in rows]
    with counter(f"scoring {what}", len(rows), what) as advance:
        for batch in by_tokens(lengths, budget):
            yield batch
            advance(len(batch))


def _shares(model: FormBert, reader: Reader, senses: Sequence[int]) -> Tensor:
    chosen = list(senses)
    formations = reader.formations[chosen].to(model.device)
    return model.shares(formations, reader.known[chosen].to(model.device), None)


def _by_item(items: Sequence[Item], scores: np.ndarray, logits: Tensor | None) -> list[Scored]:
    ends = np.cumsum([len(item.candidates) for item in items])
    posteriors = None if logits is None else logits.softmax(1).numpy()
    return [
        Scored(part, None if posteriors is None else posteriors[at])
        for at, part in enumerate(np.split(scores, ends[:-1]))
    ]


def _to(model: FormBert, value: Any) -> Any:
    """Tensors, in dictionaries too, on the model's device."""
    if isinstance(value, dict):
        return {name: _to(model, one) for name, one in value.items()}
    return value.to(model.device, non_blocking=True)
