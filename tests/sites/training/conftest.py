from __future__ import annotations

import pytest
from toys import TOYS

from hf_accel import registry


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The toys are known to the registry for one test."""
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    for cls in TOYS:
        registry.register(cls)
