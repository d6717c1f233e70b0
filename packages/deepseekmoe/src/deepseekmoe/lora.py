"""LoRA adapters on attention and experts, by peft, in its own files.

The library finds adapters' places by the names of Linear modules; experts are stacked parameters, and
are named to it as such.
"""

import warnings
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError, ModelError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def add_adapter(model: Any, rank: int) -> Any:
    """Freeze a model and put a new adapter on its attention and routed experts.

    Args:
        model: a causal language model of this package; it is changed in place.
        rank: of the adapter's matrices; each expert has a pair of its own. alpha is twice the rank.

    Returns:
        The `PeftModel` around it, which saves the adapter alone.

    Raises:
        ConfigError: peft is not installed.
    """
    peft = _peft()
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(ATTENTION),
            target_parameters=list(EXPERTS) if model.config.n_routed_experts else None,
            task_type="CAUSAL_LM",
        ),
    )


def merge_adapter(model: Any, folder: Path) -> Any:
    """A model with an adapter's changes added to its own weights.

    Args:
        model: the one that the adapter was trained on; it is changed in place.
        folder: as peft saves an adapter.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the folder holds no adapter, or one of another model.
    """
    return load_adapter(model, folder).merge_and_unload()


def load_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """A model with a saved adapter on it.

    Args:
        model: the one that the adapter was trained on; it is changed in place.
        folder: as peft saves an adapter.
        trainable: whether the adapter's weights are to be trained on.

    Returns:
        The `PeftModel` around it.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the folder holds no adapter, or one of another model.
    """
    peft = _peft()
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds no adapter (adapter_config.json)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that do not fit; they are judged below
            adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        found = set(peft.load_peft_weights(str(folder), device="cpu"))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:160]
        raise ModelError(f"{folder}: the adapter does not fit the model ({first})") from None
    _check_keys(found, adapted, folder)
    return adapted


def _check_keys(found: set[str], adapted: Any, folder: Path) -> None:
    """Refuse an adapter that has other weights than its model takes: peft would only warn.

    Raises:
        ModelError: one is missing or left over; it is named.
    """
    wanted = set(_peft().get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # embeddings that were trained along stand there under their own names
    surplus = found - wanted - set(adapted.state_dict())
    for keys, what in (
        (wanted - found, "lacks"),
        (surplus, "has, and the model has no place for,"),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"{folder}: the adapter does not fit the model: it {what} {min(keys)}{more}"
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("adapters need peft: pip install 'deepseekmoe[lora]'") from None
    return peft
