"""Chats in, densely packed windows out, with a loss on what the assistant says and on nothing else.

A conversation is rendered by the chat template turn by turn, and each piece is tokenised on its own:
the text before a reply, "Assistant:" included, as it stands when the model is to answer, then the
reply. No token spans the border, so the mask is known and never searched for. Special tokens are the
template's alone: where somebody spells one in a message, it is plain text.
"""

import logging
import re
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from octavo.data import load_rows
from octavo.errors import ConfigError, DataError

from deepseekmoe.corpus import Tokens
from deepseekmoe.hub import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
COLUMNS = {"messages": list | None, "prompt": str | None, "response": str | None}

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Chat:
    """A conversation in tokens.

    Attributes:
        ids: [tokens] int64.
        reply: whether each token is the assistant's, [tokens] bool.
    """

    ids: np.ndarray
    reply: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def load_chats(source: str, split: str | None = None) -> list[Turns]:
    """Conversations of rows with `messages`, or with `prompt` and `response`.

    Raises:
        DataError: a row has neither, a role is unknown, an assistant's turn is empty or there is none.
    """
    rows = load_rows(source, COLUMNS, split, check=_problem)
    return [_turns(row) for row in rows]


def _turns(row: dict[str, Any]) -> Turns:
    if row["messages"] is not None:
        return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]


def _problem(row: dict[str, Any]) -> str | None:
    """What is wrong with a row, or None."""
    turns = row["messages"]
    if turns is None:
        if row["prompt"] is None or row["response"] is None:
            return "has no 'messages', and not both 'prompt' and 'response'"
        return None if row["response"].strip() else "'response' is empty"
    if not turns:
        return "'messages' is empty"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            return f"message {number} is no object with 'role' and a 'content' of text"
        if turn.get("role") not in ROLES:
            return f"message {number} has role {turn.get('role')!r}; use {', '.join(ROLES)}"
        if turn["role"] == "assistant" and not turn["content"].strip():
            return f"message {number}, the assistant's, is empty"
    if all(turn["role"] != "assistant" for turn in turns):
        return "no message is the assistant's, so there is nothing to learn"
    return None


def encode_chat(turns: Turns, tokenizer: "PreTrainedTokenizerBase") -> Chat:
    """A conversation's tokens, and which of them the assistant says.

    Args:
        turns: messages with role and content.
        tokenizer: its chat template is used, or the released one where it has none. The end-of-text
            token that the template puts behind a reply belongs to the reply.

    Raises:
        DataError: the template refuses the conversation, or renders its beginning otherwise than
            the whole, so that no reply can be told from what stands before it.
    """
    turns, spelt = _without_special(turns, tokenizer)
    pieces, done = [], ""
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(turns[:number], tokenizer, ask=True)
        after = _render(turns[: number + 1], tokenizer, ask=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"message {number + 1}: the chat template renders what stands before a reply "
                "otherwise once the reply is there; take another template"
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    ids, reply = [], []
    for text, said in pieces:
        found = _encode(text, spelt, tokenizer)
        ids += found
        reply += [said] * len(found)
    return Chat(np.asarray(ids, dtype=np.int64), np.asarray(reply, dtype=bool))


def encode_question(turns: Turns, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A conversation's tokens as they stand when the model is to answer."""
    turns, spelt = _without_special(turns, tokenizer)
    return _encode(_render(turns, tokenizer, ask=True), spelt, tokenizer)


def _special_tokens(tokenizer: Any) -> list[str]:
    """The longest first, so that none is taken for a shorter one that it holds."""
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted(found, key=len, reverse=True)


def _without_special(turns: Turns, tokenizer: Any) -> tuple[Turns, dict[str, str]]:
    """Turns in which a private character stands for each special token that a message spells.

    Returns:
        The turns, and what the characters stand for; they occur in no message otherwise.
    """
    text = "".join(turn["content"] for turn in turns)
    spelt = [token for token in _special_tokens(tokenizer) if token in text]
    unused = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in text)
    marks = dict(zip(spelt, unused, strict=False))
    changed = []
    for turn in turns:
        content = turn["content"]
        for token, mark in marks.items():
            content = content.replace(token, mark)
        changed.append(turn | {"content": content})
    return changed, {mark: token for token, mark in marks.items()}


def _encode(text: str, spelt: Mapping[str, str], tokenizer: Any) -> list[int]:
    """Tokens of a rendered text: special ones as such, those behind a mark as plain text."""
    if not any(mark in text for mark in spelt):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    special = _special_tokens(tokenizer)
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        if part in special:
            ids.append(tokenizer.convert_tokens_to_ids(part))
            continue
        for mark, token in spelt.items():
            part = part.replace(mark, token)
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def encode_chats(
    conversations: Sequence[Turns], tokenizer: "PreTrainedTokenizerBase", source: str
) -> list[Chat]:
    """`encode_chat` of many; an error names the source and the conversation."""
    from octavo import console

    chats = []
    with console.counter("tokenising", len(conversations), "chats") as advance:
        for place in range(len(conversations)):
            chats.append(_encode_one(conversations, place, tokenizer, source))
            advance(1)
    return chats


def draw_chats(
    conversations: Sequence[Turns], tokenizer: "PreTrainedTokenizerBase", source: str,
    tokens: int, seed: int,
) -> list[Chat]:  # fmt: skip
    """`encode_chat` of conversations drawn at random, until there are so many tokens or no more."""
    from octavo import console

    chats, total = [], 0
    order = list(range(len(conversations)))
    np.random.default_rng(seed).shuffle(order)
    with console.counter("tokenising", tokens, "tokens") as advance:
        for place in order:
            if total >= tokens:
                break
            chats.append(_encode_one(conversations, place, tokenizer, source))
            total += len(chats[-1])
            advance(len(chats[-1]))
    return chats


def _encode_one(
    conversations: Sequence[Turns], place: int, tokenizer: "PreTrainedTokenizerBase", source: str
) -> Chat:
    """`encode_chat` of one of many, which an error names by its number from 1."""
    try:
        return encode_chat(conversations[place], tokenizer)
    except DataError as error:
        raise DataError(f"{source}, conversation {place + 1}, {error}") from None


def _render(turns: Turns, tokenizer: Any, ask: bool) -> str:
    from jinja2 import TemplateError

    if not turns:
        return ""
    template = getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        raise DataError(f"message {len(turns)}: the chat template refuses it ({error})") from None


class PackedChats:
    """Windows that hold whole conversations, filled by best-fit decreasing.

    Attributes:
        cut: conversations that were longer than a window and lost their end.
        silent: conversations left out, as nothing of a reply stood in their first window.

    Args:
        chats: conversations in tokens.
        length: tokens of a window.
        pad: token that fills the rest of a window.

    Raises:
        ConfigError: windows are shorter than two tokens.
        DataError: no reply is within a window.
    """

    def __init__(self, chats: Sequence[Chat], length: int, pad: int) -> None:
        if length < 2:
            raise ConfigError(f"--length {length}: must be 2 or more, to predict a next token")
        self.length, self.pad = length, pad
        self.cut = sum(len(chat) > length for chat in chats)
        short = [Chat(chat.ids[:length], chat.reply[:length]) for chat in chats]
        self.chats = [chat for chat in short if chat.reply[1:].any()]
        self.silent = len(short) - len(self.chats)
        if not self.chats:
            raise DataError(f"no reply begins within {length} tokens; give a larger --length")
        if self.cut:
            log.warning(
                "%d of %d conversations are longer than a window of %d tokens and lose their end; "
                "%d of all have no reply in it and are left out",
                self.cut, len(chats), length, self.silent,
            )  # fmt: skip
        self.windows = best_fit([len(chat) for chat in self.chats], length)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def fill(self) -> float:
        """Share of the windows' tokens that are no padding."""
        return sum(map(len, self.chats)) / (len(self) * self.length)

    def rows(self, numbers: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """A batch: input_ids, position_ids, labels [rows, length] int64, and token_mask, bool.

        Positions begin anew with each conversation, and with the padding, so that attention stays
        within each. Labels are -100 but for the assistant's tokens; token_mask is False for padding.
        """
        import torch

        shape = len(numbers), self.length
        ids = np.full(shape, self.pad, dtype=np.int64)
        labels = np.full(shape, -100, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        real = np.zeros(shape, dtype=bool)
        for row, number in enumerate(numbers):
            begin = 0
            for chat in (self.chats[place] for place in self.windows[number]):
                end = begin + len(chat)
                ids[row, begin:end] = chat.ids
                labels[row, begin:end] = np.where(chat.reply, chat.ids, -100)
                labels[row, begin] = -100  # what stands before it is another conversation
                positions[row, begin:end] = np.arange(len(chat))
                real[row, begin:end] = True
                begin = end
            positions[row, begin:] = np.arange(self.length - begin)
        found = {"input_ids": ids, "position_ids": positions, "labels": labels, "token_mask": real}
        return {name: torch.from_numpy(value) for name, value in found.items()}


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Put things into as few boxes as best-fit decreasing finds: each into the fullest it fits in.

    Args:
        sizes: of the things, each at most `room`.
        room: of a box.

    Returns:
        The numbers of the things in each box.
    """
    boxes: list[list[int]] = []
    left: list[int] = []  # rooms that some box has left, in order
    by_room: dict[int, list[int]] = {}
    for thing in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        place = bisect_left(left, sizes[thing])
        if place == len(left):
            box, rest = len(boxes), room
            boxes.append([])
        else:
            rest = left[place]
            box = by_room[rest].pop()
            if not by_room[rest]:
                del by_room[rest], left[place]
        boxes[box].append(thing)
        rest -= sizes[thing]
        if rest not in by_room:
            by_room[rest] = []
            insort(left, rest)
        by_room[rest].append(box)
    return boxes


def as_tokens(chats: Sequence[Chat]) -> Tokens:
    """Conversations as the documents of one domain, as the analyses take them."""
    sizes = [len(chat) for chat in chats]
    return Tokens(
        np.concatenate([chat.ids for chat in chats]),
        np.cumsum([0, *sizes[:-1]]),
        ["chats"] * len(chats),
        np.zeros(len(chats), dtype=np.int64),
    )
