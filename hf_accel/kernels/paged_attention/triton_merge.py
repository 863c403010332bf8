"""Parts of an attention over disjoint sets of keys, joined by their log-sum-exp on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_accel.kernels.common.aot import AotCase, make_case

SPLITS = 16  # parts of a row that are joined at a time


@triton.jit(do_not_specialize=["num_lines", "splits"])
def combine_kernel(
    Parts,  # fp32 [splits, lines, D]
    PartLse,  # fp32 [splits, lines]
    Out,  # fp32 [lines, D]
    Lse,  # fp32 [lines]
    num_lines,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Join the parts of one row."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64) * num_lines + line
        lse = tl.load(PartLse + at, mask=split < splits, other=float("-inf"))
        element = (split < splits)[:, None] & (d[None, :] < D)
        part = tl.load(Parts + at[:, None] * D + d[None, :], mask=element, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp(top - base), tl.exp(lse - base)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    whole = tl.where(total > 0, total, 1.0)
    tl.store(Out + line * D + d, acc / whole, mask=d < D)
    tl.store(Lse + line, top + tl.log(whole))


@triton.jit
def lse_merge_kernel(
    OutA,  # [lines, D]
    LseA,  # fp32 [lines]
    OutB,
    LseB,
    Out,  # fp32 [lines, D]
    Lse,  # fp32 [lines]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    a, b = tl.load(LseA + line), tl.load(LseB + line)
    top = tl.maximum(a, b)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = tl.exp(a - base), tl.exp(b - base)
    total = weight_a + weight_b
    whole = tl.where(total > 0, total, 1.0)
    # What stands in a row that saw no key is not read: it may be anything.
    spread = tl.zeros([BLOCK_D], tl.float32)
    in_a, in_b = (d < D) & (a + spread > float("-inf")), (d < D) & (b + spread > float("-inf"))
    first = tl.load(OutA + line * D + d, mask=in_a, other=0.0).to(tl.float32)
    second = tl.load(OutB + line * D + d, mask=in_b, other=0.0).to(tl.float32)
    tl.store(Out + line * D + d, (first * weight_a + second * weight_b) / whole, mask=d < D)
    tl.store(Lse + line, top + tl.log(whole))


def combine(parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Join ``parts`` fp32 ``[splits, ..., D]`` and ``part_lse`` ``[splits, ...]`` into ``out`` and ``lse``."""
    head_dim = out.shape[-1]
    combine_kernel[(lse.numel(),)](
        parts,
        part_lse,
        out,
        lse,
        lse.numel(),
        parts.shape[0],
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_S=SPLITS,
        num_warps=_row_warps(head_dim),
        enable_fp_fusion=True,
    )


def lse_merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package."""
    out = out_a.new_empty(out_a.shape, dtype=torch.float32)
    lse = lse_a.new_empty(lse_a.shape, dtype=torch.float32)
    head_dim = out_a.shape[-1]
    if lse.numel():
        lse_merge_kernel[(lse.numel(),)](
            out_a.contiguous(),
            lse_a.contiguous(),
            out_b.contiguous(),
            lse_b.contiguous(),
            out,
            lse,
            D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=_row_warps(head_dim),
            enable_fp_fusion=True,
        )
    return out, lse


def _row_warps(head_dim: int) -> int:
    """For one row per program."""
    return 1 if head_dim <= 128 else 4


def aot_cases(cc: int) -> list[AotCase]:
    """Both kernels at the head dims of SDAR and of DiffusionGemma's full layers; nothing depends on ``cc``."""
    cases = []
    for head_dim in (128, 512):
        sizes, warps = {"D": head_dim, "BLOCK_D": head_dim}, _row_warps(head_dim)
        types = dict.fromkeys(("Parts", "PartLse", "Out", "Lse"), "fp32")
        cases.append(make_case(f"combine D{head_dim}", combine_kernel, sizes | {"BLOCK_S": SPLITS}, types, warps))
        types = dict.fromkeys(("OutA", "LseA", "OutB", "LseB", "Out", "Lse"), "fp32")
        cases.append(make_case(f"lse merge D{head_dim}", lse_merge_kernel, sizes, types, warps))
    return cases
