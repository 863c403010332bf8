"""A K/V cache in 8 bits: every token of a head is rounded with a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_accel.config import Config, setting
from hf_accel.method import CodecMethod, Facts


@dataclass(frozen=True)
class Int8CacheConfig(Config):
    METHOD = "int8-cache"
    # The base class honours these two by their names.
    window: int = setting(64, "the newest tokens that stay exact", ge=0)
    group_size: int = setting(32, "tokens that are encoded at a time", ge=1)


class Int8Cache(CodecMethod):
    name, paper, summary = "int8-cache", "none", "keys and values in 8 bits behind an exact window"
    facts = Facts(
        sites=frozenset({"kv cache: codec"}),
        media=frozenset({"text"}),
        hosts=frozenset({"language model"}),
        full_budget={"window": 10**6},  # then no token is ever encoded
    )
    Config = Int8CacheConfig

    def encode(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple:
        return _rounded(keys), _rounded(values)

    def decode(self, codes: tuple, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        (keys, key_scale), (values, value_scale) = codes
        return keys * key_scale, values * value_scale


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 ``[B, H, S, D]`` and their scales ``[B, H, S, 1]`` in the dtype of ``x``."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1)
    # The scale was rounded to the dtype of x, so that the largest value can land on 128, which int8 has not.
    codes = (x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return codes, scale
