"""Keys and values of a prompt's beginning, computed once for all texts; whole, or some tokens of it.

What is kept goes into the library's own cache, so that any causal language model continues from it, also
`generate`. Each kept token remembers the position it had, and what follows goes on from the position
that it would have had: rotary and absolute positions stay what the model saw.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from octavo.errors import ConfigError, DataError, ModelError
from octavo.rundir import atomic, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor

from anchors.attention import Edit, instrument
from anchors.config import PromptOptions, Task
from anchors.data import Made
from anchors.prompts import Batch, Prompt

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

TENSORS, ABOUT = "cache.safetensors", "cache.json"


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of some of a prompt's first tokens.

    Attributes:
        keys: for each layer, [heads, kept, width]; of int8 where `scales` are given.
        values: likewise.
        positions: the position of each kept token, ascending.
        start: the position of the token that follows.
        scales: for each layer those of keys and values, [heads, kept, 1]; none where nothing is rounded.
        ids: all tokens of the prompt's beginning, kept or not, to know a prompt that has another.
        about: what it was made of, as far as a reader needs it: model, task, demonstrations, kept.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: tuple[int, ...]
    start: int
    scales: tuple[tuple[Tensor, Tensor], ...] | None = None
    ids: tuple[int, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        scales = [scale for pair in self.scales or () for scale in pair]
        return sum(one.numel() * one.element_size() for one in (*self.keys, *self.values, *scales))

    def keep(self, places: Sequence[int], start: int | None = None) -> "PromptCache":
        """Only some of its tokens.

        Args:
            places: indices of the tokens to keep, ascending.
            start: the position of what follows; by default what it was.
        """
        chosen = list(places)
        scales = self.scales
        if scales is not None:
            scales = tuple((one[:, chosen], other[:, chosen]) for one, other in scales)
        return replace(
            self,
            keys=tuple(one[:, chosen] for one in self.keys),
            values=tuple(one[:, chosen] for one in self.values),
            positions=tuple(self.positions[place] for place in chosen),
            start=self.start if start is None else start,
            scales=scales,
        )

    def quantized(self) -> "PromptCache":
        """The same in 8 bits a number, with one scale for each token and head."""
        if self.scales is not None:
            return self
        pairs = [(_rounded(k), _rounded(v)) for k, v in zip(self.keys, self.values, strict=True)]
        return replace(
            self,
            keys=tuple(key for (key, _), _ in pairs),
            values=tuple(value for _, (value, _) in pairs),
            scales=tuple((key, value) for (_, key), (_, value) in pairs),
        )

    def as_cache(self, batch: int = 1) -> "DynamicCache":
        """A cache of the library, for `batch` rows; its layers are never cut to a sliding window."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if self.scales is not None:
                key, value = (
                    one.to(scale.dtype) * scale
                    for one, scale in zip((key, value), self.scales[layer], strict=True)
                )
            cache.update(key.expand(batch, *key.shape), value.expand(batch, *value.shape), layer)
        return cache

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What a model's forward pass, or `generate`, takes to continue with a batch of tails.

        Where a model has sliding windows that the prompts outgrow, run it within `windowed`.
        """
        rows = batch.input_ids.shape[0]
        kept = torch.ones(rows, len(self), dtype=torch.long, device=batch.input_ids.device)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": torch.cat([kept, batch.attention_mask.long()], 1),
            "position_ids": batch.position_ids + self.start,
            "past_key_values": self.as_cache(rows),
        }

    def windowed(self, model: "PreTrainedModel") -> Callable[[Batch], AbstractContextManager[None]]:
        """Keep what a sliding window would not show out of sight; a context for each batch.

        The library counts a window in places of the cache. Where tokens were left out, a kept one is
        nearer in places than it was in the prompt; here it is cut by its own position. Padding stands
        between kept tokens and the rest and makes them farther: in a batch all must be equally long.
        """
        windows = sliding_windows(model)

        def around(batch: Batch) -> AbstractContextManager[None]:
            end = self.start + batch.input_ids.shape[1]
            if all(window is None or window >= end for window in windows):
                return nullcontext()
            if any(batch.shifts):
                raise ConfigError(
                    "a padded batch on a cache cannot be read through sliding windows; run prompts of "
                    "equal length together"
                )
            if len(self) == self.start:
                return nullcontext()
            places = torch.tensor(self.positions, device=batch.input_ids.device)

            def cut(layer: int, query: Tensor, mask: Tensor) -> Tensor:
                window, rows, columns = windows[layer], query.shape[-2], mask.shape[-1]
                if window is None:
                    return mask
                new = columns - len(self)
                ends = self.start + torch.arange(new - rows, new, device=places.device)
                hidden = ends[:, None] - places >= window
                hidden = torch.nn.functional.pad(hidden, (0, new))
                return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

            return instrument(model, Edit(before=cut, cached=True))

        return around

    def save(self, folder: Path) -> None:
        """Write `cache.safetensors` and `cache.json` into a folder; what else lies there stays."""
        tensors = {}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors |= {f"layers.{layer}.keys": key, f"layers.{layer}.values": value}
            if self.scales is not None:
                one, other = self.scales[layer]
                tensors |= {
                    f"layers.{layer}.key_scales": one,
                    f"layers.{layer}.value_scales": other,
                }
        whole = {name: one.contiguous().cpu() for name, one in tensors.items()}
        content = {
            "positions": self.positions, "start": self.start, "ids": self.ids,
            "about": dict(self.about),
        }  # fmt: skip
        write_saved(folder, whole, TENSORS, content, ABOUT)

    @classmethod
    def load(cls, folder: Path, model: "PreTrainedModel") -> "PromptCache":
        """A saved cache, on a model's device.

        Raises:
            DataError: the folder holds none.
            ModelError: it was made by another model.
        """
        content, tensors = read_saved(folder, ABOUT, TENSORS)
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        parts = ["keys", "values"] + ["key_scales", "value_scales"] * (
            "layers.0.key_scales" in tensors
        )
        wanted = {f"layers.{layer}.{part}" for layer in range(count) for part in parts}
        positions = content.get("positions")
        if not (
            isinstance(positions, list) and isinstance(content.get("start"), int)
            and isinstance(content.get("about"), dict) and isinstance(content.get("ids"), list)
        ):  # fmt: skip
            raise DataError(f"{folder}: {ABOUT} lacks positions, start, ids or about")
        check_model(folder, content["about"].get("model", {}), model)
        if {*tensors} != wanted or any(
            one.ndim != 3 or one.shape[1] != len(positions) for one in tensors.values()
        ):
            raise DataError(
                f"{folder}: {TENSORS} does not hold {len(positions)} tokens of {count} layers"
            )
        tensors = {name: one.to(model.device) for name, one in tensors.items()}
        layers = range(count)

        def all_of(part: str) -> tuple[Tensor, ...]:
            return tuple(tensors[f"layers.{layer}.{part}"] for layer in layers)

        scales = None
        if "layers.0.key_scales" in tensors:
            scales = tuple(zip(all_of("key_scales"), all_of("value_scales"), strict=True))
        return cls(
            all_of("keys"), all_of("values"), tuple(positions), content["start"], scales,
            tuple(content["ids"]), content["about"],
        )  # fmt: skip


def prefill(
    model: "PreTrainedModel", ids: Sequence[int], about: Mapping[str, Any] | None = None
) -> PromptCache:
    """Run a prompt's beginning once and keep all of it.

    Args:
        model: any causal language model with a cache of keys and values.
        ids: the tokens, one or more.
        about: what to remember beside the model.

    Raises:
        ModelError: the model keeps no keys and values in such a cache.
    """
    from transformers import DynamicCache

    from anchors.attention import frozen

    cache = DynamicCache()
    with frozen(model), torch.no_grad():
        row = torch.tensor([list(ids)], device=model.device)
        filled = model(input_ids=row, past_key_values=cache, use_cache=True).past_key_values
    layers = getattr(filled, "layers", [])
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise ModelError(
            f"{type(model).__name__}: keeps no keys and values for every layer, so that its prompts "
            "cannot be cached in parts"
        )
    return PromptCache(
        tuple(layer.keys[0] for layer in layers),
        tuple(layer.values[0] for layer in layers),
        tuple(range(len(ids))),
        len(ids),
        ids=tuple(ids),
        about={"model": signature(model)} | dict(about or {}),
    )


def sliding_windows(model: "PreTrainedModel") -> list[int | None]:
    """How many tokens back each layer sees; none where it sees all."""
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers
    count = config.num_hidden_layers
    local = getattr(config, "attention_layers", None)  # of GPT-Neo
    if isinstance(local, list) and "local" in local:
        return [config.window_size if kind == "local" else None for kind in local]
    return [getattr(layer, "sliding_window", None) for layer in layers] or [None] * count


def signature(model: "PreTrainedModel") -> dict[str, Any]:
    """What tells a model from another: its type, sizes, and the size of each layer's weights."""
    config = model.config.get_text_config(decoder=True)
    sums: dict[int, float] = {}
    for name, one in model.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        sums[layer] = sums.get(layer, 0.0) + float(one.detach()[:256].double().abs().mean())
    return {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "weights": [float(f"{sums[layer]:.8g}") for layer in sorted(sums)],
    }


def check_model(folder: Path, made_by: Mapping[str, Any], model: "PreTrainedModel") -> None:
    """Refuse what another model made.

    Raises:
        ModelError: one of type, sizes or weights differs; weights by more than a rounding to bfloat16.
    """
    for name, value in signature(model).items():
        made = made_by.get(name)
        same = made == value
        if name == "weights" and isinstance(made, list) and len(made) == len(value):
            pairs = zip(made, value, strict=True)
            same = all(abs(one - other) <= 2e-4 * abs(other) for one, other in pairs)
        if not same and name == "weights":
            raise ModelError(f"{folder}: was made by another model (its weights differ)")
        if not same:
            raise ModelError(
                f"{folder}: was made by another model ({name} {made}; this one's is {value})"
            )


def read_saved(folder: Path, about: str, tensors: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON file and the tensors of a saved folder.

    Raises:
        DataError: one is missing or cannot be read.
    """
    from safetensors import SafetensorError

    if not (folder / about).is_file():
        raise DataError(f"{folder}: holds no {about}; give a folder that was saved by anchors")
    try:
        content = json.loads((folder / about).read_text(encoding="utf-8"))
        return content, load_file(folder / tensors)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be read ({str(error).splitlines()[0][:120]})") from error


def write_saved(
    folder: Path, tensors: dict[str, Tensor], name: str, content: dict[str, Any], about: str
) -> None:
    """Write tensors and their JSON file, each whole; other files of the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / name) as temporary:
        save_file(tensors, temporary)
    write_json(folder / about, content)


def made_with(adapter: Path | None, cache: Path | None, options: PromptOptions) -> Made:
    """The task and demonstrations that a saved adapter or cache was made with.

    Args:
        adapter: folder of the one, or none.
        cache: folder of the other, or none.
        options: what the user gave beside it.

    Raises:
        ConfigError: both are given, or options that contradict them, or the output would replace it.
        DataError: the folder holds no such thing, or does not name task and demonstrations.
    """
    if adapter and cache:
        raise ConfigError("--adapter and --cache: give one of them")
    folder, about = (adapter, "reweighter.json") if adapter else (cache, ABOUT)
    assert folder is not None
    if options.template or options.labels or options.train_data:
        raise ConfigError(
            f"{folder}: has its own template and demonstrations; leave --template, --labels and "
            "--train-data out"
        )
    if options.out and options.out.absolute() in (folder.absolute(), *folder.absolute().parents):
        raise ConfigError(f"--out {options.out}: {folder} lies in it; choose another folder")
    if not (folder / about).is_file():
        raise DataError(f"{folder}: holds no {about}; give a folder that was saved by anchors")
    try:
        content = json.loads((folder / about).read_text(encoding="utf-8"))["about"]
        one = content["task"]
        task = Task(one["template"], tuple(one["labels"]), one["separator"])
        shown = tuple((str(text), int(kind)) for text, kind in content["demonstrations"])
        return Made(task, shown, frozenset(content.get("trained texts", ())))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: {about} does not name a task and its demonstrations") from error


def remember(task: Task, shown: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """The same, to be saved."""
    named = {"template": task.template, "labels": list(task.labels), "separator": task.separator}
    return {"task": named, "demonstrations": [list(one) for one in shown]}


def beginning(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """The tokens of the demonstrations, which all prompts share.

    Raises:
        DataError: they do not.
    """
    first = prompts[0].input_ids[: prompts[0].query]
    if not first:
        raise DataError("the prompts have no demonstrations")
    for prompt in prompts:
        if prompt.input_ids[: prompt.query] != first:
            raise DataError(
                "the prompts begin with different tokens: they have other demonstrations, or the "
                "tokenizer joins the last separator with the text"
            )
    return first


def _rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return (values / scale).round().clamp(-127, 127).to(torch.int8), scale
