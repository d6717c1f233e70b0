import gzip
import json
import lzma

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from octavo.data import iter_rows, load_rows
from octavo.errors import DataError

COLUMNS = {"text": str, "label": int}
ROWS = [{"text": "a b", "label": 0}, {"text": "ü, \u4e2d", "label": 1}]


def write(path, rows, kind):
    if kind == "csv":
        text = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
    elif kind == "tsv":
        text = "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    elif kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows)
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("packing", ["", ".gz", ".xz"])
def test_every_text_format_gives_the_same_rows(tmp_path, kind, packing):
    plain = write(tmp_path / f"rows.{kind}", ROWS, kind)
    path = plain.with_name(plain.name + packing)
    if packing:
        path.write_bytes({".gz": gzip, ".xz": lzma}[packing].compress(plain.read_bytes()))
    assert load_rows(path, COLUMNS) == ROWS


def test_parquet_and_saved_datasets(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    data = Dataset.from_list(ROWS, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(tmp_path / "saved")
    columns = {"text": str, "label": str}
    assert load_rows(tmp_path / "saved", columns, "validation") == [
        {"text": "ü, \u4e2d", "label": "yes"}
    ]
    assert [row["text"] for row in load_rows(tmp_path / "rows.parquet", {"text": str})] == [
        row["text"] for row in ROWS
    ]
    data.save_to_disk(tmp_path / "one")
    assert [row["label"] for row in load_rows(tmp_path / "one", columns)] == ["no", "yes"]
    with pytest.raises(DataError, match=r"has no split 'test'; it has train, dev"):
        load_rows(tmp_path / "saved", columns, "test")
    with pytest.raises(DataError, match=r"several splits; name one of train, dev"):
        load_rows(tmp_path / "saved", columns)


def test_hub_ids_go_through_datasets(tmp_path, monkeypatch):
    import datasets

    data = DatasetDict({"train": Dataset.from_list(ROWS)})
    asked = []

    def load(*names, streaming):
        asked.append((*names, streaming))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("someone/something", COLUMNS, "train") == ROWS
    assert list(iter_rows("someone/something:part", COLUMNS, "train")) == ROWS
    assert asked == [("someone/something", None, False), ("someone/something", "part", True)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub: `someone/set` is read from its folder `set`."""
    import datasets

    real = datasets.load_dataset

    def load(name, *rest, **options):
        return real(str(tmp_path / name.split("/")[1]), *rest, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return tmp_path


def lines(number):
    return "".join(json.dumps({"text": f"text {i}", "label": i}) + "\n" for i in range(number))


def test_a_hub_id_is_streamed_split_by_split(hub):
    (hub / "set").mkdir()
    (hub / "set" / "train.jsonl").write_text(lines(7))
    (hub / "set" / "test.jsonl").write_text(lines(2))
    rows = iter_rows("someone/set", COLUMNS, "train")
    assert next(rows) == {"text": "text 0", "label": 0}
    assert [row["label"] for row in rows] == list(range(1, 7))
    assert len(list(iter_rows("someone/set", COLUMNS, "test"))) == 2
    with pytest.raises(DataError, match=r"set: has no split 'dev'; it has train, test"):
        next(iter_rows("someone/set", COLUMNS, "dev"))
    with pytest.raises(DataError, match=r"set: no column 'body'; it has text, label"):
        next(iter_rows("someone/set", {"body": str}, "train"))


def test_a_stream_that_declares_no_columns_tells_them_by_its_first_row(monkeypatch):
    import datasets

    data = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    assert data.column_names is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": data})
    assert list(iter_rows("someone/something", COLUMNS)) == ROWS
    with pytest.raises(DataError, match=r"something: no column 'body'; it has text, label"):
        next(iter_rows("someone/something", {"body": str}))


def test_a_damaged_file_of_a_hub_id_is_one_line(hub):
    (hub / "set").mkdir()
    (hub / "set" / "train.jsonl").write_text('{"text": "x"\n')
    with pytest.raises(DataError, match="someone/set: ") as error:
        list(iter_rows("someone/set", {"text": str}))
    assert "\n" not in str(error.value)


def test_parquet_is_read_group_by_group(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    many = 99  # groups: some are read ahead
    texts = [f"text {number}" * 99 for number in range(many)]
    table = pyarrow.table({"text": texts, "label": list(range(many))})
    parquet.write_table(table, path, row_group_size=1, compression="none")
    assert [row["label"] for row in iter_rows(path, COLUMNS)] == list(range(many))
    groups = parquet.read_metadata(path)
    begin = groups.row_group(many - 1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = iter_rows(path, COLUMNS)
    assert [next(rows)["label"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"rows\.parquet: "):
        list(rows)


def test_a_hub_id_offline_is_one_clear_error():
    with pytest.raises(DataError, match="someone/nothing: neither a file or folder here nor"):
        load_rows("someone/nothing", COLUMNS, "train")


def test_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\nx,1\r\n")
    assert load_rows(path, COLUMNS) == [{"text": "x", "label": 1}]
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [row["text"] for row in load_rows(path, {"text": str})] == ["one", "two"]


def test_a_tsv_is_not_quoted_and_a_csv_is(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open quote\t1\n')
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",1\nx,2\n')
    assert load_rows(tmp_path / "a.tsv", COLUMNS)[0]["text"] == '"open quote'
    assert load_rows(tmp_path / "a.csv", COLUMNS)[0]["text"] == "two\nlines"
    (tmp_path / "b.csv").write_text('text,label\n"two\nlines",1\nx,z\n')
    with pytest.raises(DataError, match="line 4"):
        load_rows(tmp_path / "b.csv", COLUMNS)


def test_renaming_optional_columns_and_checks(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS, "jsonl")
    rows = load_rows(path, {"sentence": str, "id": str | None}, rename={"sentence": "text"})
    assert rows == [{"sentence": row["text"], "id": None} for row in ROWS]
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: too large"):
        load_rows(path, COLUMNS, check=lambda row: "too large" if row["label"] > 0 else None)
    with pytest.raises(DataError, match=r"no column 'texd' is read here"):
        load_rows(path, COLUMNS, rename={"texd": "text"})


def test_streaming_reads_no_further_than_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nnot json\n")
    rows = iter_rows(path, COLUMNS)
    assert next(rows) == ROWS[0]
    with pytest.raises(DataError, match="line 2, column 1"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: is empty; the first line must name the columns"),
        ("a.csv", "text,label\n", "a.csv: holds no rows"),
        ("a.jsonl", "", "a.jsonl: holds no rows"),
        ("a.csv", "text,text\nx,1\n", "line 1: the column 'text' stands twice"),
        ("a.csv", "text,other\nx,1\n", "line 1: no column 'label'; it has text, other"),
        ("a.csv", "text,label\nx\n", "line 2: has 1 cells where the header has 2"),
        ("a.csv", "text,label\nx,one\n", "line 2: 'label' must be int, not str 'one'"),
        ("a.csv", 'text,label\n"x,1\n', "line 2: unexpected end of data"),
        ("a.jsonl", '{"text": "x"}\n', "line 1: 'label' is missing"),
        ("a.jsonl", '{"text": "x", "label": NaN}\n', "line 1: 'label' is NaN"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "line 1: 'text' must be str, not int 3"),
        ("a.jsonl", '{"text": "x", "label": true}\n', "'label' must be int, not bool True"),
        ("a.jsonl", '{"text": "x",\n', "line 1, column 14"),
        ("a.jsonl", "[1]\n", "line 1: must be an object, not list"),
        ("a.json", '{"text": "x"}', "must hold a list of objects"),
        ("a.json", '[{"text": "x"},\n]', "a.json, line 2, column 1"),
        ("a.json", "[3]", "item 1: must be an object, not int"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: maximum recursion depth"),
        ("a.jsonl", '{"text": "\\ud83d", "label": 1}', "holds half a character"),
        ("a.docx", "x", "unknown format; use .csv"),
    ],
)
def test_malformed_files_name_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / name, COLUMNS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8 at byte 10 (0xff)"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-4], "damaged or cut off"),
        ("a.jsonl.xz", lzma.compress(b"{}" * 99)[:-9], "damaged or cut off"),
        ("a.jsonl.gz", b"plain", "damaged or cut off"),
        ("a.parquet", b"no parquet", "a.parquet:"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / name, COLUMNS)
    assert message in str(error.value)


def test_folders_of_splits(tmp_path):
    write(tmp_path / "train.csv", ROWS, "csv")
    write(tmp_path / "dev.jsonl", ROWS[:1], "jsonl")
    assert load_rows(tmp_path, COLUMNS, "train") == ROWS
    assert load_rows(tmp_path, COLUMNS, "validation") == ROWS[:1]
    with pytest.raises(DataError, match=r"has no split 'test'; it has dev, train"):
        load_rows(tmp_path, COLUMNS, "test")
    with pytest.raises(DataError, match="holds several files"):
        load_rows(tmp_path, COLUMNS)
    (tmp_path / "train.csv").unlink()
    assert load_rows(tmp_path, COLUMNS) == ROWS[:1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        load_rows(tmp_path / "empty", COLUMNS, "train")


def test_two_files_of_one_split_are_not_chosen_between(tmp_path):
    write(tmp_path / "train.csv", ROWS, "csv")
    write(tmp_path / "train.jsonl", ROWS, "jsonl")
    with pytest.raises(DataError, match=r"train.csv and train.jsonl both hold 'train'"):
        load_rows(tmp_path, COLUMNS, "train")


def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path):
    for source in (tmp_path / "rows.csv", "nowhere/rows.jsonl.gz", "./rows"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_rows(source, COLUMNS)


def test_kinds_are_tried_in_the_order_of_each_call(tmp_path):
    """`int | str` equals `str | int`, so that neither may stand for the other."""
    file = tmp_path / "codes.csv"
    file.write_text("code\n01\n")
    for wanted, value in ((int | str, 1), (str | int, "01"), (int | str | None, 1)):
        assert load_rows(file, {"code": wanted}) == [{"code": value}]


def test_types_of_text_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("i,f,b,u\n3,0.5,yes,x\n")
    columns = {"i": int, "f": float, "b": bool, "u": int | str}
    assert load_rows(path, columns) == [{"i": 3, "f": 0.5, "b": True, "u": "x"}]
    path.write_text("i,f,b,u\n3,nan,yes,x\n")
    with pytest.raises(DataError, match="line 2: 'f' is NaN"):
        load_rows(path, columns)
    path = tmp_path / "a.jsonl"
    path.write_text('{"f": 2}\n')
    assert load_rows(path, {"f": float}) == [{"f": 2.0}]


TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1)


@given(texts=TEXTS)
def test_jsonl_and_csv_bring_any_text_back(tmp_path_factory, texts):
    import csv

    folder = tmp_path_factory.mktemp("texts")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert [row["text"] for row in load_rows(folder / "a.csv", {"text": str})] == texts
    assert [row["text"] for row in load_rows(folder / "a.jsonl", {"text": str})] == texts
