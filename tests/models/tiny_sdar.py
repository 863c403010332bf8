"""A tiny random model of the SDAR class whose texts depend on everything that is computed, and prompts for it."""

from __future__ import annotations

import torch

from hf_accel_zoo.sdar import SDARConfig, SDARForCausalLM

BLOCK, MASK, PAD, VOCABULARY = 4, 90, 91, 92


def sdar(seed: int = 0, **overrides) -> SDARForCausalLM:
    """Three layers, hidden size 32, two query heads per KV head, blocks of 4, 128 positions, no stop token."""
    config = SDARConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "block_size": BLOCK, "mask_token_id": MASK, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": None,
    } | overrides)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SDARForCausalLM(config).eval()
    with torch.no_grad():  # at the initial scale all logits are alike: nothing that is computed would show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    """``[1, length]`` of ordinary tokens."""
    return torch.randint(MASK, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch, padded on the left, and its attention mask."""
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=PAD) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - p.shape[1] for p in prompts]).long()
    return ids, mask
