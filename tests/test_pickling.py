"""Patched models in files and in other processes: patched there too, with what was learned, and undone there."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch

import hf_accel
from hf_accel.api import applied_methods
from hf_accel.testing.models import tiny
from hf_accel.testing.models.block_diffusion import FAMILIES, ONE, generate

FORWARDS = [
    ("unet", "deepcache", {}),
    ("wan", "svg2", {"dense_steps": 0, "dense_layers": 0, "kmeans_iter_init": 2}),
    ("wan", "grat", {"group_size": (2, 2, 3)}),
    ("sdxl", "sparge", {"topk": 0.5}),
    ("llama", "sparge", {"topk": 0.5}),
]


def saved_and_loaded(model, how):
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def run(model, family):
    return tiny.run(model, family, timestep=500.0)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize(("family", "method", "settings"), FORWARDS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_patched_model_comes_back_patched(family, method, settings, how):
    model = tiny.build(family)
    plain, names = run(model, family), set(vars(model))
    applied = hf_accel.apply(model, method, **settings)
    ours = run(model, family)
    before = len(io.BytesIO(pickle.dumps(tiny.build(family))).getvalue())
    other = saved_and_loaded(model, how)
    assert torch.equal(run(other, family), ours)
    assert torch.equal(run(model, family), ours)
    ((_, installed),) = applied_methods(other)
    assert installed == method
    assert len(pickle.dumps(model)) < 1.1 * before + 20_000  # the weights once, whatever stands on them
    hf_accel.revert(other)
    assert set(vars(other)) == names
    assert torch.equal(run(other, family), plain)
    applied.revert()
    assert set(vars(model)) == names


@pytest.mark.parametrize("method", ["losa", "rcd", "prefix-split"])
def test_block_diffusion_models_too(method):
    model = FAMILIES["sdar"].build(0)
    settings = {"budget": 8, "page_size": 8, "min_prefix": 0} if method == "losa" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rcd on weights that were not trained for it
        hf_accel.apply(model, method, **settings)
        ours = generate(model, "sdar", ONE)
        theirs = generate(pickle.loads(pickle.dumps(model)), "sdar", ONE)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_a_method_learned_goes_along():
    model = tiny.build("wan")
    hf_accel.apply(model, "sla")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sla_proj" in name or "proj_l" in name:
                parameter.normal_()
    ours = run(model, "wan")
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(other, "wan"), ours)
    assert {n for n, _ in other.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_methods_in_the_weights_are_pickled_as_they_are():
    model = tiny.build("wan")
    hf_accel.apply(model, {"gptq": {"bits": 8, "group_size": 16, "rounding": "nearest"}, "sparge": {"topk": 0.5}})
    ours = run(model, "wan")
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(other, "wan"), ours)
    assert [name for _, name in applied_methods(other)] == ["gptq", "sparge"]
    twin = pickle.loads(pickle.dumps(other))
    assert torch.equal(run(twin, "wan"), ours)


def test_copies_are_as_ever():
    model = tiny.build("wan")
    applied = hf_accel.apply(model, "sparge", topk=0.5)
    shallow, deep = copy.copy(model), copy.deepcopy(model)
    assert shallow.blocks is model.blocks
    applied.revert()
    assert applied_methods(deep) == [("model", "sparge")]


def small_unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def test_a_pipeline_whose_denoiser_is_patched():
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(small_unet(), DDPMScheduler())
    hf_accel.apply(pipe, "deepcache")
    other = pickle.loads(pickle.dumps(pipe))
    other.set_progress_bar_config(disable=True)
    other(num_inference_steps=12, output_type="np")
    assert applied_methods(other) == [("unet", "deepcache")]


def test_a_pipeline_outlives_the_one_that_the_method_was_applied_to():
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    pipe = DDPMPipeline(small_unet(), DDIMScheduler())
    hf_accel.apply(pipe, "deepcache", cache_interval=3, skip_mode="non_uniform", center=4)
    pipe = DDIMPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=12, output_type="np")


def serve(model, sent):
    torch.set_num_threads(1)
    sent.put((run(model, "wan").numpy(), applied_methods(model)))


@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_other_processes_run_it_patched(how):
    model = tiny.build("wan")
    hf_accel.apply(model, "sparge", topk=0.5)
    ours = run(model, "wan")
    context = multiprocessing.get_context(how)
    sent = context.Queue()
    process = context.Process(target=serve, args=(model, sent))
    process.start()
    theirs, methods = sent.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.allclose(torch.from_numpy(theirs), ours, atol=1e-6)
    assert methods == [("model", "sparge")]
