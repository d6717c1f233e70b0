import importlib.util
from pathlib import Path

import pytest
import torch
from anchors.config import Task
from octavo.models import save_model
from octavo.tiny import Shape, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

REVIEWS = Task("Review: {text}\nMood:{label}", (" good", " bad", " middling"))
TEXTS = ["a fine film", "a dull one", "so so , good in parts", "what a good good day", "rain again"]

SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 256, "num_key_value_heads": 2,
         "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip

#: Model type -> what its configuration needs besides the sizes.
FAMILIES = {
    "gpt2": {}, "gptj": {"rotary_dim": 4}, "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 16}, "gemma": {"head_dim": 8}, "gpt_neox": {},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
}  # fmt: skip


def make_family(name, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | FAMILIES[name] | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger weights, so that attention is not uniform
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="session")
def family():
    return make_family


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE, as GPT-2's: a word and the space before it are one token."""
    lines = [*TEXTS, "Review: good bad middling Mood: good Mood: bad Mood: middling\n"] * 20
    shape = Shape(kind="llama", alphabet="bpe", vocabulary=400)
    return make_tokenizer(["\n".join(lines)], shape)


@pytest.fixture(scope="session")
def reviews():
    return REVIEWS


@pytest.fixture(scope="session")
def prompts(tokenizer):
    from anchors.prompts import build_prompt

    shown = [("a fine film", 0), ("a dull one", 1), ("so so , good in parts", 2)]
    return [build_prompt(REVIEWS, tokenizer, shown, text) for text in TEXTS]


@pytest.fixture(scope="session")
def saved(tokenizer, tmp_path_factory):
    """A folder with a small GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, make_family("gpt2"), tokenizer)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A file of labelled texts."""
    file = tmp_path_factory.mktemp("rows") / "rows.tsv"
    lines = ["label\ttext", *(f"{number % 3}\ta film number {number}" for number in range(18))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def planted():
    """The module `planted` beside this file: a model whose flows are known."""
    spec = importlib.util.spec_from_file_location(
        "anchors_planted", Path(__file__).with_name("planted.py")
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
