"""Spatial self-attention of U-Nets: a grid per level, frames as batch items, whatever stands around it left alone."""

from __future__ import annotations

import pytest
import tiny
import torch

import hf_accel
from hf_accel.hosts.denoisers import level_of


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def motion():
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=24,
        num_attention_heads=2, norm_num_groups=4, motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip
    return model, {"sample": noise(1, 4, 3, 8, 8), "timestep": 500, "encoder_hidden_states": noise(3, 6, 24)}


def svd():
    from diffusers import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=24,
        num_attention_heads=(2, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    inputs = {"sample": noise(1, 3, 8, 8, 8), "timestep": 500, "encoder_hidden_states": noise(1, 1, 24)}
    return model, inputs | {"added_time_ids": torch.tensor([[6.0, 127.0, 0.02]])}


def sdxl():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        cross_attention_dim=24, attention_head_dim=(2, 4), norm_num_groups=4, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=60,
    )  # fmt: skip
    added = {"text_embeds": noise(1, 12), "time_ids": torch.zeros(1, 6)}
    inputs = {"sample": noise(1, 4, 9, 11), "timestep": 500, "encoder_hidden_states": noise(1, 6, 24)}
    return model, inputs | {"added_cond_kwargs": added}


@torch.no_grad()
@pytest.mark.parametrize("build", [motion, svd, sdxl])
@pytest.mark.parametrize("method", ["dense", "sparge", "svg2", "grat", "sla"])
def test_full_budget_is_dense(build, method):
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    dense = model(**inputs, return_dict=False)[0]
    spatial = [n for n, _ in model.named_modules() if n.endswith("attn1") and ".attentions." in n]
    spatial = [n for n in spatial if ".temporal_transformer_blocks." not in n]
    budget = {"svg2": {"kmeans_iter_init": 2, "num_q_centroids": 4}}.get(method, {})
    with hf_accel.apply(model, method, **budget, **hf_accel.registry.get(method).facts.full_budget) as applied:
        ours = model(**inputs, return_dict=False)[0]
        run = applied.report().entries[0].run
    assert run.sparse_calls == len(spatial) > 0
    assert not run.dense_calls
    assert torch.allclose(ours, dense, atol=1e-5)
    assert torch.equal(model(**inputs, return_dict=False)[0], dense)


def test_each_level_has_a_grid_of_its_own():
    model = tiny.build("unet")
    grids = set()
    with hf_accel.apply(model, "sparge", block_q=64, block_k=64) as applied, torch.no_grad():
        core = applied._installed[0][1].handle.core
        inner = core.attend
        core.attend = lambda call: grids.add((call.grid.height, call.grid.width, call.query.shape[2])) or inner(call)
        tiny.run(model, "unet", size=(1, 9, 11))
    assert grids == {(9, 11, 99), (5, 6, 30)}
    assert level_of((1, 9, 11), 9) == (1, 3, 3)
    assert level_of((1, 9, 11), 31) is None
