"""What can be set: the model, its training, how it answers.

With `--preset paper` the forward pass and the loss are the authors' code's to the last digit; batches
hold whole instances, and the best epoch is that with most polysemous words right, not the best pair F1.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from octavo.errors import ConfigError

Arch = Literal["cross", "bi"]
Fusion = Literal["token", "agreement", "pooled_add", "pooled_mlp", "bilinear", "matrix", "none"]
Source = Literal["auto", "annotation", "lexicon", "gloss", "predicted", "soft"]
Signal = Literal["formation", "pos"]
Marking = Literal["hash", "quote", "mask", "special", "none"]
Objective = Literal["pair", "listwise", "in-batch", "listnet", "listmle"]
Engine = Literal["torch", "onnx", "onnx-int8"]
Preset = Literal["best", "paper", "glossbert", "bem", "ltrs"]
T = TypeVar("T")

FUSIONS = ("token", "agreement", "pooled_add", "pooled_mlp", "bilinear", "matrix")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What the model is."""

    arch: Arch = "cross"
    """cross (context and gloss read together) or bi (apart, with glosses that can be cached)."""

    fusion: tuple[Fusion, ...] = ("token", "agreement")
    """How formations enter: token, agreement, pooled_add (the paper's), pooled_mlp, bilinear, matrix;
    several may be given; none, by itself, is plain GlossBERT or BEM."""

    formation_source: Source = "auto"
    """Where a sense's formation comes from: its annotation, the word's entry in a lexicon, a prediction
    from the gloss, one from the context (predicted: the likeliest; soft: all by their probability), or
    auto, the first of these that there is."""

    signal: Signal = "formation"
    """formation, or the parts of speech in its place, as a control."""

    predictor: Literal["span", "mean", "none"] = "span"
    """The formation from the context: from the word's own states (span), from the mean of all embeddings
    (mean, the paper's), or not at all."""

    marking: Marking = "hash"
    """How the word is marked in its text."""

    gloss_pos: bool = False
    """Write a sense's part of speech before its gloss."""

    morphemes: bool = False
    """Write what the morphemes mean behind the gloss."""

    max_length: int = 128
    """Tokens at most; a longer text is cut to a window around the word."""

    similarity: Literal["cosine", "dot"] = "cosine"
    """Of the bi-encoder's two vectors."""

    temperature: float = 0.05
    """Cosines are divided by it."""

    dropout: float = 0.1
    """Of pooled states."""

    authors: bool = False
    """Compute exactly what the authors' code computes: padded to --max-length, formations as annotated
    in training and predicted ever after, the predictor taught on every row."""

    def __post_init__(self) -> None:
        if self.fusion == ("none",):  # a command line cannot write an empty list
            object.__setattr__(self, "fusion", ())


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is learnt."""

    objective: Objective = "listwise"
    """pair (each sense right or wrong), listwise (one of the word's), in-batch (one of the batch's, for
    bi), listnet or listmle (the order that the senses' likeness to the right one gives)."""

    formation_weight: float = 0.5
    """Weight of the formation predictor's loss (the paper's lambda)."""

    rank_weight: float = 0.0
    """Weight of a ListNet loss beside the objective."""

    teacher: str = "ngrams"
    """Whose likeness of glosses listnet and listmle follow: ngrams (of characters), or a folder or hub
    id of a sentence encoder."""

    balanced: bool = False
    """Weigh instances so that a word's senses count alike."""

    gloss_noise: float = 0.0
    """Random glosses added to an instance's own, on average."""

    annotation_drop: float = 0.3
    """Share of annotated formations that are hidden in training, to be predicted."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How it is learnt."""

    learning_rate: float = 3e-5
    """Peak learning rate of the encoder."""

    formation_learning_rate: float = 4e-4
    """Peak learning rate of all that deals with formations."""

    epochs: float = 5.0
    """Passes over the training data; the best on the development data is kept."""

    batch_size: int = 32
    """Instances a step and process."""

    weight_decay: float = 0.01
    """AdamW's."""

    warmup: float = 0.06
    """Share of the updates in which the learning rate rises."""

    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where else the losses go."""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How instances are answered."""

    batch_tokens: int = 0
    """Tokens a batch, padding included; 0 for what is fast: 1,024 on a CPU, 16,384 elsewhere."""

    top_k: int = 0
    """Candidates told, 0 for all."""

    abstain_below: float = 0.0
    """Mark answers less probable than this as abstained."""


PRESETS: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "arch": "cross", "fusion": ("pooled_add",), "formation_source": "predicted",
        "predictor": "mean", "marking": "hash", "authors": True, "objective": "pair",
        "annotation_drop": 0.0, "learning_rate": 5e-5, "formation_learning_rate": 4e-4,
        "epochs": 5.0, "batch_size": 32, "weight_decay": 0.0, "warmup": 0.0,
    },
    "glossbert": {
        "arch": "cross", "fusion": (), "predictor": "none", "marking": "quote", "objective": "pair",
        "formation_weight": 0.0, "learning_rate": 2e-5, "epochs": 6.0, "batch_size": 64,
    },
    "bem": {
        "arch": "bi", "fusion": (), "predictor": "none", "marking": "none", "similarity": "dot",
        "objective": "listwise", "formation_weight": 0.0, "learning_rate": 1e-5, "epochs": 20.0,
    },
    "ltrs": {
        "arch": "bi", "fusion": (), "predictor": "none", "marking": "mask",
        "objective": "listnet", "formation_weight": 0.0, "learning_rate": 5e-5, "epochs": 20.0,
        "batch_size": 64,
    },
}  # fmt: skip


def with_preset(options: T, preset: str) -> T:
    """Options with a preset's values, where the user left the default.

    Raises:
        ConfigError: a value given contradicts what the preset stands for; how long and how fast it
            learns is the user's to say.
    """
    changes = {}
    for field in fields(options):  # pyright: ignore[reportArgumentType]
        if field.name not in PRESETS[preset]:
            continue
        wanted, given = PRESETS[preset][field.name], getattr(options, field.name)
        if given != field.default and given != wanted and isinstance(options, FitOptions):
            continue
        if given != field.default and given != wanted:
            name = field.name.replace("_", "-")
            raise ConfigError(f"--preset {preset} sets --{name} {wanted}, and {given} was given")
        changes[field.name] = wanted
    return replace(options, **changes)  # pyright: ignore[reportArgumentType]


def check(model: ModelOptions, objective: ObjectiveOptions) -> None:
    """Refuse what cannot be, or would do nothing.

    Raises:
        ConfigError: an option is out of range or contradicts another.
    """
    for wrong, what in (
        (len(set(model.fusion)) < len(model.fusion), "--fusion names one twice"),
        ("none" in model.fusion, "--fusion none goes with no other"),
        (model.max_length < 16, f"--max-length {model.max_length}: must be 16 or more"),
        (model.temperature <= 0, f"--temperature {model.temperature}: must be above 0"),
        (not 0 <= model.dropout < 1, f"--dropout {model.dropout}: must be from 0 up to 1"),
        (objective.formation_weight < 0, "--formation-weight must be 0 or more"),
        (objective.rank_weight < 0, "--rank-weight must be 0 or more"),
        (objective.gloss_noise < 0, "--gloss-noise must be 0 or more"),
        (not 0 <= objective.annotation_drop <= 1, "--annotation-drop must be from 0 to 1"),
        (
            model.predictor == "none" and objective.formation_weight > 0 and bool(model.fusion),
            "--predictor none has no loss to weigh: set --formation-weight 0",
        ),
        (
            model.predictor == "none"
            and ("agreement" in model.fusion or model.formation_source in ("predicted", "soft")),
            "--predictor none: agreement and predicted formations need one",
        ),
        (
            model.arch == "bi" and model.formation_source in ("predicted", "soft"),
            f"--formation-source {model.formation_source}: a bi-encoder reads glosses without a "
            "context; use annotation, lexicon, gloss or auto",
        ),
        (
            objective.objective == "in-batch" and model.arch == "cross",
            "--objective in-batch: only a bi-encoder meets a batch's other glosses",
        ),
        (
            objective.balanced and objective.objective not in ("listwise", "in-batch"),
            "--balanced weighs listwise and in-batch losses; it does nothing here",
        ),
        (
            objective.gloss_noise > 0 and objective.objective == "in-batch",
            "--gloss-noise: in-batch candidates are other words' glosses already",
        ),
        (
            objective.teacher != "ngrams" and not objective.rank_weight
            and objective.objective not in ("listnet", "listmle"),
            "--teacher: nothing follows it; choose listnet, listmle or a --rank-weight",
        ),
        (
            model.formation_source in ("predicted", "soft") and not objective.formation_weight,
            "--formation-weight 0: nothing teaches the predictor that the formations come from",
        ),
        (
            model.authors and (model.formation_source != "predicted" or model.marking != "hash"),
            "--authors: the authors' code predicts formations and marks words by #",
        ),
        (
            model.authors and (model.arch != "cross" or model.fusion != ("pooled_add",)
                               or model.predictor != "mean" or model.signal != "formation"),
            "--authors: the authors' code is cross, pooled_add, with the predictor mean",
        ),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(what)


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """A trained model, an inventory, and what helps them."""

    inventory: str
    """Senses: a file (tsv, csv, jsonl, json, parquet), or `mini`, the bundled teaching lexicon."""

    formation_source: Source | None = None
    """Where a sense's formation comes from, if not as in training."""

    formation_lexicon: str | None = None
    """File of words and formations, for senses without an annotation."""

    formation_predictor: str | None = None
    """Folder or hub id of a formation predictor, for words that are in no lexicon."""

    cache: str | None = None
    """Folder in which a bi-encoder's glosses are kept."""

    engine: Engine = "torch"
    """What runs the model; the others need `formbert export` first."""

    second: str | None = None
    """Folder or hub id of a slower model, asked where the first is unsure."""

    margin: float = 0.3
    """Unsure: the two best candidates' probabilities differ by less."""


def check_answers(system: SystemOptions, answer: AnswerOptions) -> None:
    """Refuse what cannot be.

    Raises:
        ConfigError: an option is out of range.
    """
    for wrong, what in (
        (not 0 <= system.margin <= 1, f"--margin {system.margin}: must be from 0 to 1"),
        (answer.batch_tokens < 0, f"--batch-tokens {answer.batch_tokens}: must be 0 or more"),
        (answer.top_k < 0, f"--top-k {answer.top_k}: must be 0 or more"),
        (
            not 0 <= answer.abstain_below <= 1,
            f"--abstain-below {answer.abstain_below}: must be from 0 to 1",
        ),
    ):
        if wrong:
            raise ConfigError(what)
