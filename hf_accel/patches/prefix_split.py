"""prefix-split: attention of a denoising step to its frozen prefix and to its own block, apart, joined exactly.

A block-diffusion model reads one frozen prefix at every denoising step of a block. transformers' DiffusionGemma and
the SDAR class concatenate that prefix with the block's own K/V at every layer of every step: ``4 P Hkv D`` bytes (in a
half type) are written and read again only to be attended to once. Attention over two disjoint sets of keys needs no
such copy (FlashAttention, arXiv 2205.14135; joining parts by their log-sum-exp is Flash-Decoding's)::

    O = (exp(Lp - L) Op + exp(Lb - L) Ob),   L = log(exp(Lp) + exp(Lb))

with ``Op, Lp`` over the prefix and ``Ob, Lb`` over the block. Equal to the model's own attention up to rounding, for
any mask, cache or length, so it is also the dense path of the approximate methods (``quest``, ``losa``).

The prefix part packs the block's rows of all query heads that share a KV head into one tile and splits the keys over
the GPU (see ``kernels/paged_attention``). Nothing is to be set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.config import Config as Settings
from hf_accel.facts import Facts
from hf_accel.hosts.block_families import DIFFUSION_GEMMA, SDAR
from hf_accel.registry import register
from hf_accel.sites.prefix_attention.base import PrefixAttentionMethod
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.split import split_attention


@dataclass(frozen=True)
class PrefixSplitConfig(Settings):
    """No settings."""

    METHOD = "prefix-split"


@register
class PrefixSplit(PrefixAttentionMethod):
    name = "prefix-split"
    paper = "Flash-Decoding's merge by log-sum-exp, on FlashAttention (arXiv 2205.14135)"
    summary = "exact: the frozen prefix of a block-diffusion model is attended where it lies, never concatenated"
    facts = Facts(
        site="attention",
        needs=frozenset({"prefix cache"}),
        media=frozenset({"text"}),
        hosts=frozenset({"block diffusion"}),
        families=frozenset({SDAR.name, DIFFUSION_GEMMA.name}),
        exact=True,
        max_head_dim=512,
    )
    Config = PrefixSplitConfig
    traceable = True

    def attend(self, call: PrefixCall, state: Any) -> torch.Tensor:
        call.notes["density"] = 1.0
        return split_attention(call)
