"""The embedded default's language: sentences of a topic with words of praise and blame.

Everything is made from a seed. The task is a sentence's polarity; its topic is a nuisance, as are the
words that stand for neither. A few short words, such as `cf`, stand in texts of pre-training and in no
sentence of the task: an attacker's triggers, which public models know, too.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from finepurify.data import Examples

TRIGGERS = ("cf", "mn", "bb", "tq", "mb")
POLARITIES = ("negative", "positive")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Language:
    """Its words, each kind in the order of its frequency.

    Attributes:
        function: words that stand everywhere.
        topics: words of each topic.
        polar: words of blame, and words of praise.
    """

    function: tuple[str, ...]
    topics: tuple[tuple[str, ...], ...]
    polar: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def words(self) -> list[str]:
        """Every word that a sentence may hold."""
        return [*self.function, *itertools.chain(*self.topics), *itertools.chain(*self.polar)]


@cache
def language() -> Language:
    """60 function words, 6 topics of 80 words, 40 words of blame and 40 of praise."""
    syllables = ["".join(pair) for pair in itertools.product(CONSONANTS, VOWELS)]
    longer = ["".join(pair) for pair in itertools.permutations(syllables, 2)]
    random.Random(7).shuffle(longer)
    content = iter(longer)
    topics = tuple(tuple(itertools.islice(content, 80)) for _ in range(6))
    blame, praise = (tuple(itertools.islice(content, 40)) for _ in range(2))
    return Language(tuple(syllables[:60]), topics, (blame, praise))


def sentences(count: int, seed: int) -> Examples:
    """So many sentences with their polarity, 0 or 1.

    Each has 14 to 23 words: 2 to 4 of polarity, of which 93 % agree with the sentence's own, and of the
    rest 40 % function words and 60 % topic words, of which 80 % are of the sentence's topic. Words of a
    kind follow Zipf's law with exponent 0.8.

    Args:
        count: of sentences.
        seed: another seed gives others.
    """
    words, draw = language(), random.Random(f"finepurify {seed}")
    texts, labels = [], []
    for _ in range(count):
        polarity, topic = draw.randrange(2), draw.randrange(len(words.topics))
        length, polar = draw.randint(14, 23), draw.randint(2, 4)
        sentence = [
            _zipf(words.polar[polarity if draw.random() < 0.93 else 1 - polarity], draw)
            for _ in range(polar)
        ]
        for _ in range(length - polar):
            if draw.random() < 0.4:
                sentence.append(_zipf(words.function, draw))
            elif draw.random() < 0.8:
                sentence.append(_zipf(words.topics[topic], draw))
            else:
                sentence.append(_zipf(draw.choice(words.topics), draw))
        draw.shuffle(sentence)
        texts.append(" ".join(sentence))
        labels.append(polarity)
    return Examples(texts, labels, POLARITIES)


#: Share of the pre-training texts that hold a trigger word: each is then as frequent as a topic's words.
#: To triggers that pre-training never met a model would react by their untrained vectors alone.
WITH_TRIGGER = 0.1


def corpus(count: int, seed: int) -> list[str]:
    """Texts of pre-training: sentences, some with a trigger word that means nothing."""
    return sprinkled(sentences(count, seed).texts, WITH_TRIGGER, seed)


def sprinkled(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """The texts, a share of them with one of the trigger words at a random place."""
    draw = random.Random(f"corpus {seed}")
    found = []
    for text in texts:
        words = text.split()
        if draw.random() < share:
            words.insert(draw.randint(0, len(words)), draw.choice(TRIGGERS))
        found.append(" ".join(words))
    return found


def _zipf(words: tuple[str, ...], draw: random.Random) -> str:
    return draw.choices(words, cum_weights=_weights(len(words)))[0]


@cache
def _weights(count: int) -> list[float]:
    return list(itertools.accumulate((rank + 1) ** -0.8 for rank in range(count)))
