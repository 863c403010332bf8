"""Putting an attention core into a diffusers denoiser, and taking it out again.

Two families of processors:

* those that call diffusers' ``dispatch_attention_fn`` and have ``_attention_backend``: the attribute is set, on this
  processor object only, to one private backend shared by all patched layers of all models (a member per layer would
  compile every block anew);
* those that end in ``F.scaled_dot_product_attention``: the processor is exchanged for a copy whose class runs the
  original ``__call__`` inside a ``TorchFunctionMode``.

Both hand the same :class:`~hf_accel.attention.call.AttentionCall` to the core. Everything is written in the ledger.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from hf_accel.errors import NothingPatched
from hf_accel.facts import Medium
from hf_accel.hosts.clocks.call_end import CallEnd
from hf_accel.hosts.clocks.steps import Announcement, Clock, Clocks
from hf_accel.hosts.denoisers import DENOISERS, describe
from hf_accel.hosts.foreign import hooks_on
from hf_accel.hosts.patching.forward_override import replaced_forward
from hf_accel.hosts.patching.registration import SharedRegistration
from hf_accel.hosts.target import Model, kind
from hf_accel.hosts.walk import modules, with_attribute
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched, Skipped
from hf_accel.sites.attention import transformers as language
from hf_accel.sites.attention.interception import (
    SdpaMode,
    gradients_needed,
    left_to,
    others,
    seen_by_others,
    traced_beside_others,
)
from hf_accel.sites.attention.seam import (
    AttentionCore,
    AttentionSeam,
    AttentionSeams,
    EndHook,
    LayerHook,
    RootHook,
    active_context,
    seams_of,
)

BACKEND_NAME = "hf_accel"
TRAINABLE_NAME = "hf_accel_trainable"  # of methods through which gradients flow


def why_not(module: torch.nn.Module, media: Collection[Medium] = frozenset({"video"})) -> str | None:
    """Why this model has no attention seam for a method of these media, in words; None if it has."""
    spec = describe(module)
    if spec is None and "text" in media and kind(module) == "language model":
        return language.why_not(module)
    if spec is None or spec.medium not in media:
        names = ", ".join(sorted(name for name, entry in DENOISERS.items() if entry.medium in media))
        what = kind(module) if spec is None else f"{kind(module)} of {spec.medium} tokens"
        return (
            f"{type(module).__name__} is a {what}; {' and '.join(m for m in ('video', 'image') if m in media)} "
            f"self-attention is found in {names}"
        )
    if seams_of(module) is not None:
        return "its attention is already taken by another hf_accel method"
    return None


def install(model: Model, core: AttentionCore, ledger: Ledger, report: MethodReport, clock: Clocks) -> AttentionSeams:
    """Route the self-attentions of ``model`` over video, image or text tokens through ``core``.

    Raises:
        NothingPatched: the class is known, but none of its attentions can be reached.
    """
    spec = describe(model.module)
    if spec is None and kind(model.module) == "language model":
        return language.install(model, core, ledger, report, clock)
    if spec is None:
        raise NothingPatched(f"{model.class_name}: {why_not(model.module)}.")
    found = spec.attentions(model.module)
    usable = []
    for name, attention in found:
        processor = getattr(attention, "processor", None)
        if processor is None or (isinstance(processor, torch.nn.Module) and not _dispatches(processor)):
            why = "no processor" if processor is None else f"processor {type(processor).__name__} is a module"
            report.skipped.append(Skipped(model.name, name, why))
        else:
            usable.append((name, attention))
    if not usable:
        raise NothingPatched(
            f"No attention of {model.class_name} could be patched. Looked for modules named like "
            f"{' or '.join(spec.self_attention)} with a diffusers attention processor; found {len(found)} by name"
            + (f", {report.skipped[-1].reason}." if report.skipped else ".")
        )
    seams = AttentionSeams(AttentionSeam(spec, [name for name, _ in usable], core, clock))
    report.run = seams
    processors = with_attribute(model.module, "processor")
    shared = _shared(processor for _, _, processor in processors)
    for index, (name, attention) in enumerate(usable):
        if _dispatches(attention.processor):
            clone = id(attention.processor) in shared
            _patch_dispatch(model.module, attention, index, seams.shared, ledger, clone)
            how = "attention through the dispatcher"
        else:
            _patch_sdpa(model.module, attention, seams.shared, ledger)
            how = "attention through scaled_dot_product_attention"
        ledger.pre_hook(attention, LayerHook(seams, index))
        report.patched.append(Patched(model.name, name, how))
    taken = {name for name, _ in found}
    report.skipped += [
        Skipped(model.name, name, "no self-attention over video or image tokens")
        for name, _, _ in processors
        if name not in taken
    ]
    ledger.pre_hook(model.module, RootHook(seams))
    ledger.post_hook(model.module, EndHook(seams))
    if hasattr(model.module, "cache_context"):
        ledger.set(model.module, "cache_context", types.MethodType(_announcing_cache_context, model.module))
    ledger.hold(CallEnd(model.module, seams))
    return seams


def _dispatches(processor: Any) -> bool:
    return hasattr(processor, "_attention_backend")


def _shared(processors: Iterable[object]) -> set[int]:
    """Identities of processor objects that several modules use (``set_attn_processor(single_object)``)."""
    return {identity for identity, uses in Counter(map(id, processors)).items() if uses > 1}


# -- what the pipeline tells ---------------------------------------------------------------------------------------


def _announcing_cache_context(self: torch.nn.Module, name: str, **kwargs: Any) -> Any:
    """Instance override of ``CacheMixin.cache_context``: diffusers delivers it to hooked blocks only."""
    inner = type(self).cache_context(self, name, **kwargs)  # type: ignore[attr-defined]
    seams = seams_of(self)
    return _Announced(inner, seams.now().clock if seams is not None else None, name, kwargs)


class _Announced:
    """Context manager: announces a forward to the clock around diffusers' own context."""

    def __init__(self, inner: Any, clock: Clock | None, name: str, said: dict[str, Any]):
        self._inner, self._clock = inner, clock
        self._announcement = Announcement(name, said.get("step_index"), said.get("num_inference_steps"))

    def __enter__(self) -> Any:
        if self._clock is not None:
            self._clock.announced = self._announcement
        return self._inner.__enter__()

    def __exit__(self, *exc: Any) -> Any:
        if self._clock is not None:
            self._clock.announced = None
        return self._inner.__exit__(*exc)


# -- processors that call the dispatcher ---------------------------------------------------------------------------


@functools.cache
def _private_member(name: str) -> Any:
    """A member of diffusers' closed backend enum that is not in the enum's own tables."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    member = str.__new__(AttentionBackendName, name)
    member._name_ = member._value_ = name
    return member


def _register_backend(name: str) -> Callable[[], None]:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    member = _private_member(name)
    registry.register(member)(_trainable_attention if name == TRAINABLE_NAME else _dispatched_attention)

    def remove() -> None:
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)

    return remove


def _patch_dispatch(
    root: torch.nn.Module, attention: torch.nn.Module, index: int, context: AttentionSeam, ledger: Ledger, clone: bool
) -> None:
    name = TRAINABLE_NAME if context.core.differentiable else BACKEND_NAME
    ledger.hold(SharedRegistration(name, functools.partial(_register_backend, name)))
    if clone:
        ledger.set(attention, "processor", copy.copy(attention.processor))
    processor: Any = attention.processor
    context.native[index] = processor._attention_backend
    ledger.set(processor, "_attention_backend", _private_member(name))
    context.places.append(_DispatchPlace(root, attention, processor, _private_member(name)))


def _dispatched_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    _parallel_config=None,
):
    """The private backend. ``[B, S, H, D]`` in and out; diffusers passes the arguments it finds by name."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = gradients_needed(query, key, value)
    if traced_beside_others():
        from hf_accel.hosts.patching.outside import outside_the_graph

        return outside_the_graph(
            _dispatched_attention, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            _parallel_config,
        )  # fmt: skip
    if torch.compiler.is_compiling() and _parallel_config is None and not dropout_p:
        return torch.ops.hf_accel.attend(query, key, value, attn_mask, scale, is_causal, enable_gqa, False, needs_grad)

    def dense(native: Any) -> torch.Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            backend=native, parallel_config=_parallel_config,
        ).transpose(1, 2)  # fmt: skip

    context = active_context()
    if context is None:
        return dense(None).transpose(1, 2)
    if (who := others()) is not None:
        return seen_by_others(who, context, dense).transpose(1, 2)
    if _parallel_config is not None or dropout_p:
        return context.run_dense("context parallelism or dropout is on", dense).transpose(1, 2)
    out = context.attend(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        attn_mask, scale, is_causal, needs_grad, dense,
    )  # fmt: skip
    return out.transpose(1, 2)


def _trainable_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    _parallel_config=None,
):
    """The private backend of a method that gradients flow through. An opaque operator would have to know the method's
    backward and its parameters, so in a compiled model a call that needs gradients leaves the graph."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config)
    if torch.compiler.is_compiling() and gradients_needed(query, key, value):
        from hf_accel.hosts.patching.outside import outside_the_graph

        return outside_the_graph(_dispatched_attention, *arguments)
    return _dispatched_attention(*arguments)


# -- processors that call scaled_dot_product_attention -------------------------------------------------------------


@functools.cache
def _patched_class(base: type, trainable: bool) -> type:
    """Subclass of a processor's class that runs the original ``__call__`` inside the mode.

    ``functools.wraps`` keeps the signature, by which diffusers filters the arguments it passes.
    """
    original: Callable = base.__call__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            with SdpaMode(trainable, last=traced_beside_others()):
                return original(self, *args, **kwargs)
        who = others()
        with SdpaMode(trainable, last=who is not None) as mode:
            out = original(self, *args, **kwargs)
        if not mode.calls and (context := active_context()) is not None:
            if who is not None:
                return context.run_dense(left_to(who), lambda native: out)
            context.ran_silently()
        return out

    patched = type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})
    _PATCHED_CLASSES.add(patched)
    return patched


_PATCHED_CLASSES: set[type] = set()


def _register_processor(base: type, trainable: bool) -> Callable[[], None]:
    """diffusers' hooks look processors up by exact class: give the patched class the entry of the original."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    patched = _patched_class(base, trainable)
    try:
        AttentionProcessorRegistry.register(patched, AttentionProcessorRegistry.get(base))
    except ValueError:  # the original has no entry either
        return lambda: None
    return lambda: AttentionProcessorRegistry._registry.pop(patched, None)


def _patch_sdpa(root: torch.nn.Module, attention: torch.nn.Module, context: AttentionSeam, ledger: Ledger) -> None:
    processor: Any = attention.processor
    base: Any = type(processor)
    twin = copy.copy(processor)
    trainable = context.core.differentiable
    twin.__class__ = _patched_class(base, trainable)
    ledger.hold(SharedRegistration((base, trainable), functools.partial(_register_processor, base, trainable)))
    ledger.set(attention, "processor", twin)
    context.places.append(_SdpaPlace(root, attention, base))


# -- what becomes of it afterwards ---------------------------------------------------------------------------------

AGAIN = "take the method off with hf_accel.revert(model, force=True), then apply it again"


class _DiffusersPlace:
    """One patched attention of a denoiser, ``root``."""

    def __init__(self, root: torch.nn.Module, attention: Any):
        self.root, self.attention = root, attention

    def may_be_skipped(self) -> bool:
        return bool(hooks_on(self.attention))

    def may_all_be_skipped(self) -> bool:
        return any(map(hooks_on, modules(self.root)))


class _DispatchPlace(_DiffusersPlace):
    """An attention whose processor names our backend."""

    def __init__(self, root: torch.nn.Module, attention: Any, processor: Any, member: Any):
        super().__init__(root, attention)
        self.processor, self.member = processor, member

    @property
    def silent(self) -> str:
        return _other_forward(self.attention) or (
            f"its {type(self.processor).__name__} did not call diffusers' attention dispatcher"
        )

    def replaced(self) -> str | None:
        current = self.attention.processor
        if current is not self.processor and getattr(current, "_attention_backend", None) is not self.member:
            return _replaced_by(current)
        if current._attention_backend is not self.member:
            return f"set_attention_backend() was called after apply(); to have the method back, {AGAIN}"
        return None


class _SdpaPlace(_DiffusersPlace):
    """An attention whose processor was exchanged for one that runs inside :class:`SdpaMode`."""

    def __init__(self, root: torch.nn.Module, attention: Any, base: type):
        super().__init__(root, attention)
        self.base = base

    @property
    def silent(self) -> str:
        return _other_forward(self.attention) or (
            f"its {self.base.__name__} calls no scaled_dot_product_attention; undo what put it there (attention "
            "slicing, a recorder of attention maps) or model.set_attn_processor(AttnProcessor2_0()), before apply()"
        )

    def replaced(self) -> str | None:
        current = self.attention.processor
        # Loaders make other objects of the class that they find; those run as well.
        return None if type(current) in _PATCHED_CLASSES else _replaced_by(current)


def _replaced_by(processor: Any) -> str:
    return f"its processor was replaced by {type(processor).__name__} after apply(); to have the method back, {AGAIN}"


def _other_forward(attention: torch.nn.Module) -> str | None:
    """In words, if somebody overrides the forward of this very module."""
    if replaced_forward(attention) is None:
        return None
    return "its forward was replaced, and did not come to the processor; undo that, or take the method off"


# -- the opaque operator under torch.compile -----------------------------------------------------------------------


def _reference(query, key, value, mask, scale, causal, gqa, heads_first):
    if not heads_first:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=gqa)
    return out if heads_first else out.transpose(1, 2)


@torch.library.custom_op("hf_accel::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    gqa: bool,
    heads_first: bool,
    needs_grad: bool,
) -> torch.Tensor:
    """Attention of a compiled model: runs the eager seam at every call. Layout as ``heads_first`` says."""
    context = active_context()

    def reference(native: Any) -> torch.Tensor:
        return _reference(query, key, value, mask, scale, causal, gqa, heads_first)

    if context is not None:
        context.leave_layer()
    if context is None:
        out = reference(None)
    elif needs_grad:
        out = context.run_dense("gradients are needed and the method has no backward", reference)
    elif heads_first:
        out = context.attend(query, key, value, mask, scale, causal, False, reference)
    else:
        out = _dispatched_attention(query, key, value, mask, 0.0, causal, scale, gqa)
    return _like(query, value).copy_(out)


def _like(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Values may be narrower than queries."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@_attend.register_fake
def _(query, key, value, mask, scale, causal, gqa, heads_first, needs_grad):
    return _like(query, value)


def _attend_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    query, key, value, mask, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, mask)


def _attend_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    """Of dense attention, which is what the operator ran if gradients were needed."""
    query, key, value, mask = ctx.saved_tensors
    scale, causal, gqa, heads_first, _ = ctx.rest
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (query, key, value))
        out = _reference(q, k, v, mask, scale, causal, gqa, heads_first)
        grads = torch.autograd.grad(out, (q, k, v), grad)
    return (*grads, None, None, None, None, None, None)


_attend.register_autograd(_attend_backward, setup_context=_attend_setup)
