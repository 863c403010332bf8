"""Tiny random block-diffusion language models, with a head sharp enough that generations depend on the input."""

from __future__ import annotations

from typing import Any

import torch

TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "max_position_embeddings": 512,
}  # fmt: skip
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
}  # fmt: skip


def diffusion_gemma(*, seed: int = 0, canvas_length: int = 8, **overrides: Any) -> torch.nn.Module:
    """``DiffusionGemmaForBlockDiffusion`` in eval mode: two sliding (window 8) and two full layers, 97 tokens.

    Args:
        seed: of the weights; the global random state is left as it was.
        canvas_length: tokens of one block.
        **overrides: fields of ``DiffusionGemmaTextConfig``.
    """
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DiffusionGemmaTextConfig

    text = DiffusionGemmaTextConfig(**(TEXT | overrides))
    # No image token is in the vocabulary: a random canvas may hold any token.
    image = {name: text.vocab_size + i for i, name in enumerate(("image_token_id", "boi_token_id", "eoi_token_id"))}
    config = DiffusionGemmaConfig(text_config=text, vision_config=VISION, canvas_length=canvas_length, **image)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiffusionGemmaForBlockDiffusion(config).eval()
        # The initial scale 0.02 leaves all logits near 0: nothing that is computed would show in the tokens.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vision" not in name and parameter.ndim > 1:
                    parameter.mul_(8.0)
    return model
