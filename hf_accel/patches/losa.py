"""``losa``: attention of a denoising step to its frozen prefix, anew only for the tokens that moved.

Paper: "LoSA: Locality Aware Sparse Attention for Block-Wise Diffusion Language Models", arXiv 2604.12056. No code was
found; the text of the paper was known from two summaries that agree but for ``k_act``.

A block of a block-diffusion model is denoised in several steps, and every step reads the whole prefix again. From one
step to the next few tokens of the block change much. The first step attends to the whole prefix and keeps, for every
row, the prefix's part of the output and its log-sum-exp. In later steps the ``k_act`` rows whose queries moved most are
*active*: each picks the pages of the prefix that may matter to it (QUEST), and all of them attend to the union of
those. The others are *stable* and keep their part. Attention within the block is dense for all rows, and both parts are
merged by their log-sum-exp. Only active rows add pages to the union, so fewer are read than if all rows picked.

Decisions, INFERRED where the summaries are silent:

* How far a row moved is ``||q - q_ref||^2`` over heads and channels, after rotary embedding, which is a rotation and
  leaves it as it is. The abstract says hidden state; the query is what the prefix sees of it, and is at hand.
* ``reference="prev"`` compares with the step before, as published: a row that drifts slowly is never computed anew.
  ``"anchor"`` compares with the query that the kept part was computed from, so the distance is its true staleness.
  Ours is the default: it costs nothing more, and on mini-sdar it answers as Quest does at the same budget, where
  ``"prev"`` falls far behind (docs/results.md). Rows of the configs for the paper's models keep what was published.
* ``k_act``: one summary has half a block, the other 5 rows of 16 as best. The default is ``ceil(0.3 b)``: 5 of 16.
* Tokens that a step committed are active in the next (``force_changed``): a mask became a word. If more are committed
  than ``k_act``, so many rows are active, in all rows of a batch: a batch may compute more than its rows alone. Where
  every step draws the open tokens anew (DiffusionGemma), that is nearly the whole canvas; the method runs there on the
  full layers, ``force_changed=False`` goes by distance alone, and nobody has shown how good it is.
* The union is taken over the query heads of a KV head too, which read the same pages. ``page_size`` is that of QUEST's
  evaluation. A last page that is not full is scored by the keys it has.
* A budget that holds the whole prefix runs without scoring; prefixes up to ``min_prefix`` are attended exactly, since
  below about a thousand keys the paper finds little to gain.
* A step that this layer did not see (it was computed by the model's own code) voids what is kept: the next one attends
  to the whole prefix, like a first.

The dense first step is not paid back where a block is done in one to three steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_accel.config import setting
from hf_accel.facts import Facts
from hf_accel.hosts.block_families import DIFFUSION_GEMMA, SDAR
from hf_accel.kernels.paged_attention import active_topk
from hf_accel.registry import register
from hf_accel.sites.prefix_attention.base import PrefixAttentionConfig, PrefixAttentionMethod
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.pages import PagedPrefix
from hf_accel.sites.prefix_attention.split import with_block


@dataclass(frozen=True)
class PagedPrefixConfig(PrefixAttentionConfig):
    """Settings of the methods that read a few pages of the prefix."""

    budget: int = setting(256, "keys of the prefix per active token and query head; taken in whole pages", ge=1)
    page_size: int = setting(16, "keys on a page", choices=(8, 16, 32, 64))
    min_prefix: int = setting(1024, "prefixes of up to so many tokens are attended exactly", ge=0)
    backend: str = setting("auto", "kernels to use", choices=("auto", "triton", "torch"))


@dataclass(frozen=True)
class LoSAConfig(PagedPrefixConfig):
    """Settings of :class:`LoSA`."""

    METHOD = "losa"

    k_act: int | float = setting(
        0.3, "active tokens of a block: a count, or a share of the block, rounded up", share=True
    )
    reference: str = setting(
        "anchor",
        "what a query is compared with: that of its kept part, or that of the step before (prev, published)",
        choices=("prev", "anchor"),
    )
    force_changed: bool = setting(True, "tokens that changed since the last step are active, whatever k_act is")


@dataclass
class PrefixPart:
    """What the prefix gave to each row of a block, in one layer.

    Attributes:
        reference: queries to compare the next ones with, ``[B, Hq, b, D]``.
        out: fp32 ``[B, Hq, b, D]``, normalised.
        lse: fp32 ``[B, Hq, b]``, natural log.
        prefix: length of the prefix.
        step: the denoising step that it stands after.
    """

    reference: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    prefix: int
    step: int

    def precedes(self, call: PrefixCall) -> bool:
        """Whether it is what the step before this call left."""
        reference, query = self.reference, call.query
        follows = call.index == self.step + 1 and call.prefix == self.prefix
        return follows and reference.shape == query.shape and reference.device == query.device


@dataclass
class BlockState:
    """State of one layer in one block; empty before its first step."""

    part: PrefixPart | None = None


@register
class LoSA(PrefixAttentionMethod):
    """Prefix attention of moved tokens over a few pages, kept parts for the rest, the block dense."""

    name = "losa"
    paper = "LoSA, arXiv 2604.12056"
    summary = "block diffusion: tokens whose queries moved read a few pages of the prefix, the others keep their part"
    facts = Facts(
        site="attention",
        needs=frozenset({"prefix cache"}),
        media=frozenset({"text"}),
        hosts=frozenset({"block diffusion"}),
        families=frozenset({SDAR.name, DIFFUSION_GEMMA.name}),
        compile=False,
        full_budget={"budget": 1 << 30, "k_act": 1.0, "min_prefix": 0, "dense_layers": 0},
        budget="budget",
        max_head_dim=512,
    )
    Config = LoSAConfig
    config: LoSAConfig

    def new_request_state(self) -> PagedPrefix:
        return PagedPrefix(self.config.budget, self.config.page_size, self.config.backend)

    def new_state(self) -> BlockState:
        return BlockState()

    def attend(self, call: PrefixCall, state: BlockState) -> torch.Tensor:
        part = state.part
        if part is not None and part.precedes(call):
            self.renew(call, part)
        else:
            call.notes["active"] = 1.0
            out, lse = call.request_state.attend_all(call, call.query)
            part = state.part = PrefixPart(call.query, out, lse, call.prefix, call.index)
        part.step = call.index
        return with_block(call, part.out, part.lse, self.config.backend)

    def renew(self, call: PrefixCall, part: PrefixPart) -> None:
        """Compute the active rows of ``part`` anew; stable rows stay as they are, bit for bit."""
        query, length = call.query, call.query.shape[2]
        count = self.active_rows(call)
        call.notes |= {"density": 0.0, "pages": 0.0, "active": count / length}
        if count == length:
            part.out, part.lse = call.request_state.attend(call, query)
            part.reference = query
            return
        if count:
            forced = call.changed if self.config.force_changed else None
            rows, _ = active_topk(query, part.reference, count, forced, backend=self.config.backend)
            active = take(query, rows)
            out, lse = call.request_state.attend(call, active)
            part.out, part.lse = put(part.out, rows, out), put(part.lse, rows, lse)
            if self.config.reference == "anchor":
                part.reference = put(part.reference, rows, active)
        if self.config.reference == "prev":
            part.reference = query

    def active_rows(self, call: PrefixCall) -> int:
        """How many rows of the block are active in this step: ``k_act``, or as many as changed if more did."""
        length, share = call.query.shape[2], self.config.k_act
        count = math.ceil(share * length - 1e-9 * length) if isinstance(share, float) else share
        if self.config.force_changed and call.changed is not None:
            count = max(count, call.most_changed)
        return min(count, length)


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[B, A]`` of every head of ``x`` ``[B, H, b, D]``."""
    return x.gather(2, _index(rows, x))


def put(x: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``x`` ``[B, H, b, ...]`` with ``new`` ``[B, H, A, ...]`` in the rows ``[B, A]``. A copy: what inference mode made
    cannot be written outside of it."""
    return x.scatter(2, _index(rows, x), new)


def _index(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    index = rows[:, None].expand(-1, like.shape[1], -1)
    return index[..., None].expand(-1, -1, -1, like.shape[3]) if like.ndim == 4 else index
