"""``radial``: Radial Attention, a static block mask whose windows shrink as frames grow apart.

Paper: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", arXiv 2506.19852.

After the softmax, attention between two tokens of a video falls off exponentially with their distance in time and in
the picture. So a frame sees itself and its neighbours whole; frames farther apart see each other through a window
around the same place, half as wide whenever the distance in frames doubles; and where the window would be smaller than
a block, only every second, fourth, ... of those frames is seen at all. The mask is the same for all heads, layers and
prompts: it is built once per shape.

Decisions where the paper and the released code differ or are silent:

* The windows, the stride of the gate and the rule that turns token windows into blocks are the released code's, and
  the maps equal its maps block for block. The paper's windows are 1 to 2 times as wide and end at one token.
* The code needs a video that fills whole blocks of 128, or breaks. Here any length works: a block that holds two
  frames is kept if one pair of frames in it asks for it (as in the code), a ragged last block is measured by the rows
  that it has, and a block always sees itself.
* Frames smaller than a block never met the code. They count as one block in the gate, so that neighbours see each
  other whole, and a block is judged by all frames in it together.
* ``block_size`` 64 is also the least window and the unit of the gate, as 128 is in the code.
* ``decay_factor`` scales the windows and not the gate (as in the code). None: no decay, every pair is kept.
* The sink (everybody sees the first frame) belongs to Wan in the code; ``sink="auto"`` gives it to all hosts without
  text in the sequence.
* Text sees and is seen by everything, in one map over the joint sequence. The code computes video and text apart and
  merges by log-sum-exp, which is the same thing.
* Gradients flow: longer videos are trained under the mask that they will be made with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.layout import VideoLayout, block_sizes
from hf_accel.attention.static import Recent, StaticBlocks
from hf_accel.config import setting
from hf_accel.facts import Facts
from hf_accel.kernels.block_sparse_attention import block_sparse_attention
from hf_accel.registry import register
from hf_accel.sites.attention.base import AttentionMethod, SparseAttentionConfig

# The rule of the released code by which a token mask becomes a block: a column counts as dense if more than a third of
# the block's rows keep it, and the block is kept if more than 3/5 of the columns that anybody keeps are dense.
DENSE_COLUMN = 3
DENSE_SHARE = (3, 5)


@dataclass(frozen=True)
class RadialConfig(SparseAttentionConfig):
    """Settings of :class:`Radial`. Names follow the released code, whose ``dense_timesteps`` is ``dense_steps``."""

    METHOD = "radial"

    decay_factor: int | float | None = setting(
        1.0, "factor on the windows between frames that are no neighbours; None keeps every pair", gt=0
    )
    block_size: int = setting(128, "tokens in a block, and the least window", choices=(64, 128))
    sink: str = setting(
        "auto",
        "whether everybody sees the first frame; auto: if no text is in the sequence, as published",
        choices=("auto", "first_frame", "none"),
    )


@register
class Radial(AttentionMethod):
    """One static block mask with spatial and temporal decay, for all heads and layers."""

    name = "radial"
    paper = "Radial Attention, arXiv 2506.19852"
    summary = "sparse video self-attention: a static mask whose windows shrink with the distance in frames"
    facts = Facts(
        site="attention",
        needs=frozenset({"token grid", "step", "text span"}),
        backward=True,
        full_budget={"decay_factor": None, "dense_steps": 0, "dense_layers": 0},
        budget="decay_factor",
    )
    Config = RadialConfig
    config: RadialConfig

    def __init__(self, config: RadialConfig):
        super().__init__(config)
        self._blocks: Recent[StaticBlocks] = Recent()

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        settings = self.config
        try:
            valid, layout = call.key_validity(), VideoLayout.of(call)
        except ValueError as error:
            return call.fallback(str(error))
        blocks = self.blocks(layout, call.query.device)
        out, _ = block_sparse_attention(
            call.query, call.key, call.value, blocks.index, blocks.count,
            block_size=settings.block_size, scale=call.scale, key_valid=valid, backend=settings.backend,
        )  # fmt: skip
        call.record_density(blocks.density.expand(call.query.shape[:2]))
        return out

    def blocks(self, layout: VideoLayout, device: torch.device) -> StaticBlocks:
        """The blocks kept at this shape, on ``device``; built at its first call."""
        settings = self.config

        def build() -> StaticBlocks:
            sink = settings.sink == "first_frame" or (settings.sink == "auto" and not layout.text_tokens)
            block_map = radial_map(layout, settings.decay_factor, settings.block_size, sink=sink)
            return StaticBlocks.of(block_map, layout.sequence, settings.block_size, device)

        return self._blocks.get((layout, device), build)


def radial_map(layout: VideoLayout, decay_factor: float | None, block_size: int, *, sink: bool) -> torch.Tensor:
    """Which key blocks each query block sees: bool ``[n, n]``, ``n = ceil(sequence / block_size)``.

    Args:
        decay_factor: factor on the windows; None keeps everything.
        sink: every query sees the first frame.
    """
    sizes = block_sizes(layout.sequence, block_size)
    if decay_factor is None:
        return torch.ones(len(sizes), len(sizes), dtype=torch.bool)
    window, gate = windows(layout, decay_factor, block_size)
    parts = Parts.of(layout, block_size)
    if layout.frame_tokens < block_size:  # no window is smaller than a block, so each is the whole frame
        block_map = whole_frames(parts, sizes, gate, sink)
    else:
        block_map = windowed_frames(parts, sizes, window, gate, sink)
    text = layout.text_blocks(block_size)
    return block_map | text | text[:, None] | torch.eye(len(sizes), dtype=torch.bool)


def windows(layout: VideoLayout, decay_factor: float, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For frames 0, 1, 2, ... apart: half-width of the window in tokens (int64 ``[F]``), and whether any is seen
    (bool ``[F]``)."""
    half, seen = [], []
    widest = 2 ** max(layout.frame_tokens, block_size).bit_length()
    for distance in range(layout.frames):
        length = widest / 2 ** distance.bit_length()
        half.append(layout.frame_tokens if distance <= 1 else max(math.floor(length * decay_factor), block_size))
        seen.append(distance % max(1, int(block_size / length)) == 0)
    return torch.tensor(half), torch.tensor(seen)


@dataclass(frozen=True)
class Parts:
    """The video cut at the borders of frames and of blocks: int64 ``[parts]`` each.

    ``first`` and ``stop`` count from the first token of the frame.
    """

    frame: torch.Tensor
    block: torch.Tensor
    first: torch.Tensor
    stop: torch.Tensor

    @classmethod
    def of(cls, layout: VideoLayout, block_size: int) -> Parts:
        frames = torch.arange(layout.start, layout.stop + 1, layout.frame_tokens)
        blocks = torch.arange(0, layout.sequence, block_size)
        inside = (blocks > layout.start) & (blocks < layout.stop)
        cuts = torch.cat([frames, blocks[inside]]).unique()
        begin, end = cuts[:-1], cuts[1:]
        frame = (begin - layout.start) // layout.frame_tokens
        origin = layout.start + frame * layout.frame_tokens
        return cls(frame, begin // block_size, begin - origin, end - origin)


def windowed_frames(
    parts: Parts, sizes: torch.Tensor, window: torch.Tensor, gate: torch.Tensor, sink: bool
) -> torch.Tensor:
    """The block map for frames of a block and more, where a block is kept if one pair of frames asks for it.

    In a pair of parts, key place l is kept by the query places k with ``|k - l| <= W``. At least c of the rows
    ``[r0, r1)`` do so iff ``r0 + c - 1 - W <= l <= r1 - c + W``, if there are c rows at all (W is never less than a
    block): the columns that enough rows keep are an interval, and nothing is done token by token.
    """
    block_map = torch.zeros(len(sizes), len(sizes), dtype=torch.bool)
    for frame in range(len(window)):  # one frame of queries at a time: the whole square would be large
        rows = parts.frame == frame
        first, stop, block = (x[rows][:, None] for x in (parts.first, parts.stop, parts.block))
        distance = (parts.frame - frame).abs()
        half, seen = window[distance], gate[distance]
        if sink:
            half, seen = half.where(parts.frame > 0, window[0]), seen | (parts.frame == 0)

        def columns(least, first=first, stop=stop, half=half):
            low = torch.maximum(parts.first, first + least - 1 - half)
            high = torch.minimum(parts.stop - 1, stop - least + half)
            return (high - low + 1).clamp(min=0).where(stop - first >= least, 0)

        kept = seen & dense_enough(columns(sizes[block] // DENSE_COLUMN + 1), columns(1))
        row, column = kept.nonzero(as_tuple=True)
        block_map[block[row, 0], parts.block[column]] = True
    return block_map


def whole_frames(parts: Parts, sizes: torch.Tensor, gate: torch.Tensor, sink: bool) -> torch.Tensor:
    """The block map for frames smaller than a block: a block is judged by all frames in it together."""
    frames = torch.arange(len(gate))
    seen = gate[(frames[:, None] - frames).abs()]
    if sink:
        seen[:, 0] = True
    tokens = torch.zeros(len(sizes), len(gate), dtype=torch.float64)  # of each frame in each block
    tokens[parts.block, parts.frame] = (parts.stop - parts.first).double()
    rows = tokens @ seen.double()  # of each block, that keep a token of each frame
    dense = (rows * DENSE_COLUMN > sizes[:, None]).double() @ tokens.T
    return dense_enough(dense, (rows > 0).double() @ tokens.T)


def dense_enough(dense: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Whether enough of the columns that are kept at all are kept by many rows."""
    share, whole = DENSE_SHARE
    return whole * dense > share * kept
