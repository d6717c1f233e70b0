"""Checkpoints of the authors' code: their names, their options, and back.

Their model is `FormationMTLBertForSequenceClassification` (transformers 4.5.1): `bert.*`,
`classifier.*`, `formation_embedding.weight` [18, H] and `formation_predictor.{mlp.0, mlp.2,
classifier}.*`. Ours has one row of `formation_embedding` more, for "unknown", and keeps the encoder
under `encoder`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from octavo.errors import ModelError
from octavo.models import load_config, load_tokenizer, save_model
from torch import Tensor

from formbert.config import ModelOptions, with_preset
from formbert.modeling import FormBertCross, FormBertCrossConfig

TABLE = "formation_embedding.weight"


def ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights by our names; an unknown formation's vector is zero.

    Raises:
        ModelError: the weights are not of their model.
    """
    if TABLE not in state or not any(name.startswith("bert.") for name in state):
        raise ModelError("these weights are not of the authors' model: no formation_embedding")
    renamed = {
        ("encoder." + name.removeprefix("bert.") if name.startswith("bert.") else name): weight
        for name, weight in state.items()
        if not name.endswith("position_ids")  # a buffer of old versions
    }
    renamed[TABLE] = torch.cat([renamed[TABLE], torch.zeros_like(renamed[TABLE][:1])])
    return renamed


def theirs(model: FormBertCross) -> dict[str, Tensor]:
    """Our weights by their names.

    Raises:
        ModelError: the model is not theirs (`--authors`).
    """
    if not model.options.authors:
        raise ModelError("only a model of --preset paper has the authors' form")
    state = {
        ("bert." + name.removeprefix("encoder.") if name.startswith("encoder.") else name): weight
        for name, weight in model.state_dict().items()
    }
    state[TABLE] = state[TABLE][:-1]
    return state


def convert(source: Path, out: Path, allow_pickle: bool = False) -> None:
    """A folder of their model as a folder of ours.

    Args:
        source: with `config.json`, a tokenizer, and `model.safetensors` or `pytorch_model.bin`.
        out: the new folder.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file, weights alone.

    Raises:
        ModelError: a file is missing, a pickle is not allowed, or the weights are not of their model.
    """
    weights = _weights(source, allow_pickle)
    try:
        state = ours(weights)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    config = load_config(source)
    options = with_preset(ModelOptions(), "paper")
    made = FormBertCross(FormBertCrossConfig(encoder=config.to_dict(), options=asdict(options)))
    found = made.load_state_dict(state, strict=False)
    if found.missing_keys or found.unexpected_keys:
        name = [*found.missing_keys, *found.unexpected_keys][0]
        raise ModelError(f"{source}: its weights do not fit the authors' model at {name}")
    save_model(out, made, load_tokenizer(source))


def _weights(source: Path, allow_pickle: bool) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safe, pickled = source / "model.safetensors", source / "pytorch_model.bin"
    if safe.is_file():
        try:
            return load_file(safe)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{safe}: cannot be read ({error}); fetch it again") from None
    if not pickled.is_file():
        raise ModelError(f"{source}: holds neither {safe.name} nor {pickled.name}")
    if not allow_pickle:
        raise ModelError(
            f"{source}: holds only a pickle ({pickled.name}), which can run any code; add "
            "--allow-pickle if you trust its source"
        )
    try:
        return torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError):
        raise ModelError(f"{pickled}: holds more than weights, or is damaged") from None
