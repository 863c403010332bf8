"""Which kind of network a model is, of those that methods are put on."""

from __future__ import annotations

import torch

from hf_accel.facts import Host
from hf_accel.hosts.block_families import family_of
from hf_accel.hosts.denoisers import describe
from hf_accel.hosts.target import kind


def host_of(module: torch.nn.Module) -> Host | None:
    """Which kind of network this is, of those that methods are put on; None if of none."""
    spec = describe(module)
    if spec is not None:
        return "unet" if spec.levels else "transformer"
    if family_of(module) is not None:
        return "block diffusion"
    if kind(module) == "language model":
        return "language model"
    return "unet" if kind(module) == "denoiser" and type(module).__name__.startswith("UNet") else None
