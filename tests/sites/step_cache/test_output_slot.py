"""The output slot: forwards that are not run, on transformers and U-Nets, beside what else stands on the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

import hf_accel
from hf_accel import registry
from hf_accel.config import Config, setting
from hf_accel.errors import Conflict, NotApplicable, RevertRefused
from hf_accel.facts import HOSTS_OF
from hf_accel.method import Facts, OutputCacheMethod
from hf_accel.testing.models import tiny

FAMILIES = ("wan", "flux", "cogvideox", "unet", "sdxl")
SOME_TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


@dataclass(frozen=True)
class EveryConfig(Config):
    METHOD = "toy-every"
    interval: int = setting(2, "a step runs every so often", ge=1)
    line: bool = setting(False, "go on in a straight line")


class Every(OutputCacheMethod):
    name, paper, summary = "toy-every", "none", "every n-th step runs"
    facts = Facts(
        sites=frozenset({"step cache: output"}), media=frozenset(HOSTS_OF), hosts=frozenset({"transformer", "unet"}),
        full_budget={"interval": 1},
    )  # fmt: skip
    Config = EveryConfig
    history = 2

    def why_run(self, step, kept, state):
        if self.config.line and len(kept) < 2:
            return "two points make a line"
        return None if step.index % self.config.interval else "every n-th step"

    def forecast(self, step, kept, state):
        if not self.config.line:
            return super().forecast(step, kept, state)
        before, last = kept
        ahead = (step.index - last.step.index) / (last.step.index - before.step.index)
        return last.value + ahead * (last.value - before.value)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    registry.methods()
    monkeypatch.setitem(registry._METHODS, Every.name, Every)


@torch.no_grad()
def denoise(model, family, timesteps=SOME_TIMESTEPS, **more):
    return [tiny.run(model, family, timestep=t, **more) for t in timesteps]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_second_step_is_the_one_before_it(family):
    model = tiny.build(family)
    dense = denoise(model, family)
    with hf_accel.apply(model, "toy-every") as applied:
        ours = denoise(model, family)
        run = applied.report().entries[0].run
        assert (run.partial_steps, run.schedule) == (2, [0, 2, 4])
    assert same(ours, [dense[0], dense[0], dense[2], dense[2], dense[4]])
    assert same(denoise(model, family), dense)
    assert not [name for name in model.__dict__ if "hf_accel" in name or name == "forward"]


def test_full_budget_is_dense():
    model = tiny.build("wan")
    dense = denoise(model, "wan")
    with hf_accel.apply(model, "toy-every", interval=1):
        assert same(denoise(model, "wan"), dense)


def test_a_forecast_sees_the_last_outputs():
    model = tiny.build("wan")
    dense = denoise(model, "wan")
    hf_accel.apply(model, "toy-every", interval=3, line=True)
    ours = denoise(model, "wan")
    assert torch.allclose(ours[2], 2 * dense[1] - dense[0])
    assert torch.equal(ours[3], dense[3])
    assert torch.allclose(ours[4], dense[3] + (dense[3] - dense[1]) / 2)


def test_what_is_kept_belongs_to_one_generation_branch_and_shape():
    model = tiny.build("wan")
    dense = denoise(model, "wan", seed=4)
    larger = denoise(model, "wan", size=(3, 8, 16))
    hf_accel.apply(model, "toy-every")
    denoise(model, "wan")
    assert torch.equal(denoise(model, "wan", seed=4)[0], dense[0])
    assert torch.equal(denoise(model, "wan", size=(3, 8, 16))[0], larger[0])
    inputs = [tiny.TINY["wan"].inputs(model, seed=seed) for seed in (3, 4)]
    with torch.no_grad():
        outs = [
            [model(**given | {"timestep": torch.full((1,), t)}, return_dict=False)[0] for given in inputs]
            for t in (900.0, 500.0)
        ]
    assert same(outs[0], outs[1])
    assert not torch.equal(*outs[0])


def test_the_kept_output_is_not_the_callers():
    """Guidance and schedulers write into what a model gave."""
    model = tiny.build("wan")
    hf_accel.apply(model, "toy-every")
    first = tiny.run(model, "wan", timestep=900.0).detach()
    kept = first.clone()
    first.zero_()
    with torch.no_grad():
        denoise(model, "wan", (900.0,))[0].zero_()
        assert torch.equal(denoise(model, "wan", (500.0,))[0], kept)


def test_an_exception_and_gradients():
    model = tiny.build("wan")
    applied = hf_accel.apply(model, "toy-every")
    denoise(model, "wan")
    with torch.no_grad(), pytest.raises(Exception):  # noqa: B017, PT011 (whatever the model raises)
        model(**tiny.TINY["wan"].inputs(model) | dict(tiny.TINY["wan"].bad))
    assert torch.equal(denoise(model, "wan", (500.0,))[0], tiny.run(model, "wan", timestep=500.0).detach())
    assert applied.report().entries[0].run.dense_calls == {"gradients are needed": 1}


@pytest.mark.parametrize("order", [("deepcache", "toy-every"), ("toy-every", "deepcache")], ids="+".join)
@pytest.mark.parametrize("off", [0, 1])
def test_beside_a_cache_inside_whichever_came_first_and_goes_first(order, off):
    model = tiny.build("unet")
    dense = denoise(model, "unet")
    with hf_accel.apply(model, "deepcache", cache_interval=2):
        inside = denoise(model, "unet", (900.0, 500.0, 100.0))
    applied = [hf_accel.apply(model, name, **({"cache_interval": 2} if name == "deepcache" else {})) for name in order]
    ours = denoise(model, "unet")
    # The cache inside sees steps 0, 2 and 4 only.
    assert same(ours, [inside[0], inside[0], inside[1], inside[1], inside[2]])
    applied[off].revert()
    alone = denoise(model, "unet")
    expected = [dense[0], dense[0], dense[2], dense[2], dense[4]] if order[1 - off] == "toy-every" else None
    assert expected is None or same(alone, expected)
    applied[1 - off].revert()
    assert same(denoise(model, "unet"), dense)
    assert not [name for name in model.__dict__ if "hf_accel" in name or name == "forward"]


def test_beside_an_attention_method():
    model = tiny.build("wan")
    dense = denoise(model, "wan")
    hf_accel.apply(model, {"toy-every": {}, "svg2": registry.get("svg2").facts.full_budget})
    ours = denoise(model, "wan")
    for got, step in zip(ours, (0, 0, 2, 2, 4), strict=True):
        assert torch.allclose(got, dense[step], atol=1e-5)


def test_a_wrapper_that_outlives_it_runs_the_model():
    model = tiny.build("wan")
    dense = denoise(model, "wan")
    applied = hf_accel.apply(model, "toy-every")
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RevertRefused, match=r"forward was replaced by a function"):
        applied.revert()
    with pytest.warns(UserWarning, match="1 attribute left as it is now"):
        applied.revert(force=True)
    assert same(denoise(model, "wan"), dense)


def test_two_of_them_do_not_go_together_nor_with_a_cache_of_diffusers(monkeypatch):
    from diffusers import FirstBlockCacheConfig

    class Another(Every):
        name = "toy-another"
        Config = type("AnotherConfig", (EveryConfig,), {"METHOD": "toy-another"})

    monkeypatch.setitem(registry._METHODS, "toy-another", Another)
    model = tiny.build("wan")
    hf_accel.apply(model, "toy-every")
    with pytest.raises(Conflict, match="output of the step cache site"):
        hf_accel.apply(model, "toy-another")
    hf_accel.revert(model)
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(Conflict, match="FirstBlockCache"):
        hf_accel.apply(model, "toy-every")


def test_copies_have_their_own():
    model = tiny.build("wan")
    applied = hf_accel.apply(model, "toy-every")
    twin = copy.deepcopy(model)
    denoise(twin, "wan")
    assert applied.report().entries[0].run.forwards == 0
    hf_accel.revert(twin)
    assert not [name for name in twin.__dict__ if "hf_accel" in name or name == "forward"]
    denoise(model, "wan")
    assert applied.report().entries[0].run.partial_steps == 2


def test_compiled():
    model = tiny.build("wan")
    dense = denoise(model, "wan")
    hf_accel.apply(model, "toy-every")
    model.compile(backend="aot_eager")
    ours = denoise(model, "wan")
    for got, step in zip(ours, (0, 0, 2, 2, 4), strict=True):
        assert torch.allclose(got, dense[step], atol=1e-5)


@torch.no_grad()
def test_writing_into_an_output_leaves_what_is_kept():
    """Guidance and schedulers work in place."""
    model = tiny.build("wan")
    dense = tiny.run(model, "wan", timestep=900.0)
    hf_accel.apply(model, "toy-every", interval=3)
    for timestep in SOME_TIMESTEPS[:3]:
        output = tiny.run(model, "wan", timestep=timestep)
        assert torch.equal(output, dense)
        output.zero_()


@pytest.mark.parametrize(
    "name",
    [
        "whole_model_compiles_to_one_graph",
        "a_step_cache_compiles_to_two_graphs",
        "inference_mode_leaves_nothing_for_other_modes",
    ],
)
def test_the_kit_holds_it_to_its_promises(name):
    from hf_accel.testing import promises

    next(one for one in promises("toy-every", "wan") if one.name == name)()


@pytest.mark.parametrize("family", ["llama"])
def test_other_models_are_refused_in_words(family):
    with pytest.raises(NotApplicable, match="not a denoiser"):
        hf_accel.apply(tiny.build(family), "toy-every")
