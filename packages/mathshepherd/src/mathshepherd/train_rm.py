"""Training reward models: binary cross-entropy at the tags (Eqs. 1 and 2), and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from octavo.errors import DataError
from octavo.rundir import RunDir
from octavo.runtime import Runtime
from octavo.training import TrainOptions, fit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from mathshepherd.config import RewardConfig
from mathshepherd.generate import context, encode
from mathshepherd.lora import merged, narrow, with_adapter
from mathshepherd.records import Solution
from mathshepherd.reward_model import StepRewardModel, pad


@dataclass(frozen=True)
class Target:
    """A solution's tokens, and what is to be learnt at its tags.

    Attributes:
        ids: with tags.
        labels: from 0 to 1 for each tag; NaN where there is none.
    """

    ids: list[int]
    labels: list[float]


def step_targets(solution: Solution, config: RewardConfig) -> list[float]:
    """What a process reward model learns at each step's tag; NaN for nothing.

    Raises:
        DataError: the solution has no labels of this kind.
    """
    labels = solution.labels
    values = None if labels is None else labels.hard if config.labels == "hard" else labels.soft
    if labels is None or values is None:
        raise DataError(
            f"{solution.key}: has no {config.labels} labels; run `mathshepherd annotate`"
        )
    if config.labels == "soft" and labels.soft and None in labels.soft and labels.tried:
        raise DataError(
            f"{solution.key}: some soft labels were not estimated; annotate with --estimation soft"
        )
    found = [float("nan") if one is None else float(one) for one in values]
    if config.until_first_error:
        first = next((n for n, one in enumerate(labels.hard) if one == 0), len(found))
        found = [one if n <= first else float("nan") for n, one in enumerate(found)]
    return found


def outcome_targets(solution: Solution, config: RewardConfig) -> list[float]:
    """What an outcome reward model learns: at the last tag, or at all of them (Cobbe et al. 2021).

    Raises:
        DataError: it is not known whether the solution is right.
    """
    if solution.correct is None:
        raise DataError(f"{solution.key}: `correct` is not known")
    outcome, rest = float(solution.correct), len(solution.steps) - 1
    return [outcome if config.supervise == "all" else float("nan")] * rest + [outcome]


def at_tags(rows: Sequence[Target], tag: int) -> dict[str, Tensor]:
    """A batch padded on the right; each label stands at its tag's own place, NaN everywhere else."""
    ids, mask = pad([row.ids for row in rows])
    labels = torch.full(ids.shape, float("nan"))
    labels[(ids == tag) & mask.bool()] = torch.tensor([x for row in rows for x in row.labels])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tag_loss(
    logits: Float[Tensor, " tags"], labels: Float[Tensor, " tags"], positive_weight: float = 1.0
) -> Float[Tensor, ""]:
    """Binary cross-entropy summed over tags (Eqs. 1 and 2); labels may be shares.

    Args:
        logits: of a good step.
        labels: from 0 to 1.
        positive_weight: how many times a good step counts.
    """
    weight = torch.tensor(positive_weight, dtype=logits.dtype, device=logits.device)
    return binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="sum")


def train_reward(
    reward: StepRewardModel,
    solutions: Sequence[Solution],
    config: RewardConfig,
    run: RunDir,
    options: TrainOptions,
    runtime: Runtime = Runtime(),
    name: str = "reward",
    lora_rank: int = 0,
) -> dict[str, int]:
    """Train a reward model in place; resumes a run that was killed.

    Each labelled tag counts the same, wherever it stands: the sum over a batch is divided by the mean
    number of labelled tags in so many solutions, which is the same on every process.

    Args:
        reward: process or outcome reward model, as its `reading.scope` says.
        solutions: labelled ones.
        config: what is learnt.
        run: for metrics and checkpoints.
        options: the optimisation.
        runtime: seed, device, precision.
        name: of the training within the run.
        lora_rank: of the adapter that is trained instead of all weights, and merged; 0 for none. The
            two verdicts' rows, or a head, are trained beside it.

    Returns:
        Counts: solutions trained on, left out since too long, tags, good tags (sum of labels above one
        half).

    Raises:
        ConfigError: an adapter does not fit the model.
        DataError: labels are missing, or nothing is left to train on.
        ModelError: the training diverged.
    """
    of = step_targets if reward.reading.scope == "steps" else outcome_targets
    form, tokenizer = reward.reading.form, reward.tokenizer
    longest = min(config.max_length, context(reward.model))
    targets, long = [], 0
    for one in solutions:
        target = Target(encode(tokenizer, form.prefix(one.question, one.steps)), of(one, config))
        if len(target.ids) > longest:
            long += 1
        elif target.ids.count(reward.words.tag) != len(one.steps):
            raise DataError(
                f"{one.key}: {len(one.steps)} steps and other tags; is one in the question?"
            )
        elif any(value == value for value in target.labels):
            targets.append(target)
    values = [value for target in targets for value in target.labels if value == value]
    if not values:
        raise DataError(
            f"none of {len(solutions)} solutions can be learnt from ({long} are longer than "
            f"{longest} tokens)"
        )
    if len(set(values)) < 2:
        raise DataError("all labels are the same: there is nothing to tell apart")
    usual = options.batch_size * len(values) / len(targets)

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        where = ~labels.isnan()
        logits = model(batch["input_ids"], batch["attention_mask"], where)
        smooth = config.label_smoothing
        wanted = labels[where] * (1 - smooth) + smooth / 2
        return tag_loss(logits.float(), wanted, config.positive_weight) / usual

    if lora_rank:
        reward.model = with_adapter(reward.model, lora_rank)
        narrow(reward.model, runtime.torch_dtype())
    collate = partial(at_tags, tag=reward.words.tag)
    with reward.as_read():
        fit(
            reward, targets, collate, run, name, options=options, runtime=runtime, loss=loss,  # pyright: ignore
            lengths=[len(target.ids) for target in targets],
        )  # fmt: skip
    if lora_rank:
        reward.model = merged(reward.model)
    good = sum(value > 0.5 for value in values)
    return {"solutions": len(targets), "too long": long, "tags": len(values), "good tags": good}


def as_outcome(reward: StepRewardModel) -> StepRewardModel:
    """The same model, read as an outcome reward model."""
    reward.reading = replace(reward.reading, scope="outcome")
    return reward
