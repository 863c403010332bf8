"""Which implementations ran: every dispatch tells the log that is open around it, if there is one.

A kernel is chosen once, where it runs. Whoever reports on a stretch of work opens a log around it and need not ask
again what was chosen, which could differ from what ran. Logs belong to the thread (and the asyncio task) that opened
them, so two generations at once do not mix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

KernelLog = dict[str, tuple[str, str]]

_OPEN: ContextVar[KernelLog | None] = ContextVar("hf_accel_kernel_log", default=None)


@contextlib.contextmanager
def logging_to(log: KernelLog) -> Iterator[KernelLog]:
    """Write every dispatch of the body into ``log``: operation -> (backend, reason), the last one of each operation.

    A log that is opened inside keeps its dispatches to itself. Not for code that ``torch.compile`` traces.
    """
    token = _OPEN.set(log)
    try:
        yield log
    finally:
        _OPEN.reset(token)


def record(op: str, backend: str, reason: str) -> None:
    """Tell the open log that ``op`` runs on ``backend``, and why. Without one, and while tracing, nothing happens."""
    # A graph replays what it traced without this Python: what runs inside an opaque operator is told there.
    if torch.compiler.is_compiling():
        return
    log = _OPEN.get()
    if log is not None:
        log[op] = (backend, reason)
