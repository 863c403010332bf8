"""Python that must run at every call, also where ``torch.compile`` traces its caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def run_eagerly(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)``; between two graphs if this is being traced."""
    if torch.compiler.is_compiling():
        from hf_accel.hosts.patching.outside import outside_the_graph  # loads dynamo, which is there already

        return outside_the_graph(function, *arguments)
    return function(*arguments)
