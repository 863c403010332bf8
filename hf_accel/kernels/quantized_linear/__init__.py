"""A linear layer on packed 2, 3, 4 or 8 bit weights, as GPTQ (arXiv 2210.17323) and its ecosystem store them.

With few tokens the layer is bound by reading the weight, so the codes are read as they are and never written unpacked:
16-bit weights are outrun by up to 16 / (bits + 32 / group size). With many it is bound by the tensor cores: the weight
is dequantised once and multiplied as any other.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take
from hf_accel.kernels.quantized_linear.layout import Packed, check_packed

__all__ = ["MOST_FUSED_TOKENS", "Packed", "backend_for", "check_packed", "dequantize_packed", "quantized_linear"]

LIMITS = TritonLimits()
DTYPES = (*LIMITS.dtypes, torch.float64)
MOST_FUSED_TOKENS = {"triton": 64, "torch": 128}


def backend_for(x: torch.Tensor, backend: str = "auto") -> Choice:
    """What would run for ``x`` (for :func:`dequantize_packed`: ``scales``), and why. fp64 is torch on every device."""
    return choose("quantized_linear", x, LIMITS, backend, head_dim=1)


def dequantize_packed(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    dtype: torch.dtype | None = None,
    *,
    group_size: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The weight ``[m, n]`` in ``dtype`` (None: that of ``scales``): products in fp32, rounded once.

    Arguments and errors as for :func:`quantized_linear`; carries no gradient.
    """
    op = "dequantize_packed"
    check_packed(op, Packed(qweight, scales, qzeros, g_idx, bits, group_size))
    dtype = dtype or scales.dtype
    _check_dtype(op, "dtype", dtype)
    return _dequantize(qweight, scales, qzeros, g_idx, bits, group_size, dtype, backend)


def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
    *,
    group_size: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``x W^T + bias`` for a packed W ``[m, n]``, ``W[i, j] = scales[g, i] * (code - zero)`` with ``g = g_idx[j]``.

    Up to :data:`MOST_FUSED_TOKENS` tokens the codes are multiplied and sums of a group are scaled in fp32; with more,
    or on a GPU with groups in any order, W is first rounded to the dtype of ``x``. Sums are fp32 (fp64 for fp64), and
    do not depend on the order in which programs finish.

    Args:
        x: ``[..., n]``; fp32, fp16, bf16 or fp64.
        qweight: int32 ``[n * bits / 32, m]``. See :class:`Packed` for the layout of this and what follows.
        scales: ``[G, m]``; fp16, bf16 or fp32.
        qzeros: int32 ``[G, m * bits / 32]``, true zeros (version 2).
        g_idx: int32 ``[n]``.
        bits: 2, 3, 4 or 8.
        bias: ``[m]`` or None.
        group_size: promises that ``g_idx[j] == j // group_size``; not checked, but much faster. None: any g_idx.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[..., m]`` in the dtype of ``x``. Differentiable with respect to ``x`` and ``bias``.

    Raises:
        UnsupportedByKernel: shapes, dtypes or devices that do not fit together.
    """
    op = "quantized_linear"
    packed = Packed(qweight, scales, qzeros, g_idx, bits, group_size)
    check_packed(op, packed)
    if x.dim() < 1 or x.shape[-1] != packed.in_features:
        raise UnsupportedByKernel(f"{op}: x must be [..., {packed.in_features}]; got {list(x.shape)}.")
    _check_dtype(op, "x", x.dtype)
    if bias is not None:
        checks.expect(op, "bias", bias, {"m": packed.out_features})
    checks.expect_one_device(op, x=x, qweight=qweight, bias=bias)
    tokens = math.prod(x.shape[:-1])
    flat = x.reshape(tokens, packed.in_features)
    out = _quantized_linear(flat, qweight, scales, qzeros, g_idx, bits, group_size, bias, backend)
    return out.view(*x.shape[:-1], packed.out_features)


@torch.library.custom_op("hf_accel::quantized_linear", mutates_args=())
def _quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    group_size: int | None,
    bias: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """``[T, n]`` -> ``[T, m]``."""
    packed = Packed(qweight, scales, qzeros, g_idx, bits, group_size)
    chosen = take("quantized_linear", backend_for(x, backend))
    if x.shape[0] > MOST_FUSED_TOKENS[chosen]:
        weight = _weight(packed, x.dtype, chosen)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if chosen == "triton":
        from hf_accel.kernels.quantized_linear import triton

        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(x):
            return triton.quantized_linear(x, packed, bias)
    from hf_accel.kernels.quantized_linear import cpu

    return cpu.quantized_linear(x, packed, bias).to(x.dtype)


@_quantized_linear.register_fake
def _(x, qweight, scales, qzeros, g_idx, bits, group_size, bias, backend):
    return x.new_empty(x.shape[0], qweight.shape[1])


def _setup(ctx, inputs, output):
    _, qweight, scales, qzeros, g_idx, ctx.bits, ctx.group_size, bias, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The weight is dequantised again in the backward pass: it would be the largest thing kept.
    ctx.save_for_backward(qweight, scales, qzeros, g_idx)


def _backward(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _dequantize(*ctx.saved_tensors, ctx.bits, ctx.group_size, grad.dtype, ctx.backend)
        grad_x = grad @ weight
    if ctx.needs_input_grad[7]:
        grad_bias = grad.sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, None, grad_bias, None


_quantized_linear.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("hf_accel::dequantize_packed", mutates_args=())
def _dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    packed = Packed(qweight, scales, qzeros, g_idx, bits, group_size)
    precise = dtype == torch.float64
    chosen = "torch" if precise else take("dequantize_packed", backend_for(scales, backend))
    return _weight(packed, dtype, chosen)


def _weight(packed: Packed, dtype: torch.dtype, chosen: str) -> torch.Tensor:
    """``[m, n]`` in ``dtype``, on a backend that was chosen."""
    if chosen == "triton":
        from hf_accel.kernels.quantized_linear import triton

        with torch.cuda.device_of(packed.scales):
            return triton.dequantize(packed, dtype)
    from hf_accel.kernels.quantized_linear import cpu

    return cpu.dequantize(packed, dtype)


@_dequantize.register_fake
def _(qweight, scales, qzeros, g_idx, bits, group_size, dtype, backend):
    return scales.new_empty(qweight.shape[1], g_idx.shape[0], dtype=dtype)


def _check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise UnsupportedByKernel(f"{op}: {name} must be float32, float16, bfloat16 or float64; got {dtype}.")
