import base64
import re

import pytest
from matplotlib.figure import Figure
from octavo.report import Claim, Report, load_claims, markdown_table, save_claims

CLAIMS = [
    Claim("a < b", "1 < 2", "below", True),
    Claim("c > d", "1 > 2", "above", False),
    Claim("e", "nothing", "too small a model", None),
]


@pytest.fixture
def saved(tmp_path):
    report = Report("A <title>")
    report.heading("Section")
    report.text("Words & <b>no tags</b>.")
    report.table("Numbers", [{"name": "x|y", "value": 0.123456}, {"name": "z", "more": None}])
    report.claims(CLAIMS)
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([1, 2])
    report.figure('A "line"', figure)
    return report.save(tmp_path / "report")


def test_both_forms_hold_everything(saved):
    page = saved.read_text()
    assert "A &lt;title&gt;" in page
    assert "&lt;b&gt;no tags" in page
    assert '<td class="n">0.1235</td>' in page
    assert '<td class="PASS">PASS</td>' in page
    assert '<td class="FAIL">FAIL</td>' in page
    assert "not shown at this size" in page
    text = (saved.parent / "report.md").read_text()
    assert "| x\\|y | 0.1235 |  |" in text
    assert "![A" in text
    image = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert image
    assert base64.b64decode(image[1]) == (saved.parent / "figure-1.png").read_bytes()


def test_the_page_needs_nothing_else(saved):
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', saved.read_text()) == []
    assert "://" not in saved.read_text()


def test_claims_survive_a_file(tmp_path):
    save_claims(CLAIMS, 12.34, tmp_path)
    content = load_claims(tmp_path)
    assert content["seconds"] == 12.3
    verdicts = [claim["verdict"] for claim in content["claims"]]
    assert verdicts == ["PASS", "FAIL", "not shown at this size"]


def test_markdown_of_ragged_rows():
    table = markdown_table([{"a": 1}, {"b": True}])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| 1 |  |", "|  | yes |"]


def test_a_browser_draws_it_without_a_word_or_a_request(saved, visit, tmp_path):
    dom, messages, requests = visit(saved)
    assert "<h1>A &lt;title&gt;</h1>" in dom
    assert (messages, requests) == ([], [])
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:40999/x.png"><script>console.log("a word")</script>')
    _, messages, requests = visit(bad)
    assert any("a word" in message for message in messages)
    assert requests == ["http://127.0.0.1:40999/x.png"]
