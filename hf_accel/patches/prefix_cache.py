"""An exact prefix cache for LLaDA2 in diffusers' ``LLaDA2Pipeline``.

*Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models*, Arriola et al., ICLR 2025, arXiv
2503.09573: blocks are causal among themselves, so the K/V of a finished block never change and can be kept, as in an
autoregressive model. LLaDA2 (arXiv 2512.15745) is of this kind, and its engines keep them. ``LLaDA2Pipeline`` keeps
nothing: every denoising step runs the whole window, prompt included. With P tokens in front of a block of b, T steps
cost T (P + b) rows there; here they cost P once per request, then ::

    first step of a block    2b rows   the block just finished, whose clean K/V are kept thereby, and the new one
    later steps               b rows

and attention of b (2b) queries over all keys. Logits are the same to rounding.

**It is used only where it is exact.** Whether the prefix is frozen is up to remote code, and versions differ: public
copies of that of 2.0 and 2.1 take 4-D masks only (the pipeline passes a 2-D one, and they raise, with and without this
method), a later one sees the whole window both ways under a 2-D mask. So the model's own forward and the cached one
both run on the first windows, and their logits of the active block are compared. Equal: the cache takes over. Not
equal: never, the report says why, and all outputs are the model's own, bit for bit.

Decisions of ours:

* **Prefill**: the prefix is run alone, through the model's own mask, not taken from a forward over the whole window:
  there a bidirectional model would have mixed the block into the prefix's K/V, and the comparison would see nothing.
* **How often to compare**: see ``Verdict`` in sites/kv_cache/llada2.py. A model of block size g freezes prefixes that
  are multiples of g, so lengths are compared until all those to come are multiples of what was found frozen: one or two
  windows. Again for another block length, with padding, in another dtype or attention implementation.
* **Tolerance** is of the difference's norm, relative to that of the logits, both centred over the vocabulary (softmax
  ignores the mean). In half precision different row counts take different kernels, and a mixture of experts may choose
  others, hence the wide bounds; a prefix that is not frozen misses them by far more.
* **Editing** (LLaDA2.1) changes tokens of the active block only. A callback may change others: the prefix is compared
  at every step, and prefilled again when it differs.
* **K/V end with the pipeline's call**; between calls, weights may change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_accel.config import Config, setting
from hf_accel.facts import Facts
from hf_accel.hosts.block_families import LLADA2
from hf_accel.registry import register
from hf_accel.sites.kv_cache.base import PrefixCacheMethod

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class PrefixCacheConfig(Config):
    """Settings of the prefix cache."""

    METHOD = "prefix-cache"

    tolerance: float | None = setting(
        None,
        "relative difference up to which logits count as equal; None: 1e-4 in fp32, 1e-2 in fp16, 5e-2 in bf16",
        gt=0,
        le=0.5,
    )


@register
class PrefixCache(PrefixCacheMethod):
    """K/V of finished blocks are kept where that changes nothing; see the module's docstring."""

    name = "prefix-cache"
    paper = "Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models, arXiv 2503.09573"
    summary = "LLaDA2Pipeline: K/V of finished blocks are kept, if comparing logits shows that nothing changes"
    facts = Facts(
        site="kv cache",
        needs=frozenset({"prefix cache"}),
        media=frozenset({"text"}),
        hosts=frozenset({"block diffusion"}),
        families=frozenset({LLADA2.name}),
        exact=True,
    )
    Config = PrefixCacheConfig
    config: PrefixCacheConfig

    def difference(self, native: torch.Tensor, cached: torch.Tensor, dtype: torch.dtype) -> str | None:
        limit = (
            TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) if self.config.tolerance is None else self.config.tolerance
        )
        found = relative_difference(native, cached)
        if found <= limit:
            return None
        return (
            f"the prefix is not frozen under this mask: logits of the active block differ by {found:.1e} with its K/V "
            f"kept (at most {limit:.0e} in {str(dtype).removeprefix('torch.')} counts as rounding)"
        )


def relative_difference(native: torch.Tensor, cached: torch.Tensor) -> float:
    """Norm of the difference of logits ``[B, b, V]`` relative to that of ``native``, of the worst batch item.

    Both are centred over the vocabulary, which leaves their softmax as it is. Waits for the device.
    """
    ours, theirs = (x.double() - x.double().mean(-1, keepdim=True) for x in (cached, native))
    gap = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1).clamp_min(1e-30)
    return float(gap.max())


__all__ = ["PrefixCache", "PrefixCacheConfig", "relative_difference"]
