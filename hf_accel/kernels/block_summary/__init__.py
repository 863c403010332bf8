"""What one vector per block of tokens says about the block: its mean, and how alike its tokens are.

The predictors of SpargeAttention (arXiv 2502.18137) and SLA (arXiv 2509.24006) read these instead of the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take

__all__ = ["BlockSummary", "backend_for", "block_summary"]

OP = "block_summary"
LIMITS = TritonLimits(max_head_dim=256)


class BlockSummary(NamedTuple):
    """Summary of every block of tokens.

    Attributes:
        mean: fp32 ``[B, H, n, D]``, over the tokens that count; 0 for a block without any.
        similarity: fp32 ``[B, H, n]``, mean cosine over all pairs of tokens of a block, each with itself included.
            Between 0 and 1: it is ``||mean of the unit rows||^2``. 1 if all point the same way; 0 for a block
            without tokens. A zero row has no direction and counts as one orthogonal to all, itself included.
    """

    mean: torch.Tensor
    similarity: torch.Tensor


def backend_for(x: torch.Tensor, backend: str = "auto") -> Choice:
    """What would run for ``x`` ``[B, H, S, D]``, and why."""
    return choose(OP, x, LIMITS, backend)


def block_summary(
    x: torch.Tensor,
    block_size: int,
    *,
    center: bool = False,
    key_valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> BlockSummary:
    """Mean and self-similarity of every block of ``block_size`` consecutive tokens.

    Args:
        x: ``[B, H, S, D]``, last axis contiguous, other strides free; fp32, fp16 or bf16. All sums are fp32.
        block_size: tokens per block; the last block has what remains, and its mean is over what it has.
        center: subtract, per batch item and head, the mean over all tokens that count first. Keys may be shifted
            so without changing their attention.
        key_valid: bool ``[B, S]``; False tokens do not count. None: all count.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        BlockSummary: ``n = ceil(S / block_size)`` blocks. Carries no gradient: what is chosen by it is a choice.

    Raises:
        UnsupportedByKernel: shapes, dtypes or devices that do not fit together.
    """
    _validate(OP, x, block_size, key_valid)
    chosen = take(OP, backend_for(x, backend))
    return BlockSummary(*_block_summary(x.detach(), block_size, center, key_valid, chosen))


@torch.library.custom_op("hf_accel::block_summary", mutates_args=())
def _block_summary(
    x: torch.Tensor, block_size: int, center: bool, key_valid: torch.Tensor | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        from hf_accel.kernels.block_summary import triton

        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(x):
            return triton.block_summary(x, block_size, center, key_valid)
    from hf_accel.kernels.block_summary import reference

    return reference.block_summary(x, block_size, center, key_valid)


@_block_summary.register_fake
def _(x, block_size, center, key_valid, backend):
    blocks = -(-x.shape[2] // block_size)
    mean = x.new_empty(*x.shape[:2], blocks, x.shape[3], dtype=torch.float32)
    return mean, x.new_empty(mean.shape[:3], dtype=torch.float32)


def _validate(op: str, x: torch.Tensor, block_size: int, key_valid: torch.Tensor | None) -> None:
    checks.expect(op, "x", x, {"B": None, "H": None, "S": None, "D": None})
    if x.numel() == 0:
        raise UnsupportedByKernel(f"{op}: x is empty: {list(x.shape)}.")
    if x.dtype not in LIMITS.dtypes:
        raise UnsupportedByKernel(f"{op}: x must be float32, float16 or bfloat16; got {x.dtype}.")
    if block_size < 1:
        raise UnsupportedByKernel(f"{op}: block_size must be at least 1; got {block_size}.")
    if key_valid is not None:
        checks.expect(op, "key_valid", key_valid, {"B": x.shape[0], "S": x.shape[2]}, torch.bool)
    checks.expect_one_device(op, x=x, key_valid=key_valid)
    checks.expect_last_axis_contiguous(op, x=x)
