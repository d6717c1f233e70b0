"""Two checkpoints side by side: w_init, the public pre-trained weights, and w_ft, the suspect.

Both stay on disk and are read tensor by tensor, so that a pair costs the memory of one tensor. A pair
knows which tensors of the suspect have a counterpart, under whatever prefix either was saved, and writes
a purified copy of the suspect's folder in which nothing changes but the bytes of those tensors.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from octavo.console import progress
from octavo.errors import ConfigError, ModelError
from octavo.rundir import atomic
from torch import Tensor

from finepurify.checkpoint import Checkpoint

log = logging.getLogger(__name__)

#: Tensors whose first dimension is the vocabulary (or another table's length), which may be resized.
TABLES = re.compile(
    r"^(?!.*[Nn]orm).*(embed|wte|wpe|lm_head|shared\.weight|vocab_projector|predictions\.(bias|decoder))"
)

#: Buffers that old checkpoints hold as floats; GPT-2's `attn.bias` is its causal mask.
BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias|running_mean|running_var)$")
MASKS = re.compile(r"(^|\.)(attn|attention)\.bias$")

#: Of tied tensors the embedding is the parameter, and these are its copies (the later, the more so).
COPIES = (r"(^|\.)(encoder|decoder)\.embed_tokens\.", r"(^|\.)(lm_head|cls|embed_out)\.")


@dataclass
class Tensors:
    """One tensor of a pair, both sides in the suspect's stored dtype and shape.

    Attributes:
        init: of w_init.
        suspect: of w_ft.
    """

    init: Tensor
    suspect: Tensor


class WeightPair:
    """The tensors that INIT and SUSPECT have in common; make it with `WeightPair.load`.

    Attributes:
        init: the pre-trained checkpoint.
        suspect: the fine-tuned one.
        names: the compared tensors, under the suspect's names, in its file order.
        kept: the suspect's other tensors, each with the reason: `no counterpart in INIT` (a head),
            `excluded`, `not a weight` (a buffer), `tied to NAME` (counted once, written twice).
        dropped: tensors of INIT that the suspect lacks (heads of pre-training).
        grown: where the first dimension was resized: how many rows the suspect has more than INIT.
    """

    def __init__(
        self,
        init: Checkpoint,
        suspect: Checkpoint,
        exclude: Sequence[str] = (),
        extra_rows: Literal["keep", "mean"] = "keep",
    ) -> None:
        self.init, self.suspect, self.extra_rows = init, suspect, extra_rows
        self._counterpart = _match(suspect.names, init.names)
        weights = [name for name in suspect.names if _is_weight(suspect, name)]
        tied = _tied(suspect, weights, self._counterpart)
        self.names: list[str] = []
        self.kept: dict[str, str] = {}
        for name in suspect.names:
            if name not in weights:
                self.kept[name] = "not a weight"
            elif name in tied:
                self.kept[name] = f"tied to {tied[name]}"
            elif any(_search(rule, name) for rule in exclude):
                self.kept[name] = "excluded"
            elif name not in self._counterpart:
                self.kept[name] = "no counterpart in INIT"
            else:
                self.names.append(name)
        if not self.names:
            raise ModelError(
                f"{suspect.source}: no tensor has a counterpart in {init.source}; INIT must be the "
                "model that the suspect was fine-tuned from"
            )
        self._copies: dict[str, list[str]] = defaultdict(list)
        for copy, name in tied.items():
            self._copies[name].append(copy)
        taken = set(self._counterpart.values())
        self.dropped = [name for name in init.names if name not in taken]
        self.grown: dict[str, int] = {}
        for name in self.names:
            self._compare_shapes(name)
        self._moved = 0
        self._squares = (0.0, 0.0)

    @classmethod
    def load(
        cls,
        init: str | Path,
        suspect: str | Path,
        *,
        exclude: Sequence[str] = (),
        extra_rows: Literal["keep", "mean"] = "keep",
        allow_pickle: bool = False,
    ) -> "WeightPair":
        """Open both checkpoints, match their tensors and check every value.

        Args:
            init: folder or hub id of the pre-trained model.
            suspect: folder or hub id of the fine-tuned one.
            exclude: regular expressions of tensors that are left as they are in the suspect.
            extra_rows: what INIT's side of rows is that it lacks (a vocabulary that grew): the
                suspect's own, so that they never count as moved, or the mean of INIT's rows.
            allow_pickle: see `Checkpoint`.

        Raises:
            ModelError: a checkpoint cannot be read, they have nothing in common, the shapes of a
                tensor differ, or a value is not finite.
            ConfigError: a regular expression is wrong.
        """
        pair = cls(
            Checkpoint(init, allow_pickle=allow_pickle),
            Checkpoint(suspect, allow_pickle=allow_pickle),
            exclude, extra_rows,
        )  # fmt: skip
        pair.check()
        return pair

    def _compare_shapes(self, name: str) -> None:
        other = self._counterpart[name]
        ours, theirs = self.suspect.shape(name), self.init.shape(other)
        if not self.init.dtype(other).is_floating_point:
            raise ModelError(
                f"{self.init.source}: {other} is stored as {self.init.dtype(other)}; give the model "
                "as it was before it was quantised"
            )
        if ours == theirs:
            return
        if not ours or ours[1:] != theirs[1:] or not TABLES.search(name):
            raise ModelError(
                f"{name} is {list(ours)} in {self.suspect.source} but {list(theirs)} in "
                f"{self.init.source}; give the INIT that the suspect was fine-tuned from, or exclude it"
            )
        self.grown[name] = ours[0] - theirs[0]
        log.warning(
            "%s: the suspect has %d rows, INIT %d; the first %d are compared",
            name, ours[0], theirs[0], min(ours[0], theirs[0]),
        )  # fmt: skip

    @property
    def lacking(self) -> list[str]:
        """The suspect's tensors that INIT lacks and nobody excluded: a head."""
        return [name for name, why in self.kept.items() if why == "no counterpart in INIT"]

    @property
    def numel(self) -> int:
        """How many dimensions (scalar parameters) are compared: d."""
        return sum(self.suspect.numel(name) for name in self.names)

    @property
    def identical(self) -> bool:
        """Whether no dimension moved: the suspect is INIT."""
        return self._moved == 0

    @property
    def drift(self) -> float:
        """How far the suspect lies from INIT, as a share of INIT's length: ||delta|| / ||w_init||."""
        moved, length = self._squares
        return (moved / length) ** 0.5 if length else float(moved > 0)

    def moved(self) -> int:
        """How many compared dimensions differ (delta != 0)."""
        return self._moved

    def read(self, name: str) -> Tensors:
        """Both sides of a compared tensor, in the suspect's stored dtype.

        INIT's is cast to it, so that a suspect stored in half precision did not move where it only
        was rounded. Arithmetic belongs in float32.

        Args:
            name: one of `names`.
        """
        suspect = self.suspect.read(name)
        init = self.init.read(self._counterpart[name]).to(suspect.dtype)
        more = self.grown.get(name, 0)
        if more < 0:
            init = init[: len(suspect)]
        elif more and self.extra_rows == "keep":
            init = torch.cat([init, suspect[-more:]])
        elif more:
            mean = init.float().mean(0, keepdim=True).to(init.dtype)
            init = torch.cat([init, mean.expand(more, *init.shape[1:])])
        return Tensors(init, suspect)

    def check(self) -> None:
        """Go through all values once: every weight must be finite; counts those that moved.

        Raises:
            ModelError: some are NaN or infinite; says how many, and in which tensor.
        """
        self._moved = 0
        moved = length = 0.0
        compared = set(self.names)
        for name in progress(self.suspect.names, "comparing weights", unit="tensors"):
            if name in compared:
                both = self.read(name)
                _refuse_non_finite(self.init.source, self._counterpart[name], both.init)
                _refuse_non_finite(self.suspect.source, name, both.suspect)
                self._moved += int((both.init != both.suspect).sum())
                init = both.init.float()
                moved += (both.suspect.float() - init).square().sum(dtype=torch.float64).item()
                length += init.square().sum(dtype=torch.float64).item()
            elif self.kept[name] != "not a weight":
                _refuse_non_finite(self.suspect.source, name, self.suspect.read(name))
        self._squares = (moved, length)

    def model_name(self, name: str) -> str:
        """A compared tensor's name in the loaded model's `named_parameters()`.

        The oldest checkpoints say `LayerNorm.gamma` and `LayerNorm.beta`.
        """
        return _modern(name)

    def write(self, folder: Path, tensors: Callable[[str], Tensor]) -> None:
        """Write a copy of the suspect in which each compared tensor is another.

        The folder appears whole or not at all. Configuration, tokenizer, shards and all other
        tensors are copied byte for byte (a pickle's as safetensors).

        Args:
            folder: of the copy; one that lies there is replaced.
            tensors: gives each of `names`, asked for once, one at a time. Cast to the suspect's dtype.

        Raises:
            ConfigError: the folder is INIT's or the suspect's own, or cannot be written.
            ValueError: a tensor does not have the suspect's shape.
        """
        if folder.resolve() in (self.init.folder.resolve(), self.suspect.folder.resolve()):
            raise ConfigError(f"{folder}: holds INIT or the suspect itself; choose another folder")
        with atomic(folder) as temporary:
            temporary.mkdir()
            copy = self.suspect.copy(temporary)
            for name in progress(self.names, "writing weights", unit="tensors"):
                value = tensors(name)
                if tuple(value.shape) != self.suspect.shape(name):
                    raise ValueError(
                        f"{name}: given {list(value.shape)}, stored {list(self.suspect.shape(name))}"
                    )
                for place in (name, *self._copies[name]):
                    copy.overwrite(place, value)


def _search(rule: str, name: str) -> bool:
    try:
        return re.search(rule, name) is not None
    except re.error as error:
        raise ConfigError(f"exclude {rule!r}: no regular expression ({error})") from None


def _is_weight(checkpoint: Checkpoint, name: str) -> bool:
    mask = MASKS.search(name) and len(checkpoint.shape(name)) == 4
    return (
        checkpoint.dtype(name).is_floating_point and not BUFFERS.search(name) and not mask
    )  # fmt: skip


def _refuse_non_finite(source: str, name: str, tensor: Tensor) -> None:
    bad = ~(
        tensor if tensor.dtype.itemsize > 1 else tensor.float()
    ).isfinite()  # float8 has no test
    if count := int(bad.sum()):
        raise ModelError(
            f"{source}: {count} of the {tensor.numel()} values of {name} are NaN or infinite (as "
            f"{tensor.dtype}); a model with such weights cannot be judged"
        )


def _modern(name: str) -> str:
    """A name without the gamma and beta of the oldest checkpoints."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def _match(suspect: Sequence[str], init: Sequence[str]) -> dict[str, str]:
    """INIT's name for each of the suspect's that has one.

    The same name is best; else one leading component (`bert.`, `model.`) more or less, as a bare model
    and one with a head differ by it, where that leaves no choice.
    """
    same = {_modern(name): name for name in init}
    tails = Counter(name.partition(".")[2] for name in same)
    tail = {name.partition(".")[2]: whole for name, whole in same.items()}
    found = {}
    for name in suspect:
        modern = _modern(name)
        less = modern.partition(".")[2]
        if modern in same:
            found[name] = same[modern]
        elif less in same:
            found[name] = same[less]
        elif tails[modern] == 1:
            found[name] = tail[modern]
    return found


def _tied(
    checkpoint: Checkpoint, weights: Sequence[str], counterpart: dict[str, str]
) -> dict[str, str]:
    """Copies of other tensors in a file that stores tied weights more than once.

    Two tensors of one shape with the very same bits, not all of one value, are one parameter.
    """
    alike: dict[tuple, list[str]] = defaultdict(list)
    for name in weights:
        flat = checkpoint.read(name).reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].contiguous()
        raw = sample.view(torch.uint8).numpy().tobytes()
        if len(set(sample.tolist())) > 1:
            alike[checkpoint.shape(name), checkpoint.dtype(name), raw].append(name)
    found = {}
    for group in alike.values():
        group.sort(key=lambda name: (name not in counterpart, _copy_rank(name)))
        for at, name in enumerate(group):
            for first in group[:at]:
                if first not in found and _same(checkpoint.read(first), checkpoint.read(name)):
                    found[name] = first
                    break
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


def _copy_rank(name: str) -> int:
    """How surely a name is a copy's: 0 for none of `COPIES`."""
    return max([at for at, rule in enumerate(COPIES, 1) if re.search(rule, name)], default=0)
