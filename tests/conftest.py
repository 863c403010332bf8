"""Where the kernels run: compiled if a GPU is here, else in Triton's interpreter.

The choice is made at import of this file, because Triton reads the variable when it is first imported.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

# One thread a process: the tests run in several processes, and OpenMP threads that wait for a busy core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def fails_at_the_end(monkeypatch):
    """``with fails_at_the_end("svg2"): ...`` meanwhile the method's installation is done whole, and then raises."""
    from hf_accel import registry

    class LateError(RuntimeError):
        pass

    @contextmanager
    def failing(method):
        cls = registry.get(method)
        install = cls.install

        def install_and_raise(self, *args, **kwargs):
            install(self, *args, **kwargs)
            raise LateError("when everything was in place")

        with monkeypatch.context() as patched:
            patched.setattr(cls, "install", install_and_raise)
            with pytest.raises(LateError):
                yield

    return failing
