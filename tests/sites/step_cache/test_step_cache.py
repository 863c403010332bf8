"""The step-cache site on a U-Net: what stands on a model, what is left after errors, and others' changes around it."""

from __future__ import annotations

import copy
import functools
import inspect

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import hf_accel
from hf_accel.errors import Conflict, NotApplicable, RevertRefused
from hf_accel.hosts.clocks import steps
from hf_accel.testing.models import tiny

LEVELS = (900.0, 700.0, 500.0, 300.0)


@pytest.fixture
def unet():
    return tiny.build("unet")


@torch.no_grad()
def denoise(model, levels=LEVELS, seed=0):
    return [tiny.run(model, "unet", timestep=level, seed=seed) for level in levels]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def own(model):
    """What stands on the instance itself, by identity."""
    return {k: id(v) for k, v in model.__dict__.items() if not k.startswith("_") or "hf_accel" in k or k == "_hf_hook"}


def run_of(applied):
    return applied.report().entries[0].run


def context_of(applied):
    return applied._installed[0][1].handle.now()


def test_the_override_has_the_signature_and_the_errors_of_the_model(unet):
    plain = inspect.signature(unet.forward)
    inputs = tiny.TINY["unet"].inputs(unet)
    with hf_accel.apply(unet, "deepcache"), torch.no_grad():
        assert inspect.signature(unet.forward) == plain
        with pytest.raises(TypeError, match="timestep"):
            unet(sample=inputs["sample"])
        with pytest.raises(TypeError, match="positional arguments"):
            unet(*range(30))
        with pytest.raises(TypeError, match="nonsense"):
            unet(**inputs, nonsense=1)
        by_name = unet(**inputs)
        by_place = unet(*inputs.values(), return_dict=False)
    assert type(by_name).__name__ == "UNet2DConditionOutput"
    assert torch.equal(by_name.sample, by_place[0])


# -- accelerate ----------------------------------------------------------------------------------------------------


class Counting(ModelHook):
    """Stands for offloading: an outer call around the forward."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


ORDERS = (
    "hook apply revert remove",
    "hook apply remove revert",
    "apply hook revert remove",
    "apply hook remove revert",
)


@pytest.mark.parametrize("order", ORDERS)
def test_accelerate_hooks_on_the_model_come_and_go_in_any_order(unet, order):
    before, plain = own(unet), denoise(unet)
    with hf_accel.apply(unet, "deepcache"):
        cached = denoise(unet)
    assert not equal(cached, plain)
    hook, applied = Counting(), None
    for act in order.split():
        if act == "hook":
            add_hook_to_module(unet, hook)
        elif act == "remove":
            remove_hook_from_module(unet)
        elif act == "apply":
            applied = hf_accel.apply(unet, "deepcache")
        else:
            applied.revert()
        hooked, calls = hasattr(unet, "_hf_hook"), hook.calls
        assert equal(denoise(unet), cached if applied is not None and applied.active else plain), act
        assert hook.calls - calls == hooked * len(LEVELS), act
    after = own(unet)
    left = after.pop("forward", None)  # accelerate leaves the bound method of the class behind
    assert left is None or unet.__dict__["forward"].__func__ is type(unet).forward
    assert after == before


def test_a_hook_on_a_block_that_is_cut_is_refused_until_it_is_gone(unet):
    with hf_accel.apply(unet, "deepcache") as applied:
        cached = denoise(unet)
        add_hook_to_module(unet.up_blocks[-1], Counting())
        for _ in range(2):
            with pytest.raises(Conflict, match=r"CrossAttnUpBlock2D\.forward was replaced"):
                denoise(unet)
        remove_hook_from_module(unet.up_blocks[-1])
        assert equal(denoise(unet), cached)
        assert run_of(applied).generations >= 2
    add_hook_to_module(unet.up_blocks[-1], Counting())
    before = own(unet)
    with pytest.raises(Conflict, match=r"CrossAttnUpBlock2D\.forward was replaced"):
        hf_accel.apply(unet, "deepcache")
    assert own(unet) == before
    with hf_accel.apply(unet, "deepcache", cache_branch_id=1):  # takes all of that up block, and one stage of the down
        assert equal(denoise(unet, LEVELS[:1]), denoise(tiny.build("unet"), LEVELS[:1]))


# -- others' forwards ----------------------------------------------------------------------------------------------


def test_a_forward_that_was_replaced_is_refused(unet):
    plain = unet.forward

    @functools.wraps(plain)
    def wrapped(*args, **kwargs):
        return plain(*args, **kwargs)

    wrapped.__module__ = plain.__module__
    unet.forward = wrapped
    before = own(unet)
    with pytest.raises((NotApplicable, Conflict), match="forward of this UNet2DConditionModel was replaced"):
        hf_accel.apply(unet, "deepcache")
    assert own(unet) == before


def test_revert_is_refused_while_another_forward_stands_on_ours(unet):
    plain = denoise(unet)
    applied = hf_accel.apply(unet, "deepcache")
    ours = unet.__dict__["forward"]
    unet.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RevertRefused, match=r"UNet2DConditionModel\.forward was replaced by a function.*Undo that"):
        applied.revert()
    assert applied.active
    del unet.__dict__["forward"]  # as it was before apply: nothing is left to undo
    applied.revert()
    assert not applied.active
    assert equal(denoise(unet), plain)


# -- what is left after ... ----------------------------------------------------------------------------------------


def test_nothing_is_kept_after_an_error_or_the_end_of_a_call(unet):
    with hf_accel.apply(unet, "deepcache") as applied, torch.no_grad():
        context = context_of(applied)
        denoise(unet, LEVELS[:2])
        assert context.kept_bytes
        with pytest.raises(RuntimeError):
            unet(**tiny.TINY["unet"].inputs(unet, timestep=500.0) | tiny.TINY["unet"].bad)
        assert context.kept_bytes == 0
        assert [(views.splice.inner, views.tap.inner) for views in context._spare] == [(None, None)]
        denoise(unet, LEVELS[2:])
        assert run_of(applied).schedule == [0]
        assert run_of(applied).partial_steps == 2
        unet._reset_stateful_cache()
        assert context.kept_bytes == 0


def test_an_error_inside_of_the_model_leaves_nothing(unet):
    def fail(module, args):
        raise KeyboardInterrupt

    with hf_accel.apply(unet, "deepcache") as applied:
        context = context_of(applied)
        denoise(unet, LEVELS[:1])
        hook = unet.conv_norm_out.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            denoise(unet, LEVELS[1:2])
        hook.remove()
        assert context.kept_bytes == 0
        assert [views.splice.inner for views in context._spare] == [None]
        second = denoise(unet, seed=3)
    with hf_accel.apply(unet, "deepcache"):
        assert equal(second, denoise(unet, seed=3))


def test_inference_mode_may_end_in_the_middle_of_a_generation(unet):
    with hf_accel.apply(unet, "deepcache"):
        expected = denoise(unet)
    for first in (torch.inference_mode, torch.no_grad):
        second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
        with hf_accel.apply(unet, "deepcache"):
            ours = []
            for index, level in enumerate(LEVELS):
                with first() if index < 2 else second():
                    ours.append(tiny.run(unet, "unet", timestep=level))
        assert equal(ours, expected)


def test_a_forward_with_gradients_runs_whole_and_disturbs_nothing(unet):
    expected = []
    with hf_accel.apply(unet, "deepcache"):
        expected = denoise(unet)
    with hf_accel.apply(unet, "deepcache") as applied:
        ours = denoise(unet, LEVELS[:2])
        with torch.enable_grad():
            out = tiny.run(unet, "unet", timestep=600.0)
        assert out.requires_grad
        ours += denoise(unet, LEVELS[2:])
        run = run_of(applied)
    assert equal(ours, expected)
    assert run.dense_calls == {"gradients are needed": 1}
    unet.requires_grad_(False)
    with hf_accel.apply(unet, "deepcache") as applied, torch.enable_grad():
        for level in LEVELS:
            tiny.run(unet, "unet", timestep=level)
        assert run_of(applied).partial_steps == 2  # nothing asks for gradients, whatever the mode


@pytest.mark.parametrize("change", ["train", "bfloat16", "conv_out", "freeu"])
def test_a_model_changed_in_the_middle_is_computed_in_full(unet, change):
    with hf_accel.apply(unet, "deepcache") as applied:
        denoise(unet, LEVELS[:2])
        if change == "train":
            unet.train()
        elif change == "bfloat16":
            unet.bfloat16()
        elif change == "freeu":
            unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
        else:
            unet.conv_out = torch.nn.Conv2d(16, 4, 3, padding=1)
        inputs = tiny.TINY["unet"].inputs(unet, timestep=500.0)
        if change == "bfloat16":
            inputs |= {k: inputs[k].bfloat16() for k in ("sample", "encoder_hidden_states")}
        with torch.no_grad():
            ours = unet(**inputs).sample
        assert run_of(applied).full_steps.total() == 2
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, ours)


# -- copies --------------------------------------------------------------------------------------------------------


def test_a_copy_in_the_middle_of_a_generation_begins_with_a_full_step(unet):
    plain = denoise(unet)
    with hf_accel.apply(unet, "deepcache"):
        expected = denoise(unet)
    applied = hf_accel.apply(unet, "deepcache")
    denoise(unet, LEVELS[:2])
    twin = copy.deepcopy(unet)
    theirs, ours = context_of(applied), twin.__dict__["_hf_accel_step_cache"].now()
    assert ours is not theirs
    assert theirs.kept_bytes > ours.kept_bytes == 0
    assert equal(denoise(twin, LEVELS[2:])[:1], plain[2:3])
    denoise(twin, LEVELS)
    assert ours.kept_bytes == theirs.kept_bytes
    assert run_of(applied).forwards == 2
    with torch.no_grad():
        twin.conv_out.weight.zero_()
    assert equal(denoise(unet, LEVELS[2:]), expected[2:])
    hf_accel.revert(twin)
    assert "forward" not in twin.__dict__
    assert applied.active
    applied.revert()
    assert equal(denoise(unet), plain)


def test_two_pipelines_of_the_same_model_class_share_no_state(unet):
    other = tiny.build("unet", seed=1)
    alone = {}
    for model in (unet, other):
        with hf_accel.apply(model, "deepcache"):
            alone[model] = denoise(model)
    with hf_accel.apply(unet, "deepcache"), hf_accel.apply(other, "deepcache"):
        together = [(denoise(unet, (level,))[0], denoise(other, (level,))[0]) for level in LEVELS]
    assert equal([a for a, _ in together], alone[unet])
    assert equal([b for _, b in together], alone[other])


# -- reading the timestep ------------------------------------------------------------------------------------------


def test_the_timestep_is_read_only_where_nothing_else_speaks(unet, monkeypatch):
    from diffusers import DDIMScheduler, DiffusionPipeline

    class Pipeline(DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    def read(value):
        raise LookupError("the timestep was read")

    monkeypatch.setattr(steps, "read_timestep", read)
    pipe = Pipeline(unet, DDIMScheduler())
    pipe.scheduler.set_timesteps(10)
    inputs = tiny.TINY["unet"].inputs(unet)
    with hf_accel.apply(pipe, "deepcache") as applied, torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            unet(**inputs | {"timestep": timestep})
        assert run_of(applied).schedule == [0, 3, 6, 9]
        with pytest.raises(LookupError):
            unet(**inputs)
    with hf_accel.apply(pipe, "deepcache", max_timestep_gap=300), torch.no_grad(), pytest.raises(LookupError):
        unet(**inputs | {"timestep": pipe.scheduler.timesteps[0]})
