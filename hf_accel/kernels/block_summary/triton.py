"""Block summaries on a GPU: every token is read once, twice where it is centred first.

One program per block. The kernel is bound by memory: 128 tokens of 128 dims in bf16 are 32 KiB in and half a KiB
out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.tile import as_bytes


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_blocks"])
def summary_kernel(
    X,  # [B, H, S, D]
    Valid,  # uint8 [B, S]; unused unless HAS_VALID
    Shift,  # fp32 [B, H, D], taken off every token; unused unless HAS_SHIFT
    Mean,  # fp32 [B, H, n, D]
    Similarity,  # fp32 [B, H, n]; unused unless COMPARE
    stride_xb,
    stride_xh,
    stride_xs,
    num_heads,
    num_tokens,
    num_blocks,
    HAS_VALID: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    COMPARE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,  # BLOCK, rounded up to a power of two
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = group // num_heads
    lane = tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    token = block * BLOCK + lane
    inside = (lane < BLOCK) & (token < num_tokens)
    counts = inside
    if HAS_VALID:
        counts = inside & (tl.load(Valid + batch * num_tokens + token, mask=inside, other=0) != 0)
    element = counts[:, None] & (d[None, :] < D)
    place = batch * stride_xb + (group % num_heads) * stride_xh + token[:, None].to(tl.int64) * stride_xs + d[None, :]
    x = tl.load(X + place, mask=element, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        shift = tl.load(Shift + group * D + d, mask=d < D, other=0.0)
        x = tl.where(element, x - shift[None, :], 0.0)
    cell = group * num_blocks + block
    size = tl.maximum(tl.sum(counts.to(tl.int32), 0), 1).to(tl.float32)
    tl.store(Mean + cell * D + d, tl.sum(x, 0) / size, mask=d < D)
    if COMPARE:
        length = tl.sqrt(tl.sum(x * x, 1))
        # The bound of torch.nn.functional.normalize: a zero row has no direction.
        direction = tl.sum(x / tl.maximum(length, 1e-12)[:, None], 0) / size
        tl.store(Similarity + cell, tl.sum(direction * direction, 0))


def block_summary(
    x: torch.Tensor, block_size: int, center: bool, key_valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package."""
    blocks = triton.cdiv(x.shape[2], block_size)
    mean = x.new_empty(*x.shape[:2], blocks, x.shape[3], dtype=torch.float32)
    similarity = x.new_empty(mean.shape[:3], dtype=torch.float32)
    shift = token_mean(x, block_size, key_valid) if center else None
    _launch(x, block_size, key_valid, shift, mean, similarity)
    return mean, similarity


def token_mean(x: torch.Tensor, block_size: int, key_valid: torch.Tensor | None) -> torch.Tensor:
    """fp32 ``[B, H, D]``: mean over all tokens that count, by way of the blocks' means: no fp32 copy of ``x``."""
    blocks = triton.cdiv(x.shape[2], block_size)
    mean = x.new_empty(*x.shape[:2], blocks, x.shape[3], dtype=torch.float32)
    _launch(x, block_size, key_valid, None, mean, None)
    if key_valid is None:
        sizes = torch.full((1, blocks), float(block_size), device=x.device)
        sizes[:, -1] -= blocks * block_size - x.shape[2]
    else:
        surplus = blocks * block_size - x.shape[2]
        sizes = torch.nn.functional.pad(key_valid, (0, surplus)).unflatten(1, (blocks, block_size)).sum(-1).float()
    share = sizes / sizes.sum(-1, keepdim=True).clamp(min=1)
    return (mean * share[:, None, :, None]).sum(2)


def _launch(
    x: torch.Tensor,
    block_size: int,
    key_valid: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    similarity: torch.Tensor | None,
) -> None:
    batch, heads, tokens, head_dim = x.shape
    blocks = triton.cdiv(tokens, block_size)
    summary_kernel[(blocks, batch * heads)](
        x,
        as_bytes(key_valid),
        shift,
        mean,
        similarity,
        *x.stride()[:3],
        heads,
        tokens,
        blocks,
        **_constexprs(block_size, head_dim, key_valid is not None, shift is not None),
        COMPARE=similarity is not None,
        num_warps=_warps(block_size, head_dim),
        enable_fp_fusion=True,
    )


def _constexprs(block_size: int, head_dim: int, has_valid: bool, has_shift: bool) -> dict[str, Any]:
    return {
        "HAS_VALID": has_valid,
        "HAS_SHIFT": has_shift,
        "BLOCK": block_size,
        "TOKENS": triton.next_power_of_2(block_size),
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }


def _warps(block_size: int, head_dim: int) -> int:
    """The tile lies in registers as fp32: at most 64 of them per thread."""
    elements = triton.next_power_of_2(block_size) * triton.next_power_of_2(head_dim)
    return max(1, min(16, triton.cdiv(elements, 64 * 32)))


def aot_cases(cc: int) -> list[AotCase]:
    """The summary, of centred keys too, and the means alone; nothing here depends on ``cc``."""
    cases = []
    for name, dtype, head_dim, block, has_valid, has_shift, compare in [
        ("summary", "bf16", 128, 128, False, False, True),
        ("centred summary", "bf16", 128, 64, False, True, True),
        ("centred summary key_valid", "fp16", 80, 64, True, True, True),
        ("summary", "fp32", 256, 128, False, False, True),
        ("means", "bf16", 128, 64, True, False, False),
    ]:
        types = dict.fromkeys(("Shift", "Mean", "Similarity"), "fp32")
        cases.append(
            make_case(
                f"{name} {dtype} D{head_dim} block {block}",
                summary_kernel,
                _constexprs(block, head_dim, has_valid, has_shift) | {"COMPARE": compare},
                types | {"X": dtype, "Valid": "u8"},
                _warps(block, head_dim),
            )
        )
    return cases
