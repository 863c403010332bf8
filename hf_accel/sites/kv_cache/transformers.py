"""K/V of finished blocks, for models that write a transformers cache whenever they are given one.

A denoising step must not leave its K/V behind. Transformers' dynamic cache would concatenate the whole prefix with the
block's K/V in every layer and step, and be cut afterwards; these layers write behind the prefix, into room that is
already there, and hand out views.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def new_cache() -> Any:
    """An empty cache (a ``DynamicCache``) with ``truncate(length)`` and ``nbytes``.

    ``update`` returns views ``[B, H, length, D]`` of buffers that the next forward overwrites behind the prefix.
    """
    return _cache_class()()


@functools.cache
def _cache_class() -> Any:
    """Made at first use: transformers is not imported before the user has."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class PrefixLayer(DynamicLayer):
        """K/V of one layer: ``keys`` and ``values`` are views of the first positions of larger buffers."""

        keys: torch.Tensor
        values: torch.Tensor

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._buffers = [x[:, :, :0] for x in (key_states, value_states)]
            self.keys, self.values = self._buffers
            self.is_initialized = True

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            first = self.keys.shape[2]
            length = first + key_states.shape[2]
            if length > self._buffers[0].shape[2]:
                room = length + length // 2 + 64
                self._buffers = [_grown(kept, room) for kept in (self.keys, self.values)]
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, first:length] = states
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
            return self.keys, self.values

        def truncate(self, length: int) -> None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

        @property
        def nbytes(self) -> int:
            return sum(buffer.nbytes for buffer in self._buffers) if self.is_initialized else 0

    class PrefixKV(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.layer_class_to_replicate = PrefixLayer

        def truncate(self, length: int) -> None:
            """Forget what was written behind the first ``length`` positions."""
            for layer in self._own_layers():
                layer.truncate(length)

        @property
        def nbytes(self) -> int:
            return sum(layer.nbytes for layer in self._own_layers())

        def _own_layers(self) -> list[PrefixLayer]:
            return [layer for layer in self.layers if isinstance(layer, PrefixLayer)]

    return PrefixKV


def _grown(kept: torch.Tensor, room: int) -> torch.Tensor:
    batch, heads, length, dim = kept.shape
    buffer = kept.new_empty(batch, heads, room, dim)
    buffer[:, :, :length] = kept
    return buffer
