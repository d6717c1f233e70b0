"""Wrong input: each is refused with exit code 2 and one line of what is wrong, where, and what to do."""

import json
import shutil

import numpy as np
import pytest
import torch
from formbert.cache import INDEX, VECTORS
from formbert.data import Instance, read_instances
from formbert.disambiguator import Disambiguator
from formbert.lexicon import mini_inventory
from octavo.errors import DataError

SENSES = [
    {"word": "存款", "gloss": "把钱存进银行。", "formation": "述宾"},
    {"word": "存款", "gloss": "银行里的钱。", "formation": "定中"},
]
ROW = {"text": "他去存款。", "word": "存款", "gold": ["存款_01"]}


@pytest.fixture
def refused(command):
    """Run a command that must refuse; gives its one line."""

    def call(*words, code=2):
        found, _, err = command(*words)
        assert found == code, err
        line = err.rstrip("\n")
        assert line.startswith("formbert: ")
        assert "\n" not in line
        return line.removeprefix("formbert: ")

    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def senses(tmp_path):
    return write(tmp_path / "senses.jsonl", SENSES)


@pytest.fixture
def ask(refused, taught, tmp_path):
    """What is said of one row that is to be answered."""

    def asked(row, *words):
        data = write(tmp_path / "rows.jsonl", [ROW, row])
        return refused("predict", taught["bi"], data, "--inventory", "mini", *words)

    return asked


def test_places_of_words(ask):
    at = ask(ROW | {"start": 1})
    assert "row 2: at 1 stands '去存', not '存款' (it stands at 2)" in at
    assert "row 2: at 9 stands '', not '存款'" in ask(ROW | {"start": 9})
    assert "at -1 stands" in ask(ROW | {"start": -1})
    assert "row 2: '存款' ends at 4, not at 5" in ask(ROW | {"start": 2, "end": 5})
    assert "row 2: '取款' is not in '他去存款。'" in ask(ROW | {"word": "取款"})
    several = ask(ROW | {"text": "存款和存款。"})
    assert "'存款' stands at 0, 3 in '存款和存款。'; give its start, or mark it with #" in several
    assert "no word is given and none is marked with #" in ask({"text": "他去存款。"})
    assert "line 2: 'text' is missing" in ask({"word": "存款"})
    assert "must be a whole number, not 'two'" in ask(ROW | {"start": "two"})


def test_lines_that_ask(refused, taught, tmp_path):
    file = tmp_path / "lines.txt"
    for line, what in (
        ("存款和存款。\t存款", "line 2: '存款' stands at 0, 3"),
        ("他去存款。\t存款:two", "line 2: the start of '存款' is 'two'; count characters from 0"),
        ("他去存款。", "line 2: no word is given"),
    ):
        file.write_text(f"他去#存款#。\n{line}\n", encoding="utf-8")
        assert what in refused("predict", taught["bi"], file, "--inventory", "mini")


def test_two_instances_of_one_name(refused, taught, tmp_path):
    data = write(tmp_path / "rows.jsonl", [ROW | {"id": "a"}, ROW | {"id": "a"}])
    line = refused("evaluate", taught["bi"], "--test-data", data, "--inventory", "mini",
                   "--out", tmp_path / "out")  # fmt: skip
    assert "two instances have the id 'a'" in line


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"formation": "述并"}, "did you mean"),
        ({"formation": 10}, "the codes 00, 01 and 10 are text: quote them"),
        ({"formation": 0}, "formation 0 is a number"),
        ({"formation": 1}, "formation 1 is a number"),
        ({"gloss": " "}, "the gloss of '存款' is empty"),
        ({"word": ""}, "the word is empty"),
        ({"sense_id": "存款_01"}, "two senses have the name '存款_01'; rename one"),
    ],
)
def test_senses(refused, taught, tmp_path, change, what):
    file = write(tmp_path / "senses.jsonl", [SENSES[0], SENSES[1] | change])
    line = refused("predict", taught["bi"], "--inventory", file)
    assert what in line
    if "name" not in what and "empty" not in what:
        assert f"{file}, row 2, '存款'" in line


def test_formation_codes_are_text_in_every_format(command, tmp_path):
    """`00`, `01` and `10` of a table, before and after a file whose numbers are wanted was read."""
    file = tmp_path / "senses.tsv"
    file.write_text("word\tgloss\tformation\n" + "".join(
        f"词{code}\t意思\t{code}\n" for code in ("00", "01", "10")), encoding="utf-8")  # fmt: skip
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tword\tstart\n词00\t词00\t0\n", encoding="utf-8")
    for _ in range(2):
        code, out, err = command("formation", "词00", "词01", "词10", "--inventory", file, "--json")
        assert code == 0, err
        assert [row["formation 1"] for row in json.loads(out)["Formations"]] == ["00", "01", "10"]
        assert [one.start for one in read_instances(rows)] == [0]


def test_data_check_tells_all_at_once(command, tmp_path):
    file = write(tmp_path / "senses.jsonl", [
        SENSES[0], SENSES[0], SENSES[1] | {"gloss": ""}, SENSES[1] | {"formation": 10},
        {"word": "發財", "gloss": "得到很多錢財。"},
    ])  # fmt: skip
    code, out, err = command("data", "check", file, "--json")
    assert code == 3
    assert "errors" in err
    rows = json.loads(out)["Problems"]
    found = {(row["row"], row["column"], row["severity"]) for row in rows}
    assert {(3, "gloss", "error"), (4, "formation", "error"), (5, "", "warning")} <= found
    assert any(row["row"] == 2 for row in rows)  # the same word and gloss twice
    assert all(row["todo"] for row in rows)


def test_words_that_no_inventory_has_are_told_not_refused(command, taught, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"text": "他去商店。", "word": "商店"}])
    out = tmp_path / "out.jsonl"
    assert command("predict", taught["bi"], data, "--inventory", "mini", "--out", out)[0] == 0
    (row,) = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert (row["sense_id"], row["reason"], row["abstained"]) == (
        None,
        "not in the inventory",
        True,
    )


def test_right_senses(refused, encoder, senses, tmp_path):
    data = tmp_path / "rows.jsonl"
    words = ("train", encoder, "--train-data", data, "--inventory", senses, "--out", tmp_path / "run",
             "--quiet")  # fmt: skip
    write(data, [ROW | {"id": "a"}, ROW | {"id": "b", "gold": []}])
    assert "1 instances have no right sense, the first is 'b'" in refused(*words)
    write(data, [ROW | {"gold": ["取款_01"]}])
    assert "row 1: '取款_01' is no sense of '存款' in the inventory" in refused(*words)
    write(data, [{"text": "他去商店。", "word": "商店", "gold": ["商店_01"]}])
    assert "'商店_01' is no sense of '商店'" in refused(*words)
    write(data, [ROW | {"split": "test"}])
    assert "holds no instance of the part 'train'" in refused(*words)
    assert not (tmp_path / "run").exists()
    data.write_text("")
    test = ("--test-data", data, "--inventory", senses, "--out", tmp_path / "run")
    assert "holds no instance" in refused("evaluate", "lesk", *test)
    write(data, [ROW | {"gold": None}])
    assert "no right sense" in refused("evaluate", "lesk", *test)


def test_nothing_to_choose_the_epoch_by(refused, encoder, tmp_path):
    single = write(tmp_path / "senses.jsonl", SENSES[:1])
    data = write(tmp_path / "rows.jsonl", [ROW | {"text": f"第{n}次存款。"} for n in range(12)])
    line = refused("train", encoder, "--train-data", data, "--inventory", single,
                   "--out", tmp_path / "run", "--quiet")  # fmt: skip
    assert "no instance has a word of several senses" in line


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--fusion", "token", "--fusion", "token"), "--fusion names one twice"),
        (("--fusion", "none", "--fusion", "token"), "--fusion none goes with no other"),
        (("--fusion", "tokens"), "tokens"),
        (("--max-length", 8), "--max-length 8: must be 16 or more"),
        (("--temperature", 0), "--temperature 0.0: must be above 0"),
        (("--dropout", 1), "--dropout 1.0: must be from 0 up to 1"),
        (("--formation-weight", -1), "--formation-weight must be 0 or more"),
        (("--rank-weight", -1), "--rank-weight must be 0 or more"),
        (("--gloss-noise", -1), "--gloss-noise must be 0 or more"),
        (("--annotation-drop", 2), "--annotation-drop must be from 0 to 1"),
        (("--predictor", "none"), "set --formation-weight 0"),
        (("--predictor", "none", "--formation-weight", 0), "predicted formations need one"),
        (("--arch", "bi", "--formation-source", "soft"), "a bi-encoder reads glosses without a context"),
        (("--objective", "in-batch"), "only a bi-encoder"),
        (("--authors",), "--authors: the authors' code predicts formations"),
        (("--authors", "--formation-source", "predicted"), "the authors' code is cross, pooled_add"),
        (("--preset", "bem", "--arch", "cross", "--marking", "quote"), "--marking none, and quote"),
        (("--preset", "fast"), "fast"),
    ],
)  # fmt: skip
def test_contradictory_options(refused, encoder, files, tmp_path, words, what):
    line = refused("train", encoder, "--train-data", files.train, "--inventory", files.senses,
                   "--out", tmp_path / "run", *words)  # fmt: skip
    assert what in line
    assert not (tmp_path / "run").exists()


def test_options_of_answers(refused, taught, files, tmp_path):
    words = ("predict", taught["bi"], files.test, "--inventory", "mini")
    for more, what in (
        (("--margin", 2), "--margin 2.0: must be from 0 to 1"),
        (("--top-k", -1), "--top-k -1: must be 0 or more"),
        (("--batch-tokens", -1), "--batch-tokens -1: must be 0 or more"),
        (("--abstain-below", 2), "--abstain-below 2.0: must be from 0 to 1"),
        (("--resume",), "--resume: name the file to go on with by --out"),
        (("--formation-source", "soft"), "bi-encoder"),
    ):
        assert what in refused(*words, *more)
    text = tmp_path / "text.txt"
    text.write_text("他去存款。\n", encoding="utf-8")
    line = refused("tag", taught["bi"], text, "--inventory", "mini", "--resume")
    assert "--resume: name the file" in line
    line = refused("margin", taught["bi"], "--inventory", "mini", "--held-out-data", files.dev)
    assert "--second: name the model" in line
    assert "--cache: name the folder" in refused("cache", taught["bi"], "--inventory", "mini")
    for name in ("knn=somewhere", "train-mfs"):
        line = refused("evaluate", name, "--test-data", files.test, "--inventory", "mini",
                       "--out", tmp_path / "out")  # fmt: skip
        assert f"{name}: name the instances that it remembers by --train-data" in line


def test_caches(refused, command, taught, files, tmp_path):
    cache = tmp_path / "cache"
    words = ("cache", taught["bi"], "--inventory", "mini", "--cache", cache)
    line = refused("cache", taught["cross"], "--inventory", "mini", "--cache", cache)
    assert "only a bi-encoder's glosses" in line
    assert command(*words)[0] == 0
    index, vectors = (cache / INDEX).read_text(), (cache / VECTORS).read_bytes()
    (cache / INDEX).write_text(json.dumps(json.loads(index) | {"model": "another"}))
    assert "holds glosses of another model; delete it or name another folder" in refused(*words)
    (cache / INDEX).write_text(index[:100])
    assert "is no cache of glosses, or damaged; delete it" in refused(*words)
    (cache / INDEX).write_text(json.dumps(json.loads(index) | {"keys": ["one"]}))
    assert "vectors for 1 glosses" in refused(*words)
    (cache / INDEX).write_text("[]")
    assert "damaged" in refused(*words)
    (cache / INDEX).write_text(index)
    (cache / VECTORS).write_bytes(vectors[:50])
    assert "damaged" in refused(*words)
    np.save(cache / VECTORS, np.array([{}], object), allow_pickle=True)
    assert "damaged" in refused(*words)
    shutil.rmtree(cache)
    cache.write_text("a file")
    assert "damaged" in refused(*words)


def test_models_that_are_none(refused, taught, encoder, tmp_path):
    words = ("--inventory", "mini")
    assert "nowhere: no such folder" in refused("predict", tmp_path / "nowhere", *words)
    assert "is no FormBERT model but bert" in refused("predict", encoder, *words)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("predict", tmp_path / "empty", *words)
    broken = shutil.copytree(taught["bi"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert str(broken) in refused("predict", broken, *words)
    pickled = shutil.copytree(taught["bi"], tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert str(pickled) in refused("predict", pickled, *words)
    line = refused("formation", "存款", "--model", taught["bi"])
    assert str(taught["bi"]) in line


def test_checkpoints_of_the_authors(refused, encoder, tmp_path):
    source, out = tmp_path / "theirs", tmp_path / "out"
    source.mkdir()
    words = ("convert", source, "--out", out)
    assert "holds neither model.safetensors nor pytorch_model.bin" in refused(*words)
    torch.save({"bert.x": torch.zeros(1)}, source / "pytorch_model.bin")
    assert "can run any code; add --allow-pickle" in refused(*words)
    line = refused(*words, "--allow-pickle")
    assert f"{source}: these weights are not of the authors' model" in line
    for name in ("pytorch_model.bin", "model.safetensors"):
        (source / name).write_bytes(b"nothing")
        assert f"{source / name}" in refused(*words, "--allow-pickle")
    out.mkdir()
    assert "exists already; choose another name or add --overwrite" in refused(*words)


def test_files_that_are_not_there_or_empty(refused, encoder, taught, files, judged_file, tmp_path):
    nowhere, empty = tmp_path / "nowhere.jsonl", tmp_path / "empty.jsonl"
    empty.touch()
    model, mini = taught["bi"], ("--inventory", "mini")
    out = ("--out", tmp_path / "out")
    for words in (
        ("predict", model, nowhere, *mini),
        ("predict", model, tmp_path / "nowhere.txt", *mini),
        ("predict", model, files.test, "--inventory", nowhere),
        ("predict", model, files.test, *mini, "--formation-lexicon", nowhere),
        ("tag", model, tmp_path / "nowhere.txt", *mini),
        ("margin", model, *mini, "--held-out-data", nowhere, "--second", model),
        ("evaluate", model, *mini, "--test-data", nowhere, *out),
        ("train", encoder, *mini, "--train-data", nowhere, *out),
        ("train", encoder, *mini, "--train-data", files.train, "--held-out-data", nowhere, *out),
        ("formation", "--file", nowhere, *mini),
        ("formation", "--train-data", nowhere, *out),
        ("data", "check", nowhere),
        ("data", "import", "micls", nowhere, *out),
        ("compare", nowhere, judged_file, "--test-data", files.test, *mini),
        ("report", nowhere, "--test-data", files.test, *mini, *out),
        ("predict", model, empty, *mini),
        ("train", encoder, *mini, "--train-data", empty, *out),
        ("predict", model, files.test, "--inventory", empty),
        ("compare", empty, judged_file, "--test-data", files.test, *mini),
    ):
        line = refused(*words)
        if empty not in words[-1:]:
            assert (
                "nowhere" in line
                or "empty" in line
                or "no sense" in line
                or "no prediction" in line
            )
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty.txt").touch()
    line = refused("predict", model, tmp_path / "empty.txt", *mini)
    assert "is empty; give lines like `text<TAB>word`" in line


@pytest.fixture
def judged_file(files, tmp_path):
    """Answers to the first test instances alone, as a file of predictions."""
    rows = [
        {"id": one.key, "word": one.word, "sense_id": None, "abstained": True, "candidates": []}
        for one in read_instances(files.test)
    ]
    return write(tmp_path / "told.jsonl", rows)


def test_predictions_that_do_not_fit(refused, files, judged_file, tmp_path):
    words = ("--test-data", files.test, "--inventory", "mini")
    rows = judged_file.read_text().splitlines()
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(rows[1:]) + "\n")
    assert "1 instances have no prediction" in refused("compare", judged_file, short, *words)
    short.write_text("\n".join([*rows[:-1], rows[-1][:20]]) + "\n")
    line = refused("compare", judged_file, short, *words)
    assert f"{short}, line {len(rows)}: is no prediction" in line
    out = ("--out", tmp_path / "out")
    line = refused("report", judged_file, judged_file, *words, *out)
    assert "name one evaluation or more, each folder of another name" in line


def test_formations_that_nothing_tells(refused, files, tmp_path):
    assert "--model or --inventory" in refused("formation", "存款")
    assert "no word is given" in refused("formation", "--inventory", "mini")
    line = refused("formation", "存款", "--inventory", "mini", "--top-k", 0)
    assert "--top-k 0: must be 1 or more" in line
    assert "--out: name the folder" in refused("formation", "--train-data", files.senses)
    bare = write(tmp_path / "bare.jsonl", [{"word": "存款", "gloss": "银行里的钱。"}])
    line = refused("formation", "--train-data", bare, "--out", tmp_path / "out")
    assert "formation" in line
    assert not (tmp_path / "out").exists()
    lexicon = tmp_path / "lexicon.tsv"
    lexicon.write_text("word\tformation\n存款\t好中\n", encoding="utf-8")
    line = refused("evaluate", "nowhere", "--test-data", files.test, "--inventory", "mini", "--out",
                   tmp_path / "out", "--formation-lexicon", lexicon)  # fmt: skip
    assert f"{lexicon}, row 1: " in line


def test_nothing_is_overwritten_unasked(refused, command, taught, encoder, files, tmp_path):
    out, mini = tmp_path / "out.jsonl", ("--inventory", "mini")
    out.write_text("mine\n")
    text = tmp_path / "text.txt"
    text.write_text("他去存款。\n", encoding="utf-8")
    file = ("predict", taught["bi"], files.test, *mini, "--out", out)
    for words in (file, ("tag", taught["bi"], text, *mini, "--out", out),
                  ("formation", "存款", *mini, "--out", out)):  # fmt: skip
        assert f"{out} exists already; choose another name or add --overwrite" in refused(*words)
        assert "is a folder; name a file" in refused(*words[:-1], tmp_path, "--overwrite")
    assert out.read_text() == "mine\n"
    assert command(*file, "--overwrite")[0] == 0
    assert len(out.read_text().splitlines()) == len(read_instances(files.test))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    run = ("evaluate", "lesk", "--test-data", files.test, *mini, "--out", folder)
    assert "holds no run; choose another --out" in refused(*run)
    words = tmp_path / "cmorph.tsv"
    words.write_text("word\ttype\n存款\tverb_object\n", encoding="utf-8")
    (folder / "formations.jsonl").write_text("mine")
    line = refused("data", "import", "cmorph", words, "--out", folder)
    assert f"{folder / 'formations.jsonl'} exists already" in line
    assert (folder / "formations.jsonl").read_text() == "mine"
    shutil.rmtree(folder)
    assert command(*run)[0] == 0
    assert "holds a finished run; choose another --out or --overwrite" in refused(*run)
    assert command(*run, "--overwrite")[0] == 0


def test_answers_to_other_questions_are_not_gone_on_with(refused, command, taught, files, tmp_path):
    out = tmp_path / "out.jsonl"
    words = ("--inventory", "mini", "--out", out, "--resume", "--quiet")
    assert command("predict", taught["bi"], files.dev, *words)[0] == 0
    assert "answers other questions" in refused("predict", taught["bi"], files.test, *words)


def test_a_place_outside_the_text(make):
    made = make(arch="bi")
    wsd = Disambiguator(made.model, made.tokenizer, mini_inventory())
    with pytest.raises(DataError, match="question 1: at 40 stands"):
        wsd.batch([Instance("他去银行存款。", 40, 42, "存款")])
