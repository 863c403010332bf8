"""Stand-in of the remote code of LLaDA2 (``LLaDA2MoeModelLM``): fused query/key/value projection, norms of queries and
keys, half of each head rotated, mixture of experts after the first layer, K/V cache, float32 logits.

Which positions see which under a 2-D mask is a field of the configuration, since published versions differ: some take
4-D masks only, one makes the 2-D mask bidirectional over the whole window. A 4-D mask (bool, or additive) is used as it
comes, ``[B, 1, S, keys]``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm, repeat_kv, rotate_half

FORMS = ("block-causal", "bidirectional", "causal", "4-D only")


class LLaDA2MoeConfig(PretrainedConfig):
    """Fields of the published configuration, and two of ours: ``block_size`` and ``two_d_mask`` (one of FORMS)."""

    model_type = "llada2_moe"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 32,
        intermediate_size: int = 48,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 8,
        hidden_act: str = "silu",
        use_qk_norm: bool = True,
        partial_rotary_factor: float = 0.5,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        num_shared_experts: int = 1,
        moe_intermediate_size: int = 16,
        first_k_dense_replace: int = 1,
        routed_scaling_factor: float = 2.5,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = False,
        block_size: int = 8,
        two_d_mask: str = "block-causal",
        **kwargs: Any,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.head_dim = num_hidden_layers, head_dim
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.hidden_act, self.use_qk_norm = hidden_act, use_qk_norm
        self.partial_rotary_factor, self.rope_theta = partial_rotary_factor, rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.num_shared_experts, self.moe_intermediate_size = num_shared_experts, moe_intermediate_size
        self.first_k_dense_replace, self.routed_scaling_factor = first_k_dense_replace, routed_scaling_factor
        self.max_position_embeddings, self.initializer_range = max_position_embeddings, initializer_range
        self.use_cache = use_cache
        self.block_size, self.two_d_mask = block_size, two_d_mask
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)


class LLaDA2MoeMLP(Qwen2MLP):
    def __init__(self, config: LLaDA2MoeConfig, intermediate_size: int):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)


class LLaDA2MoeGate(nn.Module):
    """Sigmoid scores; experts are chosen with a bias that does not weigh their outputs."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.top_k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.sigmoid(hidden.float() @ self.weight.float().T)
        chosen = (scores + self.expert_bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return chosen, (self.scaling * weights / weights.sum(-1, keepdim=True)).to(hidden.dtype)


class LLaDA2MoeSparseMoeBlock(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        size = config.moe_intermediate_size
        self.experts = nn.ModuleList(LLaDA2MoeMLP(config, size) for _ in range(config.num_experts))
        self.gate = LLaDA2MoeGate(config)
        self.shared_experts = LLaDA2MoeMLP(config, size * config.num_shared_experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        chosen, weights = self.gate(flat)
        out = self.shared_experts(flat)
        for index, expert in enumerate(self.experts):
            rows, place = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.view_as(hidden)


class LLaDA2MoeRotaryEmbedding(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.theta, self.dim = config.rope_theta, int(config.head_dim * config.partial_rotary_factor)

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = self.theta ** (-torch.arange(0, self.dim, 2, device=hidden.device).float() / self.dim)
        angles = (position_ids[..., None].float() * inverse).repeat(1, 1, 2)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first dims of each head ``[B, H, S, D]`` by ``[B, S, rotated]``."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos[:, None] + rotate_half(turned) * sin[:, None], rest], dim=-1)


class LLaDA2MoeAttention(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        if config.use_qk_norm:
            self.query_layernorm = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, Any]:
        heads = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split([self.num_heads, self.num_key_value_heads, self.num_key_value_heads], dim=1)
        if self.config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        query, key = (rotate(x, *position_embeddings) for x in (query, key))
        if past_key_value is not None:
            key, value = past_key_value.update(key, value, self.layer_idx)
        groups = self.num_heads // self.num_key_value_heads
        out = nn.functional.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=attention_mask
        )
        return self.dense(out.transpose(1, 2).flatten(2)), None, past_key_value


class LLaDA2MoeDecoderLayer(nn.Module):
    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = LLaDA2MoeMLP(config, config.intermediate_size) if dense else LLaDA2MoeSparseMoeBlock(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        out, _, present = self.attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + out
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), present


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["LLaDA2MoeDecoderLayer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, LLaDA2MoeGate):
            nn.init.normal_(module.weight, std=std)
            nn.init.normal_(module.expert_bias, std=0.1)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LLaDA2MoeRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        mask = self._mask(attention_mask, hidden, past)
        positions = self.rotary_emb(hidden, position_ids)
        states = [hidden]
        for layer in self.layers:
            hidden, _ = layer(
                hidden, attention_mask=mask, position_ids=position_ids, past_key_value=past_key_values,
                use_cache=use_cache, position_embeddings=positions,
            )  # fmt: skip
            states.append(hidden)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _mask(self, mask: torch.Tensor | None, hidden: torch.Tensor, past: int) -> torch.Tensor:
        """Additive ``[B, 1, S, past + S]``."""
        rows, queries = hidden.shape[:2]
        keys = past + queries
        if mask is not None and mask.ndim == 4:
            if mask.shape != (rows, 1, queries, keys):
                raise ValueError(f"a 4-D mask must be {(rows, 1, queries, keys)}, got {tuple(mask.shape)}")
            return _additive(mask, hidden.dtype) if mask.dtype == torch.bool else mask.to(hidden.dtype)
        if self.config.two_d_mask == "4-D only":
            raise ValueError(f"only a block attention mask of shape {(rows, 1, queries, keys)} is supported")
        visible = torch.ones(rows, keys, dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
        key, query = torch.arange(keys, device=hidden.device), torch.arange(past, keys, device=hidden.device)
        size = {"causal": 1, "bidirectional": keys, "block-causal": self.config.block_size}[self.config.two_d_mask]
        ends = (query // size + 1) * size
        return _additive((key < ends[:, None]) & visible[:, None, None], hidden.dtype)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, torch.finfo(dtype).min)


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel):
    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(out.last_hidden_state).float()
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


def build(seed: int = 0, **fields: Any) -> LLaDA2MoeModelLM:
    """A tiny model in eval mode, weights large enough that tokens depend on what is attended to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LLaDA2MoeModelLM(LLaDA2MoeConfig(**{"initializer_range": 0.25, **fields})).eval()
