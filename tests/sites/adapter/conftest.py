from __future__ import annotations

import adapted
import pytest
from lora_kinds import KINDS


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base():
    """A Llama at 4 bits; tests copy it."""
    model = adapted.build("llama")
    adapted.pack(model, bits=4)
    return model
