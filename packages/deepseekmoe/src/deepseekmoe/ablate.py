"""Suites of models that differ in one thing, trained alike and compared on the same held-out windows.

Every cell of a suite lies in a folder of its own once it is trained, so that a killed suite goes on.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from octavo.errors import ConfigError
from octavo.models import save_model
from octavo.rundir import RunDir
from octavo.runtime import Runtime

from deepseekmoe.accounting import count_parameters, training_flops
from deepseekmoe.checkpoints import discard_checkpoints
from deepseekmoe.config import ModelConfig, PretrainConfig
from deepseekmoe.corpus import Tokens
from deepseekmoe.evaluate import evaluate_lm
from deepseekmoe.hub import load
from deepseekmoe.pretrain import make_config, train_model

if TYPE_CHECKING:
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

log = logging.getLogger(__name__)

Suite = Literal["baselines", "granularity", "shared-ratio", "balance", "half-active"]

#: What a cell changes in the base model; experts together are 16 standard FFNs throughout.
SUITES: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "baselines": {  # Table 1 and Table 2
        "dense": {"baseline": "dense"},
        "hash": {"baseline": "hash"},
        "switch": {"baseline": "switch"},
        "gshard": {"baseline": "gshard"},
        "gshard-x1.5": {"baseline": "gshard-x1.5"},
        "dense-x4": {"baseline": "dense-x4"},
        "dense-x16": {"baseline": "dense-x16"},
        "deepseekmoe": {},
    },
    "granularity": {  # Figure 3
        "0 + 16": {"granularity": 1, "shared_experts": 0},
        "1 + 15": {"granularity": 1, "shared_experts": 1},
        "1 + 31": {"granularity": 2, "shared_experts": 1},
        "1 + 63": {"granularity": 4, "shared_experts": 1},
    },
    "shared-ratio": {  # section 4.4
        "0 + 64": {"granularity": 4, "shared_experts": 0},
        "1 + 63": {"granularity": 4, "shared_experts": 1},
        "2 + 62": {"granularity": 4, "shared_experts": 2},
        "4 + 60": {"granularity": 4, "shared_experts": 4},
    },
    "balance": {
        "loss": {"balance": "loss"},
        "bias": {"balance": "bias"},
        "none": {"balance": "none"},
    },
    "half-active": {  # Figure 6
        "gshard": {"baseline": "gshard"},
        "1 + 63, 3 active": {"granularity": 4, "shared_experts": 1, "active_experts": 3},
        "1 + 63, 7 active": {"granularity": 4, "shared_experts": 1},
    },
}


#: Options that decide together: where a suite sets one, the user sets none of them.
TOGETHER = (
    ("baseline", "granularity", "shared_experts", "routed_experts", "active_experts"),
    ("balance", "aux_alpha", "device_alpha", "bias_rate"),
)


@dataclass(frozen=True)
class Cell:
    """A trained model of a suite and what was measured of it.

    Attributes:
        name: of the cell.
        model: in evaluation mode.
        row: loss on held-out windows, parameters, FLOPs, load and speed.
    """

    name: str
    model: "DeepseekMoeForCausalLM"
    row: dict[str, Any]


def train_cells(
    cells: Mapping[str, Mapping[str, Any]],
    base: ModelConfig,
    tokenizer: Any,
    train: Tokens,
    dev: Tokens,
    config: PretrainConfig,
    run: RunDir,
    runtime: Runtime = Runtime(),
) -> list[Cell]:
    """Train every cell on the same windows in the same order, or load what an earlier run trained.

    Args:
        cells: by name, what each changes in `base`.
        base: the model.
        tokenizer: of the tokens.
        train: tokens to train on.
        dev: held-out tokens.
        config: the training.
        run: cells lie in its folder `cells`.
        runtime: seed, device, precision.

    Raises:
        ConfigError: `base` sets what the cells are to differ in.
    """
    _refuse_what_cells_change(cells, base)
    return [
        _train_cell(name, replace(base, **changes), tokenizer, train, dev, config, run, runtime)
        for name, changes in cells.items()
    ]


def cell_folder(run: RunDir, name: str) -> Path:
    """Where a cell of a run lies."""
    return run.path / "cells" / name.replace(" ", "").replace("+", "-").replace(",", "-")


def _refuse_what_cells_change(cells: Mapping[str, Mapping[str, Any]], base: ModelConfig) -> None:
    """Stop where an option of the base model would make cells alike, or their budgets unlike."""
    varied = {key for changes in cells.values() for key in changes}
    for together in TOGETHER:
        if not varied & set(together):
            continue
        for name in together:
            if getattr(base, name) != getattr(ModelConfig(), name):
                option = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{option}: this suite sets it in each of its models; leave it out"
                )


def _train_cell(
    name: str, choice: ModelConfig, tokenizer: Any, train: Tokens, dev: Tokens,
    config: PretrainConfig, run: RunDir, runtime: Runtime,
) -> Cell:  # fmt: skip
    folder = cell_folder(run, name)
    inner = RunDir(folder)
    if not (folder / "row.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shape = make_config(choice, tokenizer, config.length)
        log.info("training %s", name)
        model = train_model(shape, train, config, inner, runtime)
        save_model(folder / "model", model, tokenizer)
        row = {"model": name} | evaluate_lm(model, dev, config.length, config.batch_size)
        row |= _load_row(inner) | _cost_row(shape, config.length)
        inner.write_json("row.json", row)
        discard_checkpoints(inner)
        return Cell(name, model, row)
    model, _ = load(folder / "model", tokenizer=False)
    model.to(runtime.torch_device())  # pyright: ignore[reportArgumentType]
    return Cell(name, model, json.loads((folder / "row.json").read_text(encoding="utf-8")))


def _load_row(run: RunDir) -> dict[str, Any]:
    """Load and speed of the training's last third."""
    lines = [line for line in run.metrics() if "tokens_per_second" in line]
    late = lines[-max(1, len(lines) // 3) :]
    row: dict[str, Any] = {
        "tokens a second": sum(line["tokens_per_second"] for line in lines) / max(1, len(lines))
    }
    violations = [max(line["max_violation"]) for line in late if line.get("max_violation")]
    if violations:
        row["MaxVio"] = sum(violations) / len(violations)
        row["dead experts"] = sum(late[-1]["dead_experts"])
    return row


def _cost_row(shape: Any, length: int) -> dict[str, Any]:
    count = count_parameters(shape)
    return {
        "parameters": count.total,
        "active": count.active,
        "GFLOPs a sequence": training_flops(shape, length) / 1e9,
    }


def mean_rows(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several seeds' tables, numbers averaged place by place; those that are all equal stay."""
    result = []
    for rows in zip(*tables, strict=True):
        mean = dict(rows[0])
        for key, value in rows[0].items():
            values = [row[key] for row in rows]
            if isinstance(value, int | float) and len(set(values)) > 1:
                mean[key] = sum(values) / len(values)
        result.append(mean)
    return result
