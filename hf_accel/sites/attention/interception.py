"""Calls of ``F.scaled_dot_product_attention`` that go through the seam, beside others who intercept them.

Recorders, guiders (perturbed attention) and replacements of attention work through torch function modes, or put a
function of their own in the place of torch's. Whoever answers a call before they see it hides from them. So where they
stand, the host's own attention is called, they see it as they would unpatched, and what they let through comes to the
seam last. A call that they answer, or that never becomes one of torch's, has run as theirs and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext

from hf_accel.sites.attention.seam import AttentionSeam, active_context

# What torch itself calls so, whatever has been put in its place.
TORCHS_OWN: Any = torch._C._nn.scaled_dot_product_attention


class SdpaMode(TorchFunctionMode):
    """Sends ``F.scaled_dot_product_attention`` to the seam.

    Args:
        trainable: gradients flow through the method.
        last: stand beneath the modes that are there, so that they see calls first.

    Attributes:
        calls: how many came, outside of compiled graphs.
    """

    def __init__(self, trainable: bool, last: bool = False):
        super().__init__()
        self.trainable, self.last, self.calls = trainable, last, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is TORCHS_OWN:
            if not torch.compiler.is_compiling():
                self.calls += 1
            attention = _trainable_attention if self.trainable else _attention
            return attention(*args, **kwargs)
        return func(*args, **kwargs)

    def __enter__(self) -> SdpaMode:
        if not self.last:
            return super().__enter__()
        self._beneath_the_others(lambda: _push_mode(self))
        return self

    def __exit__(self, *exc: Any) -> None:
        if not self.last:
            super().__exit__(*exc)
            return
        self._beneath_the_others(_pop_mode)

    def _beneath_the_others(self, change: Callable[[], Any]) -> None:
        above = []
        while _get_current_function_mode_stack() and _get_current_function_mode_stack()[-1] is not self:
            above.append(_pop_mode())
        change()
        for mode in reversed(above):
            _push_mode(mode)


def others() -> str | None:
    """Who intercepts attention beside us, now and in this thread, in words; None if nobody does."""
    if not torch._C._len_torch_function_stack() and F.scaled_dot_product_attention is TORCHS_OWN:
        return None
    names = [
        f"the torch function mode {type(mode).__name__}"
        for mode in _get_current_function_mode_stack()
        if not isinstance(mode, DeviceContext | SdpaMode)
    ]
    if F.scaled_dot_product_attention is not TORCHS_OWN:
        theirs: Any = F.scaled_dot_product_attention
        name = getattr(theirs, "__qualname__", type(theirs).__name__)
        names.append(f"{getattr(theirs, '__module__', '?')}.{name} in place of scaled_dot_product_attention")
    return " and ".join(names) or None


def traced_beside_others() -> bool:
    """Whether dynamo traces a model while others intercept. Exporting without dynamo has a mode of its own on, which is
    no other."""
    return torch.compiler.is_dynamo_compiling() and others() is not None


def seen_by_others(who: str, context: AttentionSeam, dense: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """An attention call of the host's own where others intercept: they see it, and the seam has what they let through.

    Args:
        who: from :func:`others`.
        context: the seam.
        dense: takes the layer's native backend and returns ``[B, H, S, D]``.
    """
    with SdpaMode(context.core.differentiable, last=True) as mode:
        out = dense(context.native_of_next())
    return out if mode.calls else context.run_dense(left_to(who), lambda native: out)


def left_to(who: str) -> str:
    """The reason under which a call is counted that others were let see, and that did not come to the seam."""
    return f"left to {who}"


def gradients_needed(*tensors: torch.Tensor) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Same arguments as ``F.scaled_dot_product_attention``; ``[B, H, S, D]``."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = gradients_needed(query, key, value)
    if torch.compiler.is_compiling() and not dropout_p:
        return torch.ops.hf_accel.attend(query, key, value, attn_mask, factor, is_causal, enable_gqa, True, needs_grad)

    def dense(native: Any) -> torch.Tensor:
        return TORCHS_OWN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    context = active_context()
    if context is None:
        return dense(None)
    if dropout_p:
        return context.run_dense("dropout is on", dense)
    return context.attend(query, key, value, attn_mask, factor, is_causal, needs_grad, dense)


def _trainable_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """:func:`_attention` for a method that gradients flow through. An opaque operator would have to know the method's
    backward and its parameters, so in a compiled model a call that needs gradients leaves the graph."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.compiler.is_compiling() and gradients_needed(query, key, value):
        from hf_accel.hosts.patching.outside import outside_the_graph

        return outside_the_graph(_attention, *arguments)
    return _attention(*arguments)
