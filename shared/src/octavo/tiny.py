"""Small tokenizers and models from scratch, in the library's own formats, for work without a hub.

`checkpoint` gives a folder like any that `from_pretrained` reads; what a folder holds is decided by
its texts and settings alone, and a second call with the same finds it in the cache.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octavo.errors import ConfigError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime, seed_everything
from octavo.training import TrainOptions, fit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["bert", "modernbert", "gpt2", "llama"]
Alphabet = Literal["char", "wordpiece", "bpe"]
CAUSAL = ("gpt2", "llama")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a small model and its tokenizer."""

    kind: Kind = "modernbert"
    """Architecture: bert or modernbert (encoders), gpt2 or llama (decoders)."""

    layers: int = 2
    """Transformer layers."""

    width: int = 64
    """Hidden size; heads are 16 wide, or the width where that is less."""

    alphabet: Alphabet = "wordpiece"
    """Tokens: single characters, WordPiece (lower-cased) or byte-level BPE."""

    vocabulary: int = 8000
    """Tokens at the most."""

    max_length: int = 128
    """Tokens in the longest sequence."""

    pretrain_epochs: float = 0.0
    """Passes of masked (encoders) or causal (decoders) language modelling over the texts."""

    learning_rate: float = 1e-3
    """Peak learning rate of that pre-training."""


def checkpoint(texts: Sequence[str], shape: Shape, runtime: Runtime = Runtime()) -> Path:
    """A folder with a small model and its tokenizer, made from the texts or found in the cache.

    Args:
        texts: what the tokenizer is trained on, and the model where it is pre-trained.
        shape: of both.
        runtime: its seed decides the initial weights.

    Returns:
        The folder, under `OCTAVO_CACHE` (the user's cache folder by default).

    Raises:
        ConfigError: the shape is impossible, or there is no text.
    """
    _check(texts, shape)
    settings = json.dumps([asdict(shape), runtime.seed], sort_keys=True)
    content = hashlib.sha256(settings.encode())
    for text in texts:
        content.update(text.encode() + b"\0")
    folder = cache_folder() / "tiny" / content.hexdigest()[:32]
    if folder.is_dir():
        return folder
    tokenizer = make_tokenizer(texts, shape)
    model = make_model(shape, tokenizer, runtime.seed)
    if shape.pretrain_epochs:  # on every rank: they train together
        with tempfile.TemporaryDirectory() as place:
            work = RunDir.open(Path(place) / "run", asdict(shape))
            model = _pretrain(model, tokenizer, texts, shape, runtime, work)
    save_model(folder, model, tokenizer)
    return _wait_for(folder)


def cache_folder() -> Path:
    """Where small models are kept: `OCTAVO_CACHE`, else `octavo` in the user's cache folder."""
    if named := os.environ.get("OCTAVO_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "octavo"


def _wait_for(folder: Path, seconds: float = 1800) -> Path:
    """Rank 0 makes the folder; the others wait until it has its final name."""
    import time

    deadline = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise ConfigError(f"{folder}: the first process did not make it; start the run again")
        time.sleep(0.2)
    return folder


def _check(texts: Sequence[str], shape: Shape) -> None:
    if not any(text.strip() for text in texts):
        raise ConfigError("a tokenizer from scratch needs texts, and there is none")
    if shape.layers < 1 or shape.width < 2 or shape.width % 2:
        raise ConfigError(f"{shape.layers}x{shape.width}: needs a layer or more, and an even width")
    if shape.vocabulary < 16 or shape.max_length < 4:
        raise ConfigError(
            f"a vocabulary of {shape.vocabulary} tokens and texts of {shape.max_length}: "
            "needs 16 and 4 or more"
        )
    if shape.width > 16 and shape.width % 16:
        raise ConfigError(f"width {shape.width}: must be a multiple of 16 (one head's width)")


def make_tokenizer(texts: Iterable[str], shape: Shape) -> "PreTrainedTokenizerFast":
    """Train a tokenizer on texts: [CLS] a [SEP] b [SEP] for an encoder, no frame for a decoder."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre
    from tokenizers import processors as post
    from transformers import PreTrainedTokenizerFast

    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if shape.kind in CAUSAL:
        roles |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    else:
        roles |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    special = list(dict.fromkeys(roles.values()))
    common: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    if shape.alphabet == "char":
        characters = sorted(set("".join(texts)))[: shape.vocabulary - len(special)]
        ids = {token: i for i, token in enumerate([*special, *characters])}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif shape.alphabet == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=shape.vocabulary, **common)
        tokenizer.train_from_iterator(texts, trainer)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        common["initial_alphabet"] = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=shape.vocabulary, **common)
        tokenizer.train_from_iterator(texts, trainer)
    if shape.kind not in CAUSAL:
        tokenizer.post_processor = post.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=shape.max_length,
        model_input_names=["input_ids", "attention_mask"]
        + ["token_type_ids"] * (shape.kind == "bert"),
        clean_up_tokenization_spaces=False,
        **roles,
    )


def make_model(
    shape: Shape, tokenizer: "PreTrainedTokenizerFast", seed: int = 0
) -> "PreTrainedModel":
    """A language model of this shape with random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    seed_everything(seed)
    head = AutoModelForCausalLM if shape.kind in CAUSAL else AutoModelForMaskedLM
    return head.from_config(make_config(shape, tokenizer))


def make_config(shape: Shape, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    """The library's configuration of this shape; feed-forward layers are twice the width."""
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": max(1, shape.width // 16),
        "max_position_embeddings": shape.max_length,
        "initializer_range": 0.8 / shape.width**0.5,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.kind in CAUSAL:
        settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    else:
        settings |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        settings |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    settings["n_inner" if shape.kind == "gpt2" else "intermediate_size"] = 2 * shape.width
    return AutoConfig.for_model(shape.kind, **settings)


def _pretrain(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[str],
    shape: Shape,
    runtime: Runtime,
    run: RunDir,
) -> "PreTrainedModel":
    from transformers import DataCollatorForLanguageModeling

    rows = tokenizer(list(texts), truncation=True, max_length=shape.max_length)["input_ids"]
    collate = DataCollatorForLanguageModeling(
        tokenizer, mlm=shape.kind not in CAUSAL, mlm_probability=0.15, seed=runtime.seed
    )
    options = TrainOptions(
        learning_rate=shape.learning_rate, epochs=shape.pretrain_epochs, batch_size=64
    )
    items = [{"input_ids": row} for row in rows if len(row) > 1]  # pyright: ignore
    return fit(model, items, collate, run, "pretrain", options=options, runtime=runtime)


def parse_shape(words: str, **settings: Any) -> Shape:
    """A shape from words such as `2x64` or `bert-4x128`: architecture, layers, width.

    Raises:
        ConfigError: the words are not of that form.
    """
    match = re.fullmatch(r"(?:(bert|modernbert|gpt2|llama)-)?(\d+)x(\d+)", words)
    if not match:
        raise ConfigError(f"{words!r} is no shape; write LAYERSxWIDTH, like 2x64 or bert-4x128")
    kind, layers, width = match.groups()
    settings |= {"kind": kind} if kind else {}
    return Shape(layers=int(layers), width=int(width), **settings)
