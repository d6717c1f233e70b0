"""What a model is made of and what it costs, from its configuration alone: nothing is allocated.

`tensors` is the list of a checkpoint's tensors by their released names; counts, memory and the check
of a checkpoint all read it.
"""

from dataclasses import dataclass
from typing import Any

from deepseekmoe.architecture import BASELINES, DeepseekMoeConfig

Shape = tuple[int, ...]


def tensors(config: DeepseekMoeConfig) -> dict[str, Shape]:
    """Names and shapes of a checkpoint's tensors, as deepseek-moe-16b-base names them."""
    width, heads = config.hidden_size, config.num_attention_heads
    head = int(config.head_dim or width // heads)
    keys = int(config.num_key_value_heads or heads)
    found: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}."
        for name, shape in (
            ("q_proj", (heads * head, width)),
            ("k_proj", (keys * head, width)),
            ("v_proj", (keys * head, width)),
            ("o_proj", (width, heads * head)),
        ):
            found[f"{here}self_attn.{name}.weight"] = shape
            if config.attention_bias:
                found[f"{here}self_attn.{name}.bias"] = shape[:1]
        if config.is_moe_layer(layer):
            found |= _moe_tensors(config, f"{here}mlp.", layer)
        else:
            found |= _ffn(f"{here}mlp.", width, config.intermediate_size, config.mlp_bias)
        found[f"{here}input_layernorm.weight"] = (width,)
        found[f"{here}post_attention_layernorm.weight"] = (width,)
    found["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    return found


def _moe_tensors(config: DeepseekMoeConfig, here: str, layer: int) -> dict[str, Shape]:
    width, hidden = config.hidden_size, config.moe_intermediate_size
    routed, found = int(config.n_routed_experts or 0), {}
    if routed:
        if layer >= config.n_hash_layers:
            found[f"{here}gate.weight"] = (routed, width)
        if config.bias_update_rate or config.topk_method == "noaux_tc":
            found[f"{here}gate.e_score_correction_bias"] = (routed,)
    for expert in range(routed):
        found |= _ffn(f"{here}experts.{expert}.", width, hidden)
    if config.n_shared_experts:
        wide = config.n_shared_experts * hidden
        found |= _ffn(f"{here}shared_experts.", width, wide, config.mlp_bias)
    return found


def _ffn(here: str, width: int, hidden: int, bias: bool = False) -> dict[str, Shape]:
    shapes = {
        f"{here}gate_proj.weight": (hidden, width),
        f"{here}up_proj.weight": (hidden, width),
        f"{here}down_proj.weight": (width, hidden),
    }
    if bias:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes


@dataclass(frozen=True)
class Count:
    """Parameters of a model.

    Attributes:
        total: all of them.
        active: those that a token meets: without the experts that it is not sent to.
        experts: of all routed and shared experts.
        active_experts: of those that a token meets.
        embedding: of the input embedding.
    """

    total: int
    active: int
    experts: int
    active_experts: int
    embedding: int


def count_parameters(config: DeepseekMoeConfig) -> Count:
    """Count a model's parameters; buffers (the balancing bias) do not count."""
    total = experts = routed = 0
    for name, shape in tensors(config).items():
        if name.endswith("e_score_correction_bias"):
            continue
        size = 1
        for length in shape:
            size *= length
        total += size
        experts += size * ("experts." in name)
        routed += size * (".experts." in name)
    share = (config.num_experts_per_tok or 0) / max(1, config.n_routed_experts or 0)
    idle = routed - round(routed * share)
    return Count(
        total, total - idle, experts, experts - idle, config.vocab_size * config.hidden_size
    )


def training_flops(config: DeepseekMoeConfig, length: int) -> float:
    """FLOPs of forward and backward over one sequence, by the rule that gives the paper's figures.

    6 (active parameters without the input embedding) T + 12 L d T^2: every matrix product thrice, the
    attention square whole. A tied embedding is the output's matrix, and counts.

    Args:
        config: of the model.
        length: tokens of the sequence (T).
    """
    count = count_parameters(config)
    attention = 12 * config.num_hidden_layers * config.hidden_size * length**2
    looked_up = 0 if config.tie_word_embeddings else count.embedding
    return 6.0 * (count.active - looked_up) * length + attention


def memory(config: DeepseekMoeConfig, length: int, bytes_each: int = 2) -> dict[str, float]:
    """Gigabytes (10^9) of the weights, of the cache of one sequence, and of training with AdamW.

    Args:
        config: of the model.
        length: tokens of the sequence.
        bytes_each: of a weight and a cached value.
    """
    total = count_parameters(config).total
    keys = int(config.num_key_value_heads or config.num_attention_heads)
    cached = 2 * config.num_hidden_layers * keys * int(config.head_dim or 0) * length
    return {
        "weights GB": total * bytes_each / 1e9,
        "KV cache GB": cached * bytes_each / 1e9,
        "AdamW states GB": total * 16 / 1e9,  # fp32 master, two moments, fp32 gradient
    }


def cost_row(config: DeepseekMoeConfig, length: int | None = None) -> dict[str, Any]:
    """A line of the accounting table."""
    length = length or config.max_position_embeddings
    count = count_parameters(config)
    return {
        "total": count.total,
        "active": count.active,
        "expert parameters": count.experts,
        "active expert parameters": count.active_experts,
        "tokens": length,
        "TFLOPs": training_flops(config, length) / 1e12,
        **memory(config, length),
    }


def budget_row(config: DeepseekMoeConfig, standard: DeepseekMoeConfig) -> dict[str, Any]:
    """How many standard FFNs a model's experts are, all of them and those that a token meets.

    Args:
        config: of the model.
        standard: has experts in every layer; its `intermediate_size` is the standard FFN's width.
    """
    ffn = 3 * standard.hidden_size * standard.intermediate_size * len(standard.moe_layers)
    count = count_parameters(config)
    return {"experts in FFNs": count.experts / ffn, "active in FFNs": count.active_experts / ffn}


def budget_errors(config: DeepseekMoeConfig) -> list[str]:
    """Where the baselines' budgets are not what the paper gives them; empty when they are.

    All experts together are 16 standard FFNs (x1.2 and x1.5 of it for the wider ones), the active ones
    2; top-1 routing has 1, dense models as many as they say. A share of a percent is left to the
    rounding of widths.
    """
    wanted = dict.fromkeys(BASELINES, (16.0, 2.0)) | {
        "dense": (1.0, 1.0),
        "dense-x4": (4.0, 4.0),
        "dense-x16": (16.0, 16.0),
        "hash": (16.0, 1.0),
        "switch": (16.0, 1.0),
        "gshard-x1.2": (19.2, 2.4),
        "gshard-x1.5": (24.0, 3.0),
    }
    found = []
    for name, budget in wanted.items():
        row = budget_row(config.baseline(name), config)
        for (key, many), ffns in zip(row.items(), budget, strict=True):
            if abs(many / ffns - 1) > 0.005:
                found.append(f"{name}: {key} are {many:.2f}, not {ffns:g}")
    return found
