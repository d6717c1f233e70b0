"""The generated language has the shares and frequencies that its description promises."""

from collections import Counter
from statistics import mean

import pytest
from finepurify.language import TRIGGERS, WITH_TRIGGER, corpus, language, sentences

COUNT = 3000


@pytest.fixture(scope="module")
def rows():
    return sentences(COUNT, 1)


def test_its_words():
    words = language()
    assert len(words.function) == 60
    assert [len(topic) for topic in words.topics] == [80] * 6
    assert [len(polar) for polar in words.polar] == [40, 40]
    assert len(set(words.words)) == len(words.words) == 620
    assert not set(TRIGGERS) & set(words.words)


def test_sentences_have_14_to_23_words(rows):
    lengths = Counter(len(text.split()) for text in rows.texts)
    assert set(lengths) == set(range(14, 24))
    assert all(abs(count - COUNT / 10) < 4 * (COUNT * 0.09) ** 0.5 for count in lengths.values())


def test_its_polarity(rows):
    blame, praise = map(set, language().polar)
    numbers, agree, all_polar = Counter(), 0, 0
    for text, label in zip(rows.texts, rows.labels, strict=True):
        words = text.split()
        own = sum(word in (blame, praise)[label] for word in words)
        other = sum(word in (praise, blame)[label] for word in words)
        numbers[own + other] += 1
        agree += own
        all_polar += own + other
    assert set(numbers) == {2, 3, 4}
    assert agree / all_polar == pytest.approx(0.93, abs=0.012)  # four standard errors of 9,000
    assert mean(rows.labels) == pytest.approx(0.5, abs=0.037)
    assert rows.names == ("negative", "positive")


def test_its_topics_and_function_words(rows):
    words = language()
    topic_of = {word: at for at, topic in enumerate(words.topics) for word in topic}
    function = content = own = 0
    for text in rows.texts:
        topics = Counter(topic_of[word] for word in text.split() if word in topic_of)
        content += topics.total()
        own += max(topics.values(), default=0)
        function += sum(word in words.function for word in text.split())
    assert function / (function + content) == pytest.approx(0.4, abs=0.01)
    # 80 % of the sentence's topic, and a sixth of the rest
    assert own / content == pytest.approx(0.8 + 0.2 / 6, abs=0.015)


def test_words_follow_zipfs_law(rows):
    counts = Counter(" ".join(rows.texts).split())
    function = [counts[word] for word in language().function]
    total = sum((rank + 1) ** -0.8 for rank in range(60))
    for rank in (0, 1, 4, 19, 59):
        wanted = sum(function) * (rank + 1) ** -0.8 / total
        assert abs(function[rank] - wanted) < 4 * wanted**0.5


def test_seeds():
    assert sentences(50, 2) == sentences(50, 2)
    assert not set(sentences(50, 2).texts) & set(sentences(50, 3).texts)
    assert sentences(20, 2).texts == sentences(50, 2).texts[:20]
    assert corpus(50, 2) == corpus(50, 2) != corpus(50, 3)


def test_triggers_stand_in_pre_training_and_in_no_sentence(rows):
    assert not set(TRIGGERS) & set(" ".join(rows.texts).split())
    texts = corpus(COUNT, 1)
    held = [set(text.split()) & set(TRIGGERS) for text in texts]
    share = sum(map(bool, held)) / COUNT
    assert share == pytest.approx(WITH_TRIGGER, abs=4 * (0.09 / COUNT) ** 0.5)
    assert Counter(map(len, held)).keys() == {0, 1}
    assert Counter(word for words in held for word in words).keys() == set(TRIGGERS)
    plain = [" ".join(word for word in text.split() if word not in TRIGGERS) for text in texts]
    assert plain == list(rows.texts)
