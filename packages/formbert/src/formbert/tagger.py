"""Every word of a text that the inventory has, with its sense.

A text is cut into words first: by maximum matching over the inventory, by jieba, by any function, or by
whoever made the text, whose own words always win. All occurrences in many texts then go to the model at
once.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from octavo.errors import ConfigError, DataError

from formbert.data import Instance
from formbert.inventory import Inventory
from formbert.predictions import Prediction

Span = tuple[int, int]
Words = Sequence[str] | Sequence[Span]
Segmenter = Callable[[str], Words]


@runtime_checkable
class Disambiguates(Protocol):
    """What a tagger needs of a model."""

    @property
    def inventory(self) -> Inventory:
        """The words it knows."""
        ...

    def batch(self, instances: list[Instance], /) -> list[Prediction]:
        """Their senses, in order."""
        ...


@dataclass(frozen=True)
class TaggedToken:
    """A word of a text.

    Attributes:
        text: the word as it stands there.
        start: where it begins, in characters from 0.
        end: where it ends, exclusive.
        prediction: its sense; None where the inventory lacks the word.
    """

    text: str
    start: int
    end: int
    prediction: Prediction | None = None


class Lexicon:
    """Words arranged for matching: the lengths that occur, by first and by last character.

    Args:
        words: those to be found in texts; an empty one is passed over.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = {word for word in words if word}
        self.forward = self._lengths(0)
        self.backward = self._lengths(-1)

    def _lengths(self, end: int) -> dict[str, tuple[int, ...]]:
        """Lengths of the words with a character at this end, the longest first."""
        found: dict[str, set[int]] = {}
        for word in self.words:
            if len(word) > 1:
                found.setdefault(word[end], set()).add(len(word))
        return {key: tuple(sorted(lengths, reverse=True)) for key, lengths in found.items()}


def segment(text: str, words: Iterable[str] | Lexicon, method: str = "maxmatch") -> list[str]:
    """Cut a text into words; together they are the text.

    `maxmatch` matches the longest known word from the left on, and from the right on, and takes the
    cut into fewer tokens; of equals the one with fewer single characters, and of those the one from the
    right (our choice). Runs of letters and digits outside Chinese are never parted; all else that is no
    word is cut into characters.

    Args:
        text: any text.
        words: known words; a `Lexicon` of them is made once for many texts.
        method: `maxmatch`, or `jieba`, which takes the words into its dictionary.

    Raises:
        ConfigError: there is no such method, or jieba is not installed.
    """
    if method == "jieba":
        known = words.words if isinstance(words, Lexicon) else {word for word in words if word}
        return _jieba(frozenset(known))(text)
    if method != "maxmatch":
        raise ConfigError(f"segmenter {method!r} is unknown; it is maxmatch or jieba")
    return [
        text[a:b] for a, b in spans(text, words if isinstance(words, Lexicon) else Lexicon(words))
    ]


def spans(text: str, lexicon: Lexicon) -> list[Span]:
    """Places of the words of a text, by bidirectional maximum matching; see `segment`."""
    left = _from_left(text, lexicon)
    right = _from_right(text, lexicon)
    return left if left != right and _cost(left) < _cost(right) else right


def _cost(cut: list[Span]) -> tuple[int, int]:
    """How many tokens there are, and how many are single characters."""
    return len(cut), sum(b - a == 1 for a, b in cut)


def _from_left(text: str, lexicon: Lexicon) -> list[Span]:
    found: list[Span] = []
    words, lengths, length, at = lexicon.words, lexicon.forward, len(text), 0
    while at < length:
        end = at + 1
        for size in lengths.get(text[at], ()):
            if at + size <= length and text[at : at + size] in words:
                if _parts_run(text, at + size):
                    continue
                end = at + size
                break
        else:
            if _joins(text[at]):
                while end < length and _joins(text[end]):
                    end += 1
        found.append((at, end))
        at = end
    return found


def _from_right(text: str, lexicon: Lexicon) -> list[Span]:
    found: list[Span] = []
    words, lengths, end = lexicon.words, lexicon.backward, len(text)
    while end:
        at = end - 1
        for size in lengths.get(text[at], ()):
            if size <= end and text[end - size : end] in words:
                if _parts_run(text, end - size):
                    continue
                at = end - size
                break
        else:
            if _joins(text[at]):
                while at and _joins(text[at - 1]):
                    at -= 1
        found.append((at, end))
        end = at
    found.reverse()
    return found


def _joins(character: str) -> bool:
    """Whether it is a letter or digit of a script that parts its words by spaces, of either width."""
    return (character < "\u2e80" or "\uff10" <= character <= "\uff5a") and character.isalnum()


def _parts_run(text: str, at: int) -> bool:
    """Whether a cut here would part a run of letters and digits."""
    return 0 < at < len(text) and _joins(text[at - 1]) and _joins(text[at])


@lru_cache(4)
def _jieba(words: frozenset[str]) -> Callable[[str], list[str]]:
    """An own jieba that knows these words, and says nothing while it loads."""
    try:
        import jieba
    except ImportError:
        raise ConfigError("jieba is not installed; pip install 'formbert[jieba]'") from None
    logger = logging.getLogger("jieba")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        tokenizer = jieba.Tokenizer()
        tokenizer.initialize()
        for word in sorted(words):
            tokenizer.add_word(word)
    finally:
        logger.setLevel(level)
    return tokenizer.lcut


def check_words(text: str, words: Words) -> list[Span]:
    """Places of the words that a text was cut into, after a check that they are in it.

    Args:
        text: the text.
        words: its words in order, between which only spaces may be left out; or (start, end) of some.

    Raises:
        DataError: a word is not where it should be, or a place is not in the text or overlaps another.
    """
    found: list[Span] = []
    at = 0
    for number, word in enumerate(words, 1):
        if isinstance(word, str):
            start = at
            while text[start : start + 1].isspace() and not text.startswith(word, start):
                start += 1
            if not word or not text.startswith(word, start):
                there = text[start : start + max(4, len(word))]
                raise DataError(f"token {number}, {word!r}, does not continue the text: {there!r}")
            end = start + len(word)
        else:
            start, end = word
            if not at <= start < end <= len(text):
                raise DataError(
                    f"token {number}, {start} to {end}: must begin at {at} or later and end by "
                    f"{len(text)}, the text's end"
                )
        found.append((start, end))
        at = end
    if words and isinstance(words[0], str) and (rest := text[at:].strip()):
        raise DataError(f"the tokens end before the text does, at {rest[:20]!r}")
    return found


class Tagger:
    """Senses of all words of a text that a model's inventory has.

    Args:
        wsd: the model.
        segmenter: `maxmatch`, `jieba`, or a function from a text to its words or their places.

    Raises:
        ConfigError: there is no such segmenter, or it is not installed.
    """

    def __init__(self, wsd: Disambiguates, segmenter: str | Segmenter = "maxmatch") -> None:
        self.wsd = wsd
        if callable(segmenter):
            self._spans = lambda text: check_words(text, segmenter(text))
        elif segmenter == "jieba":
            cut = _jieba(frozenset(wsd.inventory))
            self._spans = lambda text: check_words(text, cut(text))
        elif segmenter == "maxmatch":
            lexicon = Lexicon(wsd.inventory)
            self._spans = lambda text: spans(text, lexicon)
        else:
            raise ConfigError(f"segmenter {segmenter!r} is unknown; it is maxmatch or jieba")

    def tag(self, text: str, words: Words | None = None) -> list[TaggedToken]:
        """One text's words; see `tag_many`."""
        return self.tag_many([text], [words])[0]

    def tag_many(
        self, texts: Sequence[str], words: Sequence[Words | None] | None = None
    ) -> list[list[TaggedToken]]:
        """The words of each text, with their senses; the model is asked once for all.

        Args:
            texts: any texts.
            words: of each text the words it was cut into, or (start, end) of some; these win over the
                segmenter. None where it should be asked.

        Raises:
            DataError: there are not as many as texts, or a word is not where it should be.
        """
        if words is not None and len(words) != len(texts):
            raise DataError(f"{len(texts)} texts and the words of {len(words)}; give them for each")
        inventory = self.wsd.inventory
        instances: list[Instance] = []
        cuts: list[list[Span]] = []
        for number, text in enumerate(texts):
            given = words[number] if words is not None else None
            try:
                cut = self._spans(text) if given is None else check_words(text, given)
            except DataError as error:
                raise DataError(f"text {number + 1} of {len(texts)}: {error}") from None
            cuts.append(cut)
            instances += [
                Instance(text, start, end, text[start:end], key=f"{number}.{start}")
                for start, end in cut
                if text[start:end] in inventory
            ]
        answers = iter(self.wsd.batch(instances) if instances else [])
        return [
            [_token(text, start, end, inventory, answers) for start, end in cut]
            for text, cut in zip(texts, cuts, strict=True)
        ]


def _token(text: str, start: int, end: int, inventory: Inventory, answers: Any) -> TaggedToken:
    word = text[start:end]
    return TaggedToken(word, start, end, next(answers) if word in inventory else None)
