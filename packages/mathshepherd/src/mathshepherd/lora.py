"""Adapters of low rank (LoRA): they are trained beside frozen weights, and at the end added to these."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from octavo.errors import ConfigError
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_adapter(model: "PreTrainedModel", rank: int, new_words: Sequence[int] = ()) -> Any:
    """A model whose weights are frozen, with an adapter at each linear layer but the output.

    Args:
        model: changed in place.
        rank: of the adapter; its scale is 2.
        new_words: tokens whose own rows of the embeddings, and of the output, are trained too.

    Raises:
        ConfigError: peft is not installed, or the model's output cannot learn new words beside it.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("--lora-rank: needs peft; pip install 'mathshepherd[lora]'") from None
    if rank < 0:
        raise ConfigError(f"--lora-rank {rank}: must be 0 or more")
    rows = None
    if new_words:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if getattr(ends[1], "bias", None) is not None:  # peft would leave it out
            raise ConfigError(
                "--add-words, --lora-rank: the model's output has a bias, with which an adapter cannot "
                "learn new words; use --lora-rank 0"
            )
        rows = {name: list(new_words) for name, one in model.named_modules() if one in ends}
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM",
        trainable_token_indices=rows,
    )  # fmt: skip
    adapted: Any = get_peft_model(model, settings)
    # or the hub would be asked at each checkpoint whether there are new words
    adapted.peft_config["default"].base_model_name_or_path = ""
    return adapted


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen linear layers in the precision that autocast gives them at every pass anyway."""
    for part in model.modules():
        if isinstance(part, nn.Linear) and not any(one.requires_grad for one in part.parameters()):
            part.to(dtype)


def merged(adapted: Any) -> Any:
    """The plain model again, in float32, with what was learnt added to its weights."""
    return adapted.float().merge_and_unload().requires_grad_(True)
