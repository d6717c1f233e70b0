"""Texts and glosses as token rows that never lose the word, and rows as batches.

A text is cut at the word's own offsets before it is tokenized, so that no token reaches across its
edges, whatever the tokenizer; one too long is cut to a window around the word.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from octavo.errors import ModelError
from torch import Tensor

from formbert.config import Marking, ModelOptions
from formbert.data import Instance
from formbert.inventory import Sense

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIGNS = {"hash": ("#", "#"), "quote": ('"', '"'), "special": ("[TGT]", "[/TGT]")}


@dataclass(frozen=True)
class Span:
    """A text's tokens and which of them are the word's, without the model's own frame."""

    ids: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """A framed row of tokens.

    Attributes:
        ids: token numbers.
        types: segment numbers.
        target: first and one past the last token of the word.
        gloss: the same of the gloss; empty where there is none.
        slot: where the formation's vector goes; -1 where it has no place.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    target: tuple[int, int] = (0, 0)
    gloss: tuple[int, int] = (0, 0)
    slot: int = -1


class Encoding:
    """Rows for one tokenizer and one set of options.

    Args:
        tokenizer: any fast one.
        options: marking, length, what is written beside the gloss; with `token` a slot is left before.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", options: ModelOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.length = min(options.max_length, _most(tokenizer))
        self.slot = "token" in options.fusion
        single, pair = _frame(tokenizer, False), _frame(tokenizer, True)
        self.begin, self.end, self.type = single[0], single[-1], single[1]
        self.pair_begin, self.pair_middle, self.pair_end, *self.pair_types = pair
        filler = tokenizer.mask_token_id or tokenizer.unk_token_id
        self.filler: int = 0 if filler is None else int(filler)  # pyright: ignore
        signs = SIGNS.get(options.marking, ())
        self.marks = [self.tokens([sign])[0] for sign in signs]
        if options.marking == "special":
            self.marks = [(int(tokenizer.convert_tokens_to_ids(sign)),) for sign in signs]  # pyright: ignore
        if options.marking == "mask" and tokenizer.mask_token_id is None:
            raise ModelError("--marking mask: this tokenizer has no mask token")

    def tokens(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token numbers of texts, without any frame."""
        if not texts:
            return []
        rows = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return [tuple(row) for row in rows]  # pyright: ignore

    def spans(self, instances: Sequence[Instance]) -> list[Span]:
        """The marked texts' tokens, whole."""
        parts = [one.text[: one.start] for one in instances]
        parts += [one.text[one.start : one.end] for one in instances]
        parts += [one.text[one.end :] for one in instances]
        ids = self.tokens(parts)
        count = len(instances)
        before, after = self.marks or ((), ())
        spans = []
        for left, word, right in zip(
            ids[:count], ids[count : 2 * count], ids[2 * count :], strict=True
        ):
            if not word:  # a word of which the tokenizer leaves nothing, such as a space
                word = (self.filler,)
            if self.options.marking == "mask":
                word = (int(self.tokenizer.mask_token_id),) * len(word)  # pyright: ignore
            inner = (*left, *before, *word, *after, *right)
            start = len(left) + len(before)
            spans.append(Span(inner, start, start + len(word)))
        return spans

    def glosses(self, senses: Sequence[Sense]) -> list[tuple[int, ...]]:
        """Tokens of what is read of each sense."""
        return self.tokens([self.gloss_text(sense) for sense in senses])

    def gloss_text(self, sense: Sense) -> str:
        """The word, and what is said of the sense."""
        pos = f"{sense.pos}，" if self.options.gloss_pos and sense.pos else ""
        morphemes = (
            f"语素：{'；'.join(filter(None, sense.morphemes))}"
            if self.options.morphemes and sense.morphemes
            else ""
        )
        return f"{sense.word}：{pos}{sense.gloss}{morphemes}"

    def context(self, span: Span) -> Row:
        """A text alone."""
        room = self.length - len(self.begin) - len(self.end)
        inner = window(span, room)
        shift = len(self.begin)
        ids = (*self.begin, *inner.ids, *self.end)
        return Row(ids, (self.type,) * len(ids), (inner.start + shift, inner.end + shift))

    def gloss(self, tokens: tuple[int, ...]) -> Row:
        """A gloss alone."""
        slot = (self.filler,) * self.slot
        room = self.length - len(self.begin) - len(self.end) - len(slot)
        ids = (*self.begin, *slot, *tokens[:room], *self.end)
        first = len(self.begin)
        inside = (first + len(slot), len(ids) - len(self.end))
        return Row(ids, (self.type,) * len(ids), gloss=inside, slot=first if self.slot else -1)

    def pair(self, span: Span, tokens: tuple[int, ...]) -> Row:
        """A text and a gloss; the gloss keeps at least half of the room, the text the rest."""
        slot = (self.filler,) * self.slot
        frame = len(self.pair_begin) + len(self.pair_middle) + len(self.pair_end) + len(slot)
        room = self.length - frame
        inner = window(span, max(room - len(tokens), room // 2))
        tokens = tokens[: room - len(inner.ids)]
        first = (*self.pair_begin, *inner.ids, *self.pair_middle)
        second = (*slot, *tokens, *self.pair_end)
        one, two = self.pair_types
        at = len(first)
        shift = len(self.pair_begin)
        return Row(
            (*first, *second),
            (one,) * len(first) + (two,) * len(second),
            (inner.start + shift, inner.end + shift),
            (at + len(slot), at + len(slot) + len(tokens)),
            at if self.slot else -1,
        )

    def authors_pair(self, instance: Instance, sense: Sense) -> Row:
        """A pair as the authors tokenize it: marked text and gloss, the longer one cut at its end."""
        found = self.tokenizer(
            marked(instance, "hash"), self.gloss_text(sense),
            truncation=True, max_length=self.length, return_token_type_ids=True,
        )  # fmt: skip
        return Row(tuple(found["input_ids"]), tuple(found["token_type_ids"]))  # pyright: ignore

    def authors_context(self, instance: Instance) -> Row:
        """A text alone as the authors tokenize it."""
        found = self.tokenizer(
            marked(instance, "hash"), truncation=True, max_length=self.length,
            return_token_type_ids=True,
        )  # fmt: skip
        return Row(tuple(found["input_ids"]), tuple(found["token_type_ids"]))  # pyright: ignore

    def batch(self, rows: Sequence[Row], length: int = 0) -> dict[str, Tensor]:
        """Rows as padded tensors.

        Args:
            rows: to be put together.
            length: tokens to pad to; the longest row's by default.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` [rows, tokens] of integers; `target`, `gloss`
            the same of bool: which tokens are the word's and the gloss's; `slot` [rows].
        """
        width = max(length, *(len(row.ids) for row in rows))
        shape = (len(rows), width)
        pad = int(self.tokenizer.pad_token_id or 0)  # pyright: ignore
        ids = torch.full(shape, pad)
        mask, types = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        target = torch.zeros(shape, dtype=torch.bool)
        gloss = torch.zeros(shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            count = len(row.ids)
            ids[place, :count] = torch.tensor(row.ids)
            types[place, :count] = torch.tensor(row.types)
            mask[place, :count] = 1
            target[place, row.target[0] : row.target[1]] = True
            gloss[place, row.gloss[0] : row.gloss[1]] = True
        return {
            "input_ids": ids, "attention_mask": mask, "token_type_ids": types,
            "target": target, "gloss": gloss, "slot": torch.tensor([row.slot for row in rows]),
        }  # fmt: skip


def window(span: Span, room: int) -> Span:
    """At most `room` tokens of a text, with the word in their middle as far as the text's ends allow.

    A word longer than the room keeps its beginning.
    """
    if len(span.ids) <= room:
        return span
    last = min(len(span.ids) - room, span.start)  # the last place to begin with the word inside
    middle = (span.start + span.end) // 2 - room // 2
    first = min(max(middle, span.end - room, 0), last)
    ids = span.ids[first : first + room]
    return Span(ids, span.start - first, min(span.end - first, room))


def marked(instance: Instance, marking: Marking) -> str:
    """The text with the word marked, as one string."""
    before, after = SIGNS[marking]
    word = instance.text[instance.start : instance.end]
    return f"{instance.text[: instance.start]}{before}{word}{after}{instance.text[instance.end :]}"


def by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Items by length, in batches of at most `budget` tokens with padding (one item at least)."""
    batch: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _most(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The longest row a tokenizer says its model takes."""
    return min(int(tokenizer.model_max_length), 1 << 20)


def _frame(tokenizer: "PreTrainedTokenizerBase", pair: bool) -> tuple[Any, ...]:
    """The tokens that a tokenizer puts around one text or two, and the segments' numbers.

    They are found by framing two texts of one known token each: any tokenizer's own frame is kept.
    """
    known = "一" if tokenizer("一", add_special_tokens=False)["input_ids"] else "a"
    inner = list(tokenizer(known, add_special_tokens=False)["input_ids"])  # pyright: ignore
    found = tokenizer(known, known if pair else None, return_token_type_ids=True)
    ids, types = list(found["input_ids"]), list(found["token_type_ids"])  # pyright: ignore
    places = [at for at in range(len(ids)) if ids[at : at + len(inner)] == inner]
    if len(places) < 1 + pair:
        raise ModelError("the tokenizer does not keep a text's tokens when it frames them")
    first = places[0]
    if not pair:
        return tuple(ids[:first]), types[first], tuple(ids[first + len(inner) :])
    second = places[-1]
    return (
        tuple(ids[:first]),
        tuple(ids[first + len(inner) : second]),
        tuple(ids[second + len(inner) :]),
        types[first],
        types[second],
    )
