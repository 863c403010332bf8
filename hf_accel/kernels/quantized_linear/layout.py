"""What a packed weight consists of, and what must fit together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_accel.errors import UnsupportedByKernel
from hf_accel.kernels.common import checks

# The fewest whole words that hold whole codes.
UNIT_WORDS = {2: 1, 3: 3, 4: 1, 8: 1}
UNIT_CODES = {2: 16, 3: 32, 4: 8, 8: 4}


class Packed(NamedTuple):
    """A weight ``[m, n]`` in GPTQ's layout, ``scales[g] * (code - zero[g])`` with ``g = g_idx[j]`` for input j.

    Attributes:
        qweight: int32 ``[n * bits / 32, m]``: column i is a stream of bits, least significant first, with the codes of
            output i in the order of the inputs. At 3 bits 32 codes fill 3 words, and 2 of them span words.
        scales: ``[G, m]``; fp16, bf16 or fp32.
        qzeros: int32 ``[G, m * bits / 32]``, packed likewise along m. True zeros (version 2 of the format; version 1
            stores zero - 1).
        g_idx: int32 ``[n]``, the group of each input, in ``[0, G)``.
        bits: 2, 3, 4 or 8.
        group_size: promises that ``g_idx[j] == j // group_size``, which spares the GPU two gathers per weight. Not
            checked (that would be a wait for the device at every call). None: any order, such as act-order's.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    group_size: int | None = None

    @property
    def in_features(self) -> int:
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        return self.qweight.shape[1]


def check_packed(op: str, packed: Packed) -> None:
    """Raise :class:`UnsupportedByKernel` if the parts of a packed weight do not fit together."""
    qweight, scales, qzeros, g_idx, bits, group_size = packed
    if bits not in UNIT_CODES:
        raise UnsupportedByKernel(f"{op}: bits must be 2, 3, 4 or 8; got {bits!r}.")
    checks.expect(op, "g_idx", g_idx, {"n": None}, torch.int32)
    n = g_idx.shape[0]
    unit = UNIT_CODES[bits]
    if not n or n % unit:
        raise UnsupportedByKernel(f"{op}: at {bits} bits the inputs must be a multiple of {unit}; got {n}.")
    checks.expect(op, "qweight", qweight, {"n * bits / 32": n * bits // 32, "m": None}, torch.int32)
    m = qweight.shape[1]
    if not m or m % unit:
        raise UnsupportedByKernel(f"{op}: at {bits} bits the outputs must be a multiple of {unit}; got {m}.")
    checks.expect(op, "scales", scales, {"G": None, "m": m})
    if scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UnsupportedByKernel(f"{op}: scales must be float16, bfloat16 or float32; got {scales.dtype}.")
    groups = scales.shape[0]
    checks.expect(op, "qzeros", qzeros, {"G": groups, "m * bits / 32": m * bits // 32}, torch.int32)
    if group_size is not None and (group_size < 1 or groups != -(-n // group_size)):
        raise UnsupportedByKernel(
            f"{op}: {n} inputs in groups of {group_size} make {-(-n // max(group_size, 1))} groups; scales have "
            f"{groups}."
        )
    checks.expect_one_device(op, qweight=qweight, scales=scales, qzeros=qzeros, g_idx=g_idx)
    if group_size is None and not g_idx.is_cuda and not torch.compiler.is_compiling():
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            raise UnsupportedByKernel(f"{op}: g_idx must lie in 0..{groups - 1}; got {low}..{high}.")
