"""The options of each station; defaults are what works best."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CostKind = Literal["layers", "flops", "parameters"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which columns hold what."""

    text_column: str = "text"
    """Column of the text, or of the first text of a pair."""

    pair_column: str | None = None
    """Column of the second text, for pair tasks."""

    label_column: str = "label"
    """Column of the label, a name or a number."""

    split: str | None = None
    """Split of a folder or a hub id; by default train, validation or test as the command needs."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Which complete models become the stages, and how each is fine-tuned.

    `learning_rate` and `epochs` take one value for all stages or one for each, in their order.
    """

    model: tuple[str, ...]
    """A stage, smallest first: hub id, local folder, or scratch:LAYERSxWIDTH. Repeat it."""

    train_data: str
    """Training rows: a file, a folder of splits or a hub id."""

    out: Path
    """Folder of the run, which is then a cascade for the other commands."""

    learning_rate: tuple[float, ...] = (3e-5,)
    """Peak learning rate; from scratch 1e-3 and more is usual."""

    epochs: tuple[float, ...] = (3.0,)
    """Passes over the training rows."""

    batch_size: int = 32
    """Rows a step and process."""

    max_length: int = 128
    """Tokens after which a text is cut."""

    weight_decay: float = 0.01
    """AdamW's weight decay."""

    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""

    save_every: int = 0
    """Steps between two checkpoints to resume from; 0 for one an epoch."""

    alphabet: Literal["wordpiece", "char", "bpe"] = "wordpiece"
    """Tokens of scratch models."""

    vocabulary: int = 8000
    """Tokens of scratch models, at the most."""

    pretrain_epochs: float = 0.0
    """Passes of masked language modelling that scratch models get first."""

    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """tensorboard, wandb or none."""

    overwrite: bool = False
    """Start anew where a run already lies."""


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """Which cascade is run, and how."""

    model: tuple[str, ...]
    """A folder that `train` made, or fine-tuned models, smallest first. Repeat it."""

    batch_tokens: int = 8192
    """Tokens a batch, padding included."""

    max_length: int | None = None
    """Tokens after which a text is cut; by default what the models were trained with."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What the threshold is chosen for."""

    dev_data: str
    """Calibration rows, none of which may be reported on later."""

    target_speedup: float = 3.0
    """How many times faster than the last stage alone, in the unit of --cost."""

    cost: CostKind = "flops"
    """What a stage's price is counted in: flops, layers (the paper's) or parameters."""

    out: Path | None = None
    """The policy file; policy.json in the cascade's folder by default."""

    overwrite: bool = False
    """Replace a policy file."""
