"""Tokenizers and models from a hub id or a local folder, checked at the door; their cost."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelError
from octavo.rundir import atomic
from octavo.runtime import is_main

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(source: str | Path, **options: Any) -> "PreTrainedConfig":
    """A model's configuration.

    Args:
        source: a local folder or a hub id.
        options: attributes to set on it.

    Raises:
        ModelError: there is no such model, it cannot be reached, or it needs code of its own.
    """
    from transformers import AutoConfig

    return _loaded(AutoConfig.from_pretrained, source, "config.json", **options)


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """A tokenizer from a local folder or a hub id.

    Raises:
        ModelError: there is none, or it cannot be reached.
    """
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer.from_pretrained, source, "tokenizer.json")


def load_model(
    kind: Any,
    source: str | Path,
    *,
    new: Sequence[str] = (),
    unused: Sequence[str] = (),
    allow_pickle: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """A model whose every weight comes from the checkpoint, but for what may be new.

    A checkpoint that does not fit the architecture leaves layers randomly initialised, and the
    library only warns; here that is an error.

    Args:
        kind: an Auto class, such as `AutoModelForSequenceClassification`.
        source: a local folder or a hub id.
        new: regular expressions of weights that the checkpoint may lack (a new classifier's).
        unused: regular expressions of the checkpoint's weights that may stay unused (the heads of
            pre-training).
        allow_pickle: load `pytorch_model.bin` where there is no safetensors file; a pickle can run
            any code.
        options: passed to `from_pretrained`: `config`, `dtype`, `num_labels`, ...

    Raises:
        ModelError: the model cannot be had, its architecture is not of this kind, a weight is
            missing, unused or of another shape, or the weights are only a pickle.
    """
    if not allow_pickle:
        _refuse_pickle(Path(source))
        options["use_safetensors"] = True
    options.setdefault("ignore_mismatched_sizes", True)  # judged below, by name
    model, report = _loaded(
        kind.from_pretrained, source, "weights", output_loading_info=True, **options
    )
    for found, allowed, what in (
        (report["missing_keys"], new, "lacks"),
        ([str(key[0]) for key in report["mismatched_keys"]], new, "has another shape for"),
        (report["unexpected_keys"], unused, "has weights this architecture does not use:"),
    ):
        if keys := _not_matching(found, allowed):
            some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise ModelError(
                f"{source}: the checkpoint {what} {some}; "
                f"it does not fit {type(model).__name__} with this config.json"
            )
    started = sorted(set(report["missing_keys"]) | {key[0] for key in report["mismatched_keys"]})
    if started or report["unexpected_keys"]:
        left = ", ".join(sorted(report["unexpected_keys"])) or "none"
        log.info("%s: new weights: %s; unused: %s", source, ", ".join(started) or "none", left)
    return model


def _not_matching(keys: Any, patterns: Sequence[str]) -> list[str]:
    return sorted(key for key in keys if not any(re.search(rule, key) for rule in patterns))


def _refuse_pickle(folder: Path) -> None:
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickles:
            raise ModelError(
                f"{folder}: holds only a pickle ({pickles[0].name}), which can run any code; "
                "convert it to safetensors, or allow it if you trust its source"
            )


def _loaded(load: Any, source: str | Path, what: str, **options: Any) -> Any:
    """Call a `from_pretrained`, turning its many errors into one line each."""
    from safetensors import SafetensorError

    place = Path(source).expanduser()
    if not place.is_dir():
        log.debug("%s: asking the hub", source)
    if not place.is_dir() and str(source).startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such folder")
    try:
        with quiet_library():
            return load(str(place) if place.is_dir() else str(source), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(_explain(source, place, what, error)) from error


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep transformers' own bars and reports off meanwhile: a call of ours prints nothing."""
    from transformers.utils import logging as library

    bars, verbosity = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def save_model(
    folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Write weights, configuration and tokenizer into a folder that appears whole (rank 0 alone)."""
    if is_main():
        with atomic(folder) as temporary, quiet_library():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)


def _explain(source: str | Path, place: Path, what: str, error: Exception) -> str:
    words = str(error).strip() or type(error).__name__
    first = words.splitlines()[0]
    if "trust_remote_code" in words:
        return f"{source}: needs code from its repository, which is not run here"
    if "Unrecognized configuration class" in words or "for this kind of AutoModel" in words:
        return f"{source}: this architecture has no such head ({first[:120]})"
    if "size mismatch" in words or "mismatched" in words:
        return f"{source}: its weights do not have the shapes of its config.json"
    if place.is_dir() and "backend tokenizer" in words:
        return f"{source}: holds no tokenizer (tokenizer.json or the like)"
    if place.is_dir():
        return f"{source}: cannot read its {what} ({first[:160]})"
    return (
        f"{source}: neither a folder here nor a model the hub gave; check the name, or give a "
        f"local folder when offline ({first[:100]})"
    )


def count_parameters(model: "nn.Module") -> int:
    """How many parameters a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: "PreTrainedModel", length: int) -> int:
    """Floating-point operations of one forward pass over one sequence, attention included.

    Counted by PyTorch in a real pass: matrix products and attention, two operations for each
    multiply-add. For BERT-base at length 128 its 12 layers make 22.347e9.

    Args:
        model: takes `input_ids` and `attention_mask`.
        length: tokens in the sequence.

    Returns:
        Operations, an integer.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.ones(1, length, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return counter.get_total_flops()
