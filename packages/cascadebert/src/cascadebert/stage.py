"""One complete model of a cascade: its tokenizer, its weights, and what runs it."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from octavo import console
from octavo.errors import ConfigError, ModelError
from octavo.models import load_model, load_tokenizer
from octavo.runtime import Runtime
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cascadebert.config import Backend
from cascadebert.cost import StageCost, latency, stage_cost
from cascadebert.data import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: A batch of tensors [rows, tokens] in, logits [rows, classes] in the model's own order out.
Forward = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts, not padded.

    Attributes:
        rows: token ids and masks of each text.
        truncated: whether each text was cut.
    """

    rows: list[dict[str, list[int]]]
    truncated: list[bool]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, special ones included."""
        return [len(row["input_ids"]) for row in self.rows]

    def at(self, indices: Sequence[int]) -> "Encoded":
        """The texts of these indices, in their order."""
        return Encoded([self.rows[i] for i in indices], [self.truncated[i] for i in indices])


@dataclass
class Stage:
    """One complete model.

    Attributes:
        name: where it came from.
        model: a sequence classifier in evaluation mode.
        tokenizer: its own.
        labels: the cascade's label names.
        classes: for each of these, the model's own class number.
        max_length: tokens after which a text is cut.
        weights: hash of its weights as stored.
        forward: what runs it, on its device.
        backend: the name of that, with its precision.
        multiple: batches are padded to a multiple of so many tokens.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    labels: list[str]
    classes: list[int]
    max_length: int
    weights: str
    forward: Forward
    backend: str
    multiple: int = 1
    spelling: str = field(default="", repr=False)

    def encode(self, examples: Examples) -> Encoded:
        """Token ids and masks of each example, cut to the stage's length, not padded."""
        if len(examples) == 0:
            return Encoded([], [])
        batch = self.tokenizer(
            examples.texts,
            examples.pairs,
            truncation=True,
            max_length=self.max_length,
        )
        names = list(batch.keys())
        rows = [
            dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        if batch.encodings:  # a fast tokenizer knows what it cut
            cut = [bool(encoding.overflowing) for encoding in batch.encodings]
        else:
            cut = [len(row["input_ids"]) >= self.max_length for row in rows]
        return Encoded(rows, cut)

    @property
    def identity(self) -> str:
        """A hash of all that decides its answers: weights, tokenizer, length and class order."""
        content = f"{self.weights} {self.spelling} {self.max_length} {self.classes}"
        return hashlib.sha256(content.encode()).hexdigest()

    def reads_like(self, other: "Stage") -> bool:
        """Whether both turn a text into the same tokens, so that it need not be done twice."""
        return bool(self.spelling) and (self.spelling, self.max_length) == (
            other.spelling,
            other.max_length,
        )

    def pad(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows as tensors [rows, longest], padded on the tokenizer's side."""
        side = self.tokenizer.padding_side
        fill = {"input_ids": int(self.tokenizer.pad_token_id or 0)}  # pyright: ignore
        longest = max(len(row["input_ids"]) for row in rows)
        missing = min(-longest % self.multiple, max(0, self.max_length - longest))
        batch = {}
        for key in rows[0]:
            value = fill.get(key, 0)
            tensor = pad_sequence([torch.tensor(row[key]) for row in rows], True, value, side)
            ends = (missing, 0) if side == "left" else (0, missing)
            batch[key] = torch.nn.functional.pad(tensor, ends, value=value)
        return batch

    def run(self, encoded: Encoded, batch_tokens: int, name: str = "") -> Tensor:
        """Logits of tokenised texts, in batches of like lengths.

        Args:
            encoded: any number of texts.
            batch_tokens: tokens in a batch, padding included.
            name: what the progress bar says.

        Returns:
            [items, classes] of float32 on the CPU, in the order of the cascade's labels.

        Raises:
            ModelError: a logit is not finite.
        """
        result = torch.empty(len(encoded), len(self.labels))
        bar = console.counter(name or self.name, len(encoded), "texts")
        with torch.inference_mode(), bar as advance:
            for batch in batches(encoded.lengths, batch_tokens):
                output = self.forward(self.pad([encoded.rows[i] for i in batch]))
                result[batch] = output[:, self.classes].float().cpu()
                advance(len(batch))
        if not result.isfinite().all():
            raise ModelError(f"{self.name}: gives logits that are not finite; train it again")
        return result

    def cost(self, length: int, batch_tokens: int = 0) -> StageCost:
        """What an item of so many tokens costs; the latency is measured in batches of so many."""
        price = stage_cost(self.model, length)
        if not batch_tokens:
            return price
        token = int(self.tokenizer.pad_token_id or 0) + 1  # pyright: ignore

        def forward(items: int, tokens: int) -> None:
            ids = [token] * tokens
            row = {"input_ids": ids, "attention_mask": [1] * tokens}
            if "token_type_ids" in self.tokenizer.model_input_names:
                row["token_type_ids"] = [0] * tokens
            with torch.inference_mode():
                self.forward(self.pad([row] * items)).float().cpu()

        return replace(price, latency=latency(forward, length, batch_tokens))


#: Padding that a batch may always hold: it costs as much as one batch more (12 layers, a CPU thread).
PADDING = 48

#: Share of a batch's tokens that may be padding beyond that.
WASTE = 0.05


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, each within the token budget when padded, longest first.

    A batch also ends where more of it would be padding than one more batch costs.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        stop, wasted = start + 1, 0
        while stop < len(order) and (stop + 1 - start) * longest <= batch_tokens:
            wasted += longest - lengths[order[stop]]
            if wasted > max(PADDING, WASTE * (stop + 1 - start) * longest):
                break
            stop += 1
        yield order[start:stop]
        start = stop


def load_stage(
    source: str,
    labels: Sequence[str] | None,
    max_length: int | None,
    backend: Backend = "torch",
    allow_partial: bool = False,
    runtime: Runtime = Runtime(),
) -> Stage:
    """Load a fine-tuned classifier.

    Args:
        source: a local folder or a hub id.
        labels: the names its own must be, in any order; its own by default.
        max_length: tokens after which a text is cut; the model's limit by default.
        backend: what runs it.
        allow_partial: load it although weights are missing or unused.
        runtime: device and precision.

    Raises:
        ConfigError: the backend is not installed, or cannot be used with this device or precision.
        ModelError: the model cannot be had, does not fit its checkpoint, or has other labels.
    """
    from transformers import AutoModelForSequenceClassification

    anything = (".*",) if allow_partial else ()
    model = load_model(
        AutoModelForSequenceClassification, source, new=anything, unused=anything, dtype="auto"
    )
    weights = hash_weights(model)  # as stored, so that it is the same in any precision
    model.to(runtime.torch_dtype())  # pyright: ignore[reportArgumentType, reportCallIssue]
    tokenizer = load_tokenizer(source)
    if (model.config.num_labels or 0) < 2:
        raise ModelError(
            f"{source}: a regression head has no softmax confidence; needs two labels or more"
        )
    named = {int(number): str(name) for number, name in (model.config.id2label or {}).items()}
    if all(name == f"LABEL_{number}" for number, name in named.items()):
        named = {number: str(number) for number in named}  # the library's stand-in for no names
    names = {name: number for number, name in named.items()}
    if labels is not None and set(names) != set(labels):
        raise ModelError(
            f"{source}: its labels ({', '.join(names)}) are not those of the first stage "
            f"({', '.join(labels)}); set id2label in its config.json to the same names"
        )
    labels = list(labels or names)
    stage = make_stage(Path(source).name, model, tokenizer, labels, max_length, runtime)
    stage.classes, stage.weights = [names[label] for label in labels], weights
    if backend == "compile":
        stage.forward, stage.backend = _compiled(model, runtime)
        stage.multiple = 8 if runtime.torch_device().type == "cuda" else 1
    elif backend != "torch":
        from cascadebert.onnx import onnx_forward

        stage.forward, stage.backend = onnx_forward(Path(source), backend, weights, runtime)
    return stage


def make_stage(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    labels: Sequence[str],
    max_length: int | None = None,
    runtime: Runtime = Runtime(),
) -> Stage:
    """A stage of a model in memory, whose classes stand in the order of the labels."""
    limit = longest(model, tokenizer)
    forward, backend = _torch(model.eval(), runtime)
    return Stage(
        name=name,
        model=model,
        tokenizer=tokenizer,
        labels=list(labels),
        classes=list(range(len(labels))),
        max_length=min(max_length or limit, limit),
        weights="",
        forward=forward,
        backend=backend,
        spelling=_spelling(tokenizer),
    )


def _torch(model: "PreTrainedModel", runtime: Runtime) -> tuple[Forward, str]:
    device = runtime.torch_device()
    model.to(device)  # pyright: ignore[reportArgumentType]

    def forward(batch: dict[str, Tensor]) -> Tensor:
        return model(**{key: value.to(device) for key, value in batch.items()}).logits

    return forward, f"torch-{str(runtime.torch_dtype()).removeprefix('torch.')}"


def _compiled(model: "PreTrainedModel", runtime: Runtime) -> tuple[Forward, str]:
    """The same through torch.compile: one graph for all batches and lengths, one for a single row."""
    device = runtime.torch_device()
    _need_compiler(device)
    model.to(device)  # pyright: ignore[reportArgumentType]
    compiled = torch.compile(model)

    def forward(batch: dict[str, Tensor]) -> Tensor:
        there = {key: value.to(device) for key, value in batch.items()}
        for value in there.values():
            # each size free by itself: dynamic=True would take a batch of 8 texts of 8 tokens for a
            # square for good, and compile anew for the next shape
            for size in (0, 1):
                if value.shape[size] > 1:
                    torch._dynamo.maybe_mark_dynamic(value, size)
        return compiled(**there).logits

    return forward, f"compile-{str(runtime.torch_dtype()).removeprefix('torch.')}"


def _need_compiler(device: torch.device) -> None:
    """Find out at the door whether PyTorch can compile for a device here."""
    from torch._inductor import cpp_builder
    from torch.utils._triton import has_triton

    needed = ""
    if device.type == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except Exception:  # of a kind that differs from release to release
            needed = "a C++ compiler (g++ or clang)"
    elif device.type == "cuda" and not has_triton():
        needed = "triton"
    if needed:
        raise ConfigError(
            f"--backend compile: PyTorch needs {needed}, and there is none; install it, or use "
            "another backend"
        )


def _spelling(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of all that decides how a text becomes tokens; empty where that cannot be known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    rules = json.loads(backend.to_str())
    for passing in (
        "truncation",
        "padding",
    ):  # set by every call, and saved as the last one left it
        rules.pop(passing, None)
    content = json.dumps(rules) + repr(tokenizer.model_input_names) + tokenizer.truncation_side
    return hashlib.sha256(content.encode()).hexdigest()


def longest(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Tokens that fit into a model, by its positions and its tokenizer."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet"):
        positions -= config.pad_token_id + 1  # these count positions from behind the padding id
    return int(min(positions, tokenizer.model_max_length))


def hash_weights(model: "PreTrainedModel") -> str:
    """A hash of a model's weights, whatever file they came from."""
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        total.update(weight.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()
