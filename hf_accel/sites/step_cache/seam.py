"""Step caches on U-Nets: full forwards that keep one hidden state, partial forwards that begin from it.

The U-Net's ``forward`` is overridden on the instance; hooks on the model run around it as ever. Under ``torch.compile``
the override is left out of the graph and what it calls is compiled: two static graphs, one for full and one for partial
forwards. The kept state lies in one buffer per guidance branch, at one address through a generation and outside of
what CUDA graphs reuse.

A step is full if the method says so, and wherever the kept state does not belong to it: at the first step of a
generation (see ``hosts/clocks/steps.py``), for a branch or shape that has kept nothing, after an exception, after the
model was changed, and while gradients flow.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.attention.call import Step
from hf_accel.hosts.clocks.call_end import CallEnd
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.layer_counting import counter_of
from hf_accel.hosts.patching.forward_override import override_forward, replaced_forward
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.requests import PerRequest, Request
from hf_accel.sites.step_cache import unet_views
from hf_accel.sites.step_cache.statistics import StepCacheStatistics
from hf_accel.sites.step_cache.steps import FollowsSteps, StepSeam
from hf_accel.sites.step_cache.unet_macs import ForwardShape, MacShares
from hf_accel.sites.step_cache.unet_views import UNetViews

_ATTRIBUTE = "_hf_accel_step_cache"


class StepCacheCore(FollowsSteps, Protocol):
    """What is put into the site: decides which steps may begin from a kept state.

    Attributes:
        branch: the skip connection from which on everything shallower is computed anew; see ``unet_views.py``.
    """

    branch: int

    def why_full(self, step: Step, kept: Step, state: Any) -> str | None:
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


def install(model: Model, core: StepCacheCore, ledger: Ledger, report: MethodReport, clock: Clocks) -> StepCacheSeams:
    """Let ``core`` decide how much of ``model`` runs at every step.

    Raises:
        Conflict: its forward is replaced by something that cannot be worked with, or a block that must be cut is.
    """
    module: Any = model.module
    seams = StepCacheSeams(StepCacheSeam(core, clock, StepCacheStatistics(macs=MacShares(module, core.branch))))
    seams.shared.views_of(module)  # what cannot be cut is refused now
    seams.shared.finish()
    report.run = seams
    ledger.set(module, _ATTRIBUTE, seams)
    override_forward(ledger, module, types.MethodType(_forward_of(module.__class__), module))
    ledger.hold(CallEnd(module, seams))
    deepest = unet_views.deepest_branch(module)
    report.patched.append(Patched(model.name, "", f"U-Net cut at branch {core.branch} of 0..{deepest}"))
    return seams


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


class StepCacheSeam(StepSeam):
    """State of one request at the step-cache site of one U-Net."""

    core: StepCacheCore

    def __init__(self, core: StepCacheCore, clocks: Clocks, run: StepCacheStatistics):
        super().__init__(core, clocks, run)
        self._kept: dict[str, Kept] = {}
        self._views: UNetViews | None = None
        # Views that no request uses now: compiled code belongs to them, so that they are handed on.
        self._spare: list[UNetViews] = []
        self._seam_layers: tuple[int, list[int]] | None = None  # of the seam with that list of layers

    def fork(self, request: Request) -> StepCacheSeam:
        twin: Any = super().fork(request)
        twin._spare = self._spare
        return twin

    def __deepcopy__(self, memo: dict) -> StepCacheSeam:
        # Views are shells around the original's modules.
        core, clocks, run = copy.deepcopy((self.core, self.clocks, self.run), memo)
        twin = type(self)(core, clocks, run)
        memo[id(self)] = twin
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": None, "_spare": [], "_seam_layers": None, "_kept": {}}

    def drop(self) -> None:
        self._kept = {}

    def finish(self) -> None:
        super().finish()
        if self._views is not None:
            self._spare.append(self._views)
            self._views = None

    ended = finish  # its views are handed on

    @property
    def kept_bytes(self) -> int:
        """Bytes of the hidden states that are kept now."""
        return sum(kept.buffer.nbytes for kept in self._kept.values())

    def views_of(self, unet: torch.nn.Module) -> UNetViews:
        """The views for the method's branch, made anew (and what is kept dropped) if the model was changed."""
        if self._views is not None and self._views.stale(unet):
            self.drop()
            self._views = None
        if self._views is None:
            self._views, self._seam_layers = self._spare_views(unet) or UNetViews(unet, self.core.branch), None
        return self._views

    def _spare_views(self, unet: torch.nn.Module) -> UNetViews | None:
        with contextlib.suppress(IndexError):  # another request may take the last
            while True:
                views = self._spare.pop()
                if not views.stale(unet):
                    return views
        return None

    def begin(self, unet: torch.nn.Module, arguments: dict[str, Any]) -> Forward:
        """One forward of the U-Net begins: decide whether it is full or partial."""
        self.core.check(arguments)
        sample, prompt = arguments["sample"], arguments.get("encoder_hidden_states")
        if torch.is_grad_enabled() and (sample.requires_grad or any(p.requires_grad for p in unet.parameters())):
            self.run.forwards += 1
            self.run.dense_calls["gradients are needed"] += 1
            return Forward(unet, arguments)
        step = self.enter(arguments["timestep"], sample, prompt)
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
        self.occupied.leave()
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

    def _why_full(self, step: Step, shape: ForwardShape, kept: Kept | None) -> str | None:
        if kept is None:
            return "first step" if step.index == 0 else "nothing is kept yet"
        if kept.shape != shape:
            return "other arguments than the kept step"
        return self.core.why_full(step, kept.step, self.state)

    def _tell_seam(self, unet: torch.nn.Module, views: UNetViews) -> None:
        """An attention method on the same U-Net counts layers: say which of them a partial forward runs."""
        seam = counter_of(unet)
        if seam is None:
            return
        if self._seam_layers is None or self._seam_layers[0] != id(seam.layers):
            running = {id(module) for module in views.partial.modules()}
            names = enumerate(layer.name for layer in seam.layers)
            layers = [index for index, name in names if id(unet.get_submodule(name)) in running]
            self._seam_layers = id(seam.layers), layers
        seam.expect(self._seam_layers[1])


StepCacheSeams = PerRequest[StepCacheSeam]


@functools.cache
def _forward_of(cls: Any) -> Callable:
    """The override of ``cls.forward``: runs it on one of two views. Keeps the signature, which pipelines inspect."""
    native = cls.forward
    names = [name for name in inspect.signature(native).parameters if name != "self"]

    # Which of the two graphs runs is decided at every call, outside of any graph; what is compiled is ``native``.
    decide = functools.partial(torch._dynamo.disable, reason="hf_accel chooses a full or a partial graph")
    now_of, refused, abandon = (decide(f) for f in (PerRequest.now, StepCacheSeam.refused, StepCacheSeam.abandon))
    begin, end = decide(StepCacheSeam.begin), decide(StepCacheSeam.end)

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        missing = [name for name in ("sample", "timestep") if name not in arguments]
        seams = self.__dict__.get(_ATTRIBUTE)
        # Without arguments the host raises what it raises; without seams this was undone by force.
        if missing or len(args) > len(names) or seams is None:
            return native(self, *args, **kwargs)
        context = now_of(seams)
        try:
            now = begin(context, self, arguments)
        except BaseException:
            refused(context)
            raise
        try:
            out = native(now.network, **now.arguments)
        except BaseException:
            abandon(context, now)
            raise
        end(context, now)
        return out

    return torch._dynamo.disable(forward, recursive=False, reason="hf_accel chooses a full or a partial graph")
