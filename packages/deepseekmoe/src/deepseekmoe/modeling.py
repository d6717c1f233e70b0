"""The language model: a LLaMA-type decoder whose feed-forward networks are DeepSeekMoE layers.

Attention, norms and rotary positions are the library's own, so that every attention implementation,
cache and kernel of it works here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from deepseekmoe.architecture import DeepseekMoeConfig
from deepseekmoe.layer import LOSSES, DeepseekMoeGate, DeepseekMoeLayer, DeepseekMoeMLP, ExpertBank


@dataclass
class DeepseekMoeModelOutput(ModelOutput):
    """What the decoder gives.

    Attributes:
        last_hidden_state: [batch, seq, width].
        past_key_values: the cache.
        hidden_states: of every layer, if asked for.
        attentions: of every layer, if asked for.
        balance: losses without their alphas of every layer with experts, [layers, 4] float32.
        counts: real tokens that chose each expert, [layers, experts] int64.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    balance: Tensor | None = None
    counts: Tensor | None = None


@dataclass
class DeepseekMoeOutput(CausalLMOutputWithPast):
    """What the language model gives, besides logits, cache, hidden states and attentions.

    Attributes:
        loss: in training lm_loss plus every alpha times its loss, summed over layers; else lm_loss.
        lm_loss: mean cross-entropy of the next token, in nats.
        balance: losses without their alphas, [layers, 4] in the order of `layer.LOSSES`.
        counts: real tokens that chose each expert, [layers, experts] int64.
    """

    lm_loss: Tensor | None = None
    balance: Tensor | None = None
    counts: Tensor | None = None


class DeepseekMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts (or one feed-forward network), each behind a norm and beside a residual."""

    def __init__(self, config: DeepseekMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)  # pyright: ignore[reportArgumentType]
        self.mlp = (
            DeepseekMoeLayer(config, layer_idx)
            if config.is_moe_layer(layer_idx)
            else DeepseekMoeMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq width"],
        token_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The layer's output; with experts also its losses and their load."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, DeepseekMoeLayer):
            out = self.mlp(normed, token_mask, token_ids)
            return hidden_states + out.hidden, out.losses, out.counts
        return hidden_states + self.mlp(normed), None, None


class DeepseekMoePreTrainedModel(PreTrainedModel):
    """What the library needs to know to load, place, shard and generate."""

    config_class = DeepseekMoeConfig
    config: DeepseekMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012 - steps of 1e-3
    _no_split_modules = ["DeepseekMoeDecoderLayer"]  # noqa: RUF012 - as the library has it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(DeepseekMoeDecoderLayer, index=0),
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekMoeGate):
            if not module.by_hash:
                init.normal_(module.weight, mean=0.0, std=std)
            for bias in module.buffers():
                init.zeros_(bias)
        elif isinstance(module, ExpertBank):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


def _stack_experts() -> None:
    """Checkpoints have each expert on its own; the library's reversible conversion stacks them."""
    stacked: list[Any] = [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping("deepseek", stacked, overwrite=True)


_stack_experts()  # a model that was never registered is saved in the released layout too


class DeepseekMoeModel(DeepseekMoePreTrainedModel):
    """The decoder without its language-model head."""

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DeepseekMoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch seq width"] | None = None,
        use_cache: bool | None = None,
        token_mask: Bool[Tensor, "batch seq"] | None = None,
        **kwargs: Any,
    ) -> DeepseekMoeModelOutput:
        """Run the decoder.

        Args:
            input_ids: tokens; or `inputs_embeds` instead.
            attention_mask: [batch, past + seq], 0 for padding; padding counts in no statistic.
            position_ids: where they start again at 0 in a packed row, attention does so too.
            past_key_values: a cache of the library.
            inputs_embeds: states instead of tokens.
            use_cache: make a cache where none is given.
            token_mask: which tokens count in statistics, in packed rows: these have position_ids,
                and no attention_mask that would tell it.
            **kwargs: go to the attention implementation.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seq = inputs_embeds.shape[1]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seq, device=inputs_embeds.device)[None] + past
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if token_mask is None and attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -seq:].bool()
        hidden = inputs_embeds
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        losses, counts = [], []
        for layer in self.layers:
            hidden, loss, count = layer(
                hidden,
                token_mask=token_mask,
                token_ids=input_ids,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            if loss is not None:
                losses.append(loss.to(inputs_embeds.device))
                counts.append(count.to(inputs_embeds.device))
        empty = hidden.new_zeros(0, len(LOSSES), dtype=torch.float32)
        return DeepseekMoeModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values,
            balance=torch.stack(losses) if losses else empty,
            counts=torch.stack(counts) if counts else empty[:, :0].long(),
        )

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value


class DeepseekMoeForCausalLM(DeepseekMoePreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekMoeConfig) -> None:
        super().__init__(config)
        self.model = DeepseekMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch seq width"] | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        num_rows_in_batch: int | None = None,
        num_tokens_in_batch: int | None = None,
        **kwargs: Any,
    ) -> DeepseekMoeOutput:
        """Predict the next token of each, and the losses where `labels` are given.

        Args:
            input_ids: tokens.
            attention_mask: 0 for padding.
            position_ids: of the tokens.
            past_key_values: a cache.
            inputs_embeds: states instead of tokens.
            labels: tokens again, -100 where no loss is wanted; they are shifted inside.
            use_cache: make a cache where none is given.
            logits_to_keep: of the last so many tokens only; 0 for all.
            num_items_in_batch: predicted tokens of the whole batch that gradients are accumulated
                over; the loss is then this part's share of the batch's loss.
            num_rows_in_batch: rows of the whole batch; balance losses that are means over sequences
                weigh by this part's share of them.
            num_tokens_in_batch: real tokens of the whole batch; balance losses that are means over
                tokens weigh by this part's share of them. Where one is not given, they weigh by
                predicted tokens.
            **kwargs: `token_mask` of the decoder; the rest goes to the attention implementation.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = lm_loss = None
        if labels is not None:
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
            loss = lm_loss
            if self.training and len(out.balance):
                by_row = by_token = 1.0
                if num_items_in_batch is not None:
                    by_row = by_token = (labels[:, 1:] != -100).sum() / num_items_in_batch
                if num_rows_in_batch is not None:
                    by_row = len(labels) / num_rows_in_batch
                if num_tokens_in_batch is not None:
                    mask = kwargs.get("token_mask", attention_mask)
                    real = labels.numel() if mask is None else mask.sum()
                    by_token = real / num_tokens_in_batch
                balance = self.balance_loss(out.balance, by_row, by_token)
                loss = lm_loss + balance.to(lm_loss.device)
        return DeepseekMoeOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            lm_loss=lm_loss,
            balance=out.balance,
            counts=out.counts,
        )

    def balance_loss(
        self,
        balance: Float[Tensor, "layers losses"],
        by_row: float | Tensor = 1.0,
        by_token: float | Tensor = 1.0,
    ) -> Float[Tensor, ""]:
        """Every alpha times its loss, summed over layers.

        Args:
            balance: losses in the order of `layer.LOSSES`.
            by_row: factor of means over sequences: a part's share of a batch's rows.
            by_token: factor of means over tokens: a part's share of a batch's real tokens.
        """
        config = self.config
        expert, device, communication, z = balance.sum(dim=0).unbind()
        balanced = config.aux_loss_alpha * expert + config.device_loss_alpha * device
        others = config.comm_loss_alpha * communication + config.z_loss_alpha * z
        of_rows = config.balance_scope == "sequence"
        return (by_row if of_rows else by_token) * balanced + by_token * others
