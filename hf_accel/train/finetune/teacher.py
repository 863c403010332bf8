"""The dense model inside a model that is being trained: adapter off, patch bypassed, no second copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.sites.adapter.peft import lora as adapters
from hf_accel.sites.attention.seam import AttentionCore, context_of
from hf_accel.sites.attention.statistics import AttentionStatistics
from hf_accel.train.saving import ADAPTER


class _HostAttention:
    """Stands in for a method's core: what the host would have run."""

    differentiable = True

    def __init__(self, core: AttentionCore):
        self._core = core

    def attend(self, call: AttentionCall) -> torch.Tensor:
        return call.dense()

    def reset(self) -> None:
        self._core.reset()  # a new generation is one for the method too

    def fork(self) -> AttentionCore:
        return self._core.fork()


@contextlib.contextmanager
def teacher(model: torch.nn.Module, adapter: str = ADAPTER) -> Iterator[None]:
    """Inside the block, ``model`` computes what it computed before the method and the adapter came.

    Without gradients and without dropout, and nothing of it is counted in the method's report. Bit-equal to the
    unpatched model as long as the model's own weights are frozen. Other adapters stay on.

    Args:
        model: denoiser (not a pipeline) that carries an attention method.
        adapter: name of the adapter that is trained with it; a model without it is fine.
    """
    context = context_of(model)
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p and m.training]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(adapters.without(model, adapter))
        if context is not None:
            core, run = context.core, context.run
            stack.callback(_restore, context, core, run)
            context.core, context.run = _HostAttention(core), AttentionStatistics()
        for module in dropouts:
            module.eval()
            stack.callback(module.train)
        yield


def _restore(context, core: AttentionCore, run: AttentionStatistics) -> None:
    context.core, context.run = core, run
