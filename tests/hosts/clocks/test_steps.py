"""The step clock against the ways in which pipelines call their denoiser."""

from __future__ import annotations

import copy
import pickle
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch

from hf_accel.errors import Interleaved
from hf_accel.hosts.clocks import steps as step_clock
from hf_accel.hosts.clocks.steps import Announcement, Clock, read_timestep
from hf_accel.requests import Request

SHAPE = (1, 4, 3, 8, 8)


class Scheduled:
    """A pipeline, as far as the clock looks at it."""

    def __init__(self, timesteps=None, scheduler=None):
        self.scheduler = scheduler if scheduler is not None else SimpleNamespace(timesteps=timesteps)


def drive(clock: Clock, timesteps, branches=1, names=(), prompts=()):
    """One generation; returns (step index, branch, generation) of every forward."""
    seen = []
    for timestep in timesteps:
        for branch in range(branches):
            clock.announced = Announcement(names[branch]) if names else None
            step = clock.tick(timestep, SHAPE, prompts[branch] if prompts else None)
            clock.announced = None
            seen.append((step.index, step.branch, step.generation))
    return seen


def test_two_passes_count_as_one_step():
    assert drive(Clock(), [900.0, 500.0], branches=2) == [
        (0, "call0", 0),
        (0, "call1", 0),
        (1, "call0", 0),
        (1, "call1", 0),
    ]


def test_named_branches_keep_their_names():
    seen = drive(Clock(), [900.0, 500.0], branches=2, names=("cond", "uncond"))
    assert [branch for _, branch, _ in seen] == ["cond", "uncond", "cond", "uncond"]
    assert [index for index, _, _ in seen] == [0, 0, 1, 1]


def test_rising_timestep_begins_a_generation():
    clock = Clock()
    drive(clock, [667.0, 334.0, 1.0])
    assert drive(clock, [667.0, 334.0])[0] == (0, "call0", 1)


def test_other_step_count_on_the_second_call():
    clock = Clock()
    drive(clock, [900.0, 600.0, 300.0])
    assert [s[0] for s in drive(clock, [999.0, 750.0, 500.0, 250.0])] == [0, 1, 2, 3]


def test_end_of_the_pipeline_call_begins_a_generation_even_at_the_same_timestep():
    clock = Clock()
    drive(clock, [999.0])
    clock.finish()
    assert drive(clock, [999.0]) == [(0, "call0", 1)]


def test_other_shape_begins_a_generation():
    clock = Clock()
    clock.tick(500.0, SHAPE)
    assert clock.tick(500.0, (1, 4, 3, 16, 16)).generation == 1


def test_abandoned_first_step_is_noticed_by_its_prompt():
    clock = Clock()
    first = [torch.zeros(1), torch.zeros(1)]
    drive(clock, [999.0], branches=2, prompts=first)
    first.clear()  # the call raised: its frame and prompt are gone
    second = [torch.zeros(1), torch.zeros(1)]
    assert drive(clock, [999.0, 500.0], branches=2, prompts=second) == [
        (0, "call0", 1),
        (0, "call1", 1),
        (1, "call0", 1),
        (1, "call1", 1),
    ]


def test_prompts_made_anew_every_step_do_not_restart_later_steps():
    clock = Clock()
    generations = [clock.tick(t, SHAPE, torch.zeros(1)).generation for t in (900.0, 600.0, 600.0, 300.0)]
    assert generations == [0, 0, 0, 0]


def test_repeated_name_at_one_timestep_is_a_second_order_step():
    clock = Clock()
    seen = drive(clock, [900.0, 500.0, 500.0], branches=2, names=("cond", "uncond"))
    assert [index for index, _, _ in seen] == [0, 0, 1, 1, 2, 2]


def test_announced_step_and_count_win_and_spare_the_read():
    clock = Clock()
    clock.announced = Announcement("cond", step_index=3, num_inference_steps=12)
    assert not clock.needs_timestep()
    step = clock.tick(None, SHAPE)
    assert (step.index, step.count, step.progress) == (3, 12, 0.25)
    clock.announced = Announcement("cond", step_index=0, num_inference_steps=12)
    assert clock.tick(None, SHAPE).generation == 1


def test_count_comes_from_the_pipeline_and_follows_it():
    class Pipeline:
        _num_timesteps = 10

    pipeline = Pipeline()
    clock = Clock(weakref.ref(pipeline))
    assert clock.tick(900.0, SHAPE).count == 10
    pipeline._num_timesteps = 4
    assert clock.tick(999.0, SHAPE).count == 4


def test_progress_without_a_count_follows_the_timestep():
    clock = Clock()
    clock.tick(1000.0, SHAPE)
    assert clock.tick(750.0, SHAPE).progress == pytest.approx(0.25)


@pytest.mark.parametrize("value", [500, torch.tensor(500), torch.tensor([500.0, 500.0]), torch.tensor([[0.0, 500.0]])])
def test_timesteps_of_every_form(value):
    assert read_timestep(value) == 500.0


# -- places in the scheduler's own tensor ---------------------------------------------------------------------------


def place(timesteps, timestep):
    """Where a timestep stands in the schedule of a pipeline; None: nowhere there."""
    pipeline = Scheduled(timesteps)
    found = Clock(weakref.ref(pipeline)).place_of(timestep)
    return found.index if found is not None and found.schedule is timesteps else None


def test_views_of_the_schedule_have_a_place():
    schedule = torch.tensor([900, 600, 600, 300])
    for index, timestep in enumerate(schedule):
        assert place(schedule, timestep) == index
        assert place(schedule, timestep[None]) == index
        assert place(schedule, timestep.expand(4)) == index
        assert place(schedule, timestep.view(1, 1).expand(2, 3)) == index
        assert place(schedule, schedule[index : index + 1]) == index
        assert place(schedule, timestep.detach()) == index
    assert place(schedule, schedule[::2][1]) == 2
    assert place(schedule, schedule.flip(0)[0]) is None  # a copy


def test_a_schedule_that_is_itself_a_view():
    base = torch.arange(1000.0, 0.0, -100.0)
    for start, step in ((0, 2), (3, 1), (1, 3)):
        schedule = base[start::step]
        for index, timestep in enumerate(schedule):
            assert place(schedule, timestep) == index
    assert place(base[::2], base[1]) is None  # between two entries
    assert place(base[3:], base[2]) is None  # in front of it
    assert place(base[:3], base[3]) is None  # behind it


@pytest.mark.parametrize(
    "timestep",
    [
        600,
        600.0,
        None,
        torch.tensor(600),
        torch.tensor([600, 600]),
        torch.empty(0, dtype=torch.long),
    ],
)
def test_what_is_no_view_of_the_schedule_has_no_place(timestep):
    assert place(torch.tensor([900, 600, 300]), timestep) is None


def test_copies_and_several_entries_have_no_place():
    schedule = torch.tensor([900, 600, 300])
    for timestep in (
        schedule[1].clone(),
        schedule[1].float(),
        schedule[1].repeat(2),
        schedule[:2],
        schedule[0].to("meta"),
    ):
        assert place(schedule, timestep) is None


def test_without_a_schedule_nothing_has_a_place():
    timestep = torch.tensor([900])[0]
    assert Clock().place_of(timestep) is None
    for timesteps in (None, [900], torch.tensor(900), torch.empty(0), torch.ones(2, 2)):
        assert place(timesteps, timestep) is None
    pipeline = Scheduled(torch.tensor([900]))
    clock = Clock(weakref.ref(pipeline))
    timestep = pipeline.scheduler.timesteps[0]
    assert clock.place_of(timestep).index == 0
    del pipeline
    assert clock.place_of(timestep) is None


def go_through(clock, scheduler, steps, branches=1):
    scheduler.set_timesteps(steps)
    seen = []
    for timestep in scheduler.timesteps:
        for _ in range(branches):
            step = clock.tick(None, SHAPE, None, clock.place_of(timestep))
            seen.append((step.index, step.branch, step.generation, step.count))
    return seen


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # schedulers of diffusers, with numpy 2
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("branches", [1, 2])
def test_every_entry_is_a_step_also_where_timesteps_repeat(name, branches):
    scheduler = getattr(diffusers, name)()
    pipeline = Scheduled(scheduler=scheduler)
    clock = Clock(weakref.ref(pipeline))
    for generation, steps in enumerate((5, 8, 8)):
        seen = go_through(clock, scheduler, steps, branches)
        count = len(scheduler.timesteps)
        assert seen == [(i, f"call{b}", generation, count) for i in range(count) for b in range(branches)]
        if name in ("PNDMScheduler", "HeunDiscreteScheduler"):
            assert len(set(scheduler.timesteps.tolist())) < count


def test_a_schedule_set_anew_begins_a_generation_whatever_the_timestep():
    scheduler = diffusers.DDIMScheduler()
    pipeline = Scheduled(scheduler=scheduler)
    clock = Clock(weakref.ref(pipeline))
    scheduler.set_timesteps(4)
    first = clock.tick(None, SHAPE, None, clock.place_of(scheduler.timesteps[0]))
    scheduler.set_timesteps(4)
    again = clock.tick(None, SHAPE, None, clock.place_of(scheduler.timesteps[1]))
    assert (first.generation, again.generation, again.index) == (0, 1, 0)
    assert again.branch == "call0"


def test_a_run_that_begins_inside_of_the_schedule_counts_from_there():
    """Image to image at strength 0.5, and refiners, pass a part of the schedule."""
    scheduler = diffusers.DDIMScheduler()
    pipeline = Scheduled(scheduler=scheduler)
    clock = Clock(weakref.ref(pipeline))
    scheduler.set_timesteps(6)
    places = [clock.place_of(timestep) for timestep in scheduler.timesteps[3:]]
    assert [place.index for place in places] == [3, 4, 5]
    assert [clock.tick(None, SHAPE, None, p).index for p in places] == [0, 1, 2]
    earlier = clock.tick(None, SHAPE, None, clock.place_of(scheduler.timesteps[2]))
    assert (earlier.generation, earlier.index) == (1, 0)


def test_a_skipped_entry_is_a_skipped_step():
    schedule = torch.tensor([900, 600, 300])
    pipeline = Scheduled(schedule)
    clock = Clock(weakref.ref(pipeline))
    assert [clock.tick(None, SHAPE, None, clock.place_of(schedule[i])).index for i in (0, 2)] == [0, 2]


# -- loops without a pipeline ---------------------------------------------------------------------------------------


def loop(clock, timesteps, latents=None, prompt=None):
    """(index, generation, count) of a loop over timesteps, as a model sees it."""
    latents = torch.zeros(SHAPE) if latents is None else latents
    return [(s.index, s.generation, s.count) for s in (clock.begin(t, latents, prompt) for t in timesteps)]


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t[None], lambda t: t.expand(2)])
def test_a_schedule_is_known_by_its_own_entries(form, monkeypatch):
    monkeypatch.setattr(step_clock, "read_timestep", lambda value: pytest.fail("a timestep was read"))
    schedule, clock = torch.tensor([900.0, 600.0, 300.0]), Clock()
    assert loop(clock, map(form, schedule)) == [(0, 0, 3), (1, 0, 3), (2, 0, 3)]
    assert loop(clock, map(form, schedule[1:])) == [(0, 1, 2), (1, 1, 2)]


def test_an_inverse_scheduler_goes_up():
    scheduler = diffusers.DDIMInverseScheduler()
    scheduler.set_timesteps(5)
    assert [step[:2] for step in loop(Clock(), scheduler.timesteps)] == [(i, 0) for i in range(5)]


def test_levels_drawn_for_a_batch_are_no_schedule():
    drawn = torch.tensor([300.0, 900.0, 600.0])
    assert Clock().place_of(drawn[1]) is None
    assert Clock().place_of(drawn[1:2]) is None


def test_tiles_of_unequal_size_are_one_step():
    schedule, clock, picture = torch.tensor([900.0, 600.0]), Clock(), torch.zeros(1, 4, 16, 24)
    seen = []
    for timestep in schedule:
        for tile in (picture[..., :12], picture[..., 12:], picture[..., 20:].clone()):
            step = clock.begin(timestep, tile)
            seen.append((step.index, step.generation, step.branch, step.tile))
    assert seen == [(i, 0, f"call{k}", k) for i in (0, 1) for k in (0, 1, 2)]


def test_guidance_branches_see_one_input():
    clock, latents = Clock(), torch.zeros(SHAPE)
    for timestep in torch.tensor([900.0, 600.0]):
        assert [clock.begin(timestep, latents, torch.zeros(1)).tile for _ in range(3)] == [0, 0, 0]


def test_guidance_that_ends_midway_goes_on_by_schedule_and_by_prompt():
    both = torch.zeros(2, 5, 8)
    for timesteps in (torch.tensor([900.0, 600.0, 300.0]), (900.0, 600.0, 300.0)):
        clock = Clock()
        given = [(torch.zeros(2, *SHAPE[1:]), both), (torch.zeros(SHAPE), both[1:]), (torch.zeros(SHAPE), both[1:])]
        seen = [clock.begin(t, x, p) for t, (x, p) in zip(timesteps, given, strict=True)]
        assert [(step.index, step.generation) for step in seen] == [(0, 0), (1, 0), (2, 0)]


def test_another_pipeline_that_calls_is_found_on_the_stack():
    """The pipeline of the models may be gone, or have another schedule."""

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self, steps):
            self.scheduler.set_timesteps(steps)
            levels = [t * 1.0 for t in self.scheduler.timesteps]  # not views: of these only the value is known
            return loop(self.clock, levels)

    for scheduler in (diffusers.DDIMScheduler(), diffusers.DDIMInverseScheduler()):
        pipe = Pipeline(scheduler)
        pipe.clock = Clock(weakref.ref(Scheduled(torch.tensor([1.0]))))
        assert pipe(4) == [(i, 0, 4) for i in range(4)]
        assert pipe(3) == [(i, 1, 3) for i in range(3)]


# -- turns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one schedule", "values"])
def test_a_generation_that_another_followed_does_not_go_on(kind):
    one = torch.tensor([900.0, 800.0, 700.0, 600.0])
    other = one = one.tolist() if kind == "values" else one
    clock, latents, prompts = Clock(), torch.zeros(SHAPE), [torch.zeros(1), torch.zeros(1)]
    for timestep, prompt in ((one[0], 0), (one[1], 0), (other[0], 1)):
        clock.begin(timestep, latents, prompts[prompt])
    with pytest.raises(Interleaved, match=r"hf_accel\.request\(model\)"):
        clock.begin(one[2], latents, prompts[0])
    assert [step[:2] for step in loop(clock, other)] == [(i, 2) for i in range(4)]


@pytest.mark.parametrize("kind", ["schedules", "one schedule", "values"])
def test_an_abandoned_generation_does_not_stand_in_the_way(kind):
    schedule = torch.tensor([900.0, 800.0, 700.0, 600.0])
    clock = Clock()
    loop(clock, (schedule if kind != "values" else schedule.tolist())[:2])
    again = {"schedules": schedule.clone(), "one schedule": schedule, "values": schedule.tolist()}[kind]
    assert [step[:2] for step in loop(clock, again)] == [(i, 1) for i in range(4)]
    assert [step[:2] for step in loop(clock, [900.0, 300.0])] == [(0, 2), (1, 2)]


def test_a_fork_knows_nothing_of_the_generation_that_runs():
    pipeline = Scheduled(torch.tensor([900.0, 600.0]))
    clock = Clock(weakref.ref(pipeline))
    clock.begin(900.0, torch.zeros(SHAPE))
    for twin in (clock.fork(Request()), copy.deepcopy(clock), pickle.loads(pickle.dumps(clock))):
        assert twin.step is None
        assert twin.begin(300.0, torch.zeros(SHAPE)).index == 0


def test_half_as_many_steps_after_an_abort_are_no_turns():
    clock, latents, prompt = Clock(), torch.zeros(SHAPE), torch.zeros(1)
    loop(clock, torch.linspace(1, 0.02, 50).tolist()[:2], latents, prompt)
    assert [step[:2] for step in loop(clock, torch.linspace(1, 0.04, 25).tolist(), latents, prompt)] == [
        (i, 1) for i in range(25)
    ]


def test_another_picture_at_a_higher_level_is_no_inversion():
    clock, prompt = Clock(), torch.zeros(1)
    assert [clock.begin(t, torch.zeros(SHAPE), prompt).generation for t in (499.0, 999.0, 799.0)] == [0, 1, 1]


def test_a_model_of_one_step_called_again_and_again_is_not_one_step_for_ever():
    clock, prompt = Clock(), torch.zeros(1)
    seen = [clock.begin(999.0, torch.zeros(SHAPE), prompt) for _ in range(40)]
    assert max(step.tile for step in seen) < 8
    assert seen[-1].generation == 4
    held = [torch.zeros(SHAPE) for _ in range(40)]  # tiles that somebody holds are one picture
    clock = Clock()
    assert {clock.begin(t, x, prompt).generation for t in (999.0, 500.0) for x in held} == {0}
