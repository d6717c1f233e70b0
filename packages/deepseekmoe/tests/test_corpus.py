"""Texts become packed windows that know their documents' borders."""

import datasets
import numpy as np
import pytest
from deepseekmoe.config import CorpusConfig, OptimizeConfig
from deepseekmoe.corpus import (
    Document,
    Tokens,
    Windows,
    documents,
    load_tokens,
    shuffled_batches,
    tokenize,
    train_tokenizer,
)
from octavo.errors import ConfigError, DataError


def packed():
    """Documents of 5, 3 and 8 tokens, each begun by token 1 and ended by token 2."""
    parts = [[1, 10, 11, 12, 2], [1, 20, 2], [1, 30, 31, 32, 33, 34, 35, 2]]
    starts = np.array([0, 5, 8])
    sizes = np.array([30, 10, 60])
    return Tokens(np.concatenate(parts).astype(np.uint32), starts, ["a", "b", "a"], sizes)


def test_windows_by_hand():
    rows = Windows(packed(), 8).rows([0, 1])
    assert rows["input_ids"].tolist() == [
        [1, 10, 11, 12, 2, 1, 20, 2], [1, 30, 31, 32, 33, 34, 35, 2],
    ]  # fmt: skip
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], list(range(8))]
    assert rows["labels"][0].tolist() == [-100, 10, 11, 12, 2, -100, 20, 2]


def test_a_window_in_the_midst_of_a_document_counts_from_its_own_beginning():
    rows = Windows(packed(), 6).rows([1])
    assert rows["input_ids"].tolist() == [[20, 2, 1, 30, 31, 32]]
    assert rows["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]]
    assert rows["labels"].tolist() == [[20, 2, -100, 30, 31, 32]]


def test_the_remainder_that_fills_no_window_is_left_out():
    assert len(Windows(packed(), 6)) == 2


def test_one_domain():
    part = packed().of_domain("a")
    assert part.values.tolist() == [1, 10, 11, 12, 2, 1, 30, 31, 32, 33, 34, 35, 2]
    assert part.starts.tolist() == [0, 5]
    assert part.text_bytes.tolist() == [30, 60]
    assert len(packed().of_domain("c")) == 0


def test_an_endless_shuffle_is_a_function_of_its_place():
    def given(size, seed, steps):
        config = OptimizeConfig(batch_size=size)
        batch = shuffled_batches(lambda numbers: {"rows": numbers.tolist()}, 10, config, seed)
        return [row for step in range(steps) for row in batch(step, 0, 0)["rows"]]

    whole = given(5, 3, 6)
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]
    assert given(15, 3, 2) == given(3, 3, 10) == whole
    assert given(5, 4, 6) != whole


@pytest.mark.parametrize(
    ("length", "error", "words"),
    [
        (1, ConfigError, "--length 1: must be 2"),
        (17, DataError, "16 tokens do not fill one window"),
    ],
)
def test_windows_that_cannot_be(length, error, words):
    with pytest.raises(error, match=words):
        Windows(packed(), length)


def test_a_folder_of_texts_is_split_by_place_at_a_lines_end(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {n:02d}\n" for n in range(20)))
    (tmp_path / "two.txt").write_text("alpha\nbeta\n")
    config = CorpusConfig(data=str(tmp_path), dev_share=0.25)
    train, dev = (list(documents(config, part)) for part in ("train", "dev"))
    assert [one.domain for one in train] == ["one", "two"]
    assert train[0].text + dev[0].text == (tmp_path / "one.txt").read_text()
    assert dev[0].text.startswith("line 1")
    everything = list(documents(CorpusConfig(data=str(tmp_path), dev_share=0), "train"))
    assert everything[1].text == "alpha\nbeta\n"


def test_a_text_file_alone_is_the_document_that_it_is_in_a_folder(tmp_path):
    (tmp_path / "one.txt").write_text("".join(f"line {n:02d}\n" for n in range(20)))
    for part in ("train", "dev"):
        alone, inside = (
            list(documents(CorpusConfig(data=str(place), dev_share=0.25), part))
            for place in (tmp_path / "one.txt", tmp_path)
        )
        assert alone == inside
        assert [one.domain for one in alone] == ["one"]


def test_of_rows_every_so_manieth_is_held_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"body": "text {number}"}}\n' for number in range(10)))
    config = CorpusConfig(data=str(file), text_column="body", dev_share=0.2)
    assert [one.text for one in documents(config, "dev")] == ["text 4", "text 9"]
    assert len(list(documents(config, "train"))) == 8


@pytest.mark.parametrize("source", ["parquet", "hub"])
def test_streamed_rows_are_held_out_alike(tmp_path, monkeypatch, source):
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.parquet"
    datasets.Dataset.from_dict({"body": [f"text {i}" for i in range(10)]}).to_parquet(file)
    name = str(file)
    if source == "hub":
        real, name = datasets.load_dataset, "someone/set"

        def load(_name, *rest, **options):
            assert options["streaming"]
            return real(str(tmp_path / "set"), *rest, **options)

        monkeypatch.setattr(datasets, "load_dataset", load)
    config = CorpusConfig(data=name, text_column="body", dev_share=0.2)
    dev = documents(config, "dev")
    assert next(dev) == Document("text", "text 4")
    assert [one.text for one in dev] == ["text 9"]
    assert [one.text for one in documents(config, "train")] == [
        f"text {i}" for i in range(10) if i not in (4, 9)
    ]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_share_of_rows_is_a_share(tmp_path, share):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(100)))
    config = CorpusConfig(data=str(file), dev_share=share)
    assert len(list(documents(config, "dev"))) == pytest.approx(100 * share, abs=1)
    assert len(list(documents(config, "train"))) == pytest.approx(100 * (1 - share), abs=1)


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(documents(CorpusConfig(data=str(tmp_path / "none.jsonl")), "train"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: no UTF-8 at byte 3"):
        list(documents(CorpusConfig(data=str(tmp_path)), "train"))
    with pytest.raises(ConfigError, match="--dev-share 1"):
        list(documents(CorpusConfig(data=str(tmp_path), dev_share=1.0), "train"))


def test_tokens_are_written_once_and_framed(tmp_path):
    texts = [Document("a", "one two"), Document("b", "three " * 50)]
    tokenizer = train_tokenizer(texts, 300)
    tokens = tokenize(texts, tokenizer, tmp_path / "tokens")
    end = tokenizer.eos_token_id
    assert tokens.values[0] == end
    assert tokens.values[-1] == end
    assert tokenizer.decode(tokens.values[1 : tokens.starts[1] - 1].tolist()) == "one two"
    assert tokens.text_bytes.tolist() == [7, 300]
    again = tokenize(iter([]), tokenizer, tmp_path / "tokens")  # found, not made anew
    assert again.values.tolist() == load_tokens(tmp_path / "tokens").values.tolist()
    with pytest.raises(DataError, match="no text to tokenise"):
        tokenize([], tokenizer, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_long_texts_are_tokenised_in_pieces_without_a_seam(tmp_path, monkeypatch):
    from deepseekmoe import corpus

    text = "".join(f"word {number} and more\n" for number in range(200))
    tokenizer = train_tokenizer([Document("a", text)], 300)
    whole = tokenize([Document("a", text)], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(corpus, "PIECE", 100)
    pieces = tokenize([Document("a", text)], tokenizer, tmp_path / "pieces")
    assert tokenizer.decode(pieces.values.tolist()) == tokenizer.decode(whole.values.tolist())
    assert pieces.text_bytes.tolist() == whole.text_bytes.tolist() == [len(text)]


def test_pieces_copy_a_text_once(monkeypatch):
    from deepseekmoe import corpus

    copied = []

    class Text(str):
        def __getitem__(self, place):
            part = super().__getitem__(place)
            copied.append(len(part))
            return part

    monkeypatch.setattr(corpus, "PIECE", 100)
    text = Text("".join(f"line {number:04d}\n" for number in range(1000)) + "no end of a line")
    pieces = list(corpus._pieces(text))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") and len(piece) < 115 for piece in pieces[:-1])
    assert sum(copied) == len(text)
    assert list(corpus._pieces("")) == []


def test_a_tokenizer_reads_no_more_than_its_sample(monkeypatch):
    from deepseekmoe import corpus

    monkeypatch.setattr(corpus, "SAMPLE_EACH", 1000)
    monkeypatch.setattr(corpus, "SAMPLE", 1500)

    def texts():
        yield Document("a", "red blue\n" * 100 + " green" * 500 + "x" * 1000)
        yield Document("b", "brown grey\n" * 60)
        raise AssertionError("a third text was asked for")

    tokenizer = train_tokenizer(texts(), 300)
    beginnings = ("red blue\n" * 100 + " green" * 500)[:1000], "brown grey\n" * 60
    wanted = train_tokenizer([Document("", text) for text in beginnings], 300)
    assert tokenizer.get_vocab() == wanted.get_vocab()


def test_special_tokens_that_a_text_spells_are_text(tmp_path):
    text = "see <|endoftext|> and [PAD]"
    tokenizer = train_tokenizer([Document("a", "see and pad " * 20)], 280)
    tokens = tokenize([Document("a", text)], tokenizer, tmp_path / "tokens")
    frame, *inner, end = tokens.values.tolist()
    assert frame == end == tokenizer.eos_token_id
    assert not set(inner) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(inner) == text
    assert tokenizer(text)["input_ids"] != inner  # elsewhere they are what they were


def test_a_vocabulary_holds_all_bytes(tmp_path):
    with pytest.raises(ConfigError, match="--vocabulary 100"):
        train_tokenizer([Document("a", "x")], 100)
    tokenizer = train_tokenizer([Document("a", "plain words " * 20)], 280)
    assert tokenizer.decode(tokenizer("é 漢 \U0001f600")["input_ids"]) == "é 漢 \U0001f600"
