"""The attention seam of block-diffusion models: the active block against a frozen prefix, without joining the two.

These models copy their whole cache at every layer of every denoising step: they concatenate the prefix K/V with those
of the block. Here the forward of each patched attention hands both parts to a :class:`BlockCore` as they lie. Prefill,
commit and uncached forwards run the model's own code.

Two ways in, found by structure:

* SDAR class (remote code, no attention interface): projections, norms and rotary embedding of the module are run here,
  the rest is the core's. Since remote code may differ from what is read here, the first denoising call of every layer
  also runs the module's own forward; where the two differ, the layer stays with its own, and the report says so.
* DiffusionGemma (transformers): the module's own forward runs without the cache, so that its attention function gets
  the canvas alone; that function, registered here, gets the cache beside it.

Works on an instance: module attributes and registrations, all through the ledger.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.attention.block_call import BlockCall
from hf_accel.attention.block_split import split_attention
from hf_accel.attention.call import Layer
from hf_accel.errors import NothingPatched
from hf_accel.hosts.block_context import (
    DIFFUSION_GEMMA,
    SDAR,
    BlockContext,
    BlockEndHook,
    BlockHook,
    cache_length,
    family_of,
    mask_token_of,
    sdar_attentions,
)
from hf_accel.hosts.forward_override import override_forward
from hf_accel.hosts.language import NATIVE, native_function
from hf_accel.hosts.registration import SharedRegistration
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.report import BlockStatistics, MethodReport, Patched

PREFIX = "hf_accel-block-"
_SEAT = "_hf_accel_block_seat"

# Relative difference (Frobenius) up to which two exact computations of one attention layer count as equal.
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class BlockCore(Protocol):
    """What is put into the seam.

    Attributes:
        traceable: stateless tensor code that ``torch.compile`` may trace into the model's graph.
    """

    traceable: bool

    def attend(self, call: BlockCall) -> torch.Tensor:
        """``[B, Hq, b, D]`` for one call."""

    def reset(self) -> None:
        """Another block begins: drop all state of the last one."""


class BlockSeam:
    """State of the seam on one model: who computes, where the block stands, what was counted.

    Args:
        context: the block clock.
        core: what computes.
        names: dotted names of the patched attentions, in execution order.
        run: where calls are counted.
    """

    def __init__(self, context: BlockContext, core: BlockCore, names: list[str], run: BlockStatistics):
        self.context, self.core, self.run = context, core, run
        self.layers = [Layer(name, index, len(names)) for index, name in enumerate(names)]
        self.timed = False
        self.agrees: dict[int, bool] = {}
        self._block: tuple[int, int] | None = None

    def attend(self, call: BlockCall) -> torch.Tensor:
        """Run one call of a denoising step through the core and count it."""
        step = self.context.step
        if step is None:
            self.run.dense_calls["called outside a forward of the model"] += 1
            return call.dense()
        if self._block != (step.generation, step.block):
            self._block = step.generation, step.block
            self.core.reset()
        with self.run.stopwatch.section(call.query.device) if self.timed else contextlib.nullcontext():
            out = self.core.attend(call)
        self.run.record(call.layer.index, step.index, call.notes)
        return out

    def run_dense(self, reason: str, dense: Callable[[], Any]) -> Any:
        """A call that no method may take, counted under ``reason``."""
        self.run.dense_calls[reason] += 1
        return dense()


class BlockSeamHook(BlockHook):
    """Tells the context of every forward, and the statistics which phase it is."""

    def __init__(self, seam: BlockSeam):
        super().__init__(seam.context)
        self.seam = seam

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() and self.seam.core.traceable:
            return
        self._tell(module, args, kwargs)

    @torch._dynamo.disable(reason="hf_accel follows the blocks in Python")
    def _tell(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        super().__call__(module, args, kwargs)
        if self.context.step is not None:
            self.seam.run.begin(self.context.step)


@dataclass
class Seat:
    """An attention's place in the seam."""

    seam: BlockSeam
    index: int


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model has no frozen prefix that a method could attend to apart, in words; None if it has."""
    name = type(module).__name__
    family = family_of(module)
    if family is None:
        return f"{name} is no block-diffusion language model (SDAR class, DiffusionGemma)"
    if not family.frozen_prefix:
        return (
            f"{name} attends over the whole sequence both ways at every step, so no prefix is ever frozen; methods on "
            "prefix attention need a block-causal model (SDAR class, DiffusionGemma)"
        )
    if any(_SEAT in sub.__dict__ for sub in module.modules()):
        return "its attention is already taken by another hf_accel method"
    if family is SDAR:
        return None
    if family is DIFFUSION_GEMMA:
        implementation = module.config._attn_implementation  # type: ignore[union-attr]
        if implementation not in NATIVE:
            return (
                f"{name} runs attention as {implementation!r}; call model.set_attn_implementation('sdpa') first "
                f"(known: {', '.join(NATIVE)})"
            )
        return None
    return f"{name} keeps no prefix in a cache as it stands"


def install(model: Model, core: BlockCore, ledger: Ledger, report: MethodReport) -> BlockSeam:
    """Route the attention of denoising steps through ``core``.

    Raises:
        NothingPatched: the model has no such attention.
    """
    module: Any = model.module
    reason = why_not(module)
    if reason is not None:
        raise NothingPatched(f"{model.class_name}: {reason}.")
    family = family_of(module)
    gemma = family is DIFFUSION_GEMMA
    found: list[tuple[str, Any]] = _decoder_attentions(module) if gemma else sdar_attentions(module)
    run = BlockStatistics()
    report.run = run
    context = BlockContext(family, mask_token_of(module))  # type: ignore[arg-type]
    seam = BlockSeam(context, core, [name for name, _ in found], run)
    if gemma:
        implementation: str = module.config._attn_implementation
        ledger.hold(SharedRegistration(PREFIX + implementation, functools.partial(_register, implementation)))
    for index, (name, attention) in enumerate(found):
        ledger.set(attention, _SEAT, Seat(seam, index))
        if gemma:
            config = copy.copy(attention.config)  # the encoder, which shares it, keeps its own attention
            config._attn_implementation_internal = PREFIX + implementation
            ledger.set(attention, "config", config)
        make = _forward_without_cache if gemma else _forward_split
        override_forward(ledger, attention, types.MethodType(make(type(attention)), attention))
        report.patched.append(Patched(model.name, name, f"attention of denoising steps ({family.name})"))  # type: ignore[union-attr]
    ledger.pre_hook(module, BlockSeamHook(seam))
    ledger.post_hook(module, BlockEndHook(context))
    return seam


# -- masks ---------------------------------------------------------------------------------------------------------


def split_mask(
    mask: torch.Tensor | None, prefix: int, block: int
) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """A mask over ``[prefix | ... | block]`` as what it hides of the prefix and of the block.

    Args:
        mask: ``[B, K]``, ``[B, b, K]`` or ``[B, 1, b, K]``, bool (True = attend) or additive; None: nothing is hidden.
            Keys between the prefix and the block (unused slots of a static cache) must be hidden.

    Returns:
        ``valid`` bool ``[B, P]`` and ``block`` bool ``[B, 1, b, b]``, each None where nothing is hidden; or None if the
        mask is something else: it differs between heads, or between the block's positions in what they see of the
        prefix. Waits for the device.
    """
    if mask is None:
        return None, None
    if mask.dtype != torch.bool:
        # Integers are 1 = attend; floats are added to the logits.
        mask = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    if mask.ndim == 2:
        mask = mask[:, None, None].expand(-1, 1, block, -1)
    elif mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != block or mask.shape[3] < prefix + block:
        return None
    front, between, back = mask[..., :prefix], mask[..., prefix:-block], mask[..., -block:]
    same, none, all_front, all_back = torch.stack(
        [(front == front[:, :, :1]).all(), ~between.any(), front.all(), back.all()]
    ).tolist()
    if not (same and none):
        return None
    return (None if all_front else front[:, 0, 0]), (None if all_back else back)


class _MaskMemo:
    """:func:`split_mask`, once for the layers of a forward that are handed the same mask."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref, tuple[int, int], Any] | None = None

    def __deepcopy__(self, memo: dict) -> _MaskMemo:
        return _MaskMemo()

    def split(self, mask: torch.Tensor | None, prefix: int, block: int) -> Any:
        if mask is None:
            return None, None
        if self._last is None or self._last[0]() is not mask or self._last[1] != (prefix, block):
            self._last = weakref.ref(mask), (prefix, block), split_mask(mask, prefix, block)
        return self._last[2]


_MASKS = _MaskMemo()


# -- SDAR class ----------------------------------------------------------------------------------------------------


def _cache_of(arguments: dict[str, Any]) -> Any:
    return arguments.get("past_key_values", arguments.get("past_key_value"))


@functools.cache
def _forward_split(cls: Any) -> Callable:
    """The override of an SDAR-class attention's forward."""
    native = cls.forward
    names = [name for name in inspect.signature(native).parameters if name != "self"]
    rotate = sys.modules[cls.__module__].apply_rotary_pos_emb

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = _cache_of(arguments)
        if cache is None or arguments.get("store_kv", False):
            return native(self, *args, **kwargs)
        seat: Seat = self.__dict__[_SEAT]
        seam = seat.seam

        def own() -> Any:
            return native(self, *args, **kwargs)

        if arguments.get("output_attentions"):
            return seam.run_dense("attention weights are asked for", own)
        if self.training and getattr(self, "attention_dropout", 0):
            return seam.run_dense("dropout is on", own)
        if seam.agrees.get(seat.index) is False:
            return seam.run_dense("the module computes something else than is read from its structure", own)
        hidden = arguments["hidden_states"]
        if torch.is_grad_enabled() and (hidden.requires_grad or self.q_proj.weight.requires_grad):
            return seam.run_dense("gradients are needed", own)
        length = hidden.shape[1]
        frozen = _frozen(cache, self.layer_idx, hidden)
        if frozen is None:
            return seam.run_dense("the cache keeps its keys in another form than tensors [B, H, P, D]", own)
        parts = _MASKS.split(arguments.get("attention_mask"), frozen[0].shape[2], length)
        if parts is None:
            return seam.run_dense("a mask that differs between heads or between positions of a block", own)

        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        query, key = rotate(query, key, *arguments["position_embeddings"])
        call = _call(seam, seat.index, query, key, value, frozen, parts, getattr(self, "scaling", None))
        call.dense = functools.partial(_native_heads, call)
        if seat.index not in seam.agrees:
            seam.agrees[seat.index] = _agree(self, call, own)
            if not seam.agrees[seat.index]:
                return seam.run_dense("the module computes something else than is read from its structure", own)
        out = seam.attend(call)
        return self.o_proj(out.transpose(1, 2).reshape(*hidden.shape[:-1], -1)), None

    return forward


def _frozen(cache: Any, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The prefix K/V of a layer as views ``[B, Hkv, P, D]``."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    length = cache_length(cache)
    if layer >= len(layers) or not getattr(layers[layer], "is_initialized", True):
        return (like.new_empty(0), like.new_empty(0)) if length == 0 else None
    keys, values = layers[layer].keys, layers[layer].values
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or keys.shape[2] < length:
        return None
    return keys[:, :, :length], values[:, :, :length]


def _native_heads(call: BlockCall) -> torch.Tensor:
    """What the model's own code computes: attention over the joined keys."""
    key = torch.cat([call.prefix_key, call.key], dim=2)
    value = torch.cat([call.prefix_value, call.value], dim=2)
    mask = None
    if call.prefix_valid is not None or call.block_mask is not None:
        rows, length = call.query.shape[0], call.query.shape[2]
        front = call.prefix_valid
        front = call.query.new_ones(rows, call.prefix, dtype=torch.bool) if front is None else front
        back = call.block_mask
        back = call.query.new_ones(1, 1, length, length, dtype=torch.bool) if back is None else back
        mask = torch.cat([front[:, None, None].expand(-1, -1, length, -1), back.expand(rows, -1, -1, -1)], dim=-1)
    grouped = call.query.shape[1] != call.key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        call.query, key, value, attn_mask=mask, scale=call.scale, enable_gqa=grouped
    )


def _agree(module: Any, call: BlockCall, own: Callable[[], Any]) -> bool:
    """Whether what is read from the module's structure is what it computes. Runs both, once per layer; waits."""
    theirs = own()
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = module.o_proj(split_attention(call).transpose(1, 2).reshape(theirs.shape[0], theirs.shape[1], -1))
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30)
    return bool(error <= AGREEMENT[call.query.dtype])


def _call(
    seam: BlockSeam,
    index: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    frozen: tuple[torch.Tensor, torch.Tensor],
    parts: tuple[torch.Tensor | None, torch.Tensor | None],
    scale: float | None,
    sliding: bool = False,
) -> BlockCall:
    prefix_key, prefix_value = frozen
    if prefix_key.ndim != 4:  # an empty cache has no tensors yet
        prefix_key, prefix_value = key[:, :, :0], value[:, :, :0]
    context = seam.context
    return BlockCall(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        prefix_valid=parts[0],
        block_mask=parts[1],
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        layer=seam.layers[index],
        index=context.step.index if context.step is not None else 0,
        changed=context.changed,
        most_changed=lambda: context.most_changed,
        dense=lambda: query,
        sliding=sliding,
        generation=context.step.generation if context.step is not None else 0,
    )


# -- DiffusionGemma ------------------------------------------------------------------------------------------------


def _decoder_attentions(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(name, sub) for name, sub in module.named_modules() if hasattr(sub, "append_to_cache")]


@functools.cache
def _forward_without_cache(cls: Any) -> Callable:
    """The override of a decoder attention's forward: the cache goes past it, to the attention function."""
    native = cls.forward
    names = [name for name in inspect.signature(native).parameters if name != "self"]

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = arguments.pop("past_key_values", None)
        if cache is None:
            return native(self, **arguments)
        return native(self, **arguments, past_key_values=None, hf_accel_cache=cache)

    return forward


def _register(implementation: str) -> Callable[[], None]:
    """Our attention function for decoder attentions, over that of ``implementation``; returns the removal."""
    from transformers import AttentionInterface

    name = PREFIX + implementation
    AttentionInterface.register(name, functools.partial(_decoder_attention, implementation))

    def remove() -> None:
        AttentionInterface._global_mapping.pop(name, None)

    return remove


def _decoder_attention(
    implementation: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    hf_accel_cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers over the canvas' own K/V, with the encoder's cache beside them."""
    native = native_function(implementation, module)

    def own() -> tuple[torch.Tensor, torch.Tensor | None]:
        keys, values = key, value
        if hf_accel_cache is not None:
            keys, values = module.append_to_cache(hf_accel_cache, key, value)
        return native(module, query, keys, values, attention_mask, **kwargs)

    if hf_accel_cache is None:
        return own()
    seat: Seat = module.__dict__[_SEAT]
    seam = seat.seam
    compiling = torch.compiler.is_compiling()
    if not compiling or not seam.core.traceable:
        reason = _why_own(query, key, value, kwargs)
        if reason is None and hf_accel_cache.is_compileable and attention_mask is None:
            reason = "a static cache without a mask: the model attends to its empty slots"
        if reason is not None:
            return seam.run_dense(reason, own)
    elif kwargs.get("dropout") or (hf_accel_cache.is_compileable and attention_mask is None):
        return own()
    cached = hf_accel_cache.layers[module.layer_idx]
    frozen = cached.keys, cached.values
    parts = _canvas_mask(hf_accel_cache, cached, attention_mask, query.shape[2])
    call = _call(seam, seat.index, query, key, value, frozen, parts, kwargs.get("scaling"), bool(module.is_sliding))
    call.dense = lambda: own()[0].transpose(1, 2)
    out = seam.core.attend(call) if compiling and seam.core.traceable else _attend_outside(seam, call)
    return out.transpose(1, 2), None


@torch._dynamo.disable(reason="the method keeps state between denoising steps")
def _attend_outside(seam: BlockSeam, call: BlockCall) -> torch.Tensor:
    return seam.attend(call)


def _why_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if kwargs.get("dropout"):
        return "dropout is on"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are needed"
    return None


def _canvas_mask(
    cache: Any, cached: Any, mask: torch.Tensor | None, canvas: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What a decoder mask hides of the prefix and of the canvas. All positions of a canvas see the same keys, so one
    row tells. A static cache is laid out as [prefix | canvas | unused], with the length as a tensor."""
    if mask is None:
        return None, None
    row = mask[:, :1, :1] if mask.dtype == torch.bool else mask[:, :1, :1] > torch.finfo(mask.dtype).min / 2
    slots = cached.keys.shape[2]
    if not cache.is_compileable:
        front, back = row[..., :slots], row[..., slots:]
    else:
        places = torch.arange(slots, device=row.device)
        front = row[..., :slots] & (places < cached.cumulative_length)
        back = row.index_select(-1, torch.arange(canvas, device=row.device) + cached.cumulative_length)
    return front[:, 0, 0], back.expand(-1, -1, canvas, -1)
