"""How certain a stage is. Larger is more certain."""

from jaxtyping import Float
from torch import Tensor


def log_odds(logits: Float[Tensor, "items classes"]) -> Float[Tensor, " items"]:
    """Log-odds of the predicted class, log(p / (1 - p)) of the largest softmax probability p.

    It orders items as the paper's maximum softmax does, and goes on telling them apart
    where the probability has rounded to 1.

    Args:
        logits: of the classes, in any precision.

    Returns:
        The largest logit minus the log-sum-exp of the others, in float64.
    """
    ordered = logits.double().sort(dim=-1, descending=True).values
    return ordered[:, 0] - ordered[:, 1:].logsumexp(dim=-1)
