"""Requests: what belongs to whom, what is dropped when, and that counters add up."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import itertools
import threading
import time
import weakref

import pytest
import torch

import hf_accel
from hf_accel import requests
from hf_accel.errors import Interleaved, NotApplicable
from hf_accel.requests import PerRequest, Request, by_key, current, its_own_request
from hf_accel.testing.checks.turns import by_turns, in_tasks, in_threads
from hf_accel.testing.models import tiny


class Count:
    def __init__(self, value=0):
        self.value = value

    def merge(self, other):
        self.value += other.value


class Part:
    def __init__(self):
        self.run, self.seen = Count(), []

    def fork(self, request):
        return Part()

    def step(self, what):
        self.run.value += 1
        self.seen.append(what)


def in_a_thread(function):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# -- whose forward it is -------------------------------------------------------------------------------------------


def test_one_caller_is_one_request_and_threads_and_tasks_are_others():
    mine = current()
    assert current() is mine
    assert in_a_thread(current) is not mine

    async def twice():
        first = current()
        await asyncio.sleep(0)
        return first, current(), await asyncio.to_thread(current)

    async def two_tasks():
        return await asyncio.gather(twice(), twice())

    (a, again, elsewhere), (b, _, _) = asyncio.run(two_tasks())
    assert a is again
    assert len({mine, a, b, elsewhere}) == 4


def test_an_opened_request_wins_and_goes_along_into_threads_of_asyncio():
    request = hf_accel.request(name="chat")
    assert "chat" in repr(request)
    with request:
        assert current() is request
        with hf_accel.request() as inner:
            assert current() is inner
        with request:
            assert current() is request
        assert current() is request
    assert current() is not request

    async def serve():
        with hf_accel.request() as mine:
            return await asyncio.to_thread(current) is mine

    assert asyncio.run(serve())


def test_one_request_may_be_entered_in_several_threads():
    request = Request()

    def enter():
        with request:
            return current() is request

    with request:
        assert in_a_thread(enter)
    assert current() is not request


def test_a_function_may_be_a_request_of_its_own():
    @its_own_request
    def generate():
        return current()

    assert generate() is not generate()
    with hf_accel.request() as mine:
        assert generate() is mine


def test_what_is_no_model_is_refused():
    with pytest.raises(NotApplicable, match="Load the model first"):
        hf_accel.request("wan")


# -- what is kept --------------------------------------------------------------------------------------------------


def test_parts_are_made_once_dropped_with_their_request_and_counted_for_ever():
    parts = PerRequest(Part())
    assert by_key(parts.key) is parts
    parts.now().step("mine")
    request = Request()
    with request:
        parts.now().step("other")
        theirs = weakref.ref(parts.now())
    assert parts.now().seen == ["mine"]
    assert parts.of(request).seen == ["other"]
    assert parts.of(Request()) is None
    assert parts.total().value == 2
    assert len(parts.all()) == 3
    del request
    gc.collect()
    assert theirs() is None
    assert parts.total().value == 2
    in_a_thread(lambda: parts.now().step("a thread"))
    assert parts.total().value == 3
    assert len(parts.all()) == 2


def test_the_statistics_of_a_single_caller_are_there_before_it_begins():
    parts = PerRequest(Part())
    run = parts.total()
    parts.now().step("first")
    assert run.value == 1


def test_a_copy_has_the_counters_and_no_request():
    parts = PerRequest(Part())
    parts.now().step("before")
    twin = copy.deepcopy(parts)
    assert twin.now().seen == []
    twin.now().step("after")
    assert (parts.total().value, twin.total().value) == (1, 2)
    assert twin.key != parts.key


def test_many_threads_at_once_lose_no_count():
    parts = PerRequest(Part())
    ready = threading.Barrier(8)

    def work():
        ready.wait()
        for _ in range(500):
            parts.now().step(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert parts.total().value == 8 * 500


def test_nothing_is_held_for_threads_that_ended():
    model = tiny.build("unet")
    with hf_accel.apply(model, "deepcache", cache_interval=3) as applied:
        seams = applied._installed[0][1].handle
        for seed in range(6):
            in_a_thread(lambda seed=seed: [tiny.run(model, "unet", timestep=t, seed=seed) for t in (900.0, 600.0)])
        gc.collect()
        assert len(seams.all()) == 1
        assert applied.stats()["model"]["deepcache"]["forwards"] == 12


def test_views_of_a_network_are_handed_on_from_call_to_call():
    """Compiled code belongs to them."""
    model = tiny.build("unet")
    seen = set()
    with hf_accel.apply(model, "deepcache") as applied, torch.no_grad():
        for _ in range(4):
            with hf_accel.request():
                tiny.run(model, "unet")
                seen.add(applied._installed[0][1].handle.now()._views)
                model._reset_stateful_cache()
    assert len(seen) == 1


# -- on models -----------------------------------------------------------------------------------------------------


def steps(model, seed, timesteps=(900.0, 600.0, 300.0, 100.0)):
    inputs = tiny.TINY["unet"].inputs(model, seed=seed)

    def one(timestep):
        with torch.no_grad():
            return model(**inputs | {"timestep": timestep}, return_dict=False)[0]

    return [lambda t=t: one(t) for t in timesteps]


def same(ours, theirs):
    """Whether two lists of runs, each a list of outputs, are equal to the bit."""
    pairs = (zip(run, other, strict=True) for run, other in zip(ours, theirs, strict=True))
    return all(torch.equal(a, b) for pair in pairs for a, b in pair)


def test_the_baton_makes_forwards_alternate():
    model, order = tiny.build("unet"), []
    model.register_forward_pre_hook(lambda *_: order.append(threading.get_ident()))
    in_threads(model, [lambda s=s: [step() for step in steps(model, s)] for s in (0, 1)])
    assert len(order) == 8
    assert len(set(order)) == 2
    assert sum(a != b for a, b in itertools.pairwise(order)) >= 6


def test_an_error_of_a_run_comes_out_of_the_turns():
    model = tiny.build("unet")

    def fail():
        raise LookupError("of this run")

    with pytest.raises(LookupError, match="of this run"):
        in_threads(model, [fail, lambda: [step() for step in steps(model, 0)]])


def test_without_requests_of_their_own_they_would_meet(monkeypatch):
    """What the kit's promise is worth: with one state for all, its check fails."""
    model = tiny.build("unet")
    with hf_accel.apply(model, "deepcache", cache_interval=2):
        runs = [steps(model, 0), steps(model, 1, (850.0, 600.0, 300.0, 100.0))]
        alone = [[step() for step in run] for run in runs]
        monkeypatch.setattr(requests, "current", lambda: ONLY)
        together = in_threads(model, [lambda run=run: [step() for step in run] for run in runs])
    assert not same(together, alone)


ONLY = Request("of all")


def test_a_request_can_be_asked_for_its_part():
    model = tiny.build("wan")
    one, other = hf_accel.request(model, name="one"), hf_accel.request(model)
    with hf_accel.apply(model, "sparge", topk=0.5) as applied, torch.no_grad():
        with one:
            tiny.run(model, "wan", timestep=900.0)
        for timestep in (900.0, 600.0):
            with other:
                tiny.run(model, "wan", timestep=timestep)
        forwards = [applied.stats(r)["model"]["sparge"]["forwards"] for r in (one, other, None)]
        assert forwards == [1, 2, 3]
        assert "1 forwards in 1 generations" in str(applied.report(one))
        assert repr(one) in str(applied.report(one))
        assert applied.report(one).to_dict()["entries"][0]["run"]["forwards"] == 1
        assert "it never ran here" in str(applied.report(Request()))
        assert applied.stats(Request()) == {"model": {"sparge": {}}}


def test_loops_that_take_turns_without_requests_are_refused_before_anything_is_mixed():
    model = tiny.build("unet")
    levels = (900.0, 800.0, 700.0, 600.0)
    with hf_accel.apply(model, "deepcache", cache_interval=4):
        one, other = steps(model, 0, levels), steps(model, 1, levels)
        one[0](), one[1](), other[0]()
        with pytest.raises(Interleaved, match=r"hf_accel\.request\(model\)"):
            one[2]()
        alone = [step() for step in other]  # what follows begins anew
    with hf_accel.apply(model, "deepcache", cache_interval=4):
        assert all(torch.equal(a, b) for a, b in zip(alone, [step() for step in other], strict=True))


def test_loops_over_schedules_of_their_own_are_never_mixed():
    from diffusers import DDIMScheduler

    model = tiny.build("unet")
    loops = []
    for seed in (0, 1):
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(5)
        loops.append(steps(model, seed, list(scheduler.timesteps)))
    with hf_accel.apply(model, "deepcache") as applied:
        for step in (0, 1, 2):
            loops[0][step](), loops[1][step]()
        assert applied.stats()["model"]["deepcache"]["partial_steps"] == 0  # every turn begins anew: nothing is mixed
        found = by_turns([hf_accel.request(model), hf_accel.request(model)], loops)
        alone = [[step() for step in loop] for loop in loops]
    assert same(found, alone)


def test_runs_that_begin_at_different_times_in_tasks():
    model = tiny.build("unet")
    runs = [steps(model, 0), steps(model, 1, (700.0, 500.0))]
    with hf_accel.apply(model, "deepcache", cache_interval=2):
        alone = [[step() for step in run] for run in runs]
        found = in_tasks(runs)
    assert same(found, alone)


def test_one_request_in_two_threads_at_once_is_refused():
    model, request = tiny.build("wan"), Request()

    def work(seed):
        with request, torch.no_grad():
            return [tiny.run(model, "wan", timestep=t, seed=seed) for t in (900.0, 600.0)]

    def meet(*_):
        inside.wait(timeout=30)

    for method, settings in (("sparge", {"topk": 0.5}), ("dense", {})):
        inside = threading.Barrier(2)
        with hf_accel.apply(model, method, **settings):
            hook = model.blocks[0].register_forward_pre_hook(meet)
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                first = pool.submit(work, 0)
                while not inside.n_waiting:
                    time.sleep(0.01)
                with pytest.raises(Interleaved, match="in each thread"):
                    pool.submit(work, 1).result()
                hook.remove()
                inside.abort()
                with pytest.raises(threading.BrokenBarrierError):
                    first.result()
            work(0)  # what came out of it is whole
