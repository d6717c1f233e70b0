"""What is learnt: losses over a batch's pairs of texts and senses.

    listwise  -log softmax(s)_gold over the word's candidates (BEM, Blevins and Zettlemoyer 2020)
    pair      cross-entropy of each pair, right or wrong (GlossBERT, Huang et al. 2019; the paper)
    in-batch  listwise over the candidates of all words in the batch (LTRS, COLING 2025)
    listnet   -sum P_T log P, with P_T = softmax(likeness to the gold gloss / tau)
    listmle   the top k senses in the teacher's order, each against those after it

The first two formulas are the papers'; where a text has several right senses, the probability of any of
them counts.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

TAU = 0.05
TOP = 5
LOWEST = -1e4


def listed(
    values: Float[Tensor, " pairs"], text: Int[Tensor, " pairs"], texts: int, fill: float
) -> Float[Tensor, "texts most"]:
    """Values of pairs as one row a text, in the order of the pairs.

    Args:
        values: of the pairs, which stand text by text.
        text: the number of each pair's text, not falling.
        texts: how many there are.
        fill: for what a shorter row lacks.
    """
    counts = torch.bincount(text, minlength=texts)
    begins = counts.cumsum(0) - counts
    column = torch.arange(len(text), device=text.device) - begins[text]
    rows = values.new_full((texts, max(1, int(counts.max()))), fill)
    return rows.index_put((text, column), values)


def pair_loss(logits: Float[Tensor, "pairs 2"], gold: Bool[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """Cross-entropy of wrong and right, a mean over pairs."""
    return F.cross_entropy(logits.float(), gold.long())


def binary_loss(scores: Float[Tensor, " pairs"], gold: Bool[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """The same of a model with one score a pair."""
    return F.binary_cross_entropy_with_logits(scores.float(), gold.to(torch.float32))


def listwise_loss(
    scores: Float[Tensor, "texts most"],
    gold: Bool[Tensor, "texts most"],
    weights: Float[Tensor, " texts"] | None = None,
) -> Float[Tensor, ""]:
    """-log of the probability of the right senses among the listed ones.

    Args:
        scores: `LOWEST` where a row ends.
        gold: which are right; a text with none, or with one sense alone, teaches nothing.
        weights: of the texts.
    """
    logs = scores.float().log_softmax(1)
    right = logs.masked_fill(~gold, -torch.inf)
    usable = gold.any(1) & ((scores > LOWEST).sum(1) > 1)
    losses = -torch.where(usable[:, None], right, torch.zeros_like(right)).logsumexp(1)
    counted = usable.to(losses.dtype) if weights is None else usable * weights.to(losses.dtype)
    return (torch.where(usable, losses, torch.zeros_like(losses)) * counted).sum() / (
        counted.sum().clamp_min(1e-6)
    )


def listnet_loss(
    scores: Float[Tensor, "texts most"],
    likeness: Float[Tensor, "texts most"],
    usable: Bool[Tensor, " texts"],
) -> Float[Tensor, ""]:
    """Cross-entropy from the teacher's distribution to the model's.

    Args:
        scores: `LOWEST` where a row ends.
        likeness: of each sense's gloss to the right one, -1 to 1; `LOWEST` where a row ends.
        usable: texts with a right sense.
    """
    teacher = (likeness.float() / TAU).softmax(1)
    losses = -(teacher * scores.float().log_softmax(1)).sum(1)
    return (losses * usable).sum() / usable.sum().clamp_min(1)


def listmle_loss(
    scores: Float[Tensor, "texts most"],
    likeness: Float[Tensor, "texts most"],
    usable: Bool[Tensor, " texts"],
) -> Float[Tensor, ""]:
    """Plackett-Luce likelihood of the teacher's order, its first `TOP` places weighted by the teacher.

    Args:
        scores: `LOWEST` where a row ends.
        likeness: of each sense's gloss to the right one; `LOWEST` where a row ends.
        usable: texts with a right sense.
    """
    order = likeness.argsort(stable=True, dim=1, descending=True)
    ranked, teacher = scores.float().gather(1, order), likeness.float().gather(1, order)
    rest = ranked.flip(1).logcumsumexp(1).flip(1)
    top = min(TOP, scores.shape[1])
    weights = (teacher[:, :top] / TAU).softmax(1)
    losses = (weights * (rest - ranked)[:, :top]).sum(1)
    return (losses * usable).sum() / usable.sum().clamp_min(1)
