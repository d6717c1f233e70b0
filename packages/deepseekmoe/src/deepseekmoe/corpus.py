"""Texts in, windows of tokens out: documents packed one behind the other, attention kept apart.

Texts are read as a stream and their tokens lie in a file that is mapped into memory, so that a corpus
may be larger than it. A window knows where documents begin: positions start again at 0 there, which is
what the attention implementations take a document's border from.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from octavo import console
from octavo.data import iter_rows
from octavo.errors import ConfigError, DataError
from octavo.rundir import atomic, write_json
from octavo.runtime import world_size

from deepseekmoe.config import CorpusConfig, OptimizeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Part = Literal["train", "dev"]

#: Texts are tokenised in pieces of about so many characters.
PIECE = 1 << 20

#: Characters that a tokenizer is trained on at the most: of a document, and of all.
SAMPLE_EACH, SAMPLE = 1 << 24, 1 << 28


@dataclass(frozen=True)
class Document:
    """A text and the domain it belongs to."""

    domain: str
    text: str


def documents(config: CorpusConfig, part: Part) -> Iterator[Document]:
    """Stream the training or the held-out texts.

    A .txt file, alone or in a folder, is one domain and one document: its last share is held out, cut
    at a line's end. Of rows every so-manieth is.

    Raises:
        ConfigError: the share is out of range.
        DataError: there are no such texts.
    """
    share = config.dev_share
    if not 0 <= share < 1:
        raise ConfigError(f"--dev-share {share}: must be a share from 0 up to 1")
    place = Path(config.data).expanduser()
    files = sorted(place.glob("*.txt")) if place.is_dir() else []
    if place.is_file() and place.suffix.lower() == ".txt":
        files = [place]
    if files:
        for file in files:
            text = _read(file)
            cut = _line_end(text, round(len(text) * (1 - share))) if share else len(text)
            piece = text[:cut] if part == "train" else text[cut:]
            if piece.strip():
                yield Document(file.stem, piece)
        return
    rows = iter_rows(config.data, {"text": str}, config.split, rename={"text": config.text_column})
    for number, row in enumerate(rows, 1):
        held_out = int(number * share) > int((number - 1) * share)
        if held_out == (part == "dev") and row["text"].strip():
            yield Document("text", row["text"])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: no UTF-8 at byte {error.start}; convert it first") from None


def _line_end(text: str, place: int) -> int:
    found = text.find("\n", place)
    return len(text) if found < 0 else found + 1


@dataclass(frozen=True)
class Tokens:
    """Tokens of many documents, each behind a beginning-of-text token and before an end-of-text one.

    Attributes:
        values: all tokens, [tokens] uint32.
        starts: where each document begins, [documents] int64.
        domains: name of each document's domain.
        text_bytes: bytes of UTF-8 of each document, [documents] int64.
    """

    values: np.ndarray
    starts: np.ndarray
    domains: Sequence[str]
    text_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def of_domain(self, domain: str) -> "Tokens":
        """The documents of one domain."""
        ends = np.append(self.starts[1:], len(self.values))
        chosen = [i for i, name in enumerate(self.domains) if name == domain]
        parts = [self.values[self.starts[i] : ends[i]] for i in chosen]
        sizes = [len(part) for part in parts]
        return Tokens(
            np.concatenate(parts) if parts else self.values[:0],
            np.cumsum([0, *sizes[:-1]]) if sizes else self.starts[:0],
            [domain] * len(chosen),
            self.text_bytes[chosen],
        )


def tokenize(
    texts: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> Tokens:
    """Write the tokens of texts into a folder, or find them there.

    Args:
        texts: documents.
        tokenizer: its beginning- and end-of-text tokens frame each document, where it has them;
            special tokens that a text spells out are plain text.
        folder: for `tokens.bin` and `documents.json`; it appears whole.

    Raises:
        DataError: there is no text.
    """
    if not folder.is_dir():
        starts, domains, sizes, total = [], [], [], 0
        with atomic(folder) as temporary, console.counter("tokenising", None, "texts") as advance:
            temporary.mkdir()
            with (temporary / "tokens.bin").open("wb") as file:
                for document in texts:
                    starts.append(total)
                    domains.append(document.domain)
                    sizes.append(0)
                    for ids, size in _encoded(document.text, tokenizer):
                        np.asarray(ids, dtype=np.uint32).tofile(file)
                        total += len(ids)
                        sizes[-1] += size
                    advance(1)
            if not total:
                raise DataError("there is no text to tokenise; look at --data and --dev-share")
            write_json(
                temporary / "documents.json",
                {"starts": starts, "domains": domains, "bytes": sizes},
            )
    return load_tokens(folder)


def load_tokens(folder: Path) -> Tokens:
    """What `tokenize` wrote."""
    found = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
    values = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
    return Tokens(values, np.asarray(found["starts"]), found["domains"], np.asarray(found["bytes"]))


def _encoded(text: str, tokenizer: Any) -> Iterator[tuple[Sequence[int], int]]:
    """A document's tokens, frame included, piece by piece; with each the bytes it stands for.

    Only the frame is of special tokens: what a text spells like one is text.
    """
    if (begin := tokenizer.bos_token_id) is not None:
        yield [begin], 0
    for piece in _pieces(text):
        found: Any = tokenizer(
            piece, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        yield found["input_ids"], len(piece.encode())
    if (end := tokenizer.eos_token_id) is not None:
        yield [end], 0


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end where lines do."""
    begin = 0
    while begin < len(text):
        end = min(len(text), begin + PIECE)
        if end < len(text):
            end = _line_end(text, end)
        yield text[begin:end]
        begin = end


class Windows:
    """Rows of `length` tokens, cut from packed documents.

    Args:
        tokens: of the documents.
        length: of a row.

    Raises:
        ConfigError: rows are shorter than two tokens.
        DataError: the tokens do not fill one row.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        if length < 2:
            raise ConfigError(f"--length {length}: must be 2 or more, to predict a next token")
        if len(tokens) < length:
            raise DataError(
                f"{len(tokens)} tokens do not fill one window of {length}; give more text or a "
                "smaller --length"
            )
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def rows(self, numbers: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """A batch: input_ids, position_ids and labels, each [rows, length] int64.

        Positions begin anew with each document; a document's first token has label -100, since what
        stands before it tells nothing of it.
        """
        import torch

        ids = np.empty((len(numbers), self.length), dtype=np.int64)
        positions = np.empty_like(ids)
        first = np.zeros_like(ids, dtype=bool)
        for place, number in enumerate(numbers):
            begin = int(number) * self.length
            ids[place] = self.tokens.values[begin : begin + self.length]
            low, high = np.searchsorted(self.tokens.starts, [begin, begin + self.length])
            borders = self.tokens.starts[low:high] - begin
            first[place, borders] = True
            since = np.zeros(self.length, dtype=np.int64)
            since[borders] = borders
            positions[place] = np.arange(self.length) - np.maximum.accumulate(since)
        labels = np.where(first, -100, ids)
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "labels": torch.from_numpy(labels),
        }


def shuffled_batches(
    rows: Callable[[np.ndarray], dict[str, Any]], many: int, config: OptimizeConfig, seed: int
) -> Callable[[int, int, int], dict[str, Any]]:
    """Batches for `optimize`: an endless shuffle of rows, each epoch in a new order.

    Args:
        rows: the tensors of rows by their numbers.
        many: how many rows there are.
        config: tells how many a batch and a step take.
        seed: of the order.
    """

    def batch(step: int, micro: int, process: int) -> dict[str, Any]:
        slot = (step * config.accumulate + micro) * world_size() + process
        begin = slot * config.batch_size
        epochs = range(begin // many, (begin + config.batch_size - 1) // many + 1)
        order = [_permutation(seed, epoch, many) for epoch in epochs]
        first = begin - epochs[0] * many
        return rows(np.concatenate(order)[first : first + config.batch_size])

    return batch


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, many: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(many)


def train_tokenizer(texts: Iterable[Document], vocabulary: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE of the texts, with one token that begins and ends them.

    Args:
        texts: read as a stream; of each document the first `SAMPLE_EACH` characters count, and no
            more documents are read once `SAMPLE` characters are.
        vocabulary: tokens in all.

    Raises:
        ConfigError: the vocabulary cannot hold the 256 bytes.
    """
    from octavo.tiny import Shape, make_tokenizer

    if vocabulary < 260:
        raise ConfigError(f"--vocabulary {vocabulary}: must be 260 or more, bytes come first")
    shape = Shape(kind="llama", alphabet="bpe", vocabulary=vocabulary, max_length=10**9)
    return make_tokenizer(_sample(texts), shape)


def _sample(texts: Iterable[Document]) -> Iterator[str]:
    """What a tokenizer is trained on, in pieces."""
    room = SAMPLE
    for document in texts:
        beginning = document.text[:SAMPLE_EACH]
        yield from _pieces(beginning)
        room -= len(beginning)
        if room <= 0:
            log.info("the tokenizer is trained on the first %d characters", SAMPLE - room)
            return
