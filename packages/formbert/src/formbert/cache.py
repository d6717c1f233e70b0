"""Glosses' vectors kept on disk: one array, and an index by what each vector was made of.

A vector's key is a hash of the model's weights, the text read, and the formation given, so that neither
another model nor a changed gloss, template or annotation can meet an old vector.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from octavo.errors import DataError
from octavo.rundir import atomic
from transformers import PreTrainedModel

from formbert.reader import Reader

INDEX, VECTORS = "index.json", "vectors.npy"


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the configuration, the precision and all weights."""
    content = hashlib.sha256(f"{model.config.to_json_string()} {model.dtype}".encode())
    for name, weight in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:32]


class GlossCache:
    """Vectors of glosses of one model, in memory and in a folder where one is named.

    Args:
        folder: with what was kept earlier, or to be made; None for memory alone.
        model: whose vectors they are.

    Raises:
        DataError: the folder is damaged, or another model's.
    """

    def __init__(self, folder: Path | None, model: PreTrainedModel) -> None:
        self.folder = folder
        self.model = "" if folder is None else fingerprint(model)
        self.places: dict[str, int] = {}
        self.vectors = np.empty((0, 0), np.float32)
        if folder is not None and folder.exists():
            self._read(folder)

    def _read(self, folder: Path) -> None:
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            owner, keys = index["model"], index["keys"]
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            raise DataError(
                f"{folder}: is no cache of glosses, or damaged; delete it or name another"
            ) from None
        if owner != self.model:
            raise DataError(
                f"{folder}: holds glosses of another model; delete it or name another folder"
            )
        if vectors.ndim != 2 or len(vectors) != len(keys):
            raise DataError(f"{folder}: holds {len(vectors)} vectors for {len(keys)} glosses")
        self.places, self.vectors = {key: at for at, key in enumerate(keys)}, vectors

    def key(self, reader: Reader, sense: int) -> str:
        """Of one sense's vector."""
        shares = reader.formations[sense] * reader.known[sense]
        (row,) = reader.gloss_rows([sense])
        content = repr((self.model, row, shares.tolist()))
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def get(self, keys: Sequence[str]) -> dict[int, np.ndarray]:
        """Vectors that are there, by the place of their key among those asked."""
        return {
            at: self.vectors[self.places[key]] for at, key in enumerate(keys) if key in self.places
        }

    def add(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Keep more vectors; a folder is replaced whole."""
        fresh = {key: vector for key, vector in vectors.items() if key not in self.places}
        rows = [np.asarray(self.vectors)] if len(self.vectors) else []
        together = np.concatenate([*rows, np.stack(list(fresh.values()))]).astype(np.float32)
        keys = [*self.places, *fresh]
        if self.folder is None:
            self.places = {key: at for at, key in enumerate(keys)}
            self.vectors = together
            return
        with atomic(self.folder) as temporary:
            temporary.mkdir()
            np.save(temporary / VECTORS, together)
            index = {"model": self.model, "keys": keys}
            (temporary / INDEX).write_text(json.dumps(index), encoding="utf-8")
        self._read(self.folder)

    def __len__(self) -> int:
        """How many vectors there are."""
        return len(self.places)
