"""Stand-in of the remote code of Dream (``DreamModel``, the class with the head): names of Qwen2, attention over the
whole sequence both ways, logits shifted by one: the logits at position i are those of the token at i + 1.

``attention_mask`` is the text ``"full"``, None, or bool ``[B, 1, S, S]``; the sampler makes it from a 2-D one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)


class DreamConfig(Qwen2Config):
    """Qwen2's fields and the mask token."""

    model_type = "Dream"
    mask_token_id: int = 63


class DreamAttention(nn.Module):
    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=True)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_embeddings: tuple
    ) -> torch.Tensor:
        query, key, value = (
            p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        groups = query.shape[1] // key.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=attention_mask
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DreamDecoderLayer(nn.Module):
    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__()
        self.self_attn = DreamAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: tuple) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask, positions)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DreamPreTrainedModel(PreTrainedModel):
    config_class = DreamConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["DreamDecoderLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class DreamBaseModel(DreamPreTrainedModel):
    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | str | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = None if isinstance(attention_mask, str) else attention_mask
        positions = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask, positions)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class DreamModel(DreamPreTrainedModel):
    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | str | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Any = None,
        num_logits_to_keep: int = 0,
        **loss_kwargs: Any,
    ) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids, attention_mask, position_ids, inputs_embeds).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, -num_logits_to_keep:]).float())


def unshift(logits: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, S, V]`` as the sampler uses them: those of position i from the output at i - 1."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def build(seed: int = 0, **fields: Any) -> DreamModel:
    """A tiny model in eval mode, weights large enough that tokens depend on what is attended to."""
    tiny = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DreamModel(DreamConfig(**{**tiny, **fields})).eval()
