"""How alike glosses are, as a teacher has it: LTRS learns the order of senses from that.

Computed once an inventory, never in a batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from octavo.runtime import Runtime


def gloss_vectors(glosses: Sequence[str], teacher: str, runtime: Runtime = Runtime()) -> Any:
    """Vectors of length one, as rows of a (sparse) matrix; their products are cosines.

    Args:
        glosses: texts.
        teacher: `ngrams` (of one and two characters, weighed by rarity), or a folder or hub id of an
            encoder, whose states are averaged.
        runtime: where the encoder runs.

    Raises:
        ModelError: the encoder cannot be had.
    """
    if teacher == "ngrams":
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(analyzer="char", ngram_range=(1, 2)).fit_transform(glosses)
    import torch
    from octavo.models import load_model, load_tokenizer
    from transformers import AutoModel

    from formbert.encode import by_tokens

    tokenizer = load_tokenizer(teacher)
    model = load_model(AutoModel, teacher, new=["pooler"], unused=[r"cls\.", "head", "lm_"])
    model = model.to(runtime.torch_device()).eval()  # pyright: ignore
    vectors = np.empty((len(glosses), model.config.hidden_size), np.float32)
    for batch in by_tokens([len(gloss) + 2 for gloss in glosses], 16_384):
        rows = tokenizer(
            [glosses[at] for at in batch], padding=True, truncation=True, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            states = model(**rows).last_hidden_state
        mask = rows["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors[batch] = torch.nn.functional.normalize(mean, dim=1).float().cpu().numpy()
    return vectors


def likeness(vectors: Any, first: Sequence[int], second: Sequence[int]) -> np.ndarray:
    """Cosines of pairs of rows, -1 to 1."""
    rows, others = vectors[list(first)], vectors[list(second)]
    product = rows.multiply(others) if hasattr(rows, "multiply") else rows * others
    return np.asarray(product.sum(axis=1), dtype=np.float32).ravel()
