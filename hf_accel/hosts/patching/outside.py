"""Leaving a compiled graph. A file of its own because ``torch.compiler.disable`` loads dynamo, which an eager user
never needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def outside_the_graph(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)``, run eagerly between two graphs."""
    return function(*arguments)
