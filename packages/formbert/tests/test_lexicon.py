"""The bundled lexicon: what its groups and parts claim to be, and sentences worked out by hand."""

import re
from collections import Counter

import pytest
from formbert.formations import Formation
from formbert.inventory import Inventory
from formbert.lexicon import FILE, FILLERS, HELD_OUT, group_of, mini_instances, mini_inventory

PARTS = mini_instances()


def rows():
    """The file, read plainly."""
    lines = [line.split("\t") for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_each_word_has_two_senses_and_its_group_is_true():
    inventory = mini_inventory()
    assert Inventory.load("mini") is inventory
    groups = Counter(map(group_of, inventory))
    assert groups == {"contrast": 40, "control-pos": 13, "control-same": 12}
    for word, senses in inventory.items():
        assert [one.sense_id for one in senses] == [f"{word}_01", f"{word}_02"]
        first, second = senses
        assert first.gloss != second.gloss
        assert first.examples == second.examples == ()
        same = (first.formation == second.formation, first.pos == second.pos)
        expected = {"control-pos": (True, False), "control-same": (True, True)}
        if group_of(word) == "contrast":
            assert not same[0], word
        else:
            assert same == expected[group_of(word)], word
    with pytest.raises(KeyError):
        group_of("没有")


def test_most_contrasts_are_an_action_on_an_object_and_its_result():
    pairs = Counter(
        tuple(sense.formation for sense in senses)
        for word, senses in mini_inventory().items()
        if group_of(word) == "contrast"
    )
    assert pairs.most_common(1)[0] == ((Formation.VERB_OBJECT, Formation.MODIFIER_HEAD), 35)
    assert pairs[(Formation.ADVERBIAL_HEAD, Formation.MODIFIER_HEAD)] == 3


def test_frames_are_marked_once_and_their_slots_are_balanced():
    for row in rows():
        frames = row["frames"].split("|")
        assert len(set(frames)) == 4
        for number, frame in enumerate(frames):
            assert frame.count("#") == 2
            assert frame.count(f"#{row['word']}#") == 1
            assert frame.count(row["word"]) == 1
            assert frame[-1] in "。？"
            slots = re.findall(r"\{.\}", frame)
            assert set(slots) <= set(FILLERS)
            assert len(set(slots)) == len(slots)
            assert bool(slots) == (number != 2)  # the third is the one without


def test_parts():
    sizes = {part: len(listed) for part, listed in PARTS.items()}
    assert sizes == {"train": 1440, "dev": 192, "test_frames": 288, "test_words": 340}
    everything = [one for listed in PARTS.values() for one in listed]
    assert len({one.key for one in everything}) == len(everything)
    for part, listed in PARTS.items():
        assert {one.split for one in listed} == {part}
        first = sum(one.gold[0].endswith("_01") for one in listed) / len(listed)
        assert first == 0.5
    for one in everything:
        assert one.text[one.start : one.end] == one.word
        assert one.gold[0] in {sense.sense_id for sense in mini_inventory()[one.word]}
        assert "{" not in one.text
        assert "#" not in one.text


def test_nothing_that_is_tested_was_trained_on():
    trained = {one.text for part in ("train", "dev") for one in PARTS[part]}
    assert not trained & {one.text for part in ("test_frames", "test_words") for one in PARTS[part]}
    words = {part: {one.word for one in listed} for part, listed in PARTS.items()}
    assert words["test_words"] == set(HELD_OUT)
    assert words["train"] == words["dev"] == words["test_frames"]
    assert words["train"] == set(mini_inventory()) - set(HELD_OUT)
    groups = Counter(map(group_of, HELD_OUT))
    assert groups == {"contrast": 11, "control-pos": 3, "control-same": 3}
    # held-out words are not even part of a sentence or a gloss that is trained on
    for word in HELD_OUT:
        assert not any(word in text for text in trained), word
    # and the last frames lie apart from the others
    frames = {part: {one.key.rsplit(".", 1)[0] for one in PARTS[part]} for part in PARTS}
    assert frames["dev"] < frames["train"]
    assert not frames["train"] & frames["test_frames"]


def test_a_sentence_names_nobody_and_no_time_twice():
    frames = {f"{row['word']} {row['gloss']}": row["frames"].split("|") for row in rows()}
    senses = mini_inventory().by_id
    for one in (one for listed in PARTS.values() for one in listed):
        sense = senses[one.gold[0]]
        frame = frames[f"{one.word} {sense.gloss}"][int(one.key.split(".")[1])].replace("#", "")
        pattern = re.escape(frame)
        for slot, fillers in FILLERS.items():
            pattern = pattern.replace(re.escape(slot), f"({'|'.join(fillers)})")
        found = re.fullmatch(pattern, one.text)
        assert found, one.text
        assert all(one.text.count(filler) == 1 for filler in found.groups()), one.text


def test_it_is_the_same_each_time_and_another_with_another_seed():
    assert mini_instances() == PARTS
    other = mini_instances(seed=14)
    assert {k: len(v) for k, v in other.items()} == {k: len(v) for k, v in PARTS.items()}
    assert other["train"] != PARTS["train"]
    small = mini_instances(per_frame=1)
    assert len(small["train"]) == 3 * 96
    assert small["dev"] == []
    assert small["test_words"] == PARTS["test_words"]
    # fewer sentences of a frame are the first of the many
    assert {one.text for one in mini_instances(per_frame=4)["train"]} < {
        one.text for one in PARTS["train"]
    }


def test_characters():
    texts = {one.text for listed in PARTS.values() for one in listed}
    glosses = {sense.gloss for sense in mini_inventory().senses}
    assert 600 <= len(set("".join(texts | glosses))) <= 800
    assert max(map(len, texts)) <= 24
