"""Attention over blocks of unequal size that are chosen per head: the kernel of SVG2 (arXiv 2505.18875)."""

from __future__ import annotations

import torch

from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take

OP = "variable_block_attention"
LIMITS = TritonLimits(min_head_dim=1, max_head_dim=256)


def backend_for(query: torch.Tensor, backend: str = "auto") -> Choice:
    """The backend that a call with this ``query`` ``[B, H, Sq, D]`` runs on, and why."""
    return choose(OP, query, LIMITS, backend)


def variable_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_map: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    *,
    scale: float | None = None,
    query_order: torch.Tensor | None = None,
    key_order: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each query block on the union of the key blocks that it keeps.

    Rows are sorted by block: block c occupies the sorted rows ``[sum(sizes[:c]), sum(sizes[:c + 1]))``.

    Args:
        query: ``[B, H, Sq, D]``, last axis contiguous, other strides free. fp16, bf16 or fp32.
        key: ``[B, H, Sk, D]``, likewise, dtype of ``query``.
        value: ``[B, H, Sk, D]``, likewise.
        block_map: bool ``[B, H, Cq, Ck]``; True where query block i attends to key block j.
        query_sizes: int32 ``[B, H, Cq]``, rows of each query block; 0 is allowed. Their sum is at most Sq;
            the rows beyond it attend to nothing. On a GPU the sum is not checked, since that would wait for
            the device; wrong sizes then give wrong results, but no access outside the tensors.
        key_sizes: int32 ``[B, H, Ck]``, likewise; the key rows beyond the sum are ignored.
        scale: multiplies the scores; default ``1 / sqrt(D)``. Must be positive.
        query_order: int32 ``[B, H, Sq]``, a permutation of the rows in every head. If given, ``query`` is in
            original order and sorted row r is its row ``query_order[r]``; the outputs are in original order
            too. The gather and the scatter then cost no pass over memory. Without it ``query`` is already
        sorted. key_order: int32 ``[B, H, Sk]``, the same for ``key`` and ``value``. On a GPU every kept row
            is then listed by itself, which takes 8 times the index memory of sorted keys but no sorted copy.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`backend_for`.

    Returns:
        ``out`` ``[B, H, Sq, D]`` in the dtype and the memory layout of ``query``, and ``lse`` fp32
        ``[B, H, Sq]``: the natural logarithm of the sum of exponentiated scores. A row that keeps no key has
        ``out`` 0 and ``lse`` -inf.

    Raises:
        UnsupportedByKernel: a shape, dtype, device or stride that no backend takes, or that
            ``backend="triton"`` does not.

    Not differentiable. Source: SVG2, section 3.3 and card step 6; equal to dense attention under the token
    mask that the block map expands to (``reference.py``).
    """
    _validate(query, key, value, block_map, query_sizes, key_sizes, query_order, key_order)
    scale = checks.resolve_scale(OP, scale, query.shape[-1])
    chosen = take(OP, backend_for(query, backend))
    return _variable_block_attention(
        query, key, value, block_map, query_sizes, key_sizes, scale, query_order, key_order, chosen
    )


@torch.library.custom_op("hf_accel::variable_block_attention", mutates_args=())
def _variable_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_map: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    query_order: torch.Tensor | None,
    key_order: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (query, key, value, block_map, query_sizes, key_sizes, scale, query_order, key_order)
    if backend == "triton":
        from hf_accel.kernels.variable_block_attention import triton

        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(query):
            return triton.launch(*arguments)
    from hf_accel.kernels.variable_block_attention import cpu

    return cpu.variable_block_attention(*arguments)


@_variable_block_attention.register_fake
def _(query, key, value, block_map, query_sizes, key_sizes, scale, query_order, key_order, backend):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _validate(query, key, value, block_map, query_sizes, key_sizes, query_order, key_order) -> None:
    checks.expect(OP, "query", query, {"B": None, "H": None, "Sq": None, "D": None})
    batch, heads, num_queries, head_dim = query.shape
    head = {"B": batch, "H": heads}
    checks.expect(OP, "key", key, {**head, "Sk": None, "D": head_dim}, query.dtype)
    num_keys = key.shape[2]
    checks.expect(OP, "value", value, {**head, "Sk": num_keys, "D": head_dim}, query.dtype)
    checks.expect(OP, "block_map", block_map, {**head, "Cq": None, "Ck": None}, torch.bool)
    query_blocks, key_blocks = block_map.shape[2:]
    checks.expect(OP, "query_sizes", query_sizes, {**head, "Cq": query_blocks}, torch.int32)
    checks.expect(OP, "key_sizes", key_sizes, {**head, "Ck": key_blocks}, torch.int32)
    if query_order is not None:
        checks.expect(OP, "query_order", query_order, {**head, "Sq": num_queries}, torch.int32)
    if key_order is not None:
        checks.expect(OP, "key_order", key_order, {**head, "Sk": num_keys}, torch.int32)
    checks.expect_one_device(
        OP,
        query=query,
        key=key,
        value=value,
        block_map=block_map,
        query_sizes=query_sizes,
        key_sizes=key_sizes,
        query_order=query_order,
        key_order=key_order,
    )
    checks.expect_last_axis_contiguous(OP, query=query, key=key, value=value)
