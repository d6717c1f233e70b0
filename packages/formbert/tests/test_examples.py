"""Each example runs on a small model, and prints what the commands would say."""

import json

from formbert import Disambiguator


def test_disambiguate(example, taught, tmp_path, capsys):
    texts, out = tmp_path / "texts.txt", tmp_path / "out.jsonl"
    texts.write_text("他去银行存款。\n今天没有。\n这笔存款很大，他去征文。\n", encoding="utf-8")
    example("disambiguate").main(taught["cross"], texts, out)
    printed = capsys.readouterr().out.splitlines()
    answer = Disambiguator.from_pretrained(taught["cross"], "mini")("他去银行存款。", "存款")
    assert printed[0].startswith(f"存款: {answer.gloss} ({answer.formation}, ")
    assert [line.split()[1] for line in printed[1:3]] == [one.sense_id for one in answer.candidates]
    assert [line.partition(":")[0] for line in printed[3:]] == ["存款", "征文", "存款"]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [[(start, word) for start, word, _ in row["senses"]] for row in rows] == [
        [(4, "存款")], [], [(2, "存款"), (9, "征文")]
    ]  # fmt: skip
    assert rows[0]["senses"][0][2] == answer.sense_id


def test_own_inventory(example, taught, tmp_path, capsys):
    """Of words that the model has never met; a word of one sense is never in doubt."""
    senses, sentences = tmp_path / "senses.tsv", tmp_path / "sentences.txt"
    senses.write_text(
        "word\tgloss\tpos\n画画\t用笔做出图来。\t动\n画画\t做出来的图。\t名\n花钱\t把钱用掉。\t动\n"
        "花钱\t把钱用掉。\t动\n商店\t卖东西的地方。\t名\n",
        encoding="utf-8",
    )
    sentences.write_text("他正在#画画#。\n他去#商店#。\n他说#没有#。\n", encoding="utf-8")
    example("own_inventory").main(taught["bi"], senses, sentences)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("row 4: ")  # the same gloss twice
    first, shop, unknown, last = printed[-4:]
    assert first.split()[1] in ("画画_01", "画画_02")
    assert shop.split()[1:] == ["商店_01", "1.00", "商店_01"]
    assert unknown.split()[1] == "None"
    assert last in ("to be looked at: 1 of 3", "to be looked at: 2 of 3")
