"""Which lists of a model are its blocks."""

from __future__ import annotations

import pytest
import torch

import tiny_hosts
from hf_accel.hosts.layer_lists import is_linear, layer_list, layer_names

LISTS = {
    "llama": {"model.layers": 2},
    "qwen": {"model.layers": 2},
    "mistral": {"model.layers": 2},
    "mixtral": {"model.layers": 2},
    "opt": {"model.decoder.layers": 2},
    "gpt2": {"transformer.h": 2},
    "bert": {"bert.encoder.layer": 2},
    "clip": {"encoder.layers": 2},
    "t5": {"encoder.block": 2},
    "umt5": {"encoder.block": 2},
    "sdar": {"model.layers": 3},
    "gemma": {
        "model.encoder.language_model.layers": 4,
        "model.encoder.vision_tower.encoder.layers": 1,
        "model.decoder.layers": 4,
    },
    "wan": {"blocks": 2},
    "flux": {"transformer_blocks": 1, "single_transformer_blocks": 2},
    "sd3": {"transformer_blocks": 2},
}


@pytest.mark.parametrize("family", LISTS)
def test_lists_of_blocks(family):
    assert {name: len(blocks) for name, blocks in layer_list(tiny_hosts.build(family))} == LISTS[family]


def test_every_transformer_block_of_a_u_net_is_found_once():
    model = tiny_hosts.build("unet")
    names = layer_names(model)
    assert sorted(names) == sorted(n for n, m in model.named_modules() if type(m).__name__ == "BasicTransformerBlock")


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.Linear(4, 4)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)) for _ in range(3)
        )


def test_without_a_declaration_the_outermost_lists_with_linears_count():
    model = torch.nn.Module()
    model.trunk = torch.nn.ModuleList([Layer(), Layer()])
    model.heads = torch.nn.ModuleList([torch.nn.Linear(4, 2)])
    model.norms = torch.nn.ModuleList([torch.nn.LayerNorm(4)])
    model.empty = torch.nn.ModuleList()
    assert layer_names(model) == ["trunk.0", "trunk.1"]
    assert layer_list(model)[0][1] is model.trunk


def test_without_lists_there_are_no_blocks():
    assert layer_list(torch.nn.Sequential(torch.nn.Linear(2, 2))) == []


def test_what_other_libraries_put_in_the_place_of_a_linear_is_a_linear():
    class Foreign(torch.nn.Module):
        in_features, out_features = 4, 2

    wrapper = Foreign()
    wrapper.inner = torch.nn.Linear(4, 2)
    assert is_linear(Foreign())
    assert not is_linear(wrapper)
    assert not is_linear(torch.nn.Embedding(4, 2))
