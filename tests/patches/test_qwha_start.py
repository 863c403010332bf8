"""QWHA on models: initialisation of peft's adapters, ``apply(model, "qwha")``, and what both refuse."""

from __future__ import annotations

import copy

import adapted
import pytest
import torch
from adapted import build, run
from peft import LoraConfig, PeftModel, get_peft_model

import hf_accel
from hf_accel.errors import InvalidSetting, NotApplicable, RevertRefused, WeightsMismatch
from hf_accel.patches.qwha import initialize_qwha
from hf_accel.peft import QWHAConfig, QWHALinear, merge_into_dense
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.testing.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
TEXT = {"calibration": torch.randint(0, 101, (6, 40), generator=torch.Generator().manual_seed(1)), "progress": False}


@pytest.fixture
def pair():
    return adapted.packed_llama()


def adapter(**settings) -> QWHAConfig:
    return QWHAConfig(**{"r": 6, "target_modules": "all-linear", **settings})


def layers_of(model) -> dict[str, QWHALinear]:
    return {m.layer_name: m for m in model.modules() if isinstance(m, QWHALinear)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def inputs_of(full, name: str) -> torch.Tensor:
    """The calibration inputs of a layer in the full model, ``[tokens, n]`` in fp64."""
    seen = []
    handle = full.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for row in TEXT["calibration"]:
            full(row[None])
    handle.remove()
    return torch.cat([x.flatten(0, 1) for x in seen]).double()


@torch.no_grad()
def test_the_model_comes_closer_to_the_full_one(pair):
    full, packed = pair
    expected, rounded = run(full, "llama"), run(packed, "llama")
    model = get_peft_model(packed, adapter())
    assert torch.allclose(run(model, "llama"), rounded, atol=1e-5)  # the base multiplies codes, the adapter weights
    starts = initialize_qwha(model, reference=full, **TEXT)
    assert [start.name for start in starts] == list(layers_of(model))
    assert all(start.repaired < 0.7 * start.quantised and start.tokens == 240 for start in starts)
    assert distance(run(model, "llama"), expected) < 0.7 * distance(rounded, expected)


@torch.no_grad()
def test_reported_errors_are_those_of_the_layers(pair):
    full, packed = pair
    model = get_peft_model(packed, adapter())
    starts = {start.name: start for start in initialize_qwha(model, reference=full, **TEXT)}
    for name, layer in layers_of(model).items():
        x = inputs_of(full, name)
        whole = full.get_submodule(name).weight.double()
        rounded = layer.dense_base_weight().double()
        exact = x @ whole.T
        repaired = x @ (rounded + layer.get_delta_weight("default").double()).T
        assert starts[name].quantised == pytest.approx(float((x @ rounded.T - exact).norm() / exact.norm()), rel=1e-4)
        assert starts[name].repaired == pytest.approx(float((repaired - exact).norm() / exact.norm()), rel=1e-3)


@torch.no_grad()
def test_full_budget_is_the_full_model(pair):
    full, packed = pair
    sizes = {name: m.in_features * m.out_features for name, m in packed.named_modules() if isinstance(m, PackedLinear)}
    pattern = {name.replace(".", r"\."): size for name, size in sizes.items()}
    model = get_peft_model(packed, adapter(coefficients_pattern=pattern))
    initialize_qwha(model, reference=full, **TEXT)
    assert torch.allclose(run(model, "llama"), run(full, "llama"), atol=1e-4)


@torch.no_grad()
def test_the_scale_of_the_adapter_does_not_change_its_start(pair):
    full, packed = pair
    found = []
    for settings in ({"alpha": 1.0}, {"alpha": 0.01}, {"scale": 4e3}):
        model = get_peft_model(copy.deepcopy(packed), adapter(**settings))
        initialize_qwha(model, reference=full, **TEXT)
        found.append(run(model, "llama"))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[0], found[2], atol=1e-5)


@torch.no_grad()
def test_variants_of_the_config_reach_the_start(pair):
    full, packed = pair
    kept = set()
    for settings in ({}, {"allocation": "code"}, {"selection": "code"}, {"temperature": 0.0}):
        model = get_peft_model(copy.deepcopy(packed), adapter(**settings))
        initialize_qwha(model, reference=full, **TEXT)
        layer = next(iter(layers_of(model).values()))
        kept.add((tuple(layer.qwha_indptr["default"].tolist()), tuple(layer.qwha_columns["default"].tolist())))
        if "temperature" in settings:
            assert int(layer.qwha_indptr["default"].diff().max()) == int(layer.qwha_indptr["default"].diff().min())
    assert len(kept) == 4


@torch.no_grad()
def test_a_reference_from_a_folder(pair, tmp_path):
    full, packed = pair
    full.save_pretrained(tmp_path)
    models = [get_peft_model(copy.deepcopy(packed), adapter()) for _ in range(2)]
    initialize_qwha(models[0], reference=full, **TEXT)
    initialize_qwha(models[1], reference=str(tmp_path), **TEXT)
    assert torch.equal(run(models[0], "llama"), run(models[1], "llama"))


@torch.no_grad()
def test_the_started_adapter_is_saved_and_loaded_exactly(pair, tmp_path):
    full, packed = pair
    model = get_peft_model(copy.deepcopy(packed), adapter())
    initialize_qwha(model, reference=full, **TEXT)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(packed, tmp_path)
    assert torch.equal(run(loaded, "llama"), run(model, "llama"))


@torch.no_grad()
def test_dense_bases_that_were_rounded_elsewhere(pair):
    """Nothing is asked of the base but that it shows its weight; one adapter of several is initialised."""
    full, packed = pair
    dense = copy.deepcopy(full)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            dense.get_submodule(name).weight.copy_(module.dequantize_weight())
    model = get_peft_model(dense, adapter(target_modules=["q_proj"], init_weights=False))
    model.add_adapter("fresh", adapter(target_modules=["q_proj", "v_proj"]))
    before = {name: layer.get_delta_weight("default") for name, layer in layers_of(model).items() if "q_p" in name}
    starts = initialize_qwha(model, reference=full, adapter_name="fresh", **TEXT)
    assert len(starts) == 4
    for name, update in before.items():
        assert torch.equal(layers_of(model)[name].get_delta_weight("default"), update)


@torch.no_grad()
def test_denoisers_with_forwards_and_pipelines_as_calibration():
    full = tiny.build("wan")
    packed = copy.deepcopy(full)
    adapted.pack(packed, group_size=4)
    forwards = [tiny.TINY["wan"].inputs(full, timestep=t, seed=3) for t in (900.0, 500.0, 100.0)]
    found = []
    for calibration in (forwards, lambda: [full(**inputs) for inputs in forwards]):
        model = get_peft_model(copy.deepcopy(packed), adapter(r=4, target_modules=["to_q", "to_v", "ffn.net.2"]))
        starts = initialize_qwha(model, calibration, full, progress=False)
        assert all(start.repaired < 0.8 * start.quantised for start in starts)
        found.append(run(model, "wan"))
    assert torch.equal(*found)


# -- apply -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quantised():
    model = build("llama")
    options = {"bits": 2, "group_size": 32, **TEXT}
    return model, run(model, "llama").detach(), hf_accel.apply(model, "gptq", **options)


@pytest.mark.parametrize("original", ["keep", "offload"])
@torch.no_grad()
def test_on_gptq_with_the_weights_that_it_kept(original):
    model = build("llama")
    full = run(model, "llama")
    names = {name: module for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hf_accel.apply(model, "gptq", bits=2, group_size=32, original=original, **TEXT)
    rounded = run(model, "llama")
    applied = hf_accel.apply(model, "qwha", r=6, **TEXT)
    ours = run(model, "llama")
    assert distance(ours, full) < distance(rounded, full)
    assert len(layers_of(model)) == 14
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 14
    assert all(name.endswith(".qwha_values.default") for name in trained)
    assert "relative error of a layer's output" in str(applied.report())
    other = copy.deepcopy(model)
    assert torch.equal(run(other, "llama"), ours)
    applied.revert()
    assert torch.equal(run(model, "llama"), rounded)
    assert not hasattr(model, "peft_config")
    hf_accel.revert(other)  # both methods of the copy, one standing on the other
    assert torch.equal(run(other, "llama"), full)
    hf_accel.revert(model)
    assert torch.equal(run(model, "llama"), full)
    assert all(module is names[name] for name, module in model.named_modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_apply_is_the_same_start_as_by_hand(pair):
    full, packed = pair
    by_hand = get_peft_model(copy.deepcopy(packed), adapter(r=6))
    initialize_qwha(by_hand, reference=full, **TEXT)
    hf_accel.apply(packed, "qwha", r=6, reference=full, **TEXT)
    assert torch.equal(run(packed, "llama"), run(by_hand, "llama"))


def test_an_applied_adapter_trains_and_is_saved(pair, tmp_path):
    full, packed = pair
    rest = copy.deepcopy(packed)
    applied = hf_accel.apply(packed, "qwha", r=6, reference=full, **TEXT)
    optimizer = torch.optim.AdamW([p for p in packed.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.mse_loss(run(packed, "llama"), run(full, "llama").detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    packed.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(rest, tmp_path), "llama"), run(packed, "llama"))
    applied.revert()


@torch.no_grad()
def test_the_whole_way_through_checkpoints(quantised, tmp_path):
    """Quantised, saved, reloaded; adapter on, initialised from the full model's folder, saved, reloaded; made dense."""
    from transformers import AutoModelForCausalLM

    model, full, _ = quantised
    model.save_pretrained(tmp_path / "packed")
    build("llama").save_pretrained(tmp_path / "full")
    tuned = get_peft_model(hf_accel.load_quantized(tmp_path / "packed"), adapter())
    assert torch.allclose(run(tuned, "llama"), run(model, "llama"), atol=1e-5)
    hf_accel.initialize_qwha(tuned, reference=str(tmp_path / "full"), **TEXT)
    ours = run(tuned, "llama")
    assert distance(ours, full) < distance(run(model, "llama"), full)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(hf_accel.load_quantized(tmp_path / "packed"), tmp_path / "adapter")
    assert torch.equal(run(loaded, "llama"), ours)
    merge_into_dense(loaded, dtype=torch.float32).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not [m for m in dense.modules() if isinstance(m, PackedLinear | QWHALinear)]
    assert torch.allclose(run(dense, "llama"), ours, atol=1e-5)


@torch.no_grad()
def test_gptq_is_not_undone_below_an_adapter(quantised):
    model, full, below = quantised
    above = hf_accel.apply(model, "qwha", r=6, **TEXT)
    ours = run(model, "llama")
    with pytest.raises(RevertRefused, match="QWHALinear"):
        below.revert()
    assert torch.equal(run(model, "llama"), ours)
    above.revert()
    below.revert()
    assert torch.equal(run(model, "llama"), full)


@torch.no_grad()
def test_applied_again_it_replaces_itself(quantised):
    model, _, _ = quantised
    hf_accel.apply(model, "qwha", r=2, **TEXT)
    second = hf_accel.apply(model, "qwha", r=6, **TEXT)
    counts = {len(layer.qwha_values["default"]) for layer in layers_of(model).values()}
    assert counts == {6 * 128, 6 * 96, 6 * 160}
    assert "r=6" in str(second.report())
    hf_accel.revert(model)


def test_what_was_trained_survives_a_replacement_that_fails(quantised):
    model, _, _ = quantised
    applied = hf_accel.apply(model, "qwha", r=2, **TEXT)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.qwha_values["default"].add_(0.01)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    ours = run(model, "llama")
    with pytest.raises(InvalidSetting):
        hf_accel.apply(model, "qwha", r=6, **{**TEXT, "calibration": []})
    assert applied.active
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad and "qwha_values" not in name] == []
    assert torch.equal(run(model, "llama"), ours)


def test_a_failure_leaves_the_model_as_it_was(quantised):
    model, _, _ = quantised
    before = dict(model.named_modules())
    ours = run(model, "llama")
    bad = {**TEXT, "calibration": []}
    with pytest.raises(InvalidSetting):
        hf_accel.apply(model, "qwha", r=6, **bad)
    assert all(module is before[name] for name, module in model.named_modules())
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(run(model, "llama"), ours)


@pytest.mark.parametrize("order", [("qwha", "radial"), ("radial", "qwha")], ids="-".join)
@torch.no_grad()
def test_beside_a_method_of_another_site(order):
    full = tiny.build("wan")
    packed = copy.deepcopy(full)
    adapted.pack(packed, group_size=4)
    rounded = run(packed, "wan")
    forwards = [tiny.TINY["wan"].inputs(full, timestep=t, seed=3) for t in (900.0, 100.0)]
    options = {
        "qwha": {"r": 2, "calibration": forwards, "reference": full, "progress": False},
        "radial": {"dense_steps": 1.0},
    }
    alone = hf_accel.apply(packed, "qwha", **options["qwha"])
    expected = run(packed, "wan")
    alone.revert()
    applied = [hf_accel.apply(packed, name, **options[name]) for name in order]
    assert torch.allclose(run(packed, "wan"), expected, atol=1e-5)
    applied[0].revert()
    applied[1].revert()
    assert torch.equal(run(packed, "wan"), rounded)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_full_models_have_nothing_to_repair():
    with pytest.raises(NotApplicable, match="without packed linears"):
        hf_accel.apply(build("llama"), "qwha", **TEXT)


def test_models_with_adapters_are_refused(quantised):
    model, _, _ = quantised
    model.add_adapter(QWHAConfig(r=2, target_modules=["q_proj"]), "mine")
    with pytest.raises(NotApplicable, match="has adapters of peft already"):
        hf_accel.apply(model, "qwha", **TEXT)


def test_dropped_weights_need_a_reference():
    model, full = build("llama"), build("llama")
    hf_accel.apply(model, "gptq", bits=2, group_size=32, original="drop", **TEXT)
    with pytest.raises(NotApplicable, match=r"no full weights for model\.layers\.0.*13 more.*reference="):
        hf_accel.apply(model, "qwha", r=6, **TEXT)
    hf_accel.apply(model, "qwha", r=6, reference=full, **TEXT)
    assert len(layers_of(model)) == 14


def test_calibration_is_needed(pair):
    with pytest.raises(InvalidSetting, match="calibration"):
        hf_accel.apply(pair[1], "qwha", reference=pair[0])


@pytest.mark.parametrize("texts", [["", "  "], []])
def test_empty_texts(pair, texts):
    model = get_peft_model(pair[1], adapter())
    with pytest.raises(InvalidSetting, match="calibration"):
        initialize_qwha(model, texts, pair[0], tokenizer=lambda text, **_: {"input_ids": []}, progress=False)


def test_without_an_adapter(pair):
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(NotApplicable, match="no QWHA adapter 'default'"):
        initialize_qwha(model, reference=pair[0], **TEXT)
    with pytest.raises(NotApplicable, match="no QWHA adapter 'other'"):
        initialize_qwha(get_peft_model(pair[1], adapter()), reference=pair[0], adapter_name="other", **TEXT)


def test_wrong_references(pair):
    full, packed = pair
    model = get_peft_model(copy.deepcopy(packed), adapter())
    with pytest.raises(NotApplicable, match=r"q_proj is packed\. Give the full model"):
        initialize_qwha(model, reference=packed, **TEXT)
    other = adapted.build("bert")
    with pytest.raises((WeightsMismatch, InvalidSetting)):
        initialize_qwha(model, reference=other, **TEXT)
    from transformers import LlamaForCausalLM

    small = copy.deepcopy(full.config)
    small.intermediate_size = 64
    with pytest.raises(WeightsMismatch, match=r"\[96, 64\].*is \[64, 64\]"):
        initialize_qwha(model, reference=LlamaForCausalLM(small), **TEXT)


def test_nan_in_a_gram_matrix_names_the_layer(pair):
    full, packed = pair
    with torch.no_grad():
        full.get_submodule("model.layers.1.input_layernorm").weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn"):
        initialize_qwha(get_peft_model(packed, adapter()), reference=full, **TEXT)


def test_merged_adapters_are_not_overwritten(pair):
    model = get_peft_model(build("llama"), adapter(target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(NotApplicable, match="unmerge_adapter"):
        initialize_qwha(model, reference=pair[0], **TEXT)


def test_conflicts_with_nothing_of_ours():
    """An adapter stands beside every other site."""
    from hf_accel import registry
    from hf_accel.composition import conflict

    methods = registry.methods()
    assert not [name for name, other in methods.items() if conflict(methods["qwha"], other) is not None]


def test_in_one_request_with_gptq(pair):
    """What it stands on is put there first; the two are undone together, and a failure undoes both."""
    full, _ = pair
    before, text = run(full, "llama"), {"calibration": TEXT["calibration"]}
    quiet = {"gptq": {"bits": 2, "group_size": 32, "progress": False}, "qwha": {"r": 6, "progress": False}}
    rounded = copy.deepcopy(full)
    hf_accel.apply(rounded, {"gptq": quiet["gptq"]}, **text)
    applied = hf_accel.apply(full, dict(reversed(quiet.items())), **text)
    assert [name for _, name in hf_accel.api.applied_methods(full)] == ["gptq", "qwha"]
    assert distance(run(full, "llama"), before) < distance(run(rounded, "llama"), before)
    applied.revert()
    assert torch.equal(run(full, "llama"), before)
    with pytest.raises(InvalidSetting, match="calibration"):
        hf_accel.apply(full, {**quiet, "gptq": {**quiet["gptq"], "rounding": "nearest"}})
    assert torch.equal(run(full, "llama"), before)
