"""A prompt, and the token index of every label word, format word and the target in it.

Indices come from the tokenizer's character offsets, never from a search for ids or strings, so that a
text which contains a label word, labels of several tokens and any tokenizer are read rightly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Int
from octavo.errors import DataError, ModelError
from torch import Tensor

from anchors.config import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """Token ids of demonstrations and a text to label, and where its parts are.

    Attributes:
        input_ids: T ids.
        labels: for each demonstration the indices of its label word's tokens (the paper's p_k).
        classes: the class of each demonstration.
        format: indices of the demonstrations' format words (template and separator).
        query: index of the first token that belongs to the text to label and its template.
        target: index of the last token, where the label is predicted (the paper's q).
        answers: for each class the id of its label word's first token, as it would follow here.
        special: indices of marks of the tokenizer's own, such as BOS.
    """

    input_ids: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    classes: tuple[int, ...]
    format: tuple[int, ...]
    query: int
    target: int
    answers: tuple[int, ...]
    special: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def tail(self) -> "Prompt":
        """What follows the demonstrations, to be run on a cache of them."""
        target, ids = self.target - self.query, self.input_ids[self.query :]
        return Prompt(ids, (), (), (), 0, target, self.answers)


def build_prompt(
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    demonstrations: Sequence[tuple[str, int]],
    text: str,
) -> Prompt:
    """Write demonstrations and a text in the task's template and find every part by token.

    Args:
        task: template and label words.
        tokenizer: a fast one, since only those tell offsets.
        demonstrations: texts and classes, in the order they appear.
        text: what is to be labelled.

    Raises:
        DataError: a class has no label word, or the tokenizer joins a label word with its surroundings.
        ModelError: the tokenizer tells no offsets, or two label words begin with the same token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "this tokenizer tells no character offsets; use a fast one (tokenizer.json)"
        )
    before, after = task.frame
    words = ""
    label_spans, format_spans, text_spans = [], [], []
    for content, kind in demonstrations:
        if not 0 <= kind < len(task.labels):
            raise DataError(
                f"class {kind}: the task has label words for 0 to {len(task.labels) - 1}"
            )
        words, span = _add(words, before)
        format_spans.append(span)
        words, span = _add(words, content)
        text_spans.append(span)
        words, span = _add(words, after)
        format_spans.append(span)
        words, span = _add(words, task.labels[kind])
        label_spans.append(span)
        words, span = _add(words, task.separator)
        format_spans.append(span)
    start = len(words)
    words += before + text + after
    ids, offsets = _encode(tokenizer, words)
    answers = _answers(task, tokenizer, words, ids)
    spans = [_visible(words, span) for span in label_spans]
    labels = tuple(
        tuple(index for index, token in enumerate(offsets) if _meet(token, span)) for span in spans
    )
    for places, span in zip(labels, spans, strict=True):
        found = words[offsets[places[0]][0] : offsets[places[-1]][1]] if places else ""
        if not places or found.strip() != words[slice(*span)]:
            raise DataError(
                f"the tokenizer joins the label word {words[slice(*span)]!r} with its surroundings "
                f"({found!r}); change the template or the separator"
            )
    taken = {index for places in labels for index in places}
    inside = [_visible(words, span) for span in text_spans]
    formats = tuple(
        index
        for index, token in enumerate(offsets)
        if index not in taken
        and any(_meet(token, span) for span in format_spans)
        and not any(_meet(token, span) for span in inside)
    )
    query = next((i for i, (low, high) in enumerate(offsets) if high > low >= start), len(ids) - 1)
    classes = tuple(kind for _, kind in demonstrations)
    special = tuple(i for i, (low, high) in enumerate(offsets[:query]) if low == high)
    return Prompt(tuple(ids), labels, classes, formats, query, len(ids) - 1, answers, special)


def _add(words: str, more: str) -> tuple[str, tuple[int, int]]:
    return words + more, (len(words), len(words) + len(more))


def _visible(words: str, span: tuple[int, int]) -> tuple[int, int]:
    """The span without the spaces around it, which tokenizers give to either side."""
    inner = words[slice(*span)]
    low = span[0] + len(inner) - len(inner.lstrip())
    return low, low + len(inner.strip())


def _meet(token: tuple[int, int], span: tuple[int, int]) -> bool:
    return token[0] < span[1] and span[0] < token[1]


def _encode(
    tokenizer: "PreTrainedTokenizerBase", words: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets; a mark of the end that the tokenizer adds is left out."""
    encoded = tokenizer(words, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, offsets = list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]
    special = encoded["special_tokens_mask"]
    while ids and special[len(ids) - 1] and offsets[-1] == (0, 0):
        ids.pop()
        offsets.pop()
    if not ids:
        raise DataError("the prompt is empty")
    return ids, offsets  # pyright: ignore[reportReturnType]


def _answers(
    task: Task, tokenizer: "PreTrainedTokenizerBase", words: str, ids: list[int]
) -> tuple[int, ...]:
    answers = []
    for label in task.labels:
        longer, _ = _encode(tokenizer, words + label)
        if longer[: len(ids)] != ids or len(longer) == len(ids):
            raise DataError(
                f"the tokenizer joins the label word {label!r} with the template's end; begin label "
                "words with a space, and let the template end without one"
            )
        answers.append(longer[len(ids)])
    for kind, answer in enumerate(answers):
        if answer in answers[:kind]:
            other = task.labels[answers.index(answer)]
            raise ModelError(
                f"the label words {other!r} and {task.labels[kind]!r} begin with the same token; "
                "choose others"
            )
        if answer == tokenizer.unk_token_id:
            raise ModelError(f"the label word {task.labels[kind]!r} is unknown to the tokenizer")
    return tuple(answers)


@dataclass(frozen=True)
class Batch:
    """Prompts padded to one length; all indices are of the padded rows.

    Attributes:
        prompts: the prompts themselves.
        shifts: for each how many tokens of padding stand before it.
        input_ids: [batch, time].
        attention_mask: [batch, time], false on padding.
        position_ids: [batch, time], as without padding.
    """

    prompts: tuple[Prompt, ...]
    shifts: tuple[int, ...]
    input_ids: Int[Tensor, "batch time"]
    attention_mask: Bool[Tensor, "batch time"]
    position_ids: Int[Tensor, "batch time"]

    @property
    def targets(self) -> Int[Tensor, " batch"]:
        """Index of each prompt's target."""
        pairs = zip(self.prompts, self.shifts, strict=True)
        places = [prompt.target + shift for prompt, shift in pairs]
        return torch.tensor(places, device=self.input_ids.device)

    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward pass takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask.long(),
            "position_ids": self.position_ids,
        }


def collate(
    prompts: Sequence[Prompt],
    pad: int = 0,
    side: Literal["left", "right"] = "left",
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad prompts to the length of the longest.

    Args:
        prompts: one or more.
        pad: id of the padding.
        side: where padding goes.
        device: of the tensors.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    shifts = tuple(longest - len(prompt) if side == "left" else 0 for prompt in prompts)
    for row, (prompt, shift) in enumerate(zip(prompts, shifts, strict=True)):
        ids[row, shift : shift + len(prompt)] = torch.tensor(prompt.input_ids)
        mask[row, shift : shift + len(prompt)] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return Batch(tuple(prompts), shifts, ids.to(device), mask.to(device), positions.to(device))


def batches(
    prompts: Sequence[Prompt], size: int, pad: int = 0, device: torch.device | str = "cpu",
    alike: bool = False,
) -> list[tuple[list[int], Batch]]:  # fmt: skip
    """Prompts of like lengths together, each batch with its prompts' numbers.

    Args:
        prompts: one or more.
        size: prompts in a batch at the most.
        pad: id of the padding.
        device: of the tensors.
        alike: only prompts of the same length together, so that nothing is padded.
    """
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number))
    groups = [order]
    if alike:
        groups = [list(group) for _, group in groupby(order, lambda number: len(prompts[number]))]
    parts = [group[n : n + size] for group in groups for n in range(0, len(group), size)]
    return [(part, collate([prompts[n] for n in part], pad, device=device)) for part in parts]
