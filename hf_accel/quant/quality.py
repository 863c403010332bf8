"""How far an approximation is from its reference."""

from __future__ import annotations

import math

import torch


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantisation noise, ``10 log10(|r|^2 / |r - a|^2)`` in dB, in fp64. Infinite if they are equal;
    a uniform grid gains 6.02 dB with every bit."""
    error = relative_error(reference, approximation)
    return math.inf if error == 0 else -20 * math.log10(error)


def relative_error(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """``|r - a| / |r|`` in the Frobenius norm, in fp64. Of a reference of zeros: 0 if equal, else infinite."""
    exact = reference.detach().double()
    off, size = float((exact - approximation.detach().double()).norm()), float(exact.norm())
    if size == 0:
        return 0.0 if off == 0 else math.inf
    return off / size
