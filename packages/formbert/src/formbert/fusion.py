"""How a sense's formation enters its score.

The paper adds a formation's vector to the pooled pair (`pooled_add`); since the classifier is linear
that only shifts a sense's score by one number for each formation, whatever the context. Where all
candidates have one predicted formation no ranking can change (`tests/test_theorem.py`). The others
interact with the context:

- `token`: the vector stands before the gloss as a token, and attention mixes it (done in the model);
- `pooled_mlp`: z = MLP([h; e; h * e]);
- `bilinear`: adds c' A e to the score;
- `matrix`: adds c' M_f g, one low-rank map a formation, as DeFT composes morphemes (Zheng et al. 2021);
- `agreement`: adds alpha log sum_f q(f | context, word) r(f | sense), alpha learnt.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

RANK = 8


class Fusion(nn.Module):
    """The parts of the fusions named.

    Args:
        names: of `config.FUSIONS`.
        width: of states (H).
        labels: how many formations, or parts of speech, there are (K); one more stands for "unknown".
    """

    def __init__(self, names: Sequence[str], width: int, labels: int) -> None:
        super().__init__()
        self.names = tuple(names)
        if "pooled_mlp" in names:
            self.formation_mlp = nn.Sequential(
                nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, width)
            )
        if "bilinear" in names:
            self.formation_bilinear = nn.Linear(width, width, bias=False)
        if "matrix" in names:
            self.formation_down = nn.Parameter(torch.empty(labels + 1, RANK, width))
            self.formation_up = nn.Parameter(torch.empty(labels + 1, width, RANK))
        if "agreement" in names:
            self.formation_alpha = nn.Parameter(torch.ones(()))

    def pooled(
        self, pooled: Float[Tensor, "pairs width"], vectors: Float[Tensor, "pairs width"]
    ) -> Float[Tensor, "pairs width"]:
        """The pooled state with the formation's vector in it, by the fusions that work there."""
        if "pooled_mlp" in self.names:
            pooled = self.formation_mlp(torch.cat([pooled, vectors, pooled * vectors], 1))
        if "pooled_add" in self.names:
            pooled = pooled + vectors
        return pooled

    def extra(
        self,
        context: Float[Tensor, "pairs width"],
        gloss: Float[Tensor, "pairs width"],
        shares: Float[Tensor, "pairs labels1"],
        vectors: Float[Tensor, "pairs width"],
        posterior: Float[Tensor, "pairs labels"] | None,
    ) -> Float[Tensor, " pairs"]:
        """What the fusions that work on scores add to them.

        Args:
            context: c, the word's state.
            gloss: g, the gloss's state.
            shares: r, of the formations, that of "unknown" last.
            vectors: e, of the formations.
            posterior: q, from the context.
        """
        total = context.new_zeros(context.shape[0])
        if "bilinear" in self.names:
            total = total + (context * self.formation_bilinear(vectors)).sum(1)
        if "matrix" in self.names:
            low = torch.einsum("kah,ph->pka", self.formation_down, gloss) * shares[..., None]
            total = total + (context * torch.einsum("kha,pka->ph", self.formation_up, low)).sum(1)
        if "agreement" in self.names and posterior is not None:
            total = total + self.formation_alpha * agreement(posterior, shares).log()
        return total


def agreement(
    posterior: Float[Tensor, "pairs labels"], shares: Float[Tensor, "pairs labels1"]
) -> Float[Tensor, " pairs"]:
    """Probability that the word is formed, in this context, as it is in this sense.

    An unknown formation may be any.

    Args:
        posterior: q(f | context, word).
        shares: r(f | sense), that of "unknown" last.
    """
    known, unknown = shares[:, :-1], shares[:, -1:]
    return (posterior * (known + unknown / posterior.shape[1])).sum(1).clamp_min(1e-6)
