"""Sparse-linear attention on a GPU: tile sizes and launchers. The kernels are in ``triton_*.py`` beside this."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case
from hf_accel.kernels.common.block_list import list_steps
from hf_accel.kernels.common.tile import LOG2_E, Tile, as_bytes, compute_capability, padded_head_dim, precision
from hf_accel.kernels.sparse_linear_attention.scope import shorter_lists
from hf_accel.kernels.sparse_linear_attention.triton_backward import (
    grad_key_value_kernel,
    grad_query_kernel,
    query_totals_kernel,
)
from hf_accel.kernels.sparse_linear_attention.triton_forward import key_totals_kernel, linear_forward_kernel
from hf_accel.kernels.sparse_linear_attention.triton_fused import fused_forward_kernel

# Programs of one totals kernel: a few for every multiprocessor of the largest GPUs.
TOTALS_PROGRAMS = 512
BlockLists = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tile_for(cc: int, head_dim: int, dtype: torch.dtype, pass_: str) -> Tile:
    """The tile of ``pass_`` on compute capability ``cc`` (0: the interpreter); it divides blocks of 64.

    ``pass_`` is "fused", "forward", "totals", "grad query" or "grad key value". Chosen from compiled code, not
    from measurements: on sm90 in bf16 only dK, dV at head dim 128 spill (56 bytes). Two accumulators, and phi of a
    tile, leave no registers for taller tiles at head dim 128.
    """
    if cc == 0:
        return Tile(32, 32, 4, 1)
    narrow = head_dim <= 64
    if dtype == torch.float32:
        # IEEE fp32 has no tensor cores: the products are unrolled into registers.
        return Tile(32, 32, 8, 1) if narrow else Tile(16, 16, 8, 1)
    if dtype == torch.float16:
        # Multiplied as TF32: operands of four bytes.
        return Tile(64, 32, 8, 2) if narrow and pass_ in ("fused", "forward") else Tile(32, 32, 8, 1)
    if pass_ == "fused":
        return Tile(64, 32, 4, 3) if narrow else Tile(64, 32, 8, 3)
    if pass_ == "forward":
        return Tile(64, 64, 4 if narrow else 8, 3)
    if pass_ == "grad key value" and not narrow:
        return Tile(32, 64, 8, 2)
    return Tile(64, 64, 4 if narrow else 8, 2)


def fused_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_index: torch.Tensor,
    block_count: torch.Tensor,
    other_index: torch.Tensor | None,
    other_count: torch.Tensor | None,
    direct: torch.Tensor | None,
    subtract: bool,
    block_size: tuple[int, int],
    scale: float,
    feature_map: str,
    key_valid: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both branches; ``tile`` replaces the table's choice (for tuning).

    ``subtract``: the critical blocks are not in the linear scope. ``other_*``: per row a further list, whose
    blocks are not in the scope either, or (``direct``) which is the scope itself.
    """
    sparse_out, linear_out = torch.empty_like(query), torch.empty_like(query)
    if query.numel() == 0:
        return sparse_out, linear_out
    head_dim, heads = query.shape[-1], query.shape[1]
    if tile is None:
        tile = tile_for(compute_capability(query), head_dim, query.dtype, "fused")
    valid = as_bytes(key_valid)
    state, state_sum = _key_totals(key, value, valid, feature_map)
    max_keep = block_index.shape[-1]
    query_blocks = block_index.shape[2]
    grid = (query.shape[0] * heads * query_blocks * (block_size[0] // tile.m),)
    fused_forward_kernel[grid](
        query, key, value, valid, state, state_sum, block_index.contiguous(), block_count.contiguous(),
        other_index, other_count, direct, sparse_out, linear_out,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *sparse_out.stride()[:3],
        *list_steps(block_index), *list_steps(other_index),
        heads, heads // key.shape[1], query.shape[2], key.shape[2], query_blocks, max_keep,
        0 if other_index is None else other_index.shape[-1], scale * LOG2_E,
        SUBTRACT=subtract, HAS_OTHER=other_index is not None, HAS_VALID=valid is not None,
        SAME_STRIDES=key.stride(2) == value.stride(2), WIDE=_wide(key, value),
        PARTS=_parts(query.dtype), QUERY_BLOCK=block_size[0], KEY_BLOCK=block_size[1], BLOCK_M=tile.m, BLOCK_N=tile.n,
        **_constexprs(feature_map, head_dim, query.dtype), **_options(tile),
    )  # fmt: skip
    return sparse_out, linear_out


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    included: torch.Tensor | None,
    block_size: tuple[int, int],
    feature_map: str,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear branch alone: output and its denominator, fp32 ``[B, H, Sq]``."""
    out = torch.empty_like(query)
    denominator = query.new_empty(query.shape[:3], dtype=torch.float32)
    if query.numel() == 0:
        return out, denominator
    head_dim, heads, num_keys = query.shape[-1], query.shape[1], key.shape[2]
    tile = tile_for(compute_capability(query), head_dim, query.dtype, "forward")
    valid = as_bytes(key_valid)
    state, state_sum = _key_totals(key, value, valid, feature_map)
    lists = None if included is None else shorter_lists(included)
    query_blocks = triton.cdiv(query.shape[2], block_size[0])
    grid = (query.shape[0] * heads * query_blocks * (block_size[0] // tile.m),)
    linear_forward_kernel[grid](
        query, key, value, valid, state, state_sum, *(lists or (None, None, None)), out, denominator,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *list_steps(lists and lists[0]), heads, heads // key.shape[1], query.shape[2], num_keys, query_blocks,
        lists[0].shape[-1] if lists else 0,
        HAS_LIST=lists is not None, HAS_VALID=valid is not None,
        MASKED=valid is not None or num_keys % block_size[1] != 0, WIDE=_wide(key, value),
        PARTS=_parts(query.dtype), QUERY_BLOCK=block_size[0], KEY_BLOCK=block_size[1], BLOCK_M=tile.m, BLOCK_N=tile.n,
        **_constexprs(feature_map, head_dim, query.dtype), **_options(tile),
    )  # fmt: skip
    return out, denominator


def linear_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor,
    included: torch.Tensor | None,
    block_size: tuple[int, int],
    feature_map: str,
    key_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. Three kernels and the totals of the forward pass; no atomics."""
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    row_tile, column_tile = (
        tile_for(compute_capability(query), head_dim, query.dtype, pass_) for pass_ in ("grad query", "grad key value")
    )
    valid = as_bytes(key_valid)
    state, state_sum = _key_totals(key, value, valid, feature_map)
    inner = torch.empty_like(denominator)
    query_state, query_state_sum = _query_totals(query, out, grad_out, denominator, inner, feature_map)
    rows = columns = None
    if included is not None:
        rows, columns = shorter_lists(included), shorter_lists(included.mT)
    shared = {
        "HAS_LIST": rows is not None,
        "HAS_VALID": valid is not None,
        "WIDE": _wide(query, key, value, grad_out),
        "PARTS": _parts(query.dtype),
        "QUERY_BLOCK": block_size[0],
        "KEY_BLOCK": block_size[1],
        **_constexprs(feature_map, head_dim, query.dtype),
    }
    inputs = (query, key, value, valid, grad_out, denominator, inner)
    strides = [s for x in (query, key, value, grad_out) for s in x.stride()[:3]]
    query_blocks = triton.cdiv(num_queries, block_size[0])
    grad_query_kernel[(batch * heads * query_blocks * (block_size[0] // row_tile.m),)](
        *inputs, state, state_sum, *(rows or (None, None, None)), grad_query, *strides, *grad_query.stride()[:3],
        *list_steps(rows and rows[0]), heads, heads // key_heads, num_queries, num_keys, query_blocks,
        rows[0].shape[-1] if rows else 0,
        MASKED=valid is not None or num_keys % block_size[1] != 0, BLOCK_M=row_tile.m, BLOCK_N=row_tile.n,
        **shared, **_options(row_tile),
    )  # fmt: skip
    key_blocks = triton.cdiv(num_keys, block_size[1])
    grad_key_value_kernel[(batch * key_heads * key_blocks * (block_size[1] // column_tile.n),)](
        *inputs, query_state, query_state_sum, *(columns or (None, None, None)), grad_key, grad_value,
        *strides, *grad_key.stride()[:3], *grad_value.stride()[:3],
        *list_steps(columns and columns[0]), key_heads, heads // key_heads, num_queries, num_keys, key_blocks,
        columns[0].shape[-1] if columns else 0,
        MASKED=num_queries % block_size[0] != 0, BLOCK_M=column_tile.m, BLOCK_N=column_tile.n,
        **shared, **_options(column_tile),
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _key_totals(
    key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum phi(K)^T V`` ``[B * Hkv, parts, D, D]`` and ``sum phi(K)`` fp32 ``[B * Hkv, D]``."""
    batch, key_heads, num_keys, head_dim = key.shape
    tile = tile_for(compute_capability(key), head_dim, key.dtype, "totals")
    programs, rows = _runs(batch * key_heads, num_keys, tile.n)
    state, state_sum = _partial_totals(key, batch * key_heads, programs)
    key_totals_kernel[(programs, batch * key_heads)](
        key, value, valid, state, state_sum, *key.stride()[:3], *value.stride()[:3], key_heads, num_keys, rows,
        HAS_VALID=valid is not None, BLOCK_N=tile.n,
        **_constexprs(feature_map, head_dim, key.dtype), **_options(tile),
    )  # fmt: skip
    return _add_up(state, state_sum, key.dtype)


def _query_totals(
    query: torch.Tensor,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    denominator: torch.Tensor,
    inner: torch.Tensor,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum phi(Q)^T G`` ``[B * H, parts, D, D]`` and ``sum phi(Q) g`` fp32 ``[B * H, D]``; ``inner`` becomes g."""
    batch, heads, num_queries, head_dim = query.shape
    tile = tile_for(compute_capability(query), head_dim, query.dtype, "totals")
    programs, rows = _runs(batch * heads, num_queries, tile.m)
    state, state_sum = _partial_totals(query, batch * heads, programs)
    query_totals_kernel[(programs, batch * heads)](
        query, out, grad_out, denominator, inner, state, state_sum,
        *query.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3], heads, num_queries, rows,
        BLOCK_M=tile.m, **_constexprs(feature_map, head_dim, query.dtype), **_options(tile),
    )  # fmt: skip
    return _add_up(state, state_sum, query.dtype)


def _runs(groups: int, length: int, block: int) -> tuple[int, int]:
    """How many programs share a head's tokens, and how many tokens each takes (a multiple of ``block``)."""
    wanted = max(1, min(triton.cdiv(length, 4 * block), TOTALS_PROGRAMS // groups))
    rows = triton.cdiv(triton.cdiv(length, wanted), block) * block
    return max(1, triton.cdiv(length, rows)) if rows else 1, rows


def _partial_totals(x: torch.Tensor, groups: int, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    head_dim = x.shape[-1]
    state = x.new_empty((groups, programs, head_dim, head_dim), dtype=torch.float32)
    return state, x.new_empty((groups, programs, head_dim), dtype=torch.float32)


def _wide(*tensors: torch.Tensor) -> bool:
    """Whether an offset within a head can leave 32 bits."""
    return any(abs(x.stride(2)) * x.shape[2] + x.shape[3] >= 2**31 for x in tensors)


def _constexprs(feature_map: str, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "FEATURE_MAP": feature_map,
        # Sums of phi over tokens, and gradients divided by them, leave the range of fp16.
        "OPERAND": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "D": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "PRECISION": precision(dtype),
    }


def _add_up(state: torch.Tensor, state_sum: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial totals ``[G, programs, D, D]`` -> ``[G, parts, D, D]`` in the type that the kernels multiply in.

    A total over 10**5 tokens, rounded to bf16 once, would be wrong by 2**-9 in every row alike, and what is
    subtracted from it is not rounded that way. Two bf16 parts carry 16 bits, in half the shared memory of one
    TF32 operand with 11.
    """
    state, state_sum = state.sum(1, keepdim=True), state_sum.sum(1)
    if dtype == torch.bfloat16:
        high = state.bfloat16()
        state = torch.cat([high, (state - high).bfloat16()], 1)
    return state, state_sum


def _parts(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def _options(tile: Tile) -> dict[str, Any]:
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
        "enable_fp_fusion": True,
    }


def aot_cases(cc: int) -> list[AotCase]:
    """Every kernel as its launcher would call it on compute capability ``cc``."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kernels = {
        "fused": (fused_forward_kernel, "fused"),
        "forward": (linear_forward_kernel, "forward"),
        "key totals": (key_totals_kernel, "totals"),
        "query totals": (query_totals_kernel, "totals"),
        "grad query": (grad_query_kernel, "grad query"),
        "grad key value": (grad_key_value_kernel, "grad key value"),
    }
    fixed = {"KeyValid": "u8", "Direct": "u8", "scale": "fp32"}
    fixed |= dict.fromkeys(("StateSum", "Denominator", "Inner"), "fp32")
    fixed |= dict.fromkeys(("BlockIndex", "BlockCount", "OtherIndex", "OtherCount", "Index", "Count"), "i32")
    cases = []
    for kernel_name, (kernel, pass_) in kernels.items():
        names = set(kernel.arg_names)
        for dtype_name, head_dim, feature_map, masked, wide_block in [
            ("bf16", 128, "softmax", False, False),
            ("bf16", 64, "elu", True, True),
            ("fp16", 80, "relu", False, False),
            ("fp32", 128, "softmax", True, False),
        ]:
            dtype = dtypes[dtype_name]
            tile = tile_for(cc, head_dim, dtype, pass_)
            constexprs = _constexprs(feature_map, head_dim, dtype) | {
                "BLOCK_M": tile.m,
                "BLOCK_N": tile.n,
                "QUERY_BLOCK": 128 if wide_block else 64,
                "KEY_BLOCK": 64,
                "PARTS": _parts(dtype),
                "SUBTRACT": True,
                "HAS_OTHER": masked,
                "HAS_LIST": True,
                "HAS_VALID": masked,
                "MASKED": masked,
                "SAME_STRIDES": not masked,
                "WIDE": masked,
            }
            pointers = {name for name in names if name[0].isupper()} - set(constexprs)
            types = dict.fromkeys(pointers, dtype_name) | fixed
            types["State"] = "bf16" if dtype == torch.bfloat16 and pass_ != "totals" else "fp32"
            cases.append(
                make_case(
                    f"{kernel_name} {dtype_name} D{head_dim} {feature_map}{' masked' * masked}",
                    kernel,
                    {name: value for name, value in constexprs.items() if name in names},
                    {name: kind for name, kind in types.items() if name in names},
                    tile.num_warps,
                    tile.num_stages,
                )
            )
    return cases
