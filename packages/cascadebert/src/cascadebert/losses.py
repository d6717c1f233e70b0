"""What a stage is trained with beside cross-entropy, as functions of tensors.

Difficulty-aware regularization asks that confidence rises where items get easier; Gatekeeper and
distillation are options of later work.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from cascadebert.config import Objective

Pairing = Literal["all", "sampled"]


def confidence(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """The largest softmax probability, which the regularization orders."""
    return logits.softmax(dim=-1).amax(dim=-1)


def dar_loss(
    sure: Float[Tensor, " batch"],
    difficulty: Tensor,
    margin: float = 0.5,
    pairing: Pairing = "all",
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Difficulty-aware regularization: mean over pairs of max(0, -g (c_i - c_j) + margin).

    g is 1 where item i is easier than j and -1 where it is harder; equally difficult items are no
    pair. With two classes a confidence lies in [0.5, 1], so that a margin of 0.5 is never met and
    the loss is linear.

    Args:
        sure: confidence c of the small model, [batch], with gradients.
        difficulty: levels, larger is harder, [batch] of any number type.
        margin: the paper's epsilon.
        pairing: every pair, or for each easier item one harder item of the batch at random, with
            replacement, as the authors' code does.
        generator: of the sampling; needed for a run that can be repeated.

    Returns:
        A scalar; zero, with a gradient, where the batch holds no pair.
    """
    easier = difficulty[:, None] < difficulty[None, :]  # row easier than column
    if pairing == "sampled":
        rows = easier.any(dim=1).nonzero()[:, 0]
        weights = easier[rows].double().cpu()
        drawn = torch.multinomial(weights, 1, True, generator=generator) if len(rows) else rows
        gaps = sure[rows] - sure[drawn.reshape(-1).to(sure.device)]
    else:
        gaps = (sure[:, None] - sure[None, :])[easier]
    if gaps.numel() == 0:
        return 0.0 * sure.sum()
    return (margin - gaps).clamp_min(0).mean()


def online_difficulty(
    logits: Float[Tensor, "batch classes"], labels: Tensor
) -> Int[Tensor, " batch"]:
    """1 where the model is wrong at present and 0 where it is right, without gradients."""
    return (logits.detach().argmax(dim=-1) != labels).long()


def gatekeeper_loss(
    logits: Float[Tensor, "batch classes"], labels: Tensor, alpha: float = 0.5
) -> Float[Tensor, ""]:
    """Cross-entropy where the model is right, flat probabilities where it is wrong.

    alpha times the cross-entropy of the rightly answered items plus 1 - alpha times the divergence
    KL(p || uniform) of the others, over the batch's size: our reading of Rabanser et al. 2025.

    Args:
        logits: of a small model that is already fine-tuned.
        labels: the right classes, [batch].
        alpha: weight of the first part; smaller gives up more accuracy for a better order.
    """
    right = logits.detach().argmax(dim=-1) == labels
    logs = logits.log_softmax(dim=-1)
    uniform = torch.log(torch.tensor(float(logits.shape[-1]), device=logits.device))
    flat = (logs.exp() * logs).sum(dim=-1) + uniform  # KL(p || uniform)
    keep = cross_entropy(logits, labels, reduction="none")
    return torch.where(right, alpha * keep, (1 - alpha) * flat).mean()


def distill_loss(
    logits: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """Divergence from a larger model's softened answers, times temperature squared (Hinton 2015)."""
    student = (logits / temperature).log_softmax(dim=-1)
    target = (teacher / temperature).log_softmax(dim=-1)
    return temperature**2 * kl_div(student, target, reduction="batchmean", log_target=True)


def exit_losses(
    logits: Sequence[Float[Tensor, "batch classes"]],
    labels: Tensor,
    certainties: Sequence[Float[Tensor, " batch"]] = (),
) -> Float[Tensor, " exits"]:
    """Each exit's cross-entropy, and how far its certainty is from what came true.

    The second is the squared error of BERxiT's learning to exit (Xin et al. 2021); its target is 1 where
    the exit is right and 0 where it is wrong.

    Args:
        logits: of every exit.
        labels: the right classes, [batch].
        certainties: log-odds that an exit is right, of every exit but the last; none by default.
    """
    losses = [cross_entropy(exit, labels) for exit in logits]
    for number, (exit, certainty) in enumerate(zip(logits, certainties, strict=False)):
        right = (exit.argmax(dim=-1) == labels).to(certainty.dtype)
        losses[number] = losses[number] + mse_loss(certainty.sigmoid(), right)
    return torch.stack(losses)


def joint_loss(
    losses: Float[Tensor, " exits"], objective: Objective, step: int
) -> Float[Tensor, ""]:
    """What is minimised where backbone and exits are trained together.

    Args:
        losses: of every exit.
        objective: weighted, the mean by layer number (PABEE, Zhou et al. 2020); or alternating, the
            last exit's alone in odd steps and the sum of all in even ones (BERxiT, Xin et al. 2021).
        step: number of the optimisation step, from 1.
    """
    if objective == "weighted":
        numbers = torch.arange(1, len(losses) + 1, device=losses.device)
        return (numbers * losses).sum() / numbers.sum()
    if step % 2 == 0:
        return losses.sum()
    return losses[-1] + 0 * losses.sum()  # gradients of 0, not none: torchrun waits for all
