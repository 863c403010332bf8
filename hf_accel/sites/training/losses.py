"""What a recipe is handed to compute the loss on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class PlainLoss(NamedTuple):
    """The training's own loss: a scalar with a gradient, and the network's output (None from a loop of ours)."""

    loss: torch.Tensor
    outputs: Any


@dataclass(frozen=True)
class LossCall:
    """One batch whose loss is wanted.

    Attributes:
        network: what is called, so that gradients are exchanged: the model, or DDP around it.
        inputs: the batch as the training hands it to the network or to its own loss.
        plain: ``plain(inputs)`` computes the training's own loss on these inputs; call it at most once per forward.
        step: the optimizer step that this batch belongs to, from 0.
        scale: what a mean over this batch must be multiplied with. A training that adds up the losses of several
            batches for one step may want them divided already (1 / batches per step) or not (1). What ``plain`` gives
            needs no scale.
    """

    network: torch.nn.Module
    inputs: Mapping[str, Any]
    plain: Callable[[Mapping[str, Any]], PlainLoss]
    step: int
    scale: float
