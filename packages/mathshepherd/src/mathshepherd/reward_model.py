"""Reward models: a score in [0, 1] for each step, read at its tag, of any causal language model.

The verdict stands at the tag's own place: the hidden state where the tag is the input gives two logits,
of the words "good" and "bad", and their softmax is the score. The verdict itself is never written into
the input, and no later token is seen. A linear head may take the two words' place.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from octavo.console import counter
from octavo.errors import DataError, ModelError
from octavo.models import load_model, load_tokenizer, save_model
from octavo.rundir import atomic, write_json
from torch import Tensor, nn

from mathshepherd.generate import context, encode
from mathshepherd.records import Solution
from mathshepherd.steps import StepFormat, StepTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Readout = Literal["tokens", "head"]
Scope = Literal["steps", "outcome"]

#: The file that makes a folder of a causal language model one of a reward model.
CARD = "step_reward.json"
HEAD = "step_head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reward model reads, and how.

    Attributes:
        readout: two rows of the output matrix (`tokens`), or a head of its own (`head`).
        scope: whether its scores are of steps, or the last one of the whole solution (an ORM).
        form: how solutions are written for it.
    """

    readout: Readout = "tokens"
    scope: Scope = "steps"
    form: StepFormat = field(default_factory=StepFormat)


class StepRewardModel(nn.Module):
    """A causal language model read at the tags.

    Args:
        model: the language model.
        tokenizer: its own, in which tag and verdicts are one token each.
        reading: what is read.
    """

    _keys_to_ignore_on_save: list[str] | None = (
        None  # Trainer asks where a tied weight is not loaded
    )

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        reading: Reading = Reading(),
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.reading = model, tokenizer, reading
        self.words = StepTokens.of(tokenizer, reading.form)
        self.head: nn.Linear | None = None
        if reading.readout == "head":
            self.head = nn.Linear(model.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            self.head.to(model.device)
        self.exact = self.head is not None or two_rows_tell(model, self.words)
        self.rows: nn.Parameter | None = None

    @classmethod
    def load(
        cls, source: str | Path, *, device: "torch.device | str" = "cpu", dtype: Any = None,
        allow_pickle: bool = False,
    ) -> "StepRewardModel":  # fmt: skip
        """A reward model that `save` wrote, or any causal language model with the default reading.

        Args:
            source: folder or hub id; a run's folder holds it in `model`.
            device: where it computes.
            dtype: of its weights; the checkpoint's own by default.
            allow_pickle: load `pytorch_model.bin` where there is no safetensors file.

        Raises:
            ModelError: there is none, or its tokenizer has no single token for the tag or a verdict.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        folder = model_folder(source)
        reading = Reading()
        if (Path(folder) / CARD).is_file():
            try:
                content = json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))
                form = StepFormat(**content.pop("form"))
                reading = Reading(**content, form=form)
            except (ValueError, TypeError, KeyError) as error:
                raise ModelError(f"{folder}: cannot read its {CARD} ({error})") from None
        tokenizer = load_tokenizer(folder)
        model = load_model(
            AutoModelForCausalLM, folder, allow_pickle=allow_pickle, dtype=dtype or "auto"
        )
        reward = cls(model, tokenizer, reading)
        if reward.head is not None:
            try:
                reward.head.load_state_dict(load_file(Path(folder) / HEAD))
            except (OSError, RuntimeError, SafetensorError) as error:
                first = str(error).splitlines()[0]
                raise ModelError(f"{folder}: cannot read its {HEAD} ({first})") from None
        return reward.to(device).eval()

    def save(self, folder: Path) -> None:
        """Write the model, its tokenizer and what is read; the folder appears whole (rank 0 alone)."""
        from octavo.runtime import is_main
        from safetensors.torch import save_file

        if not is_main():
            return
        with atomic(folder) as temporary:
            save_model(temporary, self.model, self.tokenizer)
            content = asdict(self.reading)
            write_json(temporary / CARD, content)
            if self.head is not None:
                save_file(self.head.state_dict(), temporary / HEAD)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """The weights, those that are frozen beneath an adapter left out.

        Tied ones are told once: safetensors, of which checkpoints are made, hold none twice.
        """
        found = super().state_dict(*args, **options)
        own = list(self.named_parameters(remove_duplicate=False))
        if any(one.requires_grad for _, one in own):
            for name in [name for name, one in own if not one.requires_grad]:
                del found[name]
        seen: set[int] = set()
        for name, weight in list(found.items()):
            if weight.device.type == "meta" or not weight.numel():
                continue  # lies nowhere yet
            if weight.data_ptr() in seen:
                del found[name]
            seen.add(weight.data_ptr())
        return found

    @contextmanager
    def as_read(self) -> Iterator[None]:
        """Within, what is never read of the output matrix is not trained: all but two rows of it.

        They would have no gradient, and an optimiser would still go through all of them. Where the
        matrix is the input's, too, or all logits are read, nothing is different.
        """
        output: Any = self.model.get_output_embeddings()
        weight: Any = getattr(output, "weight", None)
        if weight is None or weight is self.model.get_input_embeddings().weight or not self.exact:
            yield
            return
        unread = [weight] if self.head is None else list(output.parameters())
        trained, words = weight.requires_grad, [self.words.good, self.words.bad]
        for one in unread:
            one.requires_grad_(False)
        if self.head is None:
            self.rows = nn.Parameter(weight[words].float())
        try:
            yield
        finally:
            if self.rows is not None:
                weight.data = weight.data.float()  # an adapter's frozen weights may be narrower
                weight[words] = self.rows.detach()
            self.rows = None
            for one in unread:
                one.requires_grad_(trained)

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Have the language model compute activations twice; what a trainer asks for."""
        self.model.gradient_checkpointing_enable(*args, **options)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    def forward(
        self, input_ids: Int[Tensor, "rows seq"], attention_mask: Int[Tensor, "rows seq"],
        where: Bool[Tensor, "rows seq"],
    ) -> Float[Tensor, " tags"]:  # fmt: skip
        """Logits of "good" against "bad" at chosen places: their sigmoid is the score.

        Only the states at these places are multiplied, and by two rows of the output matrix: neither
        memory nor time grows with the vocabulary.

        Args:
            input_ids: solutions with tags.
            attention_mask: 0 where a row is padded.
            where: the tags to read.

        Returns:
            One logit a tag, row by row.
        """
        if not self.exact:
            logits = self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits[where].float()  # fmt: skip
            return logits[:, self.words.good] - logits[:, self.words.bad]
        states = self.model.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state[where]  # fmt: skip
        if self.head is not None:
            return self.head(states.float()).squeeze(-1)
        return two_rows(self.model, states, self.words, self.rows)

    def step_scores(
        self,
        questions: Sequence[str],
        solutions: Sequence[Sequence[str]],
        *,
        batch_tokens: int = 16384,
        skip_long: bool = False,
    ) -> list[np.ndarray]:
        """Scores of each solution's steps, one pass a solution.

        The longest go first, in batches of about equal length; the same text is read once.

        Args:
            questions: one for each solution.
            solutions: steps without tags.
            batch_tokens: tokens in one batch, padding included.
            skip_long: give none for a solution that is longer than the model's context.

        Returns:
            For each solution an array [steps] of float32 in [0, 1]. Of an outcome reward model the
            last one is the solution's score.

        Raises:
            DataError: a solution is blank, holds the tag, or is longer than the model's context.
            ModelError: a score is NaN.
        """
        texts = [
            self.reading.form.prefix(question, steps)
            for question, steps in zip(questions, solutions, strict=True)
        ]
        for number, steps in enumerate(solutions):
            if not steps:
                raise DataError(f"solution {number}: has no steps to score")
        numbers = {text: n for n, text in enumerate(dict.fromkeys(texts))}
        rows = [encode(self.tokenizer, text) for text in numbers]
        counts = dict(zip(texts, map(len, solutions), strict=True))
        found = score_rows(
            rows, lambda batch: self.score_tokens([rows[n] for n in batch]), batch_tokens,
            context(self.model) if skip_long else None,
        )  # fmt: skip
        for text, n in numbers.items():
            if len(found[n]) != counts[text] and not (skip_long and not len(found[n])):
                raise ModelError(
                    f"{counts[text]} steps and {len(found[n])} tags: the tokenizer joins "
                    f"{self.reading.form.tag!r} with its neighbours; name another --tag"
                )
        return [found[numbers[text]] for text in texts]

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Scores at the tags of ready token sequences.

        Raises:
            DataError: one is longer than the model's context.
        """
        ids, mask = fitting(self.model, rows)
        where = (ids == self.words.tag) & mask.bool()
        scores = torch.sigmoid(self(ids, mask, where))
        return list(scores.split(where.sum(-1).tolist()))


def model_folder(source: str | Path) -> str:
    """The folder of a model: the one named, or `model` in a run's."""
    inside = Path(source) / "model"
    return str(inside if inside.is_dir() else source)


def pad(rows: Sequence[Sequence[int]], device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """Token rows as one batch padded on the right, and its mask."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
    return ids.to(device), mask.to(device)


def fitting(model: "PreTrainedModel", rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token rows as a batch where the model is, and its mask.

    Raises:
        DataError: a row is longer than the model's context.
    """
    if (widest := max(map(len, rows))) > context(model):
        raise DataError(
            f"a solution of {widest} tokens does not fit the model's context "
            f"({context(model)}); nothing is cut: leave it out"
        )
    return pad(rows, model.device)


def score_rows(
    rows: Sequence[Sequence[int]],
    score: Callable[[list[int]], Sequence[Tensor]],
    batch_tokens: int = 16384,
    longest: int | None = None,
) -> list[np.ndarray]:
    """Scores of token rows, the longest first, in batches of about equal length.

    Args:
        rows: token ids.
        score: of the rows of these numbers.
        batch_tokens: tokens in one batch, padding included.
        longest: tokens of a row that is scored; None for any.

    Returns:
        An array of float32 for each row, empty for one that is longer.

    Raises:
        ModelError: a score is NaN.
    """
    found: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)
    kept = [n for n, row in enumerate(rows) if longest is None or len(row) <= longest]
    with torch.inference_mode(), counter("scoring", len(kept), "solutions") as advance:
        for part in token_batches([len(rows[n]) for n in kept], batch_tokens):
            batch = [kept[k] for k in part]
            for n, one in zip(batch, score(batch), strict=True):
                found[n] = one.float().cpu().numpy()
            advance(len(batch))
    if not all(np.isfinite(one).all() for one in found):
        raise ModelError("a score is NaN: the model is broken, or its precision too low")
    return found


def token_batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of rows, longest first, as many together as stay below `most` tokens with padding."""
    batch: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def two_rows(
    model: Any, states: Float[Tensor, "tags width"], words: StepTokens,
    rows: Float[Tensor, "2 width"] | None = None,
) -> Float[Tensor, " tags"]:  # fmt: skip
    """The difference of two logits from the last hidden states, by two rows of the output matrix."""
    logits = _two_logits(model, states, words, rows)
    return logits[:, 0] - logits[:, 1]


def _two_logits(
    model: Any, states: Float[Tensor, "tags width"], words: StepTokens,
    rows: Float[Tensor, "2 width"] | None = None,
) -> Float[Tensor, "tags 2"]:  # fmt: skip
    output = model.get_output_embeddings()
    used: Tensor = output.weight[[words.good, words.bad]] if rows is None else rows
    logits = states.float() @ used.float().T
    if getattr(output, "bias", None) is not None:
        logits = logits + output.bias[[words.good, words.bad]].float()
    if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.inference_mode()
def two_rows_tell(model: Any, words: StepTokens) -> bool:
    """Whether two rows of the output matrix give the model's own logits (some scale them afterwards).

    They are compared in proportion to their size: a new model's are all small.
    """
    ids = torch.tensor([[words.good, words.tag, words.bad]], device=model.device)
    training = model.training
    model.eval()
    try:
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        own = model(input_ids=ids, use_cache=False).logits[0, :, [words.good, words.bad]].float()
        short = _two_logits(model, states, words)
    except (AttributeError, TypeError):
        return False
    finally:
        model.train(training)
    return bool((own - short).abs().max() <= 0.02 * own.abs().max())


def score_solutions(
    scorer: Any, solutions: Sequence[Solution], batch_tokens: int = 16384, skip_long: bool = False
) -> list[np.ndarray]:
    """Scores of solutions' steps; none for one without steps.

    Args:
        scorer: with `step_scores`, as `StepRewardModel` has it.
        solutions: to be scored.
        batch_tokens: tokens in one batch, padding included.
        skip_long: give none either for one that is longer than the model's context.
    """
    written = [one for one in solutions if one.steps]
    questions, steps = [one.question for one in written], [one.steps for one in written]
    found = scorer.step_scores(questions, steps, batch_tokens=batch_tokens, skip_long=skip_long)
    scores = iter(found)
    return [next(scores) if one.steps else np.empty(0, np.float32) for one in solutions]
