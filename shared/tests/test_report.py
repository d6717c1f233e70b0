import base64
import os
import re
import shutil
import subprocess

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


def test_a_browser_draws_it_without_a_word_or_a_request(saved, tmp_path):
    dom, messages, requests = visit(saved, tmp_path / "one")
    assert "<h1>A &lt;title&gt;</h1>" in dom
    assert (messages, requests) == ([], [])
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:40999/x.png"><script>console.log("a word")</script>')
    _, messages, requests = visit(bad, tmp_path / "two")
    assert any("a word" in message for message in messages)
    assert requests == ["http://127.0.0.1:40999/x.png"]


def visit(page, folder):
    """The page as Chromium sees it, what it said, and what it asked the network for."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    folder.mkdir()
    log = folder / "net.json"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
         f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr",
         "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = re.findall(
        r'"initiator":"(?!not an origin)[^"]*".*?"url":"(https?:[^"]*)"', log.read_text()
    )
    return done.stdout, messages, sorted(set(asked))
