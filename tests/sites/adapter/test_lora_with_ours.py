"""Adapters of peft and methods of ours on the same linears, in both orders, and training what comes of it."""

from __future__ import annotations

import copy
import warnings

import adapted
import peft
import pytest
import torch
from adapted import run
from lora_kinds import KINDS, TARGETS, adapt, dequantised, lora, tuners_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from training import trainer

import hf_accel
from hf_accel.errors import NotApplicable, RevertRefused
from hf_accel.peft import PackedLoraLinear, QWHALinear, merge_into_dense
from hf_accel.quant.packed_linear import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


# -- with the rest of hf_accel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["qwha in lora", "lora in qwha"])
@torch.no_grad()
def test_qwha_and_lora_on_one_layer(base, order):
    configs = [adapted.config("llama", target_modules=TARGETS), lora()]
    model = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of a second adapter
        for config in configs if order == "qwha in lora" else configs[::-1]:
            model = adapt(model, config)
    outer = next(layer for layer in tuners_of(model) if isinstance(layer.base_layer, BaseTunerLayer))
    assert {type(outer), type(outer.base_layer)} == {PackedLoraLinear, QWHALinear}
    x = torch.randn(2, outer.in_features, generator=torch.Generator().manual_seed(0))
    update = outer.get_delta_weight("default") + outer.base_layer.get_delta_weight("default")
    assert torch.allclose(outer(x), x @ (outer.get_base_layer().dequantize_weight() + update).T, atol=1e-5)
    ours = run(model, "llama")
    assert torch.allclose(run(merge_into_dense(model, dtype=torch.float32), "llama"), ours, atol=1e-5)


@torch.no_grad()
def test_one_after_the_other(base):
    model = copy.deepcopy(base)
    for config in (adapted.config("llama"), lora(), adapted.config("llama"), lora(use_dora=True)):
        with_adapter = adapt(model, config)
        assert not torch.equal(run(with_adapter, "llama"), run(base, "llama"))
        model = with_adapter.unload()
        assert torch.equal(run(model, "llama"), run(base, "llama"))


@torch.no_grad()
def test_quantised_below_adapters(kind):
    """peft's own layers, which stood there before, with a packed base."""
    model = adapt(adapted.build("llama"), KINDS[kind]())
    applied = hf_accel.apply(model, "gptq", bits=4, group_size=32, rounding="nearest")
    layer = tuners_of(model)[0]
    assert isinstance(layer.base_layer, PackedLinear)
    before = run(model, "llama")
    assert torch.allclose(before, run(dequantised(model), "llama"), atol=1e-5)
    for merge in (model.merge_adapter, layer.merge, lambda: layer.merge(safe_merge=True)):
        with pytest.raises(NotApplicable, match="merge_into_dense"):
            merge()
    assert torch.equal(run(model, "llama"), before)
    if kind == "lora with a bias":
        return
    plain = merge_into_dense(copy.deepcopy(model), dtype=torch.float32)
    assert torch.allclose(run(plain, "llama"), before, atol=1e-5)
    applied.revert()
    assert isinstance(layer.base_layer, torch.nn.Linear)
    model.merge_adapter()


@pytest.mark.parametrize("tuner", ["GloraConfig", "HRAConfig", "HiraConfig", "PeanutConfig", "SupertuningConfig"])
@torch.no_grad()
def test_linears_whose_weight_an_adapter_reads_stay_dense(tuner):
    model = adapt(adapted.build("llama"), getattr(peft, tuner)(target_modules=["q_proj", "o_proj"]))
    with hf_accel.apply(model, "gptq", bits=8, group_size=32, rounding="nearest") as applied:
        skipped = {entry.module: entry.reason for entry in applied.report().entries[0].skipped}
        read = [name for name in skipped if name.endswith(("q_proj", "o_proj"))]
        assert len(read) == len(tuners_of(model)) > 0
        assert all("the adapter on it reads its weight" in skipped[name] for name in read)
        assert torch.isfinite(run(model, "llama")).all()


@torch.no_grad()
def test_undo_of_the_rounding_asks_for_the_adapter_to_go_first():
    model = adapted.build("llama")
    full = run(model, "llama")
    applied = hf_accel.apply(model, "gptq", bits=4, group_size=32, rounding="nearest")
    wrapped = adapt(model, lora())
    with pytest.raises(RevertRefused):
        applied.revert()
    wrapped.unload()
    applied.revert()
    assert torch.equal(run(model, "llama"), full)


@torch.no_grad()
def test_on_a_transformer_of_diffusers():
    model = adapted.build("wan")
    adapted.pack(model, bits=4)
    plain = run(model, "wan")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layer = tuners_of(model)[0]
    assert type(layer) is PackedLoraLinear
    assert not torch.equal(run(model, "wan"), plain)
    with pytest.raises(NotApplicable, match="merge_into_dense"):
        model.fuse_lora()
    model.disable_adapters()
    assert torch.equal(run(model, "wan"), plain)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepared_for_few_bits(reentrant):
    model = adapted.build("llama").bfloat16()
    hf_accel.apply(model, "gptq", bits=4, group_size=32, rounding="nearest")
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    model = get_peft_model(model, lora(init_lora_weights=False)).train()
    ids = adapted.token_ids(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name  # peft's autocast_adapter_dtype
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dtypes(base, settings):
    model, twin = (adapt(m, lora(**settings)) for m in (copy.deepcopy(base), dequantised(base)))
    reference = run(model, "llama")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(model, "llama"), run(twin, "llama")
    assert ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, atol=2e-2)
    half = adapt(copy.deepcopy(base).bfloat16(), lora(**settings))
    assert half.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"].weight.dtype == (
        torch.float32
    )
    assert run(half, "llama").dtype == torch.bfloat16
    assert torch.allclose(run(half, "llama").float(), reference, atol=3e-2)


def test_a_trainer_takes_it_and_refuses_the_base_alone(tmp_path):
    model = adapted.build("llama")
    hf_accel.apply(model, "gptq", bits=4, group_size=32, rounding="nearest")
    model.save_pretrained(tmp_path / "packed")
    loaded = hf_accel.load_quantized(tmp_path / "packed")
    assert loaded.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(loaded, tmp_path / "no")
    loaded = peft.prepare_model_for_kbit_training(loaded)
    assert loaded.is_gradient_checkpointing
    model = get_peft_model(loaded, lora(target_modules="all-linear"))
    run_ = trainer(model, tmp_path / "run")
    run_.train()
    losses = [entry["loss"] for entry in run_.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = PeftModel.from_pretrained(hf_accel.load_quantized(tmp_path / "packed"), tmp_path / "run" / "checkpoint-6")
    assert torch.equal(run(again.eval(), "llama"), run(model.eval(), "llama"))
    in_place = hf_accel.load_quantized(tmp_path / "packed")
    in_place.add_adapter(lora())  # transformers' own way to the same
    trainer(in_place, tmp_path / "in_place", max_steps=1, save_strategy="no").train()
