"""Rows in, token rows and batches out, and clean sets divided class by class."""

import json
import logging
from collections import Counter

import pytest
import torch
from finepurify.config import DataConfig
from finepurify.data import (
    IGNORED,
    Examples,
    batches,
    check_clean,
    collate,
    encode,
    first_of_each,
    hold_out,
    load_examples,
    warn_of_overlap,
)
from finepurify.pretrain import word_tokenizer
from octavo.errors import DataError

NAMES = ("no", "yes")
WORDS = word_tokenizer("a b c d e".split(), 12)
A, B, C = 5, 6, 7
ROWS = Examples(["a b", "c", "a a a b c d e"], [0, 1, 1], NAMES)


@pytest.fixture
def saved(tmp_path):
    """A function that saves rows and gives the file's name."""

    def save(*rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return save


def test_labels_are_names_or_numbers(saved):
    file = saved(
        {"text": "a", "label": "yes"}, {"text": "b", "label": 0}, {"text": "c", "label": "1"}
    )
    assert load_examples(file, DataConfig(), NAMES, "train") == Examples(
        ["a", "b", "c"], [1, 0, 1], NAMES
    )


def test_other_columns_and_pairs(saved):
    file = saved({"q": "a", "r": "b", "gold": 1})
    config = DataConfig(text_column="q", pair_column="r", label_column="gold")
    assert load_examples(file, config, NAMES, "train") == Examples(["a"], [1], NAMES, ["b"])


def test_a_language_model_needs_no_labels(saved):
    assert load_examples(saved({"text": "a"}), DataConfig(), (), "train").labels == [0]


def test_blank_texts_are_counted_and_left_out(saved, caplog):
    file = saved({"text": " ", "label": 0}, {"text": "b", "label": 1})
    assert load_examples(file, DataConfig(), NAMES, "train").texts == ["b"]
    assert "1 of 2 texts are blank" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": "maybe"},
            "label 'maybe' is none of the model's: no, yes .or 0 to 1",
        ),
        ({"text": "a", "label": 2}, "label 2 is none"),
        ({"text": "a", "label": -1}, "label -1 is none"),
        ({"text": "a"}, "label"),
        ({"label": 1}, "text"),
        ({"text": "  ", "label": 1}, "every text is blank"),
    ],
)
def test_rows_that_are_refused(saved, row, message):
    with pytest.raises(DataError, match=message):
        load_examples(saved(row), DataConfig(), NAMES, "train")


def test_a_clean_set_speaks_for_every_class():
    check_clean(ROWS, "x")
    check_clean(Examples(["a"], [0]), "x")
    with pytest.raises(DataError, match="x: 1 rows for 2 classes"):
        check_clean(ROWS.at([0]), "x")
    with pytest.raises(DataError, match="x: no row of class 'no'"):
        check_clean(ROWS.at([1, 2]), "x")


def test_rows_in_both_sets_are_said(caplog):
    other = Examples([" a b ", "x"], [0, 0], NAMES)
    assert warn_of_overlap(ROWS, other) == 1
    assert "1 of the 2 test rows are in the clean set" in caplog.text
    pairs = [Examples(["a"], [0], NAMES, [second]) for second in ("b", "c")]
    assert warn_of_overlap(*pairs) == 0


def test_some_rows_and_more_rows():
    pairs = Examples(["a", "b"], [0, 1], NAMES, ["c", "d"])
    assert pairs.at([1, 0]) == Examples(["b", "a"], [1, 0], NAMES, ["d", "c"])
    assert pairs.at([0]).plus(pairs.at([1])) == pairs
    assert len(ROWS.plus(ROWS)) == 6


MANY = Examples([str(row) for row in range(100)], [0] * 70 + [1] * 25 + [2] * 5, ("a", "b", "c"))


def test_first_of_each_takes_so_many_of_each_class():
    found = first_of_each(MANY, 10, 0)
    assert Counter(found.labels) == {0: 10, 1: 10, 2: 5}
    assert list(found.texts) == sorted(found.texts, key=int)
    assert len(set(found.texts)) == 25
    assert found == first_of_each(MANY, 10, 0)
    assert found != first_of_each(MANY, 10, 1)
    assert found.texts != MANY.texts[:10]


def test_holding_out_is_done_class_by_class():
    rest, held = hold_out(MANY, 0.25, 0)
    assert Counter(held.labels) == {0: 18, 1: 7, 2: 2}  # 17.5, 6.25 and 1.25, rounded up
    assert sorted([*rest.texts, *held.texts], key=int) == list(MANY.texts)
    assert hold_out(MANY, 0.25, 1)[1] != held
    few = Examples(["a", "b", "c"], [0, 0, 1], NAMES)
    rest, held = hold_out(few, 0.99, 0)  # one row at least of each class is left
    assert (Counter(rest.labels), Counter(held.labels)) == ({0: 1, 1: 1}, {0: 1})


def test_token_rows(caplog):
    caplog.set_level(logging.INFO, "finepurify")
    first, second, third = encode(ROWS, WORDS, 5)
    assert first["input_ids"] == [2, A, B, 3]
    assert (first["labels"], second["labels"], third["labels"]) == (0, 1, 1)
    assert third["input_ids"] == [2, A, A, A, 3]
    assert "1 of 3 texts are longer than 5 tokens and cut" in caplog.text


def test_the_models_own_limit_holds():
    long = Examples(["a " * 50], [0], NAMES)
    assert len(encode(long, WORDS, 512)[0]["input_ids"]) == 12


def test_pairs_stand_behind_each_other():
    (item,) = encode(Examples(["a"], [1], NAMES, ["b c"]), WORDS, 12)
    assert item["input_ids"] == [2, A, 3, B, C, 3]


def test_a_language_models_labels_are_its_tokens():
    items = encode(Examples(["a b", "c"], [0, 0]), WORDS, 12)
    assert [item["labels"] for item in items] == [item["input_ids"] for item in items]
    batch = collate(items, 0)
    assert batch["labels"].tolist() == [[2, A, B, 3], [2, C, 3, IGNORED]]


def test_batches_are_padded_on_the_right():
    batch = collate(encode(ROWS, WORDS, 5)[:2], 9)
    assert batch["input_ids"].tolist() == [[2, A, B, 3], [2, C, 3, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == torch.int64


def test_batches_go_by_length_and_tell_their_rows():
    items = encode(ROWS.plus(ROWS), WORDS, 12)
    found = list(batches(items, 4, 0))
    assert [rows for rows, _ in found] == [[1, 4, 0, 3], [2, 5]]
    assert [tuple(batch["input_ids"].shape) for _, batch in found] == [(4, 4), (2, 9)]
    for rows, batch in found:
        assert batch["labels"].tolist() == [items[row]["labels"] for row in rows]
