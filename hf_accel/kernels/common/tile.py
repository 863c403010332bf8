"""Tile sizes of the attention kernels by GPU, head dim and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOG2_E = math.log2(math.e)


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


def attention_tiles(cc: int, head_dim: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """The tile for long runs of query rows and the one for at most half as many.

    ``cc`` is the compute capability (90 for an H100), 0 for the interpreter. Chosen from compiled code so that
    nothing spills and, at head dim 128, K and V of two tiles are on the way while one is worked on.
    """
    if cc == 0:
        return Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        # IEEE fp32 has no tensor cores: the products are unrolled into registers, and from 64 rows at head
        # dim 128 on the compiler spills thousands of them.
        if head_dim <= 64:
            return Tile(64, 32, 8, 2), Tile(16, 32, 4, 2)
        return Tile(32, 16, 8, 2), Tile(16, 16, 4 if head_dim <= 128 else 8, 2)
    if head_dim <= 64:
        return Tile(128, 64, 4 if cc in (90, 100, 103) else 8, 3), Tile(64, 64, 4, 3)
    if cc in (90, 100, 103):
        if head_dim <= 128:
            # On Hopper 128 keys halve the rescaling of the accumulator per key: 4.3 instructions per key and
            # warp against 5.5 with 64 keys, while the tensor cores need the time of 4.
            return Tile(128, 128 if cc == 90 else 64, 8, 3), Tile(64, 64, 4, 3)
        return Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)
    if head_dim <= 128:
        if cc == 80:
            return Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)
        return Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)
    if cc == 80:
        return Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)
    return Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)


def compute_capability(tensor: torch.Tensor) -> int:
    """90 for a tensor on an H100, and so on; 0 for tensors that only the interpreter can take."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def key_layout(key: torch.Tensor, value: torch.Tensor) -> tuple[bool, bool]:
    """Whether the rows of K and V are equally far apart, and whether a head spans 2**31 elements or more."""
    widest = max(abs(x.stride(2)) * x.shape[2] for x in (key, value))
    return key.stride(2) == value.stride(2), widest + key.shape[-1] >= 2**31


def padded_head_dim(head_dim: int) -> int:
    """The columns of a tile: a power of two, of at least the 16 that ``tl.dot`` asks for."""
    return max(16, 1 << (head_dim - 1).bit_length())


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A bool mask as the kernels read it: contiguous uint8, without a copy where it is contiguous already."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: tf32 would lose half the digits of an fp32 call.

    For the half types the argument means nothing.
    """
    return "ieee" if dtype == torch.float32 else "tf32"
