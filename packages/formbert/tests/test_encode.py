import json

import pytest
import torch
from formbert.config import ModelOptions
from formbert.data import Instance, locate
from formbert.encode import Encoding, Row, Span, by_tokens, marked, window
from formbert.inventory import Sense
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import ModelError
from octavo.models import load_tokenizer
from octavo.runtime import Runtime
from octavo.tiny import Shape, checkpoint

SENSE = Sense("存款_01", "存款", "把钱存进银行。", "动")


def words(encoding, ids):
    return encoding.tokenizer.convert_ids_to_tokens(ids)


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return load_tokenizer(encoder)


def test_a_pair_as_it_is_read(tokenizer):
    encoding = Encoding(tokenizer, ModelOptions(fusion=("token",), max_length=64))
    (span,) = encoding.spans([locate("他去银行存款。", "存款")])
    row = encoding.pair(span, *encoding.glosses([SENSE]))
    shown = words(encoding, row.ids)
    assert "".join(shown) == "[CLS]他去银行#存款#。[SEP][MASK]存款：把钱存进银行。[SEP]"
    assert "".join(shown[slice(*row.target)]) == "存款"
    assert "".join(shown[slice(*row.gloss)]) == "存款：把钱存进银行。"
    assert shown[row.slot] == "[MASK]"
    assert row.types == (0,) * (row.slot) + (1,) * (len(row.ids) - row.slot)


@pytest.mark.parametrize(
    ("marking", "shown"),
    [("hash", "#存款#"), ("quote", '"存款"'), ("mask", "[MASK][MASK]"), ("none", "存款")],
)
def test_markings(tokenizer, marking, shown):
    encoding = Encoding(tokenizer, ModelOptions(marking=marking))
    (span,) = encoding.spans([locate("我想先存款再买东西。", "存款")])
    assert "".join(words(encoding, span.ids)) == f"我想先{shown}再买东西。"
    inner = words(encoding, span.ids[span.start : span.end])
    assert "".join(inner) == shown.strip('#"')


def test_the_second_of_two_is_the_one_that_is_marked(tokenizer):
    encoding = Encoding(tokenizer, ModelOptions())
    (span,) = encoding.spans([locate("存款不如存款多", "存款", 4)])
    assert "".join(words(encoding, span.ids)) == "存款不如#存款#多"


def test_pos_and_morphemes_stand_beside_the_gloss(tokenizer):
    sense = Sense("a", "存款", "钱。", "名", morphemes=("存放。", "", "钱。"))
    plain = Encoding(tokenizer, ModelOptions()).gloss_text(sense)
    both = Encoding(tokenizer, ModelOptions(gloss_pos=True, morphemes=True)).gloss_text(sense)
    assert (plain, both) == ("存款：钱。", "存款：名，钱。语素：存放。；钱。")


@given(
    length=st.integers(1, 60),
    start=st.integers(0, 59),
    size=st.integers(1, 6),
    room=st.integers(1, 70),
)
def test_no_window_loses_the_word(length, start, size, room):
    start = min(start, length - 1)
    end = min(length, start + size)
    inner = window(Span(tuple(range(length)), start, end), room)
    assert len(inner.ids) == min(length, room)
    kept = inner.ids[inner.start : inner.end]
    assert kept == tuple(range(start, end))[:room]
    assert inner.ids == tuple(range(inner.ids[0], inner.ids[0] + len(inner.ids)))


def test_a_long_text_is_cut_around_the_word(tokenizer):
    text = "他说了很久的话，" * 40 + "然后去银行存款。" + "大家都不知道为什么。" * 40
    encoding = Encoding(tokenizer, ModelOptions(max_length=48))
    (span,) = encoding.spans([locate(text, "存款")])
    for row in (encoding.context(span), encoding.pair(span, *encoding.glosses([SENSE]))):
        shown = "".join(words(encoding, row.ids))
        assert len(row.ids) == 48
        assert "去银行#存款#。大家" in shown
        assert "".join(words(encoding, row.ids[slice(*row.target)])) == "存款"


def test_a_long_gloss_leaves_half_the_room_to_the_text(tokenizer):
    encoding = Encoding(tokenizer, ModelOptions(max_length=48))
    (span,) = encoding.spans([locate("我去银行存款。" * 20, "存款", 4)])
    (gloss,) = encoding.glosses([Sense("a", "存款", "把钱存进银行。" * 20)])
    row = encoding.pair(span, gloss)
    assert len(row.ids) == 48
    assert row.gloss[1] - row.gloss[0] >= 20
    assert row.target[1] - row.target[0] == 2


def test_batches_are_padded_and_marked(tokenizer):
    encoding = Encoding(tokenizer, ModelOptions())
    batch = encoding.batch(
        [Row((5, 6, 7), (0, 0, 1), (1, 2), (2, 3), 2), Row((5,), (0,))], length=4
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]
    assert batch["target"].nonzero().tolist() == [[0, 1]]
    assert batch["gloss"].nonzero().tolist() == [[0, 2]]
    assert batch["slot"].tolist() == [2, -1]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_item_once_within_the_budget(lengths, budget):
    batches = list(by_tokens(lengths, budget))
    assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[item] for item in batch) * len(batch) <= budget


def test_other_tokenizers_keep_their_frame():
    """WordPiece merges Latin letters; the word's edges are kept all the same."""
    texts = ["He deposits ABC存款abc in a bank", "存款 the money"]
    for shape in (
        Shape(kind="modernbert", alphabet="wordpiece", vocabulary=400),
        Shape(kind="bert", alphabet="bpe", vocabulary=400),
    ):
        tokenizer = load_tokenizer(checkpoint(texts, shape, Runtime(device="cpu")))
        encoding = Encoding(tokenizer, ModelOptions(marking="none", fusion=()))
        instance = Instance("ABC存款abc in a bank", 3, 5, "存款")
        (span,) = encoding.spans([instance])
        inner = encoding.tokens(["存款"])[0]
        assert span.ids[span.start : span.end] == inner
        pair = encoding.pair(span, inner)
        whole = tokenizer("存款", "存款")["input_ids"]
        single = encoding.pair(Span(inner, 0, len(inner)), inner)
        assert list(single.ids) == whole
        assert pair.ids[slice(*pair.target)] == inner


def test_a_tokenizer_without_a_mask_cannot_mask():
    shape = Shape(kind="gpt2", alphabet="bpe", vocabulary=300)
    tokenizer = load_tokenizer(checkpoint(["存款"], shape, Runtime(device="cpu")))
    with pytest.raises(ModelError, match="no mask token"):
        Encoding(tokenizer, ModelOptions(marking="mask"))


def test_the_authors_rows_are_the_tokenizers_own(tokenizer):
    encoding = Encoding(tokenizer, ModelOptions(max_length=20))
    instance = locate("他每个月都按时去银行存款。", "存款")
    pair = encoding.authors_pair(instance, SENSE)
    whole = tokenizer(
        "他每个月都按时去银行#存款#。", "存款：把钱存进银行。", truncation=True, max_length=20
    )
    assert list(pair.ids) == whole["input_ids"]
    assert marked(instance, "hash") == "他每个月都按时去银行#存款#。"
    assert encoding.authors_context(instance).ids[0] == tokenizer.cls_token_id
    assert torch.tensor(pair.types).max() == 1
    assert json.dumps(pair.ids)


def test_a_text_cannot_speak_the_models_own_signs(tokenizer):
    encoding = Encoding(tokenizer, ModelOptions(fusion=()))
    (span,) = encoding.spans([locate("他[SEP]去[MASK]银行存款。", "存款")])
    assert not set(span.ids) & {tokenizer.sep_token_id, tokenizer.mask_token_id}
