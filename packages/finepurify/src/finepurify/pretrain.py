"""Small BERTs from scratch, as clean starting points for the embedded default.

Masked language modelling alone leaves the vector at [CLS] empty in the seconds there are, and everything
would be learnt in fine-tuning, so that no part of it could be reset. Therefore the vector learns to name
the sentence's words, too.
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.tiny import cache_folder
from octavo.training import TrainOptions, fit
from torch import Tensor
from torch.nn import functional as F

from finepurify.data import IGNORED, collate
from finepurify.models import pad_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True)
class SmallBert:
    """A BERT and how it is pre-trained."""

    layers: int = 2
    width: int = 48
    heads: int = 2
    max_length: int = 26
    epochs: float = 10.0
    learning_rate: float = 2e-3
    batch_size: int = 64
    dropout: float = 0.0
    spread: float = 0.02
    """Standard deviation of the first weights."""

    bag: float = 0.5
    """Weight of naming the sentence's words from its pooled vector."""


def pretrained(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", shape: SmallBert, runtime: Runtime
) -> Path:
    """A folder with a pre-trained `BertForPreTraining`, as public BERTs are; made, or from the cache.

    Args:
        texts: to pre-train on.
        tokenizer: with `[MASK]`; saved beside the model.
        shape: of model and training.
        runtime: its seed decides weights, order and masks.
    """
    from transformers import BertConfig, BertForPreTraining

    settings = [asdict(shape), runtime.seed, tokenizer.get_vocab()]
    content = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for text in texts:
        content.update(text.encode() + b"\0")
    folder = cache_folder() / "tiny" / content.hexdigest()[:32]
    if folder.is_dir():
        return folder
    torch.manual_seed(runtime.seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=shape.max_length,
        pad_token_id=pad_of(tokenizer),
        initializer_range=shape.spread,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
    )
    model = BertForPreTraining(config)
    rows = tokenizer(list(texts), truncation=True, max_length=shape.max_length)["input_ids"]
    items = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]  # pyright: ignore
    options = TrainOptions(
        learning_rate=shape.learning_rate, epochs=shape.epochs, batch_size=shape.batch_size
    )
    draw = random.Random(runtime.seed)
    with tempfile.TemporaryDirectory() as place:
        fit(
            model,
            items,
            lambda chosen: _masked(chosen, tokenizer, draw),
            RunDir.open(Path(place) / "run", asdict(shape)),
            "pretrain",
            options=options,
            runtime=runtime,
            loss=lambda model, batch: _loss(model, batch, shape.bag),
        )
    save_model(folder, model, tokenizer)
    return folder


def _masked(
    items: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", draw: random.Random
) -> dict[str, Tensor]:
    """A batch with 15 % of its words masked; `bag` holds every word, `labels` the masked ones."""
    special = torch.tensor(tokenizer.all_special_ids)
    batch = collate(items, pad_of(tokenizer))
    ids = batch["input_ids"]
    generator = torch.Generator().manual_seed(draw.getrandbits(63))
    words = ~torch.isin(ids, special)
    hidden = words & (torch.rand(ids.shape, generator=generator) < 0.15)
    batch["bag"] = ids.masked_fill(~words, IGNORED)
    batch["labels"] = ids.masked_fill(~hidden, IGNORED)
    batch["input_ids"] = ids.masked_fill(hidden, cast(int, tokenizer.mask_token_id))
    return batch


def _loss(model: Any, batch: dict[str, Tensor], weight: float) -> Tensor:
    states, pooled = model.bert(batch["input_ids"], batch["attention_mask"])[:2]
    masked = batch["labels"] != IGNORED
    named = model.cls.predictions(states[masked])
    loss = F.cross_entropy(named, batch["labels"][masked])
    words = batch["bag"]
    heard = model.cls.predictions(pooled).log_softmax(-1)
    present = words != IGNORED
    bag = -heard.gather(1, words.clamp(min=0))[present].mean()
    return loss + weight * bag


def word_tokenizer(words: Sequence[str], max_length: int) -> "PreTrainedTokenizerFast":
    """A tokenizer that knows just these words, whole."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
