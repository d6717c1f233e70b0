"""The formation from the context, inside a model that disambiguates.

`MeanPredictor` is the authors': the mean, over all positions and padding too, of transformed
embeddings. It cannot know which word is meant. `SpanPredictor` reads the word's own states of a lower
layer. One that needs no encoder is `formation.FormationPredictor`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class MeanPredictor(nn.Module):
    """Linear(mean over positions of MLP(embedding)); section 1.3 of the method's page, after the code.

    Args:
        width: of embeddings (H).
        labels: formations (K).
    """

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.classifier = nn.Linear(width, labels)

    def forward(
        self, states: Float[Tensor, "rows tokens width"], mask: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows labels"]:
        """Logits of the formations.

        Args:
            states: embeddings of the text.
            mask: which positions count; the authors count padding.
        """
        return self.classifier(mean_state(self.mlp(states), mask))


class SpanPredictor(nn.Module):
    """A formation from the word's first, last and mean state.

    Args:
        width: of states (H).
        labels: formations (K).
        dropout: of the hidden layer.
    """

    def __init__(self, width: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(3 * width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, labels)
        )

    def forward(
        self, states: Float[Tensor, "rows tokens width"], target: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows labels"]:
        """Logits of the formations.

        Args:
            states: of the text.
            target: which tokens are the word's.
        """
        rows = torch.arange(states.shape[0], device=states.device)
        positions = target.long()
        first = positions.argmax(1)
        last = target.shape[1] - 1 - positions.flip(1).argmax(1)
        ends = [states[rows, first], states[rows, last], mean_state(states, target)]
        return self.mlp(torch.cat(ends, 1))


def mean_state(
    states: Float[Tensor, "rows tokens width"], which: Bool[Tensor, "rows tokens"]
) -> Float[Tensor, "rows width"]:
    """Mean of the states that are marked; zero where none is."""
    weights = which.to(states.dtype)
    total = torch.einsum("rt,rth->rh", weights, states)
    return total / weights.sum(1, keepdim=True).clamp_min(1)
