import json
import re
from collections import Counter

import pytest
from cascadebert.words import SHARES, generate_words, write_words
from octavo.errors import ConfigError


def test_irregular_words_make_a_few_spellings_ambiguous():
    """As in English: read, sake. Within one seed no spelling comes twice, so no label is wrong."""
    labels: dict[str, set[str]] = {}
    for seed in range(4):
        words = generate_words(20_000, seed)
        for word, label in zip(words.texts, words.labels or [], strict=True):
            labels.setdefault(word, set()).add(label)
    share = sum(len(known) > 1 for known in labels.values()) / len(labels)
    assert 0 < share < 0.02


def test_shares_lengths_and_spelling():
    words = generate_words(10_000, 1)
    assert len(set(words.texts)) == len(words) == 10_000
    counts = Counter(words.labels)
    for number, share in enumerate(SHARES, 1):
        assert counts[str(number)] == pytest.approx(10_000 * share, abs=2)
    assert all(re.fullmatch(r"[a-z]{3,13}", word) for word in words.texts)


def test_a_seed_is_its_words():
    assert generate_words(500, 3) == generate_words(500, 3)
    assert generate_words(500, 3) != generate_words(500, 4)


@pytest.mark.parametrize(
    ("pattern", "label"),
    [
        (r"[^aeiou]+[aeiou][^aeioucgsz]e", "1"),  # make: the last e is silent
        (r"[^aeiou]+[aeiou](ll|ck|mp|ff)ed", "1"),  # helped
        (r"[^aeiou]+[aeiou](t|d|nd)ed", "2"),  # wanted
        (r"[^aeiou]+(ai|oa|ee)(n|t|p)", "1"),  # boat: two vowels, one sound
        (r"[bcdlmnprt]*(io|ia)(n|t|p|r|l|nd|nt)", "2"),  # lion: two sounds
    ],
)
def test_the_rules_of_spelling_hold(pattern, label):
    words = generate_words(30_000, 2)
    found = [
        (word, known)
        for word, known in zip(words.texts, words.labels or [], strict=True)
        if re.fullmatch(pattern, word) and not word.startswith("y")
    ]
    assert len(found) >= 3
    kept = sum(known == label for _, known in found) / len(found)
    assert kept > 0.55  # the others are borrowed, or sound apart against the rule


def test_splits_are_disjoint_files(tmp_path):
    write_words(tmp_path / "words", [("train", 50), ("dev", 20)])
    rows = {
        name: [json.loads(line) for line in (tmp_path / "words" / f"{name}.jsonl").open()]
        for name in ("train", "dev")
    }
    assert {name: len(lines) for name, lines in rows.items()} == {"train": 50, "dev": 20}
    texts = [row["text"] for lines in rows.values() for row in lines]
    assert len(set(texts)) == 70


@pytest.mark.parametrize("count", [1, 7, 24, 34, 41, 100])
def test_as_many_words_as_asked_for(count):
    assert len(generate_words(count)) == count


def test_none_are_not_words():
    with pytest.raises(ConfigError, match="must be from 1 to"):
        generate_words(0)
