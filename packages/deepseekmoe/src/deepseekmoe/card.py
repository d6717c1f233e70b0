"""The model card that a trained or tuned model carries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from octavo.report import markdown_table
from octavo.rundir import write_text

from deepseekmoe import __version__
from deepseekmoe.accounting import count_parameters
from deepseekmoe.architecture import DeepseekMoeConfig


def save_card(
    folder: Path, config: DeepseekMoeConfig, made: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write README.md into a model's folder.

    Args:
        folder: of the model, within the run that made it.
        config: of the model.
        made: a sentence on data and training.
        rows: what was measured.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseekmoe", "moe"],
    }
    count = count_parameters(config)
    experts = (
        f"{config.n_shared_experts or 0} shared and {config.n_routed_experts or 0} routed experts of "
        f"width {config.moe_intermediate_size} a layer, {config.num_experts_per_tok or 0} routed ones a "
        "token"
    )
    write_text(
        folder / "README.md",
        f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# A DeepSeekMoE language model

{config.num_hidden_layers} layers of width {config.hidden_size}, {experts}: {count.total:,} parameters,
{count.active:,} of them active a token. Sequences of up to {config.max_position_embeddings} tokens.

{made} In the folder above `config.yaml` has every option, `metrics.jsonl` losses and load,
`environment.json` the command, versions and hardware. Made with deepseekmoe {__version__}.

{markdown_table(rows) if rows else "Nothing was measured on held-out rows."}

Use:

    deepseekmoe generate {folder.name} "A beginning"
    deepseekmoe evaluate {folder.name} --data TEXTS

The folder has the layout of deepseek-moe-16b-base; in Python, `deepseekmoe.load` reads it, as do the
Auto classes after `deepseekmoe.register()`.

Limits: it continues texts like those it was trained on, true or not; nothing is known of others until
they are measured.
""",
    )
