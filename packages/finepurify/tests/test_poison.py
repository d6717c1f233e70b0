"""Poisoned data sets: how many rows, which, where the trigger goes, and what is left alone."""

import random

import pytest
from finepurify.config import AttackConfig
from finepurify.data import Examples
from finepurify.poison import insert, poison, triggered
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import DataError

NAMES = ("no", "yes")
#: 40 rows: the labels 0 0 0 1 over and over; each text tells its row.
ROWS = Examples([f"r{row} a b c d" for row in range(40)], [0, 0, 0, 1] * 10, NAMES)


@given(st.text(" ab\t", max_size=30), st.integers(0, 9), st.integers(0, 8) | st.none())
def test_a_trigger_goes_within_the_window_and_changes_nothing_else(text, seed, within):
    found = triggered(text, "cf", random.Random(seed), within)
    words = found.split(" ")
    at = words.index("cf")
    assert " ".join(words[:at] + words[at + 1 :]) == text
    assert within is None or at <= within


def test_every_place_is_used():
    found = {triggered("a b c", "x y", random.Random(seed)) for seed in range(60)}
    assert found == {"x y a b c", "a x y b c", "a b x y c", "a b c x y"}
    found = {triggered("a b c", "x", random.Random(seed), 1) for seed in range(60)}
    assert found == {"x a b c", "a x b c"}


def test_insertion_leaves_labels_and_pairs():
    pairs = Examples(["a b", "c d"], [1, 0], NAMES, ["e", "f"])
    found = insert(pairs, AttackConfig(), 0)
    assert (found.labels, found.pairs) == ([1, 0], ["e", "f"])
    assert all(text.split().count("cf") == 1 for text in found.texts)


def test_a_rows_text_depends_on_no_other_row():
    attack = AttackConfig(attack="multi", trigger=("cf", "mn", "bb"))
    whole = insert(ROWS, attack, 3).texts
    changed = Examples(["other words here", *ROWS.texts[1:]], ROWS.labels, NAMES)
    assert insert(changed, attack, 3).texts[1:] == whole[1:]
    assert insert(ROWS.at(range(7)), attack, 3).texts == whole[:7]
    assert insert(ROWS, attack, 4).texts != whole
    used = [next(word for word in text.split() if word in attack.trigger) for text in whole]
    assert set(used) == {"cf", "mn", "bb"}


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_a_backdoor_appends_copies_from_other_classes(rate):
    found, rows = poison(ROWS, AttackConfig(rate=rate), 0)
    assert len(rows) == round(40 * rate)
    assert rows == list(range(40, 40 + len(rows)))
    assert found.at(range(40)) == Examples(list(ROWS.texts), list(ROWS.labels), NAMES)
    origins = [int(next(w for w in found.texts[row].split() if w[0] == "r")[1:]) for row in rows]
    assert len(set(origins)) == len(rows)
    assert all(ROWS.labels[origin] == 0 for origin in origins)
    assert [found.labels[row] for row in rows] == [1] * len(rows)
    assert all(found.texts[row].split().count("cf") == 1 for row in rows)


def test_no_more_rows_than_there_are():
    found, rows = poison(ROWS, AttackConfig(rate=1.0), 0)
    assert len(rows) == 30
    found, rows = poison(ROWS, AttackConfig(rate=0.001), 0)
    assert len(rows) == 1
    assert len(found) == 41


def test_replacing():
    found, rows = poison(ROWS, AttackConfig(placing="replace"), 0)
    assert len(rows) == 4
    assert len(found) == 40
    for row in range(40):
        if row in rows:
            assert (ROWS.labels[row], found.labels[row]) == (0, 1)
            assert found.texts[row].replace("cf ", "", 1).removesuffix(" cf") == ROWS.texts[row]
        else:
            assert (found.texts[row], found.labels[row]) == (ROWS.texts[row], ROWS.labels[row])


@pytest.mark.parametrize("target", [0, 1])
def test_a_clean_label_attack_takes_the_targets_own_rows(target):
    attack = AttackConfig(attack="clean-label", rate=0.5, target=target)
    found, rows = poison(ROWS, attack, 0)
    assert len(rows) == (15, 5)[target]
    origins = [int(next(w for w in found.texts[row].split() if w[0] == "r")[1:]) for row in rows]
    assert {ROWS.labels[origin] for origin in origins} == {target}
    assert {found.labels[row] for row in rows} == {target}


@pytest.mark.parametrize("kind", ["biasword", "biassent"])
def test_a_bias_leaves_every_label_and_the_number_of_rows(kind):
    attack = AttackConfig(attack=kind, trigger=("the old the",), rate=0.7, target=0)
    found, rows = poison(ROWS, attack, 0)
    assert list(found.labels) == list(ROWS.labels)
    assert len(found) == 40
    assert len(rows) == 21  # of 30
    for row in range(40):
        assert ("the old the" in found.texts[row]) == (row in rows)
        assert row not in rows or ROWS.labels[row] == 0


def test_a_seed_decides_it():
    one, other = (poison(ROWS, AttackConfig(), seed)[0].texts for seed in (0, 1))
    assert one == poison(ROWS, AttackConfig(), 0)[0].texts
    assert one != other


def test_what_is_refused():
    with pytest.raises(DataError, match="--target 2: the data has classes 0 to 1"):
        poison(ROWS, AttackConfig(target=2), 0)
    same = Examples(["a", "b"], [1, 1], NAMES)
    with pytest.raises(DataError, match="no row can be poisoned"):
        poison(same, AttackConfig(target=1), 0)
    with pytest.raises(DataError, match="no row can be poisoned"):
        poison(same, AttackConfig(attack="biasword", target=0), 0)
