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
* A token that is all zeros has no direction: it counts as orthogonal to every token, itself included, which makes its
  block less alike by its share and no more. The code divides by its length of zero, so that the similarity of the block
  is no number, no comparison with the bar holds, and the block is kept as a row and as a column, also where the bar is
  -0.1 (INFERRED).
* Blocks that hold text in a sequence shared with video or image tokens are kept as rows and columns: prompts lose
  strength otherwise (issue 107 of the code). The code treats text like anything else.
* Causal: blocks on the diagonal are kept, so that every token sees itself, and the token-level mask runs inside them.
  The released SageAttention-2 path applies the block map only, and tokens of diagonal blocks see the future.
* Fully hidden key blocks (padding) are never kept; the code has no masks.
* A skipped tile (``pvthreshd``) adds neither to the sum nor to the output, as in the code; in the paper it still
  counts in the sum, and weights no longer add up to 1. The margin is one for a layer: of a table with one per head the
  widest is taken, which skips least, since a launch of the kernel has one. The code has one per head.
* ``cdfthreshd=1`` keeps every block. In the code it does not: rounding can take the running sum past 1, and the blocks
  behind that place are left out.
* ``density`` is ours: the share of blocks to compute with everything counted that is kept by rule.
* ``thresholds`` hold a budget per head in either mode. The code tunes cdf mode only, and forces ``attention_sink``
  with it; here that is a setting like the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.selectors import top_cdf, top_k
from hf_accel.attention.static import Recent
from hf_accel.config import setting
from hf_accel.errors import InvalidSetting
from hf_accel.facts import Facts
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.kernels.block_sparse_attention import block_map_to_index, block_sparse_attention
from hf_accel.kernels.block_summary import block_summary
from hf_accel.ledger import Ledger
from hf_accel.patches.sparge.calibration import Curves, fit, measure
from hf_accel.patches.sparge.plan import Plan, make_plan, per_block, share_shown
from hf_accel.patches.sparge.thresholds import (
    HeadSettings,
    check_thresholds,
    read_heads,
    read_thresholds,
    shape_in_words,
)
from hf_accel.registry import register
from hf_accel.report import MethodReport
from hf_accel.sites.attention.base import AttentionMethod, SparseAttentionConfig
from hf_accel.sites.attention.seam import AttentionSeams

RULES = {"topk": "topk", "cdf": "cdfthreshd"}  # mode -> the setting that is its budget
SIMILARITY_BARS = {"cdf": 0.6, "topk": -0.1, "density": -0.1}


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
        None, "a table for every head, {topk or cdfthreshd, is_sparse, ...: [layer][head]}, or a file with one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thresholds is None:
            return
        if self.density is not None:
            raise InvalidSetting(
                self.METHOD, "thresholds", "a table", "given without density: one takes the other's place"
            )
        table = self.thresholds
        if isinstance(table, str):
            # The table itself becomes the setting, so that a preset made of these settings stands alone.
            object.__setattr__(self, "thresholds", table := read_thresholds(table))
        check_thresholds(table, RULES[self.mode])


@dataclass(frozen=True)
class Tokens:
    """One call's queries ``[B, H, Sq, D]``, keys and values ``[B, Hkv, Sk, D]``, in the order in which blocks are cut.

    ``valid`` is bool ``[B, Sk]``, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor | None
    scale: float
    causal: bool


@dataclass(frozen=True)
class Prediction:
    """What the block means say.

    Attributes:
        scores: fp32 ``[B, H, nq, nk]``, scaled products of the means.
        query_similarity, key_similarity: fp32 ``[B, H, nq, 1]`` and ``[B, H, 1, nk]``.
        visible: bool, broadcasts to ``scores``; blocks with a pair that no mask hides.
    """

    scores: torch.Tensor
    query_similarity: torch.Tensor
    key_similarity: torch.Tensor
    visible: torch.Tensor


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
        self._plans: Recent[Plan] = Recent()
        self._heads: Recent[HeadSettings] = Recent(1024)  # by layer and device

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> AttentionSeams:
        seams = super().install(model, ledger, report, clock)
        table = self.config.thresholds
        if isinstance(table, dict) and len(table["is_sparse"]) != len(seams.shared.layers):
            raise InvalidSetting(
                self.name, "thresholds", shape_in_words([len(row) for row in table["is_sparse"]]),
                f"for the {len(seams.shared.layers)} patched layers of {model.class_name}; calibrate on this model",
            )  # fmt: skip
        return seams

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        reason = self.cannot(call)
        if reason is not None:
            return call.fallback(reason)
        plan, heads = self.plan(call), self.head_settings(call)
        tokens = self.tokens(call, plan)
        keep = self.choose(self.predict(tokens, plan), plan, heads)
        out = self.attend_blocks(tokens, keep, heads.margin, self.config.numerics)
        call.record_density(self.density(keep, plan, tokens.valid))
        return out if plan.back is None else out.index_select(2, plan.back)

    def predict(self, tokens: Tokens, plan: Plan) -> Prediction:
        """Attention between block means, and how alike the tokens of each block are (steps 1 to 4)."""
        settings = self.config
        rows = block_summary(tokens.query, settings.block_q, backend=settings.backend)
        columns = block_summary(
            tokens.key, settings.block_k, center=settings.smooth_k, key_valid=tokens.valid, backend=settings.backend
        )
        group = tokens.query.shape[1] // tokens.key.shape[1]
        scores = tokens.scale * (rows.mean @ columns.mean.repeat_interleave(group, 1).mT)
        visible = torch.ones_like(plan.kept) if plan.allowed is None else plan.allowed
        if tokens.valid is not None:
            visible = visible & per_block(tokens.valid, settings.block_k).any(-1)[:, None, None, :]
        alike = columns.similarity.repeat_interleave(group, 1)
        return Prediction(scores, rows.similarity[..., None], alike[..., None, :], visible)

    def choose(self, seen: Prediction, plan: Plan, heads: HeadSettings) -> torch.Tensor:
        """The map of kept blocks, bool ``[B, H, nq, nk]`` (steps 5 and 6)."""
        whole_columns = plan.columns | (seen.key_similarity <= heads.bar)
        kept = plan.kept | whole_columns | plan.rows[:, None] | (seen.query_similarity <= heads.bar)
        if heads.dense is not None:
            kept = kept | heads.dense
        if heads.rule == "density":
            # What is kept by rule takes its places first, so that the budget holds with it.
            scores = seen.scores.masked_fill(plan.kept, float("inf")).masked_fill(~seen.visible, float("-inf"))
            return (kept | top_k(scores, plan.budget)) & seen.visible
        rivals = seen.visible & ~whole_columns
        scores = seen.scores.masked_fill(~rivals, float("-inf"))
        if heads.rule == "topk":
            chosen = top_k(scores, _count(heads.amount, scores.shape[-1]))
        else:
            # A row without rivals has no softmax.
            mass = torch.where(rivals.any(-1, keepdim=True), scores.softmax(-1), 0.0)
            chosen = top_cdf(mass, heads.amount)
        return kept & seen.visible | chosen & rivals

    def attend_blocks(
        self, tokens: Tokens, keep: torch.Tensor, margin: float | None = None, numerics: str = "native"
    ) -> torch.Tensor:
        """Attention on the kept blocks: ``[B, H, Sq, D]`` (stage 2)."""
        index, count = block_map_to_index(keep)
        out, _ = block_sparse_attention(
            tokens.query, tokens.key, tokens.value, index, count,
            block_size=(self.config.block_q, self.config.block_k), scale=tokens.scale, key_valid=tokens.valid,
            causal=tokens.causal, numerics=numerics, pv_threshold=margin, backend=self.config.backend,
        )  # fmt: skip
        return out

    def density(self, keep: torch.Tensor, plan: Plan, valid: torch.Tensor | None) -> torch.Tensor:
        """Share of the pairs that dense attention would compute: fp32 ``[B, H]``. Hidden keys do not count; in blocks
        that the causal mask cuts they are taken to lie evenly."""
        pairs = plan.pairs
        if valid is not None:
            pairs = pairs * share_shown(valid, self.config.block_k)[:, None, None]
        return (keep * pairs).sum((-1, -2)) / pairs.sum((-1, -2)).clamp(min=1)

    def cannot(self, call: AttentionCall) -> str | None:
        """Why this call has to run dense, or None."""
        try:
            call.key_validity()
        except ValueError as error:
            return str(error)
        if call.causal and call.query.shape[2] > call.key.shape[2]:
            return "more queries than keys under a causal mask"
        if self.config.hilbert and (reason := _no_curve(call)) is not None:
            return f"no Hilbert order: {reason}"
        return None

    def tokens(self, call: AttentionCall, plan: Plan) -> Tokens:
        """What a call brings, in the plan's order."""
        tensors = call.query, call.key, call.value
        valid = call.key_validity()
        if plan.order is not None:
            order = plan.order
            query, key, value = (x.index_select(2, order) for x in tensors)
            return Tokens(query, key, value, None if valid is None else valid[:, order], call.scale, call.causal)
        return Tokens(*tensors, valid, call.scale, call.causal)

    def plan(self, call: AttentionCall) -> Plan:
        """What the call's shape decides, kept for the last few shapes."""
        lengths = call.query.shape[2], call.key.shape[2]
        key = (*lengths, call.causal, call.grid, call.span, call.query.device)
        device = call.query.device
        return self._plans.get(
            key, lambda: make_plan(self.config, *lengths, call.causal, call.grid, call.span).to(device)
        )

    def head_settings(self, call: AttentionCall) -> HeadSettings:
        """The thresholds of this layer's heads."""
        config = self.config
        rule = config.mode if config.density is None else "density"
        bar = config.simthreshd1 if config.simthreshd1 is not None else SIMILARITY_BARS[rule]
        table = config.thresholds
        if not isinstance(table, dict):
            return HeadSettings(rule, config.cdfthreshd if rule == "cdf" else config.topk, bar, config.pvthreshd)
        key = call.layer.index, call.query.device
        return self._heads.get(key, lambda: read_heads(table, rule, call, bar, config.pvthreshd))

    # -- calibration: see hf_accel.measure.calibrate ---------------------------------------------------------------

    def probe(self, call: AttentionCall) -> Curves | None:
        """Error and density of every head over a grid of thresholds, on this call; None if it runs dense anyway."""
        return None if self.cannot(call) is not None else measure(self, call)

    @classmethod
    def calibrate(
        cls, records: Mapping[int, Sequence[Curves]], heads: Sequence[int], *, l1: float | None, density: float | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings with a table of thresholds, and evidence, from what :meth:`probe` saw; see :func:`fit`."""
        return fit(records, heads, l1=l1, density=density)


def _count(share: float | torch.Tensor, blocks: int) -> int | torch.Tensor:
    """``floor(share * blocks)``, at least 1; of a number, or of a tensor per head."""
    if isinstance(share, torch.Tensor):
        return (share * blocks + 1e-4).floor().clamp(min=1)
    return max(1, int(share * blocks + 1e-9))


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
