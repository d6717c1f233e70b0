"""Every problem that the check tells, and that it agrees with the readers."""

import gzip
import json

import pytest
from formbert.check import SIMPLIFIED, TRADITIONAL, check_data
from formbert.data import read_instances
from formbert.inventory import Inventory, Sense
from octavo.errors import DataError

INVENTORY = Inventory([Sense("存款_1", "存款", "把钱存进银行"), Sense("存款_2", "存款", "存的钱")])


def told(problems) -> list[tuple[int, str, str]]:
    assert all(problem["todo"] for problem in problems)
    return [(problem["row"], problem["column"], problem["severity"]) for problem in problems]


def jsonl(tmp_path, *rows):
    file = tmp_path / "file.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_all_problems_of_an_inventory_at_once(tmp_path):
    file = tmp_path / "senses.csv"
    file.write_text(
        "sense_id,word,gloss,formation\n"
        "a,白花,白色的花,定中\n"
        "b,白花,没有用,定忠\n"  # did you mean
        "b,新生,新的生命,\n"  # the name is row 2's
        "d,新生,,定中\n"  # no gloss
        "e,白花,白色的花,0\n"  # the gloss is row 1's; 00 was read as a number
        ",,无词,NaN\n"
        "g,少一格,没有\n"
        "h,词,nan,状中\n",
        encoding="utf-8",
    )
    problems = check_data(file)
    assert told(problems) == [
        (2, "formation", "error"), (3, "sense_id", "error"), (4, "gloss", "error"),
        (5, "formation", "error"), (5, "gloss", "warning"), (6, "word", "error"),
        (6, "formation", "error"), (7, "", "error"), (8, "gloss", "error"),
    ]  # fmt: skip
    said = [problem["problem"] for problem in problems]
    assert "did you mean 定中?" in said[0]
    assert said[1] == "'b' is the name of row 2 already"
    assert "was 00 read as a number?" in said[3]
    assert "write 00, 01 or 10 as text" in problems[3]["todo"]
    assert said[4] == "'白花' has this gloss in row 1 already"
    assert said[7] == "has 3 cells where the header has 4"


@pytest.mark.parametrize("value", [0, 1, 10, 10.0])
def test_codes_read_as_numbers(tmp_path, value):
    row = {"word": "节气", "gloss": "时令", "formation": value}
    (problem,) = check_data(jsonl(tmp_path, row))
    assert problem["column"] == "formation"
    assert "as text" in problem["todo"]
    assert check_data(jsonl(tmp_path, row | {"formation": "10"})) == []


def test_values_of_the_wrong_kind(tmp_path):
    rows = [{"word": 7, "gloss": float("nan")}, {"word": "好\ud800", "gloss": "坏\ufffd"},
            {"word": "词", "gloss": "义", "sense_id": 3},
            {"word": "词", "gloss": "义项", "formation": float("nan")}]  # fmt: skip
    assert told(check_data(jsonl(tmp_path, *rows))) == [
        (1, "word", "error"), (1, "gloss", "error"), (2, "word", "error"), (2, "gloss", "warning"),
        (3, "sense_id", "error"), (4, "formation", "error"),
    ]  # fmt: skip


def test_all_problems_of_instances_at_once(tmp_path):
    text = "存款的人存款"
    rows = [
        {"text": text, "word": "存款", "start": 4, "end": 6, "gold": ["存款_1"]},
        {"text": text, "word": "存款", "start": 3, "gold": ["存款_1"]},  # stands elsewhere
        {"text": text, "word": "存款", "gold": ["存款_1"]},  # in two places
        {"text": text, "word": "取款", "gold": ["存款_1"]},  # nowhere
        {"text": "去#存款#", "gold": "存款_2|存款_9"},  # no such sense
        {"text": text, "word": "存款", "start": 0, "end": 3, "gold": []},  # wrong end, no gold
        {"text": text, "word": "存款", "start": "x", "gold": ["存款_1"]},
        {"text": "只有文字", "gold": ["存款_1"]},  # no word at all
        {"text": "好人", "word": "人", "gold": ["人_1"]},  # not in the inventory
        {"text": text, "word": "存款", "start": 4, "sense_id": "存款_2", "id": "1"},  # as row 1
        {"text": None, "word": "存款", "gold": 3},
    ]
    problems = check_data(jsonl(tmp_path, *rows), INVENTORY)
    assert told(problems) == [
        (2, "start", "error"), (3, "start", "error"), (4, "word", "error"), (5, "gold", "error"),
        (6, "end", "error"), (6, "gold", "warning"), (7, "start", "error"), (8, "word", "error"),
        (9, "word", "error"), (10, "id", "error"), (10, "text", "warning"), (11, "text", "error"),
        (11, "gold", "error"),
    ]  # fmt: skip
    said = {(problem["row"], problem["column"]): problem for problem in problems}
    assert "it stands at 0, 4" in said[2, "start"]["problem"]
    assert "stands at 0, 4" in said[3, "start"]["problem"]
    assert said[5, "gold"]["problem"] == "'存款_9' is no sense of '存款'"
    assert said[5, "gold"]["todo"] == "it has 存款_1, 存款_2"
    assert said[6, "end"]["problem"] == "'存款' ends at 2, not at 3"


@pytest.mark.parametrize(
    ("row", "errors"),
    [
        ({"text": "去存款", "word": "存款"}, 0),
        ({"text": "去存款", "word": "存款", "start": "1"}, 0),
        ({"text": "去～", "word": "存款"}, 0),
        ({"text": "去#存款#", "word": ""}, 0),
        ({"text": "去存款", "word": "存款", "start": 2}, 1),
        ({"text": "去存款", "word": "存款", "start": -2}, 1),
        ({"text": "去存款", "word": "存款", "start": ""}, 0),
        ({"text": "去存款", "word": "存款", "end": 2}, 1),
        ({"text": "去存款", "word": "存款", "end": 1.5}, 1),
        ({"text": "去存款"}, 1),
        ({"text": 3, "word": "存款"}, 1),
        ({"text": "去存款", "word": "存款", "gold": ["存款_7"]}, 1),
    ],
)
def test_errors_are_what_the_reader_refuses(tmp_path, row, errors):
    file = jsonl(tmp_path, {"gold": ["存款_1"]} | row)
    found = [one for one in check_data(file, INVENTORY) if one["severity"] == "error"]
    assert len(found) == errors
    if errors:
        with pytest.raises(DataError):
            read_instances(file, inventory=INVENTORY)
    else:
        assert read_instances(file, inventory=INVENTORY)[0].word == "存款"


def test_bytes_and_line_ends(tmp_path):
    file = tmp_path / "senses.tsv"
    file.write_bytes('\ufeffword\tgloss\r\n词\t"义\r\n'.encode())
    assert told(check_data(file)) == [(0, "", "warning"), (0, "", "warning")]
    assert len(Inventory.load(file).senses) == 1
    file.write_bytes("word\tgloss\n词\t".encode() + "意义".encode("gb18030"))
    problems = check_data(file)
    assert "not UTF-8 at byte 15" in problems[0]["problem"]
    assert (0, "", "error") in told(problems)


def test_rows_that_are_no_rows(tmp_path):
    file = tmp_path / "file.jsonl"
    file.write_text('{"word": "词", "gloss": "义"}\n{"word": \n[1]\n', encoding="utf-8")
    assert told(check_data(file)) == [(2, "", "error"), (3, "", "error")]
    file = tmp_path / "file.json"
    for text, said in (("[{", "no JSON"), ("{}", "holds no list"), ("[]", "holds no row")):
        file.write_text(text, encoding="utf-8")
        assert any(said in problem["problem"] for problem in check_data(file))
    file.write_text('[{"word": "词", "gloss": "义"}, 3]', encoding="utf-8")
    assert told(check_data(file)) == [(2, "", "error")]
    file = tmp_path / "file.csv"
    file.write_text('word,gloss\n词,义\n甲,"乙\n', encoding="utf-8")
    (problem,) = check_data(file)
    assert (problem["row"], problem["todo"]) == (
        2,
        "mend the quotes; later rows were not looked at",
    )
    file.write_text("gloss,name\n义,词\n", encoding="utf-8")
    assert told(check_data(file)) == [(0, "word", "error")]
    file.write_text("sentence,word\n义,词\n", encoding="utf-8")
    assert told(check_data(file)) == [(0, "text", "error")]


def test_script_of_the_fewer_rows_is_told(tmp_path):
    rows = [{"word": "学习", "gloss": "读书"}, {"word": "说话", "gloss": "开口"},
            {"word": "學會", "gloss": "懂"}, {"word": "天", "gloss": "上"}]  # fmt: skip
    (problem,) = check_data(jsonl(tmp_path, *rows))
    assert (problem["row"], problem["severity"]) == (3, "warning")
    assert problem["problem"] == (
        "holds traditional characters (學會) in a file that is mostly simplified"
    )
    assert check_data(jsonl(tmp_path, rows[2], rows[3])) == []  # all in one script
    rows = [{"word": "學習", "gloss": "讀書"}, {"word": "說話", "gloss": "開口"}, rows[0]]
    (problem,) = check_data(jsonl(tmp_path, *rows))
    assert problem["problem"].endswith("in a file that is mostly traditional")
    assert len(TRADITIONAL) == len(SIMPLIFIED)
    assert not TRADITIONAL & SIMPLIFIED


def test_files_that_cannot_be_looked_into(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        check_data(tmp_path / "none.csv")
    (tmp_path / "file.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged or cut off"):
        check_data(tmp_path / "file.csv.gz")
    (tmp_path / "file.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="only csv, tsv, jsonl and json can be checked"):
        check_data(tmp_path / "file.parquet")
    with gzip.open(tmp_path / "fine.csv.gz", "wt", encoding="utf-8") as file:
        file.write("word,gloss\n词,义\n")
    assert check_data(tmp_path / "fine.csv.gz") == []


@pytest.mark.realdata
@pytest.mark.untraced
def test_micls_has_only_what_is_known_of_it(data_folder):
    problems = check_data(data_folder / "micls" / "inventory.jsonl.gz")
    assert all(problem["severity"] == "warning" for problem in problems)
    assert sum("has this gloss" in problem["problem"] for problem in problems) == 32
    inventory = Inventory.load(data_folder / "micls" / "inventory.jsonl.gz")
    problems = check_data(data_folder / "micls" / "instances.jsonl.gz", inventory)
    assert all(problem["severity"] == "warning" for problem in problems)
    mini = data_folder / "mini_lexicon" / "expanded"
    assert check_data(mini / "inventory.jsonl") == []
    assert check_data(mini / "train.jsonl", Inventory.load(mini / "inventory.jsonl")) == []
