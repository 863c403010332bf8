"""Where QWHA once did otherwise than peft's own tuners: generators, sentences that tools match, batches of adapters.

The rest of peft's contract is asked by peft's own tests (``tests/peers``).
"""

from __future__ import annotations

import re

import adapted
import pytest
import torch
from adapted import build, config, run
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from hf_accel.errors import InvalidSetting, NotApplicable, WeightsMismatch
from hf_accel.peft import QWHAConfig, QWHALinear

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def net(size: int = 32) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(size, size))


def one(**settings) -> QWHAConfig:
    return QWHAConfig(**{"n_coefficients": 40, "target_modules": ["0"], "init_weights": False, **settings})


def layer_of(model: nn.Module) -> QWHALinear:
    return next(module for module in model.modules() if isinstance(module, QWHALinear))


# -- random values -----------------------------------------------------------------------------------------------------


def test_random_values_follow_torchs_generator():
    torch.manual_seed(0)
    model = get_peft_model(net(), one())
    torch.manual_seed(1)
    model.add_adapter("second", one())
    torch.manual_seed(1)
    model.add_adapter("third", one())
    values = layer_of(model).qwha_values
    assert (values["default"] - values["second"]).abs().max() > 0.1
    assert torch.equal(values["second"], values["third"])


def test_places_follow_the_configurations_seed_alone():
    model = get_peft_model(net(), one())
    model.add_adapter("same", one())
    model.add_adapter("other", one(seed=1))
    columns = layer_of(model).qwha_columns
    assert torch.equal(columns["default"], columns["same"])
    assert not torch.equal(columns["default"], columns["other"])


# -- sentences that tools match ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("broken", "value"), [("default", torch.nan), ("second", torch.inf)])
def test_a_broken_adapter_is_named_as_peft_names_it(broken, value):
    model = get_peft_model(net(), one())
    model.add_adapter("second", one())
    before = model.base_model.model[0].get_base_layer().weight.clone()
    with torch.no_grad():
        layer_of(model).qwha_values[broken][0] = value
    message = f"NaNs detected in the merged weights. The adapter {broken} seems to be broken"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        model.merge_adapter(["default", "second"], safe_merge=True)
    assert torch.equal(model.base_model.model[0].get_base_layer().weight, before)
    assert not layer_of(model).merged_adapters


def test_other_sentences_of_pefts():
    with pytest.raises(InvalidSetting, match=r"`layers_to_transform` cannot be used when `target_modules` is a str."):
        QWHAConfig(target_modules="q.*", layers_to_transform=[0])
    with pytest.raises(InvalidSetting, match=r"`layers_pattern` cannot be used when `target_modules` is a str."):
        QWHAConfig(target_modules="q.*", layers_pattern="layers")
    with pytest.raises(InvalidSetting, match="When `layers_pattern` is specified, `layers_to_transform` must also"):
        QWHAConfig(target_modules=["q"], layers_pattern="layers")
    with pytest.raises(NotApplicable, match="Target module Embedding is not supported"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4)), one(n_coefficients=2))
    model = get_peft_model(net(), one())
    with pytest.raises(InvalidSetting, match="Adapter nobody does not exist"):
        model.add_weighted_adapter(["nobody"], [1.0], "new")
    with pytest.raises(InvalidSetting, match="Invalid combination_type: svd"):
        model.add_weighted_adapter(["default"], [1.0], "new", "svd")


# -- a batch whose samples have different adapters ---------------------------------------------------------------------


def two_adapters(family: str, **settings) -> PeftModel:
    model = get_peft_model(build(family), config(family, **settings), "first")
    model.add_adapter("second", config(family, r=2, seed=1, **settings))
    return model.eval()


@pytest.mark.parametrize("path", ["weight", "activation"])
@torch.no_grad()
def test_adapter_names_choose_the_adapter_of_each_sample(path):
    model = two_adapters("llama", path=path)
    ids = torch.randint(0, 101, (3, 7), generator=torch.Generator().manual_seed(2))
    names = ["second", "__base__", "first"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=ids).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=ids).logits
        assert torch.allclose(mixed[row], alone[row], atol=1e-5)
    assert not torch.allclose(model(input_ids=ids).logits[0], mixed[0], atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_adapter_names_on_a_packed_base():
    _, base = adapted.packed_llama()
    model = get_peft_model(base, config("llama", target_modules="all-linear"), "first").eval()
    model.add_adapter("second", config("llama", target_modules="all-linear"))
    ids = torch.tensor([[1, 2, 3]] * 2)
    mixed = model(input_ids=ids, adapter_names=["first", "second"]).logits
    for row, name in enumerate(("first", "second")):
        model.set_adapter(name)
        assert torch.allclose(mixed[row], model(input_ids=ids).logits[row], atol=1e-5)


@torch.no_grad()
def test_adapter_names_in_a_beam_search_of_encoder_and_decoder():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)).eval()
    settings = {"r": 2, "target_modules": ["q", "v", "wo"], "init_weights": False}
    model = get_peft_model(base, QWHAConfig(**settings), "first").eval()
    model.add_adapter("second", QWHAConfig(**settings))
    ids = torch.tensor([[3, 4, 5, 6]] * 2)
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["first", "second"], **options)
    alone = []
    for name in ("first", "second"):
        model.set_adapter(name)
        alone.append(model.generate(input_ids=ids, **options))
    assert not torch.equal(*alone)
    assert torch.equal(mixed, torch.stack([alone[0][0], alone[1][1]]))


def test_adapter_names_are_refused_in_pefts_words():
    model = two_adapters("llama")
    ids = torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third"):
        model(input_ids=ids, adapter_names=["first", "third"])
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3 and 2"):
        model(input_ids=ids, adapter_names=["first", "second", "first"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(input_ids=ids, adapter_names=["first", "second"])
    model.eval().merge_adapter(["first"])
    with pytest.raises(ValueError, match="there are merged adapters"):
        model(input_ids=ids, adapter_names=["first", "second"])
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- files -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ignore_mismatched_sizes_leaves_the_whole_layer_as_it_begins(tmp_path):
    """Offsets of one adapter and columns of another would be neither."""
    saved = get_peft_model(build("llama"), config("llama"))
    saved.save_pretrained(tmp_path)
    wanted = QWHAConfig.from_pretrained(tmp_path)
    wanted.coefficients_pattern, wanted.init_weights = {"q_proj": 50}, True
    with pytest.raises(WeightsMismatch, match="saved with other settings"):
        PeftModel.from_pretrained(build("llama"), tmp_path, config=wanted)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        model = PeftModel.from_pretrained(build("llama"), tmp_path, config=wanted, ignore_mismatched_sizes=True)
    theirs = {m.layer_name: m for m in saved.modules() if isinstance(m, QWHALinear)}
    for module in (m for m in model.modules() if isinstance(m, QWHALinear)):
        fits = not module.layer_name.endswith("q_proj")
        assert torch.equal(module.qwha_values["default"], theirs[module.layer_name].qwha_values["default"]) == fits
        assert bool(module.qwha_values["default"].any()) == fits
    assert torch.isfinite(run(model, "llama")).all()


def test_a_damaged_file_is_refused_after_a_load_that_ignored_sizes(tmp_path):
    saved = get_peft_model(net(), one())
    saved.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    model = get_peft_model(net(), one(n_coefficients=30))
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        set_peft_model_state_dict(model, dict(stored), ignore_mismatched_sizes=True)
    del stored["base_model.model.0.qwha_columns"]
    save_file(stored, file)
    with pytest.raises(WeightsMismatch, match="qwha_columns missing"):
        set_peft_model_state_dict(model, stored)
    with pytest.raises(WeightsMismatch, match="qwha_columns missing"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_lora_still_takes_adapter_names_beside_the_import():
    """What QWHA adds to peft's hooks is on its own model class."""
    model = get_peft_model(net(), LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    x = torch.ones(2, 32)
    mixed = model(x, adapter_names=["default", "__base__"])
    assert torch.allclose(mixed[0], model(x)[0], atol=1e-6)
