"""Demonstrations compressed to the states of their label words (section 3.2 of the paper), and rivals.

Hidden anchors keep the keys and values of label and format words out of one pass over all
demonstrations; text anchors are a prompt of nothing but these words; random anchors keep as many other
words instead of the label words, and the best of several draws is chosen on rows of its own.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from octavo.errors import ModelError

from anchors.attention import frozen
from anchors.cache import PromptCache, beginning, prefill
from anchors.evaluate import label_loyalty, predict
from anchors.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Literal["anchors+format", "anchors", "text", "random", "all"]
Positions = Literal["original", "compact"]


def compress(
    model: "PreTrainedModel",
    prompt: Prompt,
    keep: Keep = "anchors+format",
    positions: Positions = "original",
    seed: int = 0,
) -> PromptCache:
    """Run the demonstrations of a prompt once and keep what stands for them.

    Args:
        model: any causal language model with a cache of keys and values.
        prompt: any that begins with the demonstrations; its own text is not read.
        keep: label and format words (the paper's hidden anchors); label words alone; `text` for a new
            prompt of label and format words; `random` for other words of the demonstrations in the place
            of label words; all. The tokenizer's own marks, such as BOS, are always kept.
        positions: what follows is at the position it would have had; or `compact`, right after the kept
            tokens, as the authors' code has it for GPT-2.
        seed: of the random words.
    """
    ids, places = beginning([prompt]), kept_places(prompt, keep, seed)
    about = {"kept": keep, "positions": positions, "tokens": len(ids)}
    if keep == "text":
        return replace(prefill(model, [ids[place] for place in places], about), ids=ids)
    cache = prefill(model, ids, about)
    if keep != "all":
        _refuse_distances(model)
    return cache.keep(places, len(places) if positions == "compact" else None)


def _refuse_distances(model: "PreTrainedModel") -> None:
    """Stop where a model takes no positions but counts places, as ALiBi does: left out tokens move all.

    Raises:
        ModelError: it does.
    """
    ids = torch.arange(3, device=model.device)[None] % model.config.get_text_config().vocab_size
    ways = [torch.tensor([places], device=model.device) for places in ([0, 1, 2], [0, 5, 9])]
    with frozen(model), torch.no_grad():
        one, other = (model(ids, position_ids=way, use_cache=False).logits for way in ways)
    if torch.equal(one, other):
        raise ModelError(
            f"{type(model).__name__}: takes no positions (it counts places, as ALiBi does), so that "
            "kept tokens would stand nearer than they did; its prompts can only be cached whole"
        )


def kept_places(prompt: Prompt, keep: Keep, seed: int = 0) -> list[int]:
    """The tokens of the demonstrations that are kept, ascending."""
    if keep == "all":
        return list(range(prompt.query))
    chosen = {*prompt.special}
    if keep != "anchors":
        chosen |= {*prompt.format}
    if keep == "random":
        return sorted(chosen | random_places(prompt, seed))
    return sorted(chosen | {place for places in prompt.labels for place in places})


def random_places(prompt: Prompt, seed: int) -> set[int]:
    """For each label word as many tokens of the text that it labels, or of what comes before it."""
    draw = random.Random(seed)
    formats, found, begin = {*prompt.format, *prompt.special}, set(), 0
    for places in prompt.labels:
        before = range(begin, places[0])
        pool = [place for place in before if place not in formats] or [*before] or [*places]
        found |= {*draw.sample(pool, min(len(places), len(pool)))}
        begin = places[-1] + 1
    return found


def best_random(
    model: "PreTrainedModel", prompts: Sequence[Prompt], draws: int = 20,
    positions: Positions = "original", batch_size: int = 8,
) -> PromptCache:  # fmt: skip
    """The random anchors that keep most labels, chosen on prompts that nothing is judged on.

    Args:
        model: any causal language model.
        prompts: to choose on, with the same demonstrations.
        draws: how many are tried.
        positions: as in `compress`.
        batch_size: prompts in one pass.
    """
    whole = prefill(model, beginning(prompts))
    before = predict(model, prompts, batch_size, cache=whole)
    best: tuple[float, PromptCache] | None = None
    for seed in range(draws):
        places = kept_places(prompts[0], "random", seed)
        cache = whole.keep(places, len(places) if positions == "compact" else None)
        after = predict(model, prompts, batch_size, cache=cache)
        loyal = float(label_loyalty(before, after).mean())
        if best is None or loyal > best[0]:
            best = loyal, cache
    assert best is not None
    about: dict[str, Any] = {"kept": f"best of {draws} random", "positions": positions}
    return replace(best[1], about={**best[1].about, **about, "tokens": len(whole)})
