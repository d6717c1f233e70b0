"""While tests run, members' calls are checked against their annotations."""

from typing import TYPE_CHECKING

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from octavo.runtime import Runtime, seed_everything
from torch import Tensor

if TYPE_CHECKING:  # so that its name leads nowhere, and anything is taken
    from transformers import PreTrainedModel

decorate = jaxtyping.jaxtyped(typechecker=None)


@decorate
def halves(x: Float[Tensor, "rows two"], wrong: bool = False) -> Float[Tensor, " rows"]:
    return x.flatten() if wrong else x[:, 0]


@decorate
def paired(
    x: Float[Tensor, "rows two"], y: Float[Tensor, " rows"], model: "PreTrainedModel"
) -> None:
    halves(x[:1])  # sizes are its own


def test_types_are_checked():
    seed_everything(1)
    with pytest.raises(TypeError):
        seed_everything("1")  # pyright: ignore
    with pytest.raises(TypeError):
        Runtime(device=1)  # pyright: ignore


def test_sizes_are_one_within_a_call():
    for rows in (2, 3):
        assert halves(torch.ones(rows, 2)).shape == (rows,)
        paired(torch.ones(rows, 2), torch.ones(rows), object())  # pyright: ignore
    with pytest.raises(TypeError):
        halves(torch.ones(2, 2), wrong=True)
    with pytest.raises(TypeError):
        paired(torch.ones(2, 2), torch.ones(3), object())  # pyright: ignore


@pytest.mark.untraced
def test_shapes_of_long_runs_are_not():
    assert halves(torch.ones(2, 2), wrong=True).shape == (4,)
