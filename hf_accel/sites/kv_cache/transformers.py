"""Caches and cache layers of ours, as transformers takes them: by public subclassing only.

Two kinds. :func:`new_cache` keeps K/V of finished blocks for models that write a cache whenever they are given one: a
denoising step must not leave its K/V behind. Transformers' dynamic cache would concatenate the whole prefix with the
block's K/V in every layer and step, and be cut afterwards; these layers write behind the prefix, into room that is
already there, and hand out views.

:func:`exchange_layers` puts slotted layers into a dynamic cache that is empty yet: what lies behind an exact window is
stored as a codec's codes, and a policy says which tokens stay.
"""

from __future__ import annotations

import functools
from collections import Counter
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


# -- layers with slots -----------------------------------------------------------------------------------------------


def is_dynamic(cache: Any) -> bool:
    """Whether a cache is transformers' ``DynamicCache``, or derived from it."""
    from transformers.cache_utils import DynamicCache

    return isinstance(cache, DynamicCache)


def fresh_cache(config: Any) -> Any:
    """The empty cache that a model of this configuration would make for itself."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=config)


def is_padded(mask: Any) -> bool:
    """Whether a 2-D attention mask hides anything. Waits for the device."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all())


def exchange_layers(cache: Any) -> Counter[str]:
    """Put slotted layers in the place of the plain layers of an empty cache; returns the classes of those that stay."""
    from transformers.cache_utils import DynamicLayer

    slotted = _slotted_layer()
    plain: Counter[str] = Counter()
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = slotted(index)
        elif not isinstance(layer, slotted):
            plain[type(layer).__name__] += 1
    if cache.layer_class_to_replicate is DynamicLayer:  # layers are made as the model asks for them
        cache.layer_class_to_replicate = functools.partial(_next_layer, cache)
    return plain


def _next_layer(cache: Any) -> Any:
    layer = _slotted_layer()(len(cache.layers))
    first = cache.layers[0] if cache.layers else None
    if first is None:
        layer.codec, layer.policy = cache.hf_accel_slots
    else:
        layer.codec, layer.policy = first.codec, first.policy
    return layer


def slotted_layers(cache: Any) -> list[Any]:
    """The layers of ours in a cache."""
    return [layer for layer in cache.layers if isinstance(layer, _slotted_layer())]


def has_slots(cache: Any) -> bool:
    """Whether a cache has layers of ours."""
    return bool(slotted_layers(cache))


def fill_slots(cache: Any, codec: Any, policy: Any) -> None:
    """Say what fills the slots of a cache's layers from now on; None leaves a slot as it is."""
    old = getattr(cache, "hf_accel_slots", (None, None))
    slots = codec if codec is not None else old[0], policy if policy is not None else old[1]
    cache.hf_accel_slots = slots
    for layer in slotted_layers(cache):
        layer.codec, layer.policy = slots


@functools.cache
def _slotted_layer() -> Any:
    """Made at first use: transformers is not imported before the user has."""
    from torch.utils import _pytree as pytree
    from transformers.cache_utils import DynamicLayer

    class SlottedLayer(DynamicLayer):
        """K/V of one layer: groups of tokens as codes, and behind them exact tokens in ``keys`` and ``values``, whose
        positions are ``exact``. ``seen`` counts all tokens that ever came."""

        keys: torch.Tensor
        values: torch.Tensor

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index
            self.codec: Any = None
            self.policy: Any = None
            self._forget()

        def _forget(self) -> None:
            self.groups: list[tuple[int, Any]] = []  # first position, codes
            self.seen = 0
            self.exact: list[int] = []  # positions of the exact tokens

        @property
        def group(self) -> int:
            return int(getattr(self.codec.config, "group_size", self.codec.group))

        @property
        def window(self) -> int:
            return int(getattr(self.codec.config, "window", self.codec.window))

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            new = key_states.shape[2]
            keys, values = super().update(key_states, value_states)
            self.exact += range(self.seen, self.seen + new)
            self.seen += new
            if self.groups:
                parts = [self.codec.decode(codes, self.index) for _, codes in self.groups]
                keys = torch.cat([*(k for k, _ in parts), keys], dim=2)
                values = torch.cat([*(v for _, v in parts), values], dim=2)
            if self.policy is not None:
                self._drop()
            if self.codec is not None:
                self._flush()
            return keys, values

        def _flush(self) -> None:
            """Encode whole groups that lie behind the window."""
            count = self.group
            while len(self.exact) >= self.window + count:
                first = self.exact[0]
                if first % count or self.exact[count - 1] != first + count - 1:
                    return  # a policy took tokens out of this group: it stays exact
                cut = self.keys[:, :, :count].contiguous(), self.values[:, :, :count].contiguous()
                self.groups.append((first, self.codec.encode(*cut, self.index)))
                # Copied: a view would keep the exact tokens of the group alive.
                self.keys, self.values = (x[:, :, count:].clone() for x in (self.keys, self.values))
                del self.exact[:count]

        def _drop(self) -> None:
            held = [p for first, _ in self.groups for p in range(first, first + self.group)] if self.groups else []
            positions = torch.tensor(held + self.exact)
            stays = self.policy.keep(positions, self.index).tolist()
            coded = stays[: len(held)]
            if self.groups:
                size = self.group
                self.groups = [g for i, g in enumerate(self.groups) if any(coded[i * size : (i + 1) * size])]
            rest = [i for i, stay in enumerate(stays[len(held) :]) if stay]
            if len(rest) < len(self.exact):
                index = torch.tensor(rest, device=self.keys.device)
                self.keys, self.values = (x.index_select(2, index) for x in (self.keys, self.values))
                self.exact = [self.exact[i] for i in rest]

        @property
        def held(self) -> int:
            return len(self.exact) + (len(self.groups) * self.group if self.groups else 0)

        @property
        def nbytes(self) -> int:
            """Bytes of codes and exact tokens."""
            tensors = [x for _, codes in self.groups for x in pytree.tree_leaves(codes) if isinstance(x, torch.Tensor)]
            if self.is_initialized:
                tensors += [self.keys, self.values]
            return sum(x.nbytes for x in tensors)

        @property
        def plain_nbytes(self) -> int:
            """Bytes that a plain layer would hold for the tokens that came."""
            if not self.is_initialized or not self.exact:
                return 0
            return self.seen * (self.keys.nbytes + self.values.nbytes) // len(self.exact)

        def get_seq_length(self) -> int:
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.held + query_length, self.seen - self.held

        def reset(self) -> None:
            super().reset()
            self._forget()

        def crop(self, tokens_to_remove: int) -> None:
            count = abs(tokens_to_remove)
            if count >= self.seen:
                self.reset()
                return
            while self.groups and count >= len(self.exact):
                first, codes = self.groups.pop()
                keys, values = self.codec.decode(codes, self.index)
                self.keys, self.values = torch.cat([keys, self.keys], dim=2), torch.cat([values, self.values], dim=2)
                self.exact = [*range(first, first + self.group), *self.exact]
            last = self.seen - count
            left = sum(position < last for position in self.exact)
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
            self.exact, self.seen = self.exact[:left], last

        def _rows(self, change: Any) -> None:
            self.groups = [(first, pytree.tree_map_only(torch.Tensor, change, codes)) for first, codes in self.groups]

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            if self.is_initialized:
                super().reorder_cache(beam_idx)
                self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.is_initialized:
                super().batch_repeat_interleave(repeats)
                self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            if self.is_initialized:
                super().batch_select_indices(indices)
                self._rows(lambda x: x[indices, ...])

    return SlottedLayer


def _grown(kept: torch.Tensor, room: int) -> torch.Tensor:
    batch, heads, length, dim = kept.shape
    buffer = kept.new_empty(batch, heads, room, dim)
    buffer[:, :, :length] = kept
    return buffer
