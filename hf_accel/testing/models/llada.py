"""Stand-in of the remote code of LLaDA (``LLaDAModelLM``): names of OLMo, attention over the whole sequence both ways.

As in the published code there is no K/V cache: ``past_key_values`` is in the signature, and refused.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb


class LLaDAConfig(PretrainedConfig):
    """Fields of the published configuration that matter here."""

    model_type = "llada"

    def __init__(
        self,
        vocab_size: int = 64,
        d_model: int = 32,
        n_layers: int = 2,
        n_heads: int = 4,
        mlp_hidden_size: int = 48,
        max_sequence_length: int = 4096,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        mask_token_id: int = 63,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.vocab_size = self.embedding_size = vocab_size
        self.d_model = self.hidden_size = d_model
        self.n_layers = self.num_hidden_layers = n_layers
        self.n_heads = self.num_attention_heads = n_heads
        self.mlp_hidden_size, self.max_sequence_length = mlp_hidden_size, max_sequence_length
        self.rope_theta, self.rms_norm_eps, self.weight_tying = rope_theta, rms_norm_eps, weight_tying
        self.mask_token_id, self.initializer_range = mask_token_id, initializer_range
        super().__init__(tie_word_embeddings=weight_tying, **kwargs)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, config: LLaDAConfig):
        super().__init__()
        width, inner = config.d_model, config.mlp_hidden_size
        self.config = config
        self.attn_norm = Qwen2RMSNorm(width, eps=config.rms_norm_eps)
        self.ff_norm = Qwen2RMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, positions: tuple, attention_bias: torch.Tensor | None = None) -> torch.Tensor:
        h = self.attn_norm(x)
        heads = [p(h).unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj)]
        query, key = apply_rotary_pos_emb(*heads, *positions)
        value = self.v_proj(h).unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_bias)
        x = x + self.attn_out(out.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(nn.Module):
    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.config = config
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "ln_f": Qwen2RMSNorm(config.d_model, eps=config.rms_norm_eps),
            "blocks": nn.ModuleList(LLaDALlamaBlock(config) for _ in range(config.n_layers)),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(parts)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.transformer.wte(input_ids) if input_embeddings is None else input_embeddings
        dim = self.config.d_model // self.config.n_heads
        inverse = self.config.rope_theta ** (-torch.arange(0, dim, 2, device=x.device).float() / dim)
        angles = (torch.arange(x.shape[1], device=x.device)[:, None] * inverse).repeat(1, 2)[None]
        bias = attention_bias
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            hidden = ~attention_mask.bool()[:, None, None]
            bias = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(
                hidden, torch.finfo(x.dtype).min
            )
        for block in self.transformer.blocks:
            x = block(x, (angles.cos().to(x.dtype), angles.sin().to(x.dtype)), bias)
        x = self.transformer.ln_f(x)
        tied = self.config.weight_tying
        return nn.functional.linear(x, self.transformer.wte.weight) if tied else self.transformer.ff_out(x)


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["LLaDALlamaBlock"]

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer.wte if self.config.weight_tying else self.model.transformer.ff_out

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Any = None,
    ) -> CausalLMOutputWithPast:
        if use_cache or past_key_values is not None:
            raise ValueError("LLaDA has no K/V cache: its attention is over the whole sequence, both ways")
        return CausalLMOutputWithPast(logits=self.model(input_ids, inputs_embeds, attention_mask, attention_bias))


def build(seed: int = 0, **fields: Any) -> LLaDAModelLM:
    """A tiny model in eval mode, weights large enough that tokens depend on what is attended to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LLaDAModelLM(LLaDAConfig(**{"initializer_range": 0.25, **fields})).eval()
