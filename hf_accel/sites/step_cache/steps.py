"""What both slots of the step-cache site share: where a forward stands, and what is void in another generation."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from hf_accel.attention.call import Step
from hf_accel.hosts.clocks.steps import Clock, Clocks
from hf_accel.requests import Occupied, Request
from hf_accel.sites.step_cache.statistics import StepCacheStatistics


class FollowsSteps(Protocol):
    """What is put into either slot.

    Attributes:
        reads_timestep: the decision needs the noise level, which waits for the device.
    """

    reads_timestep: bool

    def new_state(self, step: Step) -> Any:
        """State of one generation, which begins at ``step``. May raise if it cannot be scheduled."""


class StepSeam:
    """State of one request at a slot of one model.

    Args:
        core: shared by all requests, and not written to.
        clocks: the step clocks, shared by the denoisers of one pipeline.
        run: where forwards are counted.
    """

    def __init__(self, core: Any, clocks: Clocks, run: StepCacheStatistics):
        self.core, self.clocks, self.run = core, clocks, run
        self.clock: Clock = clocks.shared
        self.state: Any = None  # what the core made for this generation
        self._generation = -1
        self.occupied = Occupied()

    def fork(self, request: Request) -> StepSeam:
        twin = type(self)(self.core, self.clocks, StepCacheStatistics(macs=self.run.macs))
        twin.clock = self.clocks.for_request(request)
        return twin

    def drop(self) -> None:
        """Nothing that was kept belongs to the next forward."""
        raise NotImplementedError

    def refused(self) -> None:
        """The forward was not begun."""
        self.occupied.leave()

    def finish(self) -> None:
        """The pipeline call ended (or raised): nothing of it is kept."""
        self.occupied.leave()
        self.clock.finish()
        self.state = None
        self.drop()

    def enter(self, timestep: Any, latents: torch.Tensor, prompt: torch.Tensor | None) -> Step:
        """One forward begins with these arguments.

        Raises:
            Interleaved: it belongs to a generation that another one followed (see :meth:`Clock.begin`), or another
                thread is in a forward of this request.
        """
        self.occupied.enter()
        step = self.clock.begin(timestep, latents, prompt, read=self.core.reads_timestep)
        if step.generation != self._generation:
            self.drop()
            try:
                self.state = self.core.new_state(step)
            except BaseException:
                self.clock.finish()
                raise
            self._generation = step.generation
            self.run.generations += 1
        return step
