"""Where the kernels run: compiled if a GPU is here, else in Triton's interpreter.

The choice is made at import of this file, because Triton reads the variable when it is first imported.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
