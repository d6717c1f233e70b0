"""The page of one prompt's flow: what stands in it, what a browser makes of it, and its command."""

import base64
import html
import json
import re

import numpy as np
import pytest
import torch
from anchors import flow_page, saliency, saliency_matrices
from anchors.config import Task
from anchors.prompts import Prompt, build_prompt
from anchors.view import MOST_TOKENS, token_texts
from octavo.errors import ConfigError, ModelError
from octavo.models import save_model

OWN = ("--template", "Review: {text}\\nMood:{label}", "--labels", "good", "--labels", "bad",
       "--labels", "middling", "--samples", "6", "--device", "cpu", "--quiet")  # fmt: skip

HARM = """<img src=x onerror="document.title='harmed'">"""
TOKENS = ["Text", " fine", " good", "\n", "</script><script>document.title='harmed'</script>", HARM,
          " <!--@DATA@", ":"]  # fmt: skip
PROMPT = Prompt(tuple(range(8)), ((2,), (5,)), (0, 1), (0, 3), 6, 7, (1, 2))
SCORES = {"good": 0.75, HARM: 0.25}


def planted(layers=3, size=8):
    """Flows over nine decades, with the strongest edge of each layer where it is known."""
    flows = 10 ** np.random.default_rng(0).uniform(-9, -1, (layers, size, size))
    flows *= np.tri(size, k=-1)
    for layer in range(layers):
        flows[layer, 5, layer] = 0.5 / (layer + 1)
    flows[1, 4] = 0
    return flows


def embedded(page):
    """The data of a page, its flows as matrices."""
    data = json.loads(inner(page, r'<script type="application/json" id="data">(.*?)</script>'))
    size = len(data["tokens"])
    flows = np.zeros((len(data["flows"]), size, size))
    for layer, packed in enumerate(data["flows"]):
        halves = np.frombuffer(base64.b64decode(packed["halves"]), "<f2")
        flows[layer][np.tril_indices(size, -1)] = packed["unit"] * halves.astype(float)
    return data | {"flows": flows}


def test_the_page_holds_the_numbers():
    flows = planted()
    data = embedded(flow_page(TOKENS, flows, PROMPT, "A title", SCORES))
    np.testing.assert_allclose(data["flows"], flows, rtol=5e-4)
    assert data["tokens"] == TOKENS
    assert data["scores"] == [[word, value] for word, value in SCORES.items()]
    kinds = ["format", "", "label of good", "format", "", f"label of {HARM}", "", "target"]
    assert data["kinds"] == kinds
    s_wp = (flows[0, 2, :2].sum() + flows[0, 5, :5].sum()) / 7
    assert data["parts"]["S_wp"][0] == pytest.approx(s_wp, rel=5e-3)
    assert data["parts"]["S_pq"][2] == pytest.approx(flows[2, 7, [2, 5]].mean(), rel=5e-3)


def test_the_parts_are_those_of_saliency(family, prompts, tokenizer):
    model = family("gpt2")
    flows = saliency_matrices(model, prompts[0], 1)
    texts = token_texts(tokenizer, prompts[0].input_ids)
    data = embedded(flow_page(texts, flows, prompts[0], "", {"good": 1.0}))
    np.testing.assert_allclose(data["flows"], flows, rtol=6e-4, atol=1e-9 * float(flows.max()))
    parts = np.array([data["parts"][name] for name in ("S_wp", "S_pq", "S_ww")]).T
    np.testing.assert_allclose(parts, saliency(model, [prompts[0]], [1])[0], rtol=6e-3)


@pytest.mark.parametrize(
    ("tokens", "change", "error", "named"),
    [
        (TOKENS[1:], lambda flows: flows, ConfigError, "7 tokens"),
        (TOKENS, lambda flows: flows[:, 1:, 1:], ConfigError, "flows of 7"),
        (TOKENS, lambda flows: flows * np.nan, ModelError, "NaN"),
        (TOKENS, lambda flows: -flows, ModelError, "negative"),
    ],
)
def test_parts_that_do_not_fit(tokens, change, error, named):
    with pytest.raises(error, match=named):
        flow_page(tokens, change(planted()), PROMPT, "", SCORES)


def test_a_prompt_too_long_to_show():
    size = MOST_TOKENS + 1
    prompt = Prompt(tuple(range(size)), ((1,),), (0,), (), 2, size - 1, (1,))
    with pytest.raises(ConfigError, match=f"{size} tokens and a page shows {MOST_TOKENS}"):
        flow_page(["a"] * size, torch.zeros(1, size, size), prompt, "", {"good": 1.0})


def test_a_prompt_too_long_to_show_from_the_command_line(
    command, family, tokenizer, rows, tmp_path
):
    long = family("llama", max_position_embeddings=2000)
    save_model(tmp_path / "model", long, tokenizer)
    words = ("view", tmp_path / "model", "--train-data", rows, "--data", rows, *OWN)
    code, _, err = command(*words, "--text", "film " * 700)
    assert code == 2
    assert f"a page shows {MOST_TOKENS}" in err


@pytest.mark.parametrize("text", ["a fine film", "é ü 漢字 🎬", "two  spaces\nand a line"])
def test_texts_of_tokens_make_the_prompt(tokenizer, text):
    task = Task("Review: {text}\nMood:{label}", (" good", " bad"))
    prompt = build_prompt(task, tokenizer, [(text, 0)], text)
    texts = token_texts(tokenizer, prompt.input_ids)
    assert len(texts) == len(prompt)
    whole = f"Review: {text}\nMood: good\nReview: {text}\nMood:"
    assert "".join(texts).replace("�", "").endswith(whole)


DRIVER = """<script>
const seen = [];
const look = what => seen.push([what, find("which").textContent, find("edges").innerText]);
const press = key => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
look("start");
spans[4].click(); look("click");
spans[6].dispatchEvent(new PointerEvent("pointerover", {bubbles: true})); look("hover");
text.dispatchEvent(new PointerEvent("pointerleave")); look("leave");
spans[4].focus(); press("ArrowRight"); look("right");
press("ArrowUp"); look("up");
press("o"); look("out");
find("mean").click(); look("mean");
document.querySelector("[value=into]").click(); look("into");
find("layer").value = 2; find("layer").dispatchEvent(new Event("input")); find("mean").click();
look("slider");
document.body.append(make("pre", null, JSON.stringify(seen)));
document.body.lastChild.id = "seen";
</script></body>"""


def test_a_browser_shows_it_and_no_token_does_harm(visit, tmp_path):
    flows = planted()
    file = tmp_path / "view.html"
    file.write_text(flow_page(TOKENS, flows, PROMPT, f"Title {HARM}", SCORES, HARM), "utf-8")
    dom, messages, requests = visit(file)
    assert (messages, requests) == ([], [])
    assert f"<title>Title {html.escape(HARM, quote=False)}</title>" in dom
    assert dom.count("<script") == 2
    assert "<img" not in dom
    tokens = re.findall(r'<span data-token="(\d+)"[^>]*>(.*?)</span>', dom, re.DOTALL)
    shown = [html.unescape(words).replace("⏎", "") for _, words in tokens]
    assert shown == TOKENS
    first = table(dom, "strongest")[1]
    assert first[:2] == ["Text 0", f"{HARM} 5"]
    assert float(first[2]) == pytest.approx(0.5)
    best = int(flows[0, 7].argmax())
    assert table(dom, "edges")[1][0].endswith(f" {best}")
    strengths = re.findall(r'data-token="(\d+)"[^>]*--strength: ([\d.]+)', dom)
    assert {int(place): float(value) for place, value in strengths} == pytest.approx(
        {place: np.sqrt(flows[0, 7, place] / 0.5) for place in range(7)}, abs=1e-3
    )
    assert re.search(r'id="here"[^>]*visibility="visible" x1="46"', dom)


def test_pointer_and_keys_change_what_is_shown(visit, tmp_path):
    flows = planted()
    page = flow_page(TOKENS, flows, PROMPT, "", SCORES)
    page = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", page)
    file = tmp_path / "driven.html"
    file.write_text(page.replace("</body>", DRIVER), "utf-8")
    dom, messages, _ = visit(file)
    assert messages == []
    seen = json.loads(html.unescape(inner(dom, r'<pre id="seen">(.*?)</pre>')))
    mean = flows.mean(0)
    expected = {
        "start": ("0 of", "into", 7, flows[0, 7]), "click": ("0 of", "into", 4, flows[0, 4]),
        "hover": ("0 of", "into", 6, flows[0, 6]), "leave": ("0 of", "into", 4, flows[0, 4]),
        "right": ("0 of", "into", 5, flows[0, 5]), "up": ("1 of", "into", 5, flows[1, 5]),
        "out": ("1 of", "out of", 5, flows[1, :, 5]), "mean": ("mean", "out of", 5, mean[:, 5]),
        "into": ("mean", "into", 5, mean[5]), "slider": ("2 of", "into", 5, flows[2, 5]),
    }  # fmt: skip
    assert [name for name, *_ in seen] == list(expected)
    for name, layer, words in seen:
        where, way, token, values = expected[name]
        assert layer.startswith(where), name
        assert f"Flow {way} " in words, name
        assert f"(token {token}" in words, name
        found = [float(value) for value in re.findall(r"\t([\d.e-]+)\t[\d.]+ %", words)]
        np.testing.assert_allclose(found, np.sort(values[values > 0])[::-1], rtol=6e-3)


def inner(page, pattern):
    """What stands in the first element that fits."""
    found = re.search(pattern, page, re.DOTALL)
    assert found
    return found[1]


def table(dom, name):
    """The rows of a table in the page, as texts."""
    rows = re.findall(
        r"<tr>(.*?)</tr>", inner(dom, rf'<table id="{name}">(.*?)</table>'), re.DOTALL
    )
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub("<[^>]*>", "", one)) for one in row] for row in cells]


def test_the_command_writes_the_page(command, saved, rows, tmp_path):
    words = ("view", saved, "--train-data", rows, "--data", rows, *OWN, "--number", "2")
    code, printed, err = command(*words, "--json")
    assert code == 0, err
    tables = {key: rows for key, rows in json.loads(printed).items() if key not in ("note", "no")}
    assert sum(row["probability"] for row in tables["Label words"]) == pytest.approx(1)
    assert len(tables["Strongest edges"]) == 9
    out = tmp_path / "out"
    code, printed, err = command(*words, "--out", out)
    assert code == 0, err
    assert str(out / "view.html") in printed
    assert json.loads((out / "result.json").read_text())["tables"] == tables
    page = (out / "view.html").read_text("utf-8")
    assert f"text 2 of {rows}" in page
    assert "The loss is that of the true label, " in page
    data = embedded(page)
    best = max((row for row in tables["Strongest edges"] if row["layer"] == 1),
               key=lambda row: row["saliency"])  # fmt: skip
    to, source = (int(best[end].partition(":")[0]) for end in ("to", "from"))
    assert data["flows"][1].max() == data["flows"][1, to, source]
    assert data["flows"][1, to, source] == pytest.approx(best["saliency"], rel=1e-3)
    assert "".join(data["tokens"]).endswith("\nMood:")
    assert command(*words, "--out", out)[0] == 2
    assert command(*words, "--out", out, "--overwrite")[0] == 0


def test_a_text_of_ones_own(command, saved, rows, tmp_path):
    out = tmp_path / "out"
    words = ("view", saved, "--train-data", rows, "--data", rows, *OWN, "--out", out)
    code, _, err = command(*words, "--text", "so <so> good")
    assert code == 0, err
    page = (out / "view.html").read_text("utf-8")
    data = embedded(page)
    assert "".join(data["tokens"]).endswith("\nReview: so <so> good\nMood:")
    best = max(data["scores"], key=lambda one: one[1])[0]
    assert f"the model&#x27;s own prediction, {best}. No true label is known." in page


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("--number", "6"), "--number 6: the texts drawn have numbers 0 to 5"),
        (("--number", "-1"), "--number -1"),
        (("--text", " "), "--text: is empty"),
        (("--text", "film " * 300), "the model takes 256"),
        (("--data", "nowhere.tsv"), "nowhere.tsv"),
    ],
)
def test_wrong_input_is_one_line(command, saved, rows, tmp_path, changes, named):
    given = {"--train-data": rows, "--data": rows, "--out": tmp_path / "out"} | dict([changes])
    words = [word for pair in given.items() for word in pair]
    code, printed, err = command("view", saved, *words, *OWN)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    assert named in err
    assert not (tmp_path / "out").exists()
