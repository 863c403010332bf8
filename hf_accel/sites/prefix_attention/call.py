"""What a method sees of an attention call of a block-diffusion model: the block's K/V and the frozen prefix apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel.attention.call import Layer


@dataclass(slots=True)
class PrefixCall:
    """Attention of an active block against a frozen prefix and itself, after norm and rotary embedding.

    Attributes:
        query: ``[B, Hq, b, D]``.
        key, value: of the block, ``[B, Hkv, b, D]``.
        prefix_key, prefix_value: views of the cache ``[B, Hkv, P, D]``, any strides but 1 in the last dim. Never
            written, never copied as a whole.
        prefix_valid: bool ``[B, P]``, False hides padding and unused slots; None: all are visible.
        block_mask: bool ``[B or 1, 1, b, b]``, True = attend; None: every position sees the whole block.
        scale: factor of the logits.
        layer: which of the patched layers.
        index: denoising step within the block, 0 at its first.
        changed: bool ``[B, b]``, tokens that changed since the last step, or None.
        most_changed: the largest number of changed tokens of a row.
        dense: runs what the host would have run; returns ``[B, Hq, b, D]``.
        sliding: the layer's cache holds no more than a sliding window of the prefix.
        generation: number of the text; what is kept of a prefix is void in the next one.
        block: number of the block in it.
        request_state: what the method's ``new_request_state`` made.
        notes: where the call writes what happened: ``density`` (share of the prefix keys read, float or 0-d tensor),
            ``active`` (share of the block's rows computed anew), ``pages`` (read per KV head), ``exact`` (why all of
            the prefix was attended to), ``kernels``, ``fallback``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    prefix_valid: torch.Tensor | None
    block_mask: torch.Tensor | None
    scale: float
    layer: Layer
    index: int
    changed: torch.Tensor | None
    most_changed: int
    dense: Callable[[], torch.Tensor]
    sliding: bool = False
    generation: int = 0
    block: int = 0
    request_state: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> int:
        """Number of frozen positions P, padding included."""
        return self.prefix_key.shape[2]

    def fallback(self, reason: str) -> torch.Tensor:
        """Run the host's own attention and count it under ``reason`` in the report."""
        self.notes["fallback"] = reason
        return self.dense()

    def record_kernel(self, op: str, backend: str, reason: str) -> None:
        """Note which implementation of ``op`` ran and why. Kernels of ``hf_accel.kernels`` are noted by themselves."""
        self.notes.setdefault("kernels", {})[op] = (backend, reason)
