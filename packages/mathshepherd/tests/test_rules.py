"""Arithmetic without eval, and what rules say of steps."""

import ast
import gzip
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd.records import Solution
from mathshepherd.rules import by_calculator, by_numbers, evaluate, notes, results
from octavo.errors import DataError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("16-3-4", 9), ("2*(3+4)", 14), ("(3/4)*16", 12), ("-3+-2", -5), ("+7", 7),
        (".1+.2", "3/10"), ("7//2", 3),
        ("1,000*2", 2000), ("$5 x 3", 15), ("6÷4×2", 3), ("2^10", 1024), ("2**-1", "1/2"),
        ("20%*50", 10), ("007", 7), ("0.05*100", 5), ("2+2+2+1/3+1/3+1/3", 7), ("0", 0),
    ],
)  # fmt: skip
def test_arithmetic(expression, value):
    assert evaluate(expression) == Fraction(value)


@pytest.mark.parametrize(
    "expression",
    ["", "1/0", "a+1", "__import__('os')", "(1", "1+", "2**101", "2**0.5", "9**9**9", "1//0", "1e9",
     "(1,2)", "1" * 501, "(" * 240 + "1" + ")" * 240, "10.5**99**9", "1.2.3", "()"],
)  # fmt: skip
def test_what_is_no_arithmetic_is_not_evaluated(expression):
    assert evaluate(expression) is None


@given(st.recursive(
    st.integers(0, 99).map(str),
    lambda part: st.tuples(part, st.sampled_from("+-*/"), part).map("({0[0]}{0[1]}{0[2]})".format),
    max_leaves=8,
))  # fmt: skip
def test_arithmetic_agrees_with_fractions(expression):
    tree = ast.parse(expression, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            node.value = str(node.value)
    source = ast.unparse(tree).replace("'", "")
    whole = "".join(f"Fraction({part})" if part.isdigit() else part for part in _parts(source))
    try:
        value = eval(whole, {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    assert evaluate(expression) == value


def _parts(text):
    part = ""
    for sign in text:
        if sign.isdigit():
            part += sign
            continue
        yield from (part, sign) if part else (sign,)
        part = ""
    yield part


def test_notes_are_checked_exactly_or_to_the_decimals_stated():
    text = "<<16-3=13>> <<1/3=0.33>> <<1/3=0.34>> <<7/2=4>> <<0.5*6=3.00>> <<10+8+4=220>> <<x=3>>"
    found = notes(text)
    assert [note.right for note in found] == [True, True, False, False, True, False, False]
    assert found[3].value == Fraction(7, 2)
    assert (found[0].expression, found[0].stated) == ("16-3", "13")
    assert found[-1].value is None


def test_results_are_what_is_computed():
    assert results("3 + 4 = <<3+4=7>>7 and 2 x 5 = $10.00") == [7, 10]
    assert results("so 2+3 = 4+1 = 5, x = -2") == [5, -2]
    assert results("Ann has 3 pens") == []


SOLUTION = Solution(
    "a", 0, "How many?",
    ("Let us think.", "16 - 3 = <<16-3=13>>13 eggs.", "13 * 2 = <<13*2=27>>27", "18 = 9 * 2 = 18",
     "Step 5: The answer is: 18"),
)  # fmt: skip


def test_steps_by_calculator():
    labels = by_calculator(SOLUTION)
    assert labels.hard == (None, 1, 0, None, None)
    assert labels.strategy == "calculator"
    assert labels.soft is None


def test_steps_by_numbers():
    reference = "16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"
    labels = by_numbers(SOLUTION, reference)
    assert labels.hard == (None, 0, 0, 1, 1)
    assert labels.strategy == "numbers"
    assert by_numbers(SOLUTION, [reference, "16 - 3 = 13"]).hard == (None, 1, 0, 1, 1)
    for nothing in ("", [], ["none"]):
        with pytest.raises(DataError, match="problem a, sample 0: no reference solution holds"):
            by_numbers(SOLUTION, nothing)


@pytest.mark.realdata
@pytest.mark.untraced
def test_all_notes_of_gsm8k_are_right(data_folder):
    with gzip.open(data_folder / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = [note for row in rows for note in notes(row["answer"])]
    assert len(found) == 23716
    assert all(note.right for note in found)
    for row in rows[:500]:  # a reference agrees with itself
        steps = tuple(row["answer"].split("####")[0].strip().split("\n"))
        labels = by_numbers(Solution("a", 0, row["question"], steps), row["answer"])
        computing = [label for step, label in zip(steps, labels.hard, strict=True) if results(step)]
        assert set(computing) <= {1}


@pytest.mark.realdata
@pytest.mark.untraced
def test_rules_on_released_solutions(data_folder):
    """Labels of the released set (by rollouts) and of the calculator differ, as they should."""
    from mathshepherd.steps import StepFormat

    name = "step_labels/openr_samples_math-shepherd.jsonl.gz"
    with gzip.open(data_folder / name, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["input"].split("Step 1:", 1)[1] for line in file]
    found = [by_calculator(Solution("a", 0, "?", StepFormat().split(text))).hard for text in texts]
    assert len(found) == 7
    assert found[6] == (1, 1, 1)  # whose labels by rollouts are - - -
    assert found[4] == (1, 0, 1, None, None)
    assert found[5] == (0, 1)
