"""What peft's users expect of any tuner, of QWHA's, on models of three classes."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys

import adapted
import pytest
import torch
from adapted import build, config, run
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_accel.errors import InvalidSetting, NotApplicable, WeightsMismatch
from hf_accel.peft import QWHAConfig, QWHALinear, merge_into_dense

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
]


@pytest.fixture(params=sorted(adapted.FAMILIES))
def family(request):
    return request.param


def wrap(family: str, **settings) -> PeftModel:
    return get_peft_model(build(family), config(family, **settings))


def layers_of(model) -> list[QWHALinear]:
    return [module for module in model.modules() if isinstance(module, QWHALinear)]


@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(family):
    dense = run(build(family), family)
    model = wrap(family)
    ours = run(model, family)
    assert (ours - dense).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(run(model, family), dense)
    assert torch.equal(run(model, family), ours)


@pytest.mark.parametrize("path", ["weight", "activation"])
@torch.no_grad()
def test_zero_coefficients_are_the_base_bit_for_bit(family, path):
    dense = run(build(family), family)
    assert torch.equal(run(wrap(family, init_weights=True, path=path), family), dense)


@torch.no_grad()
def test_both_sides_agree(family):
    weight, activation = (run(wrap(family, path=path), family) for path in ("weight", "activation"))
    assert torch.allclose(weight, activation, atol=1e-5)
    assert not torch.equal(weight, activation)


@torch.no_grad()
def test_save_and_load_are_exact(family, tmp_path):
    model = wrap(family)
    expected = run(model, family)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in stored} == {"qwha_values", "qwha_indptr", "qwha_columns", "qwha_factor"}
    assert all(t.dtype == torch.int16 for key, t in stored.items() if key.endswith("columns"))
    loaded = PeftModel.from_pretrained(build(family), tmp_path)
    assert torch.equal(run(loaded, family), expected)
    low = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(run(low, family), expected)


@torch.no_grad()
def test_places_come_from_the_file_not_from_a_seed(tmp_path):
    model = wrap("llama")
    for layer in layers_of(model):
        columns = layer.qwha_columns["default"]
        bounds = layer.qwha_indptr["default"].tolist()
        for start, stop in itertools.pairwise(bounds):
            order = torch.arange(stop - start, dtype=torch.int16)
            columns[start:stop] = order * 2 + 1  # other places than any seed has
    expected = run(model, "llama")
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"seed": 99}))
    assert torch.equal(run(PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), expected)


@torch.no_grad()
def test_merge_is_the_forward_and_unmerge_the_base(family):
    dense = run(build(family), family)
    model = wrap(family)
    expected = run(model, family)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(run(model, family), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(run(model, family), expected, atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(run(model, family), dense, atol=1e-5)
    plain = model.merge_and_unload()
    assert not layers_of(plain)
    assert torch.allclose(run(plain, family), expected, atol=1e-5)


@torch.no_grad()
def test_unload_gives_the_base_back(family):
    dense = run(build(family), family)
    plain = wrap(family).unload()
    assert not layers_of(plain)
    assert torch.equal(run(plain, family), dense)


@pytest.mark.parametrize("path", ["weight", "activation"])
@torch.no_grad()
def test_several_active_adapters_sum(family, path):
    model = wrap(family, path=path)
    model.add_adapter("other", config(family, seed=1, r=2, alpha=0.2, path=path))
    model.base_model.set_adapter(["default", "other"])
    both = run(model, family)
    merged = build(family)
    modules = dict(merged.named_modules())
    for layer in layers_of(model):
        update = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        modules[layer.layer_name].weight.add_(update)
    assert torch.allclose(both, run(merged, family), atol=1e-5)
    assert torch.allclose(run(model.merge_and_unload(), family), both, atol=1e-5)


def test_only_adapters_get_gradients(family):
    model = wrap(family)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(".qwha_values." in name for name in names)
    run(model, family).square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == names
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


def test_gradients_of_both_sides_agree(family):
    found = []
    for path in ("weight", "activation"):
        model = wrap(family, path=path)
        run(model, family).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        scale = gradient.abs().max()
        assert torch.allclose(gradient, found[1][name], atol=1e-4 * float(scale)), name


@torch.no_grad()
def test_deepcopy_is_independent(family):
    model = wrap(family)
    expected = run(model, family)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, family), expected)
    for layer in layers_of(other):
        layer.qwha_values["default"].mul_(2)
    assert not torch.equal(run(other, family), expected)
    assert torch.equal(run(model, family), expected)


def test_compiled_in_one_graph(family):
    model = wrap(family, path="weight")
    expected = run(model, family)
    expected.square().sum().backward()
    gradients = [layer.qwha_values["default"].grad.clone() for layer in layers_of(model)]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    ours = compiled(**adapted.FAMILIES[family].inputs(model.get_base_model()))[0]
    ours.square().sum().backward()
    assert torch.allclose(ours, expected, atol=1e-5)
    for layer, gradient in zip(layers_of(model), gradients, strict=True):
        limit = 1e-4 * float(gradient.abs().max())
        assert torch.allclose(layer.qwha_values["default"].grad, gradient, atol=limit)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = wrap(family).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            inner = model.get_base_model()
            if family == "wan":
                if reentrant:
                    pytest.skip("diffusers checkpoints without re-entering")
                inner.enable_gradient_checkpointing()
            else:
                inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
                inner.enable_input_require_grads()
        run(model, family).square().sum().backward()
        return [layer.qwha_values["default"].grad for layer in layers_of(model)]

    for plain, ours in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, ours, atol=1e-5 * float(plain.abs().max()))


@torch.no_grad()
def test_delete_and_switch(family):
    dense = run(build(family), family)
    model = wrap(family)
    first = run(model, family)
    model.add_adapter("other", config(family, seed=1))
    model.set_adapter("other")
    second = run(model, family)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(run(model, family), first)
    model.delete_adapter("default")
    assert model.active_adapter == "other"
    assert torch.equal(run(model, family), second)
    with model.disable_adapter():
        assert torch.equal(run(model, family), dense)


@pytest.mark.parametrize("kind", ["cat", "linear"])
@torch.no_grad()
def test_weighted_adapter(family, kind, tmp_path):
    model = wrap(family)
    model.add_adapter("other", config(family, seed=0 if kind == "linear" else 1, alpha=0.2))
    for layer in layers_of(model):
        layer.qwha_values["other"].add_(0.5)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "mixed", kind)
    for layer in layers_of(model):
        expected = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
        assert torch.allclose(layer.get_delta_weight("mixed"), expected, atol=1e-5)
        if kind == "linear":
            assert len(layer.qwha_values["mixed"]) == len(layer.qwha_values["default"])
    model.set_adapter("mixed")
    expected = run(model, family)
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    assert torch.equal(run(PeftModel.from_pretrained(build(family), tmp_path / "mixed"), family), expected)


def test_weighted_adapter_refusals():
    model = wrap("llama")
    model.add_adapter("other", config("llama", seed=1))
    for bad in (
        (["default", "nobody"], [1, 1], "new", "cat"),
        (["default"], [1, 1], "new", "cat"),
        (["default"], [1], "other", "cat"),
        (["default"], [1], "new", "svd"),
        (["default", "other"], [1, 1], "new", "linear"),
    ):
        with pytest.raises(InvalidSetting):
            model.add_weighted_adapter(*bad)
    assert set(model.peft_config) == {"default", "other"}


# -- the libraries around peft -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformers_load_adapter(tmp_path):
    model = wrap("llama")
    expected = run(model, "llama")
    model.save_pretrained(tmp_path)
    plain = build("llama")
    plain.load_adapter(str(tmp_path))
    assert torch.equal(run(plain, "llama"), expected)
    plain.save_pretrained(tmp_path / "again")
    assert "import hf_accel.peft" in (tmp_path / "again" / "README.md").read_text()
    assert torch.equal(run(PeftModel.from_pretrained(build("llama"), tmp_path / "again"), "llama"), expected)


@torch.no_grad()
def test_diffusers_add_adapter():
    dense = run(build("wan"), "wan")
    model = build("wan")
    model.add_adapter(config("wan"), "mine")
    ours = run(model, "wan")
    assert not torch.allclose(ours, dense, atol=1e-4)
    assert torch.equal(ours, run(wrap("wan"), "wan"))
    model.disable_adapters()
    assert torch.equal(run(model, "wan"), dense)
    model.enable_adapters()
    assert torch.equal(run(model, "wan"), ours)


def test_the_readme_says_what_to_import(tmp_path):
    model = wrap("llama")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # a second time says it no second time
    text = (tmp_path / "README.md").read_text()
    assert text.count("import hf_accel.peft") == 1
    assert text.index("import hf_accel.peft") < 500
    assert text.startswith("---\n")


def test_without_our_import_loading_fails_as_the_readme_says(tmp_path):
    wrap("llama").save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; print(PeftConfig.from_pretrained({str(tmp_path)!r}).peft_type.value)"
    without = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "KeyError: 'QWHA'" in without.stderr


@torch.no_grad()
def test_another_scale_on_loading_keeps_the_update(family, tmp_path):
    model = wrap(family)
    expected = run(model, family)
    model.save_pretrained(tmp_path)
    for changes in ({"alpha": 0.7}, {"alpha": 1.0, "scale": 4e3}):
        other = QWHAConfig.from_pretrained(tmp_path)
        for name, value in changes.items():
            setattr(other, name, value)
        loaded = PeftModel.from_pretrained(build(family), tmp_path, config=other)
        assert torch.allclose(run(loaded, family), expected, atol=1e-5)
        here, there = layers_of(model)[0], layers_of(loaded)[0]
        ratio = float(here.factor("default") / there.factor("default"))
        assert ratio != pytest.approx(1)
        assert torch.allclose(there.qwha_values["default"], here.qwha_values["default"] * ratio, rtol=1e-6)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_adapters_saved_with_other_settings_are_refused(tmp_path):
    wrap("llama").save_pretrained(tmp_path)
    other = QWHAConfig.from_pretrained(tmp_path)
    other.r = 2
    with pytest.raises(WeightsMismatch, match="saved with other settings"):
        PeftModel.from_pretrained(build("llama"), tmp_path, config=other)


@pytest.mark.parametrize(
    ("part", "spoil", "words"),
    [
        ("qwha_columns", lambda t: t.flip(0), "ascend"),
        ("qwha_columns", lambda t: t + 90, "columns reach"),
        ("qwha_indptr", lambda t: t + 1, "do not rise from 0"),
        ("qwha_indptr", None, "qwha_indptr missing"),
    ],
)
def test_wrong_positions_are_refused(tmp_path, part, spoil, words):
    wrap("llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    key = next(key for key in stored if key.endswith(part))
    if spoil is None:
        del stored[key]
    else:
        stored[key] = spoil(stored[key])
    save_file(stored, file)
    with pytest.raises(WeightsMismatch, match=words):
        PeftModel.from_pretrained(build("llama"), tmp_path)
    if spoil is not None:
        plain = build("llama")
        plain.load_adapter(str(tmp_path))  # transformers loads tensor by tensor; the first forward looks
        with pytest.raises(WeightsMismatch, match=words):
            run(plain, "llama")


def test_a_newer_file_is_refused(tmp_path):
    wrap("llama").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    with pytest.raises(WeightsMismatch, match="Upgrade hf_accel"):
        PeftModel.from_pretrained(build("llama"), tmp_path)


def test_budgets_above_the_size_are_refused_and_say_what_fits():
    with pytest.raises(InvalidSetting, match=r"at most 32.*q_proj is \[64, 64\]"):
        get_peft_model(build("llama"), QWHAConfig(r=33, target_modules=["q_proj"]))
    with pytest.raises(InvalidSetting, match="at most 4096"):
        get_peft_model(build("llama"), QWHAConfig(n_coefficients=4097, target_modules=["q_proj"]))


def test_strict_refuses_a_length_without_transform():
    with pytest.raises(InvalidSetting, match=r"76 inputs.*blocks of 4"):
        get_peft_model(build("bert"), config("bert", strict=True))
    model = get_peft_model(build("bert"), config("bert"))
    assert {layer.block for layer in layers_of(model)} == {32, 4}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0}, {"r": True}, {"n_coefficients": -1}, {"alpha": 0.0}, {"alpha": 2.0, "scale": 3.0},
        {"scale": float("nan")}, {"path": "both"}, {"selection": "random"}, {"allocation": "even"},
        {"temperature": -1}, {"bias": "some"}, {"target_modules": "q.*", "layers_to_transform": [0]},
        {"layers_pattern": "layers"}, {"coefficients_pattern": {"q_proj": 0}},
    ],
)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(InvalidSetting):
        QWHAConfig(**settings)


def test_no_linear_is_no_target():
    with pytest.raises(NotApplicable, match=r"embed_tokens.*no linear layer"):
        get_peft_model(build("llama"), QWHAConfig(r=2, target_modules=["embed_tokens"]))


def test_budgets_by_name_and_by_count():
    settings = {"n_coefficients": 70, "coefficients_pattern": {r"layers\.1\..*v_proj": 11}}
    model = get_peft_model(build("llama"), QWHAConfig(target_modules=["q_proj", "v_proj"], **settings))
    counts = {layer.layer_name: len(layer.qwha_values["default"]) for layer in layers_of(model)}
    assert counts.pop("model.layers.1.self_attn.v_proj") == 11
    assert set(counts.values()) == {70}


def test_bias_and_modules_to_save_are_trained_and_saved(tmp_path):
    model = get_peft_model(build("bert"), config("bert", bias="qwha_only", modules_to_save=["classifier"]))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = {"qwha_values", "base_layer.bias", "modules_to_save"}
    assert all(any(kind in name for kind in kinds) for name in names)
    assert {kind for kind in kinds for name in names if kind in name} == kinds
    run(model, "bert").square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(run(loaded, "bert"), run(model, "bert"))


# -- packed bases ------------------------------------------------------------------------------------------------------


def test_on_packed_linears(tmp_path):
    _, base = adapted.packed_llama()
    dense = run(base, "llama").detach()
    model = get_peft_model(copy.deepcopy(base), config("llama", target_modules="all-linear"))
    assert len(layers_of(model)) == 14
    ours = run(model, "llama")
    ours.square().sum().backward()
    assert all(layer.qwha_values["default"].grad.abs().max() > 0 for layer in layers_of(model))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(run(model, "llama"), dense)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(run(loaded, "llama"), ours)


@torch.no_grad()
def test_merging_into_packed_is_refused_with_the_alternatives():
    _, base = adapted.packed_llama()
    model = get_peft_model(base, config("llama", target_modules="all-linear"))
    expected = run(model, "llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotApplicable, match=r"Keep the adapter.*merge_into_dense"):
            merge()
    assert torch.equal(run(model, "llama"), expected)
    plain = merge_into_dense(copy.deepcopy(model), dtype=torch.float32)
    assert not [m for m in plain.modules() if type(m).__name__ in ("QWHALinear", "PackedLinear")]
    assert torch.allclose(run(plain, "llama"), expected, atol=1e-5)
    half = merge_into_dense(model)
    weight = half.get_submodule("model.layers.0.self_attn.q_proj").weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, plain.get_submodule("model.layers.0.self_attn.q_proj").weight.bfloat16())
