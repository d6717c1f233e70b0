"""Chats: the mask is the template's own, windows are dense and keep conversations apart."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from deepseekmoe.chats import (
    Chat,
    PackedChats,
    best_fit,
    draw_chats,
    encode_chat,
    encode_chats,
    encode_question,
    load_chats,
)
from deepseekmoe.hub import CHAT_TEMPLATE
from hypothesis import given
from hypothesis import strategies as st
from octavo import console
from octavo.errors import ConfigError, DataError
from octavo.tiny import Shape, make_tokenizer

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is the dog red?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "And the cat?"},
    {"role": "assistant", "content": "The cat is blue."},
    {"role": "user", "content": "Not answered."},
]


@pytest.fixture
def tokenizer():
    return make_tokenizer(
        ["User: the dog is red Assistant: Yes, it is. The cat is blue. " * 5],
        Shape(kind="llama", alphabet="bpe", vocabulary=400),
    )


def test_the_mask_is_on_replies_and_their_end(tokenizer):
    chat = encode_chat(TURNS, tokenizer)
    end = tokenizer.eos_token
    said = tokenizer.decode(chat.ids[chat.reply])
    assert said == f" Yes, it is.{end} The cat is blue.{end}"
    assert tokenizer.decode(chat.ids[~chat.reply]) == (
        f"{end}Be kind.\n\nUser: Is the dog red?\n\nAssistant:User: And the cat?\n\nAssistant:"
    )
    whole = tokenizer.apply_chat_template(TURNS[:5], chat_template=CHAT_TEMPLATE, tokenize=False)
    assert tokenizer.decode(chat.ids) == whole


def test_a_drawn_conversation_is_named_by_its_row(tokenizer, monkeypatch):
    bars = []

    @contextmanager
    def counter(*_):
        bars.append(0)
        yield lambda amount: bars.append(amount)

    monkeypatch.setattr(console, "counter", counter)
    many = [TURNS[1:3]] * 40
    size = len(encode_chat(TURNS[1:3], tokenizer))
    for seed in (0, 1):
        assert len(draw_chats(many, tokenizer, "chats.jsonl", 3 * size + 1, seed)) == 4
    assert bars == 2 * [0, size, size, size, size]  # one bar a draw
    assert len(draw_chats(many, tokenizer, "chats.jsonl", 10**6, 0)) == 40
    refused = [{"role": "nobody", "content": "x"}, TURNS[2]]
    for draw in (
        lambda: draw_chats([*many, refused], tokenizer, "chats.jsonl", 10**6, 0),
        lambda: encode_chats([*many, refused], tokenizer, "chats.jsonl"),
    ):
        with pytest.raises(DataError, match=r"^chats.jsonl, conversation 41, message 1"):
            draw()


def test_what_stands_before_a_reply_is_what_the_model_is_asked_with(tokenizer):
    chat = encode_chat(TURNS[:3], tokenizer)
    asked = tokenizer.apply_chat_template(
        TURNS[:2], chat_template=CHAT_TEMPLATE, add_generation_prompt=True
    )["input_ids"]
    assert chat.ids[: len(asked)].tolist() == asked
    assert int(np.argmax(chat.reply)) == len(asked)


def test_a_border_that_would_merge_does_not():
    """A template whose reply begins where a token of the text would go on."""
    tokenizer = make_tokenizer(
        ["redblue redblue " * 9], Shape(kind="llama", alphabet="bpe", vocabulary=300)
    )
    assert len(tokenizer("redblue")["input_ids"]) == 1
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    chat = encode_chat(turns, tokenizer)
    assert tokenizer.decode(chat.ids[chat.reply]) == "blue"
    assert tokenizer.decode(chat.ids[~chat.reply]) == "red"


def test_a_template_that_rewrites_the_past_is_refused():
    tokenizer = make_tokenizer(["some text " * 9], Shape(kind="llama", alphabet="bpe"))
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="message 3: the chat template renders"):
        encode_chat(TURNS, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"template refuses it .roles must alternate"):
        encode_chat(TURNS, tokenizer)


def test_special_tokens_that_a_message_spells_are_text(tokenizer):
    end, said = tokenizer.eos_token_id, "It is <|endoftext|>, not \U00100000[PAD]"
    turns = [
        {"role": "user", "content": "What ends a text? <|endoftext|>"},
        {"role": "assistant", "content": said},
    ]
    chat = encode_chat(turns, tokenizer)
    reply = chat.ids[chat.reply].tolist()

    def plain(text):
        return tokenizer(text, split_special_tokens=True)["input_ids"]

    assert reply == [*plain(f" {said}"), end]
    asked = [end, *plain("User: What ends a text? <|endoftext|>\n\nAssistant:")]
    assert chat.ids[~chat.reply].tolist() == asked
    assert encode_question(turns[:1], tokenizer) == asked
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>[PAD]"]})
    held = encode_question([{"role": "user", "content": "<|endoftext|>[PAD]"}], tokenizer)
    assert held == [end, *plain("User: <|endoftext|>[PAD]\n\nAssistant:")]


def test_a_template_trims_a_message_that_spells_special_tokens(tokenizer):
    template = "{% for m in messages %}{{ bos_token + m['content'] | trim }}{% endfor %}"
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": " red <|endoftext|> "}]
    text = tokenizer.decode(encode_question(turns, tokenizer))
    assert text == "<|endoftext|>red <|endoftext|>"
    turns = [{"role": "user", "content": " red "}]
    assert encode_question(turns, tokenizer) == tokenizer("<|endoftext|>red")["input_ids"]


@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_loses_nothing_and_is_dense(sizes):
    boxes = best_fit(sizes, 20)
    assert sorted(thing for box in boxes for thing in box) == list(range(len(sizes)))
    loads = [sum(sizes[thing] for thing in box) for box in boxes]
    assert all(load <= 20 for load in loads)
    lightest = sorted(loads)[:2]
    assert len(lightest) < 2 or sum(lightest) > 20  # no two boxes would go into one
    # best-fit decreasing: at most 11/9 of the optimum and one more
    assert len(boxes) <= 11 / 9 * -(-sum(sizes) // 10) + 1


def test_best_fit_by_hand():
    # 7; 6; 5 beside none; 4 fits 6 (left 4) rather than 5; 3 fits 7; 2 fits 5; 1 fits 5 + 2
    assert best_fit([1, 2, 3, 4, 5, 6, 7], 10) == [[6, 2], [5, 3], [4, 1, 0]]


def chat(*reply, start=0):
    return Chat(np.arange(start, start + len(reply), dtype=np.int64), np.array(reply, dtype=bool))


def test_windows_by_hand():
    packed = PackedChats([chat(0, 0, 1, 1), chat(1, 1, start=10)], 8, pad=99)
    rows = packed.rows([0])
    assert rows["input_ids"].tolist() == [[0, 1, 2, 3, 10, 11, 99, 99]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert rows["labels"].tolist() == [[-100, -100, 2, 3, -100, 11, -100, -100]]
    assert rows["token_mask"].tolist() == [[True] * 6 + [False] * 2]
    assert packed.fill == 0.75


def test_long_chats_are_cut_and_counted(caplog):
    packed = PackedChats([chat(0, 0, 1, 1, 1), chat(0, 0, 0, 0, 1), chat(0, 1)], 4, pad=0)
    assert (packed.cut, packed.silent, len(packed.chats)) == (2, 1, 2)
    assert "2 of 3 conversations are longer than a window of 4 tokens" in caplog.text
    with pytest.raises(DataError, match="no reply begins within 4 tokens"):
        PackedChats([chat(0, 0, 0, 0, 1)], 4, pad=0)
    with pytest.raises(ConfigError, match="--length 1"):
        PackedChats([chat(0, 1)], 1, pad=0)


def test_packed_conversations_do_not_see_each_other_nor_padding(small):
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    torch.manual_seed(0)
    model = DeepseekMoeForCausalLM(small()).eval()
    one, two = chat(0, 0, 1, 1, 1, start=5), chat(0, 1, 1, start=40)
    packed = PackedChats([one, two], 12, pad=3).rows([0])
    labels = packed.pop("labels")
    with torch.no_grad():
        together = model(**packed)
        alone = [
            model(input_ids=torch.from_numpy(part.ids)[None], labels=None) for part in (one, two)
        ]
        other = packed | {"input_ids": packed["input_ids"].masked_fill(~packed["token_mask"], 77)}
        assert model(**other).logits[:, :8].equal(together.logits[:, :8])
    assert torch.allclose(together.logits[0, :5], alone[0].logits[0], atol=1e-5)
    assert torch.allclose(together.logits[0, 5:8], alone[1].logits[0], atol=1e-5)
    assert together.counts.equal(alone[0].counts + alone[1].counts)
    assert (labels != -100).sum() == 5


def test_padding_counts_in_no_loss(small):
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    torch.manual_seed(0)
    model = DeepseekMoeForCausalLM(small(aux_loss_alpha=0.1)).train()
    rows = [PackedChats([chat(0, 0, 1, 1, start=5)], 12, pad=pad).rows([0]) for pad in (3, 77)]
    short = PackedChats([chat(0, 0, 1, 1, start=5)], 4, pad=3).rows([0])
    losses = [model(**row).loss.item() for row in [*rows, short]]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def rows_file(folder, *rows):
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_prompt_and_response_are_a_chat(tmp_path):
    file = rows_file(tmp_path, {"prompt": "Hi", "response": "Yes"}, {"messages": TURNS, "id": 3})
    assert load_chats(str(file)) == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], TURNS,
    ]  # fmt: skip


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "has no 'messages', and not both 'prompt' and 'response'"),
        ({"prompt": "x"}, "has no 'messages', and not both 'prompt' and 'response'"),
        ({"prompt": "x", "response": " "}, "'response' is empty"),
        ({"messages": "x"}, "message 1 is no object"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 2 has role 'bot'; use"),
        (
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            "message 2, the assistant's, is",
        ),
        ({"messages": [USER]}, "no message is the assistant's"),
        ({"messages": [USER, 7]}, "message 2 is no object with 'role'"),
        ({"messages": [{"role": "user"}]}, "message 1 is no object with 'role'"),
    ],
)
def test_bad_chats_are_told_in_one_line(command, trained, tmp_path, row, words):
    good = {"prompt": "Hi", "response": "Yes"}
    file = rows_file(tmp_path, good, row)
    code, out, err = command("sft", trained / "model", "--data", file, "--out", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"{file}, line 2: " in err
    assert words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.realdata
def test_the_esft_chats_are_read_and_packed(data_folder):
    chats = load_chats(str(data_folder / "sft" / "esft_train_law.jsonl.gz"))
    assert len(chats) == 926
    tokenizer = make_tokenizer(
        [turn["content"] for turns in chats[:100] for turn in turns],
        Shape(kind="llama", alphabet="bpe", vocabulary=2000),
    )
    encoded = [encode_chat(turns, tokenizer) for turns in chats[:200]]
    for turns, found in zip(chats[:200], encoded, strict=True):
        assert tokenizer.decode(found.ids[found.reply]) == (
            f" {turns[1]['content']}{tokenizer.eos_token}"
        )
    packed = PackedChats(encoded, 4096, pad=0)
    assert packed.cut == 0
    assert packed.fill > 0.9
