"""Formats of others: the real files read, what is written read back, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mathshepherd.convert import FORMATS, WRITABLE, read, write
from mathshepherd.records import Solution, StepLabels, key_of, load_solutions, write_solutions
from octavo.errors import ConfigError, DataError

SOFT = ("trl", "openrlhf", "math-aps")


def solution(hard=(1, 0), soft=None, question="How many?", steps=None, **more):
    steps = steps or tuple(f"Step {n}: so {n} + 1 = {n + 1}" for n in range(1, len(hard) + 1))
    return Solution(
        key_of(question),
        more.pop("sample", 0),
        question,
        steps,
        labels=StepLabels(hard, soft),
        **more,
    )


def put(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def judged(found):
    return [(one.question, one.steps, one.labels.hard) for one in found]


@pytest.mark.parametrize("kind", WRITABLE)
def test_hard_labels_come_back(tmp_path, kind):
    given = [
        solution((1, 1), answer="3"),
        solution((1, 0, 0), sample=1, answer="3"),
        solution((0,), question="What\nis 2 + 2?", answer="4"),
    ]
    file = tmp_path / "out.jsonl"
    assert write(given, file, kind) == 3
    found = read(file, kind)
    assert judged(found) == judged(given)
    assert [(one.problem, one.sample) for one in found] == [
        (one.problem, one.sample) for one in given
    ]
    assert {one.labels.strategy for one in found if one.labels} == {kind}
    if kind in ("prm800k", "math-aps"):
        assert [one.answer for one in found] == ["3", "3", "4"]


@pytest.mark.parametrize("kind", WRITABLE)
def test_soft_labels_come_back_or_are_refused(tmp_path, kind):
    given = [solution((1, 1, 0), (1.0, 0.25, 0.0)), solution((1,), (1,), question="Why?")]
    file = tmp_path / "out.jsonl"
    if kind not in SOFT:
        with pytest.raises(ConfigError, match=f"{kind} holds hard labels only; write trl"):
            write(given, file, kind, labels="soft")
        assert not file.exists()
        return
    write(given, file, kind, labels="soft")
    found = read(file, kind)
    assert judged(found) == judged(given)
    assert [one.labels.soft for one in found if one.labels] == [(1.0, 0.25, 0.0), (1.0,)]


words = st.text("abc 0123+=$\\{}äки", min_size=1, max_size=12).filter(
    lambda text: text == text.strip() != "" and "ки" not in text
)
labelled = st.lists(st.tuples(words, st.integers(0, 1)), min_size=1, max_size=4)


@settings(max_examples=50)
@given(labelled, words, st.sampled_from(WRITABLE))
def test_any_text_comes_back(tmp_path_factory, pairs, question, kind):
    steps = tuple(f"Step {n}: {text}" for n, (text, _) in enumerate(pairs, 1))
    given = [solution(tuple(label for _, label in pairs), steps=steps, question=question)]
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    write(given, file, kind)
    assert judged(read(file, kind)) == judged(given)


def test_steps_gain_numbers_where_the_format_has_them(tmp_path):
    given = [solution((1, 0), steps=("two", "three"))]
    file = tmp_path / "out.jsonl"
    for kind, steps in {
        "mathshepherd": ("Step 1: two", "Step 2: three"),
        "rlhflow": ("Step 1: two", "Step 2: three"),
        "openrlhf": ("Step 1: two", "Step 2: three"),
        "trl": ("two", "three"),
        "prm800k": ("two", "three"),
        "math-aps": ("two", "three"),
    }.items():
        write(given, file, kind)
        assert read(file, kind)[0].steps == steps


def test_what_is_written(tmp_path):
    file = tmp_path / "out.jsonl"
    one = solution((1, 0), (0.75, 0.0), steps=("Step 1: a", "Step 2: b"), question="Q?", answer="7")
    expected = {
        "mathshepherd": {"input": "Q? Step 1: a ки\nStep 2: b ки",
                         "label": "Q? Step 1: a +\nStep 2: b -", "task": "unknown"},
        "openrlhf": {"input": "Q? Step 1: a ки\nStep 2: b ки", "label": ["+", "-"]},
        "trl": {"prompt": "Q?", "completions": ["Step 1: a", "Step 2: b"], "labels": [True, False]},
        "rlhflow": {"conversations": [
            {"role": "user", "content": "Q? Step 1: a"}, {"role": "assistant", "content": "+"},
            {"role": "user", "content": "Step 2: b"}, {"role": "assistant", "content": "-"}]},
        "math-aps": {"question": "Q?", "final_answer": "7", "reasoning_steps": [
            {"solution_prefix": "Q?\n\nStep 1: a", "mc_value": 1.0},
            {"solution_prefix": "Q?\n\nStep 1: a\n\nStep 2: b", "mc_value": 0.0}]},
    }  # fmt: skip
    for kind, row in expected.items():
        write([one], file, kind)
        assert json.loads(file.read_text(encoding="utf-8")) == row
    for kind, column in (("trl", "labels"), ("openrlhf", "label")):
        write([one], file, kind, labels="soft")
        assert json.loads(file.read_text(encoding="utf-8"))[column] == [0.75, 0.0]


def test_prm800k_alone_can_say_that_a_step_is_not_judged(tmp_path):
    given = [solution((1, None, 0))]
    file = tmp_path / "out.jsonl"
    write(given, file, "prm800k")
    assert judged(read(file, "prm800k")) == judged(given)
    for kind in WRITABLE:
        if kind != "prm800k":
            with pytest.raises(
                DataError, match=rf"sample 0: step 2 has no hard label, which {kind}"
            ):
                write(given, file, kind)
    with pytest.raises(DataError, match="step 2 has no soft label, which trl cannot say"):
        write([solution((1, 1), (0.5, None))], file, "trl", labels="soft")


def test_what_cannot_be_written(tmp_path):
    file = tmp_path / "out.jsonl"
    plain = Solution("a", 3, "Q?", ("x",))
    with pytest.raises(
        DataError, match="problem a, sample 3: has no labels; `mathshepherd annotate`"
    ):
        write([plain], file, "trl")
    with pytest.raises(DataError, match="has no soft labels; annotate with --estimation"):
        write([solution()], file, "trl", labels="soft")
    with pytest.raises(DataError, match="step 1 holds the tag 'ки'"):
        write([solution((1,), steps=("a ки",))], file, "mathshepherd")
    with pytest.raises(ConfigError, match="format 'processbench': must be one of mathshepherd"):
        write([solution()], file, "processbench")
    with pytest.raises(ConfigError, match="labels 'half': must be hard or soft"):
        write([solution()], file, "trl", labels="half")
    assert not file.exists()


TAGGED = {"input": "Q? Step 1: a ки", "label": "Q? Step 1: a +"}
APS = {"question": "Q?", "final_answer": "3"}
TURNS = [{"role": "user", "content": "Q? Step 1: a"}, {"role": "assistant", "content": "+"}]
BENCH = {"id": "a-0", "problem": "Q?", "steps": ["a"], "final_answer_correct": True, "label": 0}


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("mathshepherd", TAGGED | {"input": "Q? Step 1: a"}, "holds no step tag 'ки'"),
        ("mathshepherd", TAGGED | {"input": "Q? a ки"}, "holds no `Step 1:`"),
        ("mathshepherd", {"input": "Step 1: a ки", "label": "Step 1: a +"}, "question is blank"),
        ("mathshepherd", TAGGED | {"label": TAGGED["input"]}, r"must be `input` with \+ or -"),
        ("mathshepherd", TAGGED | {"label": "Q? Step 1: b +"}, "step 1 is not"),
        ("mathshepherd", {"input": "Q? Step 1: a ки ки", "label": "Q? Step 1: a + +"},
         "step 2 of 2 is blank"),
        ("openrlhf", {"input": TAGGED["input"]}, "neither `label` nor `value`"),
        ("openrlhf", {"input": TAGGED["input"], "label": ["+", "-"]}, "1 steps and 2 labels"),
        ("openrlhf", {"input": TAGGED["input"], "label": ["good"]}, "label 'good': must be true"),
        ("trl", {"prompt": "Q?", "completions": "a", "labels": [True]}, "must be a list of texts"),
        ("trl", {"prompt": "Q?", "completions": ["a"], "labels": "1"}, "labels must be a list"),
        ("trl", {"prompt": "Q?", "completions": ["a"], "labels": [None]}, "label None: must be"),
        ("trl", {"prompt": "Q?", "completions": ["a"], "labels": [1.5]}, "label 1.5: must be"),
        ("trl", {"prompt": "Q?", "completions": [" "], "labels": [1]}, "step 1 of 1 is blank"),
        ("trl", {"prompt": "Q?", "completions": [], "labels": []}, "there are no steps"),
        ("trl", {"prompt": "Q?", "completions": [3], "labels": [1]}, "is not a row of trl"),
        ("rlhflow", {"conversations": TURNS[:1]}, "must be pairs"),
        ("rlhflow", {"conversations": TURNS[::-1]}, "one after the other"),
        ("rlhflow", {"messages": [{"role": "user", "content": "a"}, TURNS[1]]}, "no `Step 1:`"),
        ("rlhflow", {"messages": [TURNS[0], TURNS[1] | {"content": "ok"}]}, r"must say \+ or -"),
        ("prm800k", {"question": {"problem": "Q?"}, "label": {}}, "not a row of prm800k: KeyError"),
        ("prm800k", {"question": {"problem": "Q?"}, "label": {"steps": []}}, "there are no steps"),
        ("prm800k", {"question": {"problem": "Q?"}, "label": {"steps": [
            {"completions": [{"text": "a", "rating": 2}], "chosen_completion": 0}]}},
         "rating 2 of step 1"),
        ("math-aps", APS | {"reasoning_steps": [{"solution_prefix": "R", "mc_value": 1}]},
         "does not begin with the question"),
        ("math-aps", APS | {"reasoning_steps": [{"solution_prefix": "Q? a", "mc_value": 2}]},
         "mc_value 2.*: must be from 0 to 1"),
        ("processbench", BENCH | {"label": 1}, "label 1: must be -1 or the number of one of 1"),
        ("processbench", BENCH | {"steps": []}, "there are no steps|label 0: must be"),
    ],
)  # fmt: skip
def test_rows_that_are_wrong(tmp_path, kind, row, said):
    file = put(tmp_path, row)
    with pytest.raises(DataError, match=f"rows.jsonl, row 1: .*(?:{said})"):
        read(file, kind)
    with pytest.raises(DataError, match="holds no solutions"):
        read(file, kind, strict=False)


def test_wrong_rows_can_be_left_out(tmp_path, caplog):
    good = {"prompt": "Q?", "completions": ["a"], "labels": [True]}
    file = put(tmp_path, good, good | {"labels": []}, good)
    assert [one.sample for one in read(file, "trl", strict=False)] == [0, 1]
    assert "1 rows are left out; the first: " in caplog.text
    assert "row 2: there are 1 steps and 0 labels" in caplog.text
    with pytest.raises(ConfigError, match="format 'csv': must be one of mathshepherd, prm800k"):
        read(file, "csv")


def test_other_spellings_are_read(tmp_path):
    file = put(tmp_path, {"input": "Q? Step 1: a ки\nStep 2: b ки", "value": [0.5, 0.0]})
    assert read(file, "openrlhf")[0].labels == StepLabels((1, 0), (0.5, 0.0), strategy="openrlhf")
    file = put(tmp_path, {"messages": TURNS})
    assert read(file, "rlhflow")[0].steps == ("Step 1: a",)
    file = put(tmp_path, {"prompt": "Q?", "completions": ["a", "b"], "labels": [1, 0]})
    assert read(file, "trl")[0].labels == StepLabels((1, 0), strategy="trl")
    file = put(
        tmp_path, {"input": "Q? Step 1: a ки\nStep 2: b", "label": "Q? Step 1: a +\nStep 2: b"}
    )
    found = read(file, "mathshepherd")[0]
    assert (found.steps, found.correct) == (("Step 1: a", "Step 2: b"), None)
    assert found.labels == StepLabels((1, None), strategy="mathshepherd")


def test_prefixes_become_paths(tmp_path):
    shares = {"Q?": 0.5, "Q? a": 0.5, "Q? ab": 0.25, "Q? a\n\nb": 1, "Q? a\n\nc": 0.0}
    rows = [{"solution_prefix": text, "mc_value": share} for text, share in shares.items()]
    rows.append({"solution_prefix": "Q? a\n\nc", "mc_value": 0.5})
    file = put(tmp_path, {"question": "Q?", "final_answer": 3, "reasoning_steps": rows})
    found = read(file, "math-aps")
    assert [one.steps for one in found] == [("ab",), ("a", "b"), ("a", "c")]
    assert [one.labels.soft for one in found if one.labels] == [(0.25,), (0.5, 1.0), (0.5, 0.25)]
    assert {one.answer for one in found} == {"3"}


def test_trees_become_paths(tmp_path):
    def node(text, share, *children):
        return {"text": text, "mc_value": share, "children": list(children)}

    tree = node(
        "Q?", 0.5, node("a", 0.5, node("b ", 1.0), node("so \\boxed{4}", 0.0)), node("c", 0)
    )
    row = {"question": "Q?", "final_answer": "3", "reasoning_steps": tree}
    found = read(put(tmp_path, row), "math-aps")
    assert [one.steps for one in found] == [("a", "b"), ("a", "so \\boxed{4}"), ("c",)]
    assert [one.labels.soft for one in found if one.labels] == [(0.5, 1.0), (0.5, 0.0), (0.0,)]
    assert [one.labels.hard for one in found if one.labels] == [(1, 1), (1, 0), (0,)]
    assert [(one.predicted, one.finished) for one in found] == [
        (None, False), ("4", True), (None, False),
    ]  # fmt: skip
    with pytest.raises(DataError, match="'reasoning_steps' must be dict or list"):
        read(put(tmp_path, row | {"reasoning_steps": 3}), "math-aps")


def test_the_chosen_path_of_prm800k(tmp_path):
    def step(*rated, chosen=None, own=None):
        completions = [{"text": text, "rating": rating} for text, rating in rated]
        human = own and {"text": own, "rating": None}
        return {"completions": completions, "human_completion": human, "chosen_completion": chosen}

    def path(*steps, reason="solution"):
        label = {"steps": list(steps), "finish_reason": reason}
        question = {"problem": "Q?", "ground_truth_answer": 7}
        return read(put(tmp_path, {"question": question, "label": label}), "prm800k")[0]

    one = path(
        step(("a", 1), ("x", -1), chosen=0), step(("y", -1), own="b"), step(("c", 0), chosen=0),
        step(("d", None), chosen=0), step(("z", -1), ("e\n\n# Answer\n\n7", 1), chosen=1),
    )  # fmt: skip
    assert one.steps == ("a", "b", "c", "d", "e\n\n# Answer\n\n7")
    assert one.labels == StepLabels((1, 1, 1, None, 1), strategy="prm800k")
    assert (one.answer, one.predicted, one.finished) == ("7", "7", True)
    one = path(
        step(("a", 1), chosen=0), step(("b", -1), ("x", 1)), step(("y", 1)), reason="found_error"
    )
    assert (one.steps, one.finished, one.predicted) == (("a", "b"), False, None)
    assert path(step(("a", 1), chosen=0), step(), reason="give_up").steps == ("a",)


def test_answers_of_released_rows(tmp_path):
    text = "Q? Step 1: 2 + 2 = 4. The answer is: 4 {0}"
    rows = [{"input": text.format("ки"), "label": text.format(sign)} for sign in "+-"]
    right, wrong = read(put(tmp_path, *rows), "mathshepherd")
    assert (right.predicted, right.answer, right.correct) == ("4", "4", True)
    assert (wrong.predicted, wrong.answer, wrong.correct) == ("4", None, False)


def test_benchmarks_hold_the_truth_and_no_labels(tmp_path):
    rows = [BENCH | {"steps": ["a", "b", "c"], "label": 1}, BENCH | {"id": "a-1", "label": -1}]
    found = read(put(tmp_path, *rows), "processbench")
    assert [one.truth for one in found] == [(1, 0), (1,)]
    assert [one.problem for one in found] == ["a-0", "a-1"]
    assert not any(one.labels for one in found)
    write_solutions(tmp_path / "rows.jsonl", found)
    assert load_solutions(tmp_path / "rows.jsonl") == found
    row = {"idx": "p", "classification": "circular", "error_steps": [2, 9],
           "original_question": "Q?", "original_process": ["a"], "modified_question": "R?",
           "modified_process": ["a", "b", "c"]}  # fmt: skip
    modified, original = read(put(tmp_path, row), "prmbench")
    assert (modified.question, modified.truth, modified.sample) == ("R?", (1, 0, 1), 0)
    assert (original.question, original.truth, original.sample) == ("Q?", (1,), 1)
    assert modified.problem == original.problem == "circular:p"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"truth": [1, 1]}, "or end with a 0"),
        ({"truth": [1, 0, 1, 1]}, "or end with a 0"),
        ({"truth": [[1], 0, 0]}, "must be 0 or 1 for each of the 3 steps"),
        ({"steps": "abc"}, "`steps` must be one text or more"),
        (
            {"labels": {"hard": [1, 1, 1], "hits": [None, 1, 1]}},
            "`hits` holds None; must be 0 or more",
        ),
    ],
)
def test_rows_of_our_own_that_are_wrong(tmp_path, part, said):
    row = {"problem": "a", "sample": 0, "question": "Q?", "steps": ["a", "b", "c"]}
    with pytest.raises(DataError, match=said):
        load_solutions(put(tmp_path, row | part))


COUNTS = {
    "openr_samples_math-shepherd.jsonl.gz": ("mathshepherd", 7),
    "openr_samples_prm800k.jsonl.gz": ("prm800k", 6),
    "openr_samples_math-aps.jsonl.gz": ("math-aps", 124),
    "openr_samples_math-aps-tree.jsonl.gz": ("math-aps", 242),
}


@pytest.mark.realdata
@pytest.mark.untraced
def test_real_files_are_read_and_written_again(data_folder, tmp_path):
    for name, (kind, count) in COUNTS.items():
        found = read(data_folder / "step_labels" / name, kind)
        assert len(found) == count
        soft = kind == "math-aps"
        for other in SOFT if soft else WRITABLE:
            file = tmp_path / "again.jsonl"
            write(found, file, other, labels="soft" if soft else "hard")
            again = read(file, other)
            assert [one.problem for one in again] == [one.problem for one in found]
            assert [one.labels.hard for one in again if one.labels] == [
                one.labels.hard for one in found if one.labels
            ]
            if soft:
                assert [one.labels.soft for one in again if one.labels] == [
                    one.labels.soft for one in found if one.labels
                ]


@pytest.mark.realdata
@pytest.mark.untraced
def test_released_rows_are_written_as_they_were(data_folder, tmp_path):
    import gzip

    source = data_folder / "step_labels" / "openr_samples_math-shepherd.jsonl.gz"
    write(read(source, "mathshepherd"), tmp_path / "again.jsonl", "mathshepherd")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        before = [json.loads(line) for line in file]
    lines = (tmp_path / "again.jsonl").read_text(encoding="utf-8").splitlines()
    for one, other in zip(before, map(json.loads, lines), strict=True):
        assert (one["input"], one["label"]) == (other["input"], other["label"])


@pytest.mark.realdata
@pytest.mark.untraced
def test_paths_chosen_in_prm800k(data_folder):
    found = read(data_folder / "step_labels" / "openr_samples_prm800k.jsonl.gz", "prm800k")
    assert [one.labels.hard for one in found if one.labels] == [
        (1,) * 6, (1,) * 6 + (0,), (1,) * 5, (1,) * 7, (1,) * 8, (1,) * 12,
    ]  # fmt: skip
    assert found[0].steps[1] == "We have $3p+e=1.24$ and $5p+e=1.82$."  # the labeler's own
    assert [one.predicted for one in found] == ["29", None, "468", "9", None, "8, 3, 1"]
    assert [one.finished for one in found] == [True, False, True, True, False, True]


@pytest.mark.realdata
@pytest.mark.untraced
def test_real_benchmarks(data_folder):
    for name, wrong, hidden in (
        ("gsm8k", 207, 7), ("math", 594, 94), ("olympiadbench", 661, 161), ("omnimath", 759, 259),
    ):  # fmt: skip
        found = read(data_folder / "processbench" / f"{name}.json.gz", "processbench")
        errors = [one for one in found if one.truth and one.truth[-1] == 0]
        assert len(errors) == wrong
        assert sum(bool(one.correct) for one in errors) == hidden
    found = read(data_folder / "step_labels" / "prmbench_subset400.jsonl.gz", "prmbench")
    assert len(found) == 2 * 394
    assert FORMATS[-2:] == ("processbench", "prmbench")
