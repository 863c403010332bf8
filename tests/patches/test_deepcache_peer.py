"""deepcache against the authors' package (PyPI ``DeepCache``, in the extra ``peers``): equal results, less kept.

The package finds the step by looking the timestep's value up, and its branch ids suppose three entries per level, as in
Stable Diffusion; compared is where it works.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import hf_accel
import unet_pipelines
from hf_accel import zoo
from hf_accel.api import applied_methods
from hf_accel.errors import HFAccelError

DeepCache = pytest.importorskip("DeepCache", reason="the authors' package: pip install 'hf_accel[peers]'")

pytestmark = pytest.mark.filterwarnings("ignore:hf_accel. deepcache with")

PIPELINES = ["tiny", *(name for name in zoo.names() if name == "mini-sd")]
STEPS = 11  # no interval divides it


@functools.cache
def pipeline(name):
    if name == "tiny":
        return unet_pipelines.shared("sd")
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path(name), dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, output_type="latent"):
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return pipe(
        "a red square", height=size, width=size, num_inference_steps=STEPS, output_type=output_type,
        generator=torch.Generator().manual_seed(3), return_dict=False,
    )[0]  # fmt: skip


@contextlib.contextmanager
def peer(pipe, interval, branch):
    """The pipeline under the authors' package; gives its helper, which holds what it keeps."""
    helper = DeepCache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield helper
    finally:
        helper.disable()


def bytes_held(value):
    """Bytes of all memory that a nest of tensors holds on to."""
    storages = {}

    def walk(x):
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, dict):
            walk(tuple(x.values()))
        elif isinstance(x, (tuple, list)):
            for item in x:
                walk(item)

    walk(value)
    return sum(storages.values())


@pytest.mark.parametrize("branch", [0, 1, 2, 3])
@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("name", PIPELINES)
def test_equal_results(name, interval, branch):
    pipe = pipeline(name)
    with peer(pipe, interval, branch) as helper:
        theirs = run(pipe)
        held = bytes_held(helper.cached_output)
    with hf_accel.apply(pipe, "deepcache", cache_interval=interval, cache_branch_id=branch) as applied:
        ours = run(pipe)
        statistics = applied.report().entries[0].run
    assert statistics.schedule == list(range(0, STEPS, interval))
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - plain(name)).abs().max() > 1e-3
    assert statistics.kept_bytes < held / 5


@functools.cache
def plain(name):
    return run(pipeline(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_equal_pictures(name):
    pipe = pipeline(name)
    with peer(pipe, 3, 0):
        theirs = run(pipe, "pt")
    with hf_accel.apply(pipe, "deepcache", cache_interval=3, cache_branch_id=0):
        ours = run(pipe, "pt")
    assert ours.shape[1] == 3
    assert (ours - theirs).abs().max() <= 1e-5


def test_not_both():
    """While the package stands its forwards are refused in words; what it leaves behind when taken off is not."""
    pipe = pipeline("tiny")
    with peer(pipe, 3, 0), pytest.raises(HFAccelError, match=r"DeepCacheSDHelper.*helper\.disable\(\)"):
        hf_accel.apply(pipe, "deepcache")
    assert applied_methods(pipe) == []
    with hf_accel.apply(pipe, "deepcache", cache_interval=1):
        assert torch.equal(run(pipe), plain("tiny"))
