"""Peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory while the body of a ``with`` runs, in :attr:`bytes`; None where it cannot be measured.

    On a GPU: the most that torch had allocated, weights included. On a CPU under Linux: how far the resident memory
    of the process rose above where it stood at the start, from the kernel's own high-water mark, which is set back
    first; memory that the C allocator holds free is given back before, or growth into it would not be seen. The two
    are not comparable, and :attr:`how` says which one it is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None
        self.how = how_measured(device)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        _give_back_free_memory()
        self._before = _resident("VmRSS") if _reset_high_water_mark() else None
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._before is not None:
            peak = _resident("VmHWM")
            self.bytes = max(0, peak - self._before) if peak is not None else None


def how_measured(device: torch.device) -> str:
    """In words, beside the figure."""
    if device.type == "cuda":
        return "most memory torch had allocated on the GPU, weights included"
    if _CLEAR.exists():
        return "growth of the process's resident memory above its start"
    return "not measured on this system"


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _resident("VmRSS") is not None


def _resident(field: str) -> int | None:
    """A line of ``/proc/self/status`` in bytes."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found is not None else None


def _give_back_free_memory() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)
