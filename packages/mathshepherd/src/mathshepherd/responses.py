"""Responses of a policy to questions, and the scores of their steps on the very tokens sampled."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from octavo.errors import ModelError
from octavo.runtime import world_size
from torch import Tensor

from mathshepherd.answers import equivalent
from mathshepherd.config import Sampling
from mathshepherd.generate import Tokens, continue_tokens, encode, end_tokens
from mathshepherd.records import Problem
from mathshepherd.reward_model import StepRewardModel, token_batches
from mathshepherd.sample import Grader, answer_in
from mathshepherd.steps import StepFormat, StepTokens


@dataclass
class Response:
    """What was sampled for a question, and what was found out about it.

    Attributes:
        prompt: its tokens.
        ids: the response's, with the end token where there is one.
        ends: the token each step ends with.
        scores: of the steps.
        right: whether the answer is; None where that is not known.
        answered: whether it has one, came to its end, and has a tag behind each step.
        old: log-probability of each token under the policy that sampled it.
        reference: the same under the reference policy.
        values: the critic's, before each token.
        finished: whether there is an end token.
        behind: the critic's value of the state behind the last token, where that is asked for.
    """

    prompt: list[int]
    ids: list[int]
    ends: list[int]
    scores: list[float]
    right: bool | None
    answered: bool
    old: Tensor = field(default_factory=lambda: torch.empty(0))
    reference: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    finished: bool = True
    behind: float = 0.0


@dataclass
class Responder:
    """Samples responses of a policy, reads their answers and scores their steps.

    Attributes:
        policy: a causal language model, in evaluation mode.
        tokenizer: its own.
        reward: scores the steps; without one each score is 0.
        form: how responses are written.
        max_new_tokens: tokens in the longest response.
        rows: responses sampled at once.
        grade: tells a right answer.
        autocast: the precision of the forward passes.
    """

    policy: Any
    tokenizer: Any
    reward: StepRewardModel | None
    form: StepFormat
    max_new_tokens: int = 512
    rows: int = 256
    grade: Grader = equivalent
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        reward = self.reward
        self.same_tokens = reward is not None and _same_tokens(self.tokenizer, reward, self.form)
        self.ends = end_tokens(self.policy, self.tokenizer)

    @torch.no_grad()
    def __call__(
        self, problems: Sequence[Problem], count: int, temperature: float,
        seeds: Sequence[Sequence[int]],
    ) -> list[Response]:  # fmt: skip
        """Responses of the policy with the scores of their steps, those of a question together."""
        sampling = Sampling(temperature=temperature, max_new_tokens=self.max_new_tokens)
        prompts = [encode(self.tokenizer, self.form.question(one.question)) for one in problems]
        made: list[list[Tokens]] = []
        size = max(1, self.rows // count)
        with self.autocast():
            for start in range(0, len(prompts), size):
                part = slice(start, start + size)
                made += continue_tokens(
                    self.policy, prompts[part], seeds[part], sampling, self.ends
                )
        found = [
            self._read(problem, prompt, tokens)
            for problem, prompt, some in zip(problems, prompts, made, strict=True) for tokens in some
        ]  # fmt: skip
        self._score([one for one in problems for _ in range(count)], found)
        return found

    def _read(self, problem: Problem, prompt: list[int], tokens: Tokens) -> Response:
        text = self.tokenizer.decode(tokens.text_ids)
        predicted = answer_in(text, self.form) if tokens.finished else None
        right = None if problem.answer is None else self.grade(predicted, problem.answer)
        ends = step_ends(self.tokenizer, self.form, tokens.text_ids)
        whole = True
        if not self.form.plain:  # what stands behind the last tag is never scored
            behind = tokens.text_ids[ends[-1] + 1 if ends else 0 :]
            whole = not self.tokenizer.decode(behind).strip()
        answered = predicted is not None and whole
        return Response(prompt, tokens.ids, ends, [], right, answered, finished=tokens.finished)

    def _score(self, problems: Sequence[Problem], responses: Sequence[Response]) -> None:
        """Put the reward model's scores to the responses' steps."""
        reward = self.reward
        some = [
            (problem, one) for problem, one in zip(problems, responses, strict=True) if one.ends
        ]
        if reward is None or not some:
            for _, one in some:
                one.scores = [0.0] * len(one.ends)
        elif self.same_tokens:
            rows = [one.prompt + one.ids[: one.ends[-1] + 1] for _, one in some]
            for batch in token_batches([len(row) for row in rows], 16384):
                with self.autocast():
                    scores = reward.score_tokens([rows[n] for n in batch])
                for n, values in zip(batch, scores, strict=True):
                    one = some[n][1]
                    if not values.isfinite().all():
                        raise ModelError("the reward model gave a score that is NaN: it is broken")
                    texts = self._steps(one, self.form.tag)
                    # a blank step is worth nothing
                    one.scores = [
                        value if text else 0.0
                        for value, text in zip(values.tolist(), texts, strict=True)
                    ]
        else:
            self._score_texts(reward, some)

    def _score_texts(
        self, reward: StepRewardModel, some: Sequence[tuple[Problem, Response]]
    ) -> None:
        """The same for a reward model with another tokenizer or format: steps by their texts."""
        pieces = [self._steps(one, self.form.tag, reward.reading.form.tag) for _, one in some]
        whole = [n for n, steps in enumerate(pieces) if any(steps)]
        scores = reward.step_scores(
            [some[n][0].question for n in whole],
            [[step for step in pieces[n] if step] for n in whole],
        )
        for (_, one), steps in zip(some, pieces, strict=True):
            one.scores = [0.0] * len(steps)
        for n, values in zip(whole, scores, strict=True):
            given = iter(values.tolist())
            some[n][1].scores = [next(given) if step else 0.0 for step in pieces[n]]

    def _steps(self, response: Response, *tags: str) -> list[str]:
        """The texts of a response's steps, without tags."""
        starts = [0, *(end + 1 for end in response.ends)]
        texts = [self.tokenizer.decode(response.ids[a:b]) for a, b in pairwise(starts)]
        for tag in tags:
            texts = [text.replace(tag, "") for text in texts]
        return [text.strip() for text in texts]


def step_ends(tokenizer: Any, form: StepFormat, ids: Sequence[int]) -> list[int]:
    """The token that each step of a response ends with.

    With tags these are the tags. Without, a step ends before the joiner, found by the characters that
    tokens add to the text.
    """
    if not form.plain:
        tag = StepTokens.of(tokenizer, form).tag
        return [n for n, one in enumerate(ids) if one == tag]
    text = tokenizer.decode(list(ids))
    ends, place = [], 0
    for piece in text.split(form.joiner):
        place += len(piece)
        if piece.strip():
            ends.append(bisect_left(
                range(len(ids)), place, key=lambda n: len(tokenizer.decode(list(ids[: n + 1])))
            ))  # fmt: skip
        place += len(form.joiner)
    return list(dict.fromkeys(ends))


def _same_tokens(tokenizer: Any, reward: StepRewardModel, form: StepFormat) -> bool:
    """Whether a reward model reads the policy's tokens as they are."""
    return (
        not form.plain
        and reward.reading.form == form
        and tokenizer.get_vocab() == reward.tokenizer.get_vocab()
    )


def gathered(made: Sequence[Response], group: int, count: int | None = None) -> list[Response]:
    """The responses of all processes, in the order one process alone has them."""
    if world_size() == 1:
        return list(made)
    parts: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(parts, list(made))
    total = count or sum(len(part) // group for part in parts)
    return [
        one for n in range(total)
        for one in parts[n % world_size()][n // world_size() * group : (n // world_size() + 1) * group]
    ]  # fmt: skip
