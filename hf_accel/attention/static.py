"""Block maps that follow from the shape alone: built once, kept for a few shapes, handed to the kernel as a list."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from hf_accel.attention.layout import block_sizes, density
from hf_accel.kernels.block_sparse_attention import block_map_to_index

T = TypeVar("T")


@dataclass(frozen=True)
class StaticBlocks:
    """A block map for all heads and batch items, as the block-sparse kernel takes it.

    Attributes:
        block_map: bool ``[n, n]``.
        index: int32 ``[1, 1, n, max_keep]``, cut to the fullest row.
        count: int32 ``[1, 1, n]``.
        density: fp32 ``[1, 1]``, share of the token pairs in kept blocks.
    """

    block_map: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor
    density: torch.Tensor

    @classmethod
    def of(cls, block_map: torch.Tensor, sequence: int, block_size: int, device: torch.device) -> StaticBlocks:
        """From a map bool ``[n, n]`` over ``sequence`` tokens. Waits for the device if the map is not on the CPU."""
        index, count = block_map_to_index(block_map[None, None])
        index = index[..., : int(count.max())].contiguous()
        sizes = block_sizes(sequence, block_size).to(block_map.device)[None, None]
        share = density(block_map[None, None], sizes, sizes)
        return cls(*(x.to(device) for x in (block_map, index, count, share)))


class Recent(Generic[T]):
    """The last few results of a function, by key: a pipeline uses few shapes, a server must not hoard them.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int = 8):
        self.limit = limit
        self._kept: dict[Hashable, T] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make()`` gave for this key, called only if it is not kept. Threads may both call it; one result
        stays."""
        found = self._kept.get(key)
        if found is None:
            # Made in inference mode, its tensors could not be saved for a backward pass later.
            with torch.inference_mode(False):
                found = self._kept[key] = make()
            for old in list(self._kept)[: -self.limit]:
                self._kept.pop(old, None)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_kept": {}}  # a copy may be made while others add to it
