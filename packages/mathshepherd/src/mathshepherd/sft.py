"""A generator that writes steps with tags: a causal language model fine-tuned on solutions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from octavo.errors import DataError, ModelError
from octavo.models import load_model, load_tokenizer
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import TrainOptions, fit
from torch import Tensor

from mathshepherd.generate import context
from mathshepherd.lora import merged, narrow, with_adapter
from mathshepherd.records import Problem, Solution
from mathshepherd.steps import StepFormat, StepTokens, add_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """A solution's tokens behind its question's.

    Attributes:
        ids: of both, with the end token.
        start: the first of the solution.
    """

    ids: list[int]
    start: int


def open_generator(
    source: str, form: StepFormat, words: bool = False
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A causal language model and its tokenizer, the format's words among its tokens.

    Args:
        source: folder or hub id.
        form: how solutions are written.
        words: add those that are not one token, with new rows in the embeddings.

    Raises:
        ModelError: there is no such model, or a word is not one token.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(source)
    model = load_model(AutoModelForCausalLM, source, dtype=torch.float32)
    if words and add_words(tokenizer, form):
        weight: Any = model.get_input_embeddings().weight
        model.resize_token_embeddings(max(len(tokenizer), weight.shape[0]))
    StepTokens.of(tokenizer, form)
    return model, tokenizer


def encode_solution(
    tokenizer: "PreTrainedTokenizerBase", form: StepFormat, question: str, steps: Sequence[str]
) -> Encoded:
    """Question, steps with tags and the end token.

    Raises:
        DataError: there is no step, or one is blank or holds the tag.
        ModelError: the tokenizer has no end token.
    """
    if not steps:
        raise DataError(f"a solution without steps, of the question {question[:60]!r}")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the model's tokenizer has no end token, and solutions must come to an end"
        )
    text = form.prefix(question, steps)
    begun = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    found: Any = tokenizer(text, add_special_tokens=not begun, return_offsets_mapping=True)
    length = len(form.question(question))
    start = next(n for n, (a, b) in enumerate(found["offset_mapping"]) if a >= length and b > a)
    end = int(str(tokenizer.eos_token_id))
    ids: list[int] = list(found["input_ids"])
    return Encoded(ids if ids[-1] == end else [*ids, end], start)


def encode_all(
    tokenizer: "PreTrainedTokenizerBase",
    form: StepFormat,
    rows: Sequence[tuple[str, Sequence[str]]],
    longest: int,
) -> tuple[list[Encoded], int]:
    """Questions with their steps; those longer than `longest` are left out and counted.

    Raises:
        DataError: none is short enough.
    """
    encoded = [encode_solution(tokenizer, form, question, steps) for question, steps in rows]
    kept = [one for one in encoded if len(one.ids) <= longest]
    if not kept:
        raise DataError(f"none of {len(rows)} solutions has {longest} tokens or fewer")
    return kept, len(encoded) - len(kept)


def collate(pad: int) -> Callable[[list[Encoded]], dict[str, Tensor]]:
    """A function that makes a batch: padded on the right, the loss on the solutions alone."""

    def make(rows: list[Encoded]) -> dict[str, Tensor]:
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), IGNORED)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for n, row in enumerate(rows):
            ids[n, : len(row.ids)] = torch.tensor(row.ids)
            labels[n, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
            mask[n, : len(row.ids)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return make


def finetune(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[tuple[str, Sequence[str]]],
    form: StepFormat,
    run: RunDir,
    options: TrainOptions,
    runtime: Runtime = Runtime(),
    longest: int = 512,
    name: str = "sft",
    lora_rank: int = 0,
    new_words: Sequence[int] = (),
) -> tuple["PreTrainedModel", int]:
    """Train a model to write solutions; resumes a run that was killed.

    Args:
        model: changed in place.
        tokenizer: its own.
        rows: questions, each with the steps of a solution.
        form: how they are written.
        run: for metrics and checkpoints.
        options: the optimisation.
        runtime: seed, device, precision.
        longest: tokens; longer solutions are left out, never cut.
        name: of the training within the run.
        lora_rank: of the adapter that is trained instead of all weights, and merged; 0 for none.
        new_words: tokens that were added, whose embeddings are trained beside an adapter.

    Returns:
        The model in evaluation mode, and how many rows were too long.

    Raises:
        ConfigError: an adapter does not fit the model.
        DataError: a step is blank or holds the tag, or every row is too long.
        ModelError: the training diverged.
    """
    encoded, dropped = encode_all(tokenizer, form, rows, min(longest, context(model)))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    usual = options.batch_size * sum(len(one.ids) - one.start for one in encoded) / len(encoded)
    if lora_rank:
        model = with_adapter(model, lora_rank, new_words)
        narrow(model, runtime.torch_dtype())
    model = fit(
        model, encoded, collate(pad), run, name, options=options, runtime=runtime,  # pyright: ignore
        loss=lambda model, batch: solution_loss(model, batch) / usual,
        lengths=[len(one.ids) for one in encoded],
    )  # fmt: skip
    return merged(model) if lora_rank else model, dropped


def solution_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next token, summed over the solutions' tokens.

    Training divides it by the mean number of such tokens in a batch, so that each counts the same,
    whichever batch, accumulation step or process it is in.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    there = labels != IGNORED
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][there].float(), labels[there], reduction="sum"
    )


def worked(problems: Sequence[Problem], form: StepFormat) -> list[tuple[str, tuple[str, ...]]]:
    """Questions with the steps of their own worked solutions.

    Raises:
        DataError: a problem has none.
    """
    rows = []
    for one in problems:
        steps = form.split(one.solution or "")
        if not steps:
            raise DataError(f"problem {one.id}: has no `solution` to learn from")
        rows.append((one.question, with_answer(steps, one.answer)))
    return rows


def with_answer(
    steps: Sequence[str], answer: str | None, marker: str = "The answer is:"
) -> tuple[str, ...]:
    """The steps, the last one ending in the answer behind the marker, unless it does so already."""
    if answer is None or marker in steps[-1]:
        return tuple(steps)
    return (*steps[:-1], f"{steps[-1]} {marker} {answer}")


def right_solutions(solutions: Sequence[Solution]) -> list[tuple[str, tuple[str, ...]]]:
    """Questions with the steps of solutions that reached the right answer (rejection sampling)."""
    return [(one.question, one.steps) for one in solutions if one.correct and one.finished]
