"""Supervised fine-tuning on chats, as the paper aligned its 16B model.

All weights are trained, or a LoRA adapter, or some experts: at a constant learning rate, on windows
packed as densely as possible, with the loss of replies alone. The model's own balance losses stay on,
with the alphas of its configuration: the paper tells nothing of them here.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from octavo.errors import ConfigError
from octavo.models import load_tokenizer, save_model
from octavo.rundir import RunDir, atomic
from octavo.runtime import Runtime, is_main, seed_everything, world_size

from deepseekmoe.analyze import trace_routing
from deepseekmoe.chats import PackedChats, as_tokens, draw_chats, encode_chats, load_chats
from deepseekmoe.checkpoints import discard_checkpoints
from deepseekmoe.config import OptimizeConfig, SftConfig, TrainingConfig
from deepseekmoe.corpus import shuffled_batches
from deepseekmoe.esft import Selection, check_share, chosen_layers, freeze_except, select_experts
from deepseekmoe.hub import CHAT_TEMPLATE, load, load_moe_config
from deepseekmoe.lora import add_adapter, load_adapter
from deepseekmoe.optimize import check_options, optimize
from deepseekmoe.parallel import (
    check_processes,
    main_first,
    processes,
    spread,
    whole_model,
    without_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Windows are no longer than the paper's, whatever a model was made for.
LONGEST = 4096


@dataclass(frozen=True)
class Finetuned:
    """A tuned model and what it was tuned on.

    Attributes:
        model: in evaluation mode; of type `PeftModel` with an adapter. Where processes share it they
            call it together.
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

    Weights that are trained are float32 meanwhile; the saved model has the precision it came in. Under
    torchrun the processes share the work as `config` says, and rank 0 saves.

    Args:
        source: folder or hub id of the model.
        config: the chats and the training.
        run: the folder; a run that was killed goes on from its last checkpoint, or takes the model
            that it had saved.
        runtime: seed, device, precision of the forward pass.

    Raises:
        ConfigError: an option is out of range or does not fit the others.
        DataError: there are no such chats, one is malformed, or no reply is within a window.
        ModelError: the model or its tokenizer cannot be had, or the training diverged.
    """
    done = run.path / ("adapter" if config.lora_rank else "model")
    finished = done.is_dir()  # a kill came behind the training

    def prepare() -> tuple[Any, Any, PackedChats, OptimizeConfig, Selection | None]:
        selection = _check(config)
        conversations = load_chats(config.data, config.split)
        seed_everything(runtime.seed)
        place = str(done) if finished and not config.lora_rank else source
        model, tokenizer = _open(place, is_main() or bool(config.lora_rank or selection))
        length = config.length or min(LONGEST, model.config.max_position_embeddings)
        chats = encode_chats(conversations, tokenizer, config.data)
        packed = PackedChats(chats, length, _padding(tokenizer))
        windows_a_step = config.batch_size * config.accumulate * world_size()
        options = _optimization(config, math.ceil(config.epochs * len(packed) / windows_a_step))
        check_processes(options, model.config.n_routed_experts)
        if selection:
            chosen_layers(model, selection)
        return model, tokenizer, packed, options, selection

    with processes(runtime):
        model, tokenizer, packed, options, selection = main_first(prepare)
        kept = model.dtype
        if world_size() == 1:
            model.to(runtime.torch_device())
        if not (finished or config.lora_rank or selection):
            model.float()
        batches = shuffled_batches(packed.rows, len(packed), options, runtime.seed)
        rank = config.lora_rank
        adapted = None
        if rank:
            adapted = main_first(
                lambda: load_adapter(model, done, True) if finished else add_adapter(model, rank)
            )
        with freeze_except(model, selection) if selection else nullcontext():
            trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            if not finished:
                optimize(model, batches, options, run, runtime, name="sft")
        if finished:
            spread(model, options, runtime.torch_device(), runtime.torch_dtype())
            model.eval()
        else:
            whole = None if adapted else whole_model(model)
            if whole is not None:
                whole.to(kept)
            main_first(lambda: _save(run, whole, adapted, tokenizer))
        discard_checkpoints(run, "sft")
    return Finetuned(adapted or model, tokenizer, packed, options.steps, trained)


def _check(config: SftConfig) -> Selection | None:
    """Refuse options that are out of range; gives the selection of experts, where a file names one."""
    if config.epochs <= 0 or not math.isfinite(config.epochs):
        raise ConfigError(f"--epochs {config.epochs}: must be above 0, and finite")
    if config.lora_rank < 0:
        raise ConfigError(f"--lora-rank {config.lora_rank}: must be 0 or more")
    if config.lora_rank and config.experts:
        raise ConfigError("--lora-rank and --experts: train an adapter or experts, not both")
    check_options(_optimization(config, 1))
    if (config.lora_rank or config.experts) and (config.fsdp or config.expert_parallel > 1):
        raise ConfigError(
            "--lora-rank and --experts train a model that is whole on every process: leave out "
            "--fsdp and --expert-parallel"
        )
    return Selection.load(config.experts) if config.experts else None


def _open(source: str, weights: bool) -> tuple[Any, Any]:
    """The model as it was saved, or without weights; its tokenizer with the template to be used."""
    if weights:
        model, words = load(source, dtype="auto")
    else:
        model, words = without_weights(load_moe_config(source)), load_tokenizer(source)
    tokenizer: Any = words
    tokenizer.chat_template = getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE
    return model, tokenizer


def _padding(tokenizer: Any) -> int:
    ids = tokenizer.pad_token_id, tokenizer.eos_token_id
    return next((number for number in ids if number is not None), 0)


def _save(run: RunDir, model: Any, adapted: Any, tokenizer: Any) -> None:
    """Write the model, or the adapter where there is one (rank 0 alone)."""
    if not is_main():
        return
    if adapted is None:
        save_model(run.path / "model", model, tokenizer)
        return
    with atomic(run.path / "adapter") as folder:
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


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
    check_share(p)
    conversations = load_chats(data, split)
    model, tokenizer = load(source, dtype=runtime.torch_dtype())
    assert tokenizer is not None
    model.to(runtime.torch_device())  # pyright: ignore[reportArgumentType]
    tokens = as_tokens(draw_chats(conversations, tokenizer, data, sample, runtime.seed))
    room = length or min(LONGEST, model.config.max_position_embeddings)
    trace = trace_routing(model, tokens, min(room, len(tokens)), batch_size)
    selection = select_experts(trace, score, p)
    return selection, int(model.config.n_routed_experts or 0)


def _optimization(config: SftConfig, steps: int) -> OptimizeConfig:
    shared = {field.name: getattr(config, field.name) for field in fields(TrainingConfig)}
    return OptimizeConfig(steps=steps, schedule="constant", warmup_steps=0, **shared)
