"""Sparse-linear attention: exact softmax on the critical blocks, linear attention beside it (SLA, arXiv 2509.24006)."""

from __future__ import annotations

import torch

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention import BLOCK_SIZES, block_sparse_attention
from hf_accel.kernels.block_sparse_attention.index import index_to_block_map
from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take
from hf_accel.kernels.sparse_linear_attention.feature_map import FEATURE_MAPS
from hf_accel.kernels.sparse_linear_attention.scope import LINEAR_SCOPES, linear_block_map, shorter_lists

__all__ = ["FEATURE_MAPS", "LINEAR_SCOPES", "backend_for", "sparse_linear_attention"]

OP = "sparse_linear_attention"
# Head dim 256 would need a total state of 256 KiB in the registers of one program.
LIMITS = TritonLimits(min_head_dim=1, max_head_dim=128)


def backend_for(query: torch.Tensor, backend: str = "auto") -> Choice:
    """The backend that the linear branch of a call with this ``query`` ``[B, H, Sq, D]`` runs on, and why."""
    return choose(OP, query, LIMITS, backend)


def sparse_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    *,
    skip_index: torch.Tensor | None = None,
    skip_count: torch.Tensor | None = None,
    feature_map: str = "softmax",
    linear_scope: str = "rest",
    block_size: int | tuple[int, int] = (64, 64),
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two branches of SLA, not yet added: the caller projects the linear one before the sum.

    Args:
        query: ``[B, H, Sq, D]``, last axis contiguous, other strides free. fp16, bf16 or fp32.
        key: ``[B, Hkv, Sk, D]``, likewise, dtype of ``query``. H is a multiple of Hkv: query head h reads
            key head ``h // (H // Hkv)``.
        value: ``[B, Hkv, Sk, D]``, likewise.
        block_index: int32 ``[B or 1, H or 1, ceil(Sq / bq), max_keep]``, ids of the critical key blocks of each
            row of query blocks, as in :func:`~hf_accel.kernels.block_sparse_attention.block_sparse_attention`.
        block_count: int32 ``[B or 1, H or 1, ceil(Sq / bq)]``, how many of them count.
        skip_index: int32, likewise: the negligible blocks, which neither branch sees. Needed by, and only
            allowed with, ``linear_scope="marginal"``. A block that is critical and negligible is critical.
        skip_count: int32, likewise.
        feature_map: phi of the linear branch, over the head dim, after rope and without the scale:
            ``"softmax"``, ``"elu"`` (ELU + 1) or ``"relu"``.
        linear_scope: what the linear branch covers. ``"marginal"``: neither critical nor negligible (the paper).
            ``"rest"``: all that is not critical. ``"all"``: every block, critical ones too.
        block_size: ``(bq, bk)`` or one number for both; 64 or 128 each. The last blocks may be ragged.
        scale: multiplies the scores of the sparse branch; default ``1 / sqrt(D)``. Must be positive.
        key_valid: bool ``[B, Sk]``; False keys take no part in either branch.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`backend_for`. With ``"auto"`` the sparse
            branch chooses for itself.

    Returns:
        ``sparse_out`` ``[B, H, Sq, D]``: softmax attention over the critical blocks, normalised over them alone,
        0 in a row that has none. ``linear_out`` ``[B, H, Sq, D]``: ``phi(Q) H / (phi(Q) Z)`` with
        ``H = sum phi(K)^T V`` and ``Z = sum phi(K)`` over the scope, 0 where the scope is empty or (``"relu"``)
        the denominator is 0. Both in the dtype of ``query``. Products are summed in fp32.

    Raises:
        InvalidSetting: an unknown feature map, scope or backend, or skip lists that do not go with the scope.
        UnsupportedByKernel: a shape, dtype, device, stride or block size that no backend takes, or that
            ``backend="triton"`` does not.

    Differentiable once in query, key and value through both outputs, deterministically; the block lists are
    constants. Without gradients a GPU runs one fused kernel; with them the sparse branch is
    ``block_sparse_attention`` and the linear branch a kernel of its own, so that each saves what its backward
    reads. On fp16 the linear branch multiplies in TF32, because phi sums leave the range of fp16; bf16 keeps
    bf16 operands. The torch backend also takes fp64.
    """
    sizes = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    _check_settings(feature_map, linear_scope, skip_index, skip_count)
    scale = checks.resolve_scale(OP, scale, query.shape[-1])
    _validate(query, key, value, block_index, block_count, skip_index, skip_count, sizes, key_valid)
    query_block, key_block = sizes
    chosen = take(OP, backend_for(query, backend))
    key_blocks = -(-key.shape[2] // key_block)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if chosen == "triton" and not needs_gradient:
        lists = _lists_beside_the_critical(block_index, block_count, skip_index, skip_count, linear_scope, key_blocks)
        return _fused_forward(
            query, key, value, block_index, block_count, *lists, linear_scope != "all",
            query_block, key_block, scale, feature_map, key_valid,
        )  # fmt: skip
    sparse_out, _ = block_sparse_attention(
        query, key, value, block_index, block_count,
        block_size=(query_block, key_block), scale=scale, key_valid=key_valid, backend=backend,
    )  # fmt: skip
    included = linear_block_map(block_index, block_count, skip_index, skip_count, linear_scope, key_blocks)
    linear_out, _ = _linear_attention(
        query, key, value, included, query_block, key_block, feature_map, key_valid, chosen
    )  # fmt: skip
    return sparse_out, linear_out


def _lists_beside_the_critical(
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    skip_index: torch.Tensor | None,
    skip_count: torch.Tensor | None,
    linear_scope: str,
    key_blocks: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What the fused kernel reads besides the critical blocks: index, count and ``direct`` (``shorter_lists``).

    None where its loop over the critical blocks, which it subtracts from the total, is all there is to do.
    """
    included = None
    if linear_scope != "rest" or 2 * block_index.shape[-1] > key_blocks:
        included = linear_block_map(block_index, block_count, skip_index, skip_count, linear_scope, key_blocks)
    if included is None:
        return None, None, None
    return shorter_lists(included, subtracted=index_to_block_map(block_index, block_count, key_blocks))


@torch.library.custom_op("hf_accel::sparse_linear_attention_fused", mutates_args=())
def _fused_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    other_index: torch.Tensor | None,
    other_count: torch.Tensor | None,
    direct: torch.Tensor | None,
    subtract: bool,
    query_block: int,
    key_block: int,
    scale: float,
    feature_map: str,
    key_valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from hf_accel.kernels.sparse_linear_attention import triton

    # Triton launches on the current device, whatever the tensors are on.
    with torch.cuda.device_of(query):
        return triton.fused_forward(
            query, key, value, block_index, block_count, other_index, other_count, direct, subtract,
            (query_block, key_block), scale, feature_map, key_valid,
        )  # fmt: skip


@_fused_forward.register_fake
def _(query, key, value, block_index, block_count, other_index, other_count, direct, subtract, *settings):
    return torch.empty_like(query), torch.empty_like(query)


@torch.library.custom_op("hf_accel::block_linear_attention", mutates_args=())
def _linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    included: torch.Tensor | None,
    query_block: int,
    key_block: int,
    feature_map: str,
    key_valid: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (query, key, value, included, (query_block, key_block), feature_map, key_valid)
    if backend == "triton":
        from hf_accel.kernels.sparse_linear_attention import triton

        with torch.cuda.device_of(query):
            return triton.linear_attention(*arguments)
    from hf_accel.kernels.sparse_linear_attention import cpu

    return cpu.linear_attention(*arguments)


@_linear_attention.register_fake
def _(query, key, value, included, query_block, key_block, feature_map, key_valid, backend):
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=accumulate)


@torch.library.custom_op("hf_accel::block_linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor,
    included: torch.Tensor | None,
    query_block: int,
    key_block: int,
    feature_map: str,
    key_valid: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    block_size = (query_block, key_block)
    arguments = (grad_out, query, key, value, out, denominator, included, block_size, feature_map, key_valid)
    if backend == "triton":
        from hf_accel.kernels.sparse_linear_attention import triton

        with torch.cuda.device_of(query):
            return triton.linear_attention_backward(*arguments)
    from hf_accel.kernels.sparse_linear_attention import cpu

    return cpu.linear_attention_backward(*arguments)


@_linear_attention_backward.register_fake
def _(grad_out, query, key, value, *settings):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output) -> None:
    query, key, value, included, ctx.query_block, ctx.key_block, ctx.feature_map, key_valid, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, *output, included, key_valid)
    # The denominator is there for the backward pass alone.
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):
    query, key, value, out, denominator, included, key_valid = ctx.saved_tensors
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    gradients = _linear_attention_backward(
        grad_out, query, key, value, out, denominator, included,
        ctx.query_block, ctx.key_block, ctx.feature_map, key_valid, ctx.backend,
    )  # fmt: skip
    return *gradients, None, None, None, None, None, None


_linear_attention.register_autograd(_backward, setup_context=_save)


def _check_settings(feature_map: str, linear_scope: str, skip_index, skip_count) -> None:
    if feature_map not in FEATURE_MAPS:
        raise InvalidSetting(OP, "feature_map", feature_map, f"one of {', '.join(map(repr, FEATURE_MAPS))}")
    if linear_scope not in LINEAR_SCOPES:
        raise InvalidSetting(OP, "linear_scope", linear_scope, f"one of {', '.join(map(repr, LINEAR_SCOPES))}")
    has_skip = skip_index is not None and skip_count is not None
    if linear_scope == "marginal" and not has_skip:
        raise InvalidSetting(OP, "skip_index", None, "the list of negligible blocks that 'marginal' leaves out")
    if linear_scope != "marginal" and (skip_index is not None or skip_count is not None):
        raise InvalidSetting(OP, "skip_index", "a list", f"None: linear_scope={linear_scope!r} skips no block")


def _validate(query, key, value, block_index, block_count, skip_index, skip_count, block_size, key_valid) -> None:
    if len(block_size) != 2 or any(size not in BLOCK_SIZES for size in block_size):
        raise UnsupportedByKernel(f"{OP}: block sizes must be 64 or 128 each; got {block_size}.")
    checks.expect(OP, "query", query, {"B": None, "H": None, "Sq": None, "D": None})
    batch, heads, num_queries, head_dim = query.shape
    checks.expect(OP, "key", key, {"B": batch, "Hkv": None, "Sk": None, "D": head_dim}, query.dtype)
    key_heads, num_keys = key.shape[1:3]
    checks.expect(OP, "value", value, {"B": batch, "Hkv": key_heads, "Sk": num_keys, "D": head_dim}, query.dtype)
    if key_heads == 0 or heads % key_heads:
        raise UnsupportedByKernel(
            f"{OP}: the number of query heads must be a multiple of the number of key heads; "
            f"got {heads} and {key_heads}."
        )
    query_blocks = -(-num_queries // block_size[0])
    for name, index, count in (("block", block_index, block_count), ("skip", skip_index, skip_count)):
        if index is None:
            continue
        index_batch = batch if index.dim() == 4 and index.shape[0] != 1 else 1
        index_heads = heads if index.dim() == 4 and index.shape[1] != 1 else 1
        rows = {"B": index_batch, "H": index_heads, "ceil(Sq/bq)": query_blocks}
        checks.expect(OP, f"{name}_index", index, {**rows, "max_keep": None}, torch.int32)
        checks.expect(OP, f"{name}_count", count, rows, torch.int32)
    if key_valid is not None:
        checks.expect(OP, "key_valid", key_valid, {"B": batch, "Sk": num_keys}, torch.bool)
    checks.expect_one_device(
        OP,
        query=query,
        key=key,
        value=value,
        block_index=block_index,
        block_count=block_count,
        skip_index=skip_index,
        skip_count=skip_count,
        key_valid=key_valid,
    )
    checks.expect_last_axis_contiguous(OP, query=query, key=key, value=value)
