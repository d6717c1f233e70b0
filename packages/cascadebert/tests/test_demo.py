import functools
import json

import pytest
from cascadebert import measure
from cascadebert.demo import REAL, exceptions, judge
from cascadebert.measure import Found
from cascadebert.report import mean_rows
from octavo.cli import run
from octavo.report import load_claims

#: Numbers like those of a full run, on which every claim holds.
GOOD = {
    "accuracy 2x32": 91.2, "accuracy 1x64": 85.0, "accuracy 6x64": 93.8,
    "cascade 2x32 at 2": 93.8, "cascade 2x32 at 3": 93.7, "cascade 2x32 at 4": 93.3,
    "cascade 1x64 at 2": 92.1, "cascade 1x64 at 3": 89.9, "cascade 1x64 at 4": 88.0,
    "DeeBERT entropy at 3": 80.9, "DeeBERT confidence at 3": 81.4,
    "DeeBERT entropy at 4": 74.5, "DeeBERT confidence at 4": 76.6,
    "joint entropy at 2": 93.6, "joint confidence at 2": 93.7,
    "joint entropy at 3": 91.0, "joint confidence at 3": 90.8,
    "joint entropy at 4": 86.3, "joint confidence at 4": 86.7,
    "random at 4": 91.6, "reached 3": 2.98, "reached 4": 3.9,
    "DIS complete 1x64": 82.1, "DIS complete 2x32": 86.8, "DIS DeeBERT 1": 68.7, "DIS DeeBERT 2": 69.3,
    "exited 1 complete": 91.9, "exited 1 first k layers": 92.9, "exited 1 DeeBERT": 75.9,
    "DIS plain": 78.1, "DIS folds": 81.0, "ECE plain": 8.9, "ECE folds": 5.0, "ECE plain scaled": 1.7,
    "violations ltt": 8.5,
}  # fmt: skip

WORSE = [
    {"cascade 2x32 at 3": 89.0},
    {"DeeBERT confidence at 4": 82.0},
    {"cascade 1x64 at 3": 84.0},
    {"cascade 1x64 at 4": 83.0},
    {"joint confidence at 3": 92.0},
    {"joint entropy at 4": 88.0},
    {"accuracy 6x64": 95.0},
    {"accuracy 2x32": 93.0},
    {"random at 4": 93.0},
    {"DIS DeeBERT 1": 75.0},
    {"exited 1 DeeBERT": 88.0},
    {"DIS folds": 78.5},
    {"ECE folds": 6.5},
    {"violations ltt": 30.0},
    {"reached 4": 3.6},
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The quick demo, once."""
    from cascadebert.cli import app

    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:  # no claim is about the clock: one try is enough
        patch.setattr(measure, "_clock", functools.partial(measure._clock, tries=1))
        return run(app, ["demo", "--out", str(out), "--seeds", "0", "--quiet"]), out


@pytest.mark.untraced
def test_the_quick_demo_shows_the_claims(report):
    code, out = report
    claims = load_claims(out)["claims"]
    verdicts = [claim["verdict"] for claim in claims]
    assert verdicts.count("PASS") == 8, claims
    assert verdicts.count("not shown at this size") == 2
    assert code == 0
    page = (out / "report.html").read_text()
    for claim in claims:
        assert claim["measured"].split()[0] in page
    for part in range(1, 8):
        assert f"<h2>{part}. " in page
    assert page.count("data:image/png") == 5
    assert (out / "report.md").read_text().count("| PASS |") == 8
    assert json.loads((out / "environment.json").read_text())["status"] == "finished"


def test_a_second_demo_does_not_overwrite_the_first(report, command):
    _, out = report
    code, _, err = command("demo", "--out", out)
    assert code == 2
    assert "holds a finished run" in err


def test_each_claim_can_fail():
    claims = judge([GOOD])
    assert [claim.passed for claim in claims] == [True] * len(WORSE)
    for number, worse in enumerate(WORSE):
        verdicts = [claim.passed for claim in judge([GOOD | worse])]
        assert verdicts[number] is False, claims[number]


def test_claims_are_judged_on_means():
    bad = GOOD | {"violations ltt": 22.0}
    assert judge([GOOD, bad])[13].measured.startswith("15 %")
    assert judge([GOOD, GOOD, bad])[13].passed
    assert not judge([GOOD, bad, bad])[13].passed
    assert REAL.violations == 15


def test_the_exception_is_told_as_it_was_measured():
    told = exceptions([Found(GOOD, {}, {})])
    assert "beat it at 2x (93.7 against 92.1 %) and beat it at 3x (91.0 against 89.9 %)" in told
    other = exceptions([Found(GOOD | {"cascade 1x64 at 3": 92.0}, {}, {})])
    assert "do not beat it at 3x (91.0 against 92.0 %)" in other


def test_the_exceptions_turn_with_the_numbers():
    assert "what the regularization adds is order" in exceptions([Found(GOOD, {}, {})])
    turned = GOOD | {"ECE folds": 1.0, "exited 1 complete": 95.0}
    told = exceptions([Found(turned, {}, {})])
    assert "here the regularization calibrates better" in told
    assert "completeness gains nothing" not in told
    quick = {key: value for key, value in GOOD.items() if "joint" not in key}
    assert "--profile full only" in exceptions([Found(quick, {}, {})])


def test_tables_of_seeds_become_means():
    first = [{"method": "a", "target": 2.0, "accuracy %": 90.0, "p against b": 0.1, "items": 3}]
    second = [{"method": "a", "target": 2.0, "accuracy %": 92.0, "p against b": 0.9, "items": 5}]
    (row,) = mean_rows([first, second])
    assert row == {"method": "a", "target": 2.0, "accuracy %": 91.0, "p against b": 0.1, "items": 3}


def test_a_folder_without_a_dictionary(command, tmp_path):
    code, _, err = command("demo", "--data", tmp_path, "--out", tmp_path / "out")
    assert (code, "holds no cmudict.dict" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "cmudict.dict.gz").write_bytes(b"no gzip")
    code, _, err = command("demo", "--data", tmp_path, "--out", tmp_path / "out")
    assert (code, "cannot be read" in err) == (2, True)
    (tmp_path / "cmudict.dict.gz").unlink()
    (tmp_path / "cmudict.dict").write_text("abc\n")
    code, _, err = command("demo", "--data", tmp_path, "--out", tmp_path / "out")
    assert (code, "holds no word with its pronunciation" in err) == (2, True)
