"""Rows of a masked diffusion model's input embeddings replaced by something made of its last prediction.

Hooks on the model learn which forward is a denoising step and keep the logits at open positions (those that hold the
mask token); a hook on the input embedding hands the rows that are open still to a :class:`ResidualCore`. Samplers, ours
or foreign, need not know of it.

What is kept belongs to one block, and to each row of the batch by itself. Models with a cache tell by it when a block
begins (``block_context.py``). Those that run the whole sequence at every step do not, so a row goes on only where its
tokens are those of the last forward with some masks filled; masks that reappear, or a forward with the very same
tokens, begin anew. Nothing is done in training mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.errors import NotApplicable
from hf_accel.hosts.block_families import FULL, arguments_of, family_of, mask_token_of
from hf_accel.hosts.clocks.block_steps import BlockClock, BlockStep
from hf_accel.hosts.patching.eager import run_eagerly
from hf_accel.hosts.target import Model, kind
from hf_accel.kernels.common import kernel_log
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.requests import Occupied, PerRequest, Request
from hf_accel.sites.embedding.start import NO_LOGITS, Start, logit_shift_of, logits_of, rows_at
from hf_accel.sites.embedding.statistics import ResidualStatistics
from hf_accel.sites.embedding.table import EmbeddingTable, embedding_table

_ATTRIBUTE = "_hf_accel_residual"


class ResidualCore(Protocol):
    """What is put into the site."""

    def mix(self, embedded: torch.Tensor, logits: torch.Tensor, table: EmbeddingTable) -> tuple[torch.Tensor, Any]:
        """The rows ``[N, D]`` that take the place of ``embedded``, from the last ``logits`` ``[N, V]`` there; and the
        weight of the residual, fp32 ``[N]``, for the report."""


@dataclass
class Kept:
    """Predictions at open positions.

    Attributes:
        tokens: int64 ``[B, n]``, what the forward saw.
        slots: int64 ``[B, n]``, the row of ``logits`` that belongs to a position; -1: none.
        logits: ``[N, V]``, copied: samplers ban tokens in place.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    logits: torch.Tensor


class ResidualSeam:
    """State of one request at the site on one model.

    Args:
        core: makes the rows.
        clock: tells prefill, denoising steps and commits apart.
        mask_token: id of the mask token.
        shift: see :func:`logit_shift_of`.
        start: of the first step of a block; None: nothing is replaced there.
    """

    def __init__(
        self,
        core: ResidualCore,
        clock: BlockClock,
        mask_token: int,
        shift: int,
        start: Start | None,
    ):
        self.core, self.clock, self.start, self.run = core, clock, start, ResidualStatistics()
        self.mask_token, self.shift = mask_token, shift
        self._mixing = False
        self._occupied = Occupied()
        self._drop()

    def _drop(self) -> None:
        self._kept: Kept | None = None  # of the last step
        self._pending: Kept | None = None  # for the embedding of this forward
        self._tokens: torch.Tensor | None = None  # of this forward, if it is a step
        self._first = False  # and no row of it goes on from another
        self._embedded = False  # and its tokens passed the embedding

    def fork(self, request: Request) -> ResidualSeam:
        start = self.start.fork() if self.start is not None else None
        return ResidualSeam(self.core, self.clock.fork(), self.mask_token, self.shift, start)

    def begin(self, module: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
        """A forward of the model begins."""
        self._occupied.enter()
        kept = self._kept
        self._drop()
        if arguments.get("input_ids") is None and arguments.get("inputs_embeds") is None:
            return  # the model says what it misses
        if module.training:
            self.run.dense_calls["training mode"] += 1
            return
        step = self.clock.begin(arguments)
        self.run.forwards[step.phase] += 1
        if step.phase in ("prefill", "commit"):
            if self.start is not None:
                self.start.follow(arguments, step)
            return
        tokens = arguments.get("input_ids")
        if tokens is None:
            self.run.dense_calls["called with inputs_embeds: the tokens are unknown"] += 1
            return
        opened = tokens == self.mask_token
        if kept is not None:
            kept = self._go_on(kept, step, tokens, opened)
        self._first = kept is None
        if self.start is not None:
            kept = self._begin_rows(module, arguments, step, kept, opened)
        self._pending, self._tokens = kept, tokens.clone()

    def _go_on(self, kept: Kept, step: BlockStep, tokens: torch.Tensor, opened: torch.Tensor) -> Kept | None:
        """What was kept, without rows of the batch that do not continue the last step."""
        if kept.tokens.shape != tokens.shape or kept.tokens.device != tokens.device:
            return None
        if step.phase == "denoise" and step.index == 0:
            return None
        was_open, changed = kept.tokens == self.mask_token, tokens != kept.tokens
        void = (opened & ~was_open).any(1)
        if self.clock.family.final or self.clock.family is FULL:  # samplers of LLaDA and Dream revise nothing either
            void |= (changed & ~was_open).any(1)
        if step.phase == "whole":
            void |= ~changed.any()  # a sampler commits something at every step
        slots = kept.slots.masked_fill(void[:, None] | ~opened, -1)
        return Kept(tokens, slots, kept.logits) if bool((slots >= 0).any()) else None

    def _begin_rows(
        self, module: Any, arguments: Mapping[str, Any], step: BlockStep, kept: Kept | None, opened: torch.Tensor
    ) -> Kept | None:
        """Give logits of :attr:`start` to the open positions that have none."""
        start: Any = self.start
        fresh = opened if kept is None else opened & (kept.slots < 0)
        if not bool(fresh.any()):
            return kept
        with torch.no_grad():
            logits, reason = start.logits(module, arguments, step, fresh)
        if logits is None:
            self.run.dense_calls[f"cold start: {reason}"] += 1
            return kept
        slots = torch.full_like(arguments["input_ids"], -1) if kept is None else kept.slots.clone()
        before = 0 if kept is None else len(kept.logits)
        slots[fresh] = torch.arange(before, before + len(logits), device=slots.device)
        both = logits if kept is None else torch.cat([kept.logits, logits.to(kept.logits)])
        return Kept(arguments["input_ids"], slots, both)

    def embed(self, embedding: torch.nn.Module, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """The embedding module gave ``output`` ``[B, m, D]`` for ``ids``, the last m tokens of the forward."""
        pending = self._pending
        if pending is None or self._mixing or ids.ndim != 2 or ids.shape[0] != len(pending.slots):
            return None
        if not 0 < ids.shape[1] <= pending.slots.shape[1]:
            return None
        if ids.shape[1] < pending.slots.shape[1] and not torch.equal(ids, pending.tokens[:, -ids.shape[1] :]):
            return None  # a prefix cache computes other tokens first
        self._embedded = True
        slots = pending.slots[:, -ids.shape[1] :].flatten()
        places = (slots >= 0).nonzero().squeeze(1)
        if not len(places):
            return None
        rows = pending.logits[slots[places].to(pending.logits.device)]
        flat = output.reshape(-1, output.shape[-1])
        places = places.to(flat.device)
        self._mixing = True  # the table may ask the module too
        try:
            table = embedding_table(embedding, rows.shape[-1], ids.device)
            with kernel_log.logging_to(self.run.kernels):
                mixed, weights = self.core.mix(flat[places], rows, table)
        finally:
            self._mixing = False
        self.run.record(weights)
        return flat.index_put((places,), mixed).view_as(output)

    def end(self, output: Any) -> None:
        """The forward gave ``output``; None: it raised."""
        if not self._occupied.leave():
            return  # it was refused, while another one runs
        tokens, first = self._tokens, self._first
        missed = self._pending is not None and not self._embedded
        self._drop()
        self.clock.end(raised=output is None)
        if tokens is None or output is None:
            return
        if missed:
            self.run.dense_calls["the hooked embedding did not run: it was replaced after apply"] += 1
        opened, logits = tokens == self.mask_token, logits_of(output)
        if logits is not None:
            opened[:, : max(opened.shape[1] - logits.shape[1], 0)] = False  # prefix caches compute the last tokens only
        rows = rows_at(logits, opened, self.shift)
        if rows is None:
            self.run.dense_calls[NO_LOGITS] += 1
        elif len(rows):
            self.run.blocks += first
            slots = torch.full_like(tokens, -1)
            slots[opened] = torch.arange(len(rows), device=tokens.device)
            self._kept = Kept(tokens, slots, rows)


ResidualSeams = PerRequest[ResidualSeam]


class BeginHook:
    """Forward pre-hook of the model."""

    def __init__(self, seams: ResidualSeams):
        self.seams = seams

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        run_eagerly(self._begin, module, args, kwargs)

    def _begin(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.seams.now().begin(module, arguments_of(module, args, kwargs))


class EmbeddingHook:
    """Forward hook of the input embedding."""

    def __init__(self, seams: ResidualSeams):
        self.seams = seams

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return run_eagerly(self._embed, module, args, kwargs, output)

    def _embed(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        ids = args[0] if args else kwargs.get("input")
        if isinstance(output, torch.Tensor) and isinstance(ids, torch.Tensor):
            return self.seams.now().embed(module, ids, output)
        return None


class EndHook:
    """Forward hook of the model, called after exceptions too."""

    def __init__(self, seams: ResidualSeams):
        self.seams = seams

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run_eagerly(self._end, output)

    def _end(self, output: Any) -> None:
        self.seams.now().end(output)


# -- installation --------------------------------------------------------------------------------------------------


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model has no open positions with a mask token, in words; None if it has."""
    name, family = type(module).__name__, family_of(module)
    if family is None:
        return (
            f"{name} is a {kind(module)}, not a masked diffusion language model (SDAR class, LLaDA2, LLaDA, Dream), "
            "whose open positions hold a mask token"
        )
    if not family.masked:
        return (
            f"{name} has no mask token: its open positions hold random tokens, and its self-conditioning feeds back "
            "the last prediction already, as it was trained to. 'soft-embed' makes that self-conditioning faster"
        )
    if _ATTRIBUTE in module.__dict__:
        return "its input embedding is already taken by another hf_accel method"
    return None


def install(
    model: Model,
    core: ResidualCore,
    ledger: Ledger,
    report: MethodReport,
    *,
    mask_token: int | None = None,
    shift: int | None = None,
    start: Start | None = None,
) -> ResidualSeams:
    """Let ``core`` replace the embeddings of open positions at denoising steps.

    Args:
        mask_token: None: as the model's configuration says.
        shift: None: see :func:`logit_shift_of`.

    Raises:
        NotApplicable: the model has no mask token, or no embedding module.
    """
    module: Any = model.module
    reason = why_not(module)
    if reason is not None:
        raise NotApplicable(f"{model.class_name}: {reason}.")
    token = mask_token if mask_token is not None else mask_token_of(module)
    if token is None:
        raise NotApplicable(
            f"{model.class_name} tells of no mask token (config.mask_token_id), and nothing can be mixed in where none "
            "stands. If it has one, give mask_token_id=."
        )
    embedding = module.get_input_embeddings()
    family: Any = family_of(module)
    clock = BlockClock(family, token, tokens=False)  # tokens are compared here, row by row
    shift = logit_shift_of(module) if shift is None else shift
    seams = ResidualSeams(ResidualSeam(core, clock, token, shift, start))
    report.run = seams
    ledger.set(module, _ATTRIBUTE, seams)
    name = next((name for name, sub in module.named_modules() if sub is embedding), "")
    ledger.pre_hook(module, BeginHook(seams))
    ledger.post_hook(embedding, EmbeddingHook(seams))
    ledger.post_hook(module, EndHook(seams))
    report.patched.append(Patched(model.name, name, f"input embeddings of open positions ({family.name})"))
    return seams


def seams_of(module: torch.nn.Module) -> ResidualSeams | None:
    """The site on a model, if a method took it."""
    return module.__dict__.get(_ATTRIBUTE)


def context_of(module: torch.nn.Module) -> ResidualSeam | None:
    """What the request that runs now has at the site on a model, if a method took it."""
    seams = seams_of(module)
    return seams.now() if seams is not None else None
