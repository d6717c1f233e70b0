"""A policy and a critic as reinforcement needs them: what they say of given tokens."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from octavo.errors import ConfigError, ModelError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens whose predictions over the whole vocabulary are held at once.
CHUNK = 1024


class Actor(nn.Module):
    """A policy, with a critic's head on it where they share the model."""

    def __init__(self, model: "PreTrainedModel", head: bool) -> None:
        super().__init__()
        self.model = model
        self.head = _value_head(model) if head else None
        self.exact = _states_tell(model)
        if head and not self.exact:
            raise ConfigError("--critic shared: does not fit this model; use --critic separate")

    def forward(
        self, ids: Int[Tensor, "rows seq"], mask: Int[Tensor, "rows seq"],
        places: Int[Tensor, "rows length"], tokens: Int[Tensor, "rows length"], temperature: float,
    ) -> tuple[Float[Tensor, "rows length"], Float[Tensor, "rows length"], Tensor | None]:  # fmt: skip
        """Log-probabilities of tokens, the entropy there, and the values before them.

        Args:
            ids: prompts and responses.
            mask: 0 where a row is padded.
            places: where each token of the response is predicted, the one before it.
            tokens: of the responses.
            temperature: they are sampled at.
        """
        if not self.exact:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            kept = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
            logs, entropy = _token_logs(kept.flatten(0, 1), tokens.flatten(), temperature)
            return logs.view_as(tokens), entropy.view_as(tokens), None
        decoder, output = self.model.get_decoder(), self.model.get_output_embeddings()
        assert output is not None  # or it would not be exact
        states = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        parts = []
        for some, wanted in zip(
            states.flatten(0, 1).split(CHUNK), tokens.flatten().split(CHUNK), strict=True
        ):

            def told(some: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
                return _token_logs(output(some), wanted, temperature)

            parts.append(checkpoint(told, some, wanted, use_reentrant=False))
        logs, entropy = (torch.cat(some).view_as(tokens) for some in zip(*parts, strict=True))
        values = None if self.head is None else self.head(states.float()).squeeze(-1)
        return logs, entropy, values


def _token_logs(
    logits: Float[Tensor, "tokens vocabulary"], wanted: Int[Tensor, " tokens"], temperature: float
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-probabilities of tokens, and the entropy of the predictions (without a gradient)."""
    logs = (logits.float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, wanted[:, None]).squeeze(-1), entropy


class Critic(nn.Module):
    """A model of its own that tells what a response will be worth."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model.get_decoder()
        self.head = _value_head(model)

    def forward(
        self, ids: Int[Tensor, "rows seq"], mask: Int[Tensor, "rows seq"],
        places: Int[Tensor, "rows length"],
    ) -> Float[Tensor, "rows length"]:  # fmt: skip
        """Values before the tokens that are predicted at `places`."""
        states = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        return self.head(states.float()).squeeze(-1)


def checkpoint_layers(model: nn.Module, on: bool = True) -> None:
    """Have layers compute their activations twice where there are gradients, and keep few of them.

    The library's own switch works in training mode alone, where dropout would too.

    Args:
        model: changed in place.
        on: or have them keep their activations again.

    Raises:
        ConfigError: the model has no layers of that kind.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError("--gradient-checkpointing: does not fit this model")
    for layer in layers:
        layer.__dict__.pop("forward", None)
        if on:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes: an adapter's and a head's where the others are frozen."""
    return {name: one.detach() for name, one in module.named_parameters() if one.requires_grad}


@torch.no_grad()
def take_weights(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back what `trained_weights` gave.

    Raises:
        ModelError: they are of another model.
    """
    own = trained_weights(module)
    if own.keys() != saved.keys():
        raise ModelError("the checkpoint is of another model; start anew with --overwrite")
    for name, weight in saved.items():
        own[name].copy_(weight)


@torch.no_grad()
def _states_tell(model: Any) -> bool:
    """Whether the output matrix makes a model's logits of its last states (some scale them after)."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    try:
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        short = model.get_output_embeddings()(states)
    except (AttributeError, TypeError):
        return False
    own = model(input_ids=ids, use_cache=False).logits
    return own.shape == short.shape and torch.allclose(own, short, rtol=1e-2, atol=1e-3)


def _value_head(model: "PreTrainedModel") -> nn.Linear:
    head = nn.Linear(model.config.get_text_config().hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head.to(model.device)
