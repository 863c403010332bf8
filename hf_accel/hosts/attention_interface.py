"""transformers' table of attention functions: ours in it, and what stood there before.

``AttentionInterface`` and ``AttentionMaskInterface`` are public. Entries of ours have a name made of a prefix and the
implementation that the model runs, and last as long as a patched model needs them
(:class:`~hf_accel.hosts.patching.registration.SharedRegistration`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

NATIVE = ("sdpa", "eager")  # implementations that our functions can stand in front of

# Arguments of an attention function that change what it computes: a method that does not know them must not run.
ALTERING = ("softcap", "s_aux", "position_bias", "cache")


def register(name: str, function: Callable, masks_of: str | None = None) -> Callable[[], None]:
    """Enter an attention function under ``name``; returns what removes it.

    ``masks_of`` names the implementation whose masks it takes. Without a mask function of its name transformers hands
    on no mask at all, padding or not; None is for modules that are called with a mask of another implementation.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    if masks_of is not None:
        AttentionMaskInterface.register(name, AttentionMaskInterface()[masks_of])

    def remove() -> None:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)

    return remove


def native_function(implementation: str, module: torch.nn.Module) -> Callable:
    """The attention function that ``module`` would have called."""
    if implementation == "eager":  # each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers import AttentionInterface

    return AttentionInterface()[implementation]
