"""Cutting texts into words, against hand-worked cuts and brute force; tagging with a stand-in model."""

import logging
import random
import sys

import pytest
from formbert.data import Instance
from formbert.inventory import Inventory, Sense
from formbert.lexicon import mini_instances, mini_inventory
from formbert.predictions import Prediction
from formbert.tagger import Lexicon, TaggedToken, Tagger, check_words, segment
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import ConfigError, DataError


class FirstSense:
    """A model that always says the first sense, and keeps what it was asked."""

    def __init__(self, inventory):
        self.inventory = inventory
        self.calls = []

    def batch(self, instances):
        self.calls.append(instances)
        return [
            Prediction(one.key, one.word, self.inventory[one.word][0].sense_id) for one in instances
        ]


def of(*words):
    return Inventory(Sense(f"{word}_01", word, "义") for word in words)


@pytest.mark.parametrize(
    ("text", "words", "cut"),
    [
        ("他去银行存款。", "银行 存款", "他 去 银行 存款 。"),
        # the longest word wins
        ("银行卡在银行", "银行 银行卡", "银行卡 在 银行"),
        # from the left 研究生 命 起源, from the right 研究 生命 起源: as many, but no single character
        ("研究生命起源", "研究 研究生 生命 起源", "研究 生命 起源"),
        # from the left 结合 成分 子 时, from the right 结合 成 分子 时: equal, so from the right
        ("结合成分子时", "结合 成分 分子", "结合 成 分子 时"),
        # from the left 甲乙丙 丁, from the right 甲 乙 丙丁: fewer tokens
        ("甲乙丙丁", "甲乙丙 丙丁", "甲乙丙 丁"),
        ("花了100元买iPhone15", "花了", "花了 100 元 买 iPhone15"),
        # a word in the midst of a run of letters is not there
        ("ITEM是IT业", "IT", "ITEM 是 IT 业"),
        ("他穿T恤", "T恤", "他 穿 T恤"),
        ("XT恤", "T恤", "XT 恤"),
        ("去卡拉OK", "卡拉OK", "去 卡拉OK"),
        ("去卡拉OKA", "卡拉OK", "去 卡 拉 OKA"),
        ("第１２３号", "没有", "第 １２３ 号"),
        ("", "银行", ""),
    ],
)  # fmt: skip
def test_maximum_matching(text, words, cut):
    assert segment(text, words.split()) == cut.split()
    assert segment(text, Lexicon(words.split())) == cut.split()


def greedy(text, words, backward):
    """Maximum matching by trying every length; over characters that join nothing."""
    if backward:
        flipped = greedy(text[::-1], {word[::-1] for word in words}, False)
        return [word[::-1] for word in reversed(flipped)]
    found = []
    while text:
        size = next(n for n in range(len(text), 0, -1) if n == 1 or text[:n] in words)
        found.append(text[:size])
        text = text[size:]
    return found


@given(
    st.text("甲乙丙", max_size=12),
    st.sets(st.text("甲乙丙", min_size=1, max_size=4), max_size=8),
)
def test_it_is_the_better_of_both_directions(text, words):
    left, right = greedy(text, words, False), greedy(text, words, True)
    best = min((right, left), key=lambda cut: (len(cut), sum(len(one) == 1 for one in cut)))
    found = segment(text, words)
    assert found == best
    assert "".join(found) == text


def test_all_bundled_sentences_give_their_word():
    lexicon = Lexicon(mini_inventory())
    for one in mini_instances()["test_words"]:
        assert one.word in segment(one.text, lexicon)


@pytest.mark.untraced  # jieba reads its dictionary
def test_jieba_knows_the_inventory_and_is_silent(capfd):
    jieba = pytest.importorskip("jieba")
    inventory = of("绿蚁焙火", "银行", "存款")
    assert segment("这是绿蚁焙火炉", inventory, "jieba") == ["这是", "绿蚁焙火", "炉"]
    tagged = Tagger(FirstSense(inventory), "jieba").tag("他 去银行取存款。")
    assert [one.text for one in tagged if one.prediction] == ["银行", "存款"]
    assert capfd.readouterr() == ("", "")
    assert "绿蚁焙火" not in jieba.dt.FREQ  # the tokenizer that others use is left alone
    assert logging.getLogger("jieba").level == logging.DEBUG


def test_without_jieba(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ConfigError, match="pip install"):
        Tagger(FirstSense(of("不在缓存里")), "jieba")


def test_unknown_segmenters():
    with pytest.raises(ConfigError, match="thulac"):
        segment("文", ["文"], "thulac")
    with pytest.raises(ConfigError, match="thulac"):
        Tagger(FirstSense(of("文")), "thulac")


def test_tokens_carry_places_and_senses():
    tagger = Tagger(FirstSense(of("银行", "存款")))
    tokens = tagger.tag("银行在银行存款")
    assert [(one.text, one.start, one.end) for one in tokens] == [
        ("银行", 0, 2), ("在", 2, 3), ("银行", 3, 5), ("存款", 5, 7)
    ]  # fmt: skip
    assert [one.prediction and one.prediction.sense_id for one in tokens] == [
        "银行_01", None, "银行_01", "存款_01"
    ]  # fmt: skip


def test_the_model_is_asked_once_for_all_texts():
    wsd = FirstSense(mini_inventory())
    tagger = Tagger(wsd)
    sentences = [one.text for one in mini_instances()["test_words"]]
    random.Random(0).shuffle(sentences)
    many = tagger.tag_many(sentences)
    assert len(wsd.calls) == 1
    asked = wsd.calls[0]
    assert len({one.key for one in asked}) == len(asked)
    for one in asked:
        number, start = map(int, one.key.split("."))
        assert sentences[number] == one.text
        assert one.start == start
        assert one.text[one.start : one.end] == one.word
    for text, tokens in zip(sentences, many, strict=True):
        assert "".join(token.text for token in tokens) == text
        for token in tokens:
            assert (token.prediction is not None) == (token.text in wsd.inventory)
            assert token.prediction is None or token.prediction.word == token.text
    assert tagger.tag("没有") == [TaggedToken("没", 0, 1), TaggedToken("有", 1, 2)]
    assert tagger.tag_many([]) == []
    assert len(wsd.calls) == 1  # nothing to ask


def test_given_words_win_over_the_segmenter():
    wsd = FirstSense(of("白花", "花了"))
    tagger = Tagger(wsd)

    def known(tokens):
        return [one.text for one in tokens if one.prediction]

    text = "钱白花了"
    assert known(tagger.tag(text)) == ["花了"]
    assert known(tagger.tag(text, ["钱", "白花", "了"])) == ["白花"]
    assert known(tagger.tag(text, [(1, 3)])) == ["白花"]
    assert known(tagger.tag(text, [])) == []
    two = tagger.tag_many([text, text], [None, [(1, 3)]])
    assert [known(tokens) for tokens in two] == [["花了"], ["白花"]]
    assert known(Tagger(wsd, lambda text: [text[0], text[1:3], text[3:]]).tag(text)) == ["白花"]
    assert known(Tagger(wsd, lambda text: [(1, 3)]).tag(text)) == ["白花"]


def test_given_words_are_checked_against_the_text():
    assert check_words("他 去 银行", ["他", "去", "银行"]) == [(0, 1), (2, 3), (4, 6)]
    assert check_words("a b ", ["a", " ", "b"]) == [(0, 1), (1, 2), (2, 3)]
    for words, message in (
        (["他", "到"], "token 2, '到', does not continue the text: '去银行'"),
        (["他", ""], "token 2, ''"),
        (["他", "去"], "end before the text does, at '银行'"),
        (["他", "去", "银行", "。"], "token 4"),
        ([(0, 2), (1, 3)], "token 2, 1 to 3: must begin at 2"),
        ([(2, 9)], "end by 4"),
        ([(1, 1)], "token 1, 1 to 1"),
    ):
        with pytest.raises(DataError) as caught:
            check_words("他去银行", words)
        assert message in str(caught.value)
    tagger = Tagger(FirstSense(of("银行")))
    with pytest.raises(DataError, match="text 2 of 2: token 1"):
        tagger.tag_many(["银行", "银行"], [None, ["行"]])
    with pytest.raises(DataError, match="2 texts and the words of 1"):
        tagger.tag_many(["银行", "银行"], [None])
    with pytest.raises(DataError, match="text 1 of 1: token 1"):
        Tagger(FirstSense(of("银行")), lambda text: ["行"]).tag("银行")


def test_an_instance_is_what_the_model_gets():
    wsd = FirstSense(of("银行"))
    Tagger(wsd).tag("去银行")
    assert wsd.calls == [[Instance("去银行", 1, 3, "银行", key="0.1")]]
