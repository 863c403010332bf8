"""Where the kernels run: compiled if a GPU is here, else in Triton's interpreter.

The choice is made at import of this file, because Triton reads the variable when it is first imported.
"""

from __future__ import annotations

import os

# One thread a process: the tests run in several processes, and OpenMP threads that wait for a busy core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
