from __future__ import annotations

import functools

import pytest
import torch

UNWRITTEN_INTEGER = -(2**30)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool or not tensor.dtype.is_signed:
        return tensor
    return tensor.fill_(max(UNWRITTEN_INTEGER, torch.iinfo(tensor.dtype).min))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill fresh memory with NaN (integers: a large negative), so that what a kernel leaves out shows."""

    def poisoned(allocate):
        @functools.wraps(allocate)
        def wrapper(*args, **kwargs):
            return poison(allocate(*args, **kwargs))

        return wrapper

    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one; else the CPU, where the Triton kernels run in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
