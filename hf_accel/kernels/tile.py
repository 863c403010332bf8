"""The tile of an attention kernel, and the key by which tile tables are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """``m`` query rows by ``n`` keys, the warps that share it and the depth of the load pipeline.

    ``max_registers`` caps the registers of a thread, so that two programs fit on one multiprocessor.
    """

    m: int
    n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def compute_capability(tensor: torch.Tensor) -> int:
    """90 for a tensor on an H100, and so on; 0 for tensors that only the interpreter can take."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: tf32 would lose half the digits of an fp32 call.

    For the half types the argument means nothing.
    """
    return "ieee" if dtype == torch.float32 else "tf32"
