"""What trainings of small language models share: the optimizers, the average of the weights, the saved state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Optimizers:
    """Muon for the matrices inside the layers of `model`, AdamW for embeddings, head and, `norms` times as fast, norms.

    Where queries and keys have norms those bound how sharp attention can be, and a longer context needs it sharper: at
    the rate of the matrices they are what everything waits for.
    """

    def __init__(self, model: Any, norms: float = 10.0) -> None:
        inside = [p for p in model.model.layers.parameters() if p.dim() == 2]
        scales = [p for name, p in model.named_parameters() if "norm" in name]
        ids = {id(p) for p in (*inside, *scales)}
        others = [p for p in model.parameters() if id(p) not in ids]
        groups = [{"params": others, "factor": 1.0}, {"params": scales, "factor": norms}]
        self.parts = (
            torch.optim.Muon(inside, lr=1e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
        )

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group.get("factor", 1.0)
            part.step()
            part.zero_grad(set_to_none=True)


@torch.no_grad()
def follow(average: Mapping[str, Tensor], model: nn.Module, keep: float) -> None:
    """`average = keep * average + (1 - keep) * weights`, in place."""
    torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - keep)


def save(
    file: Path, model: nn.Module, average: dict[str, Tensor], optimizers: Optimizers, spent: float, step: int
) -> None:
    """Write the state so that there is a whole one at every moment."""
    state = {"model": model.state_dict(), "average": average, "spent": spent, "step": step}
    state["optimizers"] = [part.state_dict() for part in optimizers.parts]
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
