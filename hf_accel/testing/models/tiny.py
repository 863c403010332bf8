"""Tiny random models of every family, with the arguments of one forward. Two layers, head dims 16 to 32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel.facts import Host, Medium
from hf_accel.testing.outcome import Skipped


@dataclass(frozen=True)
class Tiny:
    """``build()`` makes the model; ``inputs(model, batch, size)`` the arguments of one forward.

    ``size`` is (frames, height, width) of the latents (a text has as many tokens as their product); ``layers`` the
    number of self-attentions that methods find; ``projections`` the names of those that make queries and keys; with
    ``bad`` in its arguments a forward raises after it began. ``host`` and ``medium`` are what the package reads the
    model as; a medium of None is a network whose tokens nobody reads.
    """

    build: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    layers: int
    projections: tuple[str, str] = ("to_q", "to_k")
    bad: Mapping[str, Any] = field(default_factory=lambda: {"encoder_hidden_states": torch.zeros(1, 2, 1)})
    host: Host = "transformer"
    medium: Medium | None = "video"


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _wan(layers: int = 2, image: bool = False, **extra: Any) -> Any:
    from diffusers import WanTransformer3DModel

    if image:
        extra |= {"image_dim": 24, "added_kv_proj_dim": 64, "in_channels": 8}
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 64, "num_layers": layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64,
    } | extra  # fmt: skip
    return WanTransformer3DModel(**config)


def _wan_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    channels = model.config.in_channels
    out = {
        "hidden_states": _noise(batch, channels, *size, seed=seed),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": _noise(batch, 7, 24, seed=seed + 1),
    }
    if model.config.image_dim is not None:
        out["encoder_hidden_states_image"] = _noise(batch, 257, 24, seed=seed + 2)
    return out


def _vace():
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=24, freq_dim=32, ffn_dim=64, num_layers=3, rope_max_seq_len=64, vace_layers=[0, 2],
        vace_in_channels=12, qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def _vace_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    return _wan_inputs(model, batch, size, timestep, seed) | {
        "control_hidden_states": _noise(batch, 12, *size, seed=seed + 3),
        "control_hidden_states_scale": torch.ones(2),
    }


def _skyreels():
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=24, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def _hunyuan():
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=24,
        pooled_projection_dim=12, rope_axes_dim=(4, 6, 6), mlp_ratio=2.0,
    )  # fmt: skip


def _hunyuan_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    mask = torch.ones(batch, 10, dtype=torch.long)
    for i in range(batch):
        mask[i, 6 - i :] = 0
    return {
        "hidden_states": _noise(batch, 4, *size, seed=seed),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": _noise(batch, 10, 24, seed=seed + 1),
        "encoder_attention_mask": mask,
        "pooled_projections": _noise(batch, 12, seed=seed + 2),
        "guidance": torch.full((batch,), 6000.0),
    }


def _hunyuan15():
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=24, text_embed_2_dim=20,
        image_embed_dim=18, rope_axes_dim=(4, 6, 6), mlp_ratio=2.0, target_size=16,
    )  # fmt: skip


def _hunyuan15_inputs(model, batch=1, size=(3, 4, 4), timestep=500.0, seed=0):
    mask = torch.ones(batch, 8, dtype=torch.long)
    mask[:, 5:] = 0
    mask2 = torch.ones(batch, 4, dtype=torch.long)
    mask2[:, 2:] = 0
    return {
        "hidden_states": _noise(batch, 5, *size, seed=seed),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": _noise(batch, 8, 24, seed=seed + 1),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": _noise(batch, 4, 20, seed=seed + 2),
        "encoder_attention_mask_2": mask2,
        "image_embeds": torch.zeros(batch, 6, 18),
    }


def _cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=6,
    )  # fmt: skip


def _cogvideox_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    frames, height, width = size
    return {
        "hidden_states": _noise(batch, frames, 4, height, width, seed=seed),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
        "timestep": torch.full((batch,), timestep),
    }


def _ltx():
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=24,
    )  # fmt: skip


def _ltx_inputs(model, batch=1, size=(3, 4, 4), timestep=500.0, seed=0):
    frames, height, width = size
    mask = torch.ones(batch, 6)
    mask[:, 4:] = 0
    return {
        "hidden_states": _noise(batch, frames * height * width, 8, seed=seed),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _mochi():
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=12,
        in_channels=4, text_embed_dim=24, time_embed_dim=8, max_sequence_length=8,
    )  # fmt: skip


def _mochi_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    mask = torch.ones(batch, 8, dtype=torch.bool)
    for i in range(batch):
        mask[i, 5 + i :] = False
    return {
        "hidden_states": _noise(batch, 4, *size, seed=seed),
        "encoder_hidden_states": _noise(batch, 8, 24, seed=seed + 1),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": mask,
    }


def _cosmos():
    if importlib.util.find_spec("torchvision") is None:
        raise Skipped("diffusers' Cosmos model needs torchvision, which has no CPU build here")
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True, extra_pos_embed_type="learnable",
    )  # fmt: skip


def _cosmos_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    return {
        "hidden_states": _noise(batch, 4, *size, seed=seed),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
        "fps": 16,
        "padding_mask": torch.zeros(batch, 1, 64, 64),
    }


def _flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _flux_inputs(model, batch=1, size=(1, 8, 8), timestep=500.0, seed=0):
    _, height, width = size
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return {
        "hidden_states": _noise(batch, height * width, 4, seed=seed),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
        "pooled_projections": _noise(batch, 12, seed=seed + 2),
        "timestep": torch.full((batch,), timestep / 1000),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def _sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _sd3_inputs(model, batch=1, size=(1, 8, 8), timestep=500.0, seed=0):
    return {
        "hidden_states": _noise(batch, 4, *size[1:], seed=seed),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
        "pooled_projections": _noise(batch, 12, seed=seed + 2),
        "timestep": torch.full((batch,), timestep),
    }


def _qwen_image():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=1, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _qwen_image_inputs(model, batch=1, size=(1, 6, 8), timestep=500.0, seed=0):
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[:, 4:] = False
    return {
        "hidden_states": _noise(batch, size[1] * size[2], 4, seed=seed),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), timestep / 1000),
        "img_shapes": [[size]] * batch,
    }


def _pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=32, sample_size=8, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip


def _pixart_inputs(model, batch=1, size=(1, 8, 8), timestep=500.0, seed=0):
    return {
        "hidden_states": _noise(batch, 4, *size[1:], seed=seed),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
        "timestep": torch.full((batch,), timestep),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip


def _unet_inputs(model, batch=1, size=(1, 8, 8), timestep=500.0, seed=0):
    return {
        "sample": _noise(batch, 4, *size[1:], seed=seed),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1),
    }


def _sdxl():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        cross_attention_dim=24, attention_head_dim=(2, 4), norm_num_groups=4, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=60,
    )  # fmt: skip


def _sdxl_inputs(model, batch=1, size=(1, 8, 8), timestep=500.0, seed=0):
    added = {"text_embeds": _noise(batch, 12, seed=seed + 2), "time_ids": torch.zeros(batch, 6)}
    return _unet_inputs(model, batch, size, timestep, seed) | {"added_cond_kwargs": added}


def _svd():
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=24,
        num_attention_heads=(2, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip


def _svd_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    frames, height, width = size
    return {
        "sample": _noise(batch, frames, 8, height, width, seed=seed),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": _noise(batch, 1, 24, seed=seed + 1),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1),
    }


def _animatediff():
    from diffusers import UNetMotionModel

    return UNetMotionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=24,
        num_attention_heads=2, norm_num_groups=4, motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip


def _animatediff_inputs(model, batch=1, size=(3, 8, 8), timestep=500.0, seed=0):
    return {
        "sample": _noise(batch, 4, *size, seed=seed),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": _noise(batch, 6, 24, seed=seed + 1).repeat_interleave(size[0], 0),
    }


def _ddpm():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip


def _ddpm_inputs(model, batch=1, size=(1, 8, 8), timestep=500.0, seed=0):
    return {"sample": _noise(batch, 3, *size[1:], seed=seed), "timestep": torch.full((batch,), timestep)}


def _llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        )
    )  # fmt: skip


def _llama_inputs(model, batch=1, size=(1, 5, 8), timestep=500.0, seed=0):
    length = size[0] * size[1] * size[2]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, :5] = 0
    return {
        "input_ids": torch.randint(0, 50, (batch, length), generator=generator),
        "attention_mask": mask,
        "use_cache": False,
    }


def _image(build: Callable[[], Any], inputs: Callable[..., dict[str, Any]], layers: int) -> Tiny:
    return Tiny(build, inputs, layers, medium="image")


def _unet_of(build: Callable[[], Any], inputs: Callable[..., dict[str, Any]], layers: int) -> Tiny:
    """The frames of a video are batch items to a U-Net's attention: its tokens are those of images."""
    return Tiny(build, inputs, layers, host="unet", medium="image")


IMAGES = ("flux", "sd3", "qwen-image", "pixart", "unet", "sdxl", "ddpm")
TEXTS = ("llama",)

TINY: dict[str, Tiny] = {
    "wan": Tiny(_wan, _wan_inputs, 2),
    "wan-i2v": Tiny(lambda: _wan(image=True), _wan_inputs, 2),
    "wan-vace": Tiny(_vace, _vace_inputs, 5),
    "skyreels-v2": Tiny(_skyreels, _wan_inputs, 2),
    "hunyuan-video": Tiny(_hunyuan, _hunyuan_inputs, 3),
    "hunyuan-video-1.5": Tiny(_hunyuan15, _hunyuan15_inputs, 2),
    "cogvideox": Tiny(_cogvideox, _cogvideox_inputs, 2),
    "ltx": Tiny(_ltx, _ltx_inputs, 2),
    "mochi": Tiny(_mochi, _mochi_inputs, 2),
    "cosmos": Tiny(_cosmos, _cosmos_inputs, 2),
    "flux": _image(_flux, _flux_inputs, 3),
    "sd3": _image(_sd3, _sd3_inputs, 3),
    "qwen-image": _image(_qwen_image, _qwen_image_inputs, 2),
    "pixart": _image(_pixart, _pixart_inputs, 2),
    "unet": _unet_of(_unet, _unet_inputs, 7),
    "sdxl": _unet_of(_sdxl, _sdxl_inputs, 8),
    "svd": _unet_of(_svd, _svd_inputs, 4),
    "animatediff": _unet_of(_animatediff, _animatediff_inputs, 4),
    "ddpm": Tiny(_ddpm, _ddpm_inputs, 0, bad={"class_labels": torch.zeros(1)}, host="unet", medium=None),
    "llama": Tiny(
        _llama,
        _llama_inputs,
        2,
        ("q_proj", "k_proj"),
        {"input_ids": torch.full((1, 40), 10**6)},
        "language model",
        "text",
    ),
}


def build(name: str, seed: int = 0, **kwargs: Any) -> torch.nn.Module:
    """A tiny model with fixed random weights, in eval mode.

    Raises:
        Skipped: a library that diffusers needs for it is not installed.
    """
    torch.manual_seed(seed)
    model = TINY[name].build(**kwargs).eval()
    with torch.no_grad():  # some models start their output layer at zero, which would hide everything
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not parameter.abs().sum():
                parameter.normal_(0, 0.05)
    return model


def run(model: torch.nn.Module, name: str, **kwargs: Any) -> torch.Tensor:
    """The output tensor of one forward; zero where a text is padded, since nobody reads what is computed there."""
    inputs = TINY[name].inputs(_inner(model), **kwargs)
    out = model(**inputs, return_dict=False)[0]
    return out * inputs["attention_mask"][..., None] if name in TEXTS else out


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    from hf_accel.hosts.target import unwrap

    return unwrap(model)
