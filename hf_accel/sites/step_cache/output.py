"""The output slot of step caches: forwards of a denoiser that are not run, their output forecast from earlier ones.

Works on every network with a timestep, transformer or U-Net, since nothing of its inside is touched. A forward runs if
the method says so, and wherever what is kept does not belong to it: at the first step of a generation, for a guidance
branch that has kept nothing, for arguments of other shapes, after an exception, and while gradients flow.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_accel.attention.call import Step
from hf_accel.hosts.clocks.call_end import CallEnd
from hf_accel.hosts.clocks.steps import Clocks
from hf_accel.hosts.denoisers import describe
from hf_accel.hosts.networks import host_of
from hf_accel.hosts.patching.forward_override import below, override_forward, replaced_forward
from hf_accel.hosts.target import Model, kind
from hf_accel.ledger import Ledger
from hf_accel.report import MethodReport, Patched
from hf_accel.requests import PerRequest
from hf_accel.sites.step_cache.statistics import StepCacheStatistics
from hf_accel.sites.step_cache.steps import FollowsSteps, StepSeam

_ATTRIBUTE = "_hf_accel_output_cache"


@dataclass(frozen=True)
class Output:
    """The output ``value`` of the forward at ``step``, of one guidance branch."""

    step: Step
    value: torch.Tensor


class OutputCore(FollowsSteps, Protocol):
    """What is put into the slot.

    Attributes:
        history: how many outputs of a branch are kept.
    """

    history: int

    def why_run(self, step: Step, kept: Sequence[Output], state: Any) -> str | None:
        """Why ``step`` runs though outputs are kept, newest last; None if its output is forecast."""

    def forecast(self, step: Step, kept: Sequence[Output], state: Any) -> torch.Tensor:
        """The output of a forward that is not run, of the shape and dtype of those kept."""


def why_not(module: torch.nn.Module) -> str | None:
    """Why a model's output cannot be forecast from step to step, in words; None if it can."""
    name = type(module).__name__
    if host_of(module) not in ("transformer", "unet"):
        return f"{name} is a {kind(module)}, not a denoiser that runs once per step"
    parameters = inspect.signature(type(module).forward).parameters
    if "timestep" not in parameters:
        return f"the forward of {name} takes no timestep"
    own = replaced_forward(module)
    if own is not None and "_old_forward" not in module.__dict__:
        return (
            f"the forward of this {name} was replaced by another library ({type(own).__name__}); take that off first, "
            "or apply hf_accel before it"
        )
    return None


def install(model: Model, core: OutputCore, ledger: Ledger, report: MethodReport, clock: Clocks) -> OutputSeams:
    """Let ``core`` decide which forwards of ``model`` run."""
    module: Any = model.module
    seams = OutputSeams(OutputSeam(core, clock, StepCacheStatistics()))
    report.run = seams
    ledger.set(module, _ATTRIBUTE, seams)
    override_forward(ledger, module, types.MethodType(_forward_of(module.__class__), module), level=1)
    ledger.hold(CallEnd(module, seams))
    report.patched.append(Patched(model.name, "", "output forecast at steps that are not run"))
    return seams


@dataclass(frozen=True)
class Forward:
    """One forward that runs now, for the books; ``forecast`` is the tensor in its output if it is not run."""

    step: Step | None = None
    shape: tuple[Any, ...] = ()
    reason: str = ""
    forecast: torch.Tensor | None = None


class OutputSeam(StepSeam):
    """State of one request at the output slot of one model."""

    core: OutputCore

    def __init__(self, core: OutputCore, clocks: Clocks, run: StepCacheStatistics):
        super().__init__(core, clocks, run)
        self._kept: dict[str, list[Output]] = {}
        self._shapes: dict[str, tuple[Any, ...]] = {}
        self._rebuild: Callable[[torch.Tensor], Any] | None = None

    def drop(self) -> None:
        self._kept, self._shapes = {}, {}

    def begin(self, module: torch.nn.Module, arguments: Mapping[str, Any]) -> Forward:
        """One forward begins: it runs, or its output is forecast."""
        spec = describe(module)
        latents = arguments[spec.latents if spec is not None else next(iter(arguments))]
        if torch.is_grad_enabled() and (latents.requires_grad or any(p.requires_grad for p in module.parameters())):
            self.run.forwards += 1
            self.run.dense_calls["gradients are needed"] += 1
            return Forward()
        step = self.enter(arguments["timestep"], latents, arguments.get("encoder_hidden_states"))
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        flags = tuple(sorted((name, v) for name, v in arguments.items() if isinstance(v, bool | str)))
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(tensors.items())), flags
        kept = self._kept.get(step.branch, [])
        if not kept:
            return Forward(step, shape, "first step" if step.index == 0 else "nothing is kept yet")
        if self._shapes[step.branch] != shape or self._rebuild is None:
            return Forward(step, shape, "other arguments than the kept step")
        reason = self.core.why_run(step, kept, self.state)
        if reason is not None:
            return Forward(step, shape, reason)
        self.run.record(step.index, None, shape, self._bytes())
        self.occupied.leave()
        return Forward(step, shape, forecast=self.core.forecast(step, kept, self.state))

    def end(self, forward: Forward, output: Any) -> None:
        """A forward ran: keep its output, write down why it ran."""
        self.occupied.leave()
        step = forward.step
        if step is None:
            return
        self.run.record(step.index, forward.reason, forward.shape, self._bytes())
        parts = _parts(output)
        if parts is None:
            self.run.dense_calls["an output of several tensors"] += 1
            return
        value, self._rebuild = parts
        self._shapes[step.branch] = forward.shape
        kept = self._kept.setdefault(step.branch, [])
        kept.append(Output(step, value.detach().clone()))  # schedulers and guidance may write into it
        del kept[: -max(self.core.history, 1)]

    def output_of(self, forecast: torch.Tensor) -> Any:
        """A forecast in the form that this network's output has."""
        return forecast if self._rebuild is None else self._rebuild(forecast)

    def _bytes(self) -> int:
        return sum(output.value.nbytes for kept in self._kept.values() for output in kept)


OutputSeams = PerRequest[OutputSeam]


def _parts(output: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]] | None:
    """The one tensor in a forward's output, and how to put another in its place; None if there are several."""
    if isinstance(output, torch.Tensor):
        return output, lambda value: value
    if isinstance(output, tuple) and len(output) == 1 and isinstance(output[0], torch.Tensor):
        return output[0], lambda value: (value,)
    if isinstance(output, Mapping) and len(output) == 1:
        (name, value), cls = next(iter(output.items())), type(output)
        if isinstance(value, torch.Tensor):
            return value, lambda value: cls(**{name: value})
    return None


def _copied(forecast: torch.Tensor) -> torch.Tensor:
    """Whoever gets an output may write into it, and what is kept is forecast from again.

    This is a function that ``torch.compile`` may trace: with ``fullgraph=True`` it refuses a call that ran no graph.
    """
    return forecast.clone()


@functools.cache
def _forward_of(cls: Any) -> Callable:
    """The override of ``cls.forward``. Keeps the signature, which pipelines inspect."""
    native = cls.forward
    names = [name for name in inspect.signature(native).parameters if name != "self"]
    decide = functools.partial(torch._dynamo.disable, reason="hf_accel chooses whether a step runs")
    now_of, inside, output_of = decide(PerRequest.now), decide(below), decide(OutputSeam.output_of)
    begin, end, finish = decide(OutputSeam.begin), decide(OutputSeam.end), decide(OutputSeam.finish)
    refused = decide(OutputSeam.refused)

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = inside(self, override)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if "timestep" not in arguments or (not args and names[0] not in arguments) or len(args) > len(names):
            return inner(*args, **kwargs)  # raises what the host raises
        seams = self.__dict__.get(_ATTRIBUTE)
        if seams is None:  # undone by force, while somebody's wrapper still calls this
            return inner(*args, **kwargs)
        seam = now_of(seams)
        try:
            now = begin(seam, self, arguments)
        except BaseException:
            refused(seam)
            raise
        if now.forecast is not None:
            return output_of(seam, _copied(now.forecast))
        try:
            out = inner(*args, **kwargs)
        except BaseException:
            finish(seam)
            raise
        end(seam, now, out)
        return out

    # What is compiled is the forward below; whether it runs is decided at every call, outside of any graph.
    override = torch._dynamo.disable(forward, recursive=False, reason="hf_accel chooses whether a step runs")
    return override
