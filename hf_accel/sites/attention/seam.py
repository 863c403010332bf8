"""The context in which a patched model's attention calls run, and the hooks that keep it.

An :class:`AttentionSeam` belongs to one request on one denoiser. A pre-hook on the model's root tells it of every
forward (token grid, timestep); a pre-hook on every patched attention tells it which layer runs. Both hooks are objects
that hold the seams of the model, so ``copy.deepcopy(model)`` yields a model with seams of its own.

Under ``torch.compile`` hooks are traced and their Python effects are lost or delayed. There the root hook puts one
opaque operator, ``hf_accel::begin_forward``, in front of the model, and attention is the opaque operator
``hf_accel::attend``; both run in Python at every call. Attention calls then find their layer by counting, since a
layer number inside the graph would compile every block anew.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.attention.call import AttentionCall, Layer, Step, TokenGrid, span_of
from hf_accel.attention.masks import MaskMemo, hidden_keys
from hf_accel.hosts.clocks.steps import Clock, Clocks
from hf_accel.hosts.denoisers import Denoiser, dims_from_ids, level_of
from hf_accel.kernels.common import kernel_log
from hf_accel.requests import Occupied, PerRequest, Request, by_key, in_backward, in_functional_transform
from hf_accel.sites.attention.statistics import AttentionStatistics

# An attention module that computed its attention calls once more, over other keys: an IP adapter's, of the image.
FURTHER = "a further attention within one layer"


class AttentionCore(Protocol):
    """What is put into the seam: computes attention calls and keeps their state."""

    differentiable: bool

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """``[B, H, Sq, D]`` for one call."""

    def reset(self) -> None:
        """A new generation begins: drop all state of the last one."""

    def fork(self) -> AttentionCore:
        """One more of the kind, for another request."""


class Place(Protocol):
    """One patched attention, as its host sees it."""

    @property
    def silent(self) -> str:
        """Why it may go by without a call of ours though nobody changed it, in words with what to do."""

    def replaced(self) -> str | None:
        """What was changed after apply(), so that ours is not called, in words with what to do; None if nothing."""

    def may_be_skipped(self) -> bool:
        """Whether somebody's hook stands around it, which may reuse what it computed before."""

    def may_all_be_skipped(self) -> bool:
        """Whether somebody's hook stands anywhere in the model, as those of step caches do."""


class OrderMaker(Protocol):
    """Knows in which order the tokens of a forward stand; see ``sites/attention/token_order.py``."""

    def make(self, seam: AttentionSeam, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Order and inverse, int64 ``[tokens]`` each, or None for raster order."""


@dataclass
class Moved:
    """How the tokens of one forward are moved.

    Attributes:
        order: int64 ``[tokens]``, place r holds raster token ``order[r]``; None: raster order.
        inverse: the way back.
        dims: size of the grid in tokens, None for packed models.
        reason: why the latest forward stayed in raster order, or None.
    """

    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    dims: tuple[int, int, int] | None = None
    reason: str | None = None


class _Active(threading.local):
    """Which context and layer the running forward of this thread belongs to."""

    context: AttentionSeam | None = None
    layer: int | None = None
    answered = False  # the layer's own attention was computed


_ACTIVE = _Active()


class AttentionSeam:
    """State of one request at the attentions of one denoiser.

    Args:
        spec: how the model's class is read.
        names: dotted names of the patched attention modules, in execution order.
        core: what computes their attention.
        clocks: the step clocks, shared by the denoisers of one pipeline.
    """

    def __init__(self, spec: Denoiser, names: Sequence[str], core: AttentionCore, clocks: Clocks):
        self.spec, self.core, self.clocks, self.run = spec, core, clocks, AttentionStatistics()
        self.clock: Clock = clocks.shared
        self.layers = [Layer(name, index, len(names)) for index, name in enumerate(names)]
        self.native: list[Any] = [None] * len(names)
        self.places: list[Place] = []
        self.shown: int | None = None
        self.grid: TokenGrid | None = None
        self.token_order: OrderMaker | None = None
        self.order: torch.Tensor | None = None
        self.moved = Moved()
        self.timed = False
        self._generation = -1
        self._batch = 1
        self._ordinal = 0
        self._item = 0
        self._calls = 0
        self._entered: set[int] = set()
        self._silent: set[int] = set()
        self._unended = False
        self._said: set[str] = set()
        self._masks = MaskMemo()
        self._expected: Sequence[int] | None = None
        self._outer: AttentionSeam | None = None
        self._occupied = Occupied()

    def fork(self, request: Request) -> AttentionSeam:
        twin = copy.copy(self)
        twin.core, twin.run, twin.clock = self.core.fork(), AttentionStatistics(), self.clocks.for_request(request)
        twin.moved, twin._occupied, twin._masks = Moved(), Occupied(), MaskMemo()
        twin._entered, twin._silent = set(), set()
        return twin

    @property
    def step(self) -> Step | None:
        """Where the forward that runs now stands; None outside of one."""
        return self.clock.step

    def begin(
        self,
        latents: torch.Tensor,
        timestep: Any,
        dims: tuple[int, int, int] | None,
        ids: torch.Tensor | None,
        prompt: torch.Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        """One forward of the model begins.

        Raises:
            Interleaved: it belongs to a generation that another one followed (see :meth:`Clock.begin`), or another
                thread is in a forward of this request.
        """
        if not compiled:  # nobody tells of the end of a compiled forward
            self._occupied.enter()
        if dims is None and ids is not None:
            dims = dims_from_ids(ids, latents.shape[1])
        self.grid = TokenGrid(*dims, text=self.spec.text) if dims is not None else None
        self.shown = latents.shape[1] if self.spec.packed else None
        self.order = None
        step = self.clock.begin(timestep, latents, prompt, compiled=compiled)
        if step.generation != self._generation:
            self._generation = step.generation
            self.run.begin_generation()
            self.core.reset()
        self._enter(latents.shape[0], compiled)

    def _enter(self, batch: int, compiled: bool) -> None:
        """Layers are counted from here on, and belong to this context. A compiled forward does not end: it is the
        active one until the next."""
        self._judge_compiled()
        self._unended = compiled
        if compiled:
            self._count_unseen(place.replaced() for place in self.places)
        self.run.forwards += 1
        self._batch, self._ordinal, self._item, self._calls, self._expected = batch, 0, 0, 0, None
        self._entered.clear()
        self._silent.clear()
        self._masks.begin_forward()
        self._outer = _ACTIVE.context if _ACTIVE.context is not self and not compiled else None
        _ACTIVE.context, _ACTIVE.layer = self, None

    def finish(self) -> None:
        """The pipeline call ended, or a forward raised: nothing of the generation is kept."""
        self._judge_compiled()
        self.clock.finish()
        self.core.reset()
        self._generation = -1

    def end(self, raised: bool) -> None:
        """The forward is over."""
        if not self._occupied.leave():
            return  # it was refused, while another one runs
        _ACTIVE.context, _ACTIVE.layer = self._outer, None
        self._outer = None
        if raised:
            self.finish()
        elif self._entered and self.places:
            self._count_unseen(self._why_unseen(index) for index in self._entered)
        elif not self._calls:  # no hook runs in blocks that are compiled one by one
            self._count_unseen(place.replaced() for place in self.places)

    def _why_unseen(self, layer: int) -> str | None:
        place = self.places[layer]
        if (reason := place.replaced()) is not None:
            return reason
        return place.silent if layer in self._silent or not place.may_be_skipped() else None

    def ran_silently(self) -> None:
        """The attention that runs now has computed something without a call of ours."""
        if _ACTIVE.layer is not None:
            self._silent.add(_ACTIVE.layer)

    def _judge_compiled(self) -> None:
        """Nobody tells when a compiled forward ends; the next begins, or its pipeline call is over."""
        if self._unended and self._calls == 0 and self.places and not self.places[0].may_all_be_skipped():
            words = "a compiled forward came to none of its patched attentions"
            self._count_unseen(None if one.replaced() else words for one in self.places)
        self._unended = False

    def _count_unseen(self, reasons: Iterable[str | None]) -> None:
        """Count attentions that ran without a call of ours, with the reason; warn of each once, with what to do, which
        is what stands behind the first semicolon."""
        for reason, times in Counter(reason for reason in reasons if reason is not None).items():
            self.run.dense_calls[reason.partition(";")[0]] += times
            if reason not in self._said:
                self._said.add(reason)
                words = f"{times} of {len(self.layers)} patched attentions ran without the method: {reason}"
                warnings.warn(f"hf_accel: {words}.", stacklevel=2)

    def expect(self, layers: Sequence[int] | None) -> None:
        """This forward runs only these layers, in this order; None for all of them. Until the next forward begins."""
        self._expected = layers

    def leave_layer(self) -> None:
        """The call that comes now is in a graph: no hook has said which layer runs."""
        _ACTIVE.layer = None

    def enter_layer(self, index: int) -> None:
        """Attention module ``index`` is about to run (eager only)."""
        _ACTIVE.context, _ACTIVE.layer, _ACTIVE.answered, self._item = self, index, False, 0
        self._entered.add(index)
        self._ordinal = (index + 1) * (self._batch if self.spec.per_item else 1)

    def _locate(self) -> tuple[Layer | None, int]:
        """Layer and batch item of the attention call that comes now."""
        if _ACTIVE.layer is not None:
            index, item = _ACTIVE.layer, self._item
            self._entered.discard(index)
            if self.spec.per_item:
                self._item += 1
            elif _ACTIVE.answered:
                return None, 0
            _ACTIVE.answered = True
            return self.layers[index], item
        place, item = divmod(self._ordinal, self._batch) if self.spec.per_item else (self._ordinal, 0)
        self._ordinal += 1
        if self._expected is not None:
            place = self._expected[place] if place < len(self._expected) else len(self.layers)
        return (self.layers[place], item) if place < len(self.layers) else (None, 0)

    def native_of_next(self) -> Any:
        """The native backend of the layer whose call comes next."""
        if _ACTIVE.layer is not None:
            return self.native[_ACTIVE.layer]
        place = self._ordinal // self._batch if self.spec.per_item else self._ordinal
        return self.native[place] if place < len(self.native) else None

    def _grid_for(self, tokens: int) -> TokenGrid | None:
        if self.grid is None or not self.spec.levels:
            return self.grid
        dims = level_of((self.grid.frames, self.grid.height, self.grid.width), tokens)
        return TokenGrid(*dims, text=self.spec.text) if dims is not None else None

    def run_dense(self, reason: str, dense: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """A call that no method may take: the layer's native attention, counted under ``reason``."""
        layer, _ = self._locate()
        self._calls += 1
        self.run.dense_calls[reason] += 1
        return dense(self._native(layer))

    def _native(self, layer: Layer | None) -> Any:
        """The native backend of a layer; of the one that runs where the call is not its own."""
        index = layer.index if layer is not None else _ACTIVE.layer
        return self.native[index] if index is not None else None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        causal: bool,
        needs_grad: bool,
        dense: Callable[[Any], torch.Tensor],
    ) -> torch.Tensor:
        """Run one attention call ``[B, H, S, D]`` through the core.

        ``dense`` takes the layer's native backend and returns ``[B, H, S, D]``.
        """
        if not query.dim() == key.dim() == value.dim() == 4:
            return self.run_dense("queries, keys and values without batch or heads", dense)
        if in_functional_transform():
            return self.run_dense("a transform of torch.func, or forward-mode derivatives", dense)
        layer, item = self._locate()
        self._calls += 1
        if layer is None:
            many = "more attention calls than patched layers in one forward"
            self.run.dense_calls[FURTHER if _ACTIVE.layer is not None else many] += 1
            return dense(self._native(None))
        step = self.step
        if step is None:
            self.run.dense_calls["called outside a forward of the model"] += 1
            return dense(self.native[layer.index])
        if mask is not None and mask.ndim == 4 and mask.shape[2] > 1:
            hidden = self._masks.get(mask, functools.partial(hidden_keys, mask, self.spec.mask == "outer"))
            mask = mask if hidden is None else hidden
        grid, tokens = self._grid_for(query.shape[2]), query.shape[2]
        call = AttentionCall(
            query,
            key,
            value,
            mask,
            scale,
            causal,
            layer,
            grid,
            step,
            lambda: dense(self.native[layer.index]),
            item,
            self.order,
            span_of(self.shown, tokens, self.spec.text) if self.shown is not None and grid is None else None,
        )
        timing = self.run.stopwatch.section(query.device) if self.timed else contextlib.nullcontext()
        with timing, kernel_log.logging_to(call.notes.setdefault("kernels", {})):
            if needs_grad and not self.core.differentiable:
                out = call.fallback("gradients are needed and the method has no backward")
            else:
                out = self.core.attend(call)
        if not in_backward():  # gradient checkpointing repeats calls
            self.run.record(layer.index, step.index, step.branch, call.notes)
        return out


AttentionSeams = PerRequest[AttentionSeam]


class RootHook:
    """Forward pre-hook of the denoiser: tells the request's seam of every forward."""

    def __init__(self, seams: AttentionSeams):
        self.seams = seams

    @property
    def counts_layers(self) -> AttentionSeam:
        """For :func:`hf_accel.hosts.layer_counting.counter_of`."""
        return self.seams.now()

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        spec = self.seams.shared.spec
        arguments = spec.arguments(args, kwargs)
        hidden, timestep = arguments[spec.latents], arguments.get("timestep")
        dims = spec.dims(module, arguments)
        ids = arguments.get(spec.ids) if spec.ids is not None else None
        if torch.compiler.is_compiling():
            level = timestep if isinstance(timestep, torch.Tensor) else torch.as_tensor(timestep)
            marked = torch.ops.hf_accel.begin_forward(hidden, level, ids, list(dims or ()), self.seams.key)
            if spec.latents in kwargs:
                return args, {**kwargs, spec.latents: marked}
            return (marked, *args[1:]), kwargs
        prompt = arguments.get("encoder_hidden_states")
        if not isinstance(prompt, torch.Tensor):  # an IP adapter's pictures beside it
            prompt = next((one for one in prompt or () if isinstance(one, torch.Tensor)), None)
        self.seams.begin().begin(hidden, timestep, dims, ids, prompt)
        return None


class EndHook:
    """Forward hook of the denoiser, called after exceptions too."""

    def __init__(self, seams: AttentionSeams):
        self.seams = seams

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.seams.now().end(raised=output is None)


class LayerHook:
    """Forward pre-hook of one attention module: says which layer runs. Nothing under ``torch.compile``, and nothing on
    the copy of a part of a model, which has no seam."""

    def __init__(self, seams: AttentionSeams | None, index: int):
        self.seams, self.index = seams, index

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.seams is not None and not torch.compiler.is_compiling():
            self.seams.now().enter_layer(self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerHook:
        # The hooks of the whole are copied before its parts. A part alone must not bring the whole along.
        return LayerHook(memo.get(id(self.seams)), self.index)


def active_context() -> AttentionSeam | None:
    """The context of the forward that runs in this thread."""
    return _ACTIVE.context


def seams_of(module: torch.nn.Module) -> AttentionSeams | None:
    """The seams of a patched denoiser, found through its root hook."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, RootHook):
            return hook.seams
    return None


def context_of(module: torch.nn.Module) -> AttentionSeam | None:
    """The seam of a patched denoiser for the request that runs now."""
    seams = seams_of(module)
    return seams.now() if seams is not None else None


@torch.library.custom_op("hf_accel::begin_forward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _begin_forward(
    hidden: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor | None, dims: Sequence[int], key: int
) -> torch.Tensor:
    """Tell the seam of ``key`` that a compiled forward begins. Returns a copy of ``hidden``, so that the data flow
    puts everything else behind it."""
    seams = by_key(key)
    if seams is not None:
        frames_height_width = (dims[0], dims[1], dims[2]) if len(dims) == 3 else None
        seams.begin().begin(hidden, timestep, frames_height_width, ids, compiled=True)
    return hidden.clone()


@_begin_forward.register_fake
def _(hidden, timestep, ids, dims, key):
    return torch.empty_like(hidden)


def _begin_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    return grad, None, None, None, None


_begin_forward.register_autograd(_begin_backward)
