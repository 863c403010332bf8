"""What the attention seams of block-diffusion models share: who computes, where the block stands, what was counted,
and how masks are read. The seams themselves are ``block_sdar`` and ``block_gemma``.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from hf_accel.attention.call import Layer
from hf_accel.hosts.block_context import BlockContext, BlockEndHook, BlockHook, Reader
from hf_accel.hosts.patching.eager import run_eagerly
from hf_accel.kernels.common import kernel_log
from hf_accel.report import BlockStatistics
from hf_accel.sites.prefix_attention.call import BlockCall

SEAT = "_hf_accel_block_seat"


class BlockCore(Protocol):
    """What is put into the seam.

    Attributes:
        traceable: stateless tensor code that ``torch.compile`` may trace into the model's graph.
    """

    traceable: bool

    def attend(self, call: BlockCall) -> torch.Tensor:
        """``[B, Hq, b, D]`` for one call."""

    def reset(self) -> None:
        """Another block begins: drop all state of the last one."""


class BlockSeam:
    """State of the seam on one model.

    Args:
        context: the block clock.
        core: what computes.
        names: dotted names of the patched attentions, in execution order.
        run: where calls are counted.
    """

    def __init__(self, context: BlockContext, core: BlockCore, names: list[str], run: BlockStatistics):
        self.context, self.core, self.run = context, core, run
        self.layers = [Layer(name, index, len(names)) for index, name in enumerate(names)]
        self.timed = False
        self.masks = MaskMemo()
        self._block: tuple[int, int] | None = None

    def __deepcopy__(self, memo: dict) -> BlockSeam:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._block = None  # its clock begins anew
        return twin

    def attend(self, call: BlockCall) -> torch.Tensor:
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
    ) -> BlockCall:
        """One call of layer ``index`` as a method sees it: ``heads`` are the block's query, key and value."""
        query, key, value = heads
        context, step = self.context, self.context.step
        return BlockCall(
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
        )


class SeamHook(BlockHook):
    """Tells the context of every forward, and the statistics which phase it is.

    A model whose core is traceable is compiled into one graph, without Python that follows the blocks; others break
    the graph here.
    """

    def __init__(self, seam: BlockSeam, read: Reader):
        super().__init__(seam.context, read)
        self.seam = seam

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (torch.compiler.is_compiling() and self.seam.core.traceable):
            run_eagerly(self._tell, module, args, kwargs)

    def _tell(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.seam.masks.begin_forward()
        super().__call__(module, args, kwargs)
        if self.context.step is not None:
            self.seam.run.begin(self.context.step)


class SeamEndHook(BlockEndHook):
    """As :class:`SeamHook`, at the end of a forward."""

    def __init__(self, seam: BlockSeam):
        super().__init__(seam.context)
        self.seam = seam

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not (torch.compiler.is_compiling() and self.seam.core.traceable):
            run_eagerly(self._tell, module, args, kwargs, output)

    def _tell(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        super().__call__(module, args, kwargs, output)


@dataclass
class Seat:
    """An attention's place in the seam.

    Attributes:
        agrees: whether what is read from the module's structure is what it computes, per kind of call; see
            ``block_sdar``.
        returns: number of values that its own forward returns.
    """

    seam: BlockSeam
    index: int
    agrees: dict[str, bool] = field(default_factory=dict)
    returns: int = 2


# -- masks ---------------------------------------------------------------------------------------------------------


class SplitMask(NamedTuple):
    """What a mask lets the block see: of the prefix, bool ``[B, P]``, and of itself, bool ``[B, 1, b, b]``; each None
    where nothing is hidden."""

    valid: torch.Tensor | None = None
    block: torch.Tensor | None = None


ALL_VISIBLE = SplitMask()


def split_mask(mask: torch.Tensor | None, prefix: int, block: int, start: int | None = None) -> SplitMask | None:
    """A mask over ``[prefix | ... | block | ...]`` as what it hides of the prefix and of the block.

    Args:
        mask: ``[B, K]``, ``[B, b, K]`` or ``[B, 1, b, K]``; bool (True = attend), integer (1 = attend) or floating
            (0 = attend, the dtype's lowest or -inf = hidden); None: nothing is hidden.
        start: first key of the block; None: its keys are the last. All keys that are neither of the prefix nor of the
            block (unused slots of a static cache) must be hidden.

    Returns:
        None if the mask is something else: a bias, or one that differs between heads, or between the block's positions
        in what they see of the prefix. Waits for the device.
    """
    if mask is None:
        return ALL_VISIBLE
    if mask.ndim == 2:
        mask = mask[:, None, None].expand(-1, 1, block, -1)
    elif mask.ndim == 3:
        mask = mask[:, None]
    start = mask.shape[-1] - block if start is None else start
    if mask.ndim != 4 or mask.shape[1:3] != (1, block) or not prefix <= start <= mask.shape[3] - block:
        return None
    seen = mask
    binary = mask.new_ones((), dtype=torch.bool)
    if mask.is_floating_point():
        seen = mask > torch.finfo(mask.dtype).min / 2
        binary = ((mask == 0) | ~seen).all()
    elif mask.dtype != torch.bool:
        seen = mask != 0
        binary = (~seen | (mask == 1)).all()
    front, back = seen[..., :prefix], seen[..., start : start + block]
    same = (front == front[:, :, :1]).all()
    rest = (seen.sum() == front.sum() + back.sum()).all()
    binary_, same_, rest_, all_front, all_back = torch.stack([binary, same, rest, front.all(), back.all()]).tolist()
    if not (binary_ and same_ and rest_):
        return None
    return SplitMask(None if all_front else front[:, 0, 0].contiguous(), None if all_back else back.contiguous())


class MaskMemo:
    """:func:`split_mask`, once for all layers and steps that are handed the same mask, unchanged."""

    def __init__(self) -> None:
        self._forward = 0
        self._known: dict[tuple[int, int, int | None], tuple[weakref.ref, tuple, SplitMask | None]] = {}

    def __deepcopy__(self, memo: dict) -> MaskMemo:
        return MaskMemo()

    def begin_forward(self) -> None:
        self._forward += 1

    def split(self, mask: torch.Tensor | None, prefix: int, block: int, start: int | None = None) -> SplitMask | None:
        """As :func:`split_mask`."""
        if mask is None:
            return ALL_VISIBLE
        # Nobody counts the changes of tensors of inference mode; within a forward there are none.
        version = ("forward", self._forward) if mask.is_inference() else ("version", mask._version)
        place = prefix, block, start
        known = self._known.get(place)
        if known is None or known[0]() is not mask or known[1] != version:
            if len(self._known) >= 8:  # kinds of layers of a few requests
                self._known.clear()
            known = weakref.ref(mask), version, split_mask(mask, prefix, block, start)
            self._known[place] = known
        return known[2]
