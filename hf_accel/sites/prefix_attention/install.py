"""The attention seam of block-diffusion models: the active block against a frozen prefix, without joining the two.

These models copy their whole cache at every layer of every denoising step: they concatenate the prefix K/V with those
of the block. Here the forward of each patched attention hands both parts to a :class:`PrefixCore` as they lie. Prefill,
commit and uncached forwards run the model's own code.

Two ways in, found by structure: ``block_sdar`` replaces what a module does between its projections, ``block_gemma``
stands behind transformers' ``AttentionInterface``. Both work on an instance: module attributes and registrations, all
through the ledger.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from hf_accel.errors import NothingPatched
from hf_accel.hosts.attention_interface import NATIVE, read_renamed
from hf_accel.hosts.block_families import (
    DIFFUSION_GEMMA,
    LLADA2,
    SDAR,
    family_of,
    mask_token_of,
    sdar_attentions,
)
from hf_accel.hosts.clocks.block_steps import BlockClock, follow
from hf_accel.hosts.patching.forward_override import override_forward
from hf_accel.hosts.patching.registration import SharedRegistration
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.sites.prefix_attention import gemma as block_gemma
from hf_accel.sites.prefix_attention import sdar as block_sdar
from hf_accel.sites.prefix_attention.masks import split_mask
from hf_accel.sites.prefix_attention.seam import (
    SEAT,
    PrefixCore,
    PrefixSeam,
    PrefixSeams,
    SeamEndHook,
    SeamHook,
    Seat,
)

__all__ = ["PrefixCore", "PrefixSeam", "install", "split_mask", "why_not"]


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model has no frozen prefix that a method could attend to apart, in words; None if it has."""
    name = type(module).__name__
    family = family_of(module)
    if family is None:
        return f"{name} is a {kind(module)}, not a block-diffusion language model (SDAR class, DiffusionGemma)"
    if not family.frozen_prefix:
        return (
            f"{name} attends over the whole sequence both ways at every step, so no prefix is ever frozen; methods on "
            "prefix attention need a block-causal model (SDAR class, DiffusionGemma)"
        )
    if any(SEAT in sub.__dict__ for sub in module.modules()):
        return "its attention is already taken by another hf_accel method"
    if family is LLADA2:
        return (
            f"{name} computes its whole window anew at every step and keeps no K/V; 'prefix-cache' makes it keep those "
            "of finished blocks"
        )
    if family is DIFFUSION_GEMMA:
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        if implementation not in NATIVE:
            return (
                f"{name} runs attention as {implementation!r}; call model.set_attn_implementation('sdpa') first "
                f"(known: {', '.join(NATIVE)})"
            )
    return None


def install(model: Model, core: PrefixCore, ledger: Ledger, report: MethodReport) -> PrefixSeams:
    """Route the attention of denoising steps through ``core``.

    Raises:
        NothingPatched: the model has no such attention.
    """
    module: Any = model.module
    reason = why_not(module)
    if reason is not None:
        raise NothingPatched(f"{model.class_name}: {reason}.")
    gemma = family_of(module) is DIFFUSION_GEMMA
    family = DIFFUSION_GEMMA if gemma else SDAR
    found: list[tuple[str, Any]] = block_gemma.decoder_attentions(module) if gemma else sdar_attentions(module)
    context = BlockClock(family, mask_token_of(module), tokens=not core.traceable)
    seams = PrefixSeams(PrefixSeam(context, core, [name for name, _ in found]))
    report.run = seams
    if gemma:
        ledger.hold(SharedRegistration(block_gemma.PREFIX, block_gemma.register))
        # The encoder, which has the same configuration, keeps its own attention.
        read_renamed((attention for _, attention in found), block_gemma.PREFIX, ledger)
    make = block_gemma.forward_without_cache if gemma else block_sdar.split_forward
    forwards = {cls: make(cls) for cls in {type(attention) for _, attention in found}}
    for index, (name, attention) in enumerate(found):
        ledger.set(attention, SEAT, Seat(seams, index))
        override_forward(ledger, attention, types.MethodType(forwards[type(attention)], attention))
        report.patched.append(Patched(model.name, name, f"attention of denoising steps ({family.name})"))
    if core.traceable and not gemma:
        report.notes.append(block_sdar.COMPILED)
    follow(module, context, ledger, functools.partial(SeamHook, seams), SeamEndHook(seams))
    return seams
