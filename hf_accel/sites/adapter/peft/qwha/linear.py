"""A linear layer with a sparse Hadamard update, on the weight's side: ``y = x (W + F H / n)^T + bias``.

Neither W with the update nor the update alone is kept for the backward pass, which would be a dense weight per layer:
both are made again from the base, the positions and the values. What is kept beside those is the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hf_accel.kernels.quantized_linear import Packed
from hf_accel.kernels.qwha_weight import qwha_weight
from hf_accel.sites.adapter.peft.qwha.coefficients import Coefficients


def updated_linear(
    x: torch.Tensor,
    coefficients: Coefficients,
    block: int,
    weight: torch.Tensor | Packed | None = None,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x (W + F H / block)^T + bias``: ``[..., n]`` -> ``[..., m]``.

    Args:
        x: in ``dtype``.
        coefficients: F, its factor already in the values.
        block: length of the transform.
        weight: W, dense ``[m, n]`` or packed; None: the update alone.
        dtype: of the product; None: that of ``x``.

    Returns:
        In ``dtype``. Differentiable with respect to ``x``, the values, the bias and a dense weight.
    """
    dtype = dtype or x.dtype
    dense = None if isinstance(weight, Packed) else weight
    packed: tuple[Any, ...] = tuple(weight) if isinstance(weight, Packed) else (None, None, None, None, 0, None)
    learns = (x, coefficients.values, dense, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in learns):
        return _UpdatedLinear.apply(x, coefficients.values, dense, bias, *coefficients[:2], *packed, block, dtype)
    return F.linear(x, _weight(dense, *coefficients, packed, x.shape[-1], block, dtype), bias)


def _weight(
    dense: torch.Tensor | None,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    packed: tuple[Any, ...],
    n: int,
    block: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    whole = None if packed[0] is None else Packed(*packed)
    return qwha_weight(
        dense, indptr, columns, values, 1.0, packed=whole, in_features=n, blocks=block, dtype=dtype
    )  # fmt: skip


class _UpdatedLinear(torch.autograd.Function):
    """See :func:`updated_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        dense: torch.Tensor | None,
        bias: torch.Tensor | None,
        indptr: torch.Tensor,
        columns: torch.Tensor,
        qweight: torch.Tensor | None,
        scales: torch.Tensor | None,
        qzeros: torch.Tensor | None,
        g_idx: torch.Tensor | None,
        bits: int,
        group_size: int | None,
        block: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        packed = (qweight, scales, qzeros, g_idx, bits, group_size)
        weight = _weight(dense, indptr, columns, values, packed, x.shape[-1], block, dtype)
        ctx.rest = bits, group_size, x.shape[-1], block, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if learns else None, values, dense, indptr, columns, qweight, scales, qzeros, g_idx)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, dense, indptr, columns, *packed = ctx.saved_tensors
        bits, group_size, n, block, dtype = ctx.rest
        grad = grads[0]
        grad_x = grad_values = grad_dense = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _weight(dense, indptr, columns, values, (*packed, bits, group_size), n, block, dtype)
            grad_x = grad @ weight
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # Of the whole weight, as for any linear; freed before the next layer's.
            grad_weight = rows.T @ x.reshape(-1, n)
            if ctx.needs_input_grad[1]:
                grad_values = torch.ops.hf_accel.qwha_weight_backward(
                    grad_weight, indptr, columns, 1.0, block, values.dtype, "auto"
                )
            if ctx.needs_input_grad[2]:
                grad_dense = grad_weight.to(dense.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_values, grad_dense, grad_bias, *[None] * 10


__all__ = ["updated_linear"]
