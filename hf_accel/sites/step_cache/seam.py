"""Step caches on U-Nets: full forwards that keep one hidden state, partial forwards that begin from it.

The U-Net's ``forward`` is overridden on the instance; hooks on the model run around it as ever. Under ``torch.compile``
the override is left out of the graph and what it calls is compiled: two static graphs, one for full and one for partial
forwards. The kept state lies in one buffer per guidance branch, at one address through a generation and outside of
what CUDA graphs reuse.

A step is full if the method says so, and wherever the kept state does not belong to it: at the first step of a
generation (see ``clock.py``), for a branch or shape that has kept nothing, after an exception, after the model was
changed, and while gradients flow.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.attention.call import Step
from hf_accel.hosts.clocks.call_end import CallEnd
from hf_accel.hosts.clocks.steps import Clock, read_timestep
from hf_accel.hosts.layer_counting import counter_of
from hf_accel.hosts.patching.forward_override import override_forward, replaced_forward
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.sites.step_cache import unet_views
from hf_accel.sites.step_cache.statistics import StepCacheStatistics
from hf_accel.sites.step_cache.unet_macs import ForwardShape, MacShares
from hf_accel.sites.step_cache.unet_views import UNetViews

_ATTRIBUTE = "_hf_accel_step_cache"


class StepCacheCore(Protocol):
    """What is put into the site: decides which steps may begin from a kept state.

    Attributes:
        branch: the skip connection from which on everything shallower is computed anew; see ``unet_views.py``.
        reads_timestep: the decision needs the noise level, not only the index of the step.
    """

    branch: int
    reads_timestep: bool

    def begin(self, step: Step) -> None:
        """A generation begins at ``step``. May raise if it cannot be scheduled."""

    def why_full(self, step: Step, kept: Step) -> str | None:
        """Why ``step`` must be computed in full though a state of step ``kept`` is there; None if it may be reused."""

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a forward that the method would spoil, by raising."""


@dataclass
class Kept:
    """The inner hidden state of one guidance branch, and the step it is of."""

    step: Step
    shape: ForwardShape
    buffer: torch.Tensor


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model has no step-cache site, in words; None if it has."""
    reason = unet_views.why_not(module)
    if reason is None:
        return _foreign_forward(module)
    words = f"{type(module).__name__} is a {kind(module)}, and {reason}"
    if hasattr(module, "enable_cache"):
        words += (
            "; the step caches of diffusers fit it (enable_cache with FirstBlockCacheConfig, TaylorSeerCacheConfig)"
        )
    return words


def install(model: Model, core: StepCacheCore, ledger: Ledger, report: MethodReport, clock: Clock) -> StepCacheSeam:
    """Let ``core`` decide how much of ``model`` runs at every step.

    Raises:
        Conflict: its forward is replaced by something that cannot be worked with, or a block that must be cut is.
    """
    module: Any = model.module
    run = StepCacheStatistics()
    context = StepCacheSeam(core, clock, run)
    context.views_of(module)  # what cannot be cut is refused now
    run.macs = MacShares(module, core.branch)
    report.run = run
    ledger.set(module, _ATTRIBUTE, context)
    override_forward(ledger, module, types.MethodType(_forward_of(module.__class__), module))
    ledger.hold(CallEnd(module, context))
    deepest = unet_views.deepest_branch(module)
    report.patched.append(Patched(model.name, "", f"U-Net cut at branch {core.branch} of 0..{deepest}"))
    return context


def _foreign_forward(module: Any) -> str | None:
    own = replaced_forward(module)
    if own is None or _ATTRIBUTE in module.__dict__ or "_old_forward" in module.__dict__:
        return None
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
    who = f"hooks of diffusers ({', '.join(hooks)})" if hooks else f"another library ({type(own).__name__})"
    return (
        f"the forward of this {type(module).__name__} was replaced by {who}; take that off first, or apply hf_accel "
        "before it"
    )


@dataclass(frozen=True)
class Forward:
    """One forward that runs now: the network that computes it and its arguments; the rest for the books."""

    network: torch.nn.Module
    arguments: Mapping[str, Any]
    views: UNetViews | None = None
    step: Step | None = None
    shape: ForwardShape | None = None
    reason: str | None = None  # why it is full


class StepCacheSeam:
    """State of the step-cache site on one U-Net."""

    def __init__(self, core: StepCacheCore, clock: Clock, run: StepCacheStatistics):
        self.core, self.clock, self.run = core, clock, run
        self._kept: dict[str, Kept] = {}
        self._views: UNetViews | None = None
        self._seam_layers: tuple[int, list[int]] | None = None  # of the seam with that key
        self._generation = -1

    def __deepcopy__(self, memo: dict) -> StepCacheSeam:
        import copy

        twin = object.__new__(type(self))
        memo[id(self)] = twin
        left_out = ("_views", "_seam_layers", "_kept")  # views are shells around the original's modules
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in left_out})
        twin._views, twin._seam_layers, twin._kept = None, None, {}
        return twin

    def finish(self) -> None:
        """The pipeline call ended (or raised): nothing of it is kept."""
        self.clock.finish()
        self._drop()

    @property
    def kept_bytes(self) -> int:
        """Bytes of the hidden states that are kept now."""
        return sum(kept.buffer.nbytes for kept in self._kept.values())

    def views_of(self, unet: torch.nn.Module) -> UNetViews:
        """The views for the method's branch, made anew (and what is kept dropped) if the model was changed."""
        if self._views is None or self._views.stale(unet):
            self._drop()
            self._views, self._seam_layers = UNetViews(unet, self.core.branch), None
        return self._views

    def begin(self, unet: torch.nn.Module, arguments: dict[str, Any]) -> Forward:
        """One forward of the U-Net begins: decide whether it is full or partial."""
        self.core.check(arguments)
        sample, prompt = arguments["sample"], arguments.get("encoder_hidden_states")
        if torch.is_grad_enabled() and (sample.requires_grad or any(p.requires_grad for p in unet.parameters())):
            self.run.forwards += 1
            self.run.dense_calls["gradients are needed"] += 1
            return Forward(unet, arguments)
        step = self._tick(arguments["timestep"], sample, prompt)
        views = self.views_of(unet)
        shape = ForwardShape.of(arguments)
        kept = self._kept.get(step.branch)
        reason = self._why_full(step, shape, kept)
        if reason is not None or kept is None:
            return Forward(views.full, arguments, views, step, shape, reason)
        self._tell_seam(unet, views)
        views.splice.inner = kept.buffer
        return Forward(views.partial, views.partial_arguments(unet, arguments), views, step, shape)

    def end(self, forward: Forward) -> None:
        """The forward is over: keep the inner state of a full one, write down what it was."""
        views, step, shape = forward.views, forward.step, forward.shape
        if views is None or step is None or shape is None:
            return  # not ours, see begin()
        views.splice.inner = None
        if forward.reason is not None:
            inner, views.tap.inner = views.tap.inner, None
            if inner is None:
                raise RuntimeError("the full view of a U-Net ran without passing its tap")
            kept = self._kept.get(step.branch)
            # Equal shapes of all arguments make equal inner states, and one address for the partial graph.
            if kept is not None and kept.shape == shape:
                buffer = kept.buffer
            else:
                with torch.inference_mode(False):  # or it could not be written to outside of that mode
                    buffer = torch.empty_like(inner)
            self._kept[step.branch] = Kept(step, shape, buffer.copy_(inner))
        self.run.record(step.index, forward.reason, shape, self.kept_bytes)

    def abandon(self, forward: Forward) -> None:
        """The forward raised: nothing of its generation is kept."""
        if forward.views is not None:
            forward.views.splice.inner = forward.views.tap.inner = None
        self.finish()

    def _tick(self, timestep: Any, sample: torch.Tensor, prompt: torch.Tensor | None) -> Step:
        position = self.clock.position_of(timestep)
        level = read_timestep(timestep) if position is None or self.core.reads_timestep else None
        step = self.clock.tick(level, tuple(sample.shape), prompt, position)
        if step.generation != self._generation:
            self._drop()
            try:
                self.core.begin(step)
            except BaseException:
                self.clock.finish()
                raise
            self._generation = step.generation
            self.run.generations += 1
        return step

    def _why_full(self, step: Step, shape: ForwardShape, kept: Kept | None) -> str | None:
        if kept is None:
            return "first step" if step.index == 0 else "nothing is kept yet"
        if kept.shape != shape:
            return "other arguments than the kept step"
        return self.core.why_full(step, kept.step)

    def _tell_seam(self, unet: torch.nn.Module, views: UNetViews) -> None:
        """An attention method on the same U-Net counts layers: say which of them a partial forward runs."""
        seam = counter_of(unet)
        if seam is None:
            return
        if self._seam_layers is None or self._seam_layers[0] != seam.key:
            running = {id(module) for module in views.partial.modules()}
            names = enumerate(layer.name for layer in seam.layers)
            layers = [index for index, name in names if id(unet.get_submodule(name)) in running]
            self._seam_layers = seam.key, layers
        seam.expect(self._seam_layers[1])

    def _drop(self) -> None:
        self._kept = {}


@functools.cache
def _forward_of(cls: Any) -> Callable:
    """The override of ``cls.forward``: runs it on one of two views. Keeps the signature, which pipelines inspect."""
    native = cls.forward
    names = [name for name in inspect.signature(native).parameters if name != "self"]

    # Which of the two graphs runs is decided at every call, outside of any graph; what is compiled is ``native``.
    begin, end, abandon = (
        torch._dynamo.disable(decide, reason="hf_accel chooses a full or a partial graph")
        for decide in (StepCacheSeam.begin, StepCacheSeam.end, StepCacheSeam.abandon)
    )

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        missing = [name for name in ("sample", "timestep") if name not in arguments]
        if missing or len(args) > len(names):
            return native(self, *args, **kwargs)  # raises what the host raises
        context = self.__dict__[_ATTRIBUTE]
        now = begin(context, self, arguments)
        try:
            out = native(now.network, **now.arguments)
        except BaseException:
            abandon(context, now)
            raise
        end(context, now)
        return out

    return torch._dynamo.disable(forward, recursive=False, reason="hf_accel chooses a full or a partial graph")
