"""Calibration: a budget becomes thresholds, and the thresholds keep the budget."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import hf_accel
from hf_accel import preset
from hf_accel.attention.call import AttentionCall, Layer, Step
from hf_accel.errors import Conflict, HFAccelError, InvalidSetting, NotApplicable
from hf_accel.hosts.clocks.steps import clocks
from hf_accel.hosts.target import Model
from hf_accel.ledger import Ledger
from hf_accel.measure.calibrate import Calibratable, Probe, calibrate
from hf_accel.patches.sparge import Sparge, SpargeConfig
from hf_accel.patches.sparge.calibration import GRIDS, MOST_DENSITY, Curves, _least_loss, fit
from hf_accel.report import MethodReport
from hf_accel.sites.attention import diffusers as attention
from hf_accel.testing.models import tiny

SIZE = (4, 16, 32)  # 512 tokens: 8 blocks of 64
SETTINGS = {"block_q": 64, "block_k": 64}
MODES = ["cdf", "topk"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = tiny.build("wan")
    with torch.no_grad():  # attention that has favourites
        for block in model.blocks:
            block.attn1.norm_q.weight.fill_(4.0)
    return model


def denoise(model, seed=0, steps=2, **_):
    with torch.no_grad():
        return [tiny.run(model, "wan", size=SIZE, seed=seed, timestep=900.0 - 300 * i) for i in range(steps)]


def calibrated(model, mode="topk", **arguments):
    return calibrate(
        model, "sparge", prompts=[0], samples=2, settings={**SETTINGS, "mode": mode},
        run=lambda seed: denoise(model, seed), **arguments,
    )  # fmt: skip


class Judge:
    """Runs everything dense and notes error and density of each head of a method beside it."""

    differentiable = False

    def __init__(self, method):
        self.method, self.seen = method, []

    def attend(self, call):
        ours, dense = self.method.attend(call, None), call.dense()
        error = (ours - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
        self.seen.append((error, call.notes["density"].mean()))
        return dense

    def reset(self):
        pass

    def fork(self):
        return self


def judge(model, config, seed=0):
    """(errors, mean density) of every call of a dense run."""
    core, ledger = Judge(Sparge(config)), Ledger()
    attention.install(Model("model", model), core, ledger, MethodReport("judge", {}, "", ""), clocks())
    denoise(model, seed)
    ledger.undo()
    return core.seen


# -- fitting ---------------------------------------------------------------------------------------------------------


def curves(heads=3, slope=1.0, mode="cdf"):
    """Heads whose error falls with the budget: head h has h + 1 times the error of head 0. Bars change nothing."""
    budgets = torch.tensor([budget for budget, _ in GRIDS[mode]])[:, None]
    error = slope * (1 - budgets) * torch.arange(1, heads + 1)
    return Curves(mode, budgets.expand(-1, heads), error, error.square())


def test_l1_takes_the_least_density_within_the_bound():
    settings, evidence = fit({0: [curves()]}, [3], l1=0.31, density=None)
    assert settings["mode"] == "cdf"
    table = settings["thresholds"]
    assert table["cdfthreshd"][0] == [0.7, 0.85, 0.9]
    assert table["is_sparse"] == [[True, True, True]]
    assert evidence["l1_worst"] <= 0.31
    assert evidence["density"] == pytest.approx((0.7 + 0.85 + 0.9) / 3)
    SpargeConfig(**settings)


def test_topk_is_fitted_like_cdf():
    settings, _ = fit({0: [curves(mode="topk")]}, [3], l1=0.31, density=None)
    assert settings["mode"] == "topk"
    assert settings["thresholds"]["topk"] == [[0.7, 0.9, 0.9]]
    SpargeConfig(**settings)


def test_the_worst_sample_decides_the_error():
    settings, _ = fit({0: [curves(), curves(slope=2.0)]}, [3], l1=0.31, density=None)
    assert settings["thresholds"]["cdfthreshd"][0][0] == 0.85


def test_a_head_that_would_keep_nearly_all_is_dense():
    settings, evidence = fit({0: [curves()]}, [3], l1=0.11, density=None)
    assert settings["thresholds"]["is_sparse"] == [[True, False, False]]
    assert evidence["dense_heads"] == 2
    assert evidence["density"] == pytest.approx((0.9 + 1 + 1) / 3)
    assert MOST_DENSITY == 0.9


@pytest.mark.parametrize("wanted", [0.1, 0.3, 0.5, 0.8])
def test_density_is_shared_by_the_heads_of_a_layer_and_not_between_layers(wanted):
    settings, evidence = fit({0: [curves()], 1: [curves(slope=0.1)]}, [3, 3], l1=None, density=wanted)
    assert wanted - 0.06 < evidence["density"] <= wanted + 1e-5
    first, second = settings["thresholds"]["cdfthreshd"]
    assert first == second, "a tenth of the error in all heads is no reason to share differently"
    assert first == sorted(first), "more error, more blocks"
    assert wanted in (0.1, 0.8) or first[2] > first[0]


def test_density_is_spent_where_it_saves_most():
    """Against every other way to spend it, on a grid small enough to try them all."""
    loss = torch.tensor([[9.0, 4.0, 1.0], [4.0, 2.0, 0.9], [1.0, 1.0, 0.8], [0.0, 0.0, 0.0]])
    cost = torch.tensor([0.1, 0.3, 0.5, 1.0])[:, None].expand(-1, 3)
    for wanted in (0.2, 0.3, 0.4, 0.5, 0.7):
        choice = _least_loss(loss, cost, wanted)
        ours = loss.gather(0, choice[None]).sum()
        ways = [p for p in itertools.product(range(4), repeat=3) if cost[list(p), range(3)].mean() <= wanted + 1e-6]
        best = min(loss[list(way), range(3)].sum() for way in ways)
        assert cost.gather(0, choice[None]).mean() <= wanted + 1e-5
        assert ours <= best * 1.25 + 1e-6


def test_layers_without_records_stay_dense():
    settings, _ = fit({1: [curves()]}, [2, 3, 4], l1=0.31, density=None)
    table = settings["thresholds"]
    assert [len(row) for row in table["is_sparse"]] == [2, 3, 4]
    assert not any(table["is_sparse"][0] + table["is_sparse"][2])
    SpargeConfig(**settings)


# -- a whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [0.4, 0.7])
def test_the_density_asked_for_is_reached(model, mode, wanted, tmp_path):
    before = denoise(model)
    result = calibrated(model, mode, density=wanted, out=tmp_path / "fast.yaml")
    assert torch.equal(denoise(model)[0], before[0]), "calibration leaves no trace"
    expected = result.evidence["found"]["density"]
    assert wanted - 0.1 < expected <= wanted
    reached = [float(density) for _, density in judge(model, result.config)]
    assert sum(reached) / len(reached) == pytest.approx(expected, abs=1e-5)
    with hf_accel.apply(model, result.config) as applied:  # another input, and errors that go on to the next layer
        denoise(model, seed=5)
        assert applied.report().entries[0].run.mean_density == pytest.approx(expected, abs=0.1)
    assert f"asked density  {wanted}" in str(result)


@pytest.mark.parametrize("mode", MODES)
def test_the_error_asked_for_is_kept_head_by_head(model, mode):
    result = calibrated(model, mode, l1=0.2)
    worst = [error.max() for error, _ in judge(model, result.config)]
    assert len(worst) == 4
    assert max(worst) <= 0.2 + 1e-6
    assert result.evidence["found"]["sparse_heads"] > 0


def test_the_preset_holds_everything(model, tmp_path):
    file = tmp_path / "fast.yaml"
    result = calibrated(model, density=0.5, out=file)
    assert result.path == file
    loaded = preset.load(str(file))
    assert loaded.wanted[0].config == result.config
    assert loaded.evidence["asked"] == {"density": 0.5}
    assert loaded.evidence["samples_per_layer"] == 2
    assert loaded.models[0].model_class == "WanTransformer3DModel"
    with hf_accel.apply(model, str(file)) as applied:
        ours = denoise(model)
        assert applied.report().entries[0].run.sparse_calls == 4
    with hf_accel.apply(model, result.config):
        assert torch.equal(denoise(model)[1], ours[1])
    with pytest.raises(NotApplicable, match="meant for other models"):
        hf_accel.apply(tiny.build("ltx"), str(file))


def test_a_language_model_can_be_calibrated():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip

    @torch.no_grad()
    def read(prompt):
        return model(torch.randint(64, (1, 600), generator=torch.Generator().manual_seed(prompt)))

    result = calibrate(model, "sparge", prompts=[0, 1], density=0.6, settings=SETTINGS, run=read, samples=2)
    with hf_accel.apply(model, result.config) as applied:
        read(0)
        assert applied.report().entries[0].run.mean_density == pytest.approx(0.6, abs=0.1)


# -- which calls are probed ------------------------------------------------------------------------------------------


class Counter:
    def __init__(self, **settings):
        self.config, self.seen = SpargeConfig(**settings), []

    def probe(self, call):
        self.seen.append((call.layer.index, call.step.index))


def call_at(layer, step, count, generation=0):
    x = torch.zeros(1, 2, 4, 8)
    return AttentionCall(
        x, x, x, None, 1.0, False, Layer(f"blocks.{layer}", layer, 4), None,
        Step(step, count, 0.0, 0.0, "cond", generation), lambda: x,
    )  # fmt: skip


def test_samples_are_spread_over_the_steps_that_are_not_dense():
    method = Counter(dense_steps=0.2, dense_layers=1)
    probe = Probe(method, samples=4)
    for step in range(10):
        for _branch in range(2):
            for layer in range(4):
                probe.attend(call_at(layer, step, 10))
    assert [step for layer, step in method.seen if layer == 1] == [3, 5, 7, 9]
    assert {layer for layer, _ in method.seen} == {1, 2, 3}


def test_unknown_step_counts_take_the_first_of_every_generation():
    method = Counter()
    probe = Probe(method, samples=2)
    for generation in range(2):
        for step in range(5):
            probe.attend(call_at(0, step, None, generation))
    assert [step for _, step in method.seen] == [0, 1, 0, 1]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": None, "density": 0.3}, "at least one prompt"),
        ({"prompts": [], "density": 0.3}, "at least one prompt"),
        ({"prompts": ["a"]}, "one of the two"),
        ({"prompts": ["a"], "density": 0.3, "l1": 0.1}, "one of the two"),
        ({"prompts": ["a"], "density": 1.5}, "above 0 and at most 1"),
        ({"prompts": ["a"], "l1": -0.1}, "0 or more"),
        ({"prompts": ["a"], "l1": 0.1, "samples": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused_in_words(model, arguments, words):
    with pytest.raises(InvalidSetting, match=words):
        calibrate(model, "sparge", run=denoise, **arguments)


def test_what_cannot_be_calibrated_is_refused_in_words(model):
    with pytest.raises(NotApplicable, match=r"has nothing to calibrate.*sparge"):
        calibrate(model, "svg2", prompts=["a"], density=0.3, run=denoise)
    with pytest.raises(NotApplicable, match="run="):
        calibrate(model, "sparge", prompts=["a"], density=0.3)
    with hf_accel.apply(model, "sparge"), pytest.raises(Conflict, match="sparge stands on model"):
        calibrate(model, "sparge", prompts=["a"], density=0.3, run=denoise)
    with pytest.raises(HFAccelError, match="No attention call"):
        calibrate(model, "sparge", prompts=["a"], density=0.3, run=lambda prompt: None)


def test_a_failing_run_leaves_the_model_as_it_was(model):
    twin = copy.deepcopy(model)

    def fail(prompt):
        denoise(twin)
        raise KeyError(prompt)

    with pytest.raises(KeyError):
        calibrate(twin, "sparge", prompts=["a"], density=0.3, run=fail)
    assert not twin._forward_pre_hooks
    assert torch.equal(denoise(twin)[0], denoise(model)[0])


def test_a_budget_out_of_reach_is_said(model):
    with pytest.warns(UserWarning, match="cannot get below density"):
        calibrated(model, density=0.01)
    with pytest.warns(UserWarning, match="no head can be sparse"):
        calibrated(model, l1=0.0)


def test_sparge_keeps_the_contract():
    assert isinstance(Sparge(SpargeConfig()), Calibratable)
