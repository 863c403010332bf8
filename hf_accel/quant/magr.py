"""MagR: make the largest weight of every group smaller before rounding, and the layer's output hardly different.

Paper: "MagR: Weight Magnitude Reduction for Enhancing Post-Training Quantization", arXiv 2406.00800.

Minimises ``1/2 tr((V - W) C (V - W)^T) + alpha * sum over groups of max|v|`` by proximal gradient steps, with ``C`` the
Gram matrix of the inputs over its largest eigenvalue. Where inputs are correlated, ``C`` has directions that hardly
matter, and the largest weights are moved along them.

Decisions: the released code makes ``C`` from the last calibration sequence only; here it is the Gram of all tokens. The
eigenvalue is found by power iteration, which ends below the true one; above half of it every step still descends.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hf_accel.errors import InvalidSetting, QuantizationError


def shrink_groups(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, alpha: float, iterations: int = 200
) -> torch.Tensor:
    """A weight with smaller groups ``[m, n]`` in fp32 (fp64 if ``weight`` is).

    Args:
        weight: ``[m, n]``.
        gram: ``[n, n]``, second moments of the inputs in any scale.
        group_size: neighbouring inputs that will share a grid; -1 is the whole row.
        alpha: strength, for ``gram`` over its largest eigenvalue. Published: 1e-5 for groups, 1e-3 for whole rows.
        iterations: steps; published 200.

    Returns:
        torch.Tensor: ``weight`` as it is where ``gram`` is zero, for then nothing says what may be moved.
    """
    if alpha < 0:
        raise InvalidSetting("magr", "alpha", alpha, "0 or more")
    if group_size != -1 and group_size < 1:
        raise InvalidSetting("magr", "group_size", group_size, "positive, or -1 for the whole row")
    if weight.dim() != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise QuantizationError(
            f"magr: weight must be [m, n] and gram [n, n]; got {list(weight.shape)} and {list(gram.shape)}."
        )
    weight = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    gram = gram.to(weight.dtype)
    top = largest_eigenvalue(gram)
    if top == 0:
        return weight.clone()
    normal = gram / top
    group = weight.shape[1] if group_size == -1 else min(group_size, weight.shape[1])
    shrunk = weight
    for _ in range(iterations):
        shrunk = shrink_largest(shrunk - (shrunk - weight) @ normal, group, alpha)
    return shrunk


def shrink_largest(weight: torch.Tensor, group: int, alpha: float) -> torch.Tensor:
    """The proximal step of ``alpha * max|.|`` over every run of ``group`` columns of ``weight`` ``[m, n]``.

    By Moreau it is what the projection onto the l1 ball of radius ``alpha`` takes away, which cuts every group off at
    the level t with ``sum max(|w| - t, 0) = alpha``. Over the k largest alone the level would be
    ``(their sum - alpha) / k``; the true one is the largest of these.
    """
    m, n = weight.shape
    groups = F.pad(weight, (0, -n % group)).view(m, -1, group)
    largest = groups.abs().sort(-1, descending=True).values
    counts = torch.arange(1, group + 1, dtype=weight.dtype, device=weight.device)
    level = ((largest.cumsum(-1) - alpha) / counts).amax(-1, keepdim=True).clamp_min_(0)
    return groups.clamp(-level, level).view(m, -1)[:, :n]


def largest_eigenvalue(matrix: torch.Tensor, iterations: int = 50) -> float:
    """Of a positive semi-definite ``[n, n]``, from below, by power iteration; 0 if there is none."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64)
    vector, length = start.to(matrix.device, matrix.dtype), 0.0
    for _ in range(iterations):
        vector = vector / vector.norm()
        vector = matrix @ vector
        length = float(vector.norm())
        if length == 0:
            break
    return length
