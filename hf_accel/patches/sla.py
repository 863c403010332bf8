"""``sla``: sparse-linear attention, block-sparse softmax attention with a learned linear branch for the rest.

Paper: "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention", arXiv 2509.24006.

Block means of queries and keys rank the key blocks of every query block. The first share ``topk`` is *critical* and
gets exact softmax attention; other blocks are *marginal* and get linear attention, whose output passes through a small
learned projection ``proj_l`` (one per layer, shared by its heads, zero at first) and is added. Not training-free:
without fine-tuning it is plain block-sparse attention. Training: ``hf_accel.train``, ``docs/training.md``.

Decisions where the paper and the released code differ or are silent:

* ``linear_scope``: the paper adds linear attention over the middle blocks and drops the last ``k_l`` ("marginal"); the
  code's branch ``SLA-1`` covers every block that is not critical ("rest"); its ``main`` and the TurboDiffusion
  checkpoints cover all blocks, critical ones included ("all"). "rest" is the default: no key is lost, what softmax
  has counted is not counted again, and with pre-aggregated states it costs the subtraction of few blocks, so that
  dropping a tail would save nothing.
* The share of critical blocks is called ``topk`` as in paper and code; it is this method's density. Blocks are counted
  down, ``floor(topk * blocks)``, but at least one is kept: the released code divides by zero on short sequences.
* Blocks are ranked by the unscaled dot products of their means (the paper's softmax keeps the order of a row), in fp32
  (the code stores means in the input's dtype). Keys are centred for the ranking alone.
* Text in the same sequence is INFERRED, the paper has none: blocks with a text token are critical for every query, see
  every key, and do not count in ``topk``. Padded text is hidden from both branches.
* The denominator of the linear branch is the sum of its weights as it is, and the branch is 0 where that is 0. The
  code's ``main`` and TurboDiffusion add ``1e-5`` to it, which is missing here: under ``"softmax"`` the sum is about the
  keys in scope over the head dim, beside which it is nothing. ``SLA-1`` divides by infinity where no block is in scope.
* ``proj_l`` is kept in fp32 and applied in the dtype of the attention, as the code does under autocast.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hf_accel.attention.call import AttentionCall
from hf_accel.attention.layout import block_sizes, density, expand_heads, text_blocks
from hf_accel.attention.selectors import top_k
from hf_accel.attention.static import Recent
from hf_accel.checkpoints import parameters
from hf_accel.config import setting
from hf_accel.facts import Facts
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.target import Model
from hf_accel.kernels.block_sparse_attention import block_map_to_index
from hf_accel.kernels.block_summary import block_summary
from hf_accel.kernels.sparse_linear_attention import sparse_linear_attention
from hf_accel.ledger import Ledger
from hf_accel.registry import register
from hf_accel.report import MethodReport
from hf_accel.sites.attention.base import AttentionMethod, SparseAttentionConfig
from hf_accel.sites.attention.heads import head_dim
from hf_accel.sites.attention.seam import AttentionSeams

PROJECTION = "proj_l"  # name of the module in each attention; the checkpoints of the authors have the same


@dataclass(frozen=True)
class SLAConfig(SparseAttentionConfig):
    """Settings of :class:`SLA`. Names follow paper and code."""

    METHOD = "sla"

    topk: float = setting(0.05, "share of key blocks that get exact attention (the density)", gt=0, le=1)
    k_l: float = setting(0.1, "share of key blocks dropped; only with linear_scope='marginal'", ge=0, le=1)
    block_q: int = setting(64, "queries per block", choices=(64, 128))
    block_k: int = setting(64, "keys per block", choices=(64, 128))
    feature_map: str = setting("softmax", "of the linear branch", choices=("softmax", "elu", "relu"))
    linear_scope: str = setting("rest", "blocks that the linear branch covers", choices=("rest", "marginal", "all"))
    weights: str | None = setting(None, "trained proj_l: a folder, a file, or 'owner/name' on the Hub")


class BlockClasses(NamedTuple):
    """Bool maps ``[B, H, ceil(S / block_q), ceil(S / block_k)]``; blocks in neither are marginal."""

    critical: torch.Tensor
    negligible: torch.Tensor | None


class Geometry(NamedTuple):
    """What the lengths of a call decide.

    Attributes:
        text: bool ``[query blocks, key blocks]``: a text token on either side.
        ranked: key blocks without text, of which ``topk`` is a share.
        query_sizes, key_sizes: tokens per block.
    """

    text: torch.Tensor
    ranked: int
    query_sizes: torch.Tensor
    key_sizes: torch.Tensor

    @classmethod
    def of(cls, call: AttentionCall, block_q: int, block_k: int) -> Geometry:
        """Built on the CPU and moved once, so that no layer waits for a device."""
        sequence = call.query.shape[2]
        sizes = [block_sizes(sequence, size) for size in (block_q, block_k)]
        rows, columns = (text_blocks(call.span, sequence, size) for size in (block_q, block_k))
        device = call.query.device
        text = (rows[:, None] | columns).to(device)
        return cls(text, int((~columns).sum()), *(size.to(device) for size in sizes))


@register
class SLA(AttentionMethod):
    """Exact attention on critical blocks plus projected linear attention on the rest."""

    name = "sla"
    paper = "SLA, arXiv 2509.24006"
    summary = "trainable: exact attention on the top-k blocks, learned linear attention on the rest"
    facts = Facts(
        site="attention",
        needs=frozenset({"text span", "trained weights"}),
        media=frozenset({"video", "image"}),
        backward=True,
        full_budget={"topk": 1.0, "dense_steps": 0, "dense_layers": 0},
        budget="topk",
    )
    Config = SLAConfig
    config: SLAConfig
    trained_with = ("block_q", "block_k", "feature_map", "linear_scope")

    def __init__(self, config: SLAConfig):
        super().__init__(config)
        self._names: list[str] = []
        self._projections: list[torch.nn.Linear] = []
        self._geometries: Recent[Geometry] = Recent()
        self._known_to_be_trained = config.topk == 1  # nothing is left to the linear branch

    # -- parameters ------------------------------------------------------------------------------------------------

    def take_over(self, former: SLA) -> None:
        same = all(getattr(self.config, name) == getattr(former.config, name) for name in self.trained_with)
        if self.config.weights is None and same:
            self._projections = former._projections

    def install(self, model: Model, ledger: Ledger, report: MethodReport, clock: Clocks) -> AttentionSeams:
        seams = super().install(model, ledger, report, clock)
        self._names = [layer.name for layer in seams.shared.layers]
        attentions = [model.module.get_submodule(name) for name in self._names]
        kept = len(self._projections) == len(attentions)
        if not kept:
            self._projections = [zero_projection(name, a) for name, a in zip(self._names, attentions, strict=True)]
        for attention, projection in zip(attentions, self._projections, strict=True):
            ledger.submodule(attention, PROJECTION, projection)
        if self.config.weights is not None:
            settings = self.config.to_dict()["settings"]
            own = self.trainable_parameters()
            report.notes += parameters.load(self.config.weights, self.name, own, settings, self.trained_with)
        elif not kept:
            report.notes.append(f"{PROJECTION} was zero when applied: fine-tune, or give weights=")
        return seams

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        layers = zip(self._names, self._projections, strict=True)
        return {f"{layer}.{PROJECTION}.{key}": p for layer, module in layers for key, p in module.named_parameters()}

    def stand_alone(self, layers: int, head_dim: int) -> None:
        self._projections = [torch.nn.Linear(head_dim, head_dim) for _ in range(layers)]
        for parameter in (p for projection in self._projections for p in projection.parameters()):
            torch.nn.init.zeros_(parameter)
        self._known_to_be_trained = True  # nobody looks at these pictures

    # -- attention -------------------------------------------------------------------------------------------------

    def attend(self, call: AttentionCall, state: Any) -> torch.Tensor:
        try:
            valid = call.key_validity()
        except ValueError as error:
            return call.fallback(str(error))
        if call.query.shape[2] != call.key.shape[2]:
            return call.fallback(f"{call.query.shape[2]} queries on {call.key.shape[2]} keys: no self-attention")
        if not call.needs_grad:
            self._warn_if_untrained()
        classes = self.classify(call, valid)
        index, count = block_map_to_index(classes.critical)
        skipped = {}
        if classes.negligible is not None:
            skipped = dict(zip(("skip_index", "skip_count"), block_map_to_index(classes.negligible), strict=True))
        sparse, linear = sparse_linear_attention(
            call.query, call.key, call.value, index, count,
            feature_map=self.config.feature_map, linear_scope=self.config.linear_scope,
            block_size=(self.config.block_q, self.config.block_k), scale=call.scale, key_valid=valid,
            backend=self.config.backend, **skipped,
        )  # fmt: skip
        self._record_density(call, classes.critical)
        return sparse + self.project(linear, call.layer.index)

    def project(self, linear: torch.Tensor, layer: int) -> torch.Tensor:
        """``proj_l`` of a layer on the linear branch's output ``[B, H, S, D]``."""
        projection = self._projections[layer]
        # Offloading moves modules that were there when it was set up; this one came later.
        weight, bias = (p.to(linear.device, linear.dtype) for p in (projection.weight, projection.bias))
        return F.linear(linear, weight, bias).to(linear.dtype)

    @torch.no_grad()
    def classify(self, call: AttentionCall, valid: torch.Tensor | None = None) -> BlockClasses:
        """Which blocks are critical and which negligible. ``valid``: ``[B, S]`` keys that are not hidden."""
        settings, geometry = self.config, self._geometry(call)
        query = block_summary(call.query, settings.block_q, backend=settings.backend).mean
        key = block_summary(call.key, settings.block_k, center=True, key_valid=valid, backend=settings.backend).mean
        scores = query @ expand_heads(key, query.shape[1]).mT
        ranked = geometry.ranked
        kept = min(max(1, share_of(settings.topk, ranked)), ranked)
        critical = geometry.text.expand_as(scores)
        if kept:
            critical = critical | top_k(scores.masked_fill(geometry.text, float("-inf")), kept)
        if settings.linear_scope != "marginal":
            return BlockClasses(critical, None)
        negligible = torch.zeros_like(critical)
        if dropped := min(share_of(settings.k_l, ranked), ranked - kept):
            negligible = top_k((-scores).masked_fill(critical, float("-inf")), dropped) & ~critical
        return BlockClasses(critical, negligible)

    def _geometry(self, call: AttentionCall) -> Geometry:
        """What depends on lengths alone, kept for the next layers and steps."""
        key = call.query.shape[2], call.grid, call.query.device
        return self._geometries.get(key, lambda: Geometry.of(call, self.config.block_q, self.config.block_k))

    def _record_density(self, call: AttentionCall, critical: torch.Tensor) -> None:
        geometry = self._geometry(call)
        sizes = (size.expand(*critical.shape[:2], -1) for size in (geometry.query_sizes, geometry.key_sizes))
        call.record_density(density(critical, *sizes))

    def _warn_if_untrained(self) -> None:
        """Once: at inference with zero ``proj_l`` this is plain block-sparse attention. Reads parameters once."""
        if self._known_to_be_trained or any(projection.training for projection in self._projections):
            return
        self._known_to_be_trained = True
        if not any(bool(p.any()) for p in self.trainable_parameters().values()):
            warnings.warn(
                f"hf_accel: sla runs untrained ({PROJECTION} is all zeros): this is block-sparse attention at density "
                f"{self.config.topk}, and quality is poor. Fine-tune with hf_accel.train, or give weights=.",
                stacklevel=2,
            )


def zero_projection(name: str, attention: torch.nn.Module) -> torch.nn.Linear:
    """``Linear(D, D)`` of zeros in fp32, on the attention's device and in its mode."""
    size = head_dim(name, attention)
    anchor = next(chain(attention.parameters(), attention.buffers()))  # packed linears have buffers only
    projection = torch.nn.Linear(size, size, device="cpu" if anchor.is_meta else anchor.device, dtype=torch.float32)
    torch.nn.init.zeros_(projection.weight)
    torch.nn.init.zeros_(projection.bias)
    return projection.train(attention.training)


def share_of(share: float, blocks: int) -> int:
    """``floor(share * blocks)``; a product that only rounding keeps below a whole number counts as that number."""
    return int(share * blocks * (1 + 1e-9))
