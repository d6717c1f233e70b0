"""Tasks and options. A task is a template and its label words; the paper's four are here."""

from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """How a labelled text is written, and what its labels are called.

    Attributes:
        template: holds `{text}` once and ends with `{label}`; a space between words belongs to the
            label word (`Sentiment:{label}` with " Positive"), as tokenizers have it.
        labels: the label word of each class, in the order of the class numbers.
        separator: between demonstrations.
    """

    template: str
    labels: tuple[str, ...]
    separator: str = "\n"

    def __post_init__(self) -> None:
        if self.template.count("{text}") != 1 or self.template.count("{label}") != 1:
            raise ConfigError(
                f"template {self.template!r}: must hold {{text}} and {{label}}, each once"
            )
        if not self.template.endswith("{label}") or self.template.endswith("{text}{label}"):
            raise ConfigError(
                f"template {self.template!r}: must end with {{label}}, after some words of its own"
            )
        if len(self.labels) < 2 or not all(label.strip() for label in self.labels):
            raise ConfigError(f"labels {list(self.labels)}: a task needs two label words or more")
        if len({label.strip().lower() for label in self.labels}) < len(self.labels):
            raise ConfigError(
                f"labels {list(self.labels)}: two classes have the same label word, case aside"
            )

    @property
    def frame(self) -> tuple[str, str]:
        """What stands before the text, and between text and label word."""
        before, _, rest = self.template.partition("{text}")
        return before, rest.removesuffix("{label}")


#: The paper's templates, after the authors' code.
TASKS = {
    "sst2": Task("Review: {text}\nSentiment:{label}", (" Negative", " Positive")),
    "agnews": Task(
        "Article: {text}\nAnswer:{label}", (" World", " Sports", " Business", " Technology")
    ),
    "trec": Task(
        "Question: {text}\nAnswer Type:{label}",
        (" Abbreviation", " Entity", " Description", " Person", " Location", " Number"),
    ),
    "emoc": Task("Dialogue: {text}\nEmotion:{label}", (" Others", " Happy", " Sad", " Angry")),
}


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Which prompts are made: demonstrations from one set of rows, texts to label from another."""

    data: str
    """Rows to label: a file, a folder of splits or a hub id."""

    train_data: str | None = None
    """Rows that demonstrations are drawn from."""

    task: str = "sst2"
    """sst2, agnews, trec or emoc: template and label words of the paper."""

    template: str | None = None
    """A template of your own instead, like "Review: {text} Mood:{label}"."""

    labels: tuple[str, ...] = ()
    """Its label words, in the order of the class numbers: --labels good --labels bad."""

    text_column: str = "text"
    """Column of the texts; several are joined, like turn1,turn2,turn3 of EmoContext."""

    label_column: str = "label"
    """Column of the labels: class numbers, or label words."""

    shots: int = 1
    """Demonstrations of each class, in shuffled order."""

    samples: int = 100
    """Texts to label, drawn by the seed; 0 for all."""

    batch_size: int = 8
    """Prompts in one pass."""

    out: Path | None = None
    """Folder for the result and its report; without it the result is only printed."""

    overwrite: bool = False
    """Start anew where a run already lies."""

    def chosen_task(self) -> Task:
        """The task that the options name.

        Raises:
            ConfigError: there is none of that name, or template and labels do not go together.
        """
        if self.template is not None:
            if not self.labels:
                raise ConfigError(
                    "--template: name its label words too, --labels good --labels bad"
                )
            words = tuple(label if label[:1].isspace() else f" {label}" for label in self.labels)
            return Task(self.template.replace("\\n", "\n"), words)
        if self.labels:
            raise ConfigError("--labels: give the --template they belong to")
        if self.task not in TASKS:
            raise ConfigError(f"--task {self.task}: is none of {', '.join(TASKS)}")
        return TASKS[self.task]

    def train_rows(self) -> str:
        """Where demonstrations are drawn from.

        Raises:
            ConfigError: no place is named.
        """
        if self.train_data is None:
            raise ConfigError("--train-data: name the rows that demonstrations are drawn from")
        return self.train_data

    def check(self) -> None:
        """Refuse numbers that are out of range.

        Raises:
            ConfigError: one is.
        """
        for name, value, least in (
            ("shots", self.shots, 1), ("samples", self.samples, 0), ("batch-size", self.batch_size, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"--{name} {value}: must be {least} or more")


@dataclass(frozen=True, kw_only=True)
class ReweightConfig:
    """How the numbers of anchor re-weighting are trained; the paper's setting."""

    train_per_class: int = 4
    """Labelled texts of each class to train on, besides the demonstrations."""

    learning_rate: float = 0.01
    """Of Adam."""

    epochs: int = 10
    """Passes over these texts."""

    train_batch_size: int = 1
    """Prompts in one step."""

    def check(self) -> None:
        """Refuse numbers that are out of range.

        Raises:
            ConfigError: one is.
        """
        for name, value in (
            ("train-per-class", self.train_per_class), ("epochs", self.epochs),
            ("train-batch-size", self.train_batch_size),
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(f"--{name} {value}: must be 1 or more")
        if not self.learning_rate > 0:
            raise ConfigError(f"--learning-rate {self.learning_rate}: must be above 0")
