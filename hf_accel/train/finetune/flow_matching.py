"""Forwards of denoisers that predict the velocity of a straight flow: ``x_s = (1 - s) x_0 + s noise``.

A batch holds the normalised ``latents`` as the model takes its ``hidden_states`` (packed where it wants them packed)
and every other argument of its forward under the argument's name. What differs between models is the unit of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_accel.errors import NotApplicable

# (model, x_s, sigma [B], other arguments) -> velocity, shaped like x_s
Forward = Callable[[Any, torch.Tensor, torch.Tensor, Mapping[str, Any]], torch.Tensor]

LATENTS = "latents"

# Factor from sigma in 0..1 to the forward's ``timestep``, by class. Pipelines divide where a model multiplies itself.
TIMESTEP_OF_SIGMA: dict[str, float] = {
    "FluxTransformer2DModel": 1.0,
    "HunyuanVideo15Transformer3DModel": 1000.0,
    "HunyuanVideoTransformer3DModel": 1000.0,
    "LTXVideoTransformer3DModel": 1000.0,
    "QwenImageTransformer2DModel": 1.0,
    "SD3Transformer2DModel": 1000.0,
    "SkyReelsV2Transformer3DModel": 1000.0,
    "WanTransformer3DModel": 1000.0,
    "WanVACETransformer3DModel": 1000.0,
}


def forward_for(model: torch.nn.Module) -> Forward:
    """How to ask this model for a velocity.

    Raises:
        NotApplicable: the class is not known to predict one.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in TIMESTEP_OF_SIGMA:
            return FlowForward(TIMESTEP_OF_SIGMA[cls.__name__])
    raise NotApplicable(
        f"{type(model).__name__} is not known to predict flow-matching velocities; known are "
        f"{', '.join(sorted(TIMESTEP_OF_SIGMA))}. Pass forward=: (model, noisy, sigma, conditions) -> velocity."
    )


class FlowForward:
    """Calls the model with ``hidden_states``, ``timestep`` and the batch's other entries."""

    def __init__(self, timestep_of_sigma: float):
        self.timestep_of_sigma = timestep_of_sigma

    def __call__(
        self, model: Any, noisy: torch.Tensor, sigma: torch.Tensor, conditions: Mapping[str, Any]
    ) -> torch.Tensor:
        return model(hidden_states=noisy, timestep=sigma * self.timestep_of_sigma, **conditions, return_dict=False)[0]
