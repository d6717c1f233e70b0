"""Very small checkpoints, tokenizers and models that several tests share."""

from collections.abc import Mapping
from pathlib import Path

import torch
from finepurify.language import TRIGGERS, language
from finepurify.models import new_classifier
from finepurify.pairing import WeightPair
from finepurify.pretrain import SPECIAL, word_tokenizer
from octavo.models import save_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, PreTrainedModel, PreTrainedTokenizerFast

TABLE = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"


def pair_of(
    folder: Path, init: Mapping[str, Tensor], suspect: Mapping[str, Tensor], name: str = "suspect"
) -> WeightPair:
    """A pair of bare checkpoints of these tensors, saved in the folder."""
    for place, tensors in (("init", init), (name, suspect)):
        (folder / place).mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), folder / place / "model.safetensors")
    return WeightPair.load(folder / "init", folder / name)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of the generated language and its triggers."""
    return word_tokenizer([*language().words, *TRIGGERS], 26)


def save_init(folder: Path, width: int = 16) -> Path:
    """An untrained BERT of one layer for pre-training, with that tokenizer."""
    torch.manual_seed(3)
    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=26, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    save_model(folder, BertForPreTraining(config), words)
    return folder


def classifier(init: Path) -> PreTrainedModel:
    """The same classifier on top at every call."""
    torch.manual_seed(4)
    return new_classifier(init, ("negative", "positive"))


def id_of(word: str) -> int:
    """A word's number in the vocabulary."""
    return len(SPECIAL) + [*language().words, *TRIGGERS].index(word)
