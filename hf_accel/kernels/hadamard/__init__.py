"""The Walsh-Hadamard transform of rows of any length ``K * 2^m``, and its block-diagonal extension to all others.

``H = H_K (x) H_{2^m}`` with ``H H^T = n I``: one orthogonal transform over the whole row (QWHA, arXiv 2509.17428), in
Sylvester's natural order where n is a power of two.
"""

from __future__ import annotations

import math

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take
from hf_accel.kernels.hadamard.orders import block_size, factor, hadamard_matrix, require_factor

__all__ = ["backend_for", "block_size", "factor", "hadamard", "hadamard_matrix", "resolve_block"]

LIMITS = TritonLimits()
DTYPES = (*LIMITS.dtypes, torch.float64)


def backend_for(x: torch.Tensor, backend: str = "auto") -> Choice:
    """What would run for ``x``, and why. fp64 is torch on every device."""
    return choose("hadamard", x, LIMITS, backend, head_dim=1)


def resolve_block(op: str, n: int, blocks: int | None) -> int:
    """The length that is transformed: n, or ``blocks`` if it divides n and has a transform."""
    block = n if blocks is None else blocks
    if block < 1 or n % block:
        raise UnsupportedByKernel(f"{op}: blocks must divide the {n} elements of a row; got {blocks}.")
    require_factor(op, block)
    return block


def hadamard(
    x: torch.Tensor,
    *,
    inverse: bool = False,
    scale: float = 1.0,
    blocks: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``scale * H v`` of every row v of ``x``, or ``scale * H^T v / n``, which undoes it.

    Sums are fp32 whatever the dtype (fp64 for fp64), so only the input and the result are rounded to it. A row with
    an infinity or NaN comes out with NaN in it.

    Args:
        x: ``[..., n]``, any strides; fp32, fp16, bf16 or fp64.
        inverse: ``H^T / n`` instead of H.
        blocks: length of the blocks of a block-diagonal transform: divides n and is itself ``K * 2^m``
            (:func:`block_size` is the largest such). ``inverse`` then divides by it instead of n. None: n.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Contiguous ``[..., n]`` in the dtype of ``x``. Differentiable.

    Raises:
        UnsupportedByKernel: a length without transform (see :func:`factor`), a dtype that is not one of the four.
    """
    op = "hadamard"
    if x.dim() < 1 or x.shape[-1] < 1:
        raise UnsupportedByKernel(f"{op}: x must be [..., n] with n of at least 1; got {list(x.shape)}.")
    if x.dtype not in DTYPES:
        raise UnsupportedByKernel(f"{op}: x must be float32, float16, bfloat16 or float64; got {x.dtype}.")
    if not math.isfinite(scale):
        raise UnsupportedByKernel(f"{op}: scale must be a finite number; got {scale!r}.")
    block = resolve_block(op, x.shape[-1], blocks)
    return _transform(x, inverse, scale / block if inverse else float(scale), block, backend)


@torch.library.custom_op("hf_accel::hadamard", mutates_args=())
def _transform(x: torch.Tensor, transposed: bool, scale: float, block: int, backend: str) -> torch.Tensor:
    """``scale * H v``, or ``scale * H^T v`` if ``transposed``, of every stretch v of ``block`` elements."""
    if take("hadamard", backend_for(x, backend)) == "triton":
        from hf_accel.kernels.hadamard import triton

        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(x):
            return triton.transform(x, transposed, scale, block)
    from hf_accel.kernels.hadamard import cpu

    return cpu.transform(x, transposed, scale, block)


@_transform.register_fake
def _(x, transposed, scale, block, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, ctx.transposed, ctx.scale, ctx.block, ctx.backend = inputs


def _backward(ctx, grad):
    return _transform(grad, not ctx.transposed, ctx.scale, ctx.block, ctx.backend), None, None, None, None


_transform.register_autograd(_backward, setup_context=_setup)
