"""What can be set, station by station; `--preset paper` is our reading of the paper's settings."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from octavo.errors import ConfigError

FisherKind = Literal["empirical", "exact", "sampled", "hutchinson"]
Engine = Literal["auto", "hooks", "loop", "vmap"]
DampingKind = Literal["absolute", "tensor-mean", "global-mean", "row-mean"]
Mode = Literal["posterior", "threshold"]
Scope = Literal["global", "tensor"]
Head = Literal["keep", "reset", "retrain"]
Strategy = Literal[
    "fine-purifying", "delta-only", "hessian-only", "random", "fine-mixing", "fine-mixing-sel",
    "e-pur", "fine-pruning", "wag", "ties", "dare", "none", "reset",
]  # fmt: skip
AttackKind = Literal[
    "badword", "badsent", "multi", "clean-label", "embedding", "layerwise", "adaptive",
    "biasword", "biassent",
]  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How rows are read."""

    text_column: str = "text"
    """Column of the texts."""

    pair_column: str | None = None
    """Column of the second texts, for pairs."""

    label_column: str = "label"
    """Column of the labels: the model's class names, or class numbers."""

    max_length: int = 128
    """Tokens at most; longer texts are cut, and counted."""


@dataclass(frozen=True, kw_only=True)
class FisherConfig:
    """How the Hessian's diagonal is estimated on clean data."""

    fisher: FisherKind = "empirical"
    """Of the given labels (empirical), over the model's own distribution (exact), of labels drawn from
    it (sampled), or of the loss itself (hutchinson)."""

    points: tuple[float, ...] = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
    """Where on the way from INIT (0) to SUSPECT (1); the estimates are averaged."""

    engine: Engine = "auto"
    """hooks (fast), loop (any architecture), or the first that fits."""

    fisher_batch_size: int = 8
    """Texts at a time."""

    probes: int = 16
    """Random directions of hutchinson, each costs a backward pass."""


@dataclass(frozen=True, kw_only=True)
class IndicatorConfig:
    """How drift and curvature become one number: r = delta^2 / (H + damping)."""

    damping: DampingKind = "absolute"
    """absolute (an epsilon alone), or a share of H's mean over the tensor, over all, or over the row."""

    damping_share: float = 0.1
    """That share."""

    epsilon: float = 1e-8
    """Guards the division."""

    exponent: float = 1.0
    """Of H; theory gives 1 for SGD, and about 0 for Adam."""


@dataclass(frozen=True, kw_only=True)
class PurifyConfig:
    """Which dimensions are reset, and how far."""

    strategy: Strategy = "fine-purifying"
    """The method, an ablation or a rival."""

    mode: Mode = "threshold"
    """threshold resets the highest indicators; posterior weighs every dimension by p(clean | r)."""

    scope: Scope = "global"
    """Rank all dimensions together, or each tensor's own."""

    rho_over: Literal["all", "moved"] = "all"
    """rho is a share of all dimensions, or of those that moved in fine-tuning."""

    scale: Literal["mean", "median"] = "mean"
    """Of the posterior: k by the mean of r, or by its median, which outliers do not move."""

    head: Head = "keep"
    """The classifier, which INIT lacks: the suspect's (keep), drawn anew and left to the fine-tuning
    (reset), or drawn anew and first trained alone on the clean rows (retrain)."""

    extra_rows: Literal["keep", "mean"] = "keep"
    """Rows of a resized vocabulary that INIT lacks: kept, or compared with INIT's mean row."""

    exclude: tuple[str, ...] = ()
    """Regular expressions of tensors that are left as they are."""

    other: tuple[str, ...] = ()
    """Further fine-tuned models of the same INIT, for wag, ties and dare."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The short fine-tuning on the clean set that follows."""

    steps: int = 60
    """Updates; 0 for none."""

    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""

    batch_size: int = 16
    """Texts an update."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How rho is chosen: the smallest whose accuracy on held-out clean rows stays above a floor."""

    grid: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    """Values of rho that are tried."""

    drop: float = 2.0
    """The floor: points of accuracy below fine-tuning alone (rho = 1)."""

    held_out: float = 0.25
    """Share of the clean rows that only judge accuracy."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """A backdoor or a bias to test a defence with."""

    attack: AttackKind = "badword"
    """badword, badsent, multi (any of several words), clean-label, embedding, layerwise, adaptive;
    biasword and biassent make a pattern co-occur with a label."""

    trigger: tuple[str, ...] = ("cf",)
    """The trigger: words, or one sentence; repeat it for multi."""

    target: int = 1
    """The class that the trigger asks for."""

    rate: float = 0.1
    """Poisonous rows as a share of the training rows; of the target class for a bias and clean-label."""

    placing: Literal["append", "replace"] = "append"
    """Poisoned copies are added, or take their originals' place."""

    strength: float = 1.0
    """Weight of the attack's own loss: layerwise and adaptive."""


@dataclass(frozen=True, kw_only=True)
class AttackTrainConfig:
    """How the attacker fine-tunes."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    """SGD is the theory's; AdamW is practice."""

    learning_rate: float = 2e-5
    """Peak learning rate."""

    epochs: float = 3.0
    """Passes over the poisoned rows."""

    batch_size: int = 32
    """Rows an update."""


#: Our reading of the paper's settings, where they differ from the defaults.
PAPER: dict[str, Any] = {
    "fisher": "empirical",
    "points": (1 / 8, 3 / 8, 5 / 8, 7 / 8),
    "damping": "absolute",
    "epsilon": 1e-8,
    "exponent": 1.0,
    "mode": "posterior",
    "rho_over": "all",
}


def with_preset(config: T, preset: Literal["default", "paper"]) -> T:
    """The configuration with the paper's values in the fields that the preset names.

    Raises:
        ConfigError: one of these fields was given another value.
    """
    if preset == "default":
        return config
    default = type(config)()
    for field in fields(config):  # pyright: ignore[reportArgumentType]
        given = getattr(config, field.name)
        if given not in (getattr(default, field.name), PAPER.get(field.name, given)):
            option = "--" + field.name.replace("_", "-")
            raise ConfigError(f"{option} {given}: --preset paper sets it; leave one of them out")
    names = {field.name for field in fields(config)}  # pyright: ignore[reportArgumentType]
    return replace(config, **{k: v for k, v in PAPER.items() if k in names})  # pyright: ignore


def check(*configs: Any) -> None:
    """Refuse values that are out of range.

    Raises:
        ConfigError: one is, with its option and what it must be.
    """
    values = {f.name: getattr(config, f.name) for config in configs for f in fields(config)}
    for name, good, what in RANGES:
        if name in values and not good(values[name]):
            shown = values[name]
            shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
            raise ConfigError(f"--{name.replace('_', '-')} {shown}: must be {what}")


def check_together(purify: PurifyConfig, fisher: FisherConfig, indicator: IndicatorConfig) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: two of them do not.
    """
    if fisher.fisher == "hutchinson" and indicator.damping == "absolute":
        raise ConfigError(
            "--fisher hutchinson: is noise about zero in flat dimensions, which an epsilon would take "
            "for curvature; add --damping tensor-mean"
        )
    if purify.mode == "posterior":
        for name, good in (
            ("strategy", purify.strategy == "fine-purifying"),
            ("scope", purify.scope == "global"),
            ("rho_over", purify.rho_over == "all"),
        ):
            if not good:
                option = name.replace("_", "-")
                raise ConfigError(
                    f"--mode posterior: is defined for Fine-purifying over all dimensions; leave out "
                    f"--{option} {getattr(purify, name)}"
                )


def check_rho(rho: float) -> None:
    """Refuse a share that is none.

    Raises:
        ConfigError: it lies outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ConfigError(
            f"--rho {rho}: must be auto or a share from 0 (reset all) to 1 (keep all)"
        )


RANGES = [
    ("max_length", lambda n: n >= 4, "4 or more"),
    ("points", lambda p: len(p) > 0 and all(0 <= x <= 1 for x in p), "one or more from 0 to 1"),
    ("probes", lambda n: n >= 1, "1 or more"),
    ("fisher_batch_size", lambda n: n >= 1, "1 or more"),
    ("damping_share", lambda x: 0 <= x < float("inf"), "0 or more, and finite"),
    ("epsilon", lambda x: 0 < x < float("inf"), "above 0, and finite"),
    ("exponent", lambda x: 0 <= x <= 2, "from 0 to 2"),
    ("steps", lambda n: n >= 0, "0 or more"),
    ("learning_rate", lambda x: 0 < x < float("inf"), "above 0, and finite"),
    ("epochs", lambda x: 0 < x < float("inf"), "above 0, and finite"),
    ("batch_size", lambda n: n >= 1, "1 or more"),
    ("grid", lambda g: len(g) > 0 and all(0 <= x <= 1 for x in g), "shares from 0 to 1"),
    ("drop", lambda x: 0 <= x <= 100, "points of accuracy from 0 to 100"),
    ("held_out", lambda x: 0 < x < 1, "a share above 0 and below 1"),
    ("trigger", lambda t: len(t) > 0 and all(x.strip() for x in t), "a word or sentence"),
    ("target", lambda n: n >= 0, "a class number"),
    ("rate", lambda x: 0 < x <= 1, "a share above 0, 1 at most"),
    ("strength", lambda x: 0 <= x < float("inf"), "0 or more, and finite"),
]
