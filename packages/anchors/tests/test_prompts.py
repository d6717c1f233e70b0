"""Positions by offsets, whatever the texts hold and however the tokenizer cuts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anchors.config import TASKS, Task
from anchors.prompts import build_prompt, collate
from octavo.errors import ConfigError, DataError, ModelError
from octavo.tiny import Shape, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def sentencepiece_like(words, bos=True):
    """Pieces that begin with a mark instead of a space, and a BOS, as LLaMA's."""
    pieces = ["<unk>", "<s>", *dict.fromkeys(f"▁{word}" for word in words), "\n", ":", ","]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>"))
    tokenizer.normalizer = normalizers.Replace("\n", " \n ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split("▁\n", "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def words_at(tokenizer, prompt, places):
    return tokenizer.decode([prompt.input_ids[place] for place in places]).strip()


def test_every_part_is_found(tokenizer, reviews):
    shown = [("a fine film", 0), ("so so , good in parts", 2), ("a dull one", 1)]
    prompt = build_prompt(reviews, tokenizer, shown, "what a good day")
    assert [words_at(tokenizer, prompt, places) for places in prompt.labels] == [
        "good", "middling", "bad",
    ]  # fmt: skip
    assert prompt.classes == (0, 2, 1)
    assert words_at(tokenizer, prompt, range(prompt.query, len(prompt))) == (
        "Review: what a good day\nMood:"
    )
    assert prompt.target == len(prompt) - 1
    assert tokenizer.decode([prompt.input_ids[prompt.target]]) == ":"
    assert words_at(tokenizer, prompt, prompt.format).split() == ["Review:", "Mood:"] * 3
    assert not set(prompt.format) & {place for places in prompt.labels for place in places}
    assert [tokenizer.decode([answer]) for answer in prompt.answers] == [
        " good",
        " bad",
        " middling",
    ]
    whole = {*prompt.format, *range(prompt.query, len(prompt))}
    texts = [
        i for i in range(len(prompt)) if i not in whole and all(i not in p for p in prompt.labels)
    ]
    assert words_at(tokenizer, prompt, texts) == "a fine film so so , good in parts a dull one"


def test_label_words_of_several_tokens(reviews):
    letters = make_tokenizer(
        ["Review: Mood:\n abcdefghijklmnopqrstuvwxyz"], Shape(kind="llama", alphabet="char")
    )
    task = Task("Review: {text}\nMood:{label}", ("good", "bad"))
    prompt = build_prompt(task, letters, [("good", 0), ("dog", 1)], "a")
    assert [len(places) for places in prompt.labels] == [4, 3]
    first = prompt.labels[0][0]
    assert first == len("Review: good\nMood:")
    with pytest.raises(ModelError, match="' Positive' and ' Negative' begin with the same token"):
        build_prompt(Task("a {text} :{label}", (" Positive", " Negative")), letters, [], "a")


@pytest.mark.parametrize("bos", [True, False])
def test_pieces_without_leading_spaces_and_bos(bos):
    tokenizer = sentencepiece_like("Review Mood good bad a film it was".split(), bos)
    task = Task("Review: {text}\nMood:{label}", (" good", " bad"))
    prompt = build_prompt(task, tokenizer, [("a good film", 0), ("it was", 1)], "a bad film")
    assert (prompt.input_ids[0] == 1) == bos
    assert [tokenizer.convert_ids_to_tokens(prompt.input_ids[p[0]]) for p in prompt.labels] == [
        "▁good", "▁bad",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(list(prompt.answers)) == ["▁good", "▁bad"]


def test_both_paddings(prompts):
    for side in ("left", "right"):
        batch = collate(prompts, side=side)
        for row, prompt in enumerate(prompts):
            shift = batch.shifts[row]
            assert batch.input_ids[row, batch.targets[row]] == prompt.input_ids[-1]
            real = batch.attention_mask[row]
            assert batch.input_ids[row][real].tolist() == list(prompt.input_ids)
            assert batch.position_ids[row][real].tolist() == list(range(len(prompt)))
            for places in prompt.labels:
                assert batch.input_ids[row, places[0] + shift] == prompt.input_ids[places[0]]
    assert isinstance(batch.input_ids, torch.Tensor)


def test_the_papers_tasks_are_well_formed():
    assert {name: len(task.labels) for name, task in TASKS.items()} == {
        "sst2": 2, "agnews": 4, "trec": 6, "emoc": 4,
    }  # fmt: skip
    assert TASKS["trec"].frame == ("Question: ", "\nAnswer Type:")


@pytest.mark.parametrize(
    ("template", "labels", "named"),
    [
        ("no place:{label}", (" a", " b"), "must hold"),
        ("{text}: {label} and on", (" a", " b"), "must end with"),
        ("{text}{label}", (" a", " b"), "must end with"),
        ("{text}:{label}", (" a",), "two label words"),
        ("{text}:{label}", (" a", "a"), "same label word"),
    ],
)
def test_wrong_tasks_are_refused(template, labels, named):
    with pytest.raises(ConfigError, match=named):
        Task(template, labels)


def test_wrong_prompts_are_refused(tokenizer, reviews):
    with pytest.raises(DataError, match="label words for 0 to 2"):
        build_prompt(reviews, tokenizer, [("a", 3)], "b")
    with pytest.raises(DataError, match="begin label words with a space"):
        build_prompt(Task("x: {text}\nMo{label}", ("od", " bad")), tokenizer, [], "b")

    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(ModelError, match="fast one"):
        build_prompt(reviews, slow, [], "b")
