"""The generated texts are right, deterministic and unlike."""

import re

from deepseekmoe import domains


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
    assert list(texts) == ["arithmetic", "characters", "code", "headers", "help"]
    assert all(15_000 < len(text) <= 20_000 for text in texts.values())
    assert domains.domain_texts(20_000) == texts
