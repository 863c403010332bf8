"""Feature maps of linear attention: the function that stands in for the exponential of a score."""

from __future__ import annotations

import torch

FEATURE_MAPS: tuple[str, ...] = ("softmax", "elu", "relu")


def apply_feature_map(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi of ``x`` ``[..., D]`` over its last axis: softmax(x), ELU(x) + 1 or ReLU(x). Never negative."""
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        # Not elu(x) + 1, which rounds exp(x) - 1 first.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    return x.relu()


def feature_map_backward(features: torch.Tensor, gradient: torch.Tensor, feature_map: str) -> torch.Tensor:
    """The gradient of x from ``features`` = phi(x) and the gradient of phi, both ``[..., D]``.

    All three derivatives can be told from phi(x) alone: for ELU + 1 it is phi below 1 and 1 above.
    """
    if feature_map == "softmax":
        return features * (gradient - (features * gradient).sum(-1, keepdim=True))
    if feature_map == "elu":
        return gradient * features.clamp(max=1)
    return gradient * (features > 0)
