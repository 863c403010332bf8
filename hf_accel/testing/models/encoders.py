"""Tiny text encoders, and one forward of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _umt5() -> torch.nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=50))


def _clip_text() -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=4, eos_token_id=49, bos_token_id=48))


ENCODERS: dict[str, Callable[[], torch.nn.Module]] = {"umt5": _umt5, "clip-text": _clip_text}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A tiny encoder with fixed random weights, in eval mode."""
    torch.manual_seed(seed)
    return ENCODERS[name]().eval()


def run(model: torch.nn.Module, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """``[batch, 9, 32]``: the hidden states of random tokens."""
    ids = torch.randint(0, 48, (batch, 9), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids)[0]
