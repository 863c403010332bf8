"""How one site tells another which attention layers a forward will run.

An attention seam in a compiled model finds its layers by counting calls. A step cache runs part of a forward, so the
two must agree on what is counted; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from hf_accel.attention.call import Layer


class CountsLayers(Protocol):
    """What counts the attention calls of a model.

    Attributes:
        layers: in execution order; the same list as long as it stands on the model.
    """

    layers: Sequence[Layer]

    def expect(self, layers: Sequence[int]) -> None:
        """The forward that begins next runs these layers only."""


def counter_of(module: torch.nn.Module) -> CountsLayers | None:
    """What counts the attention calls of this model, found by the ``counts_layers`` of a hook on it; None if nothing
    does."""
    for hook in module._forward_pre_hooks.values():
        counter = getattr(hook, "counts_layers", None)
        if counter is not None:
            return counter
    return None
