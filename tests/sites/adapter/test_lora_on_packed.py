"""peft's own tuners on packed linears: equal to the same tuner on the dequantised weights, or refused in words."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings

import adapted
import peft
import pytest
import torch
import transformers
from adapted import run
from lora_kinds import KINDS, TARGETS, adapt, dequantised, lora, stir, tuners_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.peft import PackedLoraLinear, merge_into_dense
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.adapter.peft import seam

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


def bert() -> torch.nn.Module:
    """With biases; at 4 bits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=101, max_position_embeddings=64)
    model = transformers.BertForSequenceClassification(config).eval()
    adapted.pack(model, bits=4)
    return model


# -- the tuners that go on it ------------------------------------------------------------------------------------------


def test_as_on_the_dequantised_weights(base, kind):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unsupported layer type")  # "... proceed at your own risk"
        model = adapt(copy.deepcopy(base), KINDS[kind]())
    twin = adapt(dequantised(base), KINDS[kind]())
    assert all(isinstance(layer.get_base_layer(), PackedLinear) for layer in tuners_of(model))
    ours, theirs = run(model, "llama"), run(twin, "llama")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - run(base, "llama")).abs().max() > 1e-3
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        assert (found[name] - grad).abs().max() < 1e-5 * grad.abs().max(), name


@torch.no_grad()
def test_off_saved_and_loaded(base, kind, tmp_path):
    model = adapt(copy.deepcopy(base), KINDS[kind]())
    ours = run(model, "llama")
    with model.disable_adapter():
        assert torch.equal(run(model, "llama"), run(base, "llama"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(run(loaded, "llama"), ours)
    assert torch.equal(run(copy.deepcopy(model), "llama"), ours)
    assert torch.equal(run(model.unload(), "llama"), run(base, "llama"))


@torch.no_grad()
def test_merged_into_dense_only(base, kind):
    model = adapt(copy.deepcopy(base), KINDS[kind]())
    ours = run(model, "llama")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotApplicable, match=r"q_proj and .* more.*Keep the adapter.*merge_into_dense"):
            merge()
    assert torch.equal(run(model, "llama"), ours)
    if kind == "lora with a bias":  # which a base without one cannot take up; peft's own words
        with pytest.raises(RuntimeError, match="base layer has no bias"):
            merge_into_dense(model)
        return
    half = merge_into_dense(copy.deepcopy(model))
    plain = merge_into_dense(model, dtype=torch.float32)
    assert not [m for m in plain.modules() if isinstance(m, BaseTunerLayer | PackedLinear)]
    assert torch.allclose(run(plain, "llama"), ours, atol=1e-5)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        assert torch.equal(half.get_submodule(name).weight, plain.get_submodule(name).weight.bfloat16())


@pytest.mark.parametrize(
    "variant",
    [
        {
            "use_bdlora": peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False
            )
        },
        {"velora_config": peft.tuners.lora.config.VeloraConfig()},
        {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    ],
    ids=["bdlora", "velora", "monteclora"],
)
def test_variants_that_read_no_weight(base, variant):
    model, twin = (adapt(m, lora(**variant)) for m in (copy.deepcopy(base), dequantised(base)))
    assert torch.allclose(run(model, "llama"), run(twin, "llama"), atol=1e-5)


def test_activated_lora_begins_at_its_token(base):
    model = adapt(copy.deepcopy(base), lora(alora_invocation_tokens=[7, 8]))
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        ours, plain = model(input_ids=ids).logits, base(input_ids=ids).logits
    assert torch.allclose(ours[:, :6], plain[:, :6], atol=1e-6)
    assert (ours[:, 6:] - plain[:, 6:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_qa_lora_sees_means_of_groups(base, tmp_path):
    model = adapt(copy.deepcopy(base), lora(use_qalora=True, qalora_group_size=16))
    layer = tuners_of(model)[0]
    assert layer.lora_A["default"].weight.shape == (4, 64 // 16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    pooled = x.view(3, 4, 16).mean(2) * 4
    update = pooled @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * layer.scaling["default"]
    assert torch.allclose(layer(x), layer.base_layer(x) + update, atol=1e-5)
    assert torch.allclose(x @ layer.get_delta_weight("default").T, update, atol=1e-5)
    ours = run(model, "llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), "llama"), ours)
    assert torch.allclose(run(merge_into_dense(model, dtype=torch.float32), "llama"), ours, atol=1e-5)
    with pytest.raises(InvalidSetting, match="peft has not both"):
        get_peft_model(copy.deepcopy(base), lora(use_qalora=True, use_dora=True))


@torch.no_grad()
def test_several_adapters(base):
    model = adapt(copy.deepcopy(base), lora(), "a")
    model.add_adapter("b", lora(r=2))
    model.set_adapter("b")
    stir(model, seed=8)
    layer = tuners_of(model)[0]
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    plain, found = layer.base_layer(x), {}
    for names in ("a", "b", ["a", "b"]):
        model.base_model.set_adapter(names)
        found[str(names)] = layer(x) - plain
    assert torch.allclose(found["a"] + found["b"], found["['a', 'b']"], atol=1e-5)
    model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "c", combination_type="cat")
    model.set_adapter("c")
    assert torch.allclose(layer(x) - plain, found["a"] - 0.5 * found["b"], atol=1e-5)
    mixed = model(**adapted.token_ids(model), adapter_names=["a", "__base__"]).logits
    assert torch.allclose(mixed[1], run(base, "llama")[1], atol=1e-5)
    model.set_adapter("a")
    assert torch.allclose(mixed[0], run(model, "llama")[0], atol=1e-5)
    model.delete_adapter("b")
    assert "b" not in layer.lora_A
    only_c = merge_into_dense(copy.deepcopy(model), ["c"], dtype=torch.float32)
    model.set_adapter("c")
    assert torch.allclose(run(only_c, "llama"), run(model, "llama"), atol=1e-5)


@torch.no_grad()
def test_other_ways_of_peft_to_the_same(base, tmp_path):
    model = adapt(copy.deepcopy(base), lora())
    ours = run(model, "llama")
    assert torch.allclose(run(torch.compile(model, backend="aot_eager"), "llama"), ours, atol=1e-6)
    model.save_pretrained(tmp_path)
    sparing = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(run(sparing.eval(), "llama"), ours)
    inside = copy.deepcopy(base)
    inside.load_adapter(tmp_path)
    assert torch.equal(run(inside.eval(), "llama"), ours)


@torch.no_grad()
def test_tuners_mixed(base):
    model = get_peft_model(copy.deepcopy(base), lora(), mixed=True)
    model.add_adapter("turned", KINDS["oft"]())
    model.set_adapter(["default", "turned"])
    ours = run(stir(model), "llama")
    assert len({type(layer) for layer in tuners_of(model)}) == 2
    with pytest.raises(NotApplicable, match="merge_into_dense"):
        model.merge_adapter()
    assert torch.allclose(run(merge_into_dense(model, dtype=torch.float32), "llama"), ours, atol=1e-5)


def test_eva_looks_at_inputs(base):
    config = lora(init_lora_weights="eva", eva_config=peft.EvaConfig())
    model = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)
    batch = {"input_ids": torch.randint(0, 101, (8, 9), generator=torch.Generator().manual_seed(2))}
    peft.initialize_lora_eva_weights(model, [batch] * 2, show_progress_bar=False)
    for layer in tuners_of(model):
        a = layer.lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4)  # singular vectors
    assert torch.equal(run(model.eval(), "llama"), run(base, "llama"))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga", "mica"])
def test_starts_that_need_the_full_weight(base, start):
    config, model = lora(), copy.deepcopy(base)
    config.init_lora_weights = start  # past the config's own checks, some of which want scipy
    with pytest.raises(InvalidSetting, match=r"initialize_qwha.*adapter_config"):
        get_peft_model(model, config)
    assert not tuners_of(model)


def test_a_refused_start_beside_another_adapter(base):
    model = adapt(copy.deepcopy(base), lora())
    ours = run(model, "llama")
    with pytest.raises(InvalidSetting):
        model.add_adapter("second", lora(init_lora_weights="pissa"))
    assert "second" not in model.peft_config
    assert torch.equal(run(model, "llama"), ours)


def test_kasa_is_refused(base):
    with pytest.raises(InvalidSetting, match="singular values"):
        get_peft_model(copy.deepcopy(base), lora(kasa_config=peft.tuners.lora.config.KasaConfig()))


def test_packed_biases_are_not_trained_in_silence():
    model = bert()
    with pytest.raises(NotApplicable, match=r"lora_bias=True.*modules_to_save"):
        get_peft_model(model, LoraConfig(target_modules=["query"], bias="all"))
    trained = adapt(copy.deepcopy(model), LoraConfig(target_modules=["query"], lora_bias=True))
    assert torch.allclose(run(merge_into_dense(copy.deepcopy(trained), dtype=torch.float32), "bert"),
                          run(trained, "bert"), atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=TARGETS),
        peft.LoKrConfig(target_modules=TARGETS),
        peft.AdaLoraConfig(target_modules=TARGETS, total_step=4),
        peft.FourierFTConfig(n_frequency=8, target_modules=TARGETS),
        peft.C3AConfig(block_size=16, target_modules=TARGETS),
        peft.HRAConfig(r=2, target_modules=TARGETS),
        peft.WaveFTConfig(n_frequency=8, target_modules=TARGETS),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_tuners_of_plain_linears_go_on_refusing(base, config):
    with pytest.raises((TypeError, ValueError), match=r"PackedLinear.*not supported"):
        get_peft_model(copy.deepcopy(base), config)


def test_bat_needs_weights_that_can_be_written(base):
    model = get_peft_model(copy.deepcopy(base), peft.MissConfig(r=4, init_weights="bat", target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"'bat'.*hf_accel packed"):
        run(model, "llama")


# -- which layers ------------------------------------------------------------------------------------------------------


def test_all_linear_means_packed_ones_but_no_head():
    model = adapted.build("llama")
    adapted.pack(model, bits=4)
    head = PackedLinear(64, 96, 4)
    model.lm_head = head
    model = get_peft_model(model, lora(target_modules="all-linear"))
    assert len(tuners_of(model)) == 14
    assert model.get_submodule("base_model.model.lm_head") is head
    assert all(type(layer) is PackedLoraLinear for layer in tuners_of(model))


def test_all_linear_leaves_a_classifier_to_be_trained():
    model = bert()
    model.classifier = PackedLinear(32, 32, 4)
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["pooler"])
    names = get_peft_model(model, config).base_model.peft_config["default"].target_modules
    assert "classifier" not in names
    assert "bert.encoder.layer.0.attention.self.query" in names


# -- peft itself -------------------------------------------------------------------------------------------------------

# The modules of peft 0.21 in which each function is looked up when a tuner is put on.
PLACES = {
    "dispatch_gptq": ["tuners.lora.model"],
    "resolve_quantization_backend": [f"tuners.{t}.{m}" for t in ("boft", "miss", "oft", "shira", "vera")
                                     for m in ("model", "layer")],
    "dequantize_module_weight": ["tuners.lora.dora", "tuners.lora.layer", "tuners.lora.variants"],
    "_maybe_include_all_linear_layers": ["tuners.tuners_utils", "tuners.vera.model"],
    "check_adapters_to_merge": [f"tuners.{t}.layer" for t in ("lora", "boft", "c3a", "ia3", "miss", "oft", "vera")],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PLACES))
def test_stand_ins_are_where_peft_looks(name):
    for place in PLACES[name]:
        held = getattr(importlib.import_module(f"peft.{place}"), name)
        assert held._hf_accel_stands_for.__module__.startswith("peft."), place
        assert not hasattr(held._hf_accel_stands_for, "_hf_accel_stands_for"), place


def test_twice_is_as_once():
    before = [getattr(importlib.import_module(f"peft.{p}"), n) for n, places in PLACES.items() for p in places]
    methods = BaseTuner._check_merge_allowed, BaseTunerLayer.get_base_weight
    seam.extend_peft()
    assert before == [getattr(importlib.import_module(f"peft.{p}"), n) for n, places in PLACES.items() for p in places]
    assert methods == (BaseTuner._check_merge_allowed, BaseTunerLayer.get_base_weight)


def test_a_peft_without_one_of_them_is_left_alone(monkeypatch):
    home = importlib.import_module("peft.tuners.lora.gptq")
    check = BaseTuner._check_merge_allowed._hf_accel_stands_for
    monkeypatch.delattr(home, "dispatch_gptq")
    monkeypatch.setattr(BaseTuner, "_check_merge_allowed", check)
    with pytest.warns(UserWarning, match=r"has no peft\.tuners\.lora\.gptq\.dispatch_gptq"):
        seam.extend_peft()
    assert BaseTuner._check_merge_allowed is check


@torch.no_grad()
def test_dense_linears_are_as_ever(kind):
    dense = adapted.build("llama")
    model = adapt(copy.deepcopy(dense), KINDS[kind]())
    assert not [layer for layer in tuners_of(model) if type(layer).__module__.startswith("hf_accel")]
    ours = run(model, "llama")
    if kind != "lora with a bias":
        assert torch.allclose(run(model.merge_and_unload(), "llama"), ours, atol=1e-5)
    config = lora(target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in get_peft_model(dense, config).targeted_module_names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_nothing_before_the_import_and_all_after_it():
    code = """
import torch, sys
from peft import LoraConfig, get_peft_model
from hf_accel.quant.packed_linear import PackedLinear
early = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), LoraConfig(target_modules=["0"]))
assert "hf_accel.sites.adapter.peft" not in sys.modules
packed = torch.nn.Sequential(PackedLinear(32, 32, 4), torch.nn.LayerNorm(32))
try:
    get_peft_model(packed, LoraConfig(target_modules=["0"]))
except ValueError as error:
    assert "is not supported" in str(error)
else:
    raise AssertionError("peft knows packed linears")
import hf_accel.peft
model = get_peft_model(packed, LoraConfig(target_modules=["0"]))
assert type(model.base_model.model[0]) is hf_accel.peft.PackedLoraLinear
early.merge_adapter()
early.add_adapter("second", LoraConfig(target_modules=["0"]))
assert type(early.base_model.model[0]).__module__ == "peft.tuners.lora.layer"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_quantising_below_an_adapter_is_import_enough():
    code = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import hf_accel
size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
config = LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**size)), config).eval()
assert "hf_accel.sites.adapter.peft" not in sys.modules
dense = model(input_ids=torch.tensor([[1, 2, 3]])).logits
hf_accel.apply(model, "gptq", bits=8, group_size=32, rounding="nearest")
assert torch.allclose(model(input_ids=torch.tensor([[1, 2, 3]])).logits, dense, atol=0.05)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
