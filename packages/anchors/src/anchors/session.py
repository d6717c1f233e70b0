"""What a command works on: a model, and rows as prompts for it; and where its results go."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from octavo.console import Outcome
from octavo.errors import DataError
from octavo.models import load_model, load_tokenizer
from octavo.rundir import RunDir, options_of, write_text
from octavo.runtime import Runtime

from anchors.cache import beginning, prefill
from anchors.calibrate import calibrations
from anchors.config import PromptOptions
from anchors.data import Drawn, Made, draw
from anchors.evaluate import Predictions, predict
from anchors.prompts import Prompt
from anchors.report import result_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tables = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Session:
    """A model, and rows as prompts for it."""

    source: str
    options: PromptOptions
    runtime: Runtime
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    drawn: Drawn
    prompts: list[Prompt]
    about: dict[str, Any]
    run: RunDir | None

    @property
    def labels(self) -> list[int]:
        """The true class of each prompt."""
        return self.drawn.labels

    def prompts_of(self, drawn: Drawn, rows: Any = None) -> list[Prompt]:
        """Prompts of other rows, or with other demonstrations, for the same model."""
        return drawn.prompts(self.tokenizer, longest(self.model), rows)

    def predict(self, prompts: Sequence[Prompt], **how: Any) -> Predictions:
        """The model's predictions, in batches of the options' size."""
        return predict(self.model, prompts, self.options.batch_size, **how)

    def vanilla(self) -> Predictions:
        """Predictions of the prompts as they are; their demonstrations are run once."""
        return self.predict(self.prompts, cache=prefill(self.model, beginning(self.prompts)))

    def rivals(self, vanilla: Predictions, more_shots: int) -> dict[str, Predictions | str]:
        """The prompts as they are, with more demonstrations (0 for none), and calibrated.

        Where the rows or the model do not do for more demonstrations, the reason stands instead.
        """
        shots, seed = self.options.shots, self.runtime.seed
        found: dict[str, Predictions | str] = {f"vanilla, {shots} shot{'s' * (shots > 1)}": vanilla}
        if more_shots:
            try:
                shown = [(one.text, one.label) for one in self.drawn.examples(more_shots, seed)]
                longer = self.prompts_of(replace(self.drawn, shown=shown))
                more = self.predict(longer, cache=prefill(self.model, beginning(longer)))
            except DataError as error:
                more = f"left out: {error}"
            found[f"vanilla, {more_shots} shots"] = more
        return found | calibrations(
            self.model, self.tokenizer, self.drawn, vanilla, longest(self.model), seed,
            self.options.batch_size,
        )  # fmt: skip

    def told(
        self, tables: Tables, save: Callable[[Path], None] | None = None, page: str = "report.html"
    ) -> Outcome:
        """The outcome; with --out also its folder: tables, report, and what else is to be saved.

        Args:
            tables: what is shown.
            save: writes more into the folder.
            page: what to open in it.
        """
        if self.run is None:
            return Outcome(tables, note="" if page == "report.html" else f"--out writes {page}")
        if save:
            save(self.run.path)
        result = {"about": self.about | {"data": self.options.data}, "tables": tables}
        self.run.write_json("result.json", result)
        result_report([result]).save(self.run.path)
        return Outcome(tables, note=f"To read: {self.run.path / page}")

    def write_predictions(self, file: Path, found: Predictions) -> None:
        """One line for each text: its label, the prediction and the probability of each label word."""
        names = [word.strip() for word in self.drawn.task.labels]
        lines = [
            json.dumps(
                {"text": row.text, "label": names[row.label], "predicted": names[kind],
                 "probabilities": dict(zip(names, np.exp(scores).round(6).tolist(), strict=True))},
                ensure_ascii=False,
            )
            for row, kind, scores in zip(self.drawn.rows, found.classes, found.scores, strict=True)
        ]  # fmt: skip
        write_text(file, "".join(f"{line}\n" for line in lines))


def longest(model: "PreTrainedModel") -> int:
    """Tokens that a model takes."""
    return getattr(model.config, "max_position_embeddings", None) or 10**9


@contextmanager
def ready(
    command: str, source: str, options: PromptOptions, runtime: Runtime, choice: dict[str, Any],
    made: Made | None = None,
) -> Iterator[Session]:  # fmt: skip
    """Open the run's folder, load a model onto its device, and draw its prompts.

    Args:
        command: what is run.
        source: folder or hub id of a causal language model.
        options: task, rows and sizes.
        runtime: device, precision, seed.
        choice: the command's own options.
        made: task and demonstrations of a saved cache or adapter, to use instead of the options'.

    Raises:
        OctavoError: something of it is wrong, or a finished run lies in the folder.
    """
    from transformers import AutoModelForCausalLM

    options.check()
    about = {"command": command, "model": source} | choice
    with ExitStack() as stack:
        run = None
        if options.out is not None:
            given = options_of(options, runtime, about)
            run = stack.enter_context(RunDir.open(options.out, given, options.overwrite))
        drawn = draw(options, runtime.seed, made)
        device = runtime.start()
        tokenizer = load_tokenizer(source)
        model = load_model(AutoModelForCausalLM, source, dtype=runtime.torch_dtype()).to(device)  # pyright: ignore
        prompts = drawn.prompts(tokenizer, longest(model))
        yield Session(source, options, runtime, model, tokenizer, drawn, prompts, about, run)
