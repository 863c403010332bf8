"""``dense``: routes attention through the seam and changes nothing. The baseline for measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.config import Config
from hf_accel.facts import Facts
from hf_accel.registry import register
from hf_accel.sites.attention.base import AttentionMethod


@dataclass(frozen=True)
class DenseConfig(Config):
    """No settings."""

    METHOD = "dense"


@register
class Dense(AttentionMethod):
    """The host's own attention, called through the seam: same output bit for bit, same counters and timers."""

    name = "dense"
    paper = "none"
    summary = "the host's own attention through the seam: the baseline for measuring"
    facts = Facts(
        site="attention",
        media=frozenset({"video", "image", "text"}),
        backward=True,
        causal=True,
        exact=True,
        dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        max_head_dim=2**31,
    )
    Config = DenseConfig

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        call.record_density(torch.ones(call.query.shape[:2], device=call.query.device))
        return call.dense()
