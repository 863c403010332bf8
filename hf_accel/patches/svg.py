"""``svg``: Sparse VideoGen, sparse self-attention for video DiTs with spatial and temporal heads.

Paper: "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity", arXiv 2502.01776.

A head of a video model looks either at its own and the neighbouring frames (spatial) or at the same place in all
frames (temporal). At every call a few rows are attended three times, with all keys, with those that a spatial head
keeps, and with those that a temporal head keeps; the smaller error says what the head is. The tokens of temporal heads
are brought from frame-major into token-major order, where their pattern is the band around the diagonal that spatial
heads have as they are. So one static block mask serves all heads.

Decisions where the paper and the released code differ or are silent:

* ``density`` is the share of query-key pairs that are computed, and the band is the one that comes closest with
  everything that is kept beside it: text, sink, whole blocks. The released code says ``sparsity`` for what is kept and
  counts the band and the text only; :func:`density_of` translates.
* A band of tokens in one of the two orders is the code's; the paper's spatial mask keeps whole frames.
* Blocks are kept whole, where the code cuts the band out of the blocks at its edge token by token.
* Heads are judged by the masks that they then run with, as the paper's algorithm has it. The code judges with masks
  of a fixed width of 2 or 1.5 frames, whatever the density.
* Sampled rows come from the whole video. The code samples the first 10,000, because it stores their masks; here the
  masks of the sampled rows are read off the block mask.
* Rows are drawn by a generator of the layer and the call, so that a generation is reproducible and nobody's global
  random state moves.
* The sink (everybody sees the first frame's worth of tokens) is in the code for models without text in the sequence,
  and in the order of the head: a temporal head sees the first places of all frames. ``sink="auto"`` does as the code.
* Padded text is hidden as a key and computed as a query, as the host's own mask has it; the code lets padding attend to
  padding. The video output is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.layout import VideoLayout, block_sizes, expand_heads, inverse_order
from hf_accel.attention.static import Recent, StaticBlocks
from hf_accel.config import setting
from hf_accel.facts import Facts
from hf_accel.kernels.block_sparse_attention import block_sparse_attention
from hf_accel.kernels.permute import gather_rows, scatter_rows
from hf_accel.registry import register
from hf_accel.sites.attention.base import AttentionMethod, SparseAttentionConfig


@dataclass(frozen=True)
class SVGConfig(SparseAttentionConfig):
    """Settings of :class:`SVG`. Names follow the released code, but for its ``sparsity``, which is ``density``."""

    METHOD = "svg"

    density: float = setting(0.25, "share of query-key pairs to compute; 1 is dense", gt=0, le=1)
    num_sampled_rows: int = setting(64, "query rows that decide what a head is", ge=1)
    block_size: int = setting(128, "tokens in a block", choices=(64, 128))
    sink: str = setting(
        "auto",
        "whether everybody sees the first frame's worth of tokens; auto: if no text is in the sequence, as published",
        choices=("auto", "first_frame", "none"),
    )
    dense_steps: int | float = setting(0.2, "first steps that stay dense", share=True)
    dense_layers: int | float = setting(0.03, "first layers that stay dense", share=True)


@dataclass(frozen=True)
class Shape:
    """What one shape of sequence needs, on its device.

    Attributes:
        layout: the shape.
        blocks: the mask, in the order of the head.
        order: int32 ``[2, S]``: the tokens in the order of a spatial (0) and of a temporal head (1).
        block_of: int64 ``[2, S]``: the block that a token stands in, in either order.
    """

    layout: VideoLayout
    blocks: StaticBlocks
    order: torch.Tensor
    block_of: torch.Tensor

    @classmethod
    def build(cls, layout: VideoLayout, blocks: StaticBlocks, block_size: int, device: torch.device) -> Shape:
        temporal = layout.token_major_order()
        order = torch.stack([torch.arange(layout.sequence, dtype=torch.int32), temporal])
        block_of = torch.stack([order[0], inverse_order(temporal)]).long() // block_size
        return cls(layout, blocks, order.to(device), block_of.to(device))

    def masks(self, rows: torch.Tensor) -> torch.Tensor:
        """What a spatial and a temporal head lets the tokens ``rows`` ``[t]`` see: bool ``[2, t, S]``, token by token
        in the order of the sequence."""
        query, key = self.block_of[:, rows, None], self.block_of[:, None, :]
        return self.blocks.block_map[query, key]


@dataclass
class Draws:
    """State of one layer for one generation: how often rows were drawn."""

    count: int = 0


@register
class SVG(AttentionMethod):
    """Spatial and temporal heads, told apart at every call, under one band of blocks."""

    name = "svg"
    paper = "Sparse VideoGen, arXiv 2502.01776"
    summary = "sparse video self-attention: spatial or temporal heads by online profiling, one static band"
    facts = Facts(
        site="attention",
        needs=frozenset({"token grid", "step", "text span"}),
        full_budget={"density": 1.0, "dense_steps": 0, "dense_layers": 0},
        budget="density",
    )
    Config = SVGConfig
    config: SVGConfig

    def __init__(self, config: SVGConfig):
        super().__init__(config)
        self._shapes: Recent[Shape] = Recent()

    def new_state(self) -> Draws:
        return Draws()

    def attend(self, call: AttentionCall, state: Draws) -> torch.Tensor:
        settings = self.config
        try:
            valid, layout = call.key_validity(), VideoLayout.of(call)
        except ValueError as error:
            return call.fallback(str(error))
        if valid is not None and not layout.text_tokens:
            return call.fallback("a mask over video tokens")
        shape = self.shape(layout, call.query.device)
        query, key, value = call.query, *(expand_heads(x, call.query.shape[1]) for x in (call.key, call.value))

        temporal = self.temporal_heads(query, key, value, call.scale, valid, shape, self.draw(call, state, layout))
        order = torch.where(temporal[..., None], shape.order[1], shape.order[0])
        # Text does not move: the validity of keys is the same in every order.
        query, key, value = gather_rows((query, key, value), order, backend=settings.backend)
        out, _ = block_sparse_attention(
            query, key, value, shape.blocks.index, shape.blocks.count,
            block_size=settings.block_size, scale=call.scale, key_valid=valid, backend=settings.backend,
        )  # fmt: skip
        call.record_density(shape.blocks.density.expand(query.shape[:2]))
        return scatter_rows(out, order, backend=settings.backend)

    def draw(self, call: AttentionCall, state: Draws, layout: VideoLayout) -> torch.Tensor:
        """Video tokens to judge heads by: int64 ``[t]``, other ones at every call."""
        device = call.query.device
        seed = state.count * call.layer.count + call.layer.index
        state.count += 1
        generator = torch.Generator(device).manual_seed(seed)
        size = (self.config.num_sampled_rows,)
        return torch.randint(layout.start, layout.stop, size, generator=generator, device=device)

    @staticmethod
    def temporal_heads(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        valid: torch.Tensor | None,
        shape: Shape,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Which heads lose less under the temporal than under the spatial mask: bool ``[B, H]``; a tie is spatial.

        Args:
            query, key, value: ``[B, H, S, D]``.
            valid: bool ``[B, S]``, keys that are seen at all, or None.
            rows: int64 ``[t]``, the queries that are looked at.
        """
        masks = shape.masks(rows)
        masks = torch.cat([torch.ones_like(masks[:1]), masks]).flatten(0, 1)  # [3t, S]: all keys, spatial, temporal
        mask = masks if valid is None else masks & valid[:, None, None, :]
        # One walk over the keys serves all three masks.
        sampled = query[:, :, rows].repeat(1, 1, 3, 1)
        out = torch.nn.functional.scaled_dot_product_attention(sampled, key, value, mask, scale=scale)
        full, spatial, temporal = out.float().chunk(3, dim=2)
        return (temporal - full).square().mean((-2, -1)) < (spatial - full).square().mean((-2, -1))

    def shape(self, layout: VideoLayout, device: torch.device) -> Shape:
        """Mask and orders of this shape, on ``device``; built at its first call."""
        settings = self.config

        def build() -> Shape:
            sink = settings.sink == "first_frame" or (settings.sink == "auto" and not layout.text_tokens)
            block_map = band_map(layout, settings.density, settings.block_size, sink=sink)
            blocks = StaticBlocks.of(block_map, layout.sequence, settings.block_size, device)
            return Shape.build(layout, blocks, settings.block_size, device)

        return self._shapes.get((layout, device), build)


def band_map(layout: VideoLayout, density: float, block_size: int, *, sink: bool) -> torch.Tensor:
    """The band of blocks whose density is closest to ``density``: bool ``[n, n]``, ``n = ceil(sequence / block_size)``.

    A density below that of the thinnest band gives the thinnest band.
    """
    reach = reaches(layout, block_size, sink=sink)
    if density >= 1:
        return torch.ones_like(reach, dtype=torch.bool)
    return reach <= (densities(layout, block_size, reach) - density).abs().argmin()


def reaches(layout: VideoLayout, block_size: int, *, sink: bool) -> torch.Tensor:
    """The half-width, in blocks, from which on a band holds a block: int64 ``[n, n]``. 0 for what is always kept, which
    is the diagonal, text in either place, and with ``sink`` the first frame's worth of video keys."""
    block = torch.arange(len(block_sizes(layout.sequence, block_size)))
    text = layout.text_blocks(block_size)
    always = text | text[:, None]
    if sink:
        always |= layout.blocks_touching(layout.start, layout.start + layout.frame_tokens, block_size)
    return (block[:, None] - block).abs().masked_fill(always, 0)


def densities(layout: VideoLayout, block_size: int, reach: torch.Tensor) -> torch.Tensor:
    """Share of the token pairs that a band of half-width 0, 1, 2, ... blocks keeps: fp64, ends in 1."""
    sizes = block_sizes(layout.sequence, block_size).double()
    pairs = (sizes[:, None] * sizes).flatten()
    return torch.bincount(reach.flatten(), pairs).cumsum(0) / pairs.sum()


def released_half_width(sparsity: float, layout: VideoLayout) -> int:
    """The half-width in tokens of the band that the released code runs at its setting ``sparsity``.

    A band of half-width n keeps ``1 - (1 - n / L)^2`` of the pairs; what is wanted is the ``sparsity`` less the text's
    rows and columns. The code has blocks of 128, rounded up without text in the sequence and down with it.
    """
    length = layout.sequence
    wanted = max(0.0, sparsity - 2 * layout.text_tokens / length)
    blocks = length * (1 - math.sqrt(1 - wanted)) / 128
    return 128 * (math.floor(blocks) if layout.text_tokens else math.ceil(blocks))


def density_of(sparsity: float, layout: VideoLayout) -> float:
    """The ``density`` that gives the band of the released code's ``sparsity``, in blocks of 128."""
    reach = reaches(layout, 128, sink=not layout.text_tokens)
    return float(densities(layout, 128, reach)[released_half_width(sparsity, layout) // 128])
