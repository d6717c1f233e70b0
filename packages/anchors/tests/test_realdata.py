"""Prompts of the real sets, in the paper's templates."""

import gzip
import json
from dataclasses import replace
from itertools import islice

import pytest
from anchors import real
from anchors.analyses import flow_rows
from anchors.config import PromptOptions
from anchors.data import build_prompts
from octavo.tiny import Shape, make_tokenizer


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("task", "train", "test"),
    [
        ("sst2", "sst2_train.tsv.gz", "sst2_validation.tsv.gz"),
        ("trec", "trec_train.tsv.gz", "trec_test.tsv.gz"),
        ("agnews", "agnews_train_5000.tsv.gz", "agnews_test.tsv.gz"),
    ],
)
def test_label_words_are_where_they_are_said_to_be(data_folder, family, task, train, test):
    options = PromptOptions(
        train_data=str(data_folder / train), data=str(data_folder / test), task=task, samples=20
    )
    texts = (
        "".join(options.chosen_task().labels)
        + "Review: Question: Article: Sentiment: Answer Type:\n"
    )
    shape = Shape(kind="llama", alphabet="bpe", vocabulary=400)
    tokenizer = make_tokenizer([texts * 20], shape)
    prompts, labels = build_prompts(options, tokenizer, 0, 10_000)
    assert len(prompts) == len(labels) == 20
    words = options.chosen_task().labels
    for prompt in prompts:
        for kind, places in zip(prompt.classes, prompt.labels, strict=True):
            assert (
                str(tokenizer.decode([prompt.input_ids[p] for p in places])).strip()
                == words[kind].strip()
            )
        assert sorted(prompt.classes) == list(range(len(words)))
    rows = flow_rows(
        family("llama", max_position_embeddings=4096), prompts[:2], labels[:2], batch_size=1
    )
    assert all(row["S_pq"] > 0 for row in rows)


@pytest.mark.realdata
def test_the_demo_on_the_folder(data_folder, command, tmp_path, monkeypatch):
    """Every set is found, a stand-in is made, and what it cannot show is not claimed.

    Of each file the beginning; the whole is read above.
    """
    folder = tmp_path / "sets"
    folder.mkdir()
    for file in data_folder.glob("*.tsv.gz"):
        with gzip.open(file, "rt", encoding="utf-8") as rows:
            beginning = "".join(islice(rows, 1000))
        (folder / file.name).write_bytes(gzip.compress(beginning.encode()))
    monkeypatch.setitem(real.SAMPLES, "quick", 12)
    monkeypatch.setattr(real, "STAND_IN", replace(real.STAND_IN, pretrain_epochs=0))
    monkeypatch.setattr(real, "ROWS", 400)
    out = tmp_path / "out"
    code, printed, err = command(
        "demo", "--data", folder, "--out", out, "--device", "cpu", "--quiet"
    )
    assert code == 3, err
    assert "Claims, 3 sets" in printed
    claims = json.loads((out / "claims.json").read_text())["claims"]
    assert [claim["verdict"] for claim in claims] == ["FAIL", *["not shown at this size"] * 8]
    for task in ("sst2", "agnews", "trec"):
        tables = json.loads((out / f"{task}-0.json").read_text())["tables"]
        assert {*tables} == {"Accuracy", "Saliency", "Isolation", "Reading", "Compression"}
    assert (out / "report.html").read_text().count("<img") == 12
