"""deepcache on real pipelines, as users call them: several prompts, schedulers, adapters, errors, one after another."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

import hf_accel
import unet_pipelines as pipelines
from hf_accel.api import applied_methods
from hf_accel.errors import Conflict
from hf_accel.patches.deepcache import non_uniform_steps
from unet_pipelines import FAMILIES, STEPS, call, fresh, shared

pytestmark = [
    pytest.mark.filterwarnings("ignore:hf_accel. deepcache with"),  # few steps, for the sake of time
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' Euler and numpy 2
]


@contextlib.contextmanager
def cached(pipe, interval=3, **settings):
    """The pipeline under deepcache; gives its statistics."""
    settings = FAMILIES[getattr(pipe, "family", "sd")].settings | settings
    with hf_accel.apply(pipe, "deepcache", cache_interval=interval, **settings) as applied:
        (entry,) = applied.report().entries
        yield entry.run


def alone(pipe, interval=3, settings=None, **arguments):
    """Result of a call under deepcache that nothing came before."""
    with cached(pipe, interval, **settings or {}):
        return call(pipe, **arguments)


reference = functools.cache(fresh)  # pipelines that expected results come from, whatever stands on the shared ones


@functools.cache
def plain(name, **arguments):
    return call(reference(name), **arguments)


@functools.cache
def first(name, **arguments):
    """Result of a call under deepcache at the settings of :func:`cached`."""
    return alone(reference(name), **arguments)


# -- every family ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_interval_one_is_the_plain_pipeline(name):
    pipe = shared(name)
    with cached(pipe, interval=1) as run:
        assert torch.equal(call(pipe), plain(name))
    assert (run.forwards, run.partial_steps, run.generations) == (STEPS, 0, 1)
    assert not run.dense_calls
    assert torch.equal(call(pipe), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_equal_calls(name):
    pipe = shared(name)
    with cached(pipe) as run:
        once = call(pipe)
        assert run.schedule == [0, 3, 6]
        twice = call(pipe)
    assert run.schedule == [0, 3, 6]
    assert run.generations == 2
    assert run.full_steps == {"first step": 2, "schedule": 4}
    assert (run.forwards, run.partial_steps) == (2 * STEPS, 8)
    assert not run.dense_calls
    assert 0.3 < run.mac_share < 0.9
    assert torch.isfinite(once).all()
    assert not torch.allclose(once, plain(name), atol=1e-3)
    assert torch.equal(once, twice)


# -- one call after another -----------------------------------------------------------------------------------------


def test_prompts_and_step_counts_do_not_leak():
    pipe = shared("sd")
    calls = [
        {"prompt": "a red square"},
        {"prompt": "two blue circles"},
        {"prompt": "two blue circles", "steps": 10},
        {"prompt": "a red square", "steps": 4, "seed": 1},
        {"prompt": "a red square", "height": 24, "width": 16},
    ]
    with cached(pipe) as run:
        outs = [call(pipe, **arguments) for arguments in calls]
    assert run.generations == len(calls)
    for out, arguments in zip(outs, calls, strict=True):
        assert torch.equal(out, first("sd", **arguments))


def test_phase_begins_with_each_strength():
    pipe, schedules = shared("img2img"), []
    with cached(pipe) as run:
        for strength in (1.0, 0.75, 0.5):
            out = call(pipe, steps=8, strength=strength)
            schedules.append(run.schedule)
            assert torch.equal(out, first("img2img", steps=8, strength=strength))
    assert schedules == [[0, 3, 6], [0, 3], [0, 3]]
    assert run.forwards == 8 + 6 + 4


def test_non_uniform_schedule_is_that_of_this_call():
    pipe, settings = shared("img2img"), {"skip_mode": "non_uniform", "center": 4}
    with cached(pipe, **settings) as run:
        for strength, steps in ((1.0, 12), (0.75, 9)):
            call(pipe, steps=12, strength=strength)
            assert run.schedule == non_uniform_steps(steps, 3, 4, 1.4)


class Stop(Exception):
    pass


def stop_at(when):
    """A callback at the end of steps that raises at one."""

    def callback(pipe, step, timestep, values):
        if step == when:
            raise Stop
        return values

    return {"callback_on_step_end": callback}


class BreakAt:
    """A hook that raises in the n-th call of a module."""

    def __init__(self, when):
        self.left = when

    def __call__(self, *_):
        self.left -= 1
        if self.left < 0:
            raise Stop


@pytest.mark.parametrize("when", [0, 1, 3, 4])
@pytest.mark.parametrize(("name", "where"), [("sd", "callback"), ("sd", "U-Net"), ("ddpm", "U-Net")])
def test_after_an_error_the_next_call_is_fresh(name, where, when):
    pipe = shared(name)
    expected = first(name)
    with cached(pipe) as run:
        if where == "callback":
            with pytest.raises(Stop):
                call(pipe, **stop_at(when))
        else:
            hook = pipe.unet.conv_out.register_forward_pre_hook(BreakAt(when))
            with pytest.raises(Stop):
                call(pipe, prompt="two blue circles")
            hook.remove()
        assert torch.equal(call(pipe), expected)
        assert run.generations == 2
        assert run.schedule == [0, 3, 6]


def test_nothing_is_kept_between_calls():
    pipe = shared("sd")
    with hf_accel.apply(pipe, "deepcache", cache_interval=3) as applied:
        call(pipe)
        (_, installation), = applied._installed  # fmt: skip
        assert installation.handle.now().kept_bytes == 0
        assert applied.report().entries[0].run.kept_bytes == 2 * 16 * 4 * 64  # CFG, channels, bytes, pixels


# -- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_off_and_on():
    pipe = shared("sd")
    with cached(pipe) as run:
        off = call(pipe, guidance_scale=1.0)
        on = call(pipe)
    assert torch.equal(off, first("sd", guidance_scale=1.0))
    assert torch.equal(on, first("sd"))
    assert run.forwards == 2 * STEPS


def cut_guidance(when):
    """Guidance for the first steps only, as diffusers' page on callbacks shows."""

    def callback(pipe, step, timestep, values):
        if step == when:
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return values

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


def test_guidance_that_ends_midway():
    """The batch halves, so what is kept belongs to no forward that comes: full at once, and a new phase."""
    pipe = shared("sd")
    without = call(pipe, steps=10, **cut_guidance(4))
    with cached(pipe, interval=1):
        assert torch.equal(call(pipe, steps=10, **cut_guidance(4)), without)
    with cached(pipe) as run:
        outs = [call(pipe, steps=10, **cut_guidance(4)) for _ in range(2)]
        after = call(pipe)
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], without)
    assert torch.equal(after, first("sd"))
    # 0 and 3 of five guided steps, 0 and 3 of five unguided ones; 0, 3 and 6 of the last call
    assert sum(run.full_steps.values()) == 2 * (2 + 2) + 3


# -- base and refiner -----------------------------------------------------------------------------------------------


def test_refiner_takes_over():
    base, refiner = shared("sdxl"), shared("refiner")

    def both():
        latents = call(base, steps=10, denoising_end=0.6)
        return call(refiner, steps=10, denoising_start=0.6, image=latents)

    without = both()
    with cached(base, 1), cached(refiner, 1):
        assert torch.equal(both(), without)
    with cached(base) as first_run, cached(refiner) as second_run:
        outs = [both() for _ in range(2)]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], without)
    assert first_run.forwards == 12
    assert first_run.schedule == [0, 3]
    assert second_run.forwards == 8
    assert second_run.schedule == [0, 3]
    assert first_run.generations == second_run.generations == 2


# -- what else stands on the U-Net ----------------------------------------------------------------------------------


def test_freeu_on_and_off_between_calls():
    pipe = fresh("sd")
    scales = {"s1": 0.8, "s2": 0.3, "b1": 1.3, "b2": 1.5}
    pipe.enable_freeu(**scales)
    freed, freed_plain = alone(pipe), call(pipe)
    pipe.disable_freeu()
    assert not torch.equal(freed, first("sd"))
    with cached(pipe):
        for free in (False, True, True, False):
            if free:
                pipe.enable_freeu(**scales)
            else:
                pipe.disable_freeu()
            assert torch.equal(call(pipe), freed if free else first("sd"))
    pipe.enable_freeu(**scales)
    with cached(pipe, interval=1):
        assert torch.equal(call(pipe), freed_plain)


def lora(pipe, seed=9):
    """Random weights for all attentions, as a LoRA file holds them."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    state = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            state[f"unet.{name}.lora_A.weight"] = draw(2, module.in_features) * 0.3
            state[f"unet.{name}.lora_B.weight"] = draw(module.out_features, 2) * 0.3
    return state


def test_lora_before_and_after():
    pipe = fresh("sd")
    pipe.load_lora_weights(lora(pipe))
    with cached(pipe) as run:
        before, half = call(pipe), call(pipe, cross_attention_kwargs={"scale": 0.5})
        pipe.unload_lora_weights()
        assert torch.equal(call(pipe), first("sd"))
        pipe.load_lora_weights(lora(pipe))
        assert torch.equal(call(pipe), before)
        assert torch.equal(call(pipe, cross_attention_kwargs={"scale": 0.5}), half)
        pipe.fuse_lora()
        fused = call(pipe)
        pipe.unfuse_lora()
        assert torch.allclose(call(pipe), before, atol=1e-3)  # fusing rounds the weights
        pipe.unload_lora_weights()
        assert torch.allclose(call(pipe), first("sd"), atol=1e-3)
    assert run.generations == 8
    assert run.partial_steps == 8 * 4
    assert torch.allclose(fused, before, atol=1e-3)
    for other in (first("sd"), half):
        assert not torch.allclose(before, other, atol=1e-2)


def test_lora_and_full_interval():
    pipe = fresh("sd")
    with cached(pipe, interval=1):
        pipe.load_lora_weights(lora(pipe))
        ours = call(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(ours, call(pipe, cross_attention_kwargs={"scale": 0.5}))
    assert not torch.allclose(ours, plain("sd"), atol=1e-2)


def test_controlnet_is_refused():
    pipe = shared("controlnet")
    before = plain("controlnet")
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    ours = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    ours.set_progress_bar_config(disable=True)
    with hf_accel.apply(ours, "deepcache", cache_interval=3) as applied:
        good = call(ours)
        with pytest.raises(Conflict, match=r"ControlNet residuals.*controlnet='keep'"):
            call(pipe)
        assert torch.equal(call(ours), good)
        run = applied.report().entries[0].run
        assert (run.generations, run.forwards) == (2, 2 * STEPS)
    assert torch.equal(call(pipe), before)


def test_controlnet_kept_where_the_skip_is_computed():
    """Residuals of kept skips are those of the step: another picture in partial steps changes the result."""
    pipe = shared("controlnet")
    with cached(pipe, cache_branch_id=2):
        deep = call(pipe)
    assert not torch.equal(deep, first("controlnet"))
    assert not torch.equal(deep, alone(pipe, settings={"cache_branch_id": 2}, image=pipelines.picture(4)))


def test_t2i_adapter_that_leaves_midway():
    """``adapter_conditioning_factor``: from half of the steps on there are no residuals, which is another forward."""
    pipe = shared("t2i xl")
    with cached(pipe, interval=4) as run:
        half = call(pipe, steps=8, adapter_conditioning_factor=0.625)
    assert run.schedule == [0, 4, 5]
    assert run.full_steps == {"first step": 1, "schedule": 1, "other arguments than the kept step": 1}
    assert not torch.equal(half, alone(pipe, interval=4, steps=8))


def test_ip_adapter_comes_and_goes():
    pipe = fresh("sd")
    images = FAMILIES["ip"].arguments()
    with cached(pipe):
        assert torch.equal(call(pipe), first("sd"))
        weights = pipelines.ip_adapter_weights(pipe.unet)
        pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
        assert torch.equal(call(pipe, **images), first("ip"))
        pipe.set_ip_adapter_scale(0.0)
        assert torch.allclose(call(pipe, **images), first("sd"), atol=1e-3)
        pipe.unload_ip_adapter()
        assert torch.allclose(call(pipe), first("sd"), atol=1e-3)


@pytest.mark.parametrize("applied_first", [True, False])
def test_offloading(applied_first):
    """With the CPU as the accelerator. Pipelines put their hooks on anew at the end of every call."""
    pipe = fresh("sd")
    if not applied_first:
        pipe.enable_model_cpu_offload(device="cpu")
    with cached(pipe) as run:
        if applied_first:
            pipe.enable_model_cpu_offload(device="cpu")
        outs = [call(pipe) for _ in range(2)]
        assert run.generations == 2
        assert run.partial_steps == 8
        if applied_first:
            pipe.remove_all_hooks()
    for out in outs:
        assert torch.equal(out, first("sd"))
    pipe.remove_all_hooks()
    assert torch.equal(call(pipe), plain("sd"))


# -- attention methods on the same U-Net ----------------------------------------------------------------------------

SPARGE = {"block_q": 64, "block_k": 64, "break_even": "off", "dense_steps": 0, "dense_layers": 0}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("order", [("sparge", "deepcache"), ("deepcache", "sparge")])
def test_attention_method_on_the_same_unet(order, compiled):
    """Layers of partial steps are known by their place in the whole network: here the last of six runs in all steps."""
    pipe = fresh("sd")
    settings = {"sparge": SPARGE | {"density": 0.5}, "deepcache": {"cache_interval": 3}}
    size = {"height": 32, "width": 32}  # 256 tokens above, 64 below
    applied = [hf_accel.apply(pipe, name, **settings[name]) for name in order]
    reports = {name: handle.report().entries[0].run for name, handle in zip(order, applied, strict=True)}
    if compiled:
        pipe.unet.compile(backend="eager")
    outs = [call(pipe, **size) for _ in range(2)]
    assert torch.equal(*outs)
    sparse, steps = reports["sparge"], reports["deepcache"]
    assert (steps.partial_steps, sum(steps.full_steps.values()), steps.generations) == (8, 6, 2)
    assert sparse.forwards == 2 * STEPS
    assert sparse.sparse_calls == 2 * (3 * 6 + 4 * 1)
    assert not sparse.dense_calls
    ran = {step: set() for step in range(STEPS)}
    for layer, step in sparse.density_by_layer_and_step():
        ran[step].add(layer)
    assert [ran[step] for step in range(STEPS)] == [{0, 1, 2, 3, 4, 5} if step % 3 == 0 else {5} for step in ran]
    for handle in applied:
        handle.revert()
    if not compiled:
        assert torch.equal(call(pipe), plain("sd"))


def test_attention_method_at_full_density_changes_nothing():
    pipe = shared("sd")
    full = SPARGE | hf_accel.registry.get("sparge").facts.full_budget
    with hf_accel.apply(pipe, "sparge", **full), cached(pipe):
        assert torch.allclose(call(pipe), first("sd"), atol=1e-4)


# -- schedulers -----------------------------------------------------------------------------------------------------

# Name, settings, length of the list for 10 steps: second-order samplers list their inner calls, PNDM repeats a step.
SCHEDULERS = {
    "ddim": (None, {}, 10),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}, 11),
    "euler": (EulerDiscreteScheduler, {}, 10),
    "heun": (HeunDiscreteScheduler, {}, 19),
    "dpm++ 2m karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, 10),
    "dpm++ sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 10),
    "unipc": (UniPCMultistepScheduler, {}, 10),
    "lcm": (LCMScheduler, {}, 10),
}


class Reads(TorchDispatchMode):
    """Counts tensors that are read back into Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def reads_of(module):
    """Counts what is read back inside the calls of a module."""
    reads = Reads()
    before = module.register_forward_pre_hook(lambda *_: reads.__enter__() and None)
    after = module.register_forward_hook(lambda *_: reads.__exit__(None, None, None), always_call=True)
    yield reads
    before.remove()
    after.remove()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_entry_of_a_schedule_is_a_step(scheduler):
    cls, settings, entries = SCHEDULERS[scheduler]
    pipe = StableDiffusionPipeline.from_pipe(shared("sd"))
    pipe.set_progress_bar_config(disable=True)
    if cls is not None:
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **settings)
    without = call(pipe, steps=10)
    with cached(pipe, interval=1):
        assert torch.equal(call(pipe, steps=10), without)
    with cached(pipe) as run, reads_of(pipe.unet) as reads:
        outs = [call(pipe, steps=10) for _ in range(2)]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], without)
    assert reads.count == 0
    assert run.schedule == list(range(0, entries, 3))
    assert run.forwards == 2 * entries
    assert run.generations == 2


def test_reads_are_seen():
    """The count above can fail: a gap in timesteps has to be read."""
    pipe = shared("sd")
    with cached(pipe, max_timestep_gap=400), reads_of(pipe.unet) as reads:
        call(pipe)
    assert reads.count == STEPS


def test_scheduler_swapped_between_calls():
    pipe = StableDiffusionPipeline.from_pipe(shared("sd"))
    pipe.set_progress_bar_config(disable=True)
    ddim, euler = pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with cached(pipe) as run:
        for scheduler in (ddim, euler, ddim):
            pipe.scheduler = scheduler
            call(pipe)
            assert run.schedule == [0, 3, 6]
        assert torch.equal(call(pipe), first("sd"))
    assert run.generations == 4


# -- compiled, copied, shared ---------------------------------------------------------------------------------------


class Graphs:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("how", ["wrapped", "in place", "wrapped before"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "svd"])
def test_two_graphs(name, how):
    torch._dynamo.reset()
    pipe, graphs = fresh(name), Graphs()
    if how == "wrapped before":
        pipe.unet = torch.compile(pipe.unet, backend=graphs)
    with cached(pipe) as run:
        if how == "wrapped":
            pipe.unet = torch.compile(pipe.unet, backend=graphs)
        elif how == "in place":
            pipe.unet.compile(backend=graphs)
        outs = [call(pipe) for _ in range(2)]
        assert graphs.count == 2
    for out in outs:
        assert torch.allclose(out, first(name), atol=1e-4)
    assert (run.generations, run.partial_steps) == (2, 8)


@pytest.mark.parametrize("name", ["sd", "svd"])
def test_copy_of_the_unet(name):
    pipe = fresh(name)
    with cached(pipe) as run:
        call(pipe, **({"prompt": "two blue circles"} if FAMILIES[name].prompted else {"seed": 1}))
        original, pipe.unet = pipe.unet, copy.deepcopy(pipe.unet)
        assert torch.equal(call(pipe), first(name))
        assert run.generations == 1  # the copy has statistics of its own
        assert applied_methods(pipe) == [("unet", "deepcache")]
        hf_accel.revert(pipe)
        assert torch.equal(call(pipe), plain(name))
        pipe.unet = original
        assert torch.equal(call(pipe), first(name))
        assert run.generations == 2


@pytest.mark.parametrize("own_scheduler", [False, True])
def test_pipelines_that_share_a_unet(own_scheduler):
    text = StableDiffusionPipeline.from_pipe(shared("sd"))
    image = StableDiffusionImg2ImgPipeline.from_pipe(text)
    image.family = "img2img"
    for pipe in (text, image):
        pipe.set_progress_bar_config(disable=True)
    if own_scheduler:
        image.scheduler = copy.deepcopy(image.scheduler)
    expected = alone(image, strength=0.75, steps=8)
    with cached(text) as run:
        for _ in range(2):
            assert torch.equal(call(text), first("sd"))
            assert torch.equal(call(image, strength=0.75, steps=8), expected)
            assert run.schedule == [0, 3]
        with pytest.raises(Stop):
            call(text, **stop_at(0))
        assert torch.equal(call(image, strength=0.75, steps=8), expected)
    assert run.generations == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last(dtype):
    pipe = fresh("sd").to(dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    without = call(pipe)
    with cached(pipe, interval=1):
        assert torch.equal(call(pipe), without)
    with cached(pipe) as run:
        outs = [call(pipe) for _ in range(2)]
    assert outs[0].dtype == dtype
    assert torch.isfinite(outs[0]).all()
    assert torch.equal(*outs)
    assert run.kept_bytes == 2 * 16 * 2 * 64


def test_few_steps_warn_once_a_call():
    pipe = shared("sd")
    with cached(pipe), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(pipe, steps=4)
        call(pipe, steps=10)
    assert [str(w.message)[:30] for w in caught if "deepcache" in str(w.message)] == ["hf_accel: deepcache with 4 ste"]


def test_schedule_length():
    """ceil(steps / interval) full steps, whatever does not divide."""
    pipe = shared("sd")
    for interval in (2, 4, 5):
        with cached(pipe, interval) as run:
            call(pipe, steps=9)
        assert len(run.schedule) == math.ceil(9 / interval)
        assert run.mac_share < 1
