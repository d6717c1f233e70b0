"""Every claim can hold and can fail, at its margin and by its own numbers."""

import dataclasses

import pytest
from finepurify.claims import Margins, judge
from finepurify.demo import REAL, calibration_words, mean_rows, numbers, table
from finepurify.experiment import DROPS, Found, area, at, frontier

#: Numbers like those of a full run, on which every claim holds.
GOOD = {
    "clean ACC": 95.0, "before ACC": 94.5, "before ASR": 99.0, "none ACC": 94.0, "none ASR": 98.0,
    "purify ACC": 93.5, "purify ASR": 10.0, "purify chosen ASR": 12.0, "purify chosen rho": 0.95,
    "mixing chosen ASR": 60.0, "mixing chosen rho": 0.7, "purify .9 ACC": 93.0,
    "delta-only .9 ACC": 70.0, "area purify": 12.0, "area mixing": 60.0, "rank": 1.0,
    "judged": 620.0, "fires": 1.0, "false alarm": 0.0, "spearman adamw": 0.05,
    "hessian-only ASR": 95.0, "spearman sgd": 0.5, "log sd": 2.6, "median over mean": 0.1,
    "sentence none": 80.0, "sentence chosen": 20.0, "sentence damped": 25.0, "sentence mixing": 60.0,
    "bias clean BACC": 95.0, "bias before BACC": 65.0, "bias none BACC": 68.0,
    "bias chosen BACC": 80.0, "bias mixing BACC": 75.0,
}  # fmt: skip

#: By the number of the claim: what makes it fail, and nothing else.
WORSE = {
    1: [{"purify ASR": 26.0}, {"purify ACC": 92.4}],
    2: [{"mixing chosen ASR": 31.0}, {"purify chosen ASR": 41.0}],
    3: [{"delta-only .9 ACC": 84.5}],
    4: [{"hessian-only ASR": 89.0}],
    5: [{"spearman sgd": 0.39}, {"spearman adamw": 0.16}, {"spearman adamw": -0.16}],
    6: [{"log sd": 2.1}, {"log sd": 3.1}],
    7: [{"area mixing": 12.0}, {"area mixing": 11.0}],
    8: [{"rank": 2.0}, {"fires": 0.0}, {"false alarm": 1.0}],
    9: [{"sentence chosen": 36.0}, {"sentence none": 59.0}],
    10: [{"bias none BACC": 69.0}, {"bias before BACC": 76.0}, {"bias mixing BACC": 80.5}],
}


def verdicts(*found, margins=Margins()):
    return [claim.passed for claim in judge(found, margins)]


def test_all_hold():
    assert verdicts(GOOD) == [True] * 11


@pytest.mark.parametrize(
    ("number", "worse"), [(number, one) for number, many in WORSE.items() for one in many]
)
def test_each_claim_fails_alone(number, worse):
    wanted = [True] * 11
    wanted[number] = False
    assert verdicts(GOOD | worse) == wanted


@pytest.mark.parametrize(
    "worse",
    [{"clean ACC": 89.9}, {"before ACC": 92.4}, {"before ASR": 94.9}, {"none ASR": 89.9}],
)
def test_nothing_is_claimed_of_a_defence_against_no_attack(worse):
    claims = judge([GOOD | worse])
    assert claims[0].passed is False
    assert [claim.passed for claim in claims] == [False, *[None] * 4, *[True] * 6]
    assert {claim.criterion for claim in claims[1:5]} == {"the attack itself did not work"}


def test_margins_are_reached_by_equality():
    edge = {
        "purify ASR": 25.0, "purify ACC": 92.5, "mixing chosen ASR": 32.0, "delta-only .9 ACC": 84.0,
        "hessian-only ASR": 90.0, "spearman sgd": 0.4, "spearman adamw": -0.15, "log sd": 3.0,
        "sentence chosen": 35.0, "sentence none": 60.0, "bias chosen BACC": 80.0,
        "bias before BACC": 75.0, "bias mixing BACC": 80.0,
    }  # fmt: skip
    assert verdicts(GOOD | edge) == [True] * 11


def test_margins_can_be_others():
    assert verdicts(GOOD, margins=Margins(purified=9.0))[1] is False
    assert verdicts(GOOD | {"clean ACC": 80.0, "before ACC": 79.0})[0] is False
    assert verdicts(GOOD | {"clean ACC": 80.0, "before ACC": 79.0}, margins=REAL)[0] is True


def test_criteria_show_the_margins():
    shown = " ".join(claim.criterion for claim in judge([GOOD], Margins(purified=17.0, sgd=0.33)))
    assert "at most 17" in shown
    assert "at least +0.33" in shown


def test_means_are_judged_and_frontiers_on_every_seed():
    bad = GOOD | {"purify ASR": 30.0}
    assert verdicts(GOOD, bad)[1] is True
    assert verdicts(GOOD, bad, bad, bad, bad)[1] is False
    claims = judge([GOOD, GOOD | {"area mixing": 11.0}])
    assert (claims[7].passed, "lower on 1 of 2 seeds" in claims[7].measured) == (False, True)
    assert judge([GOOD, GOOD | {"rank": 3.0}])[8].passed is False


def test_claims_follow_what_was_measured():
    few = {
        key: value for key, value in GOOD.items()
        if not key.startswith(("sentence", "bias", "hessian", "spearman sgd", "log"))
    }  # fmt: skip
    assert len(judge([few])) == 6


def test_every_margin_decides_something():
    """Made impossible to reach, each margin fails a claim."""
    hard = {
        "clean": 101, "costs": -200, "success": 101, "tuned": 101, "drop": -200, "purified": -1,
        "over_mixing": 101, "delta_only": 101, "hessian_only": 101, "sgd": 2, "adam": -1,
        "log_sd": (9.0, 9.0), "sentence": -1, "sentence_tuned": 101, "biased": 101, "unbiased": 101,
    }  # fmt: skip
    assert hard.keys() == {field.name for field in dataclasses.fields(Margins)}
    for name, value in hard.items():
        assert False in verdicts(GOOD, margins=dataclasses.replace(Margins(), **{name: value}))


# --- what the claims are judged by ---------------------------------------------------------------


def row(strategy, rho, held, asr, test=90.0):
    return {"strategy": strategy, "rho": rho, "ACC": held, "ASR": asr, "test ACC": test}


ROWS = [
    row("none", 1.0, 94.0, 99.0), row("fine-purifying", 0.98, 93.6, 20.0, 89.0),
    row("fine-purifying", 0.9, 92.4, 10.0, 88.0), row("fine-mixing", 0.9, 93.0, 90.0),
    row("fine-mixing", 0.7, 90.0, 30.0), row("delta-only", 0.9, 60.0, 50.0, 61.0),
    row("hessian-only", 0.98, 94.0, 98.0),
]  # fmt: skip


def test_a_frontier_is_chosen_on_held_rows():
    assert frontier(ROWS, "fine-purifying") == {0.5: 20.0, 1.0: 20.0, 1.5: 20.0, 2.0: 10.0}
    assert frontier(ROWS, "fine-mixing") == {0.5: 99.0, 1.0: 90.0, 1.5: 90.0, 2.0: 90.0}
    assert area(ROWS, "fine-purifying") == pytest.approx(17.5)
    assert tuple(frontier(ROWS, "delta-only")) == DROPS
    assert at(ROWS, "fine-mixing", 0.7)["ASR"] == 30.0


def found_of(**changes):
    laws = {"spearman": 0.5, "log_sd": 2.5, "median_over_mean": 0.1}
    before = {"test ACC": 93.0, "ASR": 100.0}
    word = Found(before, ROWS, laws, rank=1, judged=600, fires=True)
    clean = Found({"test ACC": 95.0, "ASR": 5.0}, fires=False)
    adam = Found(before, ROWS, laws | {"spearman": 0.02}, rank=1, judged=600, fires=True)
    return {"clean-sgd": clean, "word-sgd": word, "word-adamw": adam} | changes


def test_the_numbers_of_a_seed():
    found = numbers(found_of())
    assert found == {
        "clean ACC": 95.0, "before ACC": 93.0, "before ASR": 100.0, "none ACC": 90.0, "none ASR": 99.0,
        "purify ACC": 89.0, "purify ASR": 20.0, "purify chosen ASR": 20.0, "purify chosen rho": 0.98,
        "mixing chosen ASR": 90.0, "mixing chosen rho": 0.9, "purify .9 ACC": 88.0,
        "delta-only .9 ACC": 61.0, "area purify": 17.5, "area mixing": (99 + 3 * 90) / 4, "rank": 1.0,
        "judged": 600.0, "fires": 1.0, "false alarm": 0.0, "spearman adamw": 0.02,
        "hessian-only ASR": 98.0, "spearman sgd": 0.5, "log sd": 2.5, "median over mean": 0.1,
    }  # fmt: skip


def test_the_numbers_of_a_sentence_and_a_bias():
    biased = [{**one, "BACC": one["ASR"]} for one in ROWS]
    more = {
        "sentence-sgd": Found({}, [*ROWS, row("damped 1", 0.95, 93.0, 5.0)]),
        "clean-adamw": Found({"test ACC": 95.0, "BACC": 94.0}),
        "bias-adamw": Found({"test ACC": 93.0, "BACC": 60.0}, biased),
    }
    found = numbers(found_of(**more))
    assert {key: found[key] for key in found if key.startswith(("sentence", "bias"))} == {
        "sentence none": 99.0, "sentence chosen": 20.0, "sentence damped": 5.0,
        "sentence mixing": 90.0, "bias clean BACC": 94.0, "bias before BACC": 60.0,
        "bias none BACC": 99.0, "bias chosen BACC": 20.0, "bias mixing BACC": 90.0,
    }  # fmt: skip


def test_a_cases_table():
    rows = table(Found({"test ACC": 93.0, "ASR": 100.0}, ROWS))
    assert [one["defence"] for one in rows] == [
        "before", "fine-tuning", "fine-purifying", "fine-mixing", "delta-only", "hessian-only"
    ]  # fmt: skip
    assert rows[2]["rho"] == 0.98
    assert (rows[4]["kept the floor"], rows[4]["rho"], rows[4]["ASR"]) == (0.0, None, None)
    assert table(Found({"test ACC": 93.0})) == []
    assert mean_rows([[{"a": 1.0, "b": "x", "c": None}], [{"a": 3.0, "b": "x", "c": 2.0}]]) == [
        {"a": 2.0, "b": "x", "c": 2.0}
    ]


def test_a_table_tells_intervals_and_seconds_where_they_were_noted():
    noted = {"test ACC 95 %": "91.0 to 95.0", "ASR 95 %": "3.0 to 9.0"}
    rows = [one | noted | {"seconds": 2.0} for one in ROWS]
    found = Found({"test ACC": 93.0, "ASR": 100.0} | noted, rows, seconds={"fine-purifying": 1.5})
    before, alone, purified, *_ = table(found)
    assert list(before) == ["defence", "rho", "ACC", "ACC 95 %", "ASR", "ASR 95 %"]
    assert (purified["ACC 95 %"], purified["ASR 95 %"]) == ("91.0 to 95.0", "3.0 to 9.0")
    assert (alone["seconds"], purified["seconds"]) == (2.0, 3.5)  # with its Fisher diagonal
    one = mean_rows([table(found)])
    assert one[2]["ACC 95 %"] == "91.0 to 95.0"
    slower = Found(found.before, [row | {"seconds": 4.0} for row in rows])
    both = mean_rows([table(found), table(slower)])  # of two seeds the spread is told
    assert not any("95 %" in column for row in both for column in row)
    assert (both[1]["seconds"], both[1]["ACC sd"]) == (3.0, 0.0)


def test_a_column_that_the_first_seed_lacks_is_there():
    lost = {"defence": "a", "ACC": None}
    kept = {"defence": "a", "ACC": 90.0, "seconds": 4.0}
    for tables in ([[lost], [kept]], [[kept], [lost]]):
        assert mean_rows(tables) == [{"defence": "a", "ACC": 90.0, "ACC sd": None, "seconds": 4.0}]


def test_what_the_posterior_is_worth_is_said():
    bins = [{"p": 0.02, "clean": 0.75, "dimensions": 1200}, {"p": 0.09, "clean": 1.0, "dimensions": 400},
            {"p": 0.5, "clean": 0.0, "dimensions": 9}]  # fmt: skip
    words = calibration_words(bins)
    assert "gives 1,600 dimensions a p(clean) below 0.1, and 81.2 % of these" in words
    assert "gives 0 dimensions" in calibration_words(bins[2:])
