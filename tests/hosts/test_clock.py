"""The step clock against the ways in which pipelines call their denoiser."""

from __future__ import annotations

import weakref

import pytest
import torch

from hf_accel.hosts.clock import Announcement, Clock, read_timestep

SHAPE = (1, 4, 3, 8, 8)


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
