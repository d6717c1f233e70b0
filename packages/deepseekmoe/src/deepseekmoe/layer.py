"""The DeepSeekMoE layer: a gate, a bank of routed experts, and shared experts that see every token.

    h_t = sum over shared i of FFN_i(u_t) + sum over routed i of g_it FFN_i(u_t)      (eqs 9-11)

The residual u_t is added by the block around it. Nothing is remembered between calls: what the losses
and the load need is returned, so that recomputation under checkpointing changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from octavo.errors import ConfigError
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import linear, silu

from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.balance import (
    communication_loss,
    device_balance_loss,
    device_map,
    expert_balance_loss,
    router_z_loss,
)
from deepseekmoe.dispatch import dispatch
from deepseekmoe.experts import moe_forward
from deepseekmoe.routing import (
    Groups,
    Routing,
    check_selection,
    count_experts,
    hash_route,
    limit_capacity,
    route,
)

#: Losses in the order in which layers return them.
LOSSES = ("expert", "device", "communication", "z")


@dataclass
class Intervention:
    """What an analysis changes in a trained layer; the default changes nothing.

    Attributes:
        disable_top: mask so many of a token's best experts before selecting.
        active: experts a token instead of the trained number.
        shared: whether the shared experts answer.
    """

    disable_top: int = 0
    active: int | None = None
    shared: bool = True


class LayerOutput(NamedTuple):
    """What a layer gives.

    Attributes:
        hidden: [batch, seq, width].
        losses: the losses of `LOSSES` without their alphas, [4] float32; 0 where not asked for.
        counts: how many real tokens chose each expert, [experts] int64.
    """

    hidden: Float[Tensor, "batch seq width"]
    losses: Float[Tensor, " losses"]
    counts: Int[Tensor, " experts"]


class DeepseekMoeMLP(nn.Module):
    """A SwiGLU feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """The network's output."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DeepseekMoeGate(nn.Module):
    """The router: rows of its weight are the experts' centroids e_i; it has no bias of its own.

    Args:
        config: of the model.
        layer: number of the layer, from 0; layers below `n_hash_layers` route by a hash of the token.
    """

    def __init__(self, config: DeepseekMoeConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.by_hash = layer < config.n_hash_layers
        self.experts = int(config.n_routed_experts or 0)
        self.active = int(config.num_experts_per_tok or 0)
        self.groups = None
        if config.topk_method != "greedy" and (config.n_group or 1) > 1:
            by = "max" if config.topk_method == "group_limited_greedy" else "top2"
            self.groups = Groups(config.n_group or 1, config.topk_group or 1, by)
        if not self.by_hash:
            self.weight = nn.Parameter(torch.empty(self.experts, config.hidden_size))
            nn.init.normal_(self.weight, std=config.initializer_range)
        if config.bias_update_rate or config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(self.experts))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert, but keep the selection bias exact: it grows by steps of 1e-3."""
        exact = getattr(self, "e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if exact is not None and self.e_score_correction_bias.dtype != exact.dtype:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        token_ids: Int[Tensor, " tokens"] | None = None,
        intervention: Intervention = Intervention(),
    ) -> tuple[Routing, Float[Tensor, "tokens experts"]]:
        """Choose experts; also gives the logits.

        Raises:
            ConfigError: the layer routes by token and no tokens are given.
        """
        top_k = self.active if intervention.active is None else intervention.active
        if self.by_hash:
            if token_ids is None:
                raise ConfigError(
                    f"layer {self.layer} routes by a hash of the token: give input_ids"
                )
            routing = hash_route(token_ids, top_k, self.experts, seed=self.layer)
            return routing, routing.scores
        if self.config.router_dtype == "float32":
            with torch.autocast(x.device.type, enabled=False):
                logits = linear(x.float(), self.weight.float())
        else:
            logits = linear(x, self.weight.to(x.dtype))
        routing = route(
            logits,
            top_k,
            scoring=self.config.scoring_func,  # pyright: ignore[reportArgumentType]
            normalize=self.config.norm_topk_prob,
            bias=getattr(self, "e_score_correction_bias", None),
            groups=self.groups,
            scale=self.config.routed_scaling_factor,
            disable_top=intervention.disable_top,
        )
        return routing, logits


class ExpertBank(nn.Module):
    """All routed experts' weights, stacked as transformers v5 stacks them.

    Attributes:
        peers: processes that hold the experts together; None where this one holds all.
        replicas: processes that hold the same experts as this one, where it holds some.
    """

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.peers: ProcessGroup | None = None
        self.replicas: ProcessGroup | None = None

    def divide(self, peers: ProcessGroup, replicas: ProcessGroup) -> None:
        """Keep this process's share of the experts alone.

        Args:
            peers: hold the experts together, in equal, contiguous groups by their rank in it.
            replicas: hold the same experts as this process, which is one of them.
        """
        self.peers, self.replicas = peers, replicas
        for name, weight in list(self.named_parameters()):
            own = weight.detach().chunk(peers.size())[peers.rank()].clone()
            setattr(self, name, nn.Parameter(own, weight.requires_grad))

    def forward(self, x: Tensor, routing: Routing, backend: str) -> Float[Tensor, "tokens width"]:
        """The routed experts' weighted sum of each token."""
        weights = self.gate_up_proj, self.down_proj
        if self.peers is not None:
            return dispatch(x, routing, *weights, self.peers, backend)
        return moe_forward(x, routing.ids, routing.weights, *weights, backend)


class DeepseekMoeLayer(nn.Module):
    """Shared and routed experts in place of a feed-forward network.

    Args:
        config: of the model.
        layer: number of the layer, from 0.
    """

    def __init__(self, config: DeepseekMoeConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_size, config.moe_intermediate_size
        if config.n_routed_experts:
            self.gate = DeepseekMoeGate(config, layer)
            self.experts = ExpertBank(config.n_routed_experts, width, hidden)
            for weight in self.experts.parameters():
                nn.init.normal_(weight, std=config.initializer_range)
        if config.n_shared_experts:  # as one network: the sum of SwiGLUs is a wider SwiGLU
            self.shared_experts = DeepseekMoeMLP(
                width, config.n_shared_experts * hidden, config.mlp_bias
            )
        self.intervention = Intervention()

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        token_mask: Bool[Tensor, "batch seq"] | None = None,
        token_ids: Int[Tensor, "batch seq"] | None = None,
    ) -> LayerOutput:
        """Run tokens through their experts.

        Args:
            x: states behind the norm.
            token_mask: which tokens are real; padding counts in no statistic.
            token_ids: of the vocabulary, where layers route by a hash.
        """
        batch, seq, width = x.shape
        flat = x.reshape(batch * seq, width)
        hidden = torch.zeros_like(flat)
        losses = flat.new_zeros(len(LOSSES), dtype=torch.float32)
        counts = torch.zeros(self.config.n_routed_experts or 0, dtype=torch.long, device=x.device)
        if self.config.n_shared_experts and self.intervention.shared:
            hidden = self.shared_experts(flat)
        if self.config.n_routed_experts:
            mask = None if token_mask is None else token_mask.reshape(-1).bool()
            words = None if token_ids is None else token_ids.reshape(-1)
            routing, logits = self.gate(flat, words, self.intervention)
            if self.training:
                losses = self._losses(routing, logits, mask, batch, seq)
            counts = count_experts(routing.ids, len(counts), mask)
            if self.config.capacity_factor is not None and self.training:
                routing = limit_capacity(routing, self.config.capacity_factor, mask)
            hidden = hidden + self.experts(flat, routing, self.config.experts_backend)
        return LayerOutput(hidden.view(batch, seq, width), losses, counts)

    def _losses(
        self, routing: Routing, logits: Tensor, mask: Tensor | None, batch: int, seq: int
    ) -> Float[Tensor, " losses"]:
        config = self.config
        zero = logits.new_zeros((), dtype=torch.float32)
        found = dict.fromkeys(LOSSES, zero)
        if self.gate.by_hash:
            return torch.stack(list(found.values()))
        scores, scope = routing.scores, config.balance_scope
        if config.scoring_func == "sigmoid":
            scores = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        rows = torch.arange(batch, device=logits.device).repeat_interleave(seq)
        over: Any = {"mask": mask, "sequence_ids": rows, "sequences": batch, "scope": scope}
        if config.aux_loss_alpha:
            found["expert"] = expert_balance_loss(scores, routing.ids, **over)
        devices = device_map(scores.shape[-1], config.n_devices, logits.device)
        if config.device_loss_alpha:
            found["device"] = device_balance_loss(scores, routing.ids, devices, **over)
        if config.comm_loss_alpha:
            grouped = self.gate.groups is not None and self.gate.groups.many == config.n_devices
            reached = self.gate.groups.kept if grouped else config.n_devices  # pyright: ignore
            most = min(reached, routing.ids.shape[-1])
            found["communication"] = communication_loss(
                scores, routing.ids, devices, most, mask=mask
            )
        if config.z_loss_alpha:
            found["z"] = router_z_loss(logits, mask=mask)
        return torch.stack([found[name].float() for name in LOSSES])


def moe_layers(model: nn.Module) -> list[DeepseekMoeLayer]:
    """A model's layers that have routed experts, the first one first."""
    return [
        module
        for module in model.modules()
        if isinstance(module, DeepseekMoeLayer) and module.config.n_routed_experts
    ]


@contextmanager
def intervene(
    model: nn.Module, *, disable_top: int = 0, active: int | None = None, shared: bool = True
) -> Iterator[None]:
    """Change all layers for a while: see `Intervention`. They are put back afterwards.

    Raises:
        ConfigError: fewer experts remain than are to be chosen, or a hash chooses and has no best ones.
    """
    layers = moe_layers(model)
    for layer in layers:
        if disable_top and layer.gate.by_hash:
            raise ConfigError(
                f"layer {layer.gate.layer} routes by a hash of the token: it has no best experts"
            )
        top_k = layer.gate.active if active is None else active
        check_selection(layer.gate.experts, top_k, layer.gate.groups, disable_top)
    before = [layer.intervention for layer in layers]
    try:
        for layer in layers:
            layer.intervention = Intervention(disable_top, active, shared)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.intervention = old


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[list[Routing]]]:
    """Keep what every layer's gate decides: a list a layer, of one `Routing` a forward pass."""
    layers = moe_layers(model)
    found: list[list[Routing]] = [[] for _ in layers]
    handles = []
    for place, layer in zip(found, layers, strict=True):

        def keep(_gate: nn.Module, _inputs: tuple, output: tuple, place: list = place) -> None:
            place.append(Routing(*(part.detach() for part in output[0])))

        handles.append(layer.gate.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
