"""The model card that is saved with a model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from octavo.report import markdown_table

from formbert.config import FitOptions, ModelOptions, ObjectiveOptions


def card(
    about: Mapping[str, Any],
    model: ModelOptions,
    objective: ObjectiveOptions,
    options: FitOptions,
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """A card in the hub's format: data, options, what was measured, limits, and how to use it.

    Args:
        about: facts of the training.
        model: what the model is.
        objective: what was learnt.
        options: the optimisation.
        rows: accuracy on the development data.
    """
    facts = [{"of": name, "value": str(value)} for name, value in about.items()]
    settings = [
        {"option": "--" + name.replace("_", "-"), "value": _shown(value)}
        for part in (model, objective, options) for name, value in asdict(part).items()
    ]  # fmt: skip
    return f"""---
language: zh
library_name: formbert
tags:
- word-sense-disambiguation
- word-formation
---

# A FormBERT model ({"cross-encoder" if model.arch == "cross" else "bi-encoder"})

Chooses the sense of a Chinese word in a text, among the senses of any inventory.

```python
from formbert import Disambiguator

wsd = Disambiguator.from_pretrained("FOLDER", inventory="senses.tsv")
wsd("他去银行存款。", word="存款")
```

{markdown_table(facts)}

## Accuracy on the development data

By these rows the best epoch was chosen and probabilities were calibrated: on other texts accuracy is
lower.

{markdown_table(rows)}

## Options

{markdown_table(settings)}

## Limits

It is as good as its inventory: a sense that is not listed is never answered. Accuracy over all instances
counts words of one sense, which need no model; compare systems on polysemous words alone.
"""


def _shown(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list | tuple) else str(value)
