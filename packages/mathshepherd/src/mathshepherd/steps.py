"""One place that splits solutions into steps, joins them and puts tags behind them."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import ConfigError, DataError, ModelError
from octavo.rundir import write_json
from octavo.runtime import is_main

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUMBERED = re.compile(r"^[ \t]*Step\s+\d+\s*:", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class StepFormat:
    r"""How a solution is written: question, steps, and a tag behind each step.

    The defaults are the released data's: "... how many? Step 1: ... ки\nStep 2: ... ки".
    """

    prompt: str = "{question}"
    """How a question is put; a chat model's template is written here."""

    tag: str = "ки"
    """Behind each step; where the reward is read."""

    good: str = "+"
    """The verdict on a good step; one token."""

    bad: str = "-"
    """The verdict on a bad step; one token."""

    joiner: str = "\n"
    """Between steps."""

    numbered: bool = True
    """Put "Step 1: " before a step that has no number."""

    plain: bool = False
    """The generator itself writes no tags: its steps end where the joiner stands."""

    def __post_init__(self) -> None:
        if self.prompt.count("{question}") != 1:
            raise ConfigError(f"--prompt {self.prompt!r}: must hold {{question}} once")
        if not self.tag.strip() or self.tag != self.tag.strip():
            raise ConfigError(f"--tag {self.tag!r}: must be a word without blanks around it")
        if self.tag in self.prompt:
            raise ConfigError(f"--prompt {self.prompt!r}: holds the tag {self.tag!r}")
        if self.good == self.bad:
            raise ConfigError(f"--good and --bad are the same ({self.good!r})")
        if not self.joiner:
            raise ConfigError("--joiner: must not be empty")

    def question(self, question: str) -> str:
        """The text that a solution continues.

        Raises:
            DataError: it holds the tag.
        """
        if self.tag in question:
            raise DataError(f"a question holds the tag {self.tag!r}: {question[:60]!r}")
        return self.prompt.replace("{question}", question.strip()).rstrip(" ")

    def prefix(self, question: str, steps: Sequence[str] = ()) -> str:
        """Question and steps with a tag behind each: what a reward model reads.

        Args:
            question: without the prompt.
            steps: of the solution; none of them blank.

        Raises:
            DataError: a step is blank or holds the tag, or the question holds it.
        """
        text = self.question(question)
        if not steps:
            return text
        numbered = [f"{step} {self.tag}" for step in self.numbered_steps(steps)]
        return text + ("" if text[-1:].isspace() else " ") + self.joiner.join(numbered)

    def to_continue(self, question: str, steps: Sequence[str] = ()) -> str:
        """What a generator continues: as `prefix`, without tags where it writes none.

        Raises:
            DataError: as `prefix`.
        """
        if not (self.plain and steps):
            return self.prefix(question, steps)
        text = self.question(question)
        lines = self.joiner.join(self.numbered_steps(steps))
        return text + ("" if text[-1:].isspace() else " ") + lines + self.joiner

    def numbered_steps(self, steps: Sequence[str]) -> list[str]:
        """The steps, each with its number before it where that is wanted and it has none.

        Raises:
            DataError: a step is blank or holds the tag.
        """
        for number, step in enumerate(steps, 1):
            if not step.strip():
                raise DataError(f"step {number} of {len(steps)} is blank")
            if self.tag in step:
                raise DataError(f"step {number} holds the tag {self.tag!r}: {step[:60]!r}")
        return [
            step.strip() if not self.numbered or _NUMBERED.match(step.strip())
            else f"Step {number}: {step.strip()}"
            for number, step in enumerate(steps, 1)
        ]  # fmt: skip

    def split(self, text: str) -> tuple[str, ...]:
        """The steps of a solution: between tags, before the next number, or line by line.

        Text behind the last tag is a step too. Blank ones are left out.
        """
        if self.tag in text:
            pieces = text.split(self.tag)
        elif _NUMBERED.search(text):
            starts = [0, *(match.start() for match in _NUMBERED.finditer(text)), len(text)]
            pieces = [text[a:b] for a, b in pairwise(starts)]
        else:
            pieces = text.split(self.joiner)
        return tuple(piece.strip() for piece in pieces if piece.strip())


#: The file beside a generator's weights that tells how it writes solutions.
FORMAT_FILE = "step_format.json"


def saved_format(source: str, given: StepFormat) -> StepFormat:
    """The format given, or, where that is the default, the one saved beside a model.

    Raises:
        ModelError: the file beside the model is damaged.
    """
    file = Path(source) / FORMAT_FILE
    if given != StepFormat() or not file.is_file():
        return given
    try:
        return StepFormat(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from None


def save_format(folder: Path, form: StepFormat) -> None:
    """Write a format beside a model's weights (rank 0 alone)."""
    if is_main():
        write_json(folder / FORMAT_FILE, asdict(form))


@dataclass(frozen=True)
class StepTokens:
    """The ids of a format's words for one tokenizer.

    Attributes:
        tag: behind each step.
        good: verdict.
        bad: verdict.
    """

    tag: int
    good: int
    bad: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", form: StepFormat) -> "StepTokens":
        """Look the words up, each behind another word as in a text.

        Raises:
            ModelError: one is not a single token, or two are the same.
        """
        ids = {}
        for name in ("tag", "good", "bad"):
            word = getattr(form, name)
            before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"]
                             for text in ("1", f"1 {word}"))  # fmt: skip
            ids[name] = whole[len(before) :]
            if whole[: len(before)] != before or len(ids[name]) != 1:
                raise ModelError(
                    f"--{name} {word!r}: is {len(ids[name])} tokens for this model, and must be one; "
                    "name another word, or let `mathshepherd sft --add-words` add it"
                )
            if ids[name] == [tokenizer.unk_token_id]:
                raise ModelError(f"--{name} {word!r}: this model does not know it")
        if len({one[0] for one in ids.values()}) < 3:
            raise ModelError(f"{form.tag!r}, {form.good!r} and {form.bad!r} are not three tokens")
        return cls(**{name: one[0] for name, one in ids.items()})


def add_words(tokenizer: "PreTrainedTokenizerBase", form: StepFormat) -> int:
    """Give a tokenizer those of the format's words that are not one token; returns how many.

    The model's embeddings must then be resized. The blank before such a word belongs to it.
    """
    from tokenizers import AddedToken

    new = []
    for word in (form.tag, form.good, form.bad):
        before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"]
                         for text in ("1", f"1 {word}"))  # fmt: skip
        if len(whole) != len(before) + 1 or whole[-1] == tokenizer.unk_token_id:
            new.append(AddedToken(word, lstrip=True, normalized=False))
    return tokenizer.add_tokens(new)
