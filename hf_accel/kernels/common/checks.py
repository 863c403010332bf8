"""Refuse a call before anything is launched: name the argument, what is wanted and what came."""

from __future__ import annotations

import torch

from hf_accel.errors import UnsupportedByKernel


def expect(
    op: str, name: str, tensor: torch.Tensor, shape: dict[str, int | None], dtype: torch.dtype | None = None
) -> None:
    """Check rank, sizes and dtype. ``shape`` maps axis names to sizes; None is any size.

    Example: ``expect(op, "key", key, {"B": 2, "H": 8, "Sk": None, "D": 64})``.
    """
    wanted = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in shape.items())
    fits = tensor.dim() == len(shape) and all(
        size is None or size == got for size, got in zip(shape.values(), tensor.shape, strict=True)
    )
    if not fits:
        raise UnsupportedByKernel(f"{op}: {name} must be [{wanted}]; got {list(tensor.shape)}.")
    if dtype is not None and tensor.dtype != dtype:
        raise UnsupportedByKernel(
            f"{op}: {name} must be {_short(dtype)}; got {_short(tensor.dtype)}. Convert it with .to({dtype})."
        )


def expect_one_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Check that all given tensors are on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {str(tensor.device) for tensor in given.values()}
    if len(devices) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise UnsupportedByKernel(f"{op}: all tensors must be on one device; got {where}.")


def expect_last_axis_contiguous(op: str, **tensors: torch.Tensor) -> None:
    """Check that the elements of one row lie side by side in memory."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise UnsupportedByKernel(
                f"{op}: the last axis of {name} must be contiguous (stride 1); got strides "
                f"{list(tensor.stride())}. Call .contiguous() first."
            )


def resolve_scale(op: str, scale: float | None, head_dim: int) -> float:
    """``1 / sqrt(D)`` unless given. Zero and negative scales are refused: no attention has them."""
    if scale is None:
        return head_dim**-0.5
    if not scale > 0 or scale == float("inf"):
        raise UnsupportedByKernel(f"{op}: scale must be a positive finite number or None; got {scale!r}.")
    return float(scale)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
