"""deepcache: schedules, settings, refusals, and what the report says. Pipelines: ``test_deepcache_pipelines.py``."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import hf_accel
from hf_accel.errors import Conflict, InvalidSetting, NotApplicable
from hf_accel.patches.deepcache import non_uniform_steps
from hf_accel.testing.models import tiny


class Denoising(DiffusionPipeline):
    """The loop of every pipeline, around a tiny U-Net: what is seen of a call is the U-Net's arguments."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps=12, seed=0, batch=1, side=8, family="unet"):
        self.scheduler.set_timesteps(steps)
        inputs = tiny.TINY[family].inputs(self.unet, batch, (1, side, side), seed=seed)
        outputs = []
        for timestep in self.scheduler.timesteps:
            noise = self.unet(**inputs | {"timestep": timestep}, return_dict=False)[0]
            outputs.append(noise)
            inputs["sample"] = self.scheduler.step(noise, timestep, inputs["sample"]).prev_sample
        if hasattr(self.unet, "_reset_stateful_cache"):
            self.unet._reset_stateful_cache()  # as the pipelines of diffusers do at their end
        return outputs


@pytest.fixture
def pipe():
    return Denoising(tiny.build("unet"), DDIMScheduler())


def run_of(applied):
    return applied.report().entries[0].run


def full_steps(pipe, steps=12, **settings):
    """The full steps of one call."""
    with hf_accel.apply(pipe, "deepcache", **settings) as applied:
        pipe(steps)
        run = run_of(applied)
    assert run.full_steps.total() == len(run.schedule)
    assert run.forwards == steps == run.full_steps.total() + run.partial_steps
    return run.schedule


# -- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "k", "center", "power", "signed", "expected"),
    [
        (50, 10, 10, 1.5, False, [0, 4, 7, 10, 14, 19, 24, 30, 36, 43]),
        (50, 10, 10, 1.5, True, [0, 5, 9, 10, 12, 16, 21, 27, 34, 41]),
        (50, 10, 15, 1.4, False, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
        (250, 13, 120, 1.2, False, [0, 22, 42, 62, 80, 98, 116, 132, 149, 168, 187, 207, 228]),
    ],
)
def test_lists_of_the_official_code(count, k, center, power, signed, expected):
    assert non_uniform_steps(count, -(-count // k), center, power, signed) == expected


@pytest.mark.parametrize("signed", [False, True])
def test_every_non_uniform_list_is_a_schedule(signed):
    refused = made = 0
    for count in (1, 2, 7, 10, 20, 25, 50, 101, 250):
        for interval in (1, 2, 3, 5, 8, 10, 20):
            for center in (0, 1, 5, 15, 120):
                for power in (1.1, 1.2, 1.4, 1.5, 2.5):
                    try:
                        steps = non_uniform_steps(count, interval, center, power, signed)
                    except InvalidSetting:
                        refused += 1
                        continue
                    made += 1
                    assert steps[0] == 0
                    assert steps == sorted(set(steps))
                    assert len(steps) == -(-count // interval)
                    assert steps[-1] < count
                    assert interval > 1 or steps == list(range(count))
    assert made > refused


@pytest.mark.parametrize(
    ("interval", "center", "power"),
    [(2, 15, 1.5), (3, 15, 1.3), (4, 15, 1.4), (5, 10, 1.5), (6, 15, 1.3), (7, 15, 1.4), (8, 10, 1.4),
     (2, 20, 1.3), (3, 20, 1.4), (4, 20, 1.4), (5, 15, 1.3), (6, 15, 1.5), (7, 15, 1.5), (8, 20, 1.3)],
)  # fmt: skip
def test_published_settings_can_be_met(interval, center, power):
    assert len(non_uniform_steps(50, interval, center, power)) == -(-50 // interval)


def test_a_schedule_that_cannot_be_met_is_refused_with_what_to_do():
    with pytest.raises(InvalidSetting, match=r"'power'.* 5 of 10 steps around center=5 differ.*another cache_interval"):
        non_uniform_steps(10, 2, 5, 1.4)


def test_a_schedule_that_cannot_be_met_leaves_the_model_usable(pipe):
    plain = pipe(10)
    with hf_accel.apply(pipe, "deepcache", skip_mode="non_uniform", center=5, cache_interval=2) as applied:
        for _ in range(2):
            with pytest.raises(InvalidSetting, match="center=5"):
                pipe(10)
        pipe(20)  # here it can be met
        assert run_of(applied).schedule == non_uniform_steps(20, 2, 5, 1.4)
    assert all(torch.equal(a, b) for a, b in zip(pipe(10), plain, strict=True))


def test_full_steps_are_those_of_the_schedule(pipe):
    assert full_steps(pipe, 12, cache_interval=5) == [0, 5, 10]
    assert full_steps(pipe, 12, cache_interval=20) == [0]
    assert full_steps(pipe, 10, cache_interval=1) == list(range(10))
    wanted = non_uniform_steps(20, 4, 8, 1.4)
    assert wanted != list(range(0, 20, 4))
    assert full_steps(pipe, 20, cache_interval=4, skip_mode="non_uniform", center=8) == wanted
    signed = non_uniform_steps(20, 4, 8, 1.4, signed=True)
    assert signed != wanted
    assert full_steps(pipe, 20, cache_interval=4, skip_mode="non_uniform", center=8, signed=True) == signed


def test_start_and_end(pipe):
    assert full_steps(pipe, 12, cache_interval=4, start_step=3) == [0, 1, 2, 6, 10]
    assert full_steps(pipe, 12, cache_interval=4, start_step=0.25) == [0, 1, 2, 6, 10]
    assert full_steps(pipe, 12, cache_interval=4, end_step=9) == [0, 4, 8, 9, 10, 11]
    assert full_steps(pipe, 12, cache_interval=4, end_step=0.75) == [0, 4, 8, 9, 10, 11]
    assert full_steps(pipe, 12, cache_interval=4, start_step=12) == list(range(12))
    assert full_steps(pipe, 12, cache_interval=4, start_step=3, end_step=5) == [0, 1, 2, *range(5, 12)]


def test_shares_without_a_step_count_follow_the_timestep():
    model, levels = tiny.build("unet"), [1000.0, 900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0]
    with torch.no_grad(), hf_accel.apply(model, "deepcache", start_step=0.25, end_step=0.75) as applied:
        for level in levels:
            tiny.run(model, "unet", timestep=level)
    assert run_of(applied).schedule == [0, 1, 2, 5, 8, 9]


def test_max_timestep_gap(pipe):
    # 12 DDIM steps of 1000 are 83 apart
    assert full_steps(pipe, 12, cache_interval=12, max_timestep_gap=170) == [0, 3, 6, 9]
    assert full_steps(pipe, 12, cache_interval=12, max_timestep_gap=50) == list(range(12))
    assert full_steps(pipe, 12, cache_interval=12, max_timestep_gap=2000) == [0]


# -- settings and models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache_interval": 0}, r"'cache_interval' must be .*1.*got 0"),
        ({"cache_interval": -2}, r"'cache_interval'"),
        ({"cache_interval": 2.5}, r"'cache_interval'"),
        ({"cache_branch_id": -1}, r"'cache_branch_id'"),
        ({"cache_branch_id": 4}, r"'cache_branch_id' must be in 0\.\.3 for UNet2DConditionModel; got 4"),
        ({"skip_mode": "random"}, r"'skip_mode' must be .*uniform.*non_uniform"),
        ({"power": 1.0}, r"'power'"),
        ({"center": -1}, r"'center'"),
        ({"start_step": 1.5}, r"'start_step'"),
        ({"max_timestep_gap": 0}, r"'max_timestep_gap'"),
        ({"controlnet": "maybe"}, r"'controlnet'"),
        ({"interval": 3}, r"interval"),
    ],
)
def test_bad_settings_are_refused_in_words(pipe, settings, words):
    with pytest.raises(InvalidSetting, match=words):
        hf_accel.apply(pipe, "deepcache", **settings)
    assert not [name for name in pipe.unet.__dict__ if "hf_accel" in name or name == "forward"]


def test_a_transformer_is_told_what_fits():
    with pytest.raises(NotApplicable) as refused:
        hf_accel.apply(tiny.build("flux"), "deepcache")
    for word in ("FluxTransformer2DModel", "no U-Net", "enable_cache", "Methods that fit:", "sparge"):
        assert word in str(refused.value)
    verdict = next(v for v in hf_accel.explain(tiny.build("flux")) if v.method == "deepcache")
    assert not verdict.applies


def test_blocks_without_one_skip_a_stage_are_refused():
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "SkipDownBlock2D"), up_block_types=("SkipUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="UNet2DModel is a denoiser, and its SkipDownBlock2D is no list of stages"):
        hf_accel.apply(model, "deepcache")


def test_a_number_of_steps_is_needed_for_the_non_uniform_schedule():
    model = tiny.build("unet")
    with torch.no_grad(), hf_accel.apply(model, "deepcache", skip_mode="non_uniform"):
        for _ in range(2):
            with pytest.raises(InvalidSetting, match="loop over the scheduler's own timesteps"):
                tiny.run(model, "unet")


def controlled(model, timestep=500.0):
    residuals = [torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 4, 4), torch.zeros(1, 32, 4, 4)]
    return tiny.TINY["unet"].inputs(model, timestep=timestep) | {
        "down_block_additional_residuals": residuals,
        "mid_block_additional_residual": torch.ones(1, 32, 4, 4),
    }


@torch.no_grad()
def test_controlnet_is_refused_and_the_model_unharmed():
    model = tiny.build("unet")
    dense, plain = model(**controlled(model)).sample, tiny.run(model, "unet")
    with hf_accel.apply(model, "deepcache") as applied:
        tiny.run(model, "unet")
        with pytest.raises(Conflict, match=r"ControlNet residuals.*Take deepcache off, or .*controlnet='keep'"):
            model(**controlled(model, 400.0))
        assert torch.equal(tiny.run(model, "unet", timestep=600.0), tiny.run(model, "unet", timestep=600.0))
        assert run_of(applied).forwards == 3
    assert torch.equal(model(**controlled(model)).sample, dense)
    assert torch.equal(tiny.run(model, "unet"), plain)
    with hf_accel.apply(model, "deepcache", cache_interval=1):  # nothing is kept, so nothing is spoilt
        assert torch.equal(model(**controlled(model)).sample, dense)


@torch.no_grad()
def test_controlnet_kept_on_request():
    model = tiny.build("unet")
    dense = model(**controlled(model)).sample
    with hf_accel.apply(model, "deepcache", controlnet="keep") as applied:
        assert torch.equal(model(**controlled(model)).sample, dense)
        model(**controlled(model, 400.0))
        tiny.run(model, "unet", timestep=300.0)  # without residuals: the kept state is of another kind
        run = run_of(applied)
    assert run.partial_steps == 1
    assert run.full_steps["other arguments than the kept step"] == 1


def test_few_steps_are_warned_of_once_a_call(pipe):
    with hf_accel.apply(pipe, "deepcache"):
        with pytest.warns(UserWarning, match="deepcache with 4 steps") as caught:
            pipe(4)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe(10)
    with warnings.catch_warnings(), hf_accel.apply(pipe, "deepcache", cache_interval=1):
        warnings.simplefilter("error")
        pipe(4)


# -- what the report says ------------------------------------------------------------------------------------------


def test_statistics_of_a_call(pipe):
    with hf_accel.apply(pipe, "deepcache", cache_interval=4) as applied:
        pipe(12)
        run = run_of(applied)
        assert (run.forwards, run.generations, run.partial_steps) == (12, 1, 9)
        assert run.full_steps == {"first step": 1, "schedule": 2}
        assert run.schedule == [0, 4, 8]
        pipe(10)
        assert (run.forwards, run.generations, run.partial_steps) == (22, 2, 16)
        assert run.schedule == [0, 4, 8]
        stats = applied.stats()["unet"]["deepcache"]
        assert stats["kept_bytes"] == 16 * 8 * 8 * 4  # one tensor: the hidden state at branch 0, fp32
        text = str(applied.report())
    assert "22 forwards in 2 generations; 6 full, 16 partial" in text
    assert "4096 bytes at most" in text


def test_guidance_in_two_forwards_keeps_a_tensor_each():
    model = tiny.build("unet")
    branches = [tiny.TINY["unet"].inputs(model, seed=seed) for seed in (3, 4)]
    with torch.no_grad(), hf_accel.apply(model, "deepcache") as applied:
        for level in (900.0, 600.0):
            for inputs in branches:
                model(**inputs | {"timestep": level})
    run = run_of(applied)
    assert (run.forwards, run.partial_steps, run.schedule) == (4, 2, [0])
    assert run.kept_bytes == 2 * 16 * 8 * 8 * 4


@pytest.mark.parametrize("branch", range(4))
def test_one_tensor_is_kept_at_every_branch(pipe, branch):
    with hf_accel.apply(pipe, "deepcache", cache_branch_id=branch, cache_interval=2) as applied:
        entered = {}
        stage = [resnet for block in pipe.unet.up_blocks for resnet in block.resnets][-branch - 1]
        skip = [16, 16, 16, 32][branch]
        stage.register_forward_pre_hook(lambda m, args: entered.update(shape=args[0].shape))
        pipe(10, batch=2)
        batch, channels, height, width = entered["shape"]
        assert run_of(applied).kept_bytes == 4 * batch * (channels - skip) * height * width
        assert pipe.unet._hf_accel_step_cache.now().kept_bytes == 0  # let go at the end of the call


def macs_by_hooks(model, run):
    """Multiply-accumulates of convolutions and linear layers, counted as they run."""
    total = []

    def count(module, args, out):
        if isinstance(module, torch.nn.Linear):
            total.append(out.numel() * module.in_features)
        else:
            total.append(out.numel() * module.weight[0].numel())

    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return sum(total)


@pytest.mark.parametrize("family", ["unet", "sdxl", "svd", "animatediff", "ddpm"])
@pytest.mark.parametrize("branch", [0, 2])
def test_share_of_macs_is_what_layers_compute(family, branch):
    model = tiny.build(family)
    levels = (900.0, 600.0, 300.0)

    @torch.no_grad()
    def denoise():
        for level in levels:
            tiny.run(model, family, timestep=level, batch=2)

    plain = macs_by_hooks(model, denoise)
    with hf_accel.apply(model, "deepcache", cache_branch_id=branch) as applied:
        ours = macs_by_hooks(model, denoise)
        share = run_of(applied).mac_share
    assert run_of(applied).partial_steps == 2
    # Products of attention are in the share and not in the layers: at most a few hundredths of these models.
    assert share == pytest.approx(ours / plain, rel=0.02)


def test_share_of_macs_is_one_where_everything_is_computed(pipe):
    with hf_accel.apply(pipe, "deepcache", cache_interval=1) as applied:
        assert run_of(applied).mac_share is None
        pipe(10)
        assert run_of(applied).mac_share == 1.0


# -- fresh and reused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"seed": 5}, {"batch": 2}, {"side": 12}, {"steps": 14}])
def test_another_call_begins_with_a_full_step(pipe, change):
    with hf_accel.apply(pipe, "deepcache"):
        alone = pipe(**change)
    plain = pipe(**change)
    with hf_accel.apply(pipe, "deepcache") as applied:
        pipe()
        after = pipe(**change)
        run = run_of(applied)
    assert run.generations == 2
    assert run.full_steps["first step"] == 2
    assert all(torch.equal(a, b) for a, b in zip(after, alone, strict=True))
    assert torch.equal(after[0], plain[0])
    assert not torch.equal(after[1], plain[1])


def test_a_batch_that_shrinks_in_the_middle_is_full_once(pipe):
    """Pipelines that drop guidance midway halve the batch."""
    inputs = [tiny.TINY["unet"].inputs(pipe.unet, batch) for batch in (2, 1)]
    with torch.no_grad(), hf_accel.apply(pipe, "deepcache", cache_interval=5) as applied:
        pipe.scheduler.set_timesteps(10)
        for index, timestep in enumerate(pipe.scheduler.timesteps):
            given = inputs[index >= 4] | {"timestep": timestep}
            ours = pipe.unet(**given).sample
            if index == 4:
                now = ours
        run = run_of(applied)
    pipe.scheduler.set_timesteps(10)
    with torch.no_grad():
        assert torch.equal(now, pipe.unet(**inputs[1] | {"timestep": pipe.scheduler.timesteps[4]}).sample)
    assert run.full_steps == {"first step": 1, "other arguments than the kept step": 1, "schedule": 1}
    assert run.generations == 1


def test_full_steps_are_the_models_own_bit_for_bit(pipe):
    """On the latents of the approximate run, step 0, N, 2N, ... is what the model computes alone."""
    seen = []
    with hf_accel.apply(pipe, "deepcache", cache_interval=3) as applied:
        hook = pipe.unet.register_forward_hook(
            lambda m, args, kwargs, out: seen.append(({k: v for k, v in kwargs.items()}, out[0])), with_kwargs=True
        )
        pipe(10)
        schedule = run_of(applied).schedule
        hook.remove()
    with torch.no_grad():
        same = [index for index, (given, out) in enumerate(seen) if torch.equal(pipe.unet(**given)[0], out)]
    assert same == schedule == [0, 3, 6, 9]


def test_a_kept_state_keeps_its_address_through_a_generation(pipe):
    addresses = set()
    with hf_accel.apply(pipe, "deepcache", cache_interval=3) as applied:
        context = applied._installed[0][1].handle.now()
        pipe.unet.register_forward_hook(
            lambda *_: addresses.update(kept.buffer.data_ptr() for kept in context._kept.values())
        )
        pipe(12)
    assert len(addresses) == 1  # of the four full steps; a CUDA graph of the partial view reads it there


def test_settings_are_those_of_the_card():
    config = hf_accel.registry.get("deepcache").Config()
    published = SimpleNamespace(cache_interval=3, cache_branch_id=0, skip_mode="uniform", center=15, power=1.4)
    assert {name: getattr(config, name) for name in vars(published)} == vars(published)
