"""What a method sees of one attention call: the same object from every host model.

Everything here is plain data. The hosts fill it, the methods read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

TextPlace = Literal["none", "first", "last"]
Span = tuple[int, int]


def span_of(tokens: int, sequence: int, text: TextPlace) -> Span | None:
    """``(start, stop)`` of so many video or image tokens in a sequence of that length, all the rest of which is text in
    that place; None if they disagree."""
    if sequence == tokens:
        return 0, sequence
    if sequence < tokens or text == "none":
        return None
    return (0, tokens) if text == "last" else (sequence - tokens, sequence)


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The lattice of video (or image) tokens in the sequence, in latent patches, frame-major.

    Attributes:
        frames, height, width: size of the lattice; an image has ``frames == 1``.
        text: where text tokens stand in the *same* sequence: before the video, after it, or not at all.
    """

    frames: int
    height: int
    width: int
    text: TextPlace = "none"

    @property
    def tokens(self) -> int:
        """Number of video tokens."""
        return self.frames * self.height * self.width

    def video_span(self, sequence: int) -> Span | None:
        """``(start, stop)`` of the video tokens in a sequence of that length, or None if the grid disagrees."""
        return span_of(self.tokens, sequence, self.text)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class Step:
    """Where the denoising loop stands.

    Attributes:
        index: 0-based step of this generation; one step may hold several forwards (CFG branches).
        count: number of steps of this generation, or None where the host cannot know it.
        timestep: the noise level as the model received it; NaN where the step is known without reading it.
        progress: share of the schedule that lies behind, 0 at the first step. From ``index / count`` where the
            count is known, else from the fall of the timestep.
        branch: ``"cond"``/``"uncond"``/... where the pipeline names it, else ``"call0"``, ``"call1"``, ...
        generation: number of the generation of this request; state never lives longer than one.
        tile: which of the inputs of this step, where its forwards have several (tiles of one picture); guidance
            branches have one.
    """

    index: int
    count: int | None
    timestep: float
    progress: float
    branch: str
    generation: int
    tile: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """One patched attention module: dotted name in its model, index among ``count`` patched layers."""

    name: str
    index: int
    count: int


@dataclass(slots=True)
class AttentionCall:
    """One call of scaled dot-product attention, after norm and rotary embedding.

    Attributes:
        query: ``[B, H, Sq, D]``; key, value: ``[B, Hkv, Sk, D]``. Views with arbitrary strides.
        mask: what the host handed to its attention (bool, True = attend, or additive), broadcastable to
            ``[B, H, Sq, Sk]``, or None.
        scale: factor of the logits, never None.
        causal: whether the host asked for a causal mask.
        layer, grid, step: the context. ``grid`` is None where the host cannot tell; methods that declare the need
            "token grid" only see calls whose grid fits the sequence.
        order: place r of the video tokens holds raster token ``order[r]``, int64 ``[grid.tokens]``; None: the grid's
            own, frame-major order.
        item: 0, or the batch item where the host calls attention once per item (Mochi).
        dense: runs what the host would have run; returns ``[B, H, Sq, D]``.
        shown: ``(start, stop)`` of the video or image tokens among the queries, where it is known though their grid is
            not (several pictures in one sequence); see :attr:`span`.
        notes: where the call writes what happened (``density``, ``kernels``, ``fallback``, ``break_even``); read by the
            report.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    causal: bool
    layer: Layer
    grid: TokenGrid | None
    step: Step
    dense: Callable[[], torch.Tensor]
    item: int = 0
    order: torch.Tensor | None = None
    shown: Span | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_grad(self) -> bool:
        """Whether gradients must flow through this call."""
        tensors = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def span(self) -> Span | None:
        """``(start, stop)`` of the video or image tokens in a self-attention; all others are text. None where that is
        not known."""
        if self.query.shape[2] != self.key.shape[2]:
            return None
        return self.grid.video_span(self.query.shape[2]) if self.grid is not None else self.shown

    def fallback(self, reason: str) -> torch.Tensor:
        """Run dense attention and count it under ``reason`` in the report."""
        self.notes["fallback"] = reason
        return self.dense()

    def record_density(self, density: torch.Tensor) -> None:
        """Note the share of query-key pairs computed, ``[B, H]`` (kept on its device, read when asked)."""
        self.notes["density"] = density.detach()

    def record_kernel(self, op: str, backend: str, reason: str) -> None:
        """Note which implementation of ``op`` ran and why. Kernels of ``hf_accel.kernels`` are noted by themselves."""
        self.notes.setdefault("kernels", {})[op] = (backend, reason)

    def key_validity(self) -> torch.Tensor | None:
        """The mask as ``[B, Sk]`` bool if it only hides keys, the same for every head and query.

        Raises:
            ValueError: the mask depends on the head or the query, so it is no key mask.
        """
        if self.mask is None:
            return None
        mask = self.mask
        while mask.ndim < 4:
            mask = mask.unsqueeze(0)
        if mask.shape[1] != 1 or mask.shape[2] != 1:
            raise ValueError(f"a mask of shape {tuple(self.mask.shape)} differs between queries or heads")
        if mask.dtype != torch.bool:
            raise ValueError("an additive mask is not a key mask")
        return mask[:, 0, 0, :].expand(self.key.shape[0], self.key.shape[2])
