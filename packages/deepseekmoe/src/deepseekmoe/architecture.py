"""The configuration of a model: every key of the released checkpoints, and what may be added to them.

Presets are the paper's models and its baselines; all of them are one configuration class, so that a
dense model, Switch, GShard and DeepSeekMoE differ in numbers alone.
"""

from typing import Any, Literal, no_type_check

from octavo.errors import ConfigError
from transformers import PreTrainedConfig

PRESETS: dict[str, dict[str, Any]] = {
    # Table 2 of the paper's appendix and section 4; the expert width of 2b is our reading of
    # "0.25 of a standard FFN" with H = 8/3 d
    "2b": {
        "vocab_size": 8000, "hidden_size": 1280, "intermediate_size": 3413,
        "num_hidden_layers": 9, "num_attention_heads": 10, "moe_intermediate_size": 853,
        "n_shared_experts": 1, "n_routed_experts": 63, "num_experts_per_tok": 7,
        "first_k_dense_replace": 0, "max_position_embeddings": 2048, "aux_loss_alpha": 0.01,
        "initializer_range": 0.006, "bos_token_id": None, "eos_token_id": None,
    },
    "16b": {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "num_hidden_layers": 28, "num_attention_heads": 16, "moe_intermediate_size": 1408,
        "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1, "max_position_embeddings": 4096, "aux_loss_alpha": 0.001,
        "initializer_range": 0.006, "bos_token_id": 100000, "eos_token_id": 100001,
    },
    "145b": {
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 22528,
        "num_hidden_layers": 62, "num_attention_heads": 32, "moe_intermediate_size": 1408,
        "n_shared_experts": 4, "n_routed_experts": 128, "num_experts_per_tok": 12,
        "first_k_dense_replace": 1, "max_position_embeddings": 4096, "aux_loss_alpha": 0.003,
        "device_loss_alpha": 0.05, "n_devices": 4, "initializer_range": 0.006,
        "bos_token_id": 100000, "eos_token_id": 100001,
    },
    "tiny": {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "n_routed_experts": 63, "num_experts_per_tok": 7, "first_k_dense_replace": 0,
        "max_position_embeddings": 256, "aux_loss_alpha": 0.01, "initializer_range": 0.02,
        "bos_token_id": None, "eos_token_id": None, "seq_aux": False,
    },
}  # fmt: skip

#: What a baseline changes in a model with a standard FFN of width H: experts, their width as a
#: multiple of H, and how many are shared and active. Experts together are 16 FFNs, active ones 2.
BASELINES: dict[str, dict[str, Any]] = {
    "deepseekmoe": {"shared": 1, "routed": 63, "active": 7, "width": 0.25},
    "dense": {"shared": 1, "routed": 0, "active": 0, "width": 1},
    "dense-x4": {"shared": 4, "routed": 0, "active": 0, "width": 1},
    "dense-x16": {"shared": 16, "routed": 0, "active": 0, "width": 1},
    "hash": {"shared": 0, "routed": 16, "active": 1, "width": 1, "hash": True},
    "switch": {"shared": 0, "routed": 16, "active": 1, "width": 1},
    "gshard": {"shared": 0, "routed": 16, "active": 2, "width": 1},
    "gshard-x1.2": {"shared": 0, "routed": 16, "active": 2, "width": 1.2},
    "gshard-x1.5": {"shared": 0, "routed": 16, "active": 2, "width": 1.5},
}


#: The least that a whole number may be; None stands for a default where it is allowed.
WHOLE_NUMBERS = {
    "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "moe_intermediate_size": 1,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1,
    "moe_layer_freq": 1, "n_devices": 1, "max_position_embeddings": 1, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 0, "n_routed_experts": 0, "num_experts_per_tok": 0,
    "first_k_dense_replace": 0, "n_hash_layers": 0,
}  # fmt: skip
NUMBERS = (
    "aux_loss_alpha", "device_loss_alpha", "comm_loss_alpha", "z_loss_alpha", "bias_update_rate",
    "routed_scaling_factor", "rms_norm_eps", "initializer_range", "attention_dropout",
    "capacity_factor",
)  # fmt: skip


@no_type_check  # keys that are no fields are kept, as in every configuration of the library
class DeepseekMoeConfig(PreTrainedConfig):
    """A DeepSeekMoE language model; the defaults are those of the released 16B configuration.

    Keys of the released checkpoints keep their names. The others are ours, and off by default:

    - `aux_loss_scope`: "sequence", "batch" or "global"; None follows `seq_aux`.
    - `device_loss_alpha`, `comm_loss_alpha`, `n_devices`: eqs 15-17 and DeepSeek-V2's communication
      loss, experts lying on `n_devices` devices in equal, contiguous groups.
    - `z_loss_alpha`: router z-loss.
    - `bias_update_rate`: step of auxiliary-loss-free balancing (1e-3 is usual).
    - `topk_method`: "greedy", "group_limited_greedy" (V2) or "noaux_tc" (V3: groups by their two
      best, selection by score + bias), with `n_group` and `topk_group`.
    - `routed_scaling_factor`: factor of the gates.
    - `router_dtype`: "float32", or "checkpoint" for the weights' own, as the released code has it.
    - `n_hash_layers`: the first layers' experts are chosen by a hash of the token.
    - `capacity_factor`: an expert's slots are limited to this multiple of the mean load.
    - `experts_backend`: of `moe_forward`.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = [  # noqa: RUF012 - as the library has it
        "past_key_values"
    ]
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    n_shared_experts: int | None = 2
    n_routed_experts: int | None = 64
    num_experts_per_tok: int | None = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    aux_loss_scope: str | None = None
    device_loss_alpha: float = 0.0
    comm_loss_alpha: float = 0.0
    n_devices: int = 1
    z_loss_alpha: float = 0.0
    bias_update_rate: float = 0.0
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    router_dtype: str = "float32"
    n_hash_layers: int = 0
    capacity_factor: float | None = None
    experts_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_numbers()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.n_shared_experts = self.n_shared_experts or 0
        self.n_routed_experts = self.n_routed_experts or 0
        self.num_experts_per_tok = self.num_experts_per_tok or 0
        kwargs.pop("auto_map", None)  # names files of the released repository; none is needed here
        super().__post_init__(**kwargs)
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                    f"{self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.check()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DeepseekMoeConfig":
        """A model of the paper: 2b, 16b, 145b, or tiny.

        Raises:
            ConfigError: there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))

    def baseline(self, name: str, **changes: Any) -> "DeepseekMoeConfig":
        """The same model with another kind of feed-forward layers, at the paper's budgets.

        Args:
            name: one of `BASELINES`.
            changes: keys to set besides.

        Raises:
            ConfigError: there is no such baseline.
        """
        if name not in BASELINES:
            raise ConfigError(f"no baseline {name!r}; there are {', '.join(BASELINES)}")
        self.check_standard()
        kind = BASELINES[name]
        new = {
            "n_shared_experts": kind["shared"],
            "n_routed_experts": kind["routed"],
            "num_experts_per_tok": kind["active"],
            "moe_intermediate_size": round(kind["width"] * self.intermediate_size),
            "n_hash_layers": self.num_hidden_layers if kind.get("hash") else 0,
            "topk_method": "greedy",
            "n_group": None,
            "topk_group": None,
            "n_devices": 1,
            "device_loss_alpha": 0.0,
        }
        return self.changed(**(new | changes))

    def changed(self, **changes: Any) -> "DeepseekMoeConfig":
        """A copy with other keys.

        Raises:
            ConfigError: a number does not fit the others.
        """
        known = self.to_dict()
        for key in ("transformers_version", "model_type", "architectures"):
            known.pop(key, None)
        return type(self)(**(known | changes))

    def check_standard(self) -> None:
        """Refuse to compare budgets where `intermediate_size` is not the standard FFN's width H.

        Raises:
            ConfigError: the first layers are dense, and that is their width.
        """
        if self.first_k_dense_replace:
            raise ConfigError(
                "baselines and --granularity are of models with experts in every layer, such as the "
                "presets 2b and tiny: here intermediate_size is the first dense layer's width"
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written: what serves the released model reads it too."""
        written = super().to_dict()
        if written.get("architectures") == ["DeepseekMoeForCausalLM"]:
            written["architectures"] = ["DeepseekForCausalLM"]
        written["rope_theta"] = (self.rope_parameters or {}).get("rope_theta", 10000.0)
        return written

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer (from 0) has experts rather than one FFN of `intermediate_size`."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers that have experts."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    @property
    def balance_scope(self) -> Literal["sequence", "batch", "global"]:
        """Over which tokens the balance losses take their statistics."""
        return self.aux_loss_scope or ("sequence" if self.seq_aux else "batch")  # pyright: ignore

    def _check_numbers(self) -> None:
        """Refuse what is no number, or too small."""
        for name, least in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise ConfigError(f"{name} {value!r}: must be a whole number, {least} or more")
        for name in NUMBERS:
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ConfigError(f"{name} {value!r}: must be a number")

    def check(self) -> None:
        """Refuse what cannot be, with the cure.

        Raises:
            ConfigError: a number does not fit the others.
        """
        routed, active = self.n_routed_experts or 0, self.num_experts_per_tok or 0
        groups, kept = self.n_group or 1, self.topk_group or 1
        heads, keys = self.num_attention_heads, self.num_key_value_heads or 1
        for wrong, what in (
            (heads % keys,
             f"num_attention_heads {heads} is no multiple of num_key_value_heads {keys}"),
            ((self.head_dim or 0) % 2, f"head_dim {self.head_dim}: must be even"),
            (not self.rms_norm_eps > 0, f"rms_norm_eps {self.rms_norm_eps}: must be above 0"),
            (active > routed,
             f"num_experts_per_tok {active} of n_routed_experts {routed}: choose fewer"),
            (routed and not active, "num_experts_per_tok 0: a routed expert is never used; set it "
             "to 1 or more, or n_routed_experts to 0"),
            (not routed and not self.n_shared_experts and self.moe_layers,
             "neither shared nor routed experts: set n_shared_experts or n_routed_experts"),
            (routed % groups, f"n_routed_experts {routed} is no multiple of n_group {groups}"),
            (routed % self.n_devices,
             f"n_routed_experts {routed} is no multiple of n_devices {self.n_devices}"),
            (kept > groups, f"topk_group {kept} of n_group {groups}: choose fewer"),
            (routed and kept * (routed // groups) < active,
             f"{kept} groups of {routed // groups} experts hold fewer than num_experts_per_tok "
             f"{active}"),
            (self.scoring_func not in ("softmax", "sigmoid"),
             f"scoring_func {self.scoring_func!r}: softmax or sigmoid"),
            (self.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"),
             f"topk_method {self.topk_method!r}: greedy, group_limited_greedy or noaux_tc"),
            (self.aux_loss_scope not in (None, "sequence", "batch", "global"),
             f"aux_loss_scope {self.aux_loss_scope!r}: sequence, batch or global"),
            (self.router_dtype not in ("float32", "checkpoint"),
             f"router_dtype {self.router_dtype!r}: float32 or checkpoint"),
            (self.hidden_act != "silu", f"hidden_act {self.hidden_act!r}: experts are SwiGLU (silu)"),
            (self.capacity_factor is not None and not self.capacity_factor > 0,
             f"capacity_factor {self.capacity_factor}: must be above 0, or None"),
            (min(self.aux_loss_alpha, self.device_loss_alpha, self.comm_loss_alpha,
                 self.z_loss_alpha, self.bias_update_rate) < 0,
             "a loss's alpha or the bias's rate is negative"),
            (not 0 <= self.n_hash_layers <= self.num_hidden_layers,
             f"n_hash_layers {self.n_hash_layers} of {self.num_hidden_layers} layers"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(what)
