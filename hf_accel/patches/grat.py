"""``grat``: whole tiles of the token grid attend to whole tiles, by a static map.

Paper: "Grouping First, Attending Smartly: Training-Free Acceleration for Diffusion Transformers", arXiv 2505.14687.

The grid is cut into tiles, and tokens stand tile by tile. All queries of a tile share one set of keys: the tiles around
it (``B``) or those in its row and column (``X``; for video: in its time, height or width plane). Text sees everything
and is seen by everything. The map follows from the shape alone, so there is nothing to estimate and no state.

Decisions where the paper and the released code (GRAT-X for HunyuanVideo only) differ or are silent:

* ``X`` of a video is the union of three planes, as in the code; the paper's density of 39.2 % (HunyuanVideo) counts
  their overlaps twice, the map keeps 34.4 %.
* ``B`` is clipped at the borders of the grid (inferred); the paper's density of 5.7 % is that of inner tiles, the mean
  over all is 4.3 %.
* A grid that its tiles do not divide has smaller tiles at its far ends; the released code drops the rest silently.
* Tokens are put tile by tile once, at the model's entry, and back at its exit, with all that belongs to single tokens
  (``sites/attention/token_order.py``); the released code does both in every attention call. Where a model or a forward
  does not allow it, so does this one.
* Valid text comes from the host's mask, not from a second run of the tokenizer. Padded text is hidden as a key and
  computed as a query.
* ``dense_steps`` and ``dense_layers`` exist as in every method; the paper has neither, hence the defaults of 0. A dense
  step on reordered tokens is exact: attention does not know their order.
* A video of one frame is tiled like an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel.attention.call import AttentionCall, TokenGrid
from hf_accel.attention.layout import expand_heads
from hf_accel.attention.static import Recent
from hf_accel.attention.tiles import Tiling, cross_map, fill_tiles, neighbour_map
from hf_accel.config import setting
from hf_accel.errors import InvalidSetting
from hf_accel.facts import Facts
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.kernels.block_sparse_attention import block_map_to_index, block_sparse_attention
from hf_accel.kernels.permute import gather_rows
from hf_accel.kernels.variable_block_attention import variable_block_attention
from hf_accel.ledger import Ledger
from hf_accel.registry import register
from hf_accel.report import MethodReport
from hf_accel.sites.attention import token_order
from hf_accel.sites.attention.base import AttentionMethod, SparseAttentionConfig
from hf_accel.sites.attention.seam import AttentionSeams

IMAGE_TILE = (1, 16, 16)
VIDEO_TILE = (4, 8, 8)
BLOCKS = (128, 64)  # of the fixed-block kernel
# 2048 x 2048 pixels at 16 per token. Below, even B keeps more than a tenth of the pairs.
WORTHWHILE_IMAGE = 128 * 128


@dataclass(frozen=True)
class GRATConfig(SparseAttentionConfig):
    """Settings of :class:`GRAT`. Group sizes and radius are the paper's."""

    METHOD = "grat"

    variant: str = setting("B", "tiles around each tile (B) or in its row and column (X)", choices=("B", "X"))
    group_size: tuple[int, int, int] | None = setting(
        None, "frames, rows and columns of a tile in tokens; null: (1, 16, 16) for images, (4, 8, 8) for videos"
    )
    b: int = setting(1, "radius of variant B in tiles, along every axis", ge=0)
    hoist: str | bool = setting(
        "auto", "put tokens tile by tile at the model's entry where it can be, or in every attention call (false)",
        choices=("auto", False),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None and min(self.group_size) < 1:
            raise InvalidSetting(self.METHOD, "group_size", self.group_size, "three counts of tokens, each >= 1")


@dataclass(frozen=True)
class Plan:
    """Where the tokens of one shape stand while they attend, on their device.

    Attributes:
        rows: int64 ``[R]``, the token of the sequence that stands at each row of the kernel; None: they agree.
        back: int64 ``[S]``, the row of each token; None like ``rows``.
        video: rows of the video, if text is behind it.
        pairs: kept pairs of video tokens.
        density: fp32 ``[1, 1]``, if no text is hidden.
    """

    rows: torch.Tensor | None
    back: torch.Tensor | None
    video: int
    pairs: int
    density: torch.Tensor


@dataclass(frozen=True)
class FixedPlan(Plan):
    """For the kernel of fixed blocks: a tile is several of them.

    Attributes:
        block: tokens of a block.
        index, count: kept blocks of each block, int32 ``[1, 1, n, max_keep]`` and ``[1, 1, n]``.
        real: bool ``[R]``, False where a row only fills up a tile; None: nowhere.
    """

    block: int
    index: torch.Tensor
    count: torch.Tensor
    real: torch.Tensor | None


@dataclass(frozen=True)
class VariablePlan(Plan):
    """For the kernel of variable blocks: a tile is one, and so is the text.

    Attributes:
        keep: bool ``[1, 1, C, C]``.
        sizes: int32 ``[1, 1, C]``.
    """

    keep: torch.Tensor
    sizes: torch.Tensor


@register
class GRAT(AttentionMethod):
    """Static attention between tiles of neighbouring tokens."""

    name = "grat"
    paper = "Grouping First, Attending Smartly (GRAT), arXiv 2505.14687"
    summary = "sparse self-attention of images and videos: each tile of tokens sees nearby tiles or its row and column"
    facts = Facts(
        site="attention",
        needs=frozenset({"token grid", "text span"}),
        media=frozenset({"video", "image"}),
        backward=True,
        full_budget={"variant": "B", "b": 1_000_000, "dense_steps": 0, "dense_layers": 0},
    )
    Config = GRATConfig
    config: GRATConfig

    def __init__(self, config: GRATConfig):
        super().__init__(config)
        self._plans: Recent[FixedPlan | VariablePlan] = Recent()
        self._order: token_order.TokenOrder | None = None
        self._reason = "hoist=False was set"
        self._notes: list[str] = []

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> AttentionSeams:
        seams = super().install(model, ledger, report, clock)
        self._notes = report.notes
        if self.config.hoist == "auto":
            reason = token_order.why_not(model.module)
            if reason is None:
                self._order = token_order.hoist(model.module, seams, self.order_of, ledger)
            else:
                self._reason = reason
        return seams

    def tiling(self, grid: TokenGrid) -> Tiling:
        """The tiles of a grid."""
        default = IMAGE_TILE if grid.frames == 1 else VIDEO_TILE
        return Tiling((grid.frames, grid.height, grid.width), self.config.group_size or default)

    def order_of(self, grid: TokenGrid) -> torch.Tensor:
        """Raster tokens in the order of their tiles, int64 ``[grid.tokens]``."""
        return self.tiling(grid).order()

    def tile_map(self, grid: TokenGrid) -> torch.Tensor:
        """Which tiles see which: bool ``[tiles, tiles]``, symmetric."""
        counts = self.tiling(grid).counts
        if self.config.variant == "X":
            return cross_map(counts, (1, 2) if grid.frames == 1 else (0, 1, 2))
        return neighbour_map(counts, self.config.b)

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        try:
            valid = call.key_validity()
        except ValueError as error:
            return call.fallback(str(error))
        grid, sequence = call.grid, call.query.shape[2]
        if grid is None or (valid is not None and grid.tokens == sequence):
            return call.fallback("a mask over image or video tokens")
        key = (grid, sequence, call.order is None, valid is None, call.needs_grad, call.query.device)
        plan = self._plans.get(key, lambda: self._plan(call, grid, valid is not None))
        if isinstance(plan, FixedPlan):
            out = self._fixed(call, plan, valid)
        else:
            out = self._variable(call, plan, valid)
        if call.order is not None:
            call.record_kernel("token_order", "at entry and exit", "once per forward")
        else:
            reason = (
                self._reason if self._order is None else self._order.reason or "the entry of the model was not passed"
            )
            call.record_kernel("token_order", "in every call", reason)
        call.record_density(_density(call, plan, valid, grid.tokens))
        return out

    def _fixed(self, call: AttentionCall, plan: FixedPlan, valid: torch.Tensor | None) -> torch.Tensor:
        """Blocks of one size: tiles are a whole number of them, or were filled up to be."""
        query, key, value = call.query, call.key, call.value
        if plan.rows is not None:
            query, key, value = (x.index_select(2, plan.rows) for x in (query, key, value))
            valid = valid.index_select(1, plan.rows) if valid is not None else None
        if plan.real is not None:
            real = plan.real.expand(query.shape[0], -1)
            valid = real if valid is None else real & valid
        out, _ = block_sparse_attention(
            query, key, value, plan.index, plan.count,
            block_size=plan.block, scale=call.scale, key_valid=valid, backend=self.config.backend,
        )  # fmt: skip
        return out if plan.back is None else out.index_select(2, plan.back)

    def _variable(self, call: AttentionCall, plan: VariablePlan, valid: torch.Tensor | None) -> torch.Tensor:
        """Blocks of any size: one per tile, one for the text."""
        batch, heads = call.query.shape[:2]
        key, value = expand_heads(call.key, heads), expand_heads(call.value, heads)
        key_sizes = plan.sizes.expand(batch, heads, -1)
        query_order = None if plan.rows is None else plan.rows.int().expand(batch, heads, -1)
        key_order = query_order
        if valid is not None and plan.rows is not None:
            # Hidden text goes behind the last block, where it belongs to none.
            shown = valid.index_select(1, plan.rows)
            text = torch.argsort(~shown[:, plan.video :], dim=1, stable=True) + plan.video
            key_rows = plan.rows.expand(batch, -1).clone()
            key_rows[:, plan.video :] = plan.rows[text]
            key_order = key_rows.int()[:, None].expand(-1, heads, -1)
            counts = shown[:, plan.video :].sum(1, dtype=torch.int32)[:, None, None].expand(-1, heads, 1)
            key_sizes = torch.cat([key_sizes[..., :-1], counts], dim=-1)
        if key_order is not None:
            key, value = gather_rows((key, value), key_order, backend=self.config.backend)
        out, _ = variable_block_attention(
            call.query, key, value, plan.keep.expand(batch, heads, -1, -1),
            plan.sizes.expand(batch, heads, -1), key_sizes,
            scale=call.scale, query_order=query_order, backend=self.config.backend,
        )  # fmt: skip
        return out

    def _plan(self, call: AttentionCall, grid: TokenGrid, masked: bool) -> FixedPlan | VariablePlan:
        sequence, device = call.query.shape[2], call.query.device
        tiling, keep = self.tiling(grid), self.tile_map(grid)
        sizes = tiling.sizes()
        pairs = int((sizes[:, None] * sizes)[keep].sum())
        self._warn(grid, pairs / grid.tokens**2)
        start, stop = grid.video_span(sequence) or (0, sequence)
        video = torch.arange(start, stop)
        if call.order is None:
            video = video[tiling.order()]
        text = torch.cat([torch.arange(start), torch.arange(stop, sequence)])

        block = next((b for b in BLOCKS if tiling.even is not None and tiling.even % b == 0), 0)
        if call.needs_grad and not block:
            block = BLOCKS[-1]  # only the kernel of fixed blocks has a backward
        filled = fill_tiles(sizes, block) if block else torch.ones(grid.tokens, dtype=torch.bool)
        rows = torch.zeros(len(filled), dtype=torch.long)
        rows[filled] = video
        rows, real = torch.cat([rows, text]), F.pad(filled, (0, len(text)), value=True)

        # The text is one more tile, of the highest number.
        keep = F.pad(keep, (0, 1, 0, 1), value=True)
        sizes = torch.cat([sizes, torch.tensor([len(text)])])
        owner = torch.repeat_interleave(-(-sizes // block)) if block else torch.arange(len(sizes))
        # Text in front stays there if the tokens behind it stand right and blocks do not straddle its end.
        stays = start % block == 0 if block else not masked
        if start and call.order is not None and stays and bool(real.all()):
            rows = torch.arange(sequence)
            owner = owner.roll(start // block if block else 1)
        keep, sizes = keep[owner][:, owner], sizes[owner]

        back = torch.empty(sequence, dtype=torch.long)
        back[rows[real]] = torch.arange(len(rows))[real]
        # Where text may be hidden, the kernel of variable blocks sorts keys anew in every call.
        moved = not torch.equal(rows, torch.arange(len(rows))) or (masked and not block)
        common: dict[str, Any] = {
            "rows": rows.to(device) if moved else None,
            "back": back.to(device) if moved else None,
            "video": len(filled),
            "pairs": pairs,
            "density": _share(pairs, grid.tokens, torch.tensor([[float(len(text))]])).to(device),
        }
        if not block:
            return VariablePlan(keep=keep[None, None].to(device), sizes=sizes[None, None].int().to(device), **common)
        index, count = block_map_to_index(keep[None, None])
        return FixedPlan(
            block=block,
            index=index[..., : int(count.max())].contiguous().to(device),
            count=count.to(device),
            real=None if real.all() else real.to(device),
            **common,
        )

    def _warn(self, grid: TokenGrid, share: float) -> None:
        note = (
            f"an image of {grid.height}x{grid.width} tokens keeps {share:.0%} of its pairs; below 128x128 tokens "
            "(2048x2048 pixels) this is seldom faster than dense"
        )
        if grid.frames == 1 and grid.tokens < WORTHWHILE_IMAGE and note not in self._notes:
            self._notes.append(note)


def _share(pairs: int, video: int, text: torch.Tensor) -> torch.Tensor:
    """Share of the pairs kept: ``pairs`` among video tokens, and all that text takes part in. fp32 like ``text``."""
    return ((pairs + 2.0 * video * text + text * text) / (video + text) ** 2).float()


def _density(call: AttentionCall, plan: Plan, valid: torch.Tensor | None, video: int) -> torch.Tensor:
    """fp32 ``[B, H]``; hidden text does not count."""
    shape = call.query.shape[:2]
    if valid is None:
        return plan.density.expand(shape)
    text = valid.sum(1, dtype=torch.float64)[:, None] - video
    return _share(plan.pairs, video, text).expand(shape)
