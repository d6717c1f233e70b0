import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from octavo import tiny
from octavo.models import load_model, load_tokenizer
from octavo.runtime import Runtime
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

TEXTS = ["one two three four", "five six seven", "eight nine ten eleven twelve"] * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "llama"])
@pytest.mark.parametrize("alphabet", ["char", "wordpiece", "bpe"])
def test_a_checkpoint_is_like_one_of_the_hub(kind, alphabet):
    shape = tiny.Shape(kind=kind, layers=1, width=32, alphabet=alphabet, vocabulary=400)
    folder = tiny.checkpoint(TEXTS, shape)
    tokenizer = load_tokenizer(folder)
    head = AutoModelForCausalLM if kind in tiny.CAUSAL else AutoModelForMaskedLM
    model = load_model(head, folder)
    assert model.config.model_type == kind
    assert model.config.hidden_size == 32
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    assert set(batch) <= {"input_ids", "attention_mask", "token_type_ids"}
    assert model(**batch).logits.shape == (*batch["input_ids"].shape, len(tokenizer))
    plain = tokenizer.decode(tokenizer(TEXTS[0])["input_ids"], skip_special_tokens=True)
    assert plain == TEXTS[0]


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_byte_level_bpe_brings_any_text_back(text):
    tokenizer = tiny.make_tokenizer(TEXTS, tiny.Shape(kind="gpt2", alphabet="bpe", vocabulary=300))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_pairs_are_framed_like_berts():
    tokenizer = tiny.make_tokenizer(TEXTS, tiny.Shape(kind="bert"))
    batch = tokenizer("one two", "three")
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"])
    assert tokens == ["[CLS]", "one", "two", "[SEP]", "three", "[SEP]"]
    assert batch["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_the_cache_is_keyed_by_content(cache):
    shape = tiny.Shape(layers=1, width=16)
    folder = tiny.checkpoint(TEXTS, shape)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.checkpoint(list(TEXTS), shape) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    others = {
        tiny.checkpoint(TEXTS[1:], shape),
        tiny.checkpoint(TEXTS, tiny.Shape(layers=2, width=16)),
        tiny.checkpoint(TEXTS, shape, Runtime(seed=1)),
    }
    assert len(others | {folder}) == 4
    assert folder.is_relative_to(cache)


def test_the_seed_decides_the_weights(monkeypatch, tmp_path):
    shape = tiny.Shape(layers=1, width=16)
    first = (tiny.checkpoint(TEXTS, shape) / "model.safetensors").read_bytes()
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "other"))
    assert (tiny.checkpoint(TEXTS, shape) / "model.safetensors").read_bytes() == first
    other = tiny.checkpoint(TEXTS, shape, Runtime(seed=1))
    assert (other / "model.safetensors").read_bytes() != first


@pytest.mark.parametrize("kind", ["modernbert", "llama"])
def test_pretraining_learns_the_texts(kind, cache):
    shape = tiny.Shape(kind=kind, layers=1, width=32, pretrain_epochs=30, learning_rate=5e-3)
    folder = tiny.checkpoint(TEXTS, shape)
    tokenizer = load_tokenizer(folder)
    row = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    if kind == "llama":
        loss = load_model(AutoModelForCausalLM, folder)(input_ids=row, labels=row).loss
    else:
        masked = row.clone()
        masked[0, 2] = tokenizer.get_vocab()["[MASK]"]
        labels = torch.full_like(row, -100)
        labels[0, 2] = row[0, 2]
        loss = load_model(AutoModelForMaskedLM, folder)(input_ids=masked, labels=labels).loss
    assert loss.item() < math.log(len(tokenizer)) / 2
    assert sorted(path.name for path in (cache / "tiny").iterdir()) == [folder.name]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("OCTAVO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiny.cache_folder() == tmp_path / "octavo"
