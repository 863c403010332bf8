"""What the attention seams of block-diffusion models share: who computes, where the block stands, what was counted,
and how masks are read. The seams themselves are ``block_sdar`` and ``block_gemma``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hf_accel.attention.call import Layer
from hf_accel.hosts.block_families import Reader, arguments_of
from hf_accel.hosts.clocks.block_steps import BlockClock
from hf_accel.hosts.patching.eager import run_eagerly
from hf_accel.kernels.common import kernel_log
from hf_accel.requests import PerRequest, Request
from hf_accel.sites.prefix_attention.call import PrefixCall
from hf_accel.sites.prefix_attention.masks import SplitMask, SplitMemo
from hf_accel.sites.prefix_attention.statistics import PrefixAttentionStatistics

SEAT = "_hf_accel_block_seat"


class PrefixCore(Protocol):
    """What is put into the seam.

    Attributes:
        traceable: stateless tensor code that ``torch.compile`` may trace into the model's graph.
    """

    traceable: bool

    def attend(self, call: PrefixCall) -> torch.Tensor:
        """``[B, Hq, b, D]`` for one call."""

    def reset(self) -> None:
        """Another block begins: drop all state of the last one."""

    def fork(self) -> PrefixCore:
        """One more of the kind, for another request."""


class PrefixSeam:
    """State of one request at the seam of one model.

    Args:
        context: the block clock.
        core: what computes.
        names: dotted names of the patched attentions, in execution order.
    """

    def __init__(self, context: BlockClock, core: PrefixCore, names: list[str]):
        self.context, self.core, self.run = context, core, PrefixAttentionStatistics()
        self.layers = [Layer(name, index, len(names)) for index, name in enumerate(names)]
        self.timed = False
        self.masks = SplitMemo()
        self._block: tuple[int, int] | None = None

    def fork(self, request: Request) -> PrefixSeam:
        twin = copy.copy(self)
        twin.context, twin.core = self.context.fork(), self.core.fork()
        twin.run, twin.masks = PrefixAttentionStatistics(), SplitMemo()
        return twin

    def attend(self, call: PrefixCall) -> torch.Tensor:
        """Run one call of a denoising step through the core and count it."""
        step = self.context.step
        if step is None:
            raise RuntimeError("attend() outside of a denoising step; see why_dense()")
        if self._block != (step.generation, step.block):
            self._block = step.generation, step.block
            self.core.reset()
        timing = self.run.stopwatch.section(call.query.device) if self.timed else contextlib.nullcontext()
        with timing, kernel_log.logging_to(call.notes.setdefault("kernels", {})):
            out = self.core.attend(call)
        self.run.record(call.layer.index, step.index, call.notes)
        return out

    def why_own(self) -> str | None:
        """Why a forward with a cache is none that a method may take; None if it is a denoising step."""
        step = self.context.step
        if step is None:
            return "called outside a forward of the model"
        return None if step.phase == "denoise" else f"a forward that is no denoising step ({step.phase})"

    def run_own(self, reason: str, own: Callable[[], Any]) -> Any:
        """A call that no method may take, counted under ``reason``."""
        self.run.dense_calls[reason] += 1
        return own()

    def call(
        self,
        index: int,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        prefix: tuple[torch.Tensor, torch.Tensor],
        mask: SplitMask,
        scale: float,
        dense: Callable[[], torch.Tensor],
        sliding: bool = False,
    ) -> PrefixCall:
        """One call of layer ``index`` as a method sees it: ``heads`` are the block's query, key and value."""
        query, key, value = heads
        context, step = self.context, self.context.step
        return PrefixCall(
            query=query,
            key=key,
            value=value,
            prefix_key=prefix[0],
            prefix_value=prefix[1],
            prefix_valid=mask.valid,
            block_mask=mask.block,
            scale=scale,
            layer=self.layers[index],
            index=step.index if step is not None else 0,
            changed=context.changed,
            most_changed=context.most_changed,
            dense=dense,
            sliding=sliding,
            generation=step.generation if step is not None else 0,
            block=step.block if step is not None else 0,
        )


PrefixSeams = PerRequest[PrefixSeam]


class SeamHook:
    """Forward pre-hook of a watched module: tells the request's clock of every forward, and the statistics which phase
    it is.

    A model whose core is traceable is compiled into one graph, without Python that follows the blocks; others break
    the graph here.
    """

    def __init__(self, seams: PrefixSeams, read: Reader):
        self.seams, self.read = seams, read

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (torch.compiler.is_compiling() and self.seams.shared.core.traceable):
            run_eagerly(self._tell, module, args, kwargs)

    def _tell(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seam = self.seams.now()
        seam.masks.begin_forward()
        seam.run.begin(seam.context.begin(arguments_of(module, args, kwargs), self.read))


class SeamEndHook:
    """As :class:`SeamHook`, at the end of a forward; called after exceptions too."""

    def __init__(self, seams: PrefixSeams):
        self.seams = seams

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not (torch.compiler.is_compiling() and self.seams.shared.core.traceable):
            run_eagerly(self._tell, output)

    def _tell(self, output: Any) -> None:
        self.seams.now().context.end(raised=output is None)


@dataclass
class Seat:
    """An attention's place in the seam.

    Attributes:
        agrees: whether what is read from the module's structure is what it computes, per kind of call; see
            ``block_sdar``.
        returns: number of values that its own forward returns.
    """

    seams: PrefixSeams
    index: int
    agrees: dict[str, bool] = field(default_factory=dict)
    returns: int = 2

    @property
    def seam(self) -> PrefixSeam:
        """That of the request that runs; in a graph, which any may run, that of none."""
        return self.seams.shared if torch.compiler.is_compiling() else self.seams.now()
