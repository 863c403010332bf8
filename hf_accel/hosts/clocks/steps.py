"""The step clock: which denoising step, branch and generation a forward belongs to, without the user's help.

Sources, best first: what the pipeline says through ``cache_context`` (name always; step index and count only from
some), the place of the timestep in the schedule (loops over a schedule hand out views of it, from which nothing is read
back from the device), and the value of the timestep the model receives. A request has one clock for each method, which
all denoisers of a pipeline share, so that the second expert of Wan 2.2 continues the count of the first.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel.attention.call import Step
from hf_accel.errors import Interleaved
from hf_accel.hosts.clocks.caller import calling_pipeline, schedule_of
from hf_accel.requests import PerRequest, Request

# Forwards of one step, by guidance and tiles. More of them are first steps of other pictures, as of a model of one step
# that is called again and again; of fewer it is assumed where none of the latents before are held by anybody.
MOST_FORWARDS, MOST_FORGOTTEN = 256, 8


@dataclass
class Announcement:
    """What the pipeline said of the next forward through ``cache_context``."""

    name: str
    step_index: int | None = None
    num_inference_steps: int | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """The entry ``index`` of a schedule, ``[steps]``."""

    schedule: torch.Tensor
    index: int


@dataclass
class Generation:
    """What a clock knows of the generation that runs.

    Attributes:
        schedule: that its timesteps are views of, or that its pipeline goes through; None: unknown.
        first: position of its first step.
        levels: timesteps of its steps so far, as far as they were read.
        prompts: text embeddings that came; the same come back at every step.
        rises: the timesteps of its schedule rise, as an inverse scheduler's do.
    """

    shape: tuple[int, ...]
    schedule: weakref.ref[torch.Tensor] | None
    first: int
    levels: list[float] = field(default_factory=list)
    prompts: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    rises: bool = False

    def knows(self, prompt: torch.Tensor | None) -> bool:
        """Whether a prompt came before in this generation, whole or as a part of another."""
        return prompt is not None and any(_parts_of_one(ref(), prompt) for ref in self.prompts)

    def lost_a_prompt(self) -> bool:
        return any(ref() is None for ref in self.prompts)


class Clock:
    """Counts steps and generations from what the forwards of one request bring.

    A generation begins at the first forward; after :meth:`finish` (the pipeline call ended); with another schedule;
    when the timestep goes back; when the shape of the latents changes and neither schedule nor prompt says that it is
    the same caller still (tiles, guidance that ends midway); when a first step repeats and the prompt of the earlier
    one no longer exists (that call was abandoned); and after a forward that raised.

    Args:
        pipeline: that of the models, asked for its schedule where no pipeline calls.
    """

    def __init__(self, pipeline: weakref.ref | None = None):
        self._pipeline = pipeline
        self._caller: weakref.ref | None = None
        self.announced: Announcement | None = None
        self.generation = -1
        self.run = _Nothing()
        self._step: Step | None = None
        self._now: Generation | None = None
        self._left: Generation | None = None  # that another one followed before its last step
        self._left_at: int | None = None  # its last position
        self._position: int | None = None
        self._calls_in_step = 0
        self._names: set[str] = set()
        self._inputs: list[weakref.ref[torch.Tensor]] = []
        self._checked: tuple[weakref.ref[torch.Tensor], bool] | None = None

    def fork(self, request: Request) -> Clock:
        return Clock(self._pipeline)

    def __deepcopy__(self, memo: dict) -> Clock:
        return Clock(self._pipeline)

    def __getstate__(self) -> dict[str, Any]:
        return {**Clock().__dict__}  # the pipeline is not a part of the model

    @property
    def step(self) -> Step | None:
        """The step of the forward that began last."""
        return self._step

    def finish(self) -> None:
        """The pipeline call ended (or raised): the next forward begins a new generation."""
        self._step = self._left = None

    def begin(
        self,
        timestep: Any,
        latents: torch.Tensor,
        prompt: torch.Tensor | None = None,
        read: bool = False,
        compiled: bool = False,
    ) -> Step:
        """Account for one forward with these arguments and return where it stands.

        Args:
            timestep: as the model receives it: a number or a tensor, or None.
            latents: as the model receives them.
            prompt: the text embedding, if there is one.
            read: the noise level is wanted, which waits for the device; else it is read only where nothing better says
                which step this is.
            compiled: ``latents`` were handed out by a graph, where every forward has an object of its own.

        Raises:
            Interleaved: two generations take turns that nothing but a :class:`~hf_accel.requests.Request` could
                tell apart.
        """
        caller = calling_pipeline()
        self._caller = weakref.ref(caller) if caller is not None else None
        place = self.place_of(timestep)
        needed = timestep is not None and (read or (place is None and self.needs_timestep()))
        level = read_timestep(timestep) if needed else None
        return self.tick(level, tuple(latents.shape), prompt, place, None if compiled else latents)

    def needs_timestep(self) -> bool:
        """False if the pipeline announces step indices, so that the timestep tensor need not be read."""
        return self.announced is None or self.announced.step_index is None

    def place_of(self, timestep: Any) -> Place | None:
        """Where a timestep stands in its schedule, without reading it: it is a view of one element there.

        The schedule is that of the pipeline's scheduler or, in any loop over a one-dimensional tensor that falls or
        rises throughout, that tensor. None for a number, a tensor of its own, or one level per item.
        """
        if not isinstance(timestep, torch.Tensor) or not timestep.numel():
            return None
        if any(stride and size > 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True)):
            return None
        schedule = schedule_of(self._pipeline_now())
        found = _index_in(schedule, timestep) if schedule is not None else None
        if schedule is None or found is None:
            schedule = timestep._base
            if schedule is None or schedule.ndim != 1 or len(schedule) < 2 or not self._is_a_schedule(schedule):
                return None
            found = _index_in(schedule, timestep)
        return Place(schedule, found) if found is not None else None

    def tick(
        self,
        timestep: float | None,
        shape: tuple[int, ...],
        prompt: torch.Tensor | None = None,
        place: Place | None = None,
        latents: torch.Tensor | None = None,
    ) -> Step:
        """As :meth:`begin`, of what was found out about the arguments.

        Args:
            timestep: noise level of this forward; None if it was not read, since one of the better sources speaks.
            shape: of the latents.
            prompt: the text embedding.
            place: see :meth:`place_of`.
            latents: told apart by identity: several in one step are tiles.
        """
        said, previous, now = self.announced, self._step, self._now
        index = said.step_index if said is not None else None
        position = place.index if place is not None else None
        moved_by = position - self._position if position is not None and self._position is not None else None
        self._refuse_turns(timestep, place, moved_by, prompt)
        if previous is None or now is None or self._begins(now, previous, timestep, shape, prompt, place, moved_by):
            now = self._begin(timestep, shape, place)
            previous = None
        name = said.name if said is not None else None
        if previous is None:
            index, moved = (index if index is not None else 0), True
        elif index is not None:
            moved = index != previous.index
        elif position is not None and moved_by is not None:
            # The schedule of a second-order sampler lists its inner calls, so every entry is a step.
            index, moved = position - now.first, moved_by != 0
        else:
            # Second-order samplers call twice at one timestep: a branch that speaks again begins a step.
            moved = timestep != previous.timestep or (name is not None and name in self._names)
            index = previous.index + int(moved)
        self._position = position
        if moved:
            self._calls_in_step, self._names, self._inputs = 0, set(), []
            if timestep is not None:
                now.levels.append(timestep)
        branch = name if name is not None else f"call{self._calls_in_step}"
        self._calls_in_step += 1
        self._names.add(branch)
        if prompt is not None and not any(ref() is prompt for ref in now.prompts):
            now.prompts.append(weakref.ref(prompt))
        count = self._count(now, place)
        level = timestep if timestep is not None else float("nan")
        if count:
            progress = index / count
        elif timestep is not None and now.levels and now.levels[0]:
            progress = min(max(1.0 - timestep / now.levels[0], 0.0), 1.0)
        else:
            progress = 0.0
        self._step = Step(index, count, level, progress, branch, self.generation, self._tile(latents))
        return self._step

    def _begins(
        self,
        now: Generation,
        previous: Step,
        timestep: float | None,
        shape: tuple[int, ...],
        prompt: torch.Tensor | None,
        place: Place | None,
        moved_by: int | None,
    ) -> bool:
        """Whether a forward belongs to another generation than the one before it."""
        announced = self.announced.step_index if self.announced is not None else None
        schedule = place.schedule if place is not None else self._schedule_of_caller()
        if now.schedule is not None and now.schedule() is not schedule:
            return True
        if announced is not None:
            goes_back = announced < previous.index
        elif moved_by is not None:
            goes_back = moved_by < 0
        elif (place is None) != (self._position is None):
            return True  # another pipeline that shares the model and has a scheduler of its own
        else:
            ahead = timestep is None or (timestep >= previous.timestep if now.rises else timestep <= previous.timestep)
            goes_back = not ahead
        if goes_back:
            return True
        if shape != now.shape and announced is None and place is None and not now.knows(prompt):
            return True
        # A call abandoned in its first step leaves a clock that looks like the start of the next one; only its
        # prompt is gone. Later steps are not judged so: some pipelines build the embedding anew every step.
        same = moved_by == 0 if moved_by is not None else timestep in (None, previous.timestep)
        if previous.index or announced not in (None, 0) or not same:
            return False
        crowd = MOST_FORWARDS if self._inputs_live() else MOST_FORGOTTEN
        return self._calls_in_step >= crowd or now.lost_a_prompt()

    def _inputs_live(self) -> bool:
        """Whether any of the latents of this step are still there."""
        return any(ref() is not None for ref in self._inputs)

    def _begin(self, timestep: float | None, shape: tuple[int, ...], place: Place | None) -> Generation:
        last, step = self._now, self._step
        unfinished = last is not None and step is not None and (step.count is None or step.index + 1 < step.count)
        self._left, self._left_at = (last, self._position) if unfinished else (None, None)
        self.generation += 1
        schedule = place.schedule if place is not None else self._schedule_of_caller()
        known = weakref.ref(schedule) if schedule is not None else None
        # Read once per generation, and only where the value of the timestep is all that is known of a step.
        rises = place is None and schedule is not None and bool(schedule[-1] > schedule[0])
        self._now = Generation(shape, known, place.index if place is not None else 0, rises=rises)
        self._names, self._calls_in_step = set(), 0
        return self._now

    def _refuse_turns(
        self, timestep: float | None, place: Place | None, moved_by: int | None, prompt: torch.Tensor | None
    ) -> None:
        """Refuse a forward that goes on with a generation which another one followed: theirs would be mixed.

        Of two loops of which nothing but values is known, the one with its own prompt is told from one that was begun
        anew after it was abandoned.
        """
        left, now, previous = self._left, self._now, self._step
        if left is None or now is None or previous is None or not left.knows(prompt) or now.knows(prompt):
            return
        if place is not None or left.schedule is not None:
            # With a schedule of its own it begins a generation, in which nothing of another's is left.
            mine = place.schedule if place is not None else self._schedule_of_caller()
            if any(ref is None or ref() is not mine for ref in (left.schedule, now.schedule)):
                return
        if place is not None:
            returns = self._left_at is not None and place.index > self._left_at and (moved_by or 0) > 0
        else:
            below = [*left.levels[-1:], previous.timestep]
            returns = timestep is not None and all(timestep < level for level in below)
        if returns:
            self.finish()
            raise Interleaved(
                "hf_accel: two generations take turns on one model in one thread or task, and their forwards cannot be "
                "told apart. Nothing was mixed; both must begin again. Run the forwards of each inside a request of "
                "its own: `a = hf_accel.request(model)`, then `with a: ...` around every forward of the one, and "
                "likewise for the other."
            )

    def _tile(self, latents: torch.Tensor | None) -> int:
        """Which of the inputs of this step these latents are: branches of guidance see the same, tiles do not."""
        if latents is None:
            return 0
        for index, ref in enumerate(self._inputs):
            other = ref()
            if other is latents or (_parts_of_one(other, latents) and _place_in(other) == _place_in(latents)):
                return index
        self._inputs.append(weakref.ref(latents))
        return len(self._inputs) - 1

    def _is_a_schedule(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor falls or rises throughout; read once. Levels drawn for a batch do not."""
        if self._checked is None or self._checked[0]() is not tensor:
            steps = tensor.detach().diff()
            self._checked = weakref.ref(tensor), bool((steps <= 0).all() | (steps >= 0).all())
        return self._checked[1]

    def _pipeline_now(self) -> Any:
        """The pipeline that calls or, where none does, that of the models; None: neither."""
        caller = self._caller() if self._caller is not None else None
        return caller if caller is not None or self._pipeline is None else self._pipeline()

    def _schedule_of_caller(self) -> torch.Tensor | None:
        """What a loop that is no pipeline's goes through is not known by the pipeline of the models."""
        return schedule_of(self._caller()) if self._caller is not None else None

    def _count(self, now: Generation, place: Place | None) -> int | None:
        if self.announced is not None and self.announced.num_inference_steps:
            return int(self.announced.num_inference_steps)
        rest = len(place.schedule) - now.first if place is not None else None
        pipeline = self._pipeline_now()
        schedule = schedule_of(pipeline)
        if pipeline is None or (place is not None and place.schedule is not schedule):
            return rest
        count = getattr(pipeline, "_num_timesteps", None)
        if count is None:
            count = len(schedule) if schedule is not None else None
        if count and rest is not None:
            # The pipeline's own count may be that of an earlier call: another pipeline can share model and scheduler.
            count = min(count, rest)
        return int(count) if count else None


class _Nothing:
    """The statistics of a clock, which counts for others."""

    def merge(self, other: _Nothing) -> None:
        pass


Clocks = PerRequest[Clock]


def clocks(pipeline: weakref.ref | None = None) -> Clocks:
    """The clocks of one method on the denoisers of a pipeline, a clock for each request."""
    return PerRequest(Clock(pipeline))


def _index_in(schedule: torch.Tensor, timestep: torch.Tensor) -> int | None:
    """Which entry of a schedule a tensor is a view of."""
    if timestep.dtype != schedule.dtype or timestep.device != schedule.device or schedule.device.type == "meta":
        return None
    if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    index, odd = divmod(int(timestep.storage_offset() - schedule.storage_offset()), schedule.stride(0) or 1)
    return index if not odd and 0 <= index < len(schedule) else None


def _place_in(view: torch.Tensor | None) -> tuple[Any, ...] | None:
    """Which part of its base a tensor is."""
    return (view.storage_offset(), view.shape, view.stride()) if view is not None else None


def _parts_of_one(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Whether two tensors are one, or parts of one."""
    if one is None:
        return False
    return (one if one._base is None else one._base) is (other if other._base is None else other._base)


def read_timestep(value: Any) -> float:
    """The noise level as a number: of a scalar, a batch of equal values, or per-token values (their maximum).

    Reads the tensor, which waits for the device.
    """
    if isinstance(value, torch.Tensor):
        return float(value.detach().max())
    return float(value)
