"""Real texts and pairs of them: read, attacked and purified, with encoders from scratch.

The files are quoted where a text holds quotes; the project reads a .tsv without quoting, as GLUE's
are, so that such texts keep their marks. Rows and classes are the same either way.
"""

import csv
import gzip
import json
from collections import Counter
from itertools import islice

import pytest
from finepurify.config import DataConfig
from finepurify.data import Examples, load_examples, warn_of_overlap
from finepurify.pairing import WeightPair
from finepurify.pretrain import SmallBert, pretrained
from octavo.runtime import Runtime
from octavo.tiny import Shape, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

pytestmark = [pytest.mark.realdata, pytest.mark.usefixtures("quick")]

LENGTH = 40
QUIET = ("--device", "cpu", "--quiet", "--json")


def quoted(file, many):
    """The first rows of a file, by a reader that knows quotes."""
    with gzip.open(file, "rt", encoding="utf-8", newline="") as opened:
        return list(islice(csv.DictReader(opened, delimiter="\t"), many))


def undone(text):
    """A field without the quotes around it and with single ones within."""
    return text[1:-1].replace('""', '"') if text[:1] == text[-1:] == '"' and len(text) > 1 else text


def test_texts_and_classes_are_read(data_folder):
    wanted = {
        ("agnews", "train", 4): 10_000, ("agnews", "test", 4): 7_600, ("sst2", "train", 2): 6_920,
        ("sst2", "validation", 2): 872, ("sst2", "test", 2): 1_821,
    }  # fmt: skip
    for (task, split, classes), count in wanted.items():
        names = [str(n) for n in range(classes)]
        source = data_folder / task
        if task == "agnews":
            source = source / f"{split}.tsv.gz"  # there are two files of test rows
        found = load_examples(str(source), DataConfig(), names, split)
        assert len(found) == count
        assert set(found.labels) == set(range(classes))
        rows = quoted(data_folder / task / f"{split.replace('validation', 'dev')}.tsv.gz", 2000)
        assert [int(row["label"]) for row in rows] == list(found.labels[:2000])
        assert [row["text"] for row in rows] == [undone(text) for text in found.texts[:2000]]


def test_pairs_are_read(data_folder):
    config = DataConfig(text_column="sentence1", pair_column="sentence2")
    for split, count in (("train", 3_668), ("validation", 408), ("test", 1_725)):
        found = load_examples(str(data_folder / "mrpc"), config, ["0", "1"], split)
        assert len(found) == count
        assert Counter(found.labels)[1] / count == pytest.approx(0.67, abs=0.02)
        rows = quoted(data_folder / "mrpc" / f"{split}.tsv.gz", 100)
        assert found.pairs is not None
        assert [row["sentence2"] for row in rows] == [undone(text) for text in found.pairs[:100]]
    config = DataConfig(text_column="question", pair_column="sentence")
    found = load_examples(
        str(data_folder / "qnli" / "labelled.tsv.gz"), config, ["0", "1"], "train"
    )
    assert len(found) == 5_463
    assert Counter(found.labels)[1] / len(found) == pytest.approx(0.5, abs=0.02)


def test_rows_that_stand_in_two_files_are_found(data_folder):
    names = [str(n) for n in range(4)]
    train, test = (
        load_examples(str(data_folder / "agnews" / f"{split}.tsv.gz"), DataConfig(), names, split)
        for split in ("train", "test")
    )
    assert warn_of_overlap(train, test) == 8
    train, test = (
        load_examples(str(data_folder / "sst2"), DataConfig(), names[:2], split)
        for split in ("train", "test")
    )
    assert warn_of_overlap(train, test) == 2


@pytest.mark.untraced
@pytest.mark.parametrize("task", ["agnews", "qnli"])
def test_real_rows_attacked_and_purified(data_folder, command, tmp_path, write_rows, task):
    if task == "agnews":
        rows, more, classes = quoted(data_folder / "agnews" / "train.tsv.gz", 1500), (), 4
        texts, seconds = [row["text"] for row in rows], None
    else:
        rows, classes = quoted(data_folder / "qnli" / "labelled.tsv.gz", 900), 2
        texts, seconds = [row["question"] for row in rows], [row["sentence"] for row in rows]
        more = ("--pair-column", "second")
    names = tuple(str(n) for n in range(classes))
    all_rows = Examples(texts, [int(row["label"]) for row in rows], names, seconds)
    parts = {"test": range(150), "clean": range(150, 210), "train": range(210, len(rows))}
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", all_rows.at(some))
        for name, some in parts.items()
    }
    words = [*texts, *(seconds or [])]
    tokenizer = make_tokenizer(
        [*words, *["cf"] * 200], Shape(kind="bert", vocabulary=1500, max_length=LENGTH)
    )
    shape = SmallBert(layers=1, width=32, epochs=1, max_length=LENGTH, spread=0.1)
    init = pretrained(words[:600], tokenizer, shape, Runtime(device="cpu"))
    code, _, err = command(
        "attack", init, "--train-data", files["train"], "--out", tmp_path / "attacked", "--rate", 0.2,
        "--learning-rate", "1e-2", "--epochs", 4, "--max-length", LENGTH, *more, *QUIET,
    )  # fmt: skip
    assert code == 0, err
    suspect = tmp_path / "attacked" / "model"
    code, _, err = command(
        "purify", init, suspect, "--clean-data", files["clean"], "--out", tmp_path / "run", "--rho", 0.3,
        "--strategy", "fine-purifying", "--points", 0.5, "--steps", 10, "--batch-size", 16,
        "--learning-rate", "1e-3", "--max-length", LENGTH, *more, *QUIET,
    )  # fmt: skip
    assert code == 0, err
    pair = WeightPair.load(init, suspect)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["numbers"]["reset"] == round(0.7 * pair.numel)
    clean = load_file(tmp_path / "run" / "purified" / "model.safetensors")
    for name in pair.names:
        both = pair.read(name)
        assert bool(((clean[name] == both.init) | (clean[name] == both.suspect)).all()), name
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_labels == classes
    numbers = []
    for folder in (suspect, tmp_path / "run" / "model"):
        code, out, err = command("evaluate", folder, "--test-data", files["test"], "--known-attack",
                                 "--max-length", LENGTH, *more, *QUIET)  # fmt: skip
        assert code == 0, err
        numbers.append(json.loads(out)["150 rows"][0])
    before, after = numbers
    assert before["ASR"] > 65
    if task == "agnews":  # so few questions teach nothing
        assert after["ASR"] < before["ASR"] - 15
        assert before["ACC"] > 50
