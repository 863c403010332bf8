"""The weight of a QWHA adapter (arXiv 2509.17428): a frozen base plus a sparse F seen through a Hadamard transform.

``W = base + scale * F H / n``, where row i of F has p_i values at fixed columns and ``H H^T = n I``. The update is made
and added where the base is read, dense or packed, so what passes through memory is the base once and W once. To few
tokens the update is better applied on the side of the activations, ``scale * (x H^T / n) F^T``, which never makes W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take
from hf_accel.kernels.hadamard import hadamard, resolve_block
from hf_accel.kernels.quantized_linear import Packed, check_packed
from hf_accel.kernels.qwha_weight.layout import VALUE_DTYPES, check_coefficients

__all__ = ["backend_for", "qwha_activation", "qwha_weight"]

LIMITS = TritonLimits()


def backend_for(values: torch.Tensor, backend: str = "auto") -> Choice:
    """What would run for coefficients ``values``, and why. fp64 is torch on every device."""
    return choose("qwha_weight", values, LIMITS, backend, head_dim=1)


def qwha_weight(
    base: torch.Tensor | None,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    packed: Packed | Sequence[Any] | None = None,
    in_features: int | None = None,
    blocks: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``base + scale * F H / n`` ``[m, n]``: the weight that a linear layer with the adapter multiplies by.

    Base and update are added in fp32 (fp64 if the values are) and rounded once.

    Args:
        base: dense ``[m, n]``, last axis contiguous; or None, with ``packed`` or, for the update alone,
            ``in_features``.
        indptr: int32 ``[m + 1]``: row i of F owns ``values[indptr[i]:indptr[i + 1]]``.
        columns: int16 (n up to 65,536, as unsigned bits) or int32 ``[p]``, in ``[0, n)``. Not checked on a GPU.
            Coefficients at one place add up.
        values: ``[p]``; fp32, fp16, bf16 or fp64. Of the last dimension of H, whose length is that of a block.
        scale: factor of the update; QWHA's is ``s / sqrt(m)``.
        packed: ``(qweight, scales, qzeros, g_idx, bits)`` and perhaps a group size, as :class:`Packed`.
        in_features: n, where neither base nor packed says it.
        blocks: length of the blocks of a block-diagonal H, as for :func:`hadamard`; the update is divided by it
            instead of n. None: n.
        dtype: of the result; None: that of the base, of the packed scales, or of ``values``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Contiguous ``[m, n]``. Differentiable with respect to ``values`` and ``base``; the backward pass keeps neither F
        nor the result, and on a GPU no dense gradient of F is made.

    Raises:
        UnsupportedByKernel: shapes, dtypes or devices that do not fit together, a length without transform.
    """
    op = "qwha_weight"
    if base is not None and packed is not None:
        raise UnsupportedByKernel(f"{op}: give a dense base or a packed one, not both.")
    whole = packed if packed is None or isinstance(packed, Packed) else Packed(*packed)
    m: int | None = None
    found = values
    if base is not None:
        checks.expect(op, "base", base, {"m": None, "n": None})
        if base.dtype not in VALUE_DTYPES:
            raise UnsupportedByKernel(f"{op}: base must be float32, float16, bfloat16 or float64; got {base.dtype}.")
        checks.expect_last_axis_contiguous(op, base=base)
        m, n = base.shape
        found = base
    elif whole is not None:
        check_packed(op, whole)
        m, n = whole.out_features, whole.in_features
        found = whole.scales
    elif in_features is not None:
        n = in_features
    else:
        raise UnsupportedByKernel(f"{op}: without a base, in_features must say how many columns the weight has.")
    if in_features not in (None, n):
        raise UnsupportedByKernel(f"{op}: the base has {n} inputs, in_features says {in_features}.")
    check_coefficients(op, indptr, columns, values, n, m)
    _check_scale(op, scale)
    block = resolve_block(op, n, blocks)
    checks.expect_one_device(op, base=found, values=values)
    dtype = dtype or found.dtype
    if dtype not in VALUE_DTYPES:
        raise UnsupportedByKernel(f"{op}: dtype must be float32, float16, bfloat16 or float64; got {dtype}.")
    parts = (None, None, None, None, 0, None) if whole is None else tuple(whole)
    return _qwha_weight(base, indptr, columns, values, *parts, n, float(scale), block, dtype, backend)


def qwha_activation(
    x: torch.Tensor,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    blocks: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``scale * (x H^T / n) F^T``: what the update of :func:`qwha_weight` adds to the output of the layer.

    n log n additions and 2 p multiplications per token, against m * n per *call* on the side of the weight. In fp32
    (fp64 for fp64) until the result is rounded to the dtype of ``x``.

    Args:
        x: ``[..., n]``; fp32, fp16, bf16 or fp64.
        indptr, columns, values, scale, blocks, backend: as for :func:`qwha_weight`.

    Returns:
        ``[..., m]`` in the dtype of ``x``. Differentiable with respect to ``x`` and ``values``.
    """
    op = "qwha_activation"
    if x.dim() < 1 or x.shape[-1] < 1:
        raise UnsupportedByKernel(f"{op}: x must be [..., n]; got {list(x.shape)}.")
    n = x.shape[-1]
    check_coefficients(op, indptr, columns, values, n)
    _check_scale(op, scale)
    block = resolve_block(op, n, blocks)
    checks.expect_one_device(op, x=x, values=values)
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    spectrum = hadamard(x.to(precise).reshape(-1, n), scale=scale / block, blocks=block, backend=backend)
    out = _sparse_product(spectrum, indptr, columns, values, backend)
    return out.to(x.dtype).view(*x.shape[:-1], len(indptr) - 1)


@torch.library.custom_op("hf_accel::qwha_weight", mutates_args=())
def _qwha_weight(
    base: torch.Tensor | None,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    qweight: torch.Tensor | None,
    scales: torch.Tensor | None,
    qzeros: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int | None,
    n: int,
    scale: float,
    block: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    packed = None
    if qweight is not None and scales is not None and qzeros is not None and g_idx is not None:
        packed = Packed(qweight, scales, qzeros, g_idx, bits, group_size)
    precise = torch.float64 in (dtype, None if base is None else base.dtype)
    if not precise and take("qwha_weight", backend_for(values, backend)) == "triton":
        from hf_accel.kernels.qwha_weight import triton

        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(values):
            return triton.qwha_weight(base, packed, indptr, columns, values, scale, block, n, dtype)
    from hf_accel.kernels.qwha_weight import cpu

    return cpu.qwha_weight(base, packed, indptr, columns, values, scale, block, n, dtype)


@_qwha_weight.register_fake
def _(base, indptr, columns, values, qweight, scales, qzeros, g_idx, bits, group_size, n, scale, block, dtype, backend):
    return values.new_empty(indptr.shape[0] - 1, n, dtype=dtype)


@torch.library.custom_op("hf_accel::qwha_weight_backward", mutates_args=())
def _qwha_gradient(
    grad: torch.Tensor,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    block: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """Gradient ``[m, n]`` of the weight -> that of the values, ``scale / n * H G_i`` at the columns of row i."""
    if dtype != torch.float64 and take("qwha_weight", backend_for(grad, backend)) == "triton":
        from hf_accel.kernels.qwha_weight import triton

        with torch.cuda.device_of(grad):
            return triton.qwha_gradient(grad, indptr, columns, scale, block, dtype)
    from hf_accel.kernels.qwha_weight import cpu

    return cpu.qwha_gradient(grad, indptr, columns, scale, block, dtype)


@_qwha_gradient.register_fake
def _(grad, indptr, columns, scale, block, dtype, backend):
    return grad.new_empty(columns.shape[0], dtype=dtype)


def _setup_weight(ctx, inputs, output):
    base, indptr, columns, values = inputs[:4]
    _, ctx.scale, ctx.block, _, ctx.backend = inputs[10:]
    ctx.base_dtype = None if base is None else base.dtype
    ctx.values_dtype = values.dtype
    ctx.save_for_backward(indptr, columns)


def _weight_backward(ctx, grad):
    grad_base = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_base = grad.to(ctx.base_dtype)
    if ctx.needs_input_grad[3]:
        indptr, columns = ctx.saved_tensors
        grad_values = _qwha_gradient(grad, indptr, columns, ctx.scale, ctx.block, ctx.values_dtype, ctx.backend)
    return grad_base, None, None, grad_values, *[None] * 11


_qwha_weight.register_autograd(_weight_backward, setup_context=_setup_weight)


@torch.library.custom_op("hf_accel::qwha_sparse_product", mutates_args=())
def _sparse_product(
    spectrum: torch.Tensor, indptr: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, backend: str
) -> torch.Tensor:
    """``spectrum F^T``: ``[T, n]`` -> ``[T, m]``."""
    if values.dtype != torch.float64 and take("qwha_activation", backend_for(spectrum, backend)) == "triton":
        from hf_accel.kernels.qwha_weight import triton

        with torch.cuda.device_of(spectrum):
            return triton.sparse_product(spectrum, indptr, columns, values)
    from hf_accel.kernels.qwha_weight import cpu

    return cpu.sparse_product(spectrum, indptr, columns, values)


@_sparse_product.register_fake
def _(spectrum, indptr, columns, values, backend):
    return spectrum.new_empty(spectrum.shape[0], indptr.shape[0] - 1)


@torch.library.custom_op("hf_accel::qwha_sparse_product_backward", mutates_args=())
def _sparse_product_backward(
    grad: torch.Tensor,
    spectrum: torch.Tensor,
    indptr: torch.Tensor,
    columns: torch.Tensor,
    values: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch on every device: training has many tokens, and with many the weight's side is the one to take."""
    from hf_accel.kernels.qwha_weight import cpu

    return cpu.sparse_product_backward(grad, spectrum, indptr, columns, values, needs)


@_sparse_product_backward.register_fake
def _(grad, spectrum, indptr, columns, values, needs):
    return (
        spectrum.new_empty(spectrum.shape if needs[0] else (0,)),
        values.new_empty(values.shape if needs[1] else (0,)),
    )


def _setup_product(ctx, inputs, output):
    spectrum, indptr, columns, values, _ = inputs
    ctx.save_for_backward(spectrum, indptr, columns, values)


def _product_backward(ctx, grad):
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    found = _sparse_product_backward(grad, *ctx.saved_tensors, needs)
    grad_spectrum, grad_values = (part if needed else None for part, needed in zip(found, needs, strict=True))
    return grad_spectrum, None, None, grad_values, None


_sparse_product.register_autograd(_product_backward, setup_context=_setup_product)


def _check_scale(op: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise UnsupportedByKernel(f"{op}: scale must be a finite number; got {scale!r}.")
