"""Baselines on a few hand-made instances, and the numbers that they give on real data."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
from formbert.baselines import (
    BASELINES,
    ORACLES,
    formation_oracle,
    formation_pos_oracle,
    lesk,
    lesk_examples,
    lesk_extended,
    lesk_tfidf,
    nearest,
    pos_oracle,
    random_accuracy,
    random_sense,
    train_most_frequent,
)
from formbert.data import Instance, locate, read_instances
from formbert.formations import Formation
from formbert.inventory import Inventory, Sense
from formbert.metrics import evaluate, outcomes
from octavo.errors import DataError

VO, MH = Formation.VERB_OBJECT, Formation.MODIFIER_HEAD

INVENTORY = Inventory(
    [
        Sense("存款_1", "存款", "把钱放进银行", "动", VO, ("去柜台存款",)),
        Sense("存款_2", "存款", "人所有的钱", "名", MH, ("一笔利息",), ("保留", "款项")),
        Sense("存款_3", "存款", "另一种说法", "名", VO),
        Sense("桌子_1", "桌子", "一种家具", "名"),
    ]
)


def instance(text: str, word: str, *gold: str, key: str = "") -> Instance:
    return replace(locate(text, word), gold=gold, key=key)


BANK = instance("银行，他存款。", "存款", "存款_1", key="a")
INTEREST = instance("这笔存款获得利息。", "存款", "存款_2", key="b")
TABLE = instance("一张桌子。", "桌子", "桌子_1", key="c")
UNKNOWN = instance("一把椅子。", "椅子", "椅子_1", key="d")
ALL = [BANK, INTEREST, TABLE, UNKNOWN]


def chosen(predictions) -> list[str | None]:
    return [told.sense_id for told in predictions]


@pytest.mark.parametrize("name", [*BASELINES, *ORACLES])
def test_every_baseline_answers_in_order_with_probabilities(name):
    predictions = (BASELINES | ORACLES)[name](ALL, INVENTORY, [INTEREST])
    assert [told.key for told in predictions] == ["a", "b", "c", "d"]
    assert chosen(predictions)[2:] == ["桌子_1", None]
    assert predictions[3].reason == "not in inventory"
    for told in predictions[:3]:
        assert told.sense_id == told.candidates[0].sense_id
        assert len(told.candidates) == len(INVENTORY[told.word])
        shares = [one.probability for one in told.candidates]
        assert sum(shares) == pytest.approx(1)
        assert shares == sorted(shares, reverse=True)
        formations = {s.sense_id: s.formation.zh if s.formation else "" for s in INVENTORY.senses}
        assert all(one.formation == formations[one.sense_id] for one in told.candidates)


@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_looks_at_right_senses(name):
    blind = [replace(one, gold=()) for one in ALL]
    train = [INTEREST]
    assert BASELINES[name](ALL, INVENTORY, train) == BASELINES[name](blind, INVENTORY, train)


def test_random_senses_are_right_as_often_as_expected():
    assert random_accuracy(ALL, INVENTORY) == pytest.approx(100 * (1 / 3 + 1 / 3 + 1 + 0) / 4)
    both = replace(BANK, gold=("存款_1", "存款_2"))
    assert random_accuracy([both], INVENTORY) == pytest.approx(200 / 3)
    drawn = random_sense([BANK] * 3000, INVENTORY)
    assert outcomes(drawn, [BANK] * 3000).mean() == pytest.approx(1 / 3, abs=0.03)
    assert drawn != random_sense([BANK] * 3000, INVENTORY, seed=1)
    with pytest.raises(DataError, match="1 instances have no right sense"):
        random_accuracy([replace(BANK, gold=())], INVENTORY)


def test_most_frequent_sense_of_the_training_data():
    assert chosen(train_most_frequent(ALL, INVENTORY, []))[:2] == ["存款_1", "存款_1"]
    train = [INTEREST, INTEREST, BANK, TABLE]
    assert chosen(train_most_frequent(ALL, INVENTORY, train))[:2] == ["存款_2", "存款_2"]
    assert chosen(train_most_frequent(ALL, INVENTORY, [INTEREST, BANK]))[0] == "存款_1"  # a tie
    halves = [replace(BANK, gold=("存款_2", "存款_3")), BANK]  # 1/2, 1/2 and 1
    assert chosen(train_most_frequent(ALL, INVENTORY, halves))[0] == "存款_1"


def test_lesk_counts_characters_in_common():
    told = lesk([BANK], INVENTORY)[0]
    # 银 and 行; the target's own 款 is not looked at, nor punctuation
    assert (told.sense_id, told.probability) == ("存款_1", 1.0)
    assert chosen(lesk([INTEREST], INVENTORY)) == ["存款_1"]  # nothing in common: the first
    assert lesk([INTEREST], INVENTORY)[0].probability == pytest.approx(1 / 3)
    # with examples 笔, 利 and 息
    assert chosen(lesk_examples([INTEREST], INVENTORY)) == ["存款_2"]


def test_rare_characters_count_for_more():
    senses = [
        Sense("w_1", "天地", "的的在一个"), Sense("w_2", "天地", "龙"),
        *(Sense(f"x_{at}", f"词{at}", "在一个的") for at in range(9)),
    ]  # fmt: skip
    inventory = Inventory(senses)
    one = instance("在一个有龙的天地里", "天地", "w_2")
    assert chosen(lesk([one], inventory)) == ["w_1"]
    told = lesk_tfidf([one], inventory)[0]
    assert told.sense_id == "w_2"
    # by hand: idf = 1 + ln(12 / (1 + documents)); known characters of the text are 在 一 个 龙 的
    common, rare = 1 + log(12 / 11), 1 + log(12 / 2)
    length = (4 * common**2 + rare**2) ** 0.5
    twice = 1 + log(2)  # 的 stands twice in the first gloss
    first = (3 + twice) * common / (3 + twice**2) ** 0.5 / length
    assert told.probability == pytest.approx((rare / length) / (rare / length + first))


def test_extended_lesk_knows_morphemes_and_runs():
    one = instance("保留存款", "存款", "存款_2")
    assert chosen(lesk_tfidf([one], INVENTORY)) == ["存款_1"]
    assert chosen(lesk_extended([one], INVENTORY)) == ["存款_2"]
    ordered = Inventory([Sense("w_1", "词语", "乙甲丁丙"), Sense("w_2", "词语", "甲乙丙丁")])
    one = instance("甲乙丙丁是词语", "词语", "w_2")
    assert chosen(lesk_tfidf([one], ordered)) == ["w_1"]  # the same characters
    assert chosen(lesk_extended([one], ordered)) == ["w_2"]


def test_oracles_know_no_more_than_they_say():
    third = instance("这笔存款", "存款", "存款_3")
    assert chosen(formation_oracle([INTEREST, third], INVENTORY)) == ["存款_2", "存款_1"]
    assert chosen(pos_oracle([INTEREST, third], INVENTORY)) == ["存款_2", "存款_2"]
    assert chosen(formation_pos_oracle([INTEREST, third], INVENTORY)) == ["存款_2", "存款_3"]
    strange = replace(BANK, gold=("nowhere",))  # nothing is known of it: the first sense
    assert chosen(formation_oracle([strange], INVENTORY)) == ["存款_1"]
    for oracle in ORACLES.values():
        with pytest.raises(DataError, match="for the oracle: 1 instances have no right sense"):
            oracle([replace(BANK, gold=())], INVENTORY, [])


def test_the_nearest_neighbour_of_the_same_word_decides():
    train = [BANK, INTEREST, TABLE]
    train_vectors = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    vectors = np.array([[1.0, 1.5], [3.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    told = nearest([INTEREST, BANK, TABLE, UNKNOWN], INVENTORY, train, vectors, train_vectors)
    assert chosen(told) == ["存款_2", "存款_1", "桌子_1", None]
    cosine = np.array([1.5, 1.0]) / 3.25**0.5
    scores = (1 + cosine) / 2
    assert [one.probability for one in told[0].candidates] == pytest.approx(
        [*(scores / scores.sum()), 0]
    )
    unseen = nearest([INTEREST], INVENTORY, [TABLE], vectors[:1], train_vectors[2:])
    assert chosen(unseen) == ["存款_1"]
    with pytest.raises(ValueError, match="1 and 1 instances, but 2 and 1 vectors"):
        nearest([INTEREST], INVENTORY, [TABLE], vectors[:2], train_vectors[2:])


@pytest.mark.realdata
@pytest.mark.untraced
def test_numbers_of_the_method_page_on_micls(data_folder):
    inventory = Inventory.load(data_folder / "micls" / "inventory.jsonl.gz")
    known = read_instances(data_folder / "micls" / "instances.jsonl.gz")
    train = [one for one in known if one.split == "val"]
    test = [one for one in known if one.split == "test"]
    rows = {
        name: {row["subset"]: row for row in evaluate(predict(test, inventory, train), test,
                                                      inventory, train)}
        for name, predict in (BASELINES | ORACLES).items()
        if name != "lesk-examples"  # there are none in this inventory
    }  # fmt: skip

    def accuracy(name: str, subset: str) -> float:
        return rows[name][subset]["accuracy"]

    first = rows["first-sense"]
    assert (first["all"]["n"], first["polysemous"]["n"]) == (7922, 3514)
    assert first["formation-differs"]["n"] == 868
    assert first["formation-differs, POS-same"]["n"] == 380
    bands = [first[name]["n"] for name in ("sense-seen", "sense-new", "word-new")]
    assert bands == [1265, 777, 1472]
    assert accuracy("first-sense", "all") == pytest.approx(77.61, abs=0.005)
    assert accuracy("first-sense", "polysemous") == pytest.approx(49.5, abs=0.05)
    assert accuracy("first-sense", "formation-differs") == pytest.approx(42.3, abs=0.05)
    assert accuracy("formation-oracle", "polysemous") == pytest.approx(59.6, abs=0.05)
    assert accuracy("formation-oracle", "formation-differs") == pytest.approx(83.1, abs=0.05)
    assert accuracy("pos-oracle", "polysemous") == pytest.approx(64.4, abs=0.05)
    assert accuracy("formation-pos-oracle", "polysemous") == pytest.approx(69.6, abs=0.05)
    polysemous = [one for one in test if len(inventory[one.word]) > 1]
    expected = random_accuracy(polysemous, inventory)
    assert accuracy("random", "polysemous") == pytest.approx(expected, abs=2.5)
    for name in ("lesk", "lesk-tfidf", "lesk-extended"):  # gloss overlap is worth a little
        assert accuracy(name, "polysemous") > accuracy("first-sense", "polysemous") + 1
    assert accuracy("train-mfs", "sense-seen") > 75
    assert accuracy("train-mfs", "word-new") == accuracy("first-sense", "word-new")
