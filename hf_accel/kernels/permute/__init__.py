"""Stable counting sort of cluster labels, and moving rows into that order and back.

``order`` always maps *sorted position to token*: ``order[r]`` is the token that stands at position ``r`` once
the tokens are grouped by label. It is a permutation per (batch, head), and tokens of one label keep their
order, so the result is unique: every backend and every run gives the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose

__all__ = ["backend_for", "gather_rows", "scatter_rows", "sort_by_label"]

ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROW_LIMITS = TritonLimits(max_head_dim=512, dtypes=ROW_DTYPES)
_SORT_LIMITS = TritonLimits(dtypes=(torch.int32,))


def backend_for(tensor: torch.Tensor, backend: str = "auto") -> Choice:
    """What would run for ``tensor``: int32 labels ``[..., N]`` (the sort) or rows ``[B, H, S, D]``."""
    # Not told to a log: whoever moves rows reports the kernel that it moves them for, and all backends move alike.
    if tensor.dtype == torch.int32:
        return choose("sort_by_label", tensor, _SORT_LIMITS, backend, head_dim=1)
    return choose("gather_rows", tensor, _ROW_LIMITS, backend)


def sort_by_label(labels: torch.Tensor, num_labels: int, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Group tokens by label with a stable counting sort.

    Args:
        labels: int32 ``[..., N]``, each in ``[0, num_labels)``. The CPU form checks the range; a GPU
            could not without waiting for the device: it clamps, so that ``order`` is always a permutation.
        num_labels: number of labels, at least 1; labels may be unused.

    Returns:
        ``order`` int32 ``[..., N]``: ``labels[order]`` is non-decreasing, equal labels keep their order.
        ``sizes`` int32 ``[..., num_labels]``: how many tokens have each label.

    Raises:
        InvalidSetting: ``num_labels`` below 1.
        UnsupportedByKernel: labels that are not int32, have no token axis, or (on a CPU) are out of range.
    """
    if num_labels < 1:
        raise InvalidSetting("sort_by_label", "num_labels", num_labels, "at least 1")
    if labels.dtype != torch.int32 or labels.dim() < 1:
        raise UnsupportedByKernel(
            f"sort_by_label: labels must be int32 [..., N]; got {labels.dtype} {list(labels.shape)}."
        )
    lead, length = labels.shape[:-1], labels.shape[-1]
    order, sizes = _sort_by_label(labels.reshape(math.prod(lead), length), num_labels, backend)
    return order.view(*lead, length), sizes.view(*lead, num_labels)


@torch.library.custom_op("hf_accel::sort_by_label", mutates_args=())
def _sort_by_label(labels: torch.Tensor, num_labels: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if backend_for(labels, backend).backend == "triton":
        from hf_accel.kernels.permute import triton as kernels

        return kernels.sort_by_label(labels.contiguous(), num_labels)
    from hf_accel.kernels.permute import cpu

    return cpu.sort_by_label(labels, num_labels)


@_sort_by_label.register_fake
def _(labels: torch.Tensor, num_labels: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return labels.new_empty(labels.shape), labels.new_empty(labels.shape[0], num_labels)


@overload
def gather_rows(x: torch.Tensor, order: torch.Tensor, *, backend: str = "auto") -> torch.Tensor: ...
@overload
def gather_rows(
    x: Sequence[torch.Tensor], order: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, ...]: ...
def gather_rows(
    x: torch.Tensor | Sequence[torch.Tensor], order: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Put rows into sorted order: ``y[b, h, r] = x[b, h, order[b, h, r]]``.

    Args:
        x: one tensor ``[B, H, S, D]`` with any strides, or several of like shape that share ``order`` (key
            and value): they are moved together, so that ``order`` is read once for two of them.
        order: int32 ``[B, H, R]``, row numbers in ``[0, S)`` (not checked on a GPU).

    Returns:
        Contiguous ``[B, H, R, D]`` in the dtype of ``x``; a tuple if ``x`` is several tensors.

    Raises:
        UnsupportedByKernel: shapes, dtypes or devices that do not fit together.
    """
    tensors = [x] if isinstance(x, torch.Tensor) else list(x)
    _check_rows("gather_rows", tensors, order)
    rows = tuple(_gather_rows(tensors, order, backend))
    return rows[0] if isinstance(x, torch.Tensor) else rows


@torch.library.custom_op("hf_accel::gather_rows", mutates_args=())
def _gather_rows(tensors: list[torch.Tensor], order: torch.Tensor, backend: str) -> list[torch.Tensor]:
    if backend_for(tensors[0], backend).backend == "triton":
        from hf_accel.kernels.permute import triton as kernels

        return kernels.gather_rows(tensors, order.contiguous())
    from hf_accel.kernels.permute import cpu

    return cpu.gather_rows(tensors, order)


@_gather_rows.register_fake
def _(tensors: list[torch.Tensor], order: torch.Tensor, backend: str) -> list[torch.Tensor]:
    return [t.new_empty(*order.shape, t.shape[-1]) for t in tensors]


def scatter_rows(x: torch.Tensor, order: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Put rows back, the exact inverse of :func:`gather_rows`: ``y[b, h, order[b, h, r]] = x[b, h, r]``.

    Args:
        x: ``[B, H, S, D]`` in sorted order, any strides.
        order: int32 ``[B, H, S]``, a permutation of ``0..S-1`` per head (not checked: what is not a
            permutation leaves rows of the result unwritten).

    Returns:
        Contiguous ``[B, H, S, D]`` in the dtype of ``x``.

    Raises:
        UnsupportedByKernel: shapes, dtypes or devices that do not fit together.
    """
    _check_rows("scatter_rows", [x], order)
    if order.shape[2] != x.shape[2]:
        raise UnsupportedByKernel(
            f"scatter_rows: order must name every row once; got {order.shape[2]} numbers for {x.shape[2]} rows."
        )
    return _scatter_rows(x, order, backend)


@torch.library.custom_op("hf_accel::scatter_rows", mutates_args=())
def _scatter_rows(x: torch.Tensor, order: torch.Tensor, backend: str) -> torch.Tensor:
    if backend_for(x, backend).backend == "triton":
        from hf_accel.kernels.permute import triton as kernels

        return kernels.scatter_rows(x, order.contiguous())
    from hf_accel.kernels.permute import cpu

    return cpu.scatter_rows(x, order)


@_scatter_rows.register_fake
def _(x: torch.Tensor, order: torch.Tensor, backend: str) -> torch.Tensor:
    return x.new_empty(x.shape)


def _check_rows(op: str, tensors: list[torch.Tensor], order: torch.Tensor) -> None:
    if not tensors:
        raise UnsupportedByKernel(f"{op}: no tensor to move; give at least one.")
    first = tensors[0]
    if first.dim() != 4 or order.dim() != 3 or order.shape[:2] != first.shape[:2]:
        raise UnsupportedByKernel(
            f"{op}: rows must be [B, H, S, D] and order [B, H, R]; got {list(first.shape)} and {list(order.shape)}."
        )
    if order.dtype != torch.int32:
        raise UnsupportedByKernel(f"{op}: order must be int32, as sort_by_label makes it; got {order.dtype}.")
    for t in tensors:
        if (t.shape, t.dtype) != (first.shape, first.dtype):
            raise UnsupportedByKernel(
                f"{op}: tensors that share an order must be alike; got {list(first.shape)} {first.dtype} "
                f"and {list(t.shape)} {t.dtype}."
            )
        if t.device != order.device:
            raise UnsupportedByKernel(f"{op}: rows are on {t.device}, order is on {order.device}.")
