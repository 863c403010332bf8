"""The attention seam of DiffusionGemma (transformers): a decoder that reads the encoder's cache and never writes it.

The decoder copies the whole cache at every layer of every step, in front of its attention function. Here each decoder
attention runs its own forward without the cache, so that the attention function, registered by us in place of the
model's, gets the canvas alone; the cache goes beside it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from hf_accel.hosts import attention_interface
from hf_accel.hosts.attention_interface import ALTERING, NATIVE, native_function
from hf_accel.hosts.patching.eager import run_eagerly
from hf_accel.sites.prefix_attention.masks import ALL_VISIBLE, SplitMask
from hf_accel.sites.prefix_attention.seam import SEAT, Seat

PREFIX = "hf_accel-block-"

OTHER_MASK = "a mask that is a bias, or differs between heads or between positions of the canvas"
ROWS_DIFFER = (
    "hf_accel: the decoder mask of a compiled model hides other keys from some positions of the canvas than from "
    "others, or differs between heads, which a graph cannot leave to the model; run it eagerly, or take the method off"
)
NO_MASK = "a static cache without a mask: the model attends to its empty slots"
ROLLED = "a static sliding window that is full: the model writes the canvas over the oldest keys in it"
OTHER_CACHE = "the cache keeps its keys in another form than tensors [B, H, P, D] of the model's device and dtype"


def decoder_attentions(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Attentions of the decoder, which append the block to what they read of the cache."""
    return [(name, sub) for name, sub in module.named_modules() if hasattr(sub, "append_to_cache")]


def forward_without_cache(cls: Any) -> Callable:
    """The override of a decoder attention's forward: the cache goes past it, to the attention function."""
    native = cls.forward
    names = [name for name in inspect.signature(native).parameters if name != "self"]

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = arguments.pop("past_key_values", None)
        seat = self.__dict__.get(SEAT)
        # Without a seat this was undone by force, while somebody's wrapper still calls it.
        if cache is None or seat is None:
            return native(self, *args, **kwargs)
        implementation = self.config._attn_implementation_internal
        if implementation not in NATIVE:  # its function would not know of the cache beside it
            own = functools.partial(native, self, *args, **kwargs)
            reason = f"model.set_attn_implementation({implementation!r}) was called after apply()"
            return own() if torch.compiler.is_compiling() else seat.seam.run_own(reason, own)
        return native(self, **arguments, past_key_values=None, hf_accel_cache=cache)

    return forward


def register() -> Callable[[], None]:
    """Our attention functions for decoder attentions, over those of transformers; returns the removal."""
    return attention_interface.register(PREFIX, _attention)


def _attention(
    implementation: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    hf_accel_cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function of transformers over the canvas' own K/V ``[B, Hkv, b, D]``, with the cache beside them."""
    native = native_function(implementation, module)
    cache = hf_accel_cache
    seat: Seat = module.__dict__[SEAT]
    seam = seat.seam

    def own() -> tuple[torch.Tensor, torch.Tensor | None]:
        keys, values = (key, value) if cache is None else module.append_to_cache(cache, key, value)
        return native(module, query, keys, values, attention_mask, **kwargs)

    if cache is None:
        return own()
    reason = _why_own(query, key, value, kwargs) or _why_own_cache(cache, module.layer_idx, query, attention_mask)
    heads, traced = (query, key, value), torch.compiler.is_compiling() and seam.core.traceable
    attend = _attend_traced if traced else _attend if not torch.compiler.is_compiling() else _attend_outside
    return attend(module, seat, heads, cache, attention_mask, kwargs.get("scaling"), reason, own)


def _attend(
    module: Any,
    seat: Seat,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: Any,
    attention_mask: torch.Tensor | None,
    scale: float | None,
    reason: str | None,
    own: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One attention of a denoising step through the core, or the model's own with the reason counted."""
    seam, canvas = seat.seam, heads[0].shape[2]
    reason = seam.why_own() or reason
    if reason is not None:
        return seam.run_own(reason, own)
    held, step = cache.layers[module.layer_idx], seam.context.step
    slots = held.keys.shape[2]
    start = None
    if cache.is_compileable:
        length = held.get_seq_length() if module.is_sliding else step.prefix  # type: ignore[union-attr]
        start = slots = min(slots, int(length))
    mask = seam.masks.split(attention_mask, slots, canvas, start)
    if mask is None:
        return seam.run_own(OTHER_MASK, own)
    prefix = held.keys[:, :, :slots], held.values[:, :, :slots]
    scale = heads[0].shape[-1] ** -0.5 if scale is None else scale
    call = seam.call(seat.index, heads, prefix, mask, scale, lambda: own()[0].transpose(1, 2), bool(module.is_sliding))
    return seam.attend(call).transpose(1, 2), None


def _attend_outside(*given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The method keeps state between denoising steps."""
    return run_eagerly(_attend, *given)


def _attend_traced(
    module: Any,
    seat: Seat,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cache: Any,
    attention_mask: torch.Tensor | None,
    scale: float | None,
    reason: str | None,
    own: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`_attend` for a graph, which cannot look into masks and does not know how much of a static cache is
    filled: masks must be like the model's own, which show all positions of a canvas the same keys; others stop it."""
    if reason is not None:
        return own()
    held = cache.layers[module.layer_idx]
    mask = _canvas_mask(cache, held, attention_mask, heads[0].shape[2])
    scale = heads[0].shape[-1] ** -0.5 if scale is None else scale
    prefix = held.keys, held.values
    call = seat.seam.call(
        seat.index, heads, prefix, mask, scale, lambda: own()[0].transpose(1, 2), bool(module.is_sliding)
    )
    return seat.seam.core.attend(call).transpose(1, 2), None


def _canvas_mask(cache: Any, held: Any, mask: torch.Tensor | None, canvas: int) -> SplitMask:
    """What one row of a decoder mask hides of the prefix and of the canvas, after a check in the graph that its other
    rows hide the same. A static cache is laid out as [prefix | canvas | unused], with the length as a tensor."""
    if mask is None:
        return ALL_VISIBLE
    torch._assert_async((mask == mask[:, :1, :1]).all(), ROWS_DIFFER)
    row = mask[:, :1, :1] if mask.dtype == torch.bool else mask[:, :1, :1] > torch.finfo(mask.dtype).min / 2
    slots = held.keys.shape[2]
    if not cache.is_compileable:
        front, back = row[..., :slots], row[..., slots:]
    else:
        places = torch.arange(slots, device=row.device)
        front = row[..., :slots] & (places < held.cumulative_length)
        back = row.index_select(-1, torch.arange(canvas, device=row.device) + held.cumulative_length)
    return SplitMask(front[:, 0, 0], back.expand(-1, -1, canvas, -1))


def _why_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if kwargs.get("dropout"):
        return "dropout is on"
    for name in ALTERING:
        if kwargs.get(name) is not None:
            return f"attention with {name}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are needed"
    return None


def _why_own_cache(cache: Any, layer: int, query: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why the keys of a layer cannot be read where they lie, or None."""
    held = cache.layers[layer]
    for x in (getattr(held, "keys", None), getattr(held, "values", None)):
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or (x.device, x.dtype) != (query.device, query.dtype):
            return OTHER_CACHE
    if not cache.is_compileable:
        return None
    if mask is None:
        return NO_MASK
    return ROLLED if getattr(held, "cumulative_length_int", 0) > held.keys.shape[2] else None
