"""Which implementation of an operation runs, and why: one rule for all kernels.

A backend is chosen per call from the device, the dtype and what the Triton kernel declares it can do.
The choice is a value (:class:`Choice`). An operation that runs on it says so with :func:`take`, once per call, and
reports read that: nothing falls back silently.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from hf_accel.errors import InvalidSetting, UnsupportedByKernel
from hf_accel.kernels.common import kernel_log

Backend = Literal["auto", "triton", "torch"]
BACKENDS: tuple[str, ...] = ("auto", "triton", "torch")


@dataclass(frozen=True)
class Choice:
    """The backend that runs (``"triton"`` or ``"torch"``) and the reason in words."""

    backend: str
    reason: str


@dataclass(frozen=True)
class TritonLimits:
    """What an operation's Triton kernel can do, declared by the kernel."""

    min_head_dim: int = 1
    max_head_dim: int = 256
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)

    def rejects(self, head_dim: int, dtype: torch.dtype) -> str | None:
        """The reason why a call cannot run, or None."""
        if dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"dtype {str(dtype).removeprefix('torch.')} (the Triton kernel does {names})"
        if not self.min_head_dim <= head_dim <= self.max_head_dim:
            return f"head dim {head_dim} (the Triton kernel does {self.min_head_dim} to {self.max_head_dim})"
        return None


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_importable() -> bool:
    return _TRITON_INSTALLED


def choose(
    op: str, tensor: torch.Tensor, limits: TritonLimits, requested: str = "auto", head_dim: int | None = None
) -> Choice:
    """Choose the backend of ``op`` for a call whose inputs look like ``tensor`` ``[..., D]``.

    ``requested="triton"`` raises :class:`UnsupportedByKernel` where Triton cannot run; ``"auto"`` then takes
    torch and says why.
    """
    if requested not in BACKENDS:
        raise InvalidSetting(op, "backend", requested, f"one of {', '.join(map(repr, BACKENDS))}")
    if requested == "torch":
        return Choice("torch", "asked for")
    interpreting = _interpreter_on()
    why_not = None
    if not triton_importable():
        why_not = "triton is not installed"
    elif not tensor.is_cuda and not interpreting:
        why_not = f"tensors are on {tensor.device.type}"
    else:
        why_not = limits.rejects(tensor.shape[-1] if head_dim is None else head_dim, tensor.dtype)
    if requested == "triton":
        if why_not:
            raise UnsupportedByKernel(f"{op}: backend='triton' cannot run: {why_not}. Use backend='auto' or 'torch'.")
        return Choice("triton", "asked for")
    if why_not or interpreting:
        return Choice("torch", why_not or "the Triton interpreter is for tests; ask for backend='triton'")
    if torch.compiler.is_compiling():
        return Choice("triton", "compiled")  # a graph cannot ask the driver
    return Choice("triton", f"{torch.cuda.get_device_name(tensor.device)}")


def take(op: str, choice: Choice) -> str:
    """Run a call of ``op`` on what was chosen: the backend's name, after telling the open log (``kernel_log``)."""
    kernel_log.record(op, choice.backend, choice.reason)
    return choice.backend


def _interpreter_on() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET", "0") == "1" and triton_importable()
