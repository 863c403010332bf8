"""Spatial self-attention of U-Nets: a grid per level, frames as batch items, whatever stands around it left alone."""

from __future__ import annotations

import pytest
import torch

import hf_accel
from hf_accel.hosts.denoisers import level_of
from hf_accel.testing.models import tiny


@torch.no_grad()
@pytest.mark.parametrize("family", ["animatediff", "svd", "sdxl"])
@pytest.mark.parametrize("method", ["dense", "sparge"])
def test_spatial_attention_is_taken_and_temporal_left_alone(family, method):
    model = tiny.build(family)
    size = (1, 9, 11) if family == "sdxl" else (3, 8, 8)
    dense = tiny.run(model, family, size=size)
    spatial = [n for n, _ in model.named_modules() if n.endswith("attn1") and ".attentions." in n]
    spatial = [n for n in spatial if ".temporal_transformer_blocks." not in n]
    with hf_accel.apply(model, method, **hf_accel.registry.get(method).facts.full_budget) as applied:
        ours = tiny.run(model, family, size=size)
        run = applied.report().entries[0].run
    assert run.sparse_calls == len(spatial) == tiny.TINY[family].layers
    assert not run.dense_calls
    assert torch.allclose(ours, dense, atol=1e-5)


def test_each_level_has_a_grid_of_its_own():
    model = tiny.build("unet")
    grids = set()
    with hf_accel.apply(model, "sparge", block_q=64, block_k=64) as applied, torch.no_grad():
        core = applied._installed[0][1].handle.now().core
        inner = core.attend
        core.attend = lambda call: grids.add((call.grid.height, call.grid.width, call.query.shape[2])) or inner(call)
        tiny.run(model, "unet", size=(1, 9, 11))
    assert grids == {(9, 11, 99), (5, 6, 30)}
    assert level_of((1, 9, 11), 9) == (1, 3, 3)
    assert level_of((1, 9, 11), 31) is None
