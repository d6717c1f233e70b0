"""Every layout with rows of our own, and the public files where they lie beside the project."""

import gzip
import json

import pytest
from formbert.data import Instance, read_instances
from formbert.formations import Formation
from formbert.importers import IMPORTERS, import_data, read
from formbert.inventory import Inventory
from octavo.errors import ConfigError, DataError

HEADER = "word\tcontext\tdefinition\tformation\tmorpheme1\tmorpheme2\tlabel"


def spot(one: Instance) -> str:
    """The text with its target in brackets."""
    return f"{one.text[: one.start]}[{one.text[one.start : one.end]}]{one.text[one.end :]}"


@pytest.fixture
def micls(tmp_path):
    inventory = [
        "白花_0101 白花 名 白色的花。", "白花_0102 白花 动 花了钱却没有用。",
        "东西_0101 东西 名 事物。", "东西_0102 东西 名 事物。", "东西_0103 东西 名 方向。", "坏行",
    ]  # fmt: skip
    with gzip.open(tmp_path / "WrdInv.txt.gz", "wt", encoding="utf-8", newline="") as file:
        file.write("\r\n".join(inventory) + "\r\n")
    rows = [
        # the word stands before its mark too; the rows of a text need not lie together
        "白花\t白花店的#白花#开了。\t白花：白色的花。\t定中\t白色。\t花朵。\t1",
        "东西\t#东西#很多。\t东西：事物。\t00\tNULL\tNULL\t1",
        "白花\t白花店的#白花#开了。\t白花：花了钱却没有用。\t状中\t没有用。\t用钱。\t0",
        "东西\t#东西#很多。\t东西：方向。\t联合\t东边。\t西边。\t1",
        "东西\t#东西#很多。\t东西：方向。\t00\t东边。\t西边。\t0",
        "白花\t没有标记的白花。\t白花：白色的花。\t定中\t白色。\t花朵。\t1",
        "白花\t这是#白花#。\t白花：不在表里。\t定中\t白色。\t花朵。\t1",
        "白花\t那是#白花#。\t白花：白色的花。\t定中\t白色。\t花朵。\t0",
    ]
    (tmp_path / "val.tsv").write_text(
        "\r\n".join([HEADER, *rows, ""]), encoding="utf-8", newline=""
    )
    rows = [
        "白花\t这个#白花#话题叫#白花#。\t白花：白色的花。\t定中\t白色。\t花朵。\t1",
        "白花\t白花店的#白花#开了。\t白花：白色的花。\t状中\t白色。\t花朵。\t1",
        "东西\t分不清#东西#。\t东西：方向。\t联合\t东边。\t西边。\t1",
        "东西\t" + "远" * 120 + "#东西#。\t东西：方向。\t好中\t东边。\t西边。\t1",
    ]
    (tmp_path / "test.tsv").write_text("\n".join([HEADER, *rows, ""]), encoding="utf-8")
    return tmp_path


def test_micls(micls):
    done = read("micls", micls)
    assert [(one.key, spot(one), one.gold, one.split) for one in done.instances[:-1]] == [
        ("val-00000", "白花店的[白花]开了。", ("白花_0101",), "val"),
        ("val-00001", "[东西]很多。", ("东西_0101", "东西_0103"), "val"),
        ("test-00004", "这个[白花]话题叫#白花#。", ("白花_0101",), "test"),
        ("test-00005", "白花店的[白花]开了。", ("白花_0101",), "test"),
        ("test-00006", "分不清[东西]。", ("东西_0103",), "test"),
    ]
    assert done.inventory is not None
    senses = {name: (sense.formation, sense.morphemes, sense.pos)
              for name, sense in done.inventory.by_id.items()}  # fmt: skip
    assert senses == {
        "白花_0101": (Formation.MODIFIER_HEAD, ("白色。", "花朵。"), "名"),
        "白花_0102": (Formation.ADVERBIAL_HEAD, ("没有用。", "用钱。"), "动"),
        "东西_0101": (Formation.OPAQUE, ("", ""), "名"),
        "东西_0102": (None, (), "名"),  # the same gloss: rows are the first one's
        "东西_0103": (Formation.PARALLEL, ("东边。", "西边。"), "名"),
    }
    assert done.counts == {
        "senses": 5, "words": 2, "instances": 6,
        "senses with the same word and gloss as another": 1,
        "rows that repeat a sense of their instance": 1,
        "of these with another label (right wins)": 1, "instances with such rows": 1,
        "rows whose word stands elsewhere in the text too": 4, "texts with # besides the mark": 1,
        "targets beyond character 108": 1, "instances with several right senses": 1,
        "senses with several formations": 2, "texts in several splits": 1,
        "unknown formation 好中": 1,
        "lost: not four fields: name, word, POS, gloss": 1,
        "lost: the word is not between # in its context": 1,
        "lost: no sense of the word has this gloss": 1,
        "lost: no sense of the instance is labelled right": 2,
    }  # fmt: skip
    assert any("val.tsv, row 6: the word is not between #" in line for line in done.lost)
    one_file = read("micls", micls / "test.tsv")
    assert {one.split for one in one_file.instances} == {"test"}


def test_micls_needs_its_inventory(micls):
    (micls / "WrdInv.txt.gz").unlink()
    with pytest.raises(DataError, match=r"has no WrdInv\.txt; without it import as ficls"):
        read("micls", micls)


def test_ficls(tmp_path):
    rows = [
        "context\tdefinition\tformation\tlabel",
        "他在#炒饭#。\t炒饭：把饭炒熟。\t述宾\t1", "他在#炒饭#。\t炒饭：炒过的饭。\t定中\t0",
        "一碗#炒饭#。\t炒过的饭。\t定中\t1", "没有\t炒饭：炒过的饭。\t定中\t1",
        "又是#炒饭#。\t炒饭：\t定中\t1",
    ]  # fmt: skip
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    done = read("ficls", tmp_path)
    assert done.inventory is not None
    assert [(s.sense_id, s.gloss, s.formation) for s in done.inventory.senses] == [
        ("炒饭_01", "把饭炒熟。", Formation.VERB_OBJECT),
        ("炒饭_02", "炒过的饭。", Formation.MODIFIER_HEAD),
    ]
    assert [(spot(one), one.gold) for one in done.instances] == [
        ("他在[炒饭]。", ("炒饭_01",)), ("一碗[炒饭]。", ("炒饭_02",)),
    ]  # fmt: skip
    assert done.counts["lost: the word is not between # in its context"] == 1
    assert done.counts["lost: the gloss is empty"] == 1


def test_micls_oov(tmp_path):
    text = "word\tcontext\r\n重名\t他～轻利，重名人。\r\n不平\t没有标记\r\n好人\t～和～。\r\n"
    (tmp_path / "OOV.tsv").write_text(text, encoding="utf-8", newline="")
    done = read("micls-oov", tmp_path)
    assert [spot(one) for one in done.instances] == ["他[重名]轻利，重名人。", "[好人]和好人。"]
    assert all(one.gold == () and one.split == "oov" for one in done.instances)
    assert done.inventory is None
    assert done.counts["texts with several ～ (the first is the target)"] == 1
    assert done.lost == [f"{tmp_path / 'OOV.tsv'}, row 2: no ～ stands for the word"]


def test_mordis(tmp_path):
    lines = [
        "走～走～。,动_1,动,动,移动。",
        '"他说，快～。",跑_1,跑,动,快走。',
        "短行,x",
        "～,y_1,乙,名,第二。",
    ]
    (tmp_path / "MorTxt_train.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "MorWrd_test.csv").write_text(
        "运～,动_1,动,动,移动。,身体活动。\n运～,动_1,动,动,移动。,身体活动。\n", encoding="utf-8"
    )
    done = read("mordis", tmp_path)
    assert [(one.key, spot(one), one.gold) for one in done.instances] == [
        ("txt-train-00000", "走[动]走动。", ("动_1",)),
        ("txt-train-00001", "他说，快[跑]。", ("跑_1",)),
        ("txt-train-00003", "[乙]", ("y_1",)),
        ("wrd-test-00000", "运[动]：身体活动。", ("动_1",)),
        ("wrd-test-00001", "运[动]：身体活动。", ("动_1",)),
    ]
    assert done.inventory is not None
    assert done.inventory.by_id["动_1"].gloss == "移动。"
    assert done.counts["repeated rows"] == 1
    assert done.counts["lost: not five cells (a sentence) or six (a word)"] == 1
    (tmp_path / "MorInv.txt").write_text("动_1 动 动 移动。\n静_1 静 形 不动。\n", encoding="utf-8")
    done = read("mordis", tmp_path)
    assert done.inventory is not None
    assert set(done.inventory) == {"动", "静"}
    assert done.counts["lost: the morpheme's sense is not in MorInv.txt"] == 2


def test_sememewsd(tmp_path):
    row = {"context": ["我", "看", "<target>", "。"], "target_word": "中医", "target_position": 2,
           "target_word_pos": "n", "sense": {"医", "知识"}}  # fmt: skip
    other = row | {"sense": {"人"}, "context": ["<target>", "来", "了"]}
    lines = [repr(row), repr(other), repr(row | {"sense": {"知识", "医"}}), "__import__('os')",
             repr(row | {"context": ["没有"]})]  # fmt: skip
    (tmp_path / "dataset.txt").write_text("\n".join(lines), encoding="utf-8")
    done = read("sememewsd", tmp_path)
    assert [(spot(one), one.gold) for one in done.instances] == [
        ("我看[中医]。", ("中医_01",)), ("[中医]来了", ("中医_02",)), ("我看[中医]。", ("中医_01",)),
    ]  # fmt: skip
    assert done.inventory is not None
    assert [sense.gloss for sense in done.inventory["中医"]] == ["医；知识", "人"]
    assert [line.split(": ")[1] for line in done.lost] == [
        "not a dict with context, target_word, sense, ...",
        "not one <target> and a sememe or more",
    ]


def test_mclwic(tmp_path):
    row = {"id": "dev.0", "lemma": "程序", "pos": "NOUN", "sentence1": "电脑程序。",
           "sentence2": "程序复杂。", "start1": "2", "end1": "4",
           "start2": "0", "end2": "2"}  # fmt: skip
    rows = [row, row | {"id": "dev.1"}, row | {"id": "dev.2"}, row | {"id": "dev.3", "end1": "99"},
            row | {"id": "dev.4", "start2": ""}]  # fmt: skip
    (tmp_path / "dev.data").write_text(json.dumps(rows), encoding="utf-8")
    gold = [{"id": "dev.0", "tag": "T"}, {"id": "dev.1", "tag": "F"}]
    (tmp_path / "dev.gold").write_text(json.dumps(gold), encoding="utf-8")
    done = read("mclwic", tmp_path)
    assert [(pair.key, pair.same) for pair in done.pairs] == [
        ("dev.0", True), ("dev.1", False), ("dev.2", None),
    ]  # fmt: skip
    assert [spot(done.pairs[0].first), spot(done.pairs[0].second)] == [
        "电脑[程序]。",
        "[程序]复杂。",
    ]
    assert [one.key for one in done.instances[:2]] == ["dev.0.1", "dev.0.2"]
    assert done.counts["pairs without an answer"] == 1
    assert done.counts["lost: the offsets lie outside the sentence"] == 1
    assert done.counts["lost: no id, lemma, or sentence with start and end"] == 1
    (tmp_path / "dev.data").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="must hold a list of objects"):
        read("mclwic", tmp_path)
    (tmp_path / "dev.data").write_text("[\n{,", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: Expecting property name"):
        read("mclwic", tmp_path)
    (tmp_path / "dev.data").unlink()
    with pytest.raises(DataError, match=r"has no \.data file"):
        read("mclwic", tmp_path)


def test_raganato(tmp_path):
    (tmp_path / "zh.data.xml").write_text(
        '<corpus lang="zh"><text id="d0"><sentence id="d0.s0">'
        '<wf lemma="我" pos="PRON">我</wf>'
        '<instance id="d0.s0.t0" lemma="存款" pos="NOUN">存款</instance>'
        '</sentence><sentence id="d0.s1"><wf lemma="the" pos="DET">The</wf>'
        '<instance id="d0.s1.t0" lemma="bank" pos="NOUN">banks</instance>'
        '<instance lemma="be" pos="VERB">are</instance></sentence></text></corpus>',
        encoding="utf-8",
    )
    (tmp_path / "zh.gold.key.txt").write_text("d0.s0.t0 k1 k2\nd9.s9.t9 k3\n", encoding="utf-8")
    done = read("raganato", tmp_path)
    assert [(one.key, spot(one), one.gold, one.split) for one in done.instances] == [
        ("d0.s0.t0", "我[存款]", ("k1", "k2"), "zh"), ("d0.s1.t0", "The [banks] are", (), "zh"),
    ]  # fmt: skip
    assert done.counts == {
        "instances": 2, "words in another form than their lemma": 1,
        "instances with several right senses": 1, "instances without a right sense": 1,
        "keys without an instance": 1, "lost: an instance without an id or a word": 1,
    }  # fmt: skip
    (tmp_path / "zh.data.xml").write_text("<corpus>", encoding="utf-8")
    with pytest.raises(DataError, match=r"zh\.data\.xml: no element found"):
        read("raganato", tmp_path / "zh.data.xml")
    (tmp_path / "zh.data.xml").unlink()
    with pytest.raises(DataError, match=r"has no \.data\.xml file"):
        read("raganato", tmp_path)


def test_cmorph(tmp_path):
    file = tmp_path / "cmorph.tsv"
    file.write_text(
        "word\ttype_id\ttype\n讀書\t4\tverb_object\n乙級\t2\tmodifier_head\n讀書\t3\tparallel\n"
        "天\t9\tunheard\n", encoding="utf-8",
    )  # fmt: skip
    done = read("cmorph", file)
    assert [(one.word, one.coarse, one.formation) for one in done.formed[:2]] == [
        ("讀書", "verb_object", None), ("乙級", "modifier_head", None),
    ]  # fmt: skip
    assert done.counts["words with several formations"] == done.counts["repeated words"] == 1
    assert done.lost[0].endswith("the type 'unheard' is none of the six")


ROWS = [("云养", "状中", "远远地养"), ("网红", "定中", ""), ("某某", "00", ""), ("空白", "", "")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_neologism(tmp_path, kind):
    file = tmp_path / f"exist_words.{kind}"
    names = ("词语", "Label", "释义")
    objects = [dict(zip(names, row, strict=True)) for row in ROWS]
    if kind == "json":
        text = json.dumps(objects)
    elif kind == "jsonl":
        text = "\n".join(map(json.dumps, objects))
    else:
        text = "\n".join(("," if kind == "csv" else "\t").join(row) for row in [names, *ROWS])
    file.write_text(text, encoding="utf-8")
    done = read("neologism", file)
    assert [(one.word, one.formation, one.coarse, one.gloss) for one in done.formed] == [
        ("云养", Formation.ADVERBIAL_HEAD, "modifier_head", "远远地养"),
        ("网红", Formation.MODIFIER_HEAD, "modifier_head", ""),
        ("某某", Formation.OPAQUE, "other", ""),
    ]
    assert done.lost == [f"{file}, row 4: no word or no formation"]


def test_a_formation_read_as_a_number_is_told(tmp_path):
    file = tmp_path / "words.jsonl"
    file.write_text('{"word": "网红", "formation": "定中"}\n{"word": "某某", "formation": 0}\n')
    assert "codes 00, 01 and 10 are text" in read("neologism", file).lost[0]
    file.write_text('{"word": "网红", "kind": "定中"}\n')
    with pytest.raises(DataError, match="no column for the formation; it may be named formation"):
        read("neologism", file)
    file.write_text("{,")
    with pytest.raises(DataError, match="line 1, column 2"):
        read("neologism", file)


def test_what_is_written_is_read_again(micls, tmp_path):
    out = tmp_path / "out"
    counts = import_data("micls", micls, out)
    done = read("micls", micls)
    assert counts == done.counts
    inventory = Inventory.load(out / "inventory.jsonl")
    assert done.inventory is not None
    assert [(s.sense_id, s.gloss, s.formation) for s in inventory.senses] == [
        (s.sense_id, s.gloss, s.formation) for s in done.inventory.senses
    ]
    assert read_instances(out / "instances.jsonl", inventory=inventory) == done.instances
    told = json.loads((out / "imported.json").read_text(encoding="utf-8"))
    assert (told["counts"], told["lost"]) == (counts, done.lost)
    assert not (out / "pairs.jsonl").exists()
    with pytest.raises(ConfigError, match="exists already"):
        import_data("micls", micls, out)
    assert import_data("micls", micls, out, overwrite=True) == counts


def test_pairs_and_formations_are_written(tmp_path):
    words = tmp_path / "words.csv"
    words.write_text("word,formation\n网红,定中\n", encoding="utf-8")
    import_data("neologism", words, tmp_path / "words")
    row = json.loads((tmp_path / "words" / "formations.jsonl").read_text(encoding="utf-8"))
    assert row == {"word": "网红", "formation": "定中", "coarse": "modifier_head", "pos": "",
                   "gloss": ""}  # fmt: skip
    data = tmp_path / "dev.data"
    data.write_text(json.dumps([{"id": "x", "lemma": "好", "sentence1": "好人", "sentence2": "很好",
                                 "start1": 0, "end1": 1, "start2": 1, "end2": 2}]))  # fmt: skip
    import_data("mclwic", data, tmp_path / "pairs")
    row = json.loads((tmp_path / "pairs" / "pairs.jsonl").read_text(encoding="utf-8"))
    assert (row["same"], row["second"]["start"], row["first"]["text"]) == (None, 1, "好人")


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no importer 'ontonotes'; there are micls, micls-oov"):
        read("ontonotes", tmp_path)
    for kind in IMPORTERS:
        with pytest.raises(DataError, match="no such file or folder"):
            read(kind, tmp_path / "none")
    with pytest.raises(DataError, match=r"has none of OOV\.tsv"):
        read("micls-oov", tmp_path)
    (tmp_path / "OOV.tsv").write_text("word\tcontext\n甲\t没有\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"nothing in it could be read as micls-oov; the first row"):
        read("micls-oov", tmp_path)
    broken = tmp_path / "MorTxt_train.csv"
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        read("mordis", tmp_path)
    broken.unlink()
    (tmp_path / "MorTxt_train.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged or cut off"):
        read("mordis", tmp_path)


@pytest.mark.realdata
@pytest.mark.untraced
def test_micls_comes_out_as_the_derivation_says(data_folder):
    folder = data_folder / "micls"
    done = read("micls", folder)
    with gzip.open(folder / "instances.jsonl.gz", "rt", encoding="utf-8") as file:
        derived = [json.loads(line) for line in file]
    assert len(done.instances) == len(derived) == 15_878
    for one, row in zip(done.instances, derived, strict=True):
        assert one.row() | {"n_candidates": row["n_candidates"]} == row
    assert done.inventory is not None
    assert all(len(done.inventory[row["word"]]) == row["n_candidates"] for row in derived)
    with gzip.open(folder / "inventory.jsonl.gz", "rt", encoding="utf-8") as file:
        derived = [json.loads(line) for line in file]
    for sense, row in zip(done.inventory.senses, derived, strict=True):
        morphemes = [part or "" for part in row["morphemes"] or ()]  # null there, empty here
        assert sense.row() == row | {"morphemes": morphemes, "examples": []}
    met = {
        "senses": 20_492, "words": 15_000, "instances": 15_878, "instances with such rows": 82,
        "rows that repeat a sense of their instance": 89, "instances with several right senses": 1,
        "senses with several formations": 4, "texts with # besides the mark": 1,
        "rows whose word stands elsewhere in the text too": 1_388, "texts in several splits": 69,
        "senses with the same word and gloss as another": 32, "targets beyond character 108": 75,
    }  # fmt: skip
    assert {name: done.counts[name] for name in met} == met
    assert not done.lost
    assert sum(sense.formation is not None for sense in done.inventory.senses) == 13_766


@pytest.mark.realdata
@pytest.mark.untraced
def test_the_other_public_files(data_folder):
    done = read("mordis", data_folder / "mordis")
    counts: dict[str, int] = {}
    for one in done.instances:
        assert one.text[one.start : one.end] == one.word
        counts[one.split] = counts.get(one.split, 0) + 1
    assert counts == {"txt-train": 18_221, "txt-valid": 2_296, "txt-test": 2_283,
                      "wrd-valid": 8_510, "wrd-test": 8_509}  # fmt: skip
    assert not done.lost
    assert len(read("micls-oov", data_folder / "micls").instances) == 173
    done = read("sememewsd", data_folder / "sememewsd")
    assert done.inventory is not None
    assert (len(done.instances), len(done.inventory), len(done.inventory.senses)) == (2967, 37, 131)
    done = read("mclwic", data_folder / "mclwic_zh")
    assert (len(done.pairs), sum(bool(pair.same) for pair in done.pairs)) == (2000, 1000)
    done = read("cmorph", data_folder / "cmorph" / "cmorph_8186.tsv")
    kinds = [one.coarse for one in done.formed]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "modifier_head": 3681, "parallel": 2141, "verb_object": 1239, "verb_complement": 755,
        "other": 236, "subject_predicate": 134,
    }  # fmt: skip
