"""Each command as its user calls it: what it leaves on disk, what it prints, and that both are true."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formbert.authors import theirs
from formbert.config import PRESETS
from formbert.data import read_instances, write_instances
from formbert.inventory import Inventory
from formbert.lexicon import mini_instances, mini_inventory
from formbert.modeling import FormBertBi, load
from safetensors.torch import save_file

QUICK = ("--max-length", 48, "--device", "cpu", "--quiet")
BRIEF = ("--epochs", 1, "--learning-rate", "2e-3", "--warmup", 0, "--batch-size", 12)


@pytest.fixture
def call(command):
    """Run a command that must succeed; gives what it prints as JSON."""

    def done(*words):
        code, out, err = command(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return done


@pytest.fixture(scope="module")
def few(files, tmp_path_factory):
    """So few rows that a training takes no time: 24 to learn from, 12 to choose by."""
    place = tmp_path_factory.mktemp("few")
    for name, every in (("train", 10), ("dev", 5)):
        rows = read_instances(getattr(files, name))[::every][:24]
        write_instances(place / f"{name}.jsonl", rows)
    return SimpleNamespace(
        train=place / "train.jsonl", dev=place / "dev.jsonl", senses=files.senses
    )


@pytest.fixture
def training(few, encoder, tmp_path):
    """The words of a training on the few rows, but for the name of its folder."""
    return ("train", encoder, "--train-data", few.train, "--held-out-data", few.dev,
            "--inventory", few.senses, *QUICK)  # fmt: skip


@pytest.fixture(scope="module")
def judged(taught, files, tmp_path_factory):
    """Folders of the evaluations of both models and of a rule."""
    from formbert.cli import app
    from octavo.cli import run

    place = tmp_path_factory.mktemp("judged")
    for name, model in (*taught.items(), ("first", "first-sense")):
        words = ("evaluate", model, "--test-data", files.test, "--inventory", files.senses,
                 "--out", place / name, "--device", "cpu", "--quiet")  # fmt: skip
        assert run(app, [str(word) for word in words]) == 0
    return place


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def polysemous(rows):
    return next(row for row in rows if row["subset"] == "polysemous")


def asked(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_train_leaves_a_model_that_answers_as_well_as_it_says(call, few, training, tmp_path):
    out = tmp_path / "run"
    printed = call(*training, *BRIEF, "--out", out)
    rows = json.loads((out / "evaluation.json").read_text())
    assert printed["Development data"] == rows
    assert printed["note"] == f"Model: {out / 'model'}"
    held = read_instances(few.dev)
    told = tmp_path / "told.jsonl"
    call("predict", out / "model", few.dev, "--inventory", few.senses, "--out", told, "--quiet")
    right = [row["sense_id"] in one.gold for row, one in zip(rows_of(told), held, strict=True)]
    assert polysemous(rows)["accuracy"] == pytest.approx(100 * np.mean(right))
    assert polysemous(rows)["n"] == len(held)
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "environment.json", "evaluation.json", "metrics.jsonl", "model",
    }  # fmt: skip
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert "| polysemous | 13 |" in card or f"| polysemous | {len(held)} |" in card
    assert "--max-length | 48" in card


def test_a_tenth_of_the_texts_is_held_out_by_itself(call, few, encoder, tmp_path):
    """And rows of other parts are neither learnt from nor chosen by."""
    rows = rows_of(few.train)
    for row in rows[18:]:
        row |= {"split": "test", "gold": []}  # a training on these would stop
    data = tmp_path / "parts.jsonl"
    data.write_text(
        "".join(json.dumps(row | {"split": row.get("split", "train")}) + "\n" for row in rows)
    )
    words = ("train", encoder, "--train-data", data, "--inventory", few.senses, *QUICK, *BRIEF)
    printed = call(*words, "--out", tmp_path / "run")["Development data"]
    assert next(row["n"] for row in printed if row["subset"] == "all") == 18 // 10


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "best"])
def test_presets_train_and_answer(call, few, training, tmp_path, preset):
    out = tmp_path / "run"
    call(*training, "--preset", preset, "--out", out)
    model, _ = load(out / "model")
    for name, value in PRESETS[preset].items():
        assert getattr(model.options, name, value) == value
    taught = [row for row in rows_of(out / "metrics.jsonl") if "train_runtime" in row]
    assert taught[-1]["epoch"] == PRESETS[preset]["epochs"]
    found = call("evaluate", out / "model", "--test-data", few.dev, "--inventory", few.senses,
                 "--out", tmp_path / "told", "--device", "cpu", "--quiet")  # fmt: skip
    chosen = json.loads((out / "evaluation.json").read_text())
    now = polysemous(found["Accuracy, %"])
    assert now["accuracy"] == pytest.approx(polysemous(chosen)["accuracy"])


WAYS = {
    "pair": ("--objective", "pair"),
    "in-batch": ("--objective", "in-batch", "--arch", "bi"),
    "listnet": ("--objective", "listnet"),
    "listmle": ("--objective", "listmle", "--arch", "bi"),
    "balanced": ("--balanced",),
    "gloss noise": ("--gloss-noise", 2),
    "rank weight": ("--rank-weight", 0.5, "--objective", "pair"),
    "no fusion": ("--fusion", "none", "--predictor", "none", "--formation-weight", 0),
    "pooled_add": ("--fusion", "pooled_add", "--formation-source", "annotation"),
    "pooled_mlp": ("--fusion", "pooled_mlp", "--formation-source", "soft"),
    "bilinear": ("--fusion", "bilinear", "--fusion", "token", "--predictor", "mean"),
    "matrix": ("--fusion", "matrix", "--arch", "bi", "--similarity", "dot"),
    "parts of speech": ("--signal", "pos", "--gloss-pos"),
    "predicted": ("--formation-source", "predicted", "--marking", "special"),
    "marks": ("--marking", "mask", "--morphemes", "--dropout", 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(call, few, training, encoder, tmp_path, way):
    """Each takes steps that move the encoder, and leaves a model that answers."""
    out = tmp_path / "run"
    call(*training, *WAYS[way], *BRIEF, "--out", out)
    model, _ = load(out / "model")
    (loss,) = [row["train_loss"] for row in rows_of(out / "metrics.jsonl") if "train_loss" in row]
    assert 0 < loss < 100
    from octavo.models import load_model
    from transformers import AutoModel

    plain = load_model(AutoModel, encoder, new=["pooler"], unused=[r"cls\."])
    name = "encoder.layer.0.attention.self.value.weight"
    assert not torch.equal(model.encoder.state_dict()[name], plain.state_dict()[name])
    told = tmp_path / "told.jsonl"
    call("predict", out / "model", few.dev, "--inventory", few.senses, "--out", told, "--quiet")
    for row in rows_of(told):
        assert sum(one["probability"] for one in row["candidates"]) == pytest.approx(1, abs=1e-4)


def test_formations_of_words_without_annotation(call, files, taught, tmp_path):
    """A lexicon's and a predictor's are told where the inventory has none."""
    bare = [one.row() | {"formation": None} for one in mini_inventory()["存款"]]
    senses, lexicon = tmp_path / "bare.jsonl", tmp_path / "lexicon.tsv"
    senses.write_text("".join(json.dumps(row) + "\n" for row in bare))
    lexicon.write_text("word\tformation\n存款\t定中\n", encoding="utf-8")
    call("formation", "--train-data", files.senses, "--out", tmp_path / "predictor", "--quiet")
    question = tmp_path / "question.txt"
    question.write_text("他去银行存款。\t存款\n", encoding="utf-8")

    def told(*words):
        call("predict", taught["bi"], question, "--inventory", senses, *words,
             "--out", tmp_path / "told.jsonl", "--overwrite", "--quiet")  # fmt: skip
        (row,) = rows_of(tmp_path / "told.jsonl")
        return sorted((one["sense_id"], one["formation"]) for one in row["candidates"])

    assert told() == [("存款_01", ""), ("存款_02", "")]
    assert told("--formation-lexicon", lexicon) == [("存款_01", "定中"), ("存款_02", "定中")]
    by_gloss = told("--formation-predictor", tmp_path / "predictor" / "model")
    assert all(formation for _, formation in by_gloss)


def test_evaluate_counts_what_it_wrote(call, taught, files, judged):
    told = rows_of(judged / "cross" / "predictions.jsonl")
    instances = read_instances(files.test)
    assert [row["id"] for row in told] == [one.key for one in instances]
    right = np.mean([row["sense_id"] in one.gold for row, one in zip(told, instances, strict=True)])
    row = polysemous(json.loads((judged / "cross" / "evaluation.json").read_text()))
    assert (row["n"], row["accuracy"]) == (len(instances), pytest.approx(100 * right))
    assert row["low"] <= row["accuracy"] <= row["high"]


def test_evaluate_tells_new_words_from_seen_ones(call, taught, files, tmp_path):
    def parts(train):
        printed = call("evaluate", taught["bi"], "--test-data", files.test, "--inventory", files.senses,
                       "--train-data", train, "--out", tmp_path / "out", "--overwrite")  # fmt: skip
        return {row["subset"]: row["n"] for row in printed["Accuracy, %"]}

    everything = len(read_instances(files.test))
    assert parts(files.train)["word-new"] == everything
    assert parts(files.test)["sense-seen"] == everything


def test_evaluate_a_part_of_a_file(call, files, tmp_path):
    rows = rows_of(files.test)
    data = tmp_path / "parts.jsonl"
    data.write_text(
        "".join(
            json.dumps(row | {"split": "ab"[at % 3 == 0]}) + "\n" for at, row in enumerate(rows)
        )
    )
    printed = call("evaluate", "lesk", "--test-data", data, "--split", "b", "--inventory", "mini",
                   "--out", tmp_path / "out")  # fmt: skip
    assert polysemous(printed["Accuracy, %"])["n"] == len(rows[::3])


def test_baselines(call, encoder, files, tmp_path):
    inventory, instances = mini_inventory(), read_instances(files.dev)
    train = read_instances(files.train)
    first = [inventory[one.word][0].sense_id in one.gold for one in instances]
    seen = {word: [one.gold[0] for one in train if one.word == word] for word in inventory}
    often = []
    for one in instances:
        listed = [sense.sense_id for sense in inventory[one.word]]
        often.append(max(listed, key=seen[one.word].count) in one.gold)  # a tie: the first

    def score(name):
        printed = call("evaluate", name, "--test-data", files.dev, "--train-data", files.train,
                       "--inventory", files.senses, "--out", tmp_path / name.partition("=")[0],
                       "--device", "cpu", "--quiet")  # fmt: skip
        return polysemous(printed["Accuracy, %"])["accuracy"]

    plain = score("first-sense")
    assert plain == pytest.approx(100 * np.mean(first))
    assert score("train-mfs") == pytest.approx(100 * np.mean(often))
    assert score("formation-oracle") > plain
    assert 0 < score("lesk-tfidf") < 100
    assert 0 < score(f"knn={encoder}") < 100
    told = rows_of(tmp_path / "knn" / "predictions.jsonl")
    assert {row["word"] for row in told} == {one.word for one in instances}


def test_predict_from_a_file_from_lines_and_from_marks(call, taught, monkeypatch, tmp_path):
    common = ("--inventory", "mini", "--device", "cpu", "--quiet")
    lines = ["他去银行存款。\t存款", "他去银行存款。\t存款:4", "他去银行#存款#。"]
    asked(monkeypatch, "\n".join([*lines, "", "他去商店。\t商店"]))
    printed = call("predict", taught["cross"], *common)["Senses"]
    assert [row["sense"] for row in printed] == [printed[0]["sense"]] * 3 + [None]
    assert printed[0]["gloss"] in {sense.gloss for sense in mini_inventory()["存款"]}
    assert printed[-1]["note"] == "not in the inventory"
    file, table = tmp_path / "lines.txt", tmp_path / "rows.tsv"
    file.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    table.write_text("text\tword\tstart\n" + "他去银行存款。\t存款\t4\n" * 3, encoding="utf-8")
    found = []
    for source in (file, table):
        out = tmp_path / f"{source.stem}.jsonl"
        assert (
            "3 answers" in call("predict", taught["cross"], source, "--out", out, *common)["note"]
        )
        found.append(rows_of(out))
    assert found[0] == found[1]
    assert found[0][0]["probability"] == pytest.approx(printed[0]["probability"], abs=1e-6)


def test_how_answers_are_given(call, taught, files, tmp_path):
    def told(name, *words):
        out = tmp_path / f"{name}.jsonl"
        call(
            "predict",
            taught["bi"],
            files.test,
            "--inventory",
            "mini",
            "--out",
            out,
            "--quiet",
            *words,
        )
        return rows_of(out)

    plain, brief = told("plain"), told("brief", "--top-k", 1, "--batch-tokens", 300)
    assert [row["sense_id"] for row in plain] == [row["sense_id"] for row in brief]
    assert {len(row["candidates"]) for row in plain} == {2}
    assert {len(row["candidates"]) for row in brief} == {1}
    limit = float(np.median([row["probability"] for row in plain])) + 1e-6
    unsure = told("unsure", "--abstain-below", limit)
    assert [row["abstained"] for row in unsure] == [row["probability"] < limit for row in plain]
    assert any(row["abstained"] for row in unsure)
    assert not any(row["abstained"] for row in plain)


def test_glosses_are_computed_once(call, taught, files, tmp_path, monkeypatch):
    seen = []
    plain = FormBertBi.embed_glosses

    def counted(model, glosses, shares):
        seen.append(len(shares))
        return plain(model, glosses, shares)

    monkeypatch.setattr(FormBertBi, "embed_glosses", counted)
    cache = tmp_path / "cache"

    def told(name, *words):
        seen.clear()
        out = tmp_path / f"{name}.jsonl"
        call("predict", taught["bi"], files.test, "--inventory", files.senses, "--out", out, *words)
        return rows_of(out), sum(seen)

    without, many = told("without")
    senses = {c["sense_id"] for row in without for c in row["candidates"]}
    assert many == len(senses)
    first, computed = told("first", "--cache", cache)
    assert computed == many
    second, computed = told("second", "--cache", cache)
    assert computed == 0
    for rows in (first, second):
        assert [row["sense_id"] for row in rows] == [row["sense_id"] for row in without]
        shares, wanted = ([row["probability"] for row in some] for some in (rows, without))
        np.testing.assert_allclose(shares, wanted, atol=1e-5)
    seen.clear()
    note = call("cache", taught["bi"], "--inventory", files.senses, "--cache", cache)["note"]
    every = len(Inventory.load(files.senses).senses)
    assert note == f"{every} glosses: {cache}"
    assert sum(seen) == every - many  # those that no question had met
    assert told("third", "--cache", cache)[1] == 0


def test_the_second_is_asked_where_the_first_is_unsure(call, taught, files, tmp_path):
    def told(name, model, *words):
        out = tmp_path / f"{name}.jsonl"
        call("predict", model, files.test, "--inventory", "mini", "--out", out, "--quiet", *words)
        return rows_of(out)

    def gap(row):
        return row["candidates"][0]["probability"] - row["candidates"][1]["probability"]

    fast, slow = told("fast", taught["bi"]), told("slow", taught["cross"])
    margin = (
        float(np.median([gap(row) for row in fast])) + 1e-6
    )  # between two: what is told is rounded
    both = told("both", taught["bi"], "--second", taught["cross"], "--margin", margin)
    wanted = [b if gap(a) < margin else a for a, b in zip(fast, slow, strict=True)]
    for one, other in zip(both, wanted, strict=True):
        assert one["sense_id"] == other["sense_id"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    assert both != fast
    assert both != slow
    assert told("never", taught["bi"], "--second", taught["cross"], "--margin", 0) == fast


def test_margin(call, taught, files):
    rows = call("margin", taught["bi"], "--second", taught["cross"], "--held-out-data", files.dev,
                "--inventory", "mini", "--quiet")["Asking again"]  # fmt: skip
    first, both, second = rows
    assert (first["asked again, %"], second["asked again, %"]) == (0, 100)
    assert both["accuracy, %"] >= second["accuracy, %"] - 0.2 - 1e-9
    assert 0 <= both["margin"] <= 1


@pytest.mark.parametrize("segmenter", ["maxmatch", "jieba"])
def test_tag(call, taught, tmp_path, segmenter):
    if segmenter == "jieba":
        pytest.importorskip("jieba")
    text = tmp_path / "text.txt"
    text.write_text("这笔存款很大。\n\n经理正在为校报征文，他去存款。\n", encoding="utf-8")
    common = ("--inventory", "mini", "--segmenter", segmenter, "--quiet")
    printed = call("tag", taught["cross"], text, *common)["Words"]
    assert [(row["line"], row["start"], row["word"]) for row in printed] == [
        (1, 2, "存款"), (3, 7, "征文"), (3, 12, "存款")
    ]  # fmt: skip
    out = tmp_path / "tagged.jsonl"
    assert "3 lines" in call("tag", taught["cross"], text, *common, "--out", out)["note"]
    rows = rows_of(out)
    assert ["".join(token["text"] for token in row["tokens"]) for row in rows] == (
        text.read_text(encoding="utf-8").splitlines()
    )
    tagged = [token for row in rows for token in row["tokens"] if "sense_id" in token]
    assert [token["sense_id"] for token in tagged] == [row["sense"] for row in printed]


def test_formations_are_looked_up_and_told(call, files, tmp_path):
    (row, other) = call("formation", "存款", "没有", "--inventory", "mini")["Formations"]
    assert (row["source"], other) == ("lexicon", {"word": "没有", "source": "unknown"})
    assert {row["formation 1"], row["formation 2"]} == {"述宾", "定中"}
    assert (row["probability 1"], row["probability 2"]) == (0.5, 0.5)
    held = call("formation", "--train-data", files.senses, "--out", tmp_path / "run", "--quiet")
    (table,) = [value for name, value in held.items() if name.endswith("held out")]
    assert [line["n"] for line in table] == [table[0]["n"]] * 4
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == table
    words = tmp_path / "words.tsv"
    words.write_text("word\tgloss\tpos\n卖肉\t把肉卖出去。\t动\n存款\t\t\n", encoding="utf-8")
    out = tmp_path / "told.jsonl"
    call("formation", "煮饭", "--file", words, "--model", tmp_path / "run" / "model",
         "--top-k", 2, "--out", out)  # fmt: skip
    told = rows_of(out)
    assert [(row["word"], row["source"]) for row in told] == [
        ("卖肉", "model"), ("存款", "lexicon"), ("煮饭", "model")
    ]  # fmt: skip
    for row in told:
        assert row["probability 1"] >= row["probability 2"]
        assert "formation 3" not in row


def test_data_check_and_import(call, command, tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    rows = [
        "context\tdefinition\tformation\tlabel", "他去#存款#。\t存款：把钱存进银行。\t述宾\t1",
        "他去#存款#。\t存款：银行里的钱。\t定中\t0", "这笔#存款#。\t存款：银行里的钱。\t定中\t1",
    ]  # fmt: skip
    (place / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    met = {
        row["what"]: row["count"]
        for row in call("data", "import", "ficls", place, "--out", out)["Met"]
    }
    assert met
    inventory = Inventory.load(out / "inventory.jsonl")
    assert [sense.formation.zh for sense in inventory["存款"] if sense.formation is not None] == [
        "述宾",
        "定中",
    ]
    instances = read_instances(out / "instances.jsonl", "train", inventory)
    assert [inventory.by_id[one.gold[0]].gloss for one in instances] == [
        "把钱存进银行。",
        "银行里的钱。",
    ]
    for file in ("inventory.jsonl", "instances.jsonl"):
        note = call("data", "check", out / file)["note"]
        assert note.endswith("0 errors, 0 warnings")
    (out / "instances.jsonl").write_text('{"text": "他去存款", "word": "取款"}\n', encoding="utf-8")
    code, printed, _ = command("data", "check", out / "instances.jsonl", "--json")
    assert code == 3
    assert [row["column"] for row in json.loads(printed)["Problems"]] == ["word", "gold"]


def test_compare(call, files, judged):
    (rows,) = [
        value for name, value in call("compare", judged / "first", judged / "cross", "--test-data",
                                      files.test, "--inventory", files.senses).items()
        if name.startswith("cross against first")
    ]  # fmt: skip
    row, instances = polysemous(rows), read_instances(files.test)
    for column, name in (("first", "first"), ("second", "cross")):
        told = rows_of(judged / name / "predictions.jsonl")
        right = [one["sense_id"] in other.gold for one, other in zip(told, instances, strict=True)]
        assert row[column] == pytest.approx(100 * np.mean(right))
    assert row["delta"] == pytest.approx(row["second"] - row["first"])
    assert row["low"] <= row["delta"] <= row["high"]


def test_report(call, files, judged, tmp_path):
    runs = [judged / name for name in ("first", "cross", "bi")]
    page = tmp_path / "report" / "report.html"
    note = call("report", *runs, "--test-data", files.test, "--inventory", files.senses,
                "--out", page.parent)["note"]  # fmt: skip
    assert note == f"Report: {page}"
    text = (page.parent / "report.md").read_text(encoding="utf-8")
    rows = json.loads((judged / "cross" / "evaluation.json").read_text())
    assert f"{polysemous(rows)['accuracy']:.4g}" in text
    assert text.count("Against first, points") == 2
    assert page.read_text(encoding="utf-8").count("<svg") + page.read_text().count("<img") >= 6


def test_convert(call, make, files, tmp_path):
    made = make(
        fusion=("pooled_add",), formation_source="predicted", predictor="mean", authors=True
    )
    source = tmp_path / "theirs"
    made.model.encoder.config.save_pretrained(source)
    made.tokenizer.save_pretrained(source)
    save_file(
        {k: v.contiguous() for k, v in theirs(made.model).items()}, source / "model.safetensors"
    )
    out = tmp_path / "ours"
    assert call("convert", source, "--out", out)["note"] == f"Model: {out}"
    model, _ = load(out)
    assert model.options.authors
    state = model.state_dict()
    for name, weight in made.model.state_dict().items():
        if name != "formation_embedding.weight":
            assert torch.equal(state[name], weight), name
    told = tmp_path / "told.jsonl"
    call("predict", out, files.dev, "--inventory", files.senses, "--out", told, "--quiet")
    assert len(rows_of(told)) == len(read_instances(files.dev))


def test_the_console_command(measured):
    done = subprocess.run(
        [sys.executable, "-m", "formbert", "formation", "存款", "--inventory", "mini", "--json"],
        capture_output=True, text=True, timeout=120, env=os.environ | measured,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["Formations"][0]["source"] == "lexicon"


def test_an_export_answers_through_the_commands(call, taught, files, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    model = tmp_path / "model"
    shutil.copytree(taught["cross"], model)
    rows = call("export", model, "--int8", "--quiet")["Export"]
    assert all(row["megabytes"] > 0 for row in rows)
    words = ("--inventory", "mini", "--quiet")
    plain = call("predict", model, files.dev, *words)["Senses"]
    exported = call("predict", model, files.dev, *words, "--engine", "onnx-int8")["Senses"]
    same = [a["sense"] == b["sense"] for a, b in zip(plain, exported, strict=True)]
    assert np.mean(same) > 0.8


def test_parts_of_a_file_are_chosen(call, encoder, tmp_path):
    """One file with parts that are not called `train`, as MiCLS has it."""
    parts = mini_instances()
    rows = [replace(one, split="val") for one in parts["train"][::24]]
    rows += [replace(one, split="test") for one in parts["dev"][::8]]
    write_instances(tmp_path / "all.jsonl", rows)
    words = ["train", encoder, "--train-data", tmp_path / "all.jsonl", "--inventory", "mini",
             "--out", tmp_path / "run", "--epochs", 1, "--train-split", "val", "--held-out-data",
             tmp_path / "all.jsonl", "--held-out-split", "test", "--quiet"]  # fmt: skip
    call(*words)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| training instances | {len(parts['train'][::24])} |" in card
