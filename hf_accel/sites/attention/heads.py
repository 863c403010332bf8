"""How wide the heads of an attention module are."""

from __future__ import annotations

import torch

from hf_accel.errors import NothingPatched


def head_dim(name: str, attention: torch.nn.Module) -> int:
    """Dims per head of a diffusers attention module called ``name`` in its model.

    Raises:
        NothingPatched: the module does not say.
    """
    inner, heads = getattr(attention, "inner_dim", None), getattr(attention, "heads", None)
    if not isinstance(inner, int) or not isinstance(heads, int) or heads < 1 or inner % heads:
        raise NothingPatched(
            f"The head dim of {name} ({type(attention).__name__}) is unknown: looked for whole numbers inner_dim and "
            f"heads, found {inner!r} and {heads!r}."
        )
    return inner // heads
