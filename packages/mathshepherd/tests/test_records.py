"""Rows in, rows out, and every row that is refused, by its file and number."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mathshepherd.records import (
    ROWS,
    Problem,
    Solution,
    StepLabels,
    as_text,
    by_problem,
    key_of,
    load_problems,
    load_solutions,
    with_scores,
    without_doubles,
    write_solutions,
)
from octavo.errors import DataError


def put(tmp_path, *rows, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


# Problems


def test_gsm8k_has_its_answers_behind_the_solution(tmp_path):
    worked = "16 - 3 = <<16-3=13>>13 eggs.\n13 * 2 = 26\n#### 1,026"
    (found,) = load_problems(put(tmp_path, {"question": "How many eggs?", "answer": worked}))
    steps = worked.rpartition("\n####")[0]
    assert found == Problem(key_of("How many eggs?"), "How many eggs?", "1,026", steps)


def test_math_has_a_problem_and_a_name(tmp_path):
    row = {"problem": "Find $x$.", "solution": " So $x=\\frac12$. ", "answer": "\\frac12",
           "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"}  # fmt: skip
    (found,) = load_problems(put(tmp_path, row))
    assert found == Problem("test/algebra/1.json", "Find $x$.", "\\frac12", "So $x=\\frac12$.")


def test_plain_columns_of_several_kinds(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("id,question,final_answer\n7,How many?,007\n8,Why?,\n", encoding="utf-8")
    assert load_problems(file) == [Problem("7", "How many?", "007"), Problem("8", "Why?")]
    rows = ({"id": 7, "question": "How many?", "answer": 3}, {"question": "Which?", "answer": 2.5})
    assert load_problems(put(tmp_path, *rows)) == [
        Problem("7", "How many?", "3"), Problem(key_of("Which?"), "Which?", "2.5")
    ]  # fmt: skip
    folder = tmp_path / "splits"
    folder.mkdir()
    put(folder, rows[0], name="train.jsonl")
    put(folder, rows[1], name="test.jsonl")
    assert [one.answer for one in load_problems(folder, "test")] == ["2.5"]


def test_metamaths_columns_are_known(tmp_path):
    rows = ({"query": "How many?", "response": "3 + 4 = 7\nThe answer is: 7", "type": "GSM_AnsAug"},
            {"query": "And?", "response": "It is 7."})  # fmt: skip
    found = load_problems(put(tmp_path, *rows))
    assert [(one.question, one.answer) for one in found] == [("How many?", "7"), ("And?", None)]
    assert found[0].solution == "3 + 4 = 7\nThe answer is: 7"


def test_a_question_that_stands_twice_is_taken_once(tmp_path, caplog):
    row = {"question": "How many?", "answer": "3"}
    with caplog.at_level("INFO"):
        found = load_problems(put(tmp_path, row, {"question": " How many?\n", "answer": 3}))
    assert len(found) == 1
    assert "1 questions stand twice" in caplog.text


QUESTION = {"question": "How many?", "answer": "3"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([QUESTION, {"answer": "3"}], "row 2: has no `question` "),
        ([{"question": " \n"}], "row 1: has no `question` "),
        (
            [QUESTION, QUESTION | {"answer": "4"}],
            f"row 2: the id {key_of('How many?')} stands twice",
        ),
        ([QUESTION | {"id": 1}, {"question": "Why?", "id": "1"}], "row 2: the id 1 stands twice"),
        ([QUESTION | {"id": 1}, QUESTION | {"id": 1}], "row 2: the id 1 stands twice"),
        ([], "holds no problems"),
        ([{"question": ["How"]}], "line 1: 'question' must be str or int or float, not list"),
        ([QUESTION | {"answer": True}], "line 1: 'answer' must be"),
    ],
)
def test_problems_that_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{message}"):
        load_problems(put(tmp_path, *rows))


@settings(max_examples=50)
@given(st.text(min_size=1), st.sampled_from(["", " ", "\n", "\t "]))
def test_ids_are_of_the_question_alone(question, around):
    assert key_of(around + question + around) == key_of(question)
    assert key_of(question + "x") != key_of(question)


def test_numbers_as_text():
    assert [as_text(one) for one in (3, 3.0, 2.5, "3.0", None, -0.0)] == [
        "3", "3", "2.5", "3.0", None, "0"
    ]  # fmt: skip


# Solutions

texts = st.text(min_size=1).filter(lambda text: text.strip() != "")
answers = st.none() | st.text(max_size=5)


@st.composite
def rows_of_solutions(draw) -> dict[str, Any]:
    """Everything that a solution may be made of."""
    steps = tuple(draw(st.lists(texts, min_size=1, max_size=3)))

    def each(values):
        return tuple(draw(st.lists(values, min_size=len(steps), max_size=len(steps))))

    bits, shares = st.integers(0, 1), st.floats(0, 1)
    labels = None
    if draw(st.booleans()):
        labels = {"hard": each(st.none() | bits), "soft": draw(st.none() | st.just(1)),
                  "hits": each(st.integers(0, 9)), "tried": draw(st.none() | st.just(1)),
                  "strategy": "binary"}  # fmt: skip
        labels["soft"] = labels["soft"] and each(st.none() | shares)
        labels["tried"] = labels["tried"] and each(st.integers(0, 9))
    scores = draw(st.sampled_from([(), ("prm",), ("prm", "orm")]))
    return {
        "problem": draw(st.text()), "sample": draw(st.integers(0, 9)), "question": draw(st.text()),
        "steps": steps, "answer": draw(answers), "predicted": draw(answers),
        "correct": draw(st.none() | st.booleans()), "finished": draw(st.booleans()), "labels": labels,
        "truth": draw(st.none() | st.just(each(bits))),
        "scores": {name: each(st.floats(-1e9, 1e9)) for name in scores},
    }  # fmt: skip


@settings(max_examples=60)
@given(rows_of_solutions())
def test_what_is_written_is_read_back(tmp_path_factory, parts):
    labels = parts["labels"] and StepLabels(**parts["labels"])
    one = Solution(**parts | {"labels": labels})
    file = tmp_path_factory.mktemp("rows") / ROWS
    write_solutions(file, [one])
    assert load_solutions(file.parent) == [one]
    row = json.loads(file.read_text())
    assert row["schema"] == 1
    assert None not in row.values()


def test_several_files_and_folders_are_read_together(tmp_path):
    one = Solution("1", 0, "How many?", ("a",))
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_solutions(tmp_path / name / ROWS, [replace(one, problem=name)])
    found = load_solutions([tmp_path / "x", tmp_path / "y" / ROWS])
    assert [item.problem for item in found] == ["x", "y"]
    (found,) = load_solutions(put(tmp_path, {"problem": 7, "question": "?", "steps": ["a"], "answer": 3,
                                             "predicted": 2.5}))  # fmt: skip
    assert found == Solution("7", 0, "?", ("a",), "3", "2.5")


SOLUTION = {"problem": "1", "question": "How many?", "steps": ["a", "b"]}
COUNTED = "must have one for each of the 2 steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [], "predicted": "3"}, "row 2: `steps` must be one text or more, none of them"),
        ({"steps": ["a", " "]}, "row 2: `steps` must be"),
        ({"steps": ["a", 3]}, "row 2: `steps` must be"),
        ({"steps": "a"}, "row 2: `steps` must be"),
        ({"problem": "0"}, "row 2: problem 0, sample 0 stands twice"),
        ({"problem": None}, "line 2: 'problem' is missing"),
        ({"question": None}, "line 2: 'question' is missing"),
        ({"correct": "maybe"}, "line 2: 'correct' must be bool"),
        ({"scores": {"prm": [0.5]}}, "scores of 'prm': must be one number for each of the 2 steps"),
        ({"scores": {"prm": 0.5}}, "row 2: scores of 'prm': must be one number for each"),
        ({"scores": {"prm": [0.5, None]}}, "row 2: scores of 'prm': one is not a finite number"),
        ({"scores": {"prm": [0.5, float("nan")]}}, "scores of 'prm': one is not a finite number"),
        ({"scores": {"prm": [0.5, float("inf")]}}, "scores of 'prm': one is not a finite number"),
        ({"truth": [1, 2]}, "row 2: `truth` must be 0 or 1 for each of the 2 steps, or end with a 0"),
        ({"truth": [1]}, "row 2: `truth` must be 0 or 1"),
        ({"truth": [1, 1, 0]}, "row 2: `truth` must be 0 or 1"),
        ({"truth": []}, "row 2: `truth` must be 0 or 1"),
        ({"labels": {}}, f"row 2: labels: `hard` {COUNTED}"),
        ({"labels": {"hard": [1]}}, f"row 2: labels: `hard` {COUNTED}"),
        ({"labels": {"hard": [1, 2]}}, "row 2: labels: `hard` holds 2; must be 0, 1 or null"),
        ({"labels": {"hard": [1, "0"]}}, "labels: `hard` holds '0'; must be 0, 1 or null"),
        ({"labels": {"hard": [1, 0.5]}}, "labels: `hard` holds 0.5; must be 0, 1 or null"),
        ({"labels": {"soft": [1, 0]}}, f"labels: `hard` {COUNTED}"),
        ({"labels": {"hard": [1, 0], "soft": [1]}}, f"labels: `soft` {COUNTED}"),
        ({"labels": {"hard": [1, 0], "soft": [1, 1.5]}}, "`soft` holds 1.5; must be from 0 to 1"),
        ({"labels": {"hard": [1, 0], "soft": [1, float("nan")]}}, "`soft` holds nan; must be from 0"),
        ({"labels": {"hard": [1, 0], "hits": [1, -1]}}, "`hits` holds -1; must be 0 or more"),
        ({"labels": {"hard": [1, 0], "hits": [1, 0.5]}}, "`hits` holds 0.5; must be 0 or more"),
        ({"labels": {"hard": [1, 0], "tried": [1, None]}}, "`tried` holds None; must be 0 or more"),
        ({"labels": {"hard": [1, 0], "tried": [1, float("inf")]}}, "holds inf; must be 0 or more"),
    ],
)  # fmt: skip
def test_solutions_that_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl, .*{message}"):
        load_solutions(put(tmp_path, SOLUTION | {"problem": "0"}, SOLUTION | change))


def test_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no solutions"):
        load_solutions(put(tmp_path))
    file = put(tmp_path, SOLUTION)
    assert [one.sample for one in load_solutions([file, file])] == [0, 1]  # two pools are one
    with pytest.raises(DataError, match="row 2: problem 1, sample 0 stands twice"):
        load_solutions(put(tmp_path, SOLUTION, SOLUTION))


def test_whole_numbers_are_read_as_such(tmp_path):
    change = {
        "labels": {"hard": [1.0, None], "hits": [2.0, 0], "soft": [1, None]},
        "truth": [1.0, 0.0],
    }
    (found,) = load_solutions(put(tmp_path, SOLUTION | change))
    assert found.labels == StepLabels((1, None), (1, None), (2, 0))
    assert found.truth == (1, 0)
    (short,) = load_solutions(put(tmp_path, SOLUTION | {"truth": [0]}))  # ends at the first error
    assert short.truth == (0,)


def test_groups_and_doubles():
    rows = [
        ("a", 0, "x"),
        ("b", 0, "x"),
        ("a", 1, "y"),
        ("a", 2, "x"),
        ("a", 3, "xy"),
        ("b", 1, "y"),
    ]
    pool = [Solution(problem, n, "?", tuple(steps)) for problem, n, steps in rows]
    assert {key: [one.sample for one in group] for key, group in by_problem(pool).items()} == {
        "a": [0, 1, 2, 3], "b": [0, 1]
    }  # fmt: skip
    assert without_doubles(pool) == [*pool[:3], *pool[4:]]


def test_scores_go_beside_those_that_are_there():
    one = with_scores(Solution("1", 0, "?", ("a", "b")), "prm", [0.5, 1])
    two = with_scores(one, "orm", [0.1, 0.2])
    assert two.scores == {"prm": (0.5, 1.0), "orm": (0.1, 0.2)}
    assert one.scores == {"prm": (0.5, 1.0)}
    assert with_scores(two, "prm", [0, 0]).scores["prm"] == (0.0, 0.0)
