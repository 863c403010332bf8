"""Attention of causal language models in transformers, during the prefill.

The seam is transformers' ``AttentionInterface``: attention functions of ours are registered while any model needs them.
The patched attention modules read a view of their configuration that names ours, and only they do: the model's own
configuration, and with it how masks are made, stays as it is. Ours hand on to the function the module would have
called, also after ``model.set_attn_implementation(...)``.

The seam stands on the network that holds the decoder layers, which a language model with a head calls as often as
trainers with losses of their own and users of embeddings do.

A method sees the prefill (more than one query). Decoding steps run the model's own attention and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_accel.attention.call import Step
from hf_accel.attention.masks import split_causal
from hf_accel.errors import NothingPatched
from hf_accel.hosts import attention_interface
from hf_accel.hosts.attention_interface import ALTERING, NATIVE, native_function
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.denoisers import Denoiser
from hf_accel.hosts.patching.registration import SharedRegistration
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.sites.attention.interception import gradients_needed, others, seen_by_others, traced_beside_others
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
    found = attentions(module)
    able = getattr(type(module), "_can_set_attn_implementation", None)
    if not found or able is None or not able():
        return f"{name} does its own attention and does not ask transformers' AttentionInterface"
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    if implementation not in NATIVE:
        return (
            f"{name} runs attention as {implementation!r}; call model.set_attn_implementation('sdpa') first "
            f"(known: {', '.join(NATIVE)})"
        )
    if any(map(attention_interface.asks_for_its_name, {type(sub) for _, sub in found})):
        return f"{name} selects tokens by itself, in another way for each attention implementation"
    if not all(sub.is_causal for _, sub in found):
        return f"{name} has attention that is not causal"
    return None


class LanguageContext(AttentionSeam):
    """The seam of a language model: one generation per prefill, no token grid, no denoising step."""

    def __init__(self, names: list[str], core: AttentionCore, clocks: Clocks):
        super().__init__(Denoiser((), _no_grid, medium="text"), names, core, clocks)
        self._step: Step | None = None

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
        split = self._masks.get(mask, lambda: split_causal(mask))
        if split is None:
            return self.run_dense("a mask that is not causal with hidden keys (a sliding window, packed texts)", dense)
        keys, valid = split
        hidden = valid[:, None, None, :] if valid is not None else None
        return super().attend(query, key[:, :, :keys], value[:, :, :keys], hidden, scale, True, needs_grad, dense)


def _no_grid(module: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
    """Text has no grid."""


class PrefillHook:
    """Forward pre-hook of the language model: tells the request's seam of every forward."""

    def __init__(self, seams: AttentionSeams):
        self.seams = seams

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        name = next((name for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        tokens = kwargs[name] if name is not None else args[0]
        if torch.compiler.is_compiling():
            marked = torch.ops.hf_accel.begin_forward(tokens, tokens.new_zeros(1), None, [], self.seams.key)
            return (args, {**kwargs, name: marked}) if name is not None else ((marked, *args[1:]), kwargs)
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
    ledger.hold(SharedRegistration(PREFIX, _register))
    attention_interface.read_renamed((attention for _, attention in found), PREFIX, ledger)
    for index, (name, attention) in enumerate(found):
        ledger.pre_hook(attention, LayerHook(seams, index))
        seams.shared.places.append(_LanguagePlace(attention, attention.config))
        report.patched.append(Patched(model.name, name, "attention through transformers' AttentionInterface"))
    stacks = [decoder_of(model.module, name) for name, _ in found]
    stack = stacks[0] if all(one is stacks[0] for one in stacks) else model.module
    ledger.pre_hook(stack, PrefillHook(seams))
    ledger.post_hook(stack, EndHook(seams))
    return seams


def decoder_of(module: torch.nn.Module, attention: str) -> torch.nn.Module:
    """The network that holds the decoder layers: the innermost model of transformers around an attention module of this
    dotted name."""
    from transformers import PreTrainedModel

    found, inner = module, module
    for name in attention.split("."):
        inner = getattr(inner, name)
        if isinstance(inner, PreTrainedModel):
            found = inner
    return found


class _LanguagePlace:
    """An attention module that reads our attention function's name from a view of its configuration."""

    def __init__(self, attention: Any, view: Any):
        self.attention, self.view = attention, view

    @property
    def silent(self) -> str:
        return f"its {type(self.attention).__name__} did not ask transformers' AttentionInterface"

    def replaced(self) -> str | None:
        current = self.attention.config
        if current is not self.view:
            return "it was given another configuration after apply(); hf_accel.revert(model, force=True), apply again"
        if (implementation := current._attn_implementation_internal) in NATIVE:
            return None
        return (
            f"model.set_attn_implementation({implementation!r}) was called after apply(); methods stand in front of "
            f"{' and '.join(map(repr, NATIVE))}, so set one of them"
        )

    def may_be_skipped(self) -> bool:
        return False

    def may_all_be_skipped(self) -> bool:
        return False


def _register() -> Callable[[], None]:
    """Our attention functions in front of transformers'; returns the removal."""
    return attention_interface.register(PREFIX, _attention)


def _attention(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers: ``[B, H, S, D]`` in; ``[B, S, H, D]`` out, and the weights where the
    model's own attention ran and has them."""
    native = native_function(implementation, module)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    # Without a mask transformers' sdpa means a causal one, and its eager attention none.
    asked = kwargs.get("is_causal")
    implied = implementation != "eager" and bool(module.is_causal if asked is None else asked)
    causal = attention_mask is None and query.shape[2] > 1 and implied
    needs_grad = gradients_needed(query, key, value)
    shown = bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))
    if torch.compiler.is_compiling() and not shown and not _alters(kwargs) and not traced_beside_others():
        grouped = query.shape[1] != key.shape[1]
        out = torch.ops.hf_accel.attend(query, key, value, attention_mask, scale, causal, grouped, True, needs_grad)
        return out.transpose(1, 2), None
    context = None if torch.compiler.is_compiling() else active_context()
    if context is None:
        return native(module, query, key, value, attention_mask, **kwargs)

    weights: torch.Tensor | None = None

    def dense(_: Any) -> torch.Tensor:
        nonlocal weights
        out, weights = native(module, query, key, value, attention_mask, **kwargs)
        return out.transpose(1, 2)

    if (reason := "attention weights are asked for" if shown else _alters(kwargs)) is not None:
        out = context.run_dense(reason, dense)
    elif (who := others()) is not None:
        out = seen_by_others(who, context, dense)
    else:
        out = context.attend(query, key, value, attention_mask, scale, causal, needs_grad, dense)
    return out.transpose(1, 2), weights


def _alters(kwargs: Mapping[str, Any]) -> str | None:
    """Why no method may take a call with these arguments, or None."""
    for name in ALTERING:
        if kwargs.get(name) is not None:
            return f"attention with {name}"
    return "dropout is on" if kwargs.get("dropout") else None
