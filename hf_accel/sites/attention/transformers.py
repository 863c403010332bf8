"""Attention of causal language models in transformers, during the prefill.

The seam is transformers' ``AttentionInterface``: the configuration of the patched model names an attention function and
a mask function of ours, registered while any model needs them. Both hand on to the functions the model had, so that a
second model which shares the configuration object computes what it did.

A method sees the prefill (more than one query). Decoding steps run the model's own attention and are counted.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_accel.attention.call import Step
from hf_accel.errors import NothingPatched
from hf_accel.hosts import attention_interface
from hf_accel.hosts.attention_interface import ALTERING, NATIVE, native_function
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.denoisers import Denoiser
from hf_accel.hosts.patching.registration import SharedRegistration
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.sites.attention.seam import (
    AttentionCore,
    AttentionSeam,
    AttentionSeams,
    EndHook,
    LayerHook,
    active_context,
    seams_of,
)

PREFIX = "hf_accel-"


def attentions(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Attention modules of the decoder layers: those that know their layer and read their implementation's name."""
    return [
        (name, sub)
        for name, sub in module.named_modules()
        if hasattr(sub, "layer_idx") and hasattr(sub, "is_causal") and hasattr(sub, "config")
    ]


def why_not(module: torch.nn.Module) -> str | None:
    """Why the attention of this language model cannot be reached, in words; None if it can."""
    if seams_of(module) is not None:
        return "its attention is already taken by another hf_accel method"
    name = type(module).__name__
    able = getattr(type(module), "_can_set_attn_implementation", None)
    if not attentions(module) or able is None or not able():
        return f"{name} does its own attention and does not ask transformers' AttentionInterface"
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in NATIVE:
        return (
            f"{name} runs attention as {implementation!r}; call model.set_attn_implementation('sdpa') first "
            f"(known: {', '.join(NATIVE)})"
        )
    if not all(sub.is_causal for _, sub in attentions(module)):
        return f"{name} has attention that is not causal"
    return None


class LanguageContext(AttentionSeam):
    """The seam of a language model: one generation per prefill, no token grid, no denoising step."""

    def __init__(self, names: list[str], core: AttentionCore, clocks: Clocks):
        super().__init__(Denoiser((), _no_grid, medium="text"), names, core, clocks)
        self._step: Step | None = None
        self._split: tuple[weakref.ref, tuple[int, torch.Tensor | None] | None] | None = None

    @property
    def step(self) -> Step | None:
        return self._step

    def begin(
        self,
        latents: torch.Tensor,
        timestep: Any = None,
        dims: Any = None,
        ids: Any = None,
        prompt: Any = None,
        compiled: bool = False,
    ) -> None:
        """One forward over ``[B, S, ...]`` tokens begins; more than one token is a prefill."""
        if not compiled:
            self._occupied.enter()
        if latents.shape[1] > 1 or self._step is None:
            self._generation += 1
            self._step = Step(0, None, 0.0, 0.0, "prefill", self._generation)
            self.run.begin_generation()
            self.core.reset()
        self._split = None
        self._enter(latents.shape[0], compiled)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        causal: bool,
        needs_grad: bool,
        dense: Callable[[Any], torch.Tensor],
    ) -> torch.Tensor:
        if query.shape[2] == 1:
            return self.run_dense("decoding: one query", dense)
        if mask is None:  # transformers then means query i to see keys up to i: the rest of a static cache is empty
            keys = query.shape[2] if causal else key.shape[2]
            return super().attend(query, key[:, :, :keys], value[:, :, :keys], None, scale, causal, needs_grad, dense)
        split = self._causal_part(mask)
        if split is None:
            return self.run_dense("a mask that is not causal with hidden keys (a sliding window, packed texts)", dense)
        keys, valid = split
        hidden = valid[:, None, None, :] if valid is not None else None
        return super().attend(query, key[:, :, :keys], value[:, :, :keys], hidden, scale, True, needs_grad, dense)

    def _causal_part(self, mask: torch.Tensor) -> tuple[int, torch.Tensor | None] | None:
        """:func:`split_causal`, once for the layers of a forward that are handed the same mask."""
        if self._split is None or self._split[0]() is not mask:
            self._split = weakref.ref(mask), split_causal(mask)
        return self._split[1]


def split_causal(mask: torch.Tensor) -> tuple[int, torch.Tensor | None] | None:
    """A mask as "causal, and these keys are hidden", or None if it is something else.

    Args:
        mask: ``[B, 1, Sq, Sk]``, bool (True = attend) or additive.

    Returns:
        ``keys``, the number of leading keys with which the last query is aligned (a static cache is longer), and the
        visible ones among them ``[B, keys]`` bool, or None if all are. Rows of hidden queries are not judged: what
        they compute is not read. Waits for the device.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        return None
    attend = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    queries = attend.shape[1]
    seen = attend[:, -1].any(0).nonzero()
    keys = int(seen[-1]) + 1 if len(seen) else 0
    if keys < queries:
        return None
    valid = attend[:, -1, :keys]
    place = torch.arange(attend.shape[2], device=mask.device)
    causal = place <= (torch.arange(queries, device=mask.device) + keys - queries)[:, None]
    expected = torch.nn.functional.pad(valid, (0, attend.shape[2] - keys))[:, None] & causal
    judged = valid[:, keys - queries :, None]
    if not bool(((attend == expected) | ~judged).all()):
        return None
    return keys, (None if bool(valid.all()) else valid)


def _no_grid(module: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
    """Text has no grid."""


class PrefillHook:
    """Forward pre-hook of the language model: tells the request's seam of every forward."""

    def __init__(self, seams: AttentionSeams):
        self.seams = seams

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        name = "input_ids" if kwargs.get("input_ids") is not None or args else "inputs_embeds"
        tokens = kwargs[name] if name in kwargs else args[0]
        if torch.compiler.is_compiling():
            marked = torch.ops.hf_accel.begin_forward(tokens, tokens.new_zeros(1), None, [], self.seams.key)
            return (args, {**kwargs, name: marked}) if name in kwargs else ((marked, *args[1:]), kwargs)
        self.seams.begin().begin(tokens, None, None, None)
        return None


def install(model: Model, core: AttentionCore, ledger: Ledger, report: MethodReport, clock: Clocks) -> AttentionSeams:
    """Route the attentions of a causal language model through ``core``.

    Raises:
        NothingPatched: its attention cannot be reached.
    """
    reason = why_not(model.module)
    if reason is not None:
        raise NothingPatched(f"{model.class_name}: {reason}.")
    found = attentions(model.module)
    seams = AttentionSeams(LanguageContext([name for name, _ in found], core, clock))
    report.run = seams
    implementation: str = model.module.config._attn_implementation  # type: ignore[union-attr, assignment]
    ledger.hold(SharedRegistration(PREFIX + implementation, functools.partial(_register, implementation)))
    configs = {id(config): config for config in (model.module.config, *(sub.config for _, sub in found))}
    for config in configs.values():
        ledger.set(config, "_attn_implementation_internal", PREFIX + implementation)
    for index, (name, attention) in enumerate(found):
        ledger.pre_hook(attention, LayerHook(seams, index))
        report.patched.append(Patched(model.name, name, "attention through transformers' AttentionInterface"))
    ledger.pre_hook(model.module, PrefillHook(seams))
    ledger.post_hook(model.module, EndHook(seams))
    return seams


def _register(implementation: str) -> Callable[[], None]:
    """Our attention function in front of that of ``implementation``; returns the removal."""
    function = functools.partial(_attention, implementation)
    return attention_interface.register(PREFIX + implementation, function, masks_of=implementation)


def _attention(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers: ``[B, H, S, D]`` in, ``[B, S, H, D]`` and no weights out."""
    native = native_function(implementation, module)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    causal = attention_mask is None and query.shape[2] > 1 and kwargs.get("is_causal") is not False
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if torch.compiler.is_compiling() and not _alters(kwargs):
        grouped = query.shape[1] != key.shape[1]
        out = torch.ops.hf_accel.attend(query, key, value, attention_mask, scale, causal, grouped, True, needs_grad)
        return out.transpose(1, 2), None
    context = None if torch.compiler.is_compiling() else active_context()
    if context is None or kwargs.get("output_attentions"):
        return native(module, query, key, value, attention_mask, **kwargs)

    def dense(_: Any) -> torch.Tensor:
        return native(module, query, key, value, attention_mask, **kwargs)[0].transpose(1, 2)

    if (reason := _alters(kwargs)) is not None:
        return context.run_dense(reason, dense).transpose(1, 2), None
    out = context.attend(query, key, value, attention_mask, scale, causal, needs_grad, dense)
    return out.transpose(1, 2), None


def _alters(kwargs: Mapping[str, Any]) -> str | None:
    """Why no method may take a call with these arguments, or None."""
    for name in ALTERING:
        if kwargs.get(name) is not None:
            return f"attention with {name}"
    return "dropout is on" if kwargs.get("dropout") else None
