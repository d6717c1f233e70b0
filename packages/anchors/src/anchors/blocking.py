"""Isolation of tokens (section 2.2 of the paper): cut the flow and see what the model still knows."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from octavo.errors import ConfigError
from torch import Tensor

from anchors.attention import Edit, instrument
from anchors.prompts import Batch, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rows of one prompt that are isolated together: each group sees only itself.
Groups = Sequence[Sequence[int]]
What = Literal["labels", "random", "format"]


@contextmanager
def block(
    model: "PreTrainedModel",
    edges: Tensor,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
) -> Iterator[None]:
    """Cut edges of the attention meanwhile; rows are normalised over what is left.

    Args:
        model: any that `instrument` takes.
        edges: what to cut, of bool: [time, time] or [batch, time, time], row attends to column.
        layers: where; all by default.
        heads: where; all by default.

    Raises:
        ConfigError: a row would be left with nothing to attend to, or a layer is not there.
    """
    edges = edges[None] if edges.ndim == 2 else edges
    own = edges.diagonal(dim1=-2, dim2=-1)
    if bool(own.any()):
        raise ConfigError("a token cannot be cut from itself: its row would be left with nothing")
    chosen = None if layers is None else set(layers)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if chosen is not None and (wrong := [layer for layer in chosen if not 0 <= layer < count]):
        raise ConfigError(f"layer {wrong[0]}: the model has layers 0 to {count - 1}")
    some = None if heads is None else torch.tensor(sorted(set(heads)))

    def cut(layer: int, query: Tensor, mask: Tensor) -> Tensor:
        if chosen is not None and layer not in chosen:
            return mask
        where = edges[:, None].to(mask.device)
        if some is not None:
            head = torch.zeros(query.shape[1], dtype=torch.bool, device=mask.device)
            head[some.to(mask.device)] = True
            where = where & head[None, :, None, None]
        return mask.masked_fill(where, torch.finfo(mask.dtype).min)

    with instrument(model, Edit(before=cut)):
        yield


def isolated(prompt: Prompt, what: What, seed: int = 0) -> list[list[int]]:
    """The groups of tokens that an analysis isolates.

    Args:
        prompt: whose.
        what: the label words; as many random tokens of the demonstrations that are no label words, one
            for each token of a label word; or as many random format tokens.
        seed: of the random ones, which are others for each prompt.
    """
    if what == "labels":
        return [list(places) for places in prompt.labels]
    taken = {place for places in prompt.labels for place in places}
    others = prompt.format if what == "format" else range(1, prompt.query)
    pool = [place for place in others if place not in taken and place > 0]
    draw = random.Random(f"{seed}/{prompt.input_ids}")
    return [[place] for place in draw.sample(pool, min(len(taken), len(pool)))]


def edges_before(batch: Batch, groups: Callable[[Prompt], Groups]) -> Tensor:
    """Edges from everything before a group of tokens to its members: [batch, time, time] of bool."""
    count, time = batch.input_ids.shape
    edges = torch.zeros(count, time, time, dtype=torch.bool, device=batch.input_ids.device)
    for row, (prompt, shift) in enumerate(zip(batch.prompts, batch.shifts, strict=True)):
        for group in groups(prompt):
            for place in group:
                edges[row, place + shift, shift : min(group) + shift] = True
    return edges
