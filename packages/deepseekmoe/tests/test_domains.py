"""The generated texts are right, deterministic and unlike."""

import re

import pytest
from deepseekmoe import domains


@pytest.mark.parametrize(
    ("number", "english", "german", "french"),
    [
        (0, "zero", "null", "zéro"),
        (21, "twenty-one", "einundzwanzig", "vingt et un"),
        (71, "seventy-one", "einundsiebzig", "soixante et onze"),
        (80, "eighty", "achtzig", "quatre-vingts"),
        (91, "ninety-one", "einundneunzig", "quatre-vingt-onze"),
        (100, "one hundred", "einhundert", "cent"),
        (201, "two hundred one", "zweihunderteins", "deux cent un"),
        (300, "three hundred", "dreihundert", "trois cents"),
        (1001, "one thousand one", "eintausendeins", "mille un"),
        (80_000, "eighty thousand", "achtzigtausend", "quatre-vingt mille"),
        (200_000, "two hundred thousand", "zweihunderttausend", "deux cent mille"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine",
         "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
         "neuf cent quatre-vingt-dix-neuf mille neuf cent quatre-vingt-dix-neuf"),
    ],
)  # fmt: skip
def test_numbers_in_words(number, english, german, french):
    assert domains.english(number) == english
    assert domains.german(number) == german
    assert domains.french(number) == french


def test_sums_are_right():
    lines = domains.arithmetic()
    for _ in range(300):
        text = next(lines)
        for left, sign, right, result in re.findall(r"(\d+) ([+*/-]) (\d+) = (-?\d+)", text):
            one, two = int(left), int(right)
            wanted = {"+": one + two, "-": one - two, "*": one * two, "/": one / two}[sign]
            assert wanted == int(result), text
        assert re.search(r"So -?\d+\.\n\n$", text)


def test_five_domains_of_one_size_the_same_each_time():
    texts = domains.domain_texts(20_000)
    assert list(texts) == ["arithmetic", "characters", "code", "help", "numbers"]
    assert all(15_000 < len(text) <= 20_000 for text in texts.values())
    assert domains.domain_texts(20_000) == texts
