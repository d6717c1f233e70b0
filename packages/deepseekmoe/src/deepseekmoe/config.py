"""The options of each station; defaults are what works best."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Schedule = Literal["step", "cosine", "constant"]
Balance = Literal["loss", "bias", "none"]


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which texts, and how they are cut."""

    data: str
    """Texts: a .txt file or a folder of them (each one domain and one document), a file of rows (jsonl,
    csv, parquet) or a hub id."""

    text_column: str = "text"
    """Column of the text, in files with columns."""

    split: str | None = None
    """Split of a hub id, or of a folder of splits."""

    dev_share: float = 0.1
    """Share of each domain that is held out: the end of a .txt file, or every so-manieth row. `train`
    learns the rest; `evaluate`, `trace` and `analyze` read this share alone, and with 0 everything."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained; begin from a preset, then change numbers."""

    preset: str = "tiny"
    """tiny, 2b, 16b or 145b: the paper's shapes."""

    model_config: Path | None = None
    """JSON file of any keys of DeepseekMoeConfig, such as a config.json; they stand in for the
    preset's, and options here stand in for both."""

    baseline: str = "deepseekmoe"
    """Feed-forward layers at the paper's budgets: deepseekmoe, dense, dense-x4, dense-x16, hash,
    switch, gshard, gshard-x1.2 or gshard-x1.5."""

    layers: int | None = None
    """Number of layers, where it differs from the preset's."""

    width: int | None = None
    """Hidden size, where it differs; the FFN becomes 2 times as wide in tiny, 8/3 times else."""

    shared_experts: int | None = None
    """Shared experts, where it differs."""

    routed_experts: int | None = None
    """Routed experts, where it differs."""

    active_experts: int | None = None
    """Routed experts a token (K'), where it differs."""

    granularity: int | None = None
    """Pieces that each of 16 standard experts is cut into (m): 16m experts in all, 2m active, the
    shared ones among them."""

    balance: Balance = "loss"
    """How load is kept even: the paper's loss, a selection bias (auxiliary-loss-free), or not at all."""

    aux_alpha: float | None = None
    """Factor of the expert-level balance loss, where it differs from the preset's."""

    device_alpha: float | None = None
    """Factor of the device-level balance loss, where it differs."""

    devices: int | None = None
    """Groups of experts that the device-level loss balances."""

    bias_rate: float = 1e-3
    """Step of the selection bias, with --balance bias."""

    backend: str = "auto"
    """How experts are computed; `deepseekmoe doctor` lists the ways."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training has: batches, AdamW with betas 0.9 and 0.95, checkpoints, processes."""

    batch_size: int = 16
    """Sequences a step and process."""

    accumulate: int = 1
    """Batches whose gradients are added up before an update."""

    learning_rate: float = 3e-3
    """Peak learning rate."""

    weight_decay: float = 0.1
    """AdamW's decay of matrices; norms have none."""

    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""

    save_every: int = 200
    """Updates between two checkpoints to resume from; 0 for none."""

    log_every: int = 20
    """Updates between two lines of metrics.jsonl."""

    checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their states."""

    expert_parallel: int = 1
    """Processes (of torchrun) that share a layer's routed experts; tokens travel to them."""

    fsdp: bool = False
    """Slice weights, gradients and optimizer over all processes (of torchrun)."""


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig(TrainingConfig):
    """A training of so many updates, with its schedule."""

    steps: int = 600
    """Updates."""

    schedule: Schedule = "step"
    """step (times 0.316 at 80 % and 90 %, the paper's), cosine or constant, behind the warm-up."""

    warmup_steps: int = 50
    """Updates in which the learning rate rises."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(OptimizeConfig):
    """Where a pre-training goes, and what it reads."""

    out: Path
    """Folder of the run; the model is saved in its folder `model`."""

    tokenizer: str | None = None
    """Folder or hub id of a tokenizer; by default a byte-level BPE is trained on the texts."""

    vocabulary: int = 1024
    """Tokens of a BPE that is trained."""

    length: int = 128
    """Tokens of a sequence."""

    keep_every: int = 0
    """Updates between two models that are kept, in folders `model-STEP` of the run; 0 for none."""

    overwrite: bool = False
    """Start anew where a run already lies."""


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Which chats a model is tuned on, and how; the rate and its schedule are the paper's."""

    data: str
    """Chats: a file or hub id, of rows with `messages` [{role, content}] or `prompt` and `response`."""

    out: Path
    """Folder of the run; the model is saved in its folder `model`, a LoRA adapter in `adapter`."""

    split: str | None = None
    """Split of a hub id, or of a folder of splits."""

    epochs: float = 8.0
    """Passes over the chats."""

    length: int | None = None
    """Tokens of a window; by default what the model was made for, 4096 at the most."""

    lora_rank: int = 0
    """Train a LoRA adapter of this rank on attention and experts, and nothing else; 0 for none."""

    experts: Path | None = None
    """Train only the experts that this file of `esft-select` names."""

    batch_size: int = 8
    """Windows a step and process."""

    learning_rate: float = 1e-5
    """Constant learning rate."""

    overwrite: bool = False
    """Start anew where a run already lies."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How held-out text is cut."""

    length: int | None = None
    """Tokens of a window; by default what the model was made for, 512 at the most."""

    batch_size: int = 16
    """Windows at a time."""
