"""Copies of parts of a patched model, and what a transform of torch.func or an export makes of the whole."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_accel
from hf_accel.errors import NotApplicable
from hf_accel.sites.attention.seam import LayerHook
from hf_accel.testing.models import tiny
from tiny_deepseek import DEEPSEEK

BLOCKS = {"wan": "blocks", "llama": "model.layers", "cogvideox": "transformer_blocks"}


def blocks(model, family):
    return model.get_submodule(BLOCKS[family])


def run_of(applied):
    return applied.report().entries[0].run


@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_a_copied_block_outlives_the_method_and_brings_nothing_along(family):
    model = tiny.build(family)
    dense = tiny.run(model, family)
    applied = hf_accel.apply(model, "sparge", density=1.0)
    twin = copy.deepcopy(blocks(model, family)[0])
    (hook,) = [h for sub in twin.modules() for h in sub._forward_pre_hooks.values() if isinstance(h, LayerHook)]
    assert hook.seams is None
    blocks(model, family)[0] = twin
    assert torch.allclose(tiny.run(model, family), dense, atol=1e-4)
    applied.revert()
    assert torch.allclose(tiny.run(model, family), dense, atol=1e-4)
    whole = copy.deepcopy(model)
    assert torch.allclose(tiny.run(whole, family), dense, atol=1e-4)


@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_a_copy_of_the_whole_has_a_seam_of_its_own(family):
    model = tiny.build(family)
    applied = hf_accel.apply(model, "sparge", density=1.0)
    twin = copy.deepcopy(model)
    dense = tiny.run(twin, family)
    assert run_of(applied).sparse_calls == 0
    (entry,) = [i.report for i in twin.__dict__["_hf_accel"]]
    assert entry.run.sparse_calls == len(entry.patched)
    assert {id(place.attention) for place in entry.statistics.shared.places} <= {id(sub) for sub in twin.modules()}
    applied.revert()
    assert torch.equal(tiny.run(twin, family), dense)
    hf_accel.revert(twin)


@pytest.mark.parametrize("family", ["wan", "sdxl"])
def test_forward_mode_derivatives_are_the_models(family):
    model = tiny.build(family)
    inputs = tiny.TINY[family].inputs(model)
    name = "sample" if family == "sdxl" else "hidden_states"

    def f(x):
        return model(**{**inputs, name: x}, return_dict=False)[0]

    def jvp():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(f, (inputs[name],), (torch.ones_like(inputs[name]),))

    plain = jvp()
    with hf_accel.apply(model, "sparge", density=1.0) as applied:
        ours = jvp()
        assert list(run_of(applied).dense_calls) == ["a transform of torch.func, or forward-mode derivatives"]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, plain, strict=True))


@torch.no_grad()
def test_a_patched_denoiser_is_exported():
    model = tiny.build("wan")
    inputs = tiny.TINY["wan"].inputs(model)
    dense = model(**inputs, return_dict=False)[0]
    with hf_accel.apply(model, "sparge", density=1.0):
        exported = torch.export.export(model, (), {**inputs, "return_dict": False}).module()
    assert torch.allclose(exported(**inputs, return_dict=False)[0], dense, atol=1e-4)


def test_models_that_ask_for_the_name_of_their_attention_are_refused():
    """The indexer of DeepSeek-V3.2 masks under the names that it knows, and hands its choice on under all others."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    config = DeepseekV32Config(**DEEPSEEK, index_topk=4, index_n_heads=2, index_head_dim=16)
    with pytest.raises(NotApplicable, match="selects tokens by itself"):
        hf_accel.apply(DeepseekV32ForCausalLM(config), "sparge")


def test_networks_of_other_things_than_tokens_are_no_language_models():
    """Stacks of causal layers are found in codecs of sound and in forecasters of time series, too."""
    from transformers import LlamaConfig, LlamaModel

    class Sounds(LlamaModel):
        main_input_name = "input_values"

    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(NotApplicable, match="text encoder"):
        hf_accel.apply(Sounds(config), "sparge")
