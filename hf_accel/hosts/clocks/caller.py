"""Which pipeline calls: found on the stack, since a model serves several and outlives the one it was loaded with."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

# The local variable of a pipeline's own code that holds the pipeline: of classic ones, and of modular ones' blocks.
_NAMES = ("self", "components")


def calling_pipeline() -> Any | None:
    """The diffusers pipeline in whose ``__call__`` this thread is, the innermost; None outside of one."""
    classes = _pipeline_classes()
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and classes:
        code = frame.f_code
        if code.co_name == "__call__" and any(name in code.co_varnames for name in _NAMES):
            for name in _NAMES:
                if isinstance(found := frame.f_locals.get(name), classes):
                    return found
        frame = frame.f_back
    return None


def _pipeline_classes() -> tuple[type, ...]:
    """Those that are loaded; whoever runs a pipeline has loaded its class."""
    places = (
        ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
        ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
    )
    modules = ((sys.modules.get(module), name) for module, name in places)
    return tuple(getattr(module, name) for module, name in modules if module is not None)


def schedule_of(pipeline: Any) -> torch.Tensor | None:
    """The timesteps that a pipeline's scheduler goes through now, ``[steps]``."""
    timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 and len(timesteps) else None
