"""Sampling continuations of many texts at once, on any causal language model of the library.

Each completion has a seed of its own, from which its random numbers are counted: what is sampled for
a text depends on that seed alone, and neither on the batch it is in nor on when it is asked for.
(Batches of other shapes may differ in the last bit of a probability; a draw that lies within it may
fall otherwise.)
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from octavo.errors import ConfigError, DataError
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mathshepherd.config import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """A text to be continued, once for each seed."""

    text: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
        text: without the text continued.
        finished: whether it came to an end of its own (the model's end token, not the length limit).
        tokens: how many were made.
        stopped: whether it stopped at the words that the generator was told to, and ends in them.
    """

    text: str
    finished: bool
    tokens: int
    stopped: bool = False


#: Completions of each request, in its seeds' order. Implemented here, in `engines` and by any function.
Generator = Callable[[Sequence[Request]], list[list[Completion]]]


def seed_of(*parts: str | int) -> int:
    """A seed of 63 bits from what identifies a completion."""
    words = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") >> 1


def uniforms(seeds: Sequence[int], count: int) -> Float[np.ndarray, "seeds count"]:
    """Numbers in [0, 1), counted from each seed (splitmix64: a hash of seed plus position)."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = np.asarray(seeds, dtype=np.uint64)[:, None] + steps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


@dataclass(frozen=True)
class LocalGenerator:
    """Continues texts with a model in this process.

    Texts are sorted by length and go through in batches; each text is read once for all its
    completions; rows that have ended are taken out of the batch.

    Attributes:
        model: a causal language model, in evaluation mode.
        tokenizer: its own.
        sampling: how tokens are drawn.
        rows: continuations made at once.
        stop: words to stop at, such as a step's tag; empty to go on to the end.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling = field(default_factory=Sampling)
    rows: int = 256
    stop: str = ""

    def __call__(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of each request, in its seeds' order.

        Raises:
            ConfigError: no token holds the words to stop at.
            DataError: a text leaves no room for a token in the model's context.
        """
        ends = end_tokens(self.model, self.tokenizer)
        stops = stop_tokens(self.tokenizer, self.stop) if self.stop else frozenset()
        found: list[list[Completion]] = [[] for _ in requests]
        prompts = [encode(self.tokenizer, request.text) for request in requests]
        for batch in _batches(requests, prompts, self.rows):
            made = continue_tokens(
                self.model, [prompts[n] for n, _ in batch], [seeds for _, seeds in batch],
                self.sampling, ends | stops,
            )  # fmt: skip
            flat = [one for group in made for one in group]
            stopped = [one.finished and one.ids[-1] in stops for one in flat]
            texts = self.tokenizer.batch_decode(
                [one.ids if at else one.text_ids for one, at in zip(flat, stopped, strict=True)],
                skip_special_tokens=False,
            )
            completions = (
                Completion(text, one.finished and not at, len(one.ids), at)
                for text, one, at in zip(texts, flat, stopped, strict=True)
            )
            for (n, _), group in zip(batch, made, strict=True):
                found[n] += [next(completions) for _ in group]
        return found


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """A text's tokens, begun as the tokenizer begins one, and not twice; an end is not put to it."""
    begun = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    ids = list(tokenizer(text, add_special_tokens=not begun)["input_ids"])  # pyright: ignore
    ended = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ended and not text.endswith(str(tokenizer.eos_token)) else ids


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that end a text."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ends: list[Any] = [tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]
    return frozenset(one for one in ends if one is not None)


@lru_cache(maxsize=4)
def stop_tokens(tokenizer: "PreTrainedTokenizerBase", words: str) -> frozenset[int]:
    """The tokens that hold some words.

    Raises:
        ConfigError: none does.
    """
    texts = tokenizer.batch_decode([[n] for n in range(len(tokenizer))])
    if found := frozenset(n for n, text in enumerate(texts) if words in text):
        return found
    raise ConfigError(f"no token of this model holds {words!r}, where a step would end")


def _batches(
    requests: Sequence[Request], prompts: Sequence[Sequence[int]], rows: int
) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """Numbers of requests, the longest texts first, each with as many seeds as make `rows` together.

    The seeds of one request that are more than that go through in parts.
    """
    batch: list[tuple[int, tuple[int, ...]]] = []
    for n in sorted(range(len(requests)), key=lambda n: (-len(prompts[n]), n)):
        seeds = requests[n].seeds
        for part in (seeds[first : first + rows] for first in range(0, len(seeds), rows)):
            if batch and sum(len(some) for _, some in batch) + len(part) > rows:
                yield batch
                batch = []
            batch.append((n, part))
    if batch:
        yield batch


@dataclass(frozen=True)
class Tokens:
    """One continuation's tokens.

    Attributes:
        ids: with the end token, where there is one.
        finished: whether there is.
    """

    ids: list[int]
    finished: bool

    @property
    def text_ids(self) -> list[int]:
        """Without the end token."""
        return self.ids[:-1] if self.finished else self.ids


@torch.inference_mode()
def continue_tokens(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: frozenset[int],
) -> list[list[Tokens]]:
    """Continue each prompt once for each of its seeds, all in one batch.

    Args:
        model: a causal language model.
        prompts: token ids.
        seeds: of each prompt's continuations.
        sampling: how tokens are drawn.
        ends: tokens that end a continuation.

    Returns:
        For each prompt its continuations, in the order of its seeds.

    Raises:
        DataError: a prompt leaves no room in the model's context.
    """
    device = model.device
    widest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise DataError("an empty text cannot be continued")
    if widest >= context(model):
        raise DataError(
            f"a text of {widest} tokens leaves no room in the model's context ({context(model)})"
        )
    # a text's own length limits its continuations, whatever else is in the batch
    rooms = [min(sampling.max_new_tokens, context(model) - len(prompt)) for prompt in prompts]
    count = max(rooms)
    ids = torch.zeros(len(prompts), widest, dtype=torch.long)
    mask = torch.zeros(len(prompts), widest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, widest - len(prompt) :] = torch.tensor(prompt)
        mask[row, widest - len(prompt) :] = True
    ids, mask = ids.to(device), mask.to(device)
    cache = growing_cache(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip

    # one row a continuation from here on
    source = torch.tensor([row for row, some in enumerate(seeds) for _ in some], device=device)
    flat = [seed for some in seeds for seed in some]
    noise = torch.from_numpy(uniforms(flat, count)).to(torch.float32).to(device)
    cache.batch_select_indices(source)
    logits, mask, position = logits[source], mask[source], positions[source, -1]
    mask = torch.cat([mask, mask.new_ones(len(flat), count)], dim=1)
    ended = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    made = torch.zeros(len(flat), count, dtype=torch.long, device=device)
    length = torch.tensor(rooms, device=device)[source]
    alive = torch.arange(len(flat), device=device)  # the continuation of each row
    going = torch.ones(len(flat), dtype=torch.bool, device=device)  # rows that have not ended
    finished = ~going.clone()
    for step in range(count):
        tokens = draw(logits, noise[alive, step], sampling)
        made[alive, step] = tokens
        now = going & torch.isin(tokens, ended)
        length[alive[now]] = step + 1
        finished[alive[now]] = True
        going &= length[alive] > step + 1
        left = int(going.sum())
        if not left or step == count - 1:
            break
        if left <= 0.75 * len(going):  # copying the cache costs about as much as a step
            rows = going.nonzero().squeeze(1)
            cache.batch_select_indices(rows)
            alive, going, tokens = alive[rows], going[rows], tokens[rows]
            mask, position = mask[rows], position[rows]
        position = (position + 1).clamp(max=context(model) - 1)  # rows that have ended go on
        seen = mask[:, : widest + step + 1]
        logits = model(
            input_ids=tokens[:, None], attention_mask=_step_mask(model, cache, seen),
            position_ids=position[:, None], past_key_values=cache, use_cache=True,
        ).logits[:, -1]  # fmt: skip
    rows = iter(zip(made.tolist(), length.tolist(), finished.tolist(), strict=True))
    return [
        [Tokens(ids[:size], done) for ids, size, done in (next(rows) for _ in some)]
        for some in seeds
    ]


def draw(
    logits: Float[Tensor, "rows vocabulary"], noise: Float[Tensor, " rows"], sampling: Sampling
) -> Int[Tensor, " rows"]:
    """The token of each row at which the cumulative probability passes its random number."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.amax(-1, keepdim=True).float()
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    order = None
    if sampling.top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < sampling.top_p)
    total = probabilities.cumsum(-1)
    noise = noise.clamp(max=1 - 2**-24)  # numbers next to 1 were rounded up to it
    place = torch.searchsorted(total, (noise * total[:, -1])[:, None], right=True)
    place = place.clamp(max=logits.shape[-1] - 1)
    return (place if order is None else order.gather(-1, place)).squeeze(-1)


def context(model: Any) -> int:
    """Tokens that a model takes."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


def _step_mask(model: Any, cache: Any, mask: Bool[Tensor, "rows seen"]) -> Tensor | None:
    """The mask of one new token over all seen ones; ready made where all layers see them all."""
    if mask.all():
        return None if _plain(cache) else mask
    if _plain(cache) and model.config._attn_implementation == "sdpa":
        return mask[:, None, None]
    return mask


def _plain(cache: Any) -> bool:
    return all(type(layer) is GrowingLayer for layer in cache.layers)


class GrowingLayer(DynamicLayer):
    """Keys and values with room for more, so that a new token is written and nothing copied."""

    room_keys: Tensor
    room_values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; gives those of all."""
        seen, new = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room_keys = key_states[..., :0, :]
            self.room_values = value_states[..., :0, :]
        if seen + new > self.room_keys.shape[-2]:
            size = seen + new + max(64, seen // 2)
            self.room_keys = _wider(self.room_keys, seen, size)
            self.room_values = _wider(self.room_values, seen, size)
        self.room_keys[..., seen : seen + new, :] = key_states
        self.room_values[..., seen : seen + new, :] = value_states
        self.keys = self.room_keys[..., : seen + new, :]
        self.values = self.room_values[..., : seen + new, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, or some of them several times."""
        if seen := self.get_seq_length():
            self.room_keys, self.room_values = self.room_keys[indices], self.room_values[indices]
            self.keys, self.values = self.room_keys[..., :seen, :], self.room_values[..., :seen, :]


def _wider(room: Tensor, seen: int, size: int) -> Tensor:
    """Room for `size` tokens, the first `seen` of them as they were."""
    new = room.new_empty(*room.shape[:-2], size, room.shape[-1])
    new[..., :seen, :] = room[..., :seen, :]
    return new


def growing_cache(model: Any) -> DynamicCache:
    """The library's cache for this model, its plain layers with room to grow."""
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = GrowingLayer()
    return cache
