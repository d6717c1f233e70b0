"""The model card that a trained cascade carries."""

from collections.abc import Sequence

import yaml

from cascadebert import __version__
from cascadebert.config import TrainConfig
from cascadebert.data import Examples


def model_card(
    names: Sequence[str], labels: Sequence[str], config: TrainConfig, examples: Examples
) -> str:
    """What the stages are, what they were trained on and how, and what to know before use.

    Args:
        names: folders of the stages.
        labels: label names.
        config: the training.
        examples: the training rows.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["cascadebert", "cascade", "text-classification"],
    }
    recipe = [f"label smoothing {config.label_smoothing:g}"] * bool(config.label_smoothing)
    if config.dev_data:
        recipe.append(f"each stage its best epoch by accuracy on `{config.dev_data}`")
    if config.dar_weight:
        recipe.append(
            f"difficulty-aware regularization (lambda {config.dar_weight:g}, epsilon "
            f"{config.dar_margin:g}, pairs {config.pairing}, difficulty {config.difficulty})"
        )
    if config.distill_weight:
        recipe.append(f"distilled from the last stage (weight {config.distill_weight:g})")
    if config.gatekeeper_weight:
        recipe.append(f"an epoch of Gatekeeper (alpha {config.gatekeeper_weight:g})")
    stages = "\n".join(
        f"- `{name}`: {source}" for name, source in zip(names, config.model, strict=True)
    )
    kind = "pairs of texts" if examples.pairs is not None else "texts"
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# A cascade of {len(names)} complete classifiers

Each folder is a model of its own that `transformers` loads; together they answer as a cascade.

{stages}

Labels: {", ".join(labels)}. Trained on {len(examples)} {kind} of `{config.train_data}`, cut at
{config.max_length} tokens, {", ".join(f"{value:g}" for value in config.epochs)} epochs, batch
{config.batch_size}{"; " if recipe else ""}{"; ".join(recipe)}. `config.yaml` has every option,
`metrics.jsonl` the losses, `environment.json` the command, versions and hardware. Made with
cascadebert {__version__}.

Use:

    cascadebert calibrate --model FOLDER --dev-data HELD_OUT_ROWS
    cascadebert evaluate --model FOLDER --test-data OTHER_ROWS
    cascadebert predict --model FOLDER --data NEW_ROWS --out answers.jsonl

Limits: accuracy and speed hold for rows like those it was calibrated on, and only on the backend that
the policy names. Nothing is known of other languages, topics or lengths until they are measured.
"""
