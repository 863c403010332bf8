"""Masks over a frozen prefix and an active block, taken apart."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_accel.attention.masks import MaskMemo


class SplitMask(NamedTuple):
    """What a mask lets the block see: of the prefix, bool ``[B, P]``, and of itself, bool ``[B, 1, b, b]``; each None
    where nothing is hidden."""

    valid: torch.Tensor | None = None
    block: torch.Tensor | None = None


ALL_VISIBLE = SplitMask()


def split_mask(mask: torch.Tensor | None, prefix: int, block: int, start: int | None = None) -> SplitMask | None:
    """A mask over ``[prefix | ... | block | ...]`` as what it hides of the prefix and of the block.

    Args:
        mask: ``[B, K]``, ``[B, b, K]`` or ``[B, 1, b, K]``; bool (True = attend), integer (1 = attend) or floating
            (0 = attend, the dtype's lowest or -inf = hidden); None: nothing is hidden.
        start: first key of the block; None: its keys are the last. All keys that are neither of the prefix nor of the
            block (unused slots of a static cache) must be hidden.

    Returns:
        None if the mask is something else: a bias, or one that differs between heads, or between the block's positions
        in what they see of the prefix. Waits for the device.
    """
    if mask is None:
        return ALL_VISIBLE
    if mask.ndim == 2:
        mask = mask[:, None, None].expand(-1, 1, block, -1)
    elif mask.ndim == 3:
        mask = mask[:, None]
    start = mask.shape[-1] - block if start is None else start
    if mask.ndim != 4 or mask.shape[1:3] != (1, block) or not prefix <= start <= mask.shape[3] - block:
        return None
    seen = mask
    binary = mask.new_ones((), dtype=torch.bool)
    if mask.is_floating_point():
        seen = mask > torch.finfo(mask.dtype).min / 2
        binary = ((mask == 0) | ~seen).all()
    elif mask.dtype != torch.bool:
        seen = mask != 0
        binary = (~seen | (mask == 1)).all()
    front, back = seen[..., :prefix], seen[..., start : start + block]
    same = (front == front[:, :, :1]).all()
    rest = (seen.sum() == front.sum() + back.sum()).all()
    binary_, same_, rest_, all_front, all_back = torch.stack([binary, same, rest, front.all(), back.all()]).tolist()
    if not (binary_ and same_ and rest_):
        return None
    return SplitMask(None if all_front else front[:, 0, 0].contiguous(), None if all_back else back.contiguous())


class SplitMemo(MaskMemo):
    """:func:`split_mask`, once for all layers and steps that are handed the same mask, unchanged."""

    def split(self, mask: torch.Tensor | None, prefix: int, block: int, start: int | None = None) -> SplitMask | None:
        """As :func:`split_mask`."""
        if mask is None:
            return ALL_VISIBLE
        place = prefix, block, start
        return self.get(mask, lambda: split_mask(mask, *place), place)
