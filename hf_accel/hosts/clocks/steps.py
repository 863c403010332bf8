"""The step clock: which denoising step, branch and generation a forward belongs to, without the user's help.

Sources, best first: what the pipeline says through ``cache_context`` (name always; step index and count only from
some), the place of the timestep in the scheduler's own tensor (of which loops over it hand out views, so that nothing
is read back from the device), and the value of the timestep the model receives. A clock is shared by all denoisers of
a pipeline, so that the second expert of Wan 2.2 continues the count of the first; each method has a clock of its own.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.attention.call import Step


@dataclass
class Announcement:
    """What the pipeline said of the next forward through ``cache_context``."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None


class Clock:
    """Counts steps and generations from what forwards bring.

    A generation begins at the first forward; after :meth:`finish` (the pipeline call ended); when the scheduler got
    another schedule; when the timestep rises, or comes from another pipeline's schedule; when the shape of the latents
    changes; when a first step repeats and the prompt of the earlier one no longer exists (that call was abandoned); and
    after a forward that raised.
    """

    def __init__(self, pipeline: weakref.ref | None = None):
        self._pipeline = pipeline
        self.announced: Announcement | None = None
        self.generation = -1
        self._step: Step | None = None
        self._first_timestep = 0.0
        self._shape: tuple[int, ...] | None = None
        self._schedule: weakref.ref | None = None
        self._position: int | None = None
        self._first_position = 0
        self._calls_in_step = 0
        self._prompts: list[weakref.ref] = []
        self._names: set[str] = set()

    @property
    def step(self) -> Step | None:
        """The step of the forward that began last."""
        return self._step

    def finish(self) -> None:
        """The pipeline call ended (or raised): the next forward begins a new generation."""
        self._step = None

    def needs_timestep(self) -> bool:
        """False if the pipeline announces step indices, so that the timestep tensor need not be read."""
        return self.announced is None or self.announced.step_index is None

    def position_of(self, timestep: Any) -> int | None:
        """Index of a timestep in the scheduler's schedule, without reading it: it is a view of one element there.

        None for a number, a tensor of its own, one level per item, or outside a pipeline.
        """
        schedule = self._schedule_now()
        if schedule is None or not isinstance(timestep, torch.Tensor) or not timestep.numel():
            return None
        if timestep.dtype != schedule.dtype or timestep.device != schedule.device:
            return None
        if any(stride and size > 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True)):
            return None
        if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
            return None
        index, odd = divmod(int(timestep.storage_offset() - schedule.storage_offset()), schedule.stride(0))
        return index if not odd and 0 <= index < len(schedule) else None

    def tick(
        self,
        timestep: float | None,
        shape: tuple[int, ...],
        prompt: torch.Tensor | None = None,
        position: int | None = None,
    ) -> Step:
        """Account for one forward and return where it stands.

        Args:
            timestep: noise level of this forward; None if it was not read, since one of the better sources speaks.
            shape: of the latents; a change begins a new generation.
            prompt: the text embedding; the same tensor comes back at every step of a generation.
            position: see :meth:`position_of`.
        """
        said = self.announced
        previous = self._step
        index = said.step_index if said is not None else None
        moved_by = position - self._position if position is not None and self._position is not None else None
        fresh = previous is None or shape != self._shape or self._schedule_changed()
        if previous is not None and not fresh:
            if index is not None:
                fresh = index < previous.index
            elif moved_by is not None:
                fresh = moved_by < 0
            elif (position is None) != (self._position is None):
                fresh = True  # another pipeline that shares the model and has a scheduler of its own
            elif timestep is not None:
                fresh = timestep > previous.timestep
            # A call abandoned in its first step leaves a clock that looks like the start of the next one; only its
            # prompt is gone. Later steps are not judged so: some pipelines build the embedding anew every step.
            same = moved_by == 0 if moved_by is not None else timestep in (None, previous.timestep)
            still_first = previous.index == 0 and index in (None, 0) and same
            fresh |= still_first and any(ref() is None for ref in self._prompts)
        if fresh:
            self._begin(timestep or 0.0, shape, position)
            previous = None
        name = said.name if said is not None else None
        if previous is None:
            index, moved = (index if index is not None else 0), True
        elif index is not None:
            moved = index != previous.index
        elif position is not None and moved_by is not None:
            # The schedule of a second-order sampler lists its inner calls, so every entry is a step.
            index, moved = position - self._first_position, moved_by != 0
        else:
            # Second-order samplers call twice at one timestep: a branch that speaks again begins a step.
            moved = timestep != previous.timestep or (name is not None and name in self._names)
            index = previous.index + int(moved)
        self._position = position
        if moved:
            self._calls_in_step, self._names = 0, set()
        branch = name if name is not None else f"call{self._calls_in_step}"
        self._calls_in_step += 1
        self._names.add(branch)
        if prompt is not None and not any(ref() is prompt for ref in self._prompts):
            self._prompts.append(weakref.ref(prompt))
        count = self._count()
        level = timestep if timestep is not None else float("nan")
        if count:
            progress = index / count
        elif timestep is not None and self._first_timestep:
            progress = 1.0 - timestep / self._first_timestep
        else:
            progress = 0.0
        self._step = Step(index, count, level, progress, branch, self.generation)
        return self._step

    def _begin(self, timestep: float, shape: tuple[int, ...], position: int | None) -> None:
        self.generation += 1
        self._first_timestep, self._shape = timestep, shape
        self._first_position = position or 0
        schedule = self._schedule_now()
        self._schedule = weakref.ref(schedule) if schedule is not None else None
        self._prompts, self._names, self._calls_in_step = [], set(), 0

    def _schedule_now(self) -> torch.Tensor | None:
        """The timesteps that the pipeline's scheduler goes through now, ``[steps]``."""
        pipeline: Any = self._pipeline() if self._pipeline is not None else None
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 and len(timesteps) else None

    def _schedule_changed(self) -> bool:
        """Whether the scheduler was set anew since this generation began."""
        return self._schedule is not None and self._schedule() is not self._schedule_now()

    def _count(self) -> int | None:
        if self.announced is not None and self.announced.num_inference_steps:
            return int(self.announced.num_inference_steps)
        pipeline: Any = self._pipeline() if self._pipeline is not None else None
        if pipeline is None:
            return None
        count = getattr(pipeline, "_num_timesteps", None)
        if count is None:
            timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
            count = len(timesteps) if timesteps is not None else None
        schedule = self._schedule_now()
        if count and schedule is not None and self._position is not None:
            # The pipeline's own count may be that of an earlier call: another pipeline can share model and scheduler.
            count = min(count, len(schedule) - self._first_position)
        return int(count) if count else None


def read_timestep(value: Any) -> float:
    """The noise level as a number: of a scalar, a batch of equal values, or per-token values (their maximum).

    Reads the tensor, which waits for the device.
    """
    if isinstance(value, torch.Tensor):
        return float(value.detach().max())
    return float(value)
