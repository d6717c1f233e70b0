"""Rivals of re-weighting: what a prompt makes a model answer before it has read a text is taken off.

Contextual calibration asks with texts that say nothing (Zhao et al. 2021), domain-context calibration
with words of the domain in random order (Fei et al. 2023), batch calibration takes the mean answer over
the texts themselves (Zhou et al. 2023). No label is used by any of them.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax, logsumexp

from anchors.data import Drawn, Example
from anchors.evaluate import Predictions, predict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Texts that say nothing, as published.
CONTENT_FREE = ("N/A", "[MASK]", "")

#: Texts of random words, and as many as published.
RANDOM_TEXTS = 20


def calibrated(predictions: Predictions, prior: Float[np.ndarray, " classes"]) -> Predictions:
    """Divide the probabilities of label words by a prior, given as its logarithm; normalise again."""
    scores = log_softmax(predictions.scores.astype(float) - prior, axis=-1)
    return Predictions(scores, predictions.top)


def log_mean_probability(predictions: Predictions) -> Float[np.ndarray, " classes"]:
    """The logarithm of each class's mean probability: the prior that batch calibration takes off."""
    scores = predictions.scores.astype(float)
    return logsumexp(scores, axis=0) - np.log(len(scores))


def random_texts(texts: Sequence[str], seed: int, count: int = RANDOM_TEXTS) -> list[str]:
    """Words of some texts in random order, each as long as the texts are on average."""
    words = [word for text in texts for word in text.split()]
    length = max(1, round(len(words) / len(texts)))
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=length)) for _ in range(count)]


def calibrations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    drawn: Drawn,
    predictions: Predictions,
    longest: int,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, Predictions]:
    """Predictions after each of the three calibrations.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        drawn: the demonstrations, and rows left to take words of the domain from (the demonstrations'
            own where none are left).
        predictions: before.
        longest: tokens that the model takes.
        seed: of the random words.
        batch_size: prompts in one pass.
    """
    domain = [row.text for row in drawn.rest] or [text for text, _ in drawn.shown]
    asked = {
        "contextual calibration": CONTENT_FREE,
        "domain calibration": random_texts(domain, seed),
    }
    found = {}
    for name, texts in asked.items():
        prompts = drawn.prompts(tokenizer, longest, [Example(text, 0) for text in texts])
        prior = log_mean_probability(predict(model, prompts, batch_size))
        found[name] = calibrated(predictions, prior)
    return found | {"batch calibration": calibrated(predictions, log_mean_probability(predictions))}
