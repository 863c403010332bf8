"""Surgeries: a new model, the old one untouched, full budget dense, and words where the wrong door is taken."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

import hf_accel
from hf_accel import errors, registry
from hf_accel.config import Config, setting
from hf_accel.facts import Facts
from hf_accel.report import Patched
from hf_accel.sites.surgery.base import Surgery
from hf_accel.testing.models import tiny


@dataclass(frozen=True)
class NarrowConfig(Config):
    METHOD = "toy-narrow"
    density: float = setting(0.5, "share of the units of every MLP that stay", gt=0, le=1)


class Narrow(Surgery):
    """Llama's MLPs with fewer units: those with the largest weights in the down projection."""

    name, paper, summary = "toy-narrow", "none", "a toy"
    facts = Facts(
        sites="surgery", kind="surgery", media=frozenset({"text"}), full_budget={"density": 1.0}, budget="density"
    )
    Config = NarrowConfig

    @classmethod
    def why_not(cls, model):
        found = any(hasattr(module, "down_proj") for module in model.module.modules())
        return None if found else f"{model.class_name} has no MLP with a down_proj"

    def convert(self, model, report):
        new = copy.deepcopy(model.module)
        for name, mlp in new.named_modules():
            if not hasattr(mlp, "down_proj"):
                continue
            units = mlp.down_proj.in_features
            kept = mlp.down_proj.weight.norm(dim=0).topk(max(1, round(self.config.density * units))).indices.sort()[0]
            mlp.gate_proj, mlp.up_proj = _rows(mlp.gate_proj, kept), _rows(mlp.up_proj, kept)
            mlp.down_proj = _columns(mlp.down_proj, kept)
            report.patched.append(Patched(model.name, name, f"MLP of {len(kept)} units, was {units}"))
        new.config.intermediate_size = len(kept)
        return new


def _rows(linear, kept):
    new = torch.nn.Linear(linear.in_features, len(kept), bias=False)
    new.weight.data = linear.weight.data[kept].clone()
    return new


def _columns(linear, kept):
    new = torch.nn.Linear(len(kept), linear.out_features, bias=False)
    new.weight.data = linear.weight.data[:, kept].clone()
    return new


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    registry.methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register(Narrow)


@pytest.fixture
def model():
    return tiny.build("llama").eval()


IDS = torch.arange(12)[None]


def test_a_new_model_and_the_old_one_as_it_was(model, tmp_path):
    before, objects = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]
    old = model(IDS).logits
    converted = hf_accel.convert(model, "toy-narrow", density=0.25)
    assert converted.model is not model
    assert converted.model.model.layers[0].mlp.down_proj.in_features == 12
    assert [id(p) for p in model.parameters()] == objects
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, old)
    assert converted.model(IDS).logits.shape == old.shape
    assert "2 x MLP of 12 units, was 48" in str(converted.report)
    assert converted.report.to_dict()["settings"]["density"] == 0.25
    converted.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(again(IDS).logits, converted.model(IDS).logits, atol=1e-6)


def test_full_budget_is_dense_and_the_error_falls_towards_it(model):
    wanted = model(IDS).logits
    errors_by_density = [
        float((hf_accel.convert(model, "toy-narrow", density=d).model(IDS).logits - wanted).norm() / wanted.norm())
        for d in (0.1, 0.5, 1.0)
    ]
    assert errors_by_density[2] <= 1e-5
    assert errors_by_density == sorted(errors_by_density, reverse=True)


def test_training_the_new_model_leaves_the_old(model):
    new = hf_accel.convert(model, "toy-narrow").model
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_patches_go_on_the_new_model(model):
    new = hf_accel.convert(model, "toy-narrow").model
    with hf_accel.apply(new, "sparge"):
        new(IDS)
    assert "_hf_accel" not in vars(model)


def test_each_door_points_to_the_other(model):
    with pytest.raises(errors.NotApplicable, match=r"surgery.*hf_accel\.convert\(model, 'toy-narrow'\)"):
        hf_accel.apply(model, "toy-narrow")
    with pytest.raises(errors.NotApplicable, match=r"sparge is a patch.*hf_accel\.apply\(.*Surgeries: toy-narrow"):
        hf_accel.convert(model, "sparge")
    with pytest.raises(errors.UnknownMethod, match="toy-narrow"):
        hf_accel.convert(model, "toy-narow")
    with pytest.raises(errors.InvalidSetting, match="density"):
        hf_accel.convert(model, "toy-narrow", density=2.0)


def test_models_that_do_not_suit(model):
    with pytest.raises(errors.NotApplicable, match="no MLP with a down_proj"):
        hf_accel.convert(tiny.build("wan"), "toy-narrow")
    hf_accel.apply(model, "sparge")
    with pytest.raises(errors.Conflict, match="sparge on model"):
        hf_accel.convert(model, "toy-narrow")


def test_explain_and_methods_know_the_kind(model):
    assert hf_accel.methods()["toy-narrow"]["kind"] == "surgery"
    explained = hf_accel.explain(model)
    verdict = next(v for v in explained if v.method == "toy-narrow")
    assert not verdict.applies
    assert "hf_accel.convert(model, 'toy-narrow'); it suits model (LlamaForCausalLM)" in verdict.reason
    assert not any("toy-narrow" in (pair.first, pair.second) for pair in explained.pairs)
    other = next(v for v in hf_accel.explain(tiny.build("wan")) if v.method == "toy-narrow")
    assert "no MLP" in other.reason


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda self, model, report: model.module, "returned the old model itself"),
        (lambda self, model, report: None, "returned a NoneType"),
        (lambda self, model, report: _after(model.module, lambda m: m.lm_head.weight.data.mul_(2)), r"lm_head\.weight"),
        (lambda self, model, report: _after(model.module, lambda m: m.train()), "changed the model.* more"),
        (lambda self, model, report: _after(model.module, _swap_rows), r"lm_head\.weight"),
        (lambda self, model, report: _after(model.module, lambda m: setattr(m.config, "x", 1)), "config"),
        (lambda self, model, report: _after(model.module, lambda m: m.model.register_forward_hook(print)), "model"),
        (lambda self, model, report: _sharing(model.module), r"shares memory.*lm_head\.weight"),
    ],
)
def test_a_surgery_that_breaks_its_promise_is_caught(model, monkeypatch, convert, words):
    monkeypatch.setattr(Narrow, "convert", convert)
    with pytest.raises(errors.HFAccelError, match=words):
        hf_accel.convert(model, "toy-narrow")


def _after(module, change):
    new = copy.deepcopy(module)
    change(module)
    return new


def _swap_rows(module):
    module.lm_head.weight.data[[0, 1]] = module.lm_head.weight.data[[1, 0]]


def _sharing(module):
    new = copy.deepcopy(module)
    new.lm_head.weight = module.lm_head.weight
    return new
