"""Attention over fixed blocks with a list of kept key blocks per row of query blocks."""

from __future__ import annotations

import torch

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels.block_sparse_attention.index import block_map_to_index, index_to_block_map, transpose_index
from hf_accel.kernels.common import checks
from hf_accel.kernels.common.dispatch import Choice, TritonLimits, choose, take

__all__ = ["backend_for", "block_map_to_index", "block_sparse_attention", "index_to_block_map", "transpose_index"]

OP = "block_sparse_attention"
LIMITS = TritonLimits(min_head_dim=1, max_head_dim=256)
BLOCK_SIZES = (64, 128)
NUMERICS = ("native", "int8")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def backend_for(query: torch.Tensor, backend: str = "auto") -> Choice:
    """The backend that a call with this ``query`` ``[B, H, Sq, D]`` runs on, and why."""
    return choose(OP, query, LIMITS, backend)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    *,
    block_size: int | tuple[int, int] = (128, 128),
    scale: float | None = None,
    key_valid: torch.Tensor | None = None,
    causal: bool = False,
    numerics: str = "native",
    pv_threshold: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each query block on the key blocks that its row of the index lists.

    Args:
        query: ``[B, H, Sq, D]``, last axis contiguous, other strides free. fp16, bf16 or fp32; fp64 runs on the
            torch backend.
        key: ``[B, Hkv, Sk, D]``, likewise, dtype of ``query``. H is a multiple of Hkv: query head h reads
            key head ``h // (H // Hkv)``.
        value: ``[B, Hkv, Sk, D]``, likewise.
        block_index: int32 ``[B or 1, H or 1, ceil(Sq / bq), max_keep]``, ids of kept key blocks in any order,
            no id twice in a row. Entries beyond the count are ignored. Ids outside ``0 .. ceil(Sk / bk) - 1``
            are refused by the torch backend and undefined on a GPU, where a check would wait for the device.
        block_count: int32 ``[B or 1, H or 1, ceil(Sq / bq)]``, number of kept blocks of each row; 0 is allowed.
        block_size: ``(bq, bk)`` or one number for both; 64 or 128 each. The last blocks may be ragged.
        scale: multiplies the scores; default ``1 / sqrt(D)``. Must be positive.
        key_valid: bool ``[B, Sk]``; False keys take no part (padding). Costs a mask in every tile.
        causal: a query sees no key behind its own position. Queries are aligned to the end of the keys, as in a
            prefill behind a cache: query i stands at position ``i + Sk - Sq``. Listed blocks wholly above the
            diagonal count for nothing and cost nothing.
        numerics: ``"native"`` computes in the dtype of the inputs. ``"int8"``, for inference only, rounds queries and
            keys to INT8 with one scale per block, keys after their mean is taken off, and weights and values to FP8
            E4M3 (compute capability 8.9 and up, and CPU) or FP16, values with one scale per channel. On normally
            distributed inputs the cosine to ``"native"`` is 0.9992 (FP8) or 0.9999 (FP16), the relative L1 error 0.04
            or 0.013, and ``lse`` is within 0.01. The torch backend imitates the same roundings, slowly.
        pv_threshold: in units of log2, above 0, for inference only: a tile of keys is skipped if for none of its
            queries its largest score comes within this distance of the largest one so far. Skipped tiles count
            neither in ``out`` nor in ``lse``, so that weights still sum to 1; SpargeAttention's paper (arXiv
            2502.18137, algorithm 1) keeps them in the sum, its kernels do not. What is left out has a weight of
            less than ``n * 2 ** -pv_threshold`` for n keys, against the largest. The tiles are the backend's: blocks
            on the torch backend, and parts of blocks on a GPU, where therefore more is skipped.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`backend_for`.

    Returns:
        ``out`` ``[B, H, Sq, D]`` in the dtype and the memory layout of ``query``, and ``lse`` fp32 (fp64 for fp64)
        ``[B, H, Sq]``: the natural logarithm of the sum of exponentiated scores. A row that keeps no key has
        ``out`` 0 and ``lse`` -inf.

    Raises:
        UnsupportedByKernel: a shape, dtype, device, stride or block size that no backend takes, or that
            ``backend="triton"`` does not; gradients wanted of ``numerics="int8"`` or with ``pv_threshold``.
        InvalidSetting: an unknown ``numerics`` or ``backend``, a ``pv_threshold`` that is not above 0.

    Differentiable once, in query, key and value, through ``out`` and through ``lse``; the gradient of a row that
    keeps no key is 0. Two runs of the Triton form are bit-equal, backward included. Equal to dense attention
    under the token mask that the index expands to (``reference.py``). Algorithm: FlashAttention-2, arXiv
    2307.08691, whose key tiles (forward, query) and query tiles (key, value) come from a list.
    """
    sizes = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    _validate(query, key, value, block_index, block_count, sizes, key_valid)
    scale = checks.resolve_scale(OP, scale, query.shape[-1])
    chosen = take(OP, backend_for(query, backend))
    if numerics not in NUMERICS:
        raise InvalidSetting(OP, "numerics", numerics, f"one of {', '.join(map(repr, NUMERICS))}")
    if numerics != "native" or pv_threshold is not None:
        _validate_approximate(query, key, value, numerics, pv_threshold)
        return _approximate_attention(
            query, key, value, block_index, block_count, sizes[0], sizes[1], scale, key_valid, causal,
            numerics == "int8", pv_threshold, chosen,
        )  # fmt: skip
    return _block_sparse_attention(
        query, key, value, block_index, block_count, sizes[0], sizes[1], scale, key_valid, causal, chosen
    )


@torch.library.custom_op("hf_accel::block_sparse_attention", mutates_args=())
def _block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_valid: torch.Tensor | None,
    causal: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    block_size = (query_block, key_block)
    arguments = (query, key, value, block_index, block_count, block_size, scale, key_valid, causal)
    if backend == "triton":
        from hf_accel.kernels.block_sparse_attention import triton

        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device_of(query):
            return triton.launch(*arguments)
    from hf_accel.kernels.block_sparse_attention import cpu

    return cpu.block_sparse_attention(*arguments)


@_block_sparse_attention.register_fake
def _(query, key, value, block_index, block_count, query_block, key_block, scale, key_valid, causal, backend):
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("hf_accel::block_sparse_attention_backward", mutates_args=())
def _block_sparse_attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_valid: torch.Tensor | None,
    causal: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    block_size = (query_block, key_block)
    tensors = (query, key, value, out, lse, grad_out, grad_lse, block_index, block_count)
    if backend == "triton":
        from hf_accel.kernels.block_sparse_attention import triton_backward

        with torch.cuda.device_of(query):
            return triton_backward.launch(*tensors, block_size, scale, key_valid, causal)
    from hf_accel.kernels.block_sparse_attention import cpu

    return cpu.block_sparse_attention_backward(*tensors, block_size, scale, key_valid, causal)


@_block_sparse_attention_backward.register_fake
def _(query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, query_block, key_block, scale, key_valid, causal, backend = inputs
    ctx.save_for_backward(*tensors, *output, key_valid)
    ctx.settings = (query_block, key_block, scale, causal, backend)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, block_index, block_count, out, lse, key_valid = ctx.saved_tensors
    query_block, key_block, scale, causal, backend = ctx.settings
    gradients = _block_sparse_attention_backward(
        query, key, value, out, lse, grad_out, grad_lse, block_index, block_count,
        query_block, key_block, scale, key_valid, causal, backend,
    )  # fmt: skip
    return (*gradients, *[None] * 8)


_block_sparse_attention.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("hf_accel::block_sparse_attention_approximate", mutates_args=())
def _approximate_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    key_valid: torch.Tensor | None,
    causal: bool,
    int8: bool,
    pv_threshold: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    block_size = (query_block, key_block)
    arguments = (query, key, value, block_index, block_count, block_size, scale, key_valid, causal)
    if backend == "triton":
        from hf_accel.kernels.block_sparse_attention import triton_approximate

        with torch.cuda.device_of(query):
            return triton_approximate.launch(*arguments, int8=int8, pv_threshold=pv_threshold)
    from hf_accel.kernels.block_sparse_attention import cpu

    return cpu.approximate_attention(*arguments, int8=int8, pv_threshold=pv_threshold)


@_approximate_attention.register_fake
def _(query, *_):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _validate_approximate(query, key, value, numerics, pv_threshold) -> None:
    settings = f"numerics={numerics!r}" + (f", pv_threshold={pv_threshold}" if pv_threshold is not None else "")
    if pv_threshold is not None and not pv_threshold > 0:
        raise InvalidSetting(OP, "pv_threshold", pv_threshold, "a number above 0, or None for no skipping")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UnsupportedByKernel(
            f"{OP}: {settings} is for inference: it has no gradient, and the inputs require one. Use "
            "numerics='native' without pv_threshold to train, or torch.no_grad()."
        )
    if query.dtype == torch.float64:
        raise UnsupportedByKernel(f"{OP}: {settings} needs float16, bfloat16 or float32; got float64.")


def _validate(query, key, value, block_index, block_count, block_size, key_valid) -> None:
    if len(block_size) != 2 or any(size not in BLOCK_SIZES for size in block_size):
        raise UnsupportedByKernel(f"{OP}: block sizes must be 64 or 128 each; got {block_size}.")
    checks.expect(OP, "query", query, {"B": None, "H": None, "Sq": None, "D": None})
    if query.dtype not in DTYPES:
        raise UnsupportedByKernel(
            f"{OP}: query must be float16, bfloat16, float32 or float64; got {str(query.dtype).removeprefix('torch.')}."
        )
    batch, heads, num_queries, head_dim = query.shape
    checks.expect(OP, "key", key, {"B": batch, "Hkv": None, "Sk": None, "D": head_dim}, query.dtype)
    key_heads, num_keys = key.shape[1:3]
    checks.expect(OP, "value", value, {"B": batch, "Hkv": key_heads, "Sk": num_keys, "D": head_dim}, query.dtype)
    if key_heads == 0 or heads % key_heads:
        raise UnsupportedByKernel(
            f"{OP}: the number of query heads must be a multiple of the number of key heads; "
            f"got {heads} and {key_heads}."
        )
    index_batch = batch if block_index.dim() == 4 and block_index.shape[0] != 1 else 1
    index_heads = heads if block_index.dim() == 4 and block_index.shape[1] != 1 else 1
    rows = {"B": index_batch, "H": index_heads, "ceil(Sq/bq)": -(-num_queries // block_size[0])}
    checks.expect(OP, "block_index", block_index, {**rows, "max_keep": None}, torch.int32)
    checks.expect(OP, "block_count", block_count, rows, torch.int32)
    if key_valid is not None:
        checks.expect(OP, "key_valid", key_valid, {"B": batch, "Sk": num_keys}, torch.bool)
    checks.expect_one_device(
        OP,
        query=query,
        key=key,
        value=value,
        block_index=block_index,
        block_count=block_count,
        key_valid=key_valid,
    )
    checks.expect_last_axis_contiguous(OP, query=query, key=key, value=value)
