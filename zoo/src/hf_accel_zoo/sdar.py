"""A block-diffusion language model of the SDAR class: the network of Qwen3 under a block-causal mask.

SDAR (arXiv 2510.06303) is published as remote code. This is a network of our own with the same class names, module
names and calls, so that what is written for it runs offline and on the miniatures:

* positions of one block of `config.block_size` see each other in both directions, and all earlier blocks;
* logits are in place (no shift by one): those at a position that holds `config.mask_token_id` predict that position;
* `forward(..., past_key_values=cache, store_kv=True)` writes the K/V of the positions given; `store_kv=False`, a step
  of denoising, reads the cache and leaves it as it is;
* attention is PyTorch's SDPA called directly, not through transformers' attention interface.

Importing this module registers the classes with `AutoConfig` and `AutoModelForCausalLM` (no `trust_remote_code`)::

    import hf_accel_zoo.sdar
    model = AutoModelForCausalLM.from_pretrained(zoo.path("mini-sdar"))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hf_accel.errors import InvalidSetting

__all__ = ["SDARAttention", "SDARConfig", "SDARDecoderLayer", "SDARForCausalLM", "SDARModel", "block_causal_mask"]


class SDARConfig(Qwen3Config):
    """Qwen3's fields, the tokens of a block and the id of the mask token."""

    model_type = "sdar"

    block_size: int = 4
    mask_token_id: int = 151669


def block_causal_mask(
    length: int, block: int, *, past: int = 0, padding: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """`[B or 1, 1, length, past + length]` bool, True = visible: own block and every earlier one.

    The queries are the last `length` of `past + length` positions. `padding`, `[B, past + length]` with 0 or False at
    padding, hides keys and counts blocks over real tokens only, so a padded row has the blocks it would have alone.
    """
    if padding is None:
        position = torch.arange(past + length, device=device).unsqueeze(0)
        seen = None
    else:
        seen = padding.to(device=device, dtype=torch.bool)
        if seen.shape[-1] != past + length:
            expected = f"[B, {past + length}], one entry per key: {past} cached tokens and {length} new ones"
            raise InvalidSetting("SDARModel", "attention_mask", list(seen.shape), expected)
        position = (seen.cumsum(-1) - 1).clamp(min=0)
    blocks = position // block
    visible = blocks[:, None, None, :] <= blocks[:, None, -length:, None]
    return visible if seen is None else visible & seen[:, None, None, :]


def _cached(cache: Cache | None, layer: int) -> tuple[Tensor, Tensor] | None:
    """What the cache holds for `layer`, each `[B, H_kv, P, D]`: the filled part of a static buffer; None when empty."""
    if cache is None or len(cache.layers) <= layer:
        return None
    held: Any = cache.layers[layer]
    if not held.is_initialized:
        return None
    length = int(cache.get_seq_length(layer))
    return (held.keys[:, :, :length], held.values[:, :, :length]) if length else None


class SDARAttention(nn.Module):
    """Grouped-query attention with RMSNorm on each head's queries and keys, as Qwen3's."""

    def __init__(self, config: SDARConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        bias = config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`hidden_states` `[B, L, hidden]`, mask bool `[B, 1, L, P + L]` or None (all visible)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        before = _cached(past_key_values, self.layer_idx)
        if past_key_values is not None and kwargs.get("store_kv", False):
            past_key_values.update(key, value, self.layer_idx)
        if before is not None:
            key, value = torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)

        out = F.scaled_dot_product_attention(
            query,
            repeat_kv(key, self.num_key_value_groups),
            repeat_kv(value, self.num_key_value_groups),
            attn_mask=attention_mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class SDARDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SDARConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = SDARAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SDARPreTrainedModel(PreTrainedModel):
    config_class = SDARConfig
    config: SDARConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SDARDecoderLayer"]  # noqa: RUF012 (transformers declares them on the instance)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": SDARDecoderLayer}  # noqa: RUF012


class SDARModel(SDARPreTrainedModel):
    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(SDARDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, L, hidden]`; `attention_mask` None, `[B, P + L]` padding, or bool `[B, (1,) L, P + L]`."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "both" if input_ids is not None else "neither"
            raise InvalidSetting("SDARModel", "input_ids, inputs_embeds", given, "exactly one of the two")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length = hidden_states.shape[1]
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                position_ids = torch.arange(past, past + length, device=hidden_states.device).unsqueeze(0)
        mask = self._mask(attention_mask, past, length, hidden_states.device)

        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                cache_position=cache_position,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _mask(self, given: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
        block = self.config.block_size
        if given is None:
            inside = past % block + length <= block
            return None if inside else block_causal_mask(length, block, past=past, device=device)
        if given.dim() == 2:
            return block_causal_mask(length, block, past=past, padding=given, device=device)
        mask = given.unsqueeze(1) if given.dim() == 3 else given
        return mask.bool() if not mask.is_floating_point() else mask


class SDARForCausalLM(SDARPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.model = SDARModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits in place, `[B, L, V]`; `labels` `[B, L]` likewise (-100 where nothing is asked), mean cross-entropy.

        `store_kv=True` among the keywords writes K/V to `past_key_values`; without it the cache is only read.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache_position=cache_position,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


AutoConfig.register("sdar", SDARConfig, exist_ok=True)
AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM, exist_ok=True)
