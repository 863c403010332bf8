"""The definition of packed weights: GPTQ's layout, one code after another."""

from __future__ import annotations

import torch


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 ``[w, m]`` -> codes int32 ``[w * 32 / bits, m]``: every column is a stream of bits, least significant
    first, of which code r holds bits ``bits * r`` to ``bits * (r + 1) - 1``. At 3 bits a code may span two words."""
    place = torch.arange(words.shape[0] * 32, device=words.device)
    stream = (words[place // 32] >> (place % 32)[:, None]) & 1
    weight = 1 << torch.arange(bits, device=words.device, dtype=torch.int32)
    return (stream.view(-1, bits, words.shape[1]) * weight[:, None]).sum(1, dtype=torch.int32)


def dequantize_packed(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``scale * (code - zero)`` ``[m, n]``, in fp32 (fp64 for fp64) until it is rounded to ``dtype``."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    group = g_idx.long()
    zeros = unpack(qzeros.T.contiguous(), bits).T
    weight = scales.to(precise)[group] * (unpack(qweight, bits) - zeros[group]).to(precise)
    return weight.T.to(dtype).contiguous()


def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x W^T + bias`` in fp32 (fp64 if x is), W not rounded."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(dtype) @ dequantize_packed(qweight, scales, qzeros, g_idx, bits, dtype).T
    return out if bias is None else out + bias.to(dtype)
