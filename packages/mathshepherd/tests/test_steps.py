"""Steps split, joined and tagged: what is written is read back, for tokenizers of several kinds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mathshepherd import shop
from mathshepherd.steps import (
    FORMAT_FILE,
    StepFormat,
    StepTokens,
    add_words,
    save_format,
    saved_format,
)
from octavo import tiny
from octavo.errors import ConfigError, DataError, ModelError
from tokenizers import Tokenizer, decoders, models
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

PLAIN = StepFormat(plain=True)
words = st.text("ab 12+=.$\\{}ä:к", min_size=1, max_size=12).map(str.strip).filter(bool)
steps_of_words = st.lists(words, min_size=1, max_size=5)
formats = st.builds(
    StepFormat,
    numbered=st.booleans(),
    tag=st.sampled_from(["ки", "<step>"]),
    joiner=st.sampled_from(["\n", " ", "\n\n"]),
    prompt=st.sampled_from(["{question}", "Q: {question}\nA:", "<user>{question}</user>\n"]),
)


def test_the_default_is_the_released_datas():
    text = StepFormat().prefix("How many? ", ["2 + 3 = 5", "Step 2: so 5. The answer is: 5"])
    assert text == "How many? Step 1: 2 + 3 = 5 ки\nStep 2: so 5. The answer is: 5 ки"


@given(words, steps_of_words, formats)
def test_steps_come_back(question, steps, form):
    text = form.prefix(question, steps)
    assert text.startswith(form.question(question))
    assert text.count(form.tag) == len(steps)
    assert text.endswith(form.tag)
    tail = text[len(form.question(question)) :]
    found = form.split(tail)
    assert found == tuple(form.numbered_steps(steps))
    assert form.prefix(question, found) == text  # numbers are not put twice
    if not form.numbered:
        assert found == tuple(steps)


@given(words, steps_of_words, formats)
def test_a_beginning_is_a_prefix_of_the_whole(question, steps, form):
    whole = form.prefix(question, steps)
    for n in range(len(steps)):
        assert whole.startswith(form.prefix(question, steps[:n]))
        assert form.to_continue(question, steps[:n]) == form.prefix(question, steps[:n])


@given(words, steps_of_words, st.booleans())
def test_plain_steps_come_back_line_by_line(question, steps, numbered):
    form = StepFormat(plain=True, numbered=numbered)
    text = form.to_continue(question, steps)
    assert form.tag not in text
    assert text.endswith("\n")
    found = form.split(text[len(form.question(question)) :])
    assert found == tuple(form.numbered_steps(steps))
    assert form.to_continue(question, steps[:0]) == form.question(question)
    assert text.startswith(form.to_continue(question, steps[:1]))


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Step 1: a ки\nStep 2: b ки", ["Step 1: a", "Step 2: b"]),
        ("Step 1: a ки\nStep 2: b", ["Step 1: a", "Step 2: b"]),  # no tag behind the last
        ("a ки ки\n ки b ки", ["a", "b"]),  # blank ones
        ("Step 1: a\nwith a line\nStep 2: b", ["Step 1: a\nwith a line", "Step 2: b"]),
        ("First\n  Step 1 : a", ["First", "Step 1 : a"]),
        ("a, see Step 1: b\n\nc\n", ["a, see Step 1: b", "c"]),
        ("", []),
        (" ки \n", []),
    ],
)
def test_texts_are_split(text, steps):
    assert StepFormat().split(text) == tuple(steps)


def test_numbers_are_put_where_there_are_none():
    assert StepFormat().numbered_steps(["a", " Step 2: b ", "\nStep 9: c"]) == [
        "Step 1: a", "Step 2: b", "Step 9: c"
    ]  # fmt: skip
    assert StepFormat(numbered=False).numbered_steps([" a "]) == ["a"]


def test_prompts_and_the_blank_behind_them():
    chat = StepFormat(prompt="<user>{question}</user>\n", numbered=False)
    assert chat.question(" Why? {question}\n") == "<user>Why? {question}</user>\n"
    assert chat.prefix("Why?", ["a"]) == "<user>Why?</user>\na ки"
    assert StepFormat(prompt="{question} ", numbered=False).prefix("Why?", ["a"]) == "Why? a ки"
    assert replace(chat, plain=True).to_continue("Why?", ["a"]) == "<user>Why?</user>\na\n"


@pytest.mark.parametrize("form", [StepFormat(), PLAIN])
def test_texts_that_would_be_read_wrongly_are_refused(form):
    with pytest.raises(DataError, match="a question holds the tag 'ки': 'Why ки"):
        form.to_continue("Why ки?", ["a"])
    with pytest.raises(DataError, match="step 2 holds the tag 'ки': 'b ки c'"):
        form.to_continue("Why?", ["a", "b ки c"])
    with pytest.raises(DataError, match="step 2 of 3 is blank"):
        form.to_continue("Why?", ["a", " \n", "c"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "Q:"}, "--prompt 'Q:': must hold {question} once"),
        ({"prompt": "{question}{question}"}, "must hold {question} once"),
        ({"prompt": "{question} ки"}, "--prompt .*: holds the tag 'ки'"),
        ({"tag": " "}, "--tag ' ': must be a word without blanks"),
        ({"tag": "ки "}, "must be a word without blanks around it"),
        ({"good": "-"}, "--good and --bad are the same"),
        ({"joiner": ""}, "--joiner: must not be empty"),
    ],
)
def test_formats_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        StepFormat(**options)


def test_a_format_is_kept_beside_its_model(tmp_path):
    form = StepFormat(tag="<step>", joiner=" ", numbered=False)
    assert saved_format(str(tmp_path), form) == form
    assert saved_format("owner/name", StepFormat()) == StepFormat()
    save_format(tmp_path, form)
    assert saved_format(str(tmp_path), StepFormat()) == form
    assert saved_format(str(tmp_path), PLAIN) == PLAIN  # what is given goes first
    for content in ("{", "[1]", '{"tags": "x"}'):
        (tmp_path / FORMAT_FILE).write_text(content)
        with pytest.raises(ModelError, match=r"step_format\.json: cannot be read"):
            saved_format(str(tmp_path), StepFormat())


# Tokenizers

TEXT = "Step 1: 2 + 3 - 1 = 4 ки\nStep 2: 4 + 4 - 1 = 7 ки"


def of_words(*known):
    """A tokenizer of whole words that knows few."""
    ids = {word: n for n, word in enumerate(["[UNK]", "1", *known])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def of_sentencepiece():
    """As Llama's and Mistral's first ones: the blank is a letter of the word behind it."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((f"▁{word}", -2.0) for word in ("1", "ки", "+", "-")),
              *((letter, -9.0) for letter in "▁1ки+-abc")]  # fmt: skip
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def of_bytes(size):
    return tiny.make_tokenizer(
        [TEXT] * 4, tiny.Shape(kind="llama", alphabet="bpe", vocabulary=size)
    )


MAKERS = {
    "words": lambda: of_words("ки", "+", "-"),
    "sentencepiece": of_sentencepiece,
    "bytes": lambda: of_bytes(330),
    "shop": lambda: shop.make_tokenizer(shop.Shop()),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_words_of_one_token_are_found_as_they_stand_in_texts(kind):
    tokenizer = MAKERS[kind]()
    found = StepTokens.of(tokenizer, StepFormat())
    for word, token in (("ки", found.tag), ("+", found.good), ("-", found.bad)):
        ids = tokenizer(f"1 {word} 1 {word}", add_special_tokens=False)["input_ids"]
        assert ids.count(token) == 2
        assert str(tokenizer.decode([token])).strip() == word
    assert len({found.tag, found.good, found.bad}) == 3
    assert add_words(tokenizer, StepFormat()) == 0
    if kind == "sentencepiece":  # not the piece without the blank
        assert found.good == tokenizer.convert_tokens_to_ids("▁+")


@pytest.mark.parametrize(
    ("tokenizer", "form", "message"),
    [
        (of_words("ки", "+"), StepFormat(), "--bad '-': this model does not know it"),
        (of_words("ки", "+", "-"), StepFormat(tag="x y"), "--tag 'x y': is 2 tokens"),
        (of_bytes(260), StepFormat(), "--tag 'ки': is 5 tokens for this model, and must be one; "
         "name another word, or let `mathshepherd sft --add-words` add it"),
        (of_bytes(330), StepFormat(good="excellent"), "--good 'excellent': is 1?[0-9] tokens"),
        (of_words("ки", "+", "-"), StepFormat(tag="+"), r"'\+', '\+' and '-' are not three tokens"),
        (tiny.make_tokenizer([TEXT], tiny.Shape(kind="llama", alphabet="char")), StepFormat(),
         "--tag 'ки': is 3 tokens"),
    ],
)  # fmt: skip
def test_words_that_are_not_one_token_are_refused(tokenizer, form, message):
    with pytest.raises(ModelError, match=message):
        StepTokens.of(tokenizer, form)


@pytest.mark.parametrize(
    ("tokenizer", "form", "count"),
    [
        (of_words("ки"), StepFormat(), 2),
        (of_bytes(260), StepFormat(), 3),
        (of_bytes(330), StepFormat(tag="<step>", good="yes", bad="no"), 3),
        (of_sentencepiece(), StepFormat(tag="abc"), 1),
        (shop.make_tokenizer(shop.Shop()), StepFormat(tag="done"), 1),
    ],
)
def test_added_words_are_single_tokens(tokenizer, form, count):
    assert add_words(tokenizer, form) == count
    found = StepTokens.of(tokenizer, form)
    text = form.prefix("1", ["1 1", "1"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(found.tag) == 2
    assert ids[-1] == found.tag
    # the blank before it belongs to it, so that what is written and what is read are the same tokens
    assert len(form.split(str(tokenizer.decode(ids)))) == 2
    assert add_words(tokenizer, form) == 0
