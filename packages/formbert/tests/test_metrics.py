"""Measures against hand-worked numbers, brute force and scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from formbert.data import Instance
from formbert.formations import Formation
from formbert.inventory import Inventory, Sense
from formbert.metrics import (
    aligned,
    compare,
    coverage_curve,
    evaluate,
    outcomes,
    pair_scores,
    subsets,
    summary,
)
from formbert.predictions import Candidate, Prediction
from octavo.errors import DataError
from octavo.stats import bootstrap_interval
from sklearn.metrics import f1_score

VO, MH, PAR = Formation.VERB_OBJECT, Formation.MODIFIER_HEAD, Formation.PARALLEL

# 存款 differs in both, 编辑 in part of speech alone, 东西 in formation alone, 后门 in neither
INVENTORY = Inventory(
    [
        Sense("存款_1", "存款", "把钱存进银行", "动", VO),
        Sense("存款_2", "存款", "存进银行的钱", "名", MH),
        Sense("编辑_1", "编辑", "整理稿件", "动", PAR),
        Sense("编辑_2", "编辑", "整理稿件的人", "名", PAR),
        Sense("东西_1", "东西", "东边和西边", "名", PAR),
        Sense("东西_2", "东西", "事物", "名", Formation.OPAQUE),
        Sense("后门_1", "后门", "后面的门", "名", MH),
        Sense("后门_2", "后门", "不正当的途径", "名", MH),
        Sense("后门_3", "后门", "程序里的暗道", "名", None),
        Sense("桌子_1", "桌子", "一种家具", "名", Formation.SUFFIXATION),
    ]
)


def instance(key: str, gold: str, start: int = 0) -> Instance:
    word = gold.split("_")[0]
    return Instance("一" * start + word, start, start + 2, word, tuple(gold.split("|")), key)


def answer(one: Instance, sense: str | None, share: float = 1.0) -> Prediction:
    others = [s.sense_id for s in INVENTORY[one.word] if s.sense_id != sense]
    rest = (1 - share) / max(len(others), 1)
    ranked = [] if sense is None else [(sense, share), *((name, rest) for name in others)]
    return Prediction(one.key, one.word, sense, tuple(Candidate(s, "", p) for s, p in ranked))


INSTANCES = [
    instance("a", "存款_1"), instance("b", "存款_2", 40), instance("c", "编辑_1", 70),
    instance("d", "东西_2", 120), instance("e", "后门_2"), instance("f", "桌子_1"),
]  # fmt: skip
CHOICES = ["存款_1", "存款_1", "编辑_1", "东西_1", "后门_2", "桌子_1"]
ANSWERS = [answer(one, choice) for one, choice in zip(INSTANCES, CHOICES, strict=True)]


def test_subsets_hold_what_they_say():
    train = [instance("t", "存款_1"), instance("u", "后门_1")]
    found = subsets(INSTANCES, INVENTORY, train)
    members = {name: "".join(np.array(list("abcdef"))[where]) for name, where in found.items()}
    assert members == {
        "all": "abcdef", "polysemous": "abcde",
        "formation-differs": "abd", "formation-same": "ce", "POS-differs": "abc", "POS-same": "de",
        "formation-differs, POS-differs": "ab", "formation-differs, POS-same": "d",
        "formation-same, POS-differs": "c", "formation-same, POS-same": "e",
        "gold=first": "ac", "gold=other": "bde", "POS=动": "ac", "POS=名": "bde",
        "senses=2": "abcd", "senses=3": "e", "length=2": "abcde",
        "start=0-31": "ae", "start=32-63": "b", "start=64-107": "c", "start=108+": "d",
        "sense-seen": "a", "sense-new": "be", "word-new": "cd",
    }  # fmt: skip
    assert not {"sense-seen", "sense-new", "word-new"} & set(subsets(INSTANCES, INVENTORY))


def test_accuracy_by_subset():
    rows = {row["subset"]: row for row in evaluate(ANSWERS, INSTANCES, INVENTORY)}
    assert rows["all"]["accuracy"] == pytest.approx(100 * 4 / 6)
    assert rows["all"]["n"] == 6
    assert rows["polysemous"]["accuracy"] == pytest.approx(60)
    assert rows["formation-differs"]["accuracy"] == pytest.approx(100 / 3)
    assert rows["gold=first"] == {"subset": "gold=first", "n": 2, "accuracy": 100.0,
                                  "low": 100.0, "high": 100.0}  # fmt: skip
    # 存款 half, 编辑 all, 东西 none, 后门 all
    assert rows["mean-over-words"]["n"] == 4
    assert rows["mean-over-words"]["accuracy"] == pytest.approx(62.5)
    assert rows["mean-over-words"]["low"] < 62.5 < rows["mean-over-words"]["high"]
    one = evaluate(ANSWERS[:1], INSTANCES[:1], INVENTORY)[-1]
    assert (one["n"], one["low"], one["high"]) == (1, 100, 100)
    assert [row["subset"] for row in evaluate(ANSWERS[5:], INSTANCES[5:], INVENTORY)] == ["all"]


def many(count: int, rate: float, seed: int) -> tuple[list[Instance], list[Prediction]]:
    rng = np.random.default_rng(seed)
    instances = [instance(str(at), f"存款_{rng.integers(1, 3)}") for at in range(count)]
    answers = []
    for one in instances:
        right = one.gold[0]
        wrong = "存款_1" if right == "存款_2" else "存款_2"
        answers.append(answer(one, right if rng.random() < rate else wrong, rng.uniform(0.5, 1)))
    return instances, answers


def test_the_interval_is_the_bootstraps():
    instances, answers = many(300, 0.7, 1)
    row = evaluate(answers, instances, INVENTORY)[0]
    right = outcomes(answers, instances)
    low, high = bootstrap_interval(right, resamples=20_000)
    assert row["low"] == pytest.approx(100 * low, abs=0.5)
    assert row["high"] == pytest.approx(100 * high, abs=0.5)


def test_comparison_against_the_bootstrap_and_worked_p_value():
    instances, first = many(400, 0.6, 2)
    second = [told if at % 3 else answer(one, one.gold[0])
              for at, (told, one) in enumerate(zip(first, instances, strict=True))]  # fmt: skip
    row = compare(first, second, instances, INVENTORY)[0]
    a, b = outcomes(first, instances), outcomes(second, instances)
    assert row["delta"] == pytest.approx(100 * (b.mean() - a.mean()))
    assert row["delta"] > 5
    assert row["second"] - row["first"] == pytest.approx(row["delta"])
    low, high = bootstrap_interval(b.astype(float) - a, resamples=20_000)
    assert row["low"] == pytest.approx(100 * low, abs=0.5)
    assert row["high"] == pytest.approx(100 * high, abs=0.5)
    assert row["p"] == pytest.approx(2 * 0.5 ** int((b & ~a).sum()))  # only wins: twice the tail
    same = compare(first, first, instances, INVENTORY)[0]
    assert (same["delta"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


def test_any_of_several_right_senses_counts_and_no_answer_is_wrong():
    several = replace(INSTANCES[4], gold=("后门_1", "后门_2"))
    assert outcomes([ANSWERS[4]], [several]).tolist() == [True]
    none = answer(INSTANCES[0], None)
    assert outcomes([none], [INSTANCES[0]]).tolist() == [False]
    row = summary([none, ANSWERS[4]], [INSTANCES[0], several], INVENTORY)
    assert row["accuracy"] == row["coverage"] == 50
    assert row["accuracy_covered"] == 100
    assert row["macro_f1"] == pytest.approx(50)  # 存款_1 is missed, 后门_2 is right
    # no answer is one off; two right senses share the truth: (1 - 1/2)^2 + (1/2)^2
    assert row["brier"] == pytest.approx((1 + 0.5) / 2)


def test_summary_against_scikit_learn_and_by_hand():
    instances, answers = many(200, 0.7, 3)
    row = summary(answers, instances, INVENTORY)
    gold, chosen = [one.gold[0] for one in instances], [told.sense_id for told in answers]
    assert row["macro_f1"] == pytest.approx(100 * f1_score(gold, chosen, average="macro"))
    p = np.array([told.probability for told in answers])
    right = outcomes(answers, instances)
    assert row["brier"] == pytest.approx(np.mean(2 * (right - p) ** 2))  # two senses
    bins = np.ceil(p * 15)
    gaps = [abs((right[bins == k] - p[bins == k]).sum()) for k in np.unique(bins)]
    assert row["calibration_error"] == pytest.approx(sum(gaps) / len(p))
    assert row["macro_accuracy"] == row["accuracy"] == pytest.approx(100 * right.mean())
    shy = [replace(told, abstained=told.probability < 0.75) for told in answers]
    covered = summary(shy, instances, INVENTORY)
    assert covered["coverage"] == pytest.approx(100 * np.mean(p >= 0.75))
    assert covered["accuracy_covered"] == pytest.approx(100 * right[p >= 0.75].mean())
    assert covered["accuracy"] == row["accuracy"]
    silent = [replace(told, abstained=True) for told in answers]
    assert np.isnan(summary(silent, instances, INVENTORY)["accuracy_covered"])


def test_pair_scores_by_hand():
    # 存款: both told right; 后门 (three senses): none; each wrong pair counts
    one, two = INSTANCES[0], INSTANCES[4]
    both = Prediction(
        "a", "存款", "存款_1", (Candidate("存款_1", "", 0.9), Candidate("存款_2", "", 0.8))
    )
    none = Prediction(
        "e", "后门", "后门_2", (Candidate("后门_2", "", 0.4), Candidate("后门_1", "", 0.3))
    )
    row = pair_scores([both, none], [one, two], INVENTORY)
    assert outcomes([both, none], [one, two]).all()  # as disambiguation both are right
    assert row["pairs"] == 5
    assert row["pair_accuracy"] == pytest.approx(100 * 3 / 5)
    assert row["pair_f1"] == pytest.approx(100 * 2 * 1 / (2 + 2))
    row = pair_scores([both, none], [one, two], INVENTORY, threshold=0.35)
    assert row["pair_f1"] == pytest.approx(100 * 2 * 2 / (3 + 2))


def test_coverage_curve_by_hand():
    shares = [0.9, 0.9, 0.8, 0.6, 0.5]
    answers = [answer(one, choice, share) for one, choice, share
               in zip(INSTANCES, CHOICES, shares, strict=False)]  # fmt: skip
    rows = coverage_curve(answers, INSTANCES[:5], INVENTORY, points=5)
    # right: a, c, e; the first two are tied and stay together
    assert [(row["n"], row["threshold"]) for row in rows] == [
        (2, 0.9),
        (3, 0.8),
        (4, 0.6),
        (5, 0.5),
    ]
    assert [row["accuracy"] for row in rows] == pytest.approx([50, 200 / 3, 50, 60])
    assert [row["coverage"] for row in rows] == pytest.approx([40, 60, 80, 100])


def test_order_does_not_matter_when_names_tell():
    assert list(aligned(ANSWERS[::-1], INSTANCES)) == ANSWERS
    assert (outcomes(ANSWERS[::-1], INSTANCES) == outcomes(ANSWERS, INSTANCES)).all()


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(DataError, match="1 instances have no prediction, the first is 'f'"):
        outcomes(ANSWERS[:5], INSTANCES)
    with pytest.raises(DataError, match="1 predictions have no instance, the first is 'f'"):
        outcomes(ANSWERS, INSTANCES[:5])
    with pytest.raises(DataError, match="two predictions have the same id"):
        outcomes([*ANSWERS, ANSWERS[0]], INSTANCES)
    with pytest.raises(DataError, match="two instances have the same id"):
        outcomes(ANSWERS, [*INSTANCES, INSTANCES[0]])
    with pytest.raises(DataError, match="'a' is about '存款', its prediction about '桌子'"):
        outcomes([replace(ANSWERS[0], word="桌子"), *ANSWERS[1:]], INSTANCES)
    with pytest.raises(DataError, match="1 instances have no right sense, the first is 'a'"):
        evaluate(ANSWERS[:1], [replace(INSTANCES[0], gold=())], INVENTORY)
    with pytest.raises(DataError, match="no instance is of a word with several senses"):
        summary(ANSWERS[5:], INSTANCES[5:], INVENTORY)
    with pytest.raises(DataError, match="no instance is of a word with several senses"):
        coverage_curve(ANSWERS[5:], INSTANCES[5:], INVENTORY)
