"""``compare``: fair baselines, quality beside every ratio, and a pipeline left as it was found."""

from __future__ import annotations

import functools
import json
import math
import warnings

import pytest
import torch

import hf_accel
import unet_pipelines
from hf_accel.errors import Conflict, InvalidSetting, NotApplicable, UnknownMethod
from hf_accel.measure.compare import PSNR_LIMIT
from hf_accel.measure.memory import PeakMemory
from hf_accel.measure.quality import psnr, ssim
from hf_accel.patches.svg2 import SVG2Config
from tiny_pipelines import TinyPipeline

SPARSE = {
    "kmeans_iter_init": 2, "num_q_centroids": 4, "num_k_centroids": 6, "top_p": 0.3, "min_kc_ratio": 0.0,
    "dense_steps": 1, "dense_layers": 0,
}  # fmt: skip
FULL = SPARSE | {"top_p": 1.0}


@pytest.fixture
def video():
    return TinyPipeline.of("wan")


def test_a_video_pipeline_with_two_methods_and_two_prompts(video, tmp_path):
    said: list[str] = []
    methods = [("sparse", {"svg2": SPARSE}), SVG2Config.build(FULL)]
    found = hf_accel.compare(video, methods, prompts=["a", "b"], seeds=[3, 4], announce=said.append)
    assert found.labels[:2] == ["dense", "sparse"]
    assert found.labels[2].startswith("svg2 ")
    assert "top_p=1.0" in found.labels[2]
    dense, sparse, full = found.summary()
    assert dense.psnr_worst == PSNR_LIMIT  # the seam is bit-equal
    assert dense.density == 1
    assert 0 < sparse.density < 1 == full.density
    assert sparse.psnr_worst <= sparse.psnr_mean < 80 < full.psnr_worst
    assert sparse.sparse_share == pytest.approx(3 / 4)  # one of four steps is dense
    # Per prompt: unpatched, dense, and the methods.
    assert [words for words in said if "prompt 2" in words] == [
        "unpatched, prompt 2 of 2", "dense, prompt 2 of 2", "sparse, prompt 2 of 2",
        f"{found.labels[2]}, prompt 2 of 2",
    ]  # fmt: skip
    for entry in found.figures:
        assert entry.attention_time_ratio is not None
        assert entry.attention_time_ratio > 0
        assert entry.attention_seconds < entry.seconds
    assert hf_accel.compare(video, "svg2", prompt="a", seed=3).figures[0].seed == 3

    text = str(found)
    for word in ("sparse", "PSNR dB", "SSIM", "density", "attention", "whole", "memory"):
        assert word in text
    files = found.save(tmp_path)
    assert [file.name for file in files] == ["comparison.json", "side_by_side.gif"]
    stored = json.loads(files[0].read_text(), parse_constant=pytest.fail)  # strict JSON: no Infinity
    assert stored["summary"][1]["label"] == "sparse"
    assert stored["machine"]["device"]
    assert stored["reports"]["sparse"]["entries"][0]["run"]["sparse_calls"] == 6

    from PIL import Image

    with Image.open(files[1]) as picture:
        assert picture.n_frames == 3
        shown = picture.size
    assert shown[0] % 3 == 0
    assert found.pictures["unpatched"].shape == (3, 16, 16, 3)


def test_figures_are_those_of_a_run_by_hand(video):
    found = hf_accel.compare(video, {"svg2": SPARSE}, prompt="a cube", seed=7, num_inference_steps=3)

    def run():
        generator = torch.Generator().manual_seed(7)
        return video("a cube", num_inference_steps=3, generator=generator).frames[0].permute(0, 2, 3, 1)

    plain = run()
    with hf_accel.apply(video, "svg2", **SPARSE) as applied:
        ours = run()
        density = applied.report().entries[0].run.mean_density
    entry = found.of("svg2 " + " ".join(f"{k}={v}" for k, v in SPARSE.items()))[0]
    assert entry.psnr_db == pytest.approx(psnr(ours, plain))
    assert entry.ssim == pytest.approx(ssim(ours, plain))
    assert entry.density == pytest.approx(density)


def test_an_image_pipeline(tmp_path):
    pipe = TinyPipeline.of("flux")
    found = hf_accel.compare(pipe, "dense", prompt="a", num_inference_steps=2)
    assert found.labels == ["dense", "dense #1"]
    assert found.pictures["dense"].shape == (1, 16, 16, 3)
    files = found.save(tmp_path)
    assert files[1].name == "side_by_side.png"
    from PIL import Image

    with Image.open(files[1]) as picture:
        left, middle, right = (picture.crop((i * 208, 14, (i + 1) * 208, 222)) for i in range(3))
        assert picture.size == (3 * 208, 222)
        assert left.tobytes() == middle.tobytes()
        assert right.getextrema() == ((0, 0),) * 3


@pytest.fixture(scope="module")
def step_caches():
    """Two of them on tiny Stable Diffusion."""
    methods = ["deepcache", ("all", {"deepcache": {"cache_interval": 1}})]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "hf_accel")  # twelve steps are enough; the two of the warm-up are nobody's
        return hf_accel.compare(
            unet_pipelines.shared("sd"), methods, prompts=["a", "b"], seeds=[1, 2], num_inference_steps=12,
            **unet_pipelines.SIZE,
        )  # fmt: skip


def test_a_step_cache_shows_its_share_of_macs_and_no_attention(step_caches, tmp_path):
    cached, whole = step_caches.summary()  # no run through the attention seam: nobody asked for attention
    assert [cached.label, whole.label] == ["deepcache", "all"]
    assert whole.psnr_worst == PSNR_LIMIT > cached.psnr_mean
    assert whole.mac_share == 1
    run = step_caches.reports["deepcache"].entries[0].run
    assert (sum(run.full_steps.values()), run.partial_steps) == (4, 8)
    assert 1 / 3 < cached.mac_share == run.mac_share < 1
    for row in (cached, whole):
        assert row.density is row.sparse_share is row.attention_time_ratio is None

    text = str(step_caches)
    head = text.splitlines()[1]
    assert all(word in head for word in ("MACs", "by MACs", "whole", "memory"))
    assert not any(word in head for word in ("density", "sparse", "attention"))
    assert f"{cached.mac_share:.1%}" in text
    assert f"{1 / cached.mac_share:.2f} x" in text
    files = step_caches.save(tmp_path)
    assert [file.name for file in files] == ["comparison.json", "side_by_side.png"]
    stored = json.loads(files[0].read_text(), parse_constant=pytest.fail)
    assert stored["summary"][0]["mac_share"] == cached.mac_share
    assert stored["reports"]["all"]["entries"][0]["run"]["partial_steps"] == 0


def test_a_step_cache_beside_and_with_an_attention_method():
    methods = ["deepcache", ("both", ["deepcache", "grat"])]
    found = hf_accel.compare(
        unet_pipelines.shared("sd"), methods, prompt="a", num_inference_steps=12, **unet_pipelines.SIZE
    )
    dense, cached, both = found.summary()
    assert dense.label == "dense"
    assert (dense.mac_share, cached.density, cached.attention_time_ratio) == (None, None, None)
    assert both.mac_share == cached.mac_share < 1
    assert 0 < both.density <= 1
    assert both.attention_time_ratio > 0
    lines = str(found).splitlines()
    assert "density" in lines[1]
    assert "by MACs" in lines[1]
    assert " - " in lines[3]  # a cell that the row has no figure for


def test_warm_up_reaches_the_partial_steps(monkeypatch):
    pipe = unet_pipelines.shared("sd")
    steps: list[int] = []
    inner = type(pipe).__call__

    @functools.wraps(inner)
    def counting(self, *args, num_inference_steps, **call):
        steps.append(num_inference_steps)
        return inner(self, *args, num_inference_steps=num_inference_steps, **call)

    monkeypatch.setattr(type(pipe), "__call__", counting)
    late = {"deepcache": {"start_step": 4}}
    hf_accel.compare(pipe, late, prompt="a", num_inference_steps=12, **unet_pipelines.SIZE)
    assert steps == [2, 6, 12, 12]


def test_warm_up_reaches_the_sparse_steps_and_no_further(video):
    steps: list[int] = []
    inner = type(video).__call__

    class Counting(TinyPipeline):
        def __call__(self, prompt, num_inference_steps=4, **call):
            steps.append(num_inference_steps)
            return inner(self, prompt, num_inference_steps, **call)

    pipe = Counting.of("wan")
    hf_accel.compare(pipe, {"svg2": SPARSE | {"dense_steps": 3}}, prompt="a", num_inference_steps=8)
    assert steps == [2, 2, 5, 8, 8, 8]
    steps.clear()
    hf_accel.compare(pipe, {"svg2": SPARSE | {"dense_steps": 30}}, prompt="a", num_inference_steps=4)
    assert steps == [2, 2, 4, 4, 4, 4]


def test_the_pipeline_is_left_as_found_after_a_failure(video):
    keys = set(video.transformer.__dict__)
    processors = [id(block.attn1.processor) for block in video.transformer.blocks]
    video.raises_at = 5  # warm-up: 3 calls; then unpatched, dense
    with pytest.raises(RuntimeError, match="out of order"):
        hf_accel.compare(video, {"svg2": SPARSE}, prompt="a")
    assert video.calls == 5
    assert set(video.transformer.__dict__) == keys
    assert [id(block.attn1.processor) for block in video.transformer.blocks] == processors
    assert not video.transformer._forward_pre_hooks


def test_mistakes_are_found_before_anything_runs(video):
    def refused(error, words, *args, **kwargs):
        with pytest.raises(error, match=words):
            hf_accel.compare(*args, **kwargs)
        assert video.calls == 0

    refused(InvalidSetting, "one prompt=, or prompts=", video, "svg2")
    refused(InvalidSetting, "one prompt=, or prompts=", video, "svg2", prompt="a", prompts=["b"])
    refused(InvalidSetting, "one prompt=, or prompts=", video, "svg2", prompts="a")
    refused(InvalidSetting, "at least one prompt", video, "svg2", prompts=[])
    refused(InvalidSetting, "as many as there are prompts, 2", video, "svg2", prompts=["a", "b"], seeds=[1])
    refused(InvalidSetting, "at least one method", video, [], prompt="a")
    refused(InvalidSetting, "left to compare", video, "svg2", prompt="a", output_type="pil")
    refused(UnknownMethod, "svg2", video, ["dense", "svg3"], prompt="a")
    refused(InvalidSetting, "top_p", video, {"svg2": {"top_p": 2}}, prompt="a")
    refused(NotApplicable, "needs a whole pipeline", video.transformer, "svg2", prompt="a")
    refused(NotApplicable, "Load the model first", "a path", "svg2", prompt="a")
    with hf_accel.apply(video, "svg2"):
        refused(Conflict, "here stands svg2 on transformer", video, "dense", prompt="a")


def test_what_makes_no_pictures_is_refused(video):
    class Talking(TinyPipeline):
        def __call__(self, prompt, **call):
            return "words"

    with pytest.raises(NotApplicable, match=r"neither frames .* nor images"):
        hf_accel.compare(Talking.of("wan"), "dense", prompt="a")


def test_ssim_of_many_frames_is_the_mean_of_single_frames():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 16, 16, 3, generator=generator)
    b = (a + 0.2 * torch.rand(3, 16, 16, 3, generator=generator)).clamp(0, 1)
    each = [ssim(a[i : i + 1], b[i : i + 1]) for i in range(3)]
    assert ssim(a, b) == pytest.approx(sum(each) / 3)
    assert len({round(value, 6) for value in each}) == 3
    assert ssim(a, a) == pytest.approx(1)
    assert math.isinf(psnr(a, a))


def test_peak_memory_sees_what_was_freed_again():
    import sys

    if sys.platform != "linux":
        with PeakMemory(torch.device("cpu")) as peak:
            pass
        assert peak.bytes is None
        return
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(64 << 18).sum()  # 64 MiB, gone at the end
    assert 60 << 20 <= peak.bytes <= 80 << 20
    with PeakMemory(torch.device("cpu")) as peak:
        pass
    assert peak.bytes < 8 << 20
