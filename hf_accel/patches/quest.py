"""``quest``: every token of the block picks its pages of the frozen prefix at every denoising step.

Paper: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774, on a block-diffusion
model: the baseline of LoSA (arXiv 2604.12056), and ``losa`` with all tokens active. The rule for pages is in
``sites/prefix_attention/pages.py``.

A block of b queries has b choices of pages, and the kernel reads their union: the more tokens a block has, the less is
left out. That is what ``losa`` does something about.

Decisions:

* All queries attend to the whole union, their own pages and those of the others, which are loaded anyway. How the
  paper's baseline is built is not known.
* ``dense_first``: the first step of a block attends to the whole prefix, as it does in ``losa``, so that the two differ
  in one thing. Nothing is carried into later steps, so this helps the first step alone; ``False`` is Quest as it is.
* Quest's released code keeps two layers dense: ``dense_layers=2``. Its least number of pages, 3, is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.config import setting
from hf_accel.facts import Facts
from hf_accel.hosts.block_families import DIFFUSION_GEMMA, SDAR
from hf_accel.patches.losa import PagedPrefixConfig
from hf_accel.registry import register
from hf_accel.sites.prefix_attention.base import PrefixAttentionMethod
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.pages import PagedPrefix
from hf_accel.sites.prefix_attention.split import with_block


@dataclass(frozen=True)
class QuestConfig(PagedPrefixConfig):
    """Settings of :class:`Quest`."""

    METHOD = "quest"

    dense_first: bool = setting(True, "the first denoising step of a block attends to the whole prefix")


@register
class Quest(PrefixAttentionMethod):
    """Prefix attention over the union of the pages that all tokens of the block pick, the block dense."""

    name = "quest"
    paper = "Quest, arXiv 2406.10774, as the baseline of LoSA, arXiv 2604.12056"
    summary = "block diffusion: every token of the block reads the pages of the prefix with the highest bounds"
    facts = Facts(
        site="attention",
        needs=frozenset({"prefix cache"}),
        media=frozenset({"text"}),
        hosts=frozenset({"block diffusion"}),
        families=frozenset({SDAR.name, DIFFUSION_GEMMA.name}),
        compile=False,
        full_budget={"budget": 1 << 30, "min_prefix": 0, "dense_layers": 0},
        budget="budget",
        max_head_dim=512,
    )
    Config = QuestConfig
    config: QuestConfig

    def new_request_state(self) -> PagedPrefix:
        return PagedPrefix(self.config.budget, self.config.page_size, self.config.backend)

    def attend(self, call: PrefixCall, state: Any) -> torch.Tensor:
        call.notes["active"] = 1.0
        first = call.index == 0 and self.config.dense_first
        prefix: PagedPrefix = call.request_state
        out, lse = (prefix.attend_all if first else prefix.attend)(call, call.query)
        return with_block(call, out, lse, self.config.backend)
