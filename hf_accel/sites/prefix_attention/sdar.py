"""The attention seam of SDAR-class models: remote code with an attention of its own, which caches on ``store_kv``.

In a denoising step the forward of each attention is replaced: projections, norms and rotary embedding of the module are
run here, the rest is the core's. All other forwards are the module's own.

Since remote code may differ from what is read here, the first calls of every layer (one before and one behind a prefix)
also run the module's own forward; where the two differ, the layer stays with its own, and the report says so.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from hf_accel.hosts.block_families import cache_of
from hf_accel.hosts.patching.eager import run_eagerly
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.masks import ALL_VISIBLE, SplitMask
from hf_accel.sites.prefix_attention.seam import SEAT, PrefixSeam, Seat
from hf_accel.sites.prefix_attention.split import split_attention

# Relative difference (Frobenius) up to which two exact computations of one attention layer count as equal.
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 4e-2}

OTHER_COMPUTATION = "the module computes something else than is read from its structure"
OTHER_CACHE = "the cache keeps its keys in another form than tensors [B, H, P, D] of the model's device and dtype"
OTHER_MASK = "a mask that is a bias, or differs between heads or between positions of a block"
COMPILED = (
    "under torch.compile a layer runs its own code until an uncompiled step behind a prefix has shown that it computes "
    "what is read from its structure, and with a mask"
)


def split_forward(cls: Any) -> Callable:
    """The override of the forward of an attention of this class."""
    native = cls.forward
    names = [name for name in inspect.signature(native).parameters if name != "self"]
    rotate = sys.modules[cls.__module__].apply_rotary_pos_emb

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        seat: Seat | None = self.__dict__.get(SEAT)
        cache = _any_cache(arguments)
        # Without a seat this was undone by force, while somebody's wrapper still calls it.
        if seat is None or cache is None or arguments.get("store_kv", False):
            return native(self, *args, **kwargs)

        def own() -> Any:
            return native(self, *args, **kwargs)

        if not torch.compiler.is_compiling():
            return _attend(self, seat, arguments, rotate, own)
        if not seat.seam.core.traceable:
            return _attend_outside(self, seat, arguments, rotate, own)
        return _attend_traced(self, seat, arguments, rotate, own)

    return forward


def _attend(module: Any, seat: Seat, arguments: dict[str, Any], rotate: Callable, own: Callable[[], Any]) -> Any:
    """One attention of a denoising step through the core, or the module's own with the reason counted."""
    seam, hidden = seat.seam, arguments["hidden_states"]
    reason = seam.why_own() or _why_own(module, arguments)
    if reason is not None:
        return seam.run_own(reason, own)
    prefix = _frozen(seam, module, arguments)
    if prefix is None:
        return seam.run_own(OTHER_CACHE, own)
    mask = seam.masks.split(arguments.get("attention_mask"), prefix[0].shape[2], hidden.shape[1])
    if mask is None:
        return seam.run_own(OTHER_MASK, own)
    heads = _heads(module, arguments, rotate)
    if _needs_grad(*heads):
        return seam.run_own("gradients are needed", own)
    if len({x.dtype for x in (*heads, *prefix)}) > 1:
        return seam.run_own(OTHER_CACHE, own)
    call = _call(module, seat, heads, prefix, mask)
    kind = _kind(prefix[0])
    if kind not in seat.agrees and (verdict := _agree(module, seat, call, own)) is not None:
        seat.agrees[kind] = verdict
    if not seat.agrees.get(kind, True):
        return seam.run_own(OTHER_COMPUTATION, own)
    return _returned(module, seat, seam.attend(call), _any_cache(arguments))


def _attend_outside(*given: Any) -> Any:
    """The method keeps state between denoising steps."""
    return run_eagerly(_attend, *given)


def _attend_traced(module: Any, seat: Seat, arguments: dict[str, Any], rotate: Callable, own: Callable[[], Any]) -> Any:
    """As :func:`_attend` for a graph, which can neither compare with the module's own forward nor look into masks: it
    takes calls without a mask in layers that agreed before, and leaves others to the module."""
    if arguments.get("attention_mask") is not None or _why_own(module, arguments) is not None:
        return own()
    prefix = _frozen(seat.seam, module, arguments)
    if prefix is None or not seat.agrees.get(_kind(prefix[0]), False):
        return own()
    heads = _heads(module, arguments, rotate)
    if _needs_grad(*heads) or len({x.dtype for x in (*heads, *prefix)}) > 1:
        return own()
    call = _call(module, seat, heads, prefix, ALL_VISIBLE)
    return _returned(module, seat, seat.seam.core.attend(call), _any_cache(arguments))


def _any_cache(arguments: dict[str, Any]) -> Any:
    cache = arguments.get("past_key_values")
    return arguments.get("past_key_value") if cache is None else cache


def _kind(prefix_key: torch.Tensor) -> str:
    """What one comparison with the module's own forward is proof of."""
    return "behind a prefix" if prefix_key.shape[2] else "without a prefix"


def _why_own(module: Any, arguments: dict[str, Any]) -> str | None:
    if arguments.get("output_attentions"):
        return "attention weights are asked for"
    if module.training and getattr(module, "attention_dropout", 0):
        return "dropout is on"
    return None


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _heads(module: Any, arguments: dict[str, Any], rotate: Callable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of the block, ``[B, H, b, D]``."""
    hidden = arguments["hidden_states"]
    shape = (*hidden.shape[:-1], -1, module.head_dim)
    query = module.q_norm(module.q_proj(hidden).view(shape)).transpose(1, 2)
    key = module.k_norm(module.k_proj(hidden).view(shape)).transpose(1, 2)
    value = module.v_proj(hidden).view(shape).transpose(1, 2)
    return *rotate(query, key, *arguments["position_embeddings"]), value


def _frozen(seam: PrefixSeam, module: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The prefix K/V of a layer as views ``[B, Hkv, P, D]``."""
    hidden, cache = arguments["hidden_states"], cache_of(arguments)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    step = seam.context.step
    length = step.prefix if step is not None else int(cache.get_seq_length())
    held = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if length == 0:
        empty = hidden.new_empty(hidden.shape[0], module.k_proj.out_features // module.head_dim, 0, module.head_dim)
        return empty, empty
    keys, values = getattr(held, "keys", None), getattr(held, "values", None)
    for x in (keys, values):
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[2] < length or x.device != hidden.device:
            return None
    return keys[:, :, :length], values[:, :, :length]  # type: ignore[index]


def _call(
    module: Any,
    seat: Seat,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    prefix: tuple[torch.Tensor, torch.Tensor],
    mask: SplitMask,
) -> PrefixCall:
    scale = getattr(module, "scaling", None)
    scale = module.head_dim**-0.5 if scale is None else scale
    dense = functools.partial(_joined, heads, prefix, mask, scale)
    return seat.seam.call(seat.index, heads, prefix, mask, scale, dense)


def _joined(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    prefix: tuple[torch.Tensor, torch.Tensor],
    mask: SplitMask,
    scale: float,
) -> torch.Tensor:
    """What the model's own code computes: attention over the joined keys."""
    query, key, value = heads
    seen = None
    if mask.valid is not None or mask.block is not None:
        rows, length, frozen = query.shape[0], query.shape[2], prefix[0].shape[2]
        front = query.new_ones(rows, frozen, dtype=torch.bool) if mask.valid is None else mask.valid
        back = query.new_ones(1, 1, length, length, dtype=torch.bool) if mask.block is None else mask.block
        front = front[:, None, None].expand(-1, -1, length, -1)
        seen = torch.cat([front, back.expand(rows, -1, -1, -1)], dim=-1)
    key, value = torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2)
    grouped = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
    )


def _returned(module: Any, seat: Seat, out: torch.Tensor, cache: Any) -> Any:
    """``out`` ``[B, Hq, b, D]`` as the module's own forward would have returned it."""
    out = module.o_proj(out.transpose(1, 2).flatten(2))
    if seat.returns == 1:
        return out
    return (out, None) if seat.returns == 2 else (out, None, cache)


def _agree(module: Any, seat: Seat, call: PrefixCall, own: Callable[[], Any]) -> bool | None:
    """Whether what is read from the module's structure is what it computes; None where no row tells. Runs both; waits.

    Rows that see no key do not tell: what native attention makes of them depends on its kernel.
    """
    theirs = own()
    seat.returns = len(theirs) if isinstance(theirs, tuple) else 1
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = module.o_proj(split_attention(call).transpose(1, 2).flatten(2))
    rows = torch.isfinite(theirs).all(-1)
    if call.block_mask is not None:
        seen = call.block_mask.any(-1)[:, 0]
        if call.prefix:
            seen = seen | (True if call.prefix_valid is None else call.prefix_valid.any(1)[:, None])
        rows = rows & seen
    if not rows.any():
        return None
    ours, theirs = ours[rows].float(), theirs[rows].float()
    error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
    return bool(error <= AGREEMENT[call.query.dtype])
