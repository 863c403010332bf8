"""Plain torch, fast on a CPU and right on any device: one radix sort, one ``index_select`` over all heads."""

from __future__ import annotations

import torch

from hf_accel.errors import UnsupportedByKernel


def sort_by_label(labels: torch.Tensor, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``labels`` int32 ``[G, N]`` -> ``order`` int32 ``[G, N]``, ``sizes`` int32 ``[G, num_labels]``.

    On a CPU torch has a radix sort for one-dimensional integers only, some five times faster than its sort
    along an axis; so the number of the head goes into the key.
    """
    groups, length = labels.shape
    if labels.numel() == 0:
        return torch.empty_like(labels), labels.new_zeros(groups, num_labels)
    if labels.device.type == "cpu":
        low, high = torch.aminmax(labels)
        if low < 0 or high >= num_labels:
            raise UnsupportedByKernel(
                f"sort_by_label: labels must be in [0, {num_labels}); got {int(low)} to {int(high)}."
            )
    else:
        labels = labels.clamp(0, num_labels - 1)
    key_dtype = torch.int32 if groups * num_labels < 2**31 else torch.int64
    group = torch.arange(groups, dtype=key_dtype, device=labels.device)[:, None]
    keys, tokens = torch.sort((labels + group * num_labels).flatten(), stable=True)
    order = tokens.view(groups, length) - group * length
    borders = torch.arange(groups * num_labels + 1, dtype=key_dtype, device=labels.device)
    sizes = torch.searchsorted(keys, borders).diff().view(groups, num_labels)
    return order.int(), sizes.int()


def row_table(x: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``x`` ``[B, H, S, D]`` as a table ``[rows, D]``; turn ``order`` ``[B, H, R]`` into its rows.

    No copy for the layouts that hosts hand over (``[B, S, H, D]`` views, slices of a fused projection); one
    copy where the rows do not lie on a grid of D elements. Row numbers are int64 ``[B, H, R]``.
    """
    batch, heads, length, head_dim = x.shape
    if x.stride(-1) != 1 or any(stride % head_dim for stride in x.stride()[:3]):
        x = x.contiguous()
    per_batch, per_head, per_token = (stride // head_dim for stride in x.stride()[:3])
    rows = 1 + (batch - 1) * per_batch + (heads - 1) * per_head + (length - 1) * per_token
    first_of_batch = torch.arange(batch, device=x.device)[:, None, None] * per_batch
    first_of_head = torch.arange(heads, device=x.device)[:, None] * per_head
    numbers = first_of_batch + first_of_head + order.long() * per_token
    return x.as_strided((rows, head_dim), (head_dim, 1)), numbers


def gather_rows(tensors: list[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    """``y[b, h, r] = x[b, h, order[b, h, r]]`` for each tensor."""
    moved = []
    for x in tensors:
        if order.numel() == 0:
            moved.append(x.new_empty(*order.shape, x.shape[-1]))
            continue
        table, numbers = row_table(x, order)
        moved.append(table.index_select(0, numbers.flatten()).view(*order.shape, x.shape[-1]))
    return moved


def scatter_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``y[b, h, order[b, h, r]] = x[b, h, r]``: a gather by the inverse permutation, which is faster."""
    tokens = torch.arange(order.shape[2], dtype=torch.int32, device=order.device).expand(order.shape)
    inverse = torch.empty_like(order).scatter_(2, order.long(), tokens)
    return gather_rows([x], inverse)[0]
