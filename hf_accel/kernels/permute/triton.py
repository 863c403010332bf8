"""Counting sort and row moves on the GPU: no sync, and no atomics but int32 (whose sums have no order).

The sort has three passes. (1) Each head's tokens are cut into segments, and every segment counts its labels
into a table ``[label, segment]``. (2) The inclusive prefix sum of that table, read label by label, is for
every (label, segment) the position just behind its last token. (3) Each segment walks its tokens from the
last to the first and counts those positions down: that keeps equal labels in their order.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase

COUNT_BLOCK = 512
RANK_BLOCK = 64
_TARGET_PROGRAMS = 2048


@triton.jit(do_not_specialize=["N", "num_labels", "segments", "segment_length"])
def _count_labels_kernel(Labels, Table, N, num_labels, segments, segment_length, BLOCK: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    token = first + tl.arange(0, BLOCK)
    label = tl.load(Labels + group * N + token, mask=token < N, other=0)
    label = tl.minimum(tl.maximum(label, 0), num_labels - 1)
    cell = (group * num_labels + label) * segments + first // segment_length
    tl.atomic_add(Table + cell, 1, mask=token < N, sem="relaxed")


@triton.jit(do_not_specialize=["N", "num_labels", "segments", "segment_length"])
def _scatter_tokens_kernel(Labels, Table, Order, N, num_labels, segments, segment_length, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    blocks = segment_length // BLOCK
    for step in range(0, blocks):
        token = segment * segment_length + (blocks - 1 - step) * BLOCK + lane
        inside = token < N
        label = tl.load(Labels + group * N + token, mask=inside, other=0)
        label = tl.minimum(tl.maximum(label, 0), num_labels - 1)
        # Lanes behind the end get labels of their own, so that they count as equal to nobody.
        label = tl.where(inside, label, -1 - lane)
        # One reduction for two counts of equal labels: later lanes in the high half, all in the low half.
        weight = tl.where(lane[None, :] > lane[:, None], (1 << 16) + 1, 1)
        equal = tl.sum(tl.where(label[:, None] == label[None, :], weight, 0), axis=1)
        cell = Table + (group * num_labels + label) * segments + segment
        end = tl.load(cell, mask=inside, other=0)
        tl.store(Order + group * N + end - 1 - (equal >> 16), token, mask=inside)
        tl.debug_barrier()  # every lane has read its end before any lane moves it
        tl.store(cell, end - (equal & 0xFFFF), mask=inside)  # equal labels store equal values
        tl.debug_barrier()


@triton.jit(do_not_specialize=["H", "rows"])
def _move_rows_kernel(
    X,
    Y,
    X2,
    Y2,
    Order,
    H,
    rows,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_x2b,
    stride_x2h,
    stride_x2s,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCATTER: tl.constexpr,
    PAIR: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < rows
    token = tl.load(Order + group * rows + position, mask=inside, other=0).to(tl.int64)
    source, target = token, position.to(tl.int64)
    if SCATTER:
        source, target = target, token
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < D)[None, :]
    batch, head = group // H, group % H
    out = (group * rows + target)[:, None] * D + column[None, :]
    row = tl.load(X + batch * stride_xb + head * stride_xh + source[:, None] * stride_xs + column[None, :], mask=mask)
    if PAIR:
        row2 = tl.load(
            X2 + batch * stride_x2b + head * stride_x2h + source[:, None] * stride_x2s + column[None, :],
            mask=mask,
        )
        tl.store(Y2 + out, row2, mask=mask)
    tl.store(Y + out, row, mask=mask)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _segment_length(groups: int, length: int, num_labels: int) -> int:
    """Tokens per segment: enough to fill a GPU, but with a table of a few times the labels at most."""
    most = max(1, 4 * length // num_labels)
    wanted = min(most, max(1, _TARGET_PROGRAMS // groups))
    return max(COUNT_BLOCK, triton.next_power_of_2(triton.cdiv(length, wanted)))


def sort_by_label(labels: torch.Tensor, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``labels`` int32 ``[G, N]`` contiguous -> ``order`` int32 ``[G, N]``, ``sizes`` ``[G, num_labels]``."""
    groups, length = labels.shape
    order = torch.empty_like(labels)
    if labels.numel() == 0:
        return order, labels.new_zeros(groups, num_labels)
    segment_length = _segment_length(groups, length, num_labels)
    segments = triton.cdiv(length, segment_length)
    table = labels.new_zeros(groups, num_labels, segments)
    numbers = (length, num_labels, segments, segment_length)
    with on_device_of(labels):
        _count_labels_kernel[(triton.cdiv(length, COUNT_BLOCK), groups)](
            labels, table, *numbers, BLOCK=COUNT_BLOCK, num_warps=4
        )
        sizes = table.sum(-1, dtype=torch.int32)
        ends = table.view(groups, -1).cumsum(-1, dtype=torch.int32)
        _scatter_tokens_kernel[(segments, groups)](
            labels, ends, order, *numbers, BLOCK=RANK_BLOCK, num_warps=4, num_stages=1
        )
    return order, sizes


def _move_rows(tensors: list[torch.Tensor], order: torch.Tensor, scatter: bool) -> list[torch.Tensor]:
    batch, heads, rows = order.shape
    head_dim = tensors[0].shape[-1]
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    moved = [x.new_empty(*order.shape, head_dim) for x in tensors]
    block_d = triton.next_power_of_2(head_dim)
    block = max(16, 8192 // block_d)
    for i in range(0, len(tensors) if order.numel() else 0, 2):
        first, last = i, min(i + 1, len(tensors) - 1)
        with on_device_of(order):
            _move_rows_kernel[(triton.cdiv(rows, block), batch * heads)](
                tensors[first],
                moved[first],
                tensors[last],
                moved[last],
                order,
                heads,
                rows,
                *tensors[first].stride()[:3],
                *tensors[last].stride()[:3],
                D=head_dim,
                BLOCK=block,
                BLOCK_D=block_d,
                SCATTER=scatter,
                PAIR=last > first,
                num_warps=4,
            )
    return moved


def gather_rows(tensors: list[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    """``y[b, h, r] = x[b, h, order[b, h, r]]``; two tensors per launch."""
    return _move_rows(tensors, order, scatter=False)


def scatter_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``y[b, h, order[b, h, r]] = x[b, h, r]``."""
    return _move_rows([x], order, scatter=True)[0]


def aot_cases(cc: int) -> list[AotCase]:
    """The sort, and the row moves at two head dims; nothing here depends on ``cc``."""
    numbers = {
        "N": "i32",
        "num_labels": "i32",
        "segments": "i32",
        "segment_length": "i32",
        "BLOCK": "constexpr",
    }
    cases = [
        AotCase(
            "sort_by_label/count",
            _count_labels_kernel,
            {"Labels": "*i32", "Table": "*i32"} | numbers,
            {"BLOCK": COUNT_BLOCK},
            aligned=("Labels", "Table"),
        ),
        AotCase(
            "sort_by_label/scatter",
            _scatter_tokens_kernel,
            {"Labels": "*i32", "Table": "*i32", "Order": "*i32"} | numbers,
            {"BLOCK": RANK_BLOCK},
            num_warps=4,
            num_stages=1,
            aligned=("Labels", "Table", "Order"),
        ),
    ]
    strides = [f"stride_{tensor}{axis}" for tensor in ("x", "x2") for axis in "bhs"]
    pointers = {"X": "*bf16", "Y": "*bf16", "X2": "*bf16", "Y2": "*bf16", "Order": "*i32"}
    for head_dim, scatter, pair in [(128, False, True), (80, True, False)]:
        block_d = triton.next_power_of_2(head_dim)
        constants = {
            "D": head_dim,
            "BLOCK": max(16, 8192 // block_d),
            "BLOCK_D": block_d,
            "SCATTER": scatter,
            "PAIR": pair,
        }
        cases.append(
            AotCase(
                f"{'scatter' if scatter else 'gather'}_rows/d{head_dim}",
                _move_rows_kernel,
                pointers
                | {"H": "i32", "rows": "i32"}
                | dict.fromkeys(strides, "i32")
                | dict.fromkeys(constants, "constexpr"),
                constants,
                aligned=(*pointers, *strides),
            )
        )
    return cases
