"""Random inputs that several kernel tests share."""

from __future__ import annotations

import torch


def kernel_dtypes() -> list[torch.dtype]:
    """The dtypes to test a Triton kernel in. The interpreter multiplies raw bits in bf16: only a GPU can."""
    return [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def random_sizes(lead: tuple[int, ...], count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """int32 ``[*lead, count]`` block sizes that add up to ``total``; some may be 0."""
    cuts = torch.randint(0, total + 1, (*lead, count - 1), generator=generator).sort(-1).values
    ends = torch.cat([cuts, torch.full((*lead, 1), total)], -1)
    return torch.diff(ends, dim=-1, prepend=torch.zeros(*lead, 1, dtype=torch.long)).int()


def permutations(lead: tuple[int, ...], count: int, generator: torch.Generator) -> torch.Tensor:
    """int32 ``[*lead, count]``: an independent permutation in every row."""
    return torch.rand(*lead, count, generator=generator).argsort(-1).int()
