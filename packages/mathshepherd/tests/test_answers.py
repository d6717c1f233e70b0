"""Answers found and compared: by hand-worked cases, and against what the real files say."""

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd import symbolic
from mathshepherd.answers import classes, equivalent, extract, gradable, key
from octavo.errors import ConfigError

CHEAP = ("exact", "numeric", "hendrycks")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Step 2: 5 + 3 = 8. The answer is: 8", "8"),
        ("The answer is: 3 ... no. The answer is: 4", "4"),
        ("The answer is: $18.00", "18.00"),
        ("so The answer is: $18 dollars.", "18"),
        ("The answer is 18. I hope this helps.", "18"),
        ("The final answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("The answer is: \n\n 5 apples", "5"),
        ("The answer is: 1,080", "1080"),
        ("The answer is: 1,000 and 2,000", "1,000 and 2,000"),
        ("The answer is: Mr. Smith", "Mr. Smith"),
        ("The answer is: x=5.", "x=5"),
        ("The answer is: **7**", "7"),
        ("The answer is: 50%", "50%"),
        ("The answer is: \\(x + 1\\)", "x + 1"),
        ("The answer is: $1$ or $2$", "$1$ or $2$"),
        ("The answer is: \\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}",
         "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}"),
        ("The answer is: $\\boxed{4}$.", "4"),
        ("It is \\boxed{\\frac{1}{2}}. The answer is: 3", "3"),
        ("He says the answer is correct. So \\boxed{5}.", "5"),
        ("work\n#### 1,234", "1234"),
        ("A: is a letter\nA: -3.5 billion", "-3.5"),
        ("#### 3/4", "3/4"),
        ("#### none", "none"),
        ("so \\boxed{3} or rather \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{4} and then \\boxed{\\frac{1", "4"),
        ("it is \\boxed 5 .", "5"),
        ("no answer here", None),
        ("The answer is: .", None),
        ("\\boxed{1", None),
        ("\\boxed{ }", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_last_answer_is_found(text, answer):
    assert extract(text) == answer


def test_styles_look_where_they_are_told():
    text = "\\boxed{1}\nThe answer is: 2\n#### 3"
    assert [extract(text, style) for style in ("boxed", "marker", "gsm8k", "auto")] == list("1233")
    assert extract("A: 7", "marker") is None
    with pytest.raises(ConfigError, match="'prose': must be one of marker, gsm8k, boxed, auto"):
        extract(text, "prose")


@pytest.mark.parametrize(
    ("first", "second", "level"),
    [
        ("18", " 18 ", "exact"),
        ("1/2", "0.5", "numeric"),
        ("1/2", "\\frac12", "numeric"),
        (".5", "\\dfrac{1}{2}", "numeric"),
        ("$18.00", "18", "numeric"),
        ("1,080", "1,\\!080", "numeric"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}", "numeric"),
        ("1\\frac{4}{5}", "1.8", "numeric"),
        ("1 1/2", "1.5", "numeric"),
        ("50\\%", "50", "numeric"),
        ("−3", "-3", "numeric"),
        ("1.2 \\times 10^{3}", "1200", "numeric"),
        ("90^\\circ", "90", "hendrycks"),
        ("90 degrees", "90", "hendrycks"),
        ("x=5", "5", "hendrycks"),
        ("x \\in [-2,7]", "[-2,7]", "hendrycks"),
        ("864 \\mbox{ inches}^2", "864", "hendrycks"),
        ("5.4 \\text{ cents}", "5.40", "hendrycks"),
        ("3 apples", "3", "hendrycks"),
        ("\\text{Evelyn}", "evelyn", "hendrycks"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\tfrac{\\pi}{2})", "hendrycks"),
        ("11\\sqrt2", "11 \\sqrt{2}", "hendrycks"),
        ("x^{2}+1", "x^2 + 1", "hendrycks"),
        ("3, 5, 7", "3,5,7", "hendrycks"),
        ("1 and -2", "1,-2", "hendrycks"),
        ("(1.50, 2)", "(1.5, 2.0)", "hendrycks"),
        ("{x+1}", "x+1", "hendrycks"),
        ("(x+1)^2", "x^2 + 2x + 1", "symbolic"),
        ("sqrt(2)/2", "\\frac{1}{\\sqrt{2}}", "symbolic"),
        ("3 pi", "3\\pi", "symbolic"),
        ("2, 1", "1, 2", "symbolic"),
        ("50%", "0.5", "symbolic"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix} 1 \\\\ 2.0 \\end{bmatrix}",
         "symbolic"),
    ],
)  # fmt: skip
def test_same_answers(first, second, level):
    levels = [*CHEAP, "symbolic"]
    cheaper = levels[: levels.index(level)]
    for one, other in ((first, second), (second, first)):
        assert equivalent(one, other, level)
        assert not any(equivalent(one, other, below) for below in cheaper)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1", "11"), ("18", "181"), ("1 2", "12"), ("1 1/2", "11/2"), ("-1", "1"), ("0.33", "1/3"),
        ("5 million", "5"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("Evelyn", "Evenly"),
        ("11_2", "11_3"), ("x+1", "x-1"), ("1/0", "1"), ("\\text{(A)}", "\\text{(B)}"),
        ("(1,234)", "1234"),
        ("1.2 \\times 10^{3}", "1.2 \\times 10^{4}"),
    ],
)  # fmt: skip
def test_different_answers(first, second):
    assert not equivalent(first, second)
    assert not equivalent(second, first)


def test_no_answer_is_never_right():
    for nothing in (None, "", "  "):
        assert not equivalent(nothing, "1")
    assert not equivalent("1", " ")
    assert not equivalent("", "")
    with pytest.raises(ConfigError, match="level 'loose': must be one of exact, numeric"):
        equivalent(None, "1", "loose")


def test_what_can_be_graded():
    assert all(gradable(gold) for gold in ("0", "\\frac{1}{2}", "\\text{east}", "\\{1\\}", "[0,1)"))
    assert not any(gradable(gold) for gold in (None, "", " ", "$$", "\\frac{1}{2"))


def test_a_runaway_generation_is_only_its_text():
    asked = symbolic.counts.compared
    for one in ("." * 99, "1", "0.0", "\\boxed{", "The answer is ", "\n", "1,", "A: ", "(", "x^"):
        text = one * 2000
        found = extract(text)
        assert found is None or not equivalent(found, f"{text}.")
        assert equivalent(text, text) == bool(text.strip())
        assert not equivalent(text, f"{text}2")
    assert symbolic.counts.compared == asked


def test_classes_are_numbered_as_they_come():
    answers = ["1/2", None, "x+1", "0.5", " ", "1+x", "\\frac12", "2"]
    assert classes(answers) == [0, None, 1, 0, None, 1, 0, 2]
    assert classes(answers, "hendrycks") == [0, None, 1, 0, None, 2, 0, 3]
    assert classes(answers, "exact") == [0, None, 1, 2, None, 3, 4, 5]
    assert classes([None, ""]) == [None, None]


whole = st.integers(-(10**9), 10**9)


@given(st.text(max_size=40), st.text(max_size=40), st.sampled_from(CHEAP))
def test_comparison_is_reflexive_and_symmetric(first, second, level):
    assert equivalent(first, first, level) == bool(first.strip())
    assert equivalent(first, second, level) == equivalent(second, first, level)
    assert extract(f"The answer is: {first}") is None or extract(
        f"The answer is: {first}", "marker"
    )
    gradable(first)


@given(whole, st.integers(1, 999))
def test_a_number_is_the_same_however_it_is_written(over, under):
    sign = "-" if over < 0 else ""
    ways = [
        f"{over}/{under}",
        f"\\frac{{{over}}}{{{under}}}",
        f"${sign}\\dfrac{{{abs(over)}}}{{{under}}}$",
    ]
    assert {key(way) for way in ways} == {Fraction(over, under)}
    assert key(f"{over:,}") == key(f"{over}.00") == key(f"x = {over}") == over
    assert not equivalent(str(over), str(over + under))


@given(st.lists(st.none() | st.integers(0, 3).map(str) | st.integers(0, 3).map("{}.0".format)))
def test_classes_agree_with_pairs(answers):
    found = classes(answers)
    for one, number in zip(answers, found, strict=True):
        assert (number is None) == (one is None)
        for other, same in zip(answers, found, strict=True):
            if one is not None and other is not None:
                assert (number == same) == equivalent(one, other)
    assert sorted({number for number in found if number is not None}) == list(
        range(len({float(one) for one in answers if one is not None}))
    )


STAND_INS = {
    "hangs": "import sys, time; print('{}', flush=True); time.sleep(600)",
    "dies": "import sys; print('{}', flush=True); sys.stdin.readline()",
    "fails": 'print(\'{"error": "ImportError: none such"}\')',
    "ends": "pass",
}


@pytest.fixture
def stand_in(monkeypatch):
    """A worker that misbehaves; the real one again afterwards."""
    symbolic.close()

    def put(name):
        monkeypatch.setattr(symbolic, "command", lambda: (sys.executable, "-c", STAND_INS[name]))

    yield put
    symbolic.close()


@pytest.mark.parametrize(("name", "counter"), [("hangs", "timed_out"), ("dies", "crashed")])
def test_a_worker_that_fails_is_replaced(stand_in, monkeypatch, caplog, name, counter):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    before = getattr(symbolic.counts, counter)
    with monkeypatch.context() as patch:
        patch.setattr(symbolic, "command", lambda: (sys.executable, "-c", STAND_INS[name]))
        assert not symbolic.same("x", "y", timeout=0.2)
        assert not symbolic.same("x", "x", timeout=0.2)
    assert getattr(symbolic.counts, counter) == before + 2
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
    assert "count as different" in caplog.text
    assert symbolic.same("x+1", "1+x")
    assert started[2].poll() is None
    symbolic.close()
    assert started[2].poll() is not None


@pytest.mark.parametrize(("name", "why"), [("fails", "ImportError: none such"), ("ends", "ended")])
def test_a_worker_that_does_not_start(stand_in, name, why):
    stand_in(name)
    with pytest.raises(ConfigError, match=rf"{why}.*install math-verify\[antlr4-13-2\]"):
        symbolic.same("x", "y")


def test_a_worker_that_gives_no_sign(stand_in, monkeypatch):
    monkeypatch.setattr(symbolic, "START", 0.1)
    monkeypatch.setitem(STAND_INS, "silent", "import time; time.sleep(600)")
    stand_in("silent")
    with pytest.raises(ConfigError, match="gave no sign"):
        symbolic.same("x", "y")


def test_an_interrupt_leaves_no_answer_behind(monkeypatch):
    assert symbolic.same("x", "x")

    def interrupted(self, timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(symbolic._Worker, "next", interrupted)
        with pytest.raises(KeyboardInterrupt):
            symbolic.same("x", "x")
    assert not symbolic.same("x", "y")


def test_threads_share_a_worker():
    pairs = [(f"x + {i}", f"{i + i % 2} + x") for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: equivalent(*pair), pairs))
    assert found == [i % 2 == 0 for i in range(12)]


def test_the_worker_in_this_process():
    questions = [["x+1", "1+x", 5], ["x", "y", 5], ["", "x", 5]]
    answers = io.StringIO()
    symbolic.serve(io.StringIO("".join(f"{json.dumps(one)}\n" for one in questions)), answers)
    ready, *found = (json.loads(line) for line in answers.getvalue().splitlines())
    assert "ready" in ready
    assert [one["same"] for one in found] == [True, False, False]


def test_the_worker_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    answers = io.StringIO()
    symbolic.serve(io.StringIO(""), answers)
    assert json.loads(answers.getvalue())["error"].startswith("ModuleNotFoundError")


def test_a_plain_script_may_compare_and_fork(tmp_path):
    """No guard around the main part, a file that is named like a module, and a process forked."""
    (tmp_path / "random.py").write_text(
        "raise SystemExit('imported a file of the working folder')\n"
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import os
        from mathshepherd import symbolic
        from mathshepherd.answers import equivalent

        assert equivalent("(x+1)^2", "x^2+2x+1")
        if hasattr(os, "fork"):
            child = os.fork()
            if not child:
                assert symbolic._worker is None
                found = equivalent("y+1", "1+y")
                symbolic.close()
                os._exit(0 if found else 1)
            assert os.waitpid(child, 0)[1] == 0
        assert equivalent("z+1", "1+z")
        print(symbolic._worker.process.pid)
        """)
    )
    command = [sys.executable, "-P", str(tmp_path / "script.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not os.path.exists(f"/proc/{done.stdout.strip()}")  # noqa: PTH110


def rows(folder, name):
    with gzip.open(folder / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.realdata
@pytest.mark.untraced
def test_math_answers_are_found_and_equal_themselves(data_folder):
    found = rows(data_folder, "math/math500.jsonl.gz")
    assert len(found) == 500
    for row in found:
        assert extract(row["solution"], "boxed") == row["answer"]
        assert extract(row["solution"]) == row["answer"]
        assert gradable(row["answer"])
        assert equivalent(row["answer"], row["answer"])


#: Ways of writing an answer of MATH otherwise, and to how many of the 500 they apply.
VARIANTS = {
    "dfrac": lambda text: text.replace("\\frac", "\\dfrac"),
    "tfrac": lambda text: re.sub(r"\\d?frac", r"\\tfrac", text),
    "dollars": lambda text: f"${text}$",
    "parentheses": lambda text: f"\\({text}\\)",
    "full stop": lambda text: f"{text}.",
    "blanks": lambda text: re.sub(r"([-+=,()])", r" \1 ", text),
    "no blanks": lambda text: re.sub(r"(?<![A-Za-z]) (?![A-Za-z])", "", text),
    "thin blanks": lambda text: text.replace(" ", "\\,"),
    "left, right": lambda text: re.sub(r"(?<![ft])\(([^()]*)\)", r"\\left(\1\\right)", text),
    "without \\text": lambda text: re.sub(r"\\text\{([^{}]*)\}", r"\1", text),
    "units": lambda text: re.sub(r"\A[-\d./\\fracsqtpi{} ]+\Z", r"\g<0>\\text{ units}", text),
    "x =": lambda text: text if re.search(r"=|\\in", text) else f"x = {text}",
}  # fmt: skip


@pytest.mark.realdata
@pytest.mark.untraced
def test_math_answers_written_otherwise_are_the_same(data_folder):
    answers = [row["answer"] for row in rows(data_folder, "math/math500.jsonl.gz")]
    failed = {
        (name, answer)
        for name, vary in VARIANTS.items()
        for answer in answers
        if not equivalent(vary(answer), answer)
    }
    assert not failed


@pytest.mark.realdata
@pytest.mark.untraced
def test_different_math_answers_are_different(data_folder):
    """Of pairs drawn at random; those that are written otherwise but worth the same share a key."""
    answers = sorted({row["answer"] for row in rows(data_folder, "math/math500.jsonl.gz")})
    draw = random.Random(5)
    pairs = [draw.sample(answers, 2) for _ in range(60)]
    assert [pair for pair in pairs if equivalent(*pair) and key(pair[0]) != key(pair[1])] == []
    numbers = [answer for answer in answers if re.fullmatch(r"-?\d+", answer)]
    assert classes(numbers) == list(range(len(numbers)))


@pytest.mark.realdata
@pytest.mark.untraced
def test_grades_agree_with_gsm8k(data_folder):
    asked = symbolic.counts.compared
    agreed = []
    for row in rows(data_folder, "gsm8k/example_model_solutions.jsonl.gz"):
        gold = extract(row["ground_truth"])
        assert gold is not None
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            right = equivalent(extract(row[name]["solution"]), gold)
            agreed.append(right == row[name]["is_correct"])
    assert len(agreed) == 5276
    assert sum(agreed) >= 5275
    assert symbolic.counts.compared - asked < 20
