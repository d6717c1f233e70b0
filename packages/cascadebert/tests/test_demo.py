import json

import pytest
from cascadebert.demo import MARGINS, judge
from octavo.cli import run
from octavo.report import load_claims

GOOD = {"small": 91.0, "large": 95.0, "cascade": 94.5, "chance": 92.0, "speedup": 3.1, "dis": 88.0}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The quick demo, once."""
    from cascadebert.cli import app

    out = tmp_path_factory.mktemp("demo") / "run"
    return run(app, ["demo", "--out", str(out), "--seeds", "0", "--quiet"]), out


def test_the_quick_demo_shows_the_claims(report):
    code, out = report
    claims = load_claims(out)["claims"]
    assert [claim["verdict"] for claim in claims] == ["PASS"] * 5, claims
    assert code == 0
    page = (out / "report.html").read_text()
    for claim in claims:
        assert claim["measured"].split()[0] in page
    assert page.count("data:image/png") == 1
    assert (out / "report.md").read_text().count("PASS") == 5
    assert json.loads((out / "environment.json").read_text())["status"] == "finished"


def test_a_second_demo_does_not_overwrite_the_first(report, command):
    _, out = report
    code, _, err = command("demo", "--out", out)
    assert code == 2
    assert "holds a finished run" in err


def test_each_claim_can_fail():
    assert all(claim.passed for claim in judge([GOOD]))
    for number, worse in enumerate([
        {"cascade": GOOD["large"] - MARGINS.loss_against_large - 0.1},
        {"small": GOOD["cascade"]},
        {"chance": GOOD["cascade"]},
        {"dis": 50.0},
        {"speedup": 2.0},
    ]):  # fmt: skip
        assert judge([GOOD | worse])[number].passed is False


def test_claims_are_judged_on_means():
    bad = GOOD | {"dis": 60.0}
    assert judge([GOOD, bad])[3].measured == "DIS 74.0"
    assert judge([GOOD, bad])[3].passed
    assert not judge([GOOD, bad, bad])[3].passed
