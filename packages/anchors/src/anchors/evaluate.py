"""What a model answers, and how much of it an intervention leaves: accuracy and loyalties."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from octavo.console import progress
from octavo.errors import ConfigError, DataError, ModelError
from torch import Tensor

from anchors.attention import frozen
from anchors.cache import PromptCache, sliding_windows
from anchors.prompts import Batch, Prompt, batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at the target of each prompt.

    Attributes:
        scores: log-probabilities of the label words, among themselves: [prompts, classes].
        top: ids of the five likeliest tokens of the whole vocabulary: [prompts, 5].
    """

    scores: Float[np.ndarray, "prompts classes"]
    top: Int[np.ndarray, "prompts five"]

    @property
    def classes(self) -> Int[np.ndarray, " prompts"]:
        """The likeliest class of each prompt."""
        return self.scores.argmax(-1)

    def accuracy(self, labels: Sequence[int]) -> float:
        """Share of prompts whose likeliest class is the right one."""
        return float((self.classes == np.asarray(labels)).mean())


def alone(batch: Batch) -> AbstractContextManager[None]:
    """No intervention."""
    return nullcontext()


def predict(
    model: "PreTrainedModel",
    prompts: Sequence[Prompt],
    batch_size: int = 8,
    around: Callable[[Batch], AbstractContextManager[None]] = alone,
    cache: PromptCache | None = None,
) -> Predictions:
    """Predict the class of every prompt.

    Args:
        model: any causal language model.
        prompts: of equally many classes.
        batch_size: prompts in one pass.
        around: an intervention that each batch is run in.
        cache: of the demonstrations, whole or compressed; each prompt's own are then not read, and only
            what follows them is run.

    Raises:
        ConfigError: both an intervention and a cache are given.
        DataError: a prompt does not begin with the tokens that the cache was made of.
        ModelError: a score is NaN or infinite, as half precision makes it.
    """
    scores: dict[int, np.ndarray] = {}
    top: dict[int, np.ndarray] = {}
    alike = False
    if cache is not None:
        if around is not alone:
            raise ConfigError(
                "an intervention is made for whole prompts: give it or a cache, not both"
            )
        if any(prompt.input_ids[: prompt.query] != cache.ids for prompt in prompts):
            raise DataError(
                "a prompt does not begin with the tokens that the cache was made of: its demonstrations "
                "are others, or the tokenizer joins the last separator with the text"
            )
        prompts, around = [prompt.tail() for prompt in prompts], cache.windowed(model)
        end = cache.start + max(len(prompt) for prompt in prompts)
        alike = any(window is not None and window < end for window in sliding_windows(model))
    parts = batches(prompts, batch_size, device=model.device, alike=alike)
    for numbers, batch in progress(parts, "predicting"):
        inputs = batch.inputs() | {"use_cache": False} if cache is None else cache.inputs(batch)
        answers = torch.tensor([prompt.answers for prompt in batch.prompts], device=model.device)
        with frozen(model), around(batch), torch.no_grad():
            logits = target_logits(model, inputs).float()
        if not logits.isfinite().all():
            raise ModelError(
                f"logits became NaN or infinite in {model.dtype}; use --dtype float32 or bfloat16"
            )
        chosen = logits.gather(1, answers).log_softmax(-1).cpu().numpy()
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices.cpu().numpy()
        scores |= dict(zip(numbers, chosen, strict=True))
        top |= dict(zip(numbers, best, strict=True))
    order = range(len(prompts))
    return Predictions(np.stack([scores[n] for n in order]), np.stack([top[n] for n in order]))


def target_logits(model: "PreTrainedModel", inputs: dict[str, Any]) -> Tensor:
    """Logits of each row's last token: [batch, vocabulary]; others are left out where it can."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs = inputs | {"logits_to_keep": 1}
    return model(**inputs).logits[:, -1]


def label_loyalty(before: Predictions, after: Predictions) -> Float[np.ndarray, " prompts"]:
    """1 for each prompt whose likeliest class stayed what it was, else 0 (section 2.2)."""
    return (before.classes == after.classes).astype(float)


def word_loyalty(before: Predictions, after: Predictions) -> Float[np.ndarray, " prompts"]:
    """Jaccard overlap of the five likeliest tokens of each prompt (section 2.2)."""
    pairs = zip(before.top, after.top, strict=True)
    return np.array([len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs])
