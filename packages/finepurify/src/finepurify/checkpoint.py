"""A model's weights on disk or on the hub, read by the tensor, copied with other values in place."""

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from octavo.errors import ModelError
from octavo.rundir import write_json
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"

#: What is had of a hub model: its weights at the top, and the small files beside them.
WANTED = [SAFE, "model-*-of-*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
PICKLES = [PICKLE, "pytorch_model-*-of-*.bin"]

#: Files that hold weights or pickles: a purified folder has its own, and none of the suspect's others.
WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|pkl|pickle|h5|msgpack|onnx|ot|ckpt|gguf|npz)$|\.index\.json$"
)


@dataclass(frozen=True)
class _Shard:
    """One file of weights, opened lazily."""

    names: list[str]
    read: Callable[[str], Tensor]
    look: Callable[[str], tuple[tuple[int, ...], torch.dtype]]


class Checkpoint:
    """The weights of a model in a folder or on the hub, opened lazily.

    Args:
        source: a local folder, or a hub id (had through the hub's own cache).
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file. It is loaded with
            `weights_only`, yet a pickle of unknown origin is better not opened at all.

    Attributes:
        source: as given.
        folder: where its files lie.
        names: all tensors, in the order of the files.

    Raises:
        ModelError: there is no such model, it cannot be read, it is only a pickle, or only a LoRA
            adapter.
    """

    def __init__(self, source: str | Path, *, allow_pickle: bool = False) -> None:
        self.source = str(source)
        self.folder = _folder(self.source, allow_pickle)
        main = self._main_file(allow_pickle)
        self.pickled = main.name.startswith(PICKLE)
        self.files = self._shard_files(main) if main.name.endswith(INDEX) else [main]
        self._shards = {file: _open(self.source, file, self.pickled) for file in self.files}
        self._home = {name: file for file in self.files for name in self._shards[file].names}
        self.names = list(self._home)

    def _main_file(self, allow_pickle: bool) -> Path:
        for name in (SAFE, SAFE + INDEX, PICKLE, PICKLE + INDEX):
            file = self.folder / name
            if file.is_file() and name.startswith(PICKLE) and not allow_pickle:
                raise ModelError(
                    f"{self.source}: holds only a pickle ({name}), which can run any code; convert "
                    "it to safetensors, or allow it if you trust its source"
                )
            if file.is_file():
                return file
        if (self.folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{self.source}: is a LoRA adapter; merge it into its base first (see README)"
            )
        raise ModelError(f"{self.source}: holds no weights ({SAFE} or {SAFE + INDEX})")

    def _shard_files(self, index: Path) -> list[Path]:
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [self.folder / name for name in sorted(set(places))]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index}: is no index of shards (no weight_map)") from None
        for file in files:
            if file.parent != self.folder or not file.is_file():
                raise ModelError(f"{index}: names {file.name}, which is not beside it")
        return files

    def read(self, name: str) -> Tensor:
        """A tensor as stored; its memory is mapped from the file where that is possible."""
        return self._shards[self._home[name]].read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._shards[self._home[name]].look(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored dtype, without reading it."""
        return self._shards[self._home[name]].look(name)[1]

    def numel(self, name: str) -> int:
        """How many values a tensor has, without reading it."""
        return torch.Size(self.shape(name)).numel()

    def copy(self, folder: Path) -> "Checkpoint":
        """Copy the files at the folder's top byte for byte; a pickle becomes safetensors.

        Other weights (those of other frameworks, of optimizers) and sub-folders stay behind: they
        would carry the unpurified model along.

        Args:
            folder: exists, and is empty.

        Returns:
            The copy, safetensors in as many shards as this one.
        """
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and not WEIGHTS.search(file.name):
                shutil.copyfile(file, folder / file.name)
        for file in self.files:
            if self.pickled:
                # safetensors takes no two names on one memory
                tensors = {
                    name: self.read(name).clone(memory_format=torch.contiguous_format)
                    for name in self._shards[file].names
                }
                save_file(tensors, folder / _safe_name(file), metadata={"format": "pt"})
            else:
                shutil.copyfile(file, folder / file.name)
        index = self.folder / (SAFE + INDEX)
        if self.pickled and len(self.files) > 1:
            places = {name: _safe_name(file) for name, file in self._home.items()}
            size = sum(self.numel(name) * self.dtype(name).itemsize for name in self.names)
            write_json(
                folder / index.name, {"metadata": {"total_size": size}, "weight_map": places}
            )
        elif not self.pickled and self.files != [self.folder / SAFE]:
            shutil.copyfile(index, folder / index.name)
        return Checkpoint(folder)

    def overwrite(self, name: str, value: Tensor) -> None:
        """Put other values in a tensor's place in its safetensors file.

        Args:
            name: of the tensor.
            value: of the stored shape; cast to the stored dtype.
        """
        file = self._home[name]
        raw = value.detach().to("cpu", self.dtype(name)).contiguous().reshape(-1)
        with file.open("rb+") as stream:
            length = int.from_bytes(stream.read(8), "little")
            begin = json.loads(stream.read(length))[name]["data_offsets"][0]
            stream.seek(8 + length + begin)
            stream.write(raw.view(torch.uint8).numpy().data)


def _safe_name(pickled: Path) -> str:
    return pickled.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _folder(source: str, allow_pickle: bool) -> Path:
    """Where a model's files lie; those of a hub id are fetched into the hub's cache."""
    place = Path(source).expanduser()
    if place.is_dir():
        return place
    if place.exists() or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    log.debug("%s: asking the hub", source)
    try:
        folder = Path(snapshot_download(source, allow_patterns=WANTED, ignore_patterns="*/*"))
        if allow_pickle and not list(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=PICKLES)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{source}: neither a folder here nor a model the hub gave; check the name, or give a "
            f"local folder when offline ({first[:100]})"
        ) from error
    return folder


def _open(source: str, file: Path, pickled: bool) -> _Shard:
    try:
        return _open_pickle(file) if pickled else _open_safetensors(file)
    except (
        OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{source}: cannot read {file.name} ({first[:160]})") from error


def _open_safetensors(file: Path) -> _Shard:
    handle = safe_open(file, "pt")

    def look(name: str) -> tuple[tuple[int, ...], torch.dtype]:
        part = handle.get_slice(name)
        shape = tuple(part.get_shape())
        return shape, (part[:0] if shape else handle.get_tensor(name)).dtype

    return _Shard(list(handle.offset_keys()), handle.get_tensor, look)


def _open_pickle(file: Path) -> _Shard:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # a file of before PyTorch 1.6 cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise ValueError("not a plain dictionary of tensors")
    return _Shard(
        list(state), state.__getitem__, lambda name: (tuple(state[name].shape), state[name].dtype)
    )
