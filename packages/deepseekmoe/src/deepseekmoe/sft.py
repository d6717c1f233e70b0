"""Supervised fine-tuning on chats, as the paper aligned its 16B model.

All weights are trained, or a LoRA adapter, or some experts: at a constant learning rate, on windows
packed as densely as possible, with the loss of replies alone. The model's own balance losses stay on,
with the alphas of its configuration: the paper tells nothing of them here.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from octavo.errors import ConfigError
from octavo.models import save_model
from octavo.rundir import RunDir, atomic
from octavo.runtime import Runtime, is_main, seed_everything, world_size

from deepseekmoe.analyze import trace_routing
from deepseekmoe.chats import PackedChats, as_tokens, encode_chats, load_chats
from deepseekmoe.checkpoints import discard_checkpoints
from deepseekmoe.config import OptimizeConfig, SftConfig
from deepseekmoe.corpus import shuffled_batches
from deepseekmoe.esft import Selection, freeze_except, select_experts
from deepseekmoe.hub import CHAT_TEMPLATE, load
from deepseekmoe.lora import add_adapter
from deepseekmoe.optimize import check_options, optimize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Windows are no longer than the paper's, whatever a model was made for.
LONGEST = 4096


@dataclass(frozen=True)
class Finetuned:
    """A tuned model and what it was tuned on.

    Attributes:
        model: in evaluation mode; of type `PeftModel` with an adapter.
        tokenizer: with the chat template that was used.
        packed: the windows.
        steps: updates.
        trained: weights that were trained.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    packed: PackedChats
    steps: int
    trained: int


def finetune(
    source: str, config: SftConfig, run: RunDir, runtime: Runtime = Runtime()
) -> Finetuned:
    """Tune a model on chats and save it in the run's folder `model`, or `adapter` with LoRA.

    Weights that are trained are float32 meanwhile; the saved model has the precision it came in.

    Args:
        source: folder or hub id of the model.
        config: the chats and the training.
        run: the folder; a run that was killed goes on from its last checkpoint.
        runtime: seed, device, precision of the forward pass.

    Raises:
        ConfigError: an option is out of range or does not fit the others.
        DataError: there are no such chats, one is malformed, or no reply is within a window.
        ModelError: the model or its tokenizer cannot be had, or the training diverged.
    """
    if config.epochs <= 0 or not math.isfinite(config.epochs):
        raise ConfigError(f"--epochs {config.epochs}: must be above 0, and finite")
    if config.lora_rank < 0:
        raise ConfigError(f"--lora-rank {config.lora_rank}: must be 0 or more")
    if config.lora_rank and config.experts:
        raise ConfigError("--lora-rank and --experts: train an adapter or experts, not both")
    check_options(_optimization(config, 1))
    selection = Selection.load(config.experts) if config.experts else None
    conversations = load_chats(config.data, config.split)
    partly = bool(config.lora_rank or selection)
    seed_everything(runtime.seed)
    loaded, words = load(source, dtype="auto")
    model: Any = loaded
    tokenizer: Any = words
    kept = model.dtype
    model.to(runtime.torch_device())
    if not partly:
        model.float()
    tokenizer.chat_template = getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE
    length = config.length or min(LONGEST, model.config.max_position_embeddings)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    packed = PackedChats(
        encode_chats(conversations, tokenizer, config.data), length, 0 if pad is None else pad
    )
    windows_a_step = config.batch_size * config.accumulate * world_size()
    steps = math.ceil(config.epochs * len(packed) / windows_a_step)
    options = _optimization(config, steps)
    batches = shuffled_batches(packed.rows, len(packed), options, runtime.seed)
    adapted = add_adapter(model, config.lora_rank) if config.lora_rank else None
    with freeze_except(model, selection) if selection else _all_trained():
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        optimize(model, batches, options, run, runtime, name="sft")
    if adapted is not None:
        if is_main():
            with atomic(run.path / "adapter") as folder:
                adapted.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    else:
        model.to(kept)
        save_model(run.path / "model", model, tokenizer)
    discard_checkpoints(run, "sft")
    return Finetuned(adapted or model, tokenizer, packed, steps, trained)


def select_for_task(
    source: str,
    data: str,
    split: str | None = None,
    score: Literal["token", "gate"] = "token",
    p: float = 0.2,
    sample: int = 131072,
    length: int | None = None,
    batch_size: int = 8,
    runtime: Runtime = Runtime(),
) -> tuple[Selection, int]:
    """The experts that a model uses on a task's chats, and how many a layer has.

    Args:
        source: folder or hub id of the model.
        data: the chats.
        split: of them.
        score: see `select_experts`.
        p: likewise.
        sample: tokens to look at, of chats drawn at random.
        length: of a window, in tokens.
        batch_size: windows at a time.
        runtime: seed of the draw, device, precision.

    Raises:
        ConfigError: an option is out of range, or the model has no routed experts.
        DataError: there are no such chats, or one is malformed.
        ModelError: the model or its tokenizer cannot be had.
    """
    for name, value in (("sample", sample), ("batch-size", batch_size), ("length", length or 2)):
        if value < 1 + (name == "length"):
            raise ConfigError(f"--{name} {value}: must be {1 + (name == 'length')} or more")
    if not 0 < p <= 1:
        raise ConfigError(f"--p {p}: must be above 0, and 1 at the most")
    conversations = load_chats(data, split)
    np.random.default_rng(runtime.seed).shuffle(conversations)
    model, tokenizer = load(source, dtype=runtime.torch_dtype())
    assert tokenizer is not None
    model.to(runtime.torch_device())  # pyright: ignore[reportArgumentType]
    chosen, total = [], 0
    for number, turns in enumerate(conversations, 1):
        if total >= sample:
            break
        chosen += encode_chats([turns], tokenizer, f"{data} (shuffled), {number}")
        total += len(chosen[-1])
    room = length or min(LONGEST, model.config.max_position_embeddings)
    trace = trace_routing(model, as_tokens(chosen), min(room, total), batch_size)
    selection = select_experts(trace, score, p)
    return selection, int(model.config.n_routed_experts or 0)


@contextmanager
def _all_trained() -> Iterator[None]:
    yield


def _optimization(config: SftConfig, steps: int) -> OptimizeConfig:
    return OptimizeConfig(
        steps=steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        learning_rate=config.learning_rate,
        schedule="constant",
        warmup_steps=0,
        weight_decay=config.weight_decay,
        max_gradient_norm=config.max_gradient_norm,
        save_every=config.save_every,
        log_every=config.log_every,
        checkpointing=config.checkpointing,
    )
