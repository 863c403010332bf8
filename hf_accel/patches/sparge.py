"""``sparge``: SpargeAttention, sparse attention for any transformer by a prediction from block means.

Paper: "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference",
arXiv 2502.18137. Its INT8 arithmetic is SageAttention's, arXiv 2410.02367.

Queries and keys are cut into blocks of consecutive tokens. The means of the blocks give a small estimate of the
attention map; each query block keeps the key blocks with the most estimated mass. A block whose tokens point in
different directions is not described by its mean: it is kept whole, as a row and as a column of the map. Exact softmax
attention runs on the kept blocks, optionally in INT8, and may skip the value product of tiles far below the running
maximum.

Decisions where the paper and the released code differ or are silent:

* ``topk`` keeps ``floor(topk * key blocks)``, at least one; ``cdf`` does not keep the block that crosses
  ``cdfthreshd``. Both as in the code.
* The code's recommended top-k mode has the similarity bar at -0.1. Similarities are squares (INFERRED, see
  ``block_summary``), so that no block ever falls below it: the default of ``simthreshd1`` in that mode.
* A last block that is not full is kept as a row and as a column. In the code this seems to come of a division by zero
  (INFERRED); here it is a rule.
* Blocks that hold text in a sequence shared with video or image tokens are kept as rows and columns: prompts lose
  strength otherwise (issue 107 of the code). The code treats text like anything else.
* Causal: blocks on the diagonal are kept, so that every token sees itself, and the token-level mask runs inside them.
  The released SageAttention-2 path applies the block map only, and tokens of diagonal blocks see the future.
* Fully hidden key blocks (padding) are never kept; the code has no masks.
* A skipped tile (``pvthreshd``) adds neither to the sum nor to the output, as in the code; in the paper it still
  counts in the sum, and weights no longer add up to 1.
* ``density`` is ours: the share of blocks to compute with everything counted that is kept by rule.
* Tuned thresholds belong to cdf mode; the code forces ``attention_sink`` with them, here it is a setting like the
  others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_accel.attention.call import AttentionCall, TokenGrid
from hf_accel.attention.hilbert import hilbert_order
from hf_accel.attention.layout import block_sizes, inverse_order
from hf_accel.attention.selectors import top_cdf, top_k
from hf_accel.config import setting
from hf_accel.errors import InvalidSetting
from hf_accel.hosts.clock import Clock
from hf_accel.hosts.seam import SeamContext
from hf_accel.hosts.target import Model
from hf_accel.kernels.block_sparse_attention import backend_for as attention_backend
from hf_accel.kernels.block_sparse_attention import block_map_to_index, block_sparse_attention
from hf_accel.kernels.block_summary import backend_for as summary_backend
from hf_accel.kernels.block_summary import block_summary
from hf_accel.ledger import Ledger
from hf_accel.method import AttentionMethod, Facts, SparseAttentionConfig
from hf_accel.registry import register
from hf_accel.report import MethodReport

# Bounds of the per-head thresholds; None: true or false.
THRESHOLDS: dict[str, tuple[float, float] | None] = {
    "cdfthreshd": (0, 1),
    "simthreshd1": (-1, 1),
    "pvthreshd": (0, float("inf")),
    "is_sparse": None,
}
SIMILARITY_BARS = {"cdf": 0.6, "topk": -0.1}


@dataclass(frozen=True)
class SpargeConfig(SparseAttentionConfig):
    """Settings of :class:`Sparge`. Names follow the released code."""

    METHOD = "sparge"

    mode: str = setting("topk", "keep a share of the blocks, or a share of the mass", choices=("topk", "cdf"))
    topk: float = setting(0.5, "share of key blocks each query block keeps in topk mode", gt=0, le=1)
    cdfthreshd: float = setting(0.98, "share of estimated mass each query block keeps in cdf mode", ge=0, le=1)
    density: int | float | None = setting(
        None, "share of blocks computed, those kept by rule included; goes before mode and topk", gt=0, le=1
    )
    simthreshd1: int | float | None = setting(
        None, "blocks whose tokens are not more alike are kept whole; None: 0.6 in cdf mode, else -0.1", ge=-1, le=1
    )
    pvthreshd: int | float | None = setting(
        None, "log2 margin below the running maximum from which on values are skipped; None: never", gt=0
    )
    smooth_k: bool = setting(True, "predict from keys less their mean")
    numerics: str = setting("native", "arithmetic of the kept blocks", choices=("native", "int8"))
    attention_sink: bool = setting(False, "keep the first key block in every row")
    block_q: int = setting(128, "tokens of a query block", choices=(64, 128))
    block_k: int = setting(64, "tokens of a key block", choices=(64, 128))
    hilbert: bool = setting(False, "order the tokens of the grid along a Hilbert curve first")
    thresholds: str | dict[str, Any] | None = setting(  # noqa: RUF009 - the type is mutable, the default is not
        None, "cdf mode: thresholds of every head, {cdfthreshd, is_sparse, ...: [layer][head]}, or a file with them"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholds is None:
            return
        if self.mode != "cdf" or self.density is not None:
            raise InvalidSetting(
                self.METHOD, "thresholds", "a table", "given with mode='cdf' and without density: they take its place"
            )
        table = self.thresholds
        if isinstance(table, str):
            # The table itself becomes the setting, so that a preset made of these settings stands alone.
            object.__setattr__(self, "thresholds", table := read_thresholds(table))
        check_thresholds(table)


def read_thresholds(path: str) -> dict[str, Any]:
    """The table in a YAML or JSON file: bare, or the ``sparge`` entry of a preset as ``calibrate`` writes it."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidSetting("sparge", "thresholds", path, f"a table or a readable file ({error})") from error
    if isinstance(content, dict) and "apply" in content:
        entries = [e for e in content["apply"] if isinstance(e, dict) and e.get("method") == "sparge"]
        content = (entries[0].get("settings") or {}).get("thresholds") if entries else None
    if not isinstance(content, dict):
        raise InvalidSetting("sparge", "thresholds", path, "a table, or a file that holds one")
    return content


def check_thresholds(table: Mapping[str, Any]) -> None:
    """Refuse a table with unknown or missing names, rows of different lengths, or values out of range."""

    def fail(what: str, allowed: str) -> None:
        raise InvalidSetting("sparge", "thresholds", what, allowed)

    for name in table:
        if name not in THRESHOLDS:
            fail(name, f"a table with {', '.join(THRESHOLDS)}")
    for name in ("cdfthreshd", "is_sparse"):
        if name not in table:
            fail(", ".join(table) or "an empty table", f"a table with at least {name}")
    shapes = {}
    for name, rows in table.items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            fail(f"{name}: {str(rows)[:60]}", "a list per layer, each with a value per head")
        shapes[name] = [len(row) for row in rows]
        bounds = THRESHOLDS[name]
        for layer, row in enumerate(rows):
            for head, value in enumerate(row):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                good = isinstance(value, bool) if bounds is None else number and bounds[0] <= value <= bounds[1]
                if not good:
                    words = "true or false" if bounds is None else f"a number from {bounds[0]} to {bounds[1]}"
                    fail(f"{value!r} at {name}[{layer}][{head}]", words)
    first, *others = shapes
    for name in others:
        if shapes[name] != shapes[first]:
            fail(f"{name} with {_shape(shapes[name])}", f"as large as {first}, which has {_shape(shapes[first])}")


def _shape(heads: list[int]) -> str:
    kinds = sorted(set(heads))
    return f"{len(heads)} layers of {' or '.join(map(str, kinds))} heads"


@dataclass(frozen=True)
class Plan:
    """What the shape of a call decides about its map, whatever the tokens are. On the call's device.

    Attributes:
        allowed: bool ``[nq, nk]``, blocks with a pair that the causal mask shows; None where there is none.
        rows, columns: bool ``[nq]`` and ``[nk]``, blocks that are kept whole: text, and last blocks not full.
        kept: bool ``[nq, nk]``, the blocks of those rows and columns, the sink and the diagonal.
        pairs: fp32 ``[nq, nk]``, query-key pairs of each block that the causal mask shows.
        budget: blocks per row that spend the density asked for; 0 if none was.
        order, back: int64 ``[S]``, tokens along the Hilbert curve and the way back, or None.
    """

    allowed: torch.Tensor | None
    rows: torch.Tensor
    columns: torch.Tensor
    kept: torch.Tensor
    pairs: torch.Tensor
    budget: int
    order: torch.Tensor | None
    back: torch.Tensor | None

    def to(self, device: torch.device) -> Plan:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class HeadSettings:
    """Thresholds of one call: numbers, or tensors ``[H, 1, 1]``; ``dense`` names heads that stay dense."""

    mass: float | torch.Tensor
    bar: float | torch.Tensor
    margin: float | None
    dense: torch.Tensor | None = None


@register
class Sparge(AttentionMethod):
    """Block-sparse attention predicted from block means."""

    name = "sparge"
    paper = "SpargeAttention, arXiv 2502.18137"
    summary = "sparse self-attention of any model: blocks chosen by their means, exact or INT8 on the kept ones"
    facts = Facts(
        site="attention",
        media=frozenset({"video", "image", "text"}),
        causal=True,
        full_budget={
            "density": 1.0,
            "thresholds": None,
            "pvthreshd": None,
            "numerics": "native",
            "dense_steps": 0,
            "dense_layers": 0,
        },
        budget="density",
    )
    Config = SpargeConfig
    config: SpargeConfig

    def __init__(self, config: SpargeConfig):
        super().__init__(config)
        self._plans: dict[Any, Plan] = {}
        self._heads: dict[Any, HeadSettings] = {}

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clock) -> SeamContext:
        context = super().install(model, ledger, report, clock)
        table = self.config.thresholds
        if isinstance(table, dict) and len(table["is_sparse"]) != len(context.layers):
            raise InvalidSetting(
                self.name, "thresholds", _shape([len(row) for row in table["is_sparse"]]),
                f"for the {len(context.layers)} patched layers of {model.class_name}; calibrate on this model",
            )  # fmt: skip
        return context

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        try:
            valid = call.key_validity()
        except ValueError as error:
            return call.fallback(str(error))
        if call.causal and call.query.shape[2] > call.key.shape[2]:
            return call.fallback("more queries than keys under a causal mask")
        if self.config.hilbert and (reason := _no_curve(call)) is not None:
            return call.fallback(f"no Hilbert order: {reason}")
        settings = self.config
        plan = self.plan(call)
        query, key, value = call.query, call.key, call.value
        if plan.order is not None:
            query, key, value = (x.index_select(2, plan.order) for x in (query, key, value))
            valid = valid.index_select(1, plan.order) if valid is not None else None
        heads = self.head_settings(call)
        keep = self.select(query, key, valid, call.scale, plan, heads)
        index, count = block_map_to_index(keep)
        out, _ = block_sparse_attention(
            query, key, value, index, count,
            block_size=(settings.block_q, settings.block_k), scale=call.scale, key_valid=valid,
            backend=settings.backend, **self._numerics(call, heads),
        )  # fmt: skip
        for op, backend_for in (("block_summary", summary_backend), ("block_sparse_attention", attention_backend)):
            choice = backend_for(query, settings.backend)
            call.record_kernel(op, choice.backend, choice.reason)
        call.record_density(self.density(keep, plan, valid))
        return out if plan.back is None else out.index_select(2, plan.back)

    def _numerics(self, call: AttentionCall, heads: HeadSettings) -> dict[str, Any]:
        extra: dict[str, Any] = {"causal": True} if call.causal else {}
        if self.config.numerics != "native":
            extra["numerics"] = self.config.numerics
        if heads.margin is not None:
            extra["pv_threshold"] = heads.margin
        return extra

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        valid: torch.Tensor | None,
        scale: float,
        plan: Plan,
        heads: HeadSettings,
    ) -> torch.Tensor:
        """The map of kept blocks, bool ``[B, H, nq, nk]``, from ``[B, H, Sq, D]`` and ``[B, Hkv, Sk, D]``.

        Steps 1 to 6 of the paper's algorithm 1, in its order.
        """
        settings = self.config
        rows = block_summary(query, settings.block_q, backend=settings.backend)
        columns = block_summary(
            key, settings.block_k, center=settings.smooth_k, key_valid=valid, backend=settings.backend
        )
        group = query.shape[1] // key.shape[1]
        estimate = scale * (rows.mean @ columns.mean.repeat_interleave(group, 1).mT)
        visible = torch.ones_like(plan.columns) if plan.allowed is None else plan.allowed
        if valid is not None:
            visible = visible & _per_block(valid, settings.block_k).any(-1)[:, None, None, :]
        whole_rows = plan.rows | (rows.similarity[..., None] <= heads.bar).squeeze(-1)
        alike = columns.similarity.repeat_interleave(group, 1)[..., None, :] > heads.bar
        whole_columns = plan.columns | ~alike
        keep = whole_rows[..., None] | whole_columns | plan.kept
        if settings.density is not None:
            # What is kept by rule takes its places first, so that the budget holds with it.
            wanted = torch.where(plan.kept, float("inf"), estimate).masked_fill(~visible, float("-inf"))
            chosen = top_k(wanted, plan.budget)
        else:
            rivals = visible & ~whole_columns
            wanted = estimate.masked_fill(~rivals, float("-inf"))
            if settings.mode == "topk":
                chosen = top_k(wanted, max(1, int(settings.topk * estimate.shape[-1] + 1e-9))) & rivals
            else:
                mass = torch.where(rivals.any(-1, keepdim=True), wanted.softmax(-1), 0.0)
                chosen = top_cdf(mass, heads.mass) & rivals
        keep = keep | chosen
        if heads.dense is not None:
            keep = keep | heads.dense
        return keep & visible

    def density(self, keep: torch.Tensor, plan: Plan, valid: torch.Tensor | None) -> torch.Tensor:
        """Share of the pairs that dense attention would compute: fp32 ``[B, H]``. Hidden keys do not count; in blocks
        that the causal mask cuts they are taken to lie evenly."""
        pairs = plan.pairs
        if valid is not None:
            shown = _per_block(valid, self.config.block_k).sum(-1) / block_sizes(
                valid.shape[1], self.config.block_k
            ).to(valid.device)
            pairs = pairs * shown[:, None, None]
        return (keep * pairs).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)

    def plan(self, call: AttentionCall) -> Plan:
        """What the call's shape decides, kept for the last few shapes."""
        lengths = call.query.shape[2], call.key.shape[2]
        grid = call.grid if lengths[0] == lengths[1] else None
        key = (*lengths, call.causal, grid, call.query.device)
        if key not in self._plans:
            if len(self._plans) >= 8:  # resolutions come and go; the levels of a U-Net stay
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = make_plan(self.config, *lengths, call.causal, grid).to(call.query.device)
        return self._plans[key]

    def head_settings(self, call: AttentionCall) -> HeadSettings:
        """The thresholds of this layer's heads."""
        config = self.config
        bar = config.simthreshd1
        if bar is None:
            bar = SIMILARITY_BARS["topk" if config.density is not None else config.mode]
        table = config.thresholds
        if not isinstance(table, dict):
            return HeadSettings(config.cdfthreshd, bar, config.pvthreshd)
        key = call.layer.index, call.query.device
        if key not in self._heads:
            self._heads[key] = read_heads(table, call, bar, config.pvthreshd)
        return self._heads[key]


def read_heads(table: Mapping[str, Any], call: AttentionCall, bar: float, margin: float | None) -> HeadSettings:
    """One layer of a table of thresholds; ``bar`` and ``margin`` stand in for what it leaves out."""
    layer, heads, device = call.layer.index, call.query.shape[1], call.query.device
    row = {name: rows[layer] for name, rows in table.items()}
    if len(row["is_sparse"]) != heads:
        raise InvalidSetting(
            "sparge", "thresholds", f"{len(row['is_sparse'])} heads in layer {layer}",
            f"for the {heads} heads of {call.layer.name}; calibrate on this model",
        )  # fmt: skip

    def column(values: list) -> torch.Tensor:
        return torch.tensor(values, device=device).view(heads, 1, 1)

    return HeadSettings(
        mass=column(row["cdfthreshd"]).float(),
        bar=column(row["simthreshd1"]).float() if "simthreshd1" in row else bar,
        # One margin per launch: the widest of the layer's heads skips least.
        margin=max(map(float, row["pvthreshd"])) if "pvthreshd" in row else margin,
        dense=~column(row["is_sparse"]),
    )


def make_plan(config: SpargeConfig, queries: int, keys: int, causal: bool, grid: TokenGrid | None) -> Plan:
    """What lengths, mask and grid decide about the map; see :class:`Plan`. On the CPU."""
    rows = torch.zeros(-(-queries // config.block_q), dtype=torch.bool)
    columns = torch.zeros(-(-keys // config.block_k), dtype=torch.bool)
    span = grid.video_span(queries) if grid is not None and queries == keys else None
    for blocks, size, length in ((rows, config.block_q, queries), (columns, config.block_k, keys)):
        blocks[-1] = length % size > 0
        if span is not None and span[1] - span[0] < length:
            first = torch.arange(0, length, size)
            blocks |= (first < span[0]) | (first + size > span[1])
    kept = rows[:, None] | columns
    if config.attention_sink:
        kept[:, 0] = True
    allowed = None
    offset = keys - queries
    pairs = _pairs(queries, keys, config.block_q, config.block_k, offset if causal else None)
    if causal:
        allowed = pairs > 0
        sizes = block_sizes(queries, config.block_q)[:, None] * block_sizes(keys, config.block_k)
        kept = (kept | (pairs < sizes)) & allowed
    order = back = None
    if config.hilbert and grid is not None and span is not None:
        order = torch.arange(queries)
        order[span[0] : span[1]] = span[0] + hilbert_order(grid.frames, grid.height, grid.width)
        back = inverse_order(order)
    budget = 0
    if config.density is not None:
        budget = _blocks_per_row(config.density, kept, pairs)
    return Plan(allowed, rows, columns, kept, pairs.float(), budget, order, back)


def _pairs(queries: int, keys: int, block_q: int, block_k: int, offset: int | None) -> torch.Tensor:
    """Visible query-key pairs of every block, int64 ``[nq, nk]``; query i sees keys up to ``i + offset``."""
    # Pairs of the first r queries with the first c keys, at the corners of the blocks.
    r = torch.arange(0, queries + block_q, block_q).clamp(max=queries)[:, None]
    c = torch.arange(0, keys + block_k, block_k).clamp(max=keys)
    if offset is None:
        corners = r * c
    else:
        # Query t sees min(t + offset + 1, c) of them: the first `short` queries see fewer than c.
        short = (c - offset - 1).clamp(min=0).minimum(r)
        corners = short * (short - 1) // 2 + short * (offset + 1) + (r - short) * c
    rows = (queries + block_q - 1) // block_q
    columns = (keys + block_k - 1) // block_k
    corners = corners[: rows + 1, : columns + 1]
    return corners.diff(dim=0).diff(dim=1)


def _blocks_per_row(density: float, kept: torch.Tensor, pairs: torch.Tensor) -> int:
    """The most blocks per row with which no more than ``density`` of the pairs are computed, at least 1.

    Args:
        kept: bool ``[nq, nk]``, blocks computed in any case. They take their places in a row first.
        pairs: int ``[nq, nk]``, 0 where the causal mask hides the block.
    """
    visible, by_rule = (pairs > 0).sum(1), kept.sum(1)
    rest = pairs.sum(1) - (pairs * kept).sum(1)
    low, high = 1, kept.shape[1]
    while low < high:
        middle = (low + high + 1) // 2
        chosen = (middle - by_rule).clamp(min=0).minimum(visible - by_rule)
        total = (pairs * kept).sum() + (rest * chosen / (visible - by_rule).clamp(min=1)).sum()
        # Rounding must not cost a block.
        low, high = (middle, high) if total <= density * pairs.sum() * (1 + 1e-6) else (low, middle - 1)
    return low


def _per_block(valid: torch.Tensor, block: int) -> torch.Tensor:
    """``[B, S]`` as ``[B, n, block]``, the last block filled up with False."""
    return torch.nn.functional.pad(valid, (0, -valid.shape[1] % block)).unflatten(1, (-1, block))


def _no_curve(call: AttentionCall) -> str | None:
    """Why the tokens of a call cannot be put in another order, or None."""
    if call.causal:
        return "the mask is causal"
    if call.grid is None:
        return "the token grid is unknown"
    if call.order is not None:
        return "the tokens stand in an order of another method"
    lengths = call.query.shape[2], call.key.shape[2]
    if lengths[0] != lengths[1] or call.grid.video_span(lengths[0]) is None:
        return f"{lengths[0]} x {lengths[1]} tokens disagree with the grid {call.grid}"
    return None
