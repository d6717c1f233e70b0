"""Make a DeepSeekMoE of a dense model: its feed-forward networks become experts.

The hidden units of an FFN are cut into `granularity` (m) pieces; with m = 1 every expert is a copy. m
consecutive experts, the shared ones first, are the pieces of one whole FFN, each FFN cut after a
permutation of its own, so that groups differ and any whole group still adds up to the FFN.

An active expert should answer as m / (Ks + K') of an FFN, since Ks + K' pieces answer. A routed one is
multiplied by its gate besides, which is 1 / N' when all are equal and is not renormalised. Hence the
factors

    shared: m / (Ks + K')          routed: N' m / (Ks + K')

of which the latter, without shared experts, is Megatron-LM's for granular upcycling with the softmax
before the selection (arXiv 2410.07524). Megatron spreads the cube root of it over three matrices; here
its square root goes to `up` and `down`, in both of which a SwiGLU is linear, so that the product is
exact. Gates begin equal up to `GATE_SPREAD`, and a group's experts with the same row, so that a token
chooses whole groups. The model then begins at the dense one's logits, up to that spread, where every
unit is active equally often: always with copies, and with pieces where m divides Ks and K'.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from octavo.errors import ConfigError, ModelError
from octavo.models import load_config, load_tokenizer
from octavo.models import load_model as load_checked
from torch import Tensor

from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.hub import load, register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseekmoe.modeling import DeepseekMoeForCausalLM

#: Standard deviation of a new gate's logits for states of root mean square 1. It decides which experts
#: a token chooses, and leaves the gates equal to so many parts.
GATE_SPREAD = 1e-4

#: What a LLaMA's configuration and this package's have in common.
KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "rope_parameters", "attention_bias", "attention_dropout", "hidden_act",
)  # fmt: skip


def upcycle(
    dense: Any,
    *,
    routed: int = 64,
    shared: int = 2,
    active: int = 6,
    granularity: int = 1,
    dense_layers: int = 0,
    seed: int = 0,
) -> "DeepseekMoeForCausalLM":
    """A DeepSeekMoE that begins where a dense model ended.

    Args:
        dense: a `LlamaForCausalLM`, or a model of this package without routed experts.
        routed: routed experts (N').
        shared: shared experts (Ks).
        active: routed experts a token (K').
        granularity: pieces (m) that an FFN is cut into.
        dense_layers: first layers that stay as they are.
        seed: of permutations and gates.

    Raises:
        ConfigError: the numbers do not fit each other or the FFN's width.
        ModelError: the model is none that can be upcycled.
    """
    from deepseekmoe.modeling import DeepseekMoeForCausalLM

    hidden = _width(dense)
    if granularity < 1 or hidden % granularity:
        raise ConfigError(f"--granularity {granularity}: must divide the FFN's width {hidden}")
    if routed < 1 or shared < 0 or (routed + shared) % granularity:
        raise ConfigError(
            f"{shared} shared and {routed} routed experts: there must be routed ones, and together "
            f"whole FFNs of --granularity {granularity} pieces"
        )
    config = DeepseekMoeConfig(
        **{name: getattr(dense.config, name) for name in KEPT if hasattr(dense.config, name)},
        intermediate_size=hidden,
        moe_intermediate_size=hidden // granularity,
        n_routed_experts=routed,
        n_shared_experts=shared,
        num_experts_per_tok=active,
        first_k_dense_replace=dense_layers,
    )
    register()
    model: Any = DeepseekMoeForCausalLM(config)
    draw = torch.Generator().manual_seed(seed)
    state = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    for number, layer in enumerate(dense.model.layers):
        here = f"model.layers.{number}.mlp."
        ffn = _matrices(layer.mlp)
        if config.is_moe_layer(number):
            new = _experts(ffn, routed, shared, active, granularity, draw)
        else:
            new = {f"{name}_proj.weight": ffn[name] for name in ffn}
        state |= {here + name: value for name, value in new.items()}
    model.load_state_dict(state)
    return model.to(dense.dtype).eval()


def _experts(
    ffn: dict[str, Tensor], routed: int, shared: int, active: int, pieces: int, draw: Any
) -> dict[str, Tensor]:
    """An FFN's matrices as the tensors of a layer with experts."""
    hidden, width = ffn["gate"].shape
    groups = (routed + shared) // pieces
    cuts = torch.cat(
        [
            torch.randperm(hidden, generator=draw) if group and pieces > 1 else torch.arange(hidden)
            for group in range(groups)
        ]
    ).view(routed + shared, hidden // pieces)
    first, rest = cuts[:shared].flatten(), cuts[shared:]
    factor = pieces / (shared + active)
    inner, outer = factor**0.5, (routed * factor) ** 0.5
    gates = torch.randn(groups, width, generator=draw) * GATE_SPREAD / width**0.5
    found = {
        "gate.weight": gates.repeat_interleave(pieces, dim=0)[shared:],
        "experts.gate_up_proj": torch.cat([ffn["gate"][rest], ffn["up"][rest] * outer], dim=1),
        "experts.down_proj": ffn["down"].T[rest].transpose(1, 2) * outer,
    }
    if shared:
        found |= {
            "shared_experts.gate_proj.weight": ffn["gate"][first],
            "shared_experts.up_proj.weight": ffn["up"][first] * inner,
            "shared_experts.down_proj.weight": ffn["down"][:, first] * inner,
        }
    return found


def _matrices(mlp: Any) -> dict[str, Tensor]:
    """An FFN's gate and up [hidden, width] and down [width, hidden], in float32."""
    ffn = getattr(mlp, "shared_experts", mlp)
    return {
        name: getattr(ffn, f"{name}_proj").weight.detach().float().cpu()
        for name in ("gate", "up", "down")
    }


def _width(dense: Any) -> int:
    """Hidden width of a dense model's FFNs, all of which must have the same."""
    config = dense.config
    if config.model_type not in ("llama", "deepseek") or getattr(config, "n_routed_experts", 0):
        raise ModelError(
            f"model_type {config.model_type!r} with its experts cannot be upcycled: give a dense "
            "LLaMA, or a model of this package without routed experts"
        )
    if getattr(config, "mlp_bias", False):
        raise ModelError("the FFNs have biases (mlp_bias), which routed experts have not")
    widths = {len(_matrices(layer.mlp)["gate"]) for layer in dense.model.layers}
    if len(widths) > 1:
        raise ModelError(f"the FFNs have several widths: {', '.join(map(str, sorted(widths)))}")
    return widths.pop()


def load_dense(source: str | Path) -> "tuple[Any, PreTrainedTokenizerBase]":
    """A dense model and its tokenizer, from a folder or a hub id.

    Raises:
        ModelError: it cannot be had, or is of another family.
    """
    from transformers import AutoModelForCausalLM

    register()
    kind = load_config(source).model_type
    if kind == "deepseek":
        model, tokenizer = load(source)
        assert tokenizer is not None
        return model, tokenizer
    if kind != "llama":
        raise ModelError(
            f"{source}: model_type {kind!r} cannot be upcycled: give a dense LLaMA, or a model of "
            "this package without routed experts"
        )
    return load_checked(AutoModelForCausalLM, source), load_tokenizer(source)
