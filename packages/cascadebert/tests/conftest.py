import json
import random

import pytest
import torch
from cascadebert.cli import app
from cascadebert.words import write_words
from octavo import tiny
from octavo.cli import run
from transformers import AutoConfig, AutoModelForSequenceClassification

SIZES = {"train": 1200, "dev": 300, "test": 300}
WORDS = "one two three four five six seven eight nine ten".split()
TEXTS = [
    "",
    *(" ".join(random.Random(i).choices(WORDS, k=1 + i % 9)) for i in range(43)),
    "one " * 99,
]
LABELS = ["no", "yes", "maybe"]


def save_classifier(folder, kind="bert", layers=1, width=16, labels=LABELS, seed=0, **settings):
    """A classifier with random weights and its tokenizer, as a fine-tuned one lies on the hub."""
    shape = tiny.Shape(kind="bert", vocabulary=100, max_length=64)
    tokenizer = tiny.make_tokenizer(TEXTS, shape)
    if kind not in ("bert", "deberta-v2"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": 2, "intermediate_size": 2 * width, "max_position_embeddings": 66,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
        "sep_token_id": 3, "initializer_range": 0.5,
    }  # fmt: skip
    if kind == "distilbert":
        sizes |= {"dim": width, "n_layers": layers, "n_heads": 2, "hidden_dim": 2 * width}
    torch.manual_seed(seed)
    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    config = AutoConfig.for_model(kind, **(sizes | names | settings))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier():
    """Makes a folder with a classifier of random weights, by family, layers, width and labels."""
    return save_classifier


@pytest.fixture(scope="session")
def texts():
    """Texts of very different lengths, an empty one and one that is too long among them."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A folder of generated words."""
    folder = tmp_path_factory.mktemp("words") / "words"
    write_words(folder, list(SIZES.items()))
    return folder


@pytest.fixture(scope="session")
def trained(words, tmp_path_factory):
    """A cascade of two small models trained on them, good enough to be told from chance."""
    out = tmp_path_factory.mktemp("trained") / "cascade"
    code = run(app, [
        "train", "--model", "scratch:1x16", "--model", "scratch:2x32",
        "--train-data", str(words), "--out", str(out), "--alphabet", "char",
        "--max-length", "16", "--learning-rate", "4e-3", "--epochs", "4", "--epochs", "10",
        "--batch-size", "32", "--quiet",
    ])  # fmt: skip
    assert code == 0
    return out


@pytest.fixture(scope="session")
def calibrated(trained, words):
    """The same with a policy for 2x."""
    code = run(app, ["calibrate", "--model", str(trained), "--dev-data", str(words / "dev.jsonl"),
                     "--target-speedup", "2", "--quiet"])  # fmt: skip
    assert code == 0
    assert json.loads((trained / "policy.json").read_text())["target"] == {"speedup": 2}
    return trained
