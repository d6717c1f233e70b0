"""Models to clean: classifiers and causal language models, in float32, with answers to read off them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from octavo import console
from octavo.errors import ModelError
from octavo.models import load_config, load_model, load_tokenizer
from octavo.runtime import Runtime
from torch import Tensor

from finepurify.data import IGNORED, Examples, Item, batches, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["classification", "generation"]

#: What checkpoints of pre-training hold besides the encoder.
PRETRAINING_HEADS = (
    r"^cls\.", r"^lm_head\.", r"^mlm", r"^nsp", r"vocab_", r"^mask_predictions", r"^head\.",
    r"^decoder\.", r"pooler",
)  # fmt: skip
#: What a new classifier brings.
NEW_HEADS = (
    r"^classifier",
    r"^score",
    r"pre_classifier",
    r"pooler",
    r"^head\.",
    r"^logits_proj",
    r"^sequence_summary",
)


def task_of(source: str | Path) -> Task:
    """Whether a checkpoint classifies or generates, by the architecture it names.

    Raises:
        ModelError: it is neither a sequence classifier nor a causal language model.
    """
    names = load_config(source).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "classification"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "generation"
    raise ModelError(
        f"{source}: is {', '.join(names) or 'of no named architecture'}; a suspect must be a sequence "
        "classifier or a causal language model"
    )


def load_suspect(source: str | Path, allow_pickle: bool = False) -> "PreTrainedModel":
    """The whole model in float32 and evaluation mode; no weight may be missing.

    Args:
        source: a folder or a hub id.
        allow_pickle: load a `pytorch_model.bin` where there is no safetensors file.

    Raises:
        ModelError: it cannot be had, or is of another kind.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = {
        "classification": AutoModelForSequenceClassification,
        "generation": AutoModelForCausalLM,
    }[task_of(source)]
    model = load_model(kind, source, allow_pickle=allow_pickle, dtype=torch.float32)
    return model.eval()


def new_classifier(
    source: str | Path, names: Sequence[str], allow_pickle: bool = False
) -> "PreTrainedModel":
    """A pre-trained model with a fresh classifier of these classes on top."""
    from transformers import AutoModelForSequenceClassification

    config = load_config(
        source,
        id2label=dict(enumerate(names)),
        label2id={name: at for at, name in enumerate(names)},
    )
    return load_model(
        AutoModelForSequenceClassification,
        source,
        new=NEW_HEADS,
        unused=PRETRAINING_HEADS,
        allow_pickle=allow_pickle,
        config=config,
        dtype=torch.float32,
    )


def tokenizer_of(source: str | Path) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; one without a padding token pads with its end of text.

    Raises:
        ModelError: there is none, or it has neither token.
    """
    tokenizer = load_tokenizer(source)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # where the files are missing, the library makes an empty one of the model's type
        raise ModelError(f"{source}: holds no tokenizer, or one without words; put its files there")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{source}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_words(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", source: str | Path
) -> None:
    """Refuse a tokenizer with more words than the model has; tokens added to it later may be more.

    Raises:
        ModelError: it is another model's.
    """
    known = len(cast(Any, model.get_input_embeddings()).weight)
    if tokenizer.vocab_size > known:
        raise ModelError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} words, the model {known}; give the "
            "model with its own tokenizer"
        )


def padded(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The model, told the padding token that its configuration may lack (decoders' often do)."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_of(tokenizer)
    return model


def class_names(model: "PreTrainedModel") -> list[str]:
    """The classes of a classifier in the order of their numbers; none of a language model."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    named = cast("dict[int, str]", model.config.id2label)
    return [str(named[at]) for at in sorted(named)]


def pad_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The padding token's id."""
    return cast(int, tokenizer.pad_token_id)


def answers(
    model: "PreTrainedModel",
    items: Sequence[Item],
    pad: int,
    runtime: Runtime = Runtime(),
    batch_size: int = 64,
) -> np.ndarray:
    """What a model answers to each row.

    Args:
        model: a classifier or a causal language model, in evaluation mode.
        items: what `data.encode` made.
        pad: the padding token's id.
        runtime: device and precision of the forward passes.
        batch_size: rows at a time.

    Returns:
        [rows] predicted class numbers; of a language model [rows] share of the tokens it predicts right,
        each from those before it.
    """
    device, dtype = runtime.torch_device(), runtime.torch_dtype()
    model.to(cast(Any, device)).eval()
    found = np.zeros(len(items), dtype=np.int64 if class_names(model) else np.float64)
    with console.counter("answering", len(items), "rows") as advance, torch.inference_mode():
        for rows, batch in batches(items, batch_size, pad):
            labels = batch.pop("labels")
            inputs = {name: value.to(device) for name, value in batch.items()}
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**inputs).logits.float().cpu()
            found[rows] = _right_tokens(logits, labels) if labels.ndim == 2 else logits.argmax(-1)
            advance(len(rows))
    return found


def _right_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    wanted = labels[:, 1:]
    counts = wanted != IGNORED
    right = (logits[:, :-1].argmax(-1) == wanted) & counts
    return right.sum(1) / counts.sum(1).clamp(min=1)


def answer_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    max_length: int,
    runtime: Runtime = Runtime(),
) -> np.ndarray:
    """`answers` to texts."""
    return answers(model, encode(examples, tokenizer, max_length), pad_of(tokenizer), runtime)


def place(model: "PreTrainedModel", names: dict[str, str], tensor: Callable[[str], Tensor]) -> None:
    """Write tensors into a model's parameters.

    Args:
        model: changed in place.
        names: of the tensors, by the parameter's name.
        tensor: the value under a tensor's name.
    """
    with torch.no_grad():
        for parameter, name in names.items():
            model.get_parameter(parameter).copy_(tensor(name))
