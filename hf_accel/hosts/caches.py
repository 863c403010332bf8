"""K/V caches of transformers, made without importing it before the user has."""

from __future__ import annotations

from typing import Any


def new_dynamic_cache() -> Any:
    """An empty ``DynamicCache``."""
    from transformers import DynamicCache

    return DynamicCache()
