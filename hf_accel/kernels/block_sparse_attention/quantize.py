"""The number formats of ``numerics="int8"`` in plain torch: what the Triton form stores, as floating point.

Queries and keys: INT8 with one scale per block of tokens, keys less their mean (SageAttention, arXiv 2410.02367;
SpargeAttention, arXiv 2502.18137). Values: FP8 E4M3 or FP16 with one scale per channel (SageAttention2,
arXiv 2411.10958).
"""

from __future__ import annotations

import torch

# The weights of a tile are multiplied by 2 ** shift before they are rounded: E4M3 has nothing between 0 and
# 2**-9, and 448 above.
WEIGHT_SHIFT = {torch.float8_e4m3fn: 8.0, torch.float16: 0.0}
# The largest magnitude that a channel of the values is scaled to.
VALUE_RANGE = {torch.float8_e4m3fn: 448.0, torch.float16: 1.0}


def value_dtype(cc: int) -> torch.dtype:
    """What values and weights are rounded to on compute capability ``cc``; 0 is a CPU, which shows the coarser."""
    return torch.float8_e4m3fn if cc >= 89 or cc == 0 else torch.float16


def mean_key(key: torch.Tensor, key_valid: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that count, fp32 ``[B, Hkv, 1, D]``."""
    if key_valid is None:
        return key.mean(2, keepdim=True, dtype=torch.float32)
    valid = key_valid[:, None, :, None]
    total = key.masked_fill(~valid, 0).sum(2, keepdim=True, dtype=torch.float32)
    return total / valid.sum(2, keepdim=True).clamp(min=1)


def quantize_blocks(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round fp32 ``[B, H, S, D]`` to whole numbers from -127 to 127, with one fp32 scale ``[B, H, n]`` per block.

    The integers are fp32 and padded with zeros to whole blocks, ``[B, H, n * block, D]``. Halves are rounded away
    from zero.
    """
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    scale = block_scale(x.abs().amax((3, 4)))
    scaled = x / scale[..., None, None]
    return (scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)).trunc().flatten(2, 3), scale


def block_scale(largest: torch.Tensor) -> torch.Tensor:
    return torch.where(largest > 0, largest / 127, 1.0)


def value_scale(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 ``[B, Hkv, 1, D]``: the step that brings the largest value of a channel to the top of ``dtype``."""
    low, high = value.aminmax(dim=2, keepdim=True)
    largest = torch.maximum(-low, high).float()
    return torch.where(largest > 0, largest / VALUE_RANGE[dtype], 1.0)
