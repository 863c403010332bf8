"""The definition of the sort and of the row moves, in plain torch."""

from __future__ import annotations

import torch


def sort_by_label(labels: torch.Tensor, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``labels`` int32 ``[..., N]`` -> ``order`` int32 ``[..., N]``, ``sizes`` ``[..., num_labels]``."""
    order = torch.argsort(labels, dim=-1, stable=True).int()
    sizes = (labels[..., None] == torch.arange(num_labels, device=labels.device)).sum(-2).int()
    return order, sizes


def gather_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``y[b, h, r] = x[b, h, order[b, h, r]]``."""
    return x.gather(2, order.long()[..., None].expand(*order.shape, x.shape[-1]))


def scatter_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``y[b, h, order[b, h, r]] = x[b, h, r]``."""
    return torch.zeros_like(x).scatter(2, order.long()[..., None].expand(x.shape), x)
