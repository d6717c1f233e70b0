"""The options of each station; defaults are what works best."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

CostKind = Literal["layers", "flops", "parameters", "latency"]
Score = Literal["max_probability", "margin", "entropy", "energy", "learned"]
RiskKind = Literal["harm", "error", "disagreement", "gap"]
Method = Literal["ltt", "ucb", "crc", "empirical"]
Backend = Literal["torch", "compile", "onnx", "onnx-int8"]
Difficulty = Literal["folds", "online"]
Rival = Literal["deebert", "joint", "layers"]
Objective = Literal["weighted", "alternating"]


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
class FitConfig:
    """How models are fine-tuned.

    `learning_rate` and `epochs` take one value for all models or one for each, in their order.
    """

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

    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""

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


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """How difficulty is measured out of fold."""

    folds: int = 5
    """Parts of the training rows; each is predicted by a model that did not see it."""

    fold_seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, each of which splits and trains anew. Repeat it."""

    rule: Literal["majority", "any", "all", "votes"] = "majority"
    """A row is hard if wrong in half of the seeds or more, in any, in all; or one level a vote."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FitConfig, FoldConfig):
    """Which complete models become the stages, and how each is fine-tuned."""

    model: tuple[str, ...] = ()
    """A stage, smallest first: hub id, local folder, or scratch:LAYERSxWIDTH. Repeat it."""

    train_data: str
    """Training rows: a file, a folder of splits or a hub id."""

    out: Path
    """Folder of the run, which is then a cascade for the other commands."""

    dev_data: str | None = None
    """Labelled rows on which each stage's best epoch is chosen, by accuracy; the last one without."""

    preset: Literal["none", "paper"] = "none"
    """paper: BERT of 2 and of 12 layers and the authors' settings, for each option at its default;
    name --dev-data for the best epoch on dev, or a warning tells that the last one is kept."""

    dar_weight: float = 0.0
    """Weight of difficulty-aware regularization (lambda) in every stage but the last; 0 for none."""

    dar_margin: float = 0.5
    """Its margin (epsilon)."""

    pairing: Literal["all", "sampled"] = "all"
    """Which pairs of a batch it takes: all, or one harder row for each easier one as the authors."""

    difficulty: Difficulty = "folds"
    """folds: out-of-fold errors of each stage's own recipe; online: errors of the moment."""

    online_from: float = 0.3
    """Share of the steps after which online difficulty begins to count."""

    gatekeeper_weight: float = 0.0
    """Above 0: end each stage but the last with an epoch of Gatekeeper at this alpha."""

    distill_weight: float = 0.0
    """Weight of the last stage's answers against the labels in training the stages before it."""

    distill_temperature: float = 2.0
    """Softening of the answers that are distilled."""

    overwrite: bool = False
    """Start anew where a run already lies."""


#: The settings of the authors' script; five folds and seeds for the difficulty, as the file they name.
PAPER = {
    "model": ("google/bert_uncased_L-2_H-768_A-12", "bert-base-uncased"),
    "learning_rate": (2e-5,),
    "epochs": (5.0,),
    "batch_size": 16,
    "warmup": 0.0,
    "weight_decay": 0.0,
    "dar_weight": 0.5,
    "dar_margin": 0.5,
    "pairing": "sampled",
    "folds": 5,
    "fold_seeds": (0, 1, 2, 3, 4),
}


def with_preset(config: TrainConfig) -> TrainConfig:
    """The configuration with its preset's values wherever an option still has its default."""
    if config.preset == "none":
        return config
    defaults = {field.name: field.default for field in fields(config)}
    fresh = {
        name: value for name, value in PAPER.items() if getattr(config, name) == defaults[name]
    }
    return replace(config, **fresh)


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig(FitConfig, FoldConfig):
    """Which model's errors tell how difficult the training rows are."""

    model: str
    """The small model: hub id, local folder, or scratch:LAYERSxWIDTH."""

    train_data: str
    """Training rows: a file, a folder of splits or a hub id."""

    out: Path
    """Folder of the run; difficulty.jsonl in it has a line a row."""

    overwrite: bool = False
    """Start anew where a run already lies."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(FitConfig):
    """An early-exit rival on one backbone."""

    kind: Rival
    """deebert: fine-tune, freeze, then an exit a layer; joint: all exits at once (BERxiT, PABEE);
    layers: the first --layers of it, fine-tuned (BERT-kL)."""

    model: str
    """The backbone: hub id, local folder, or scratch:LAYERSxWIDTH; a fine-tuned one for deebert."""

    train_data: str
    """Training rows: a file, a folder of splits or a hub id."""

    out: Path
    """Folder of the run."""

    layers: int = 2
    """How many layers of the backbone `layers` keeps."""

    objective: Objective = "weighted"
    """Of joint. weighted: all exits, each by its layer's number (PABEE); alternating: the last layer
    in odd steps and the sum over all exits in even ones (BERxiT)."""

    learn_to_exit: bool = False
    """Train a head in joint that tells how certain each exit is: BERxiT's, for the rule `learned`."""

    exit_epochs: float = 10.0
    """Passes over the rows in which deebert's exits are trained."""

    exit_learning_rate: float = 2e-3
    """Peak learning rate of deebert's exits."""

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

    backend: Backend = "torch"
    """torch, compile (torch.compile), onnx or onnx-int8 (after `cascadebert export`)."""

    allow_partial: bool = False
    """Load checkpoints although weights are missing or unused; they are listed."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What thresholds are chosen for, and how."""

    target_speedup: float | None = None
    """How many times faster than the last stage alone, in the unit of --cost; 3 without a target."""

    min_accuracy: float | None = None
    """Instead: the fastest threshold that is right in this share of the rows, 0 to 1."""

    max_cost: float | None = None
    """Instead: at most so much a row, in the unit of --cost (milliseconds for latency)."""

    max_risk: float | None = None
    """Instead: the fastest threshold whose risk is at most this, with a guarantee."""

    risk: RiskKind = "harm"
    """harm (wrong where the last stage is right), error, disagreement (needs no labels) or gap."""

    method: Method = "ltt"
    """How the risk is shown: ltt or ucb (with confidence), crc (on average) or empirical."""

    delta: float = 0.1
    """Probability that the calibration rows mislead (ltt and ucb)."""

    score: Score = "max_probability"
    """What is compared with the threshold; learned is fitted on half of the rows."""

    temperature: bool = False
    """Fit a temperature a stage, so that the confidence that is reported is calibrated."""

    separate: bool = False
    """A threshold for each stage, where there are three or more."""

    cost: CostKind = "flops"
    """What a stage's price is counted in: flops, layers (the paper's), parameters or latency."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the service listens, batches and sheds load."""

    policy: tuple[Path, ...] = ()
    """Policy files, each an operating point of its file's name; the first is the default. Repeat it."""

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless you say otherwise."""

    port: int = 8000
    """Port to listen on; 0 takes a free one, which the log tells."""

    api_key_file: Path | None = None
    """File with a key that callers must send (Authorization: Bearer KEY)."""

    max_wait: float = 5.0
    """Milliseconds a batch waits to fill."""

    max_queue: int = 4096
    """Texts that may wait at a stage before calls are refused with 429."""

    max_items: int = 256
    """Texts in one call."""

    max_body: int = 1_000_000
    """Bytes of one call."""

    deadline: float = 30.0
    """Seconds after which a text that still waits is refused, unless the call names fewer."""

    shed_at: int = 0
    """Texts waiting at a later stage from which on thresholds are lowered; 0 never."""

    shed_floor: float = 0.5
    """Probability below which a lowered threshold never goes."""

    drain: float = 30.0
    """Seconds that accepted calls get after SIGTERM."""
