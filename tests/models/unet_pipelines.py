"""Tiny random pipelines of diffusers' real classes around U-Nets: everything but the weights is as users have it.

``call(pipe, **changes)`` runs one and gives its latents (or picture), the same for the same seed.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TOKENS, WIDTH, PIXELS = 12, 32, 16  # of a prompt, of its embedding, of a picture's side
STEPS = 7


def tokenizer() -> CLIPTokenizer:
    """One token per letter."""
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def text_encoder(cls: Any = CLIPTextModel) -> Any:
    size = len(tokenizer())
    return cls(
        CLIPTextConfig(
            vocab_size=size, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=TOKENS, projection_dim=WIDTH, bos_token_id=size - 2, eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )  # fmt: skip


def vision_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=PIXELS,
            patch_size=8, projection_dim=WIDTH,
        )
    )  # fmt: skip


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=PIXELS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def unet(**changes: Any) -> UNet2DConditionModel:
    """Two levels of SD's layout: two stages and a sampler each, so that branches are numbered as in SD."""
    config = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": WIDTH,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
    }  # fmt: skip
    return UNet2DConditionModel(**config | changes)


def ddim() -> DDIMScheduler:
    """With the settings of SD's own checkpoints."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def _text_parts() -> dict[str, Any]:
    return {"text_encoder": text_encoder(), "tokenizer": tokenizer(), "vae": vae(), "scheduler": ddim()}


def _sd_parts(**unet_changes: Any) -> dict[str, Any]:
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _text_parts() | none | {"unet": unet(**unet_changes)}


def _sd() -> DiffusionPipeline:
    return StableDiffusionPipeline(**_sd_parts())


def _img2img() -> DiffusionPipeline:
    return StableDiffusionImg2ImgPipeline(**_sd_parts())


def _inpaint() -> DiffusionPipeline:
    return StableDiffusionInpaintPipeline(**_sd_parts(in_channels=9))


def _controlnet() -> DiffusionPipeline:
    parts = _sd_parts()
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
    for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(convolution.weight, std=0.1)  # they begin at zero
    return StableDiffusionControlNetPipeline(**parts, controlnet=net)


def _t2i() -> DiffusionPipeline:
    adapter = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    return StableDiffusionAdapterPipeline(**_sd_parts(), adapter=adapter)


def _ip() -> DiffusionPipeline:
    pipe = _sd()
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    return pipe


def _sdxl_parts(ids: int, width: int, **parts: Any) -> dict[str, Any]:
    conditioned = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": width,
        "projection_class_embeddings_input_dim": 8 * ids + WIDTH, "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    second = {"text_encoder_2": text_encoder(CLIPTextModelWithProjection), "tokenizer_2": tokenizer()}
    return {**_text_parts(), **second, "unet": unet(**conditioned)} | parts


def _sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(**_sdxl_parts(6, 2 * WIDTH), add_watermarker=False)


def _t2i_xl() -> DiffusionPipeline:
    adapter = T2IAdapter(
        in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return StableDiffusionXLAdapterPipeline(**_sdxl_parts(6, 2 * WIDTH), adapter=adapter)


def _refiner() -> DiffusionPipeline:
    alone = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    return StableDiffusionXLImg2ImgPipeline(**_sdxl_parts(5, WIDTH, **alone), add_watermarker=False)


def _svd() -> DiffusionPipeline:
    net = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    decoder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, sample_size=PIXELS
    )
    size = {"height": PIXELS, "width": PIXELS}
    return StableVideoDiffusionPipeline(
        vae=decoder, image_encoder=vision_encoder(), unet=net, scheduler=EulerDiscreteScheduler(),
        feature_extractor=CLIPImageProcessor(crop_size=size, size=size),
    )  # fmt: skip


def _animatediff() -> DiffusionPipeline:
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=2, motion_norm_num_groups=4, motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )  # fmt: skip
    return AnimateDiffPipeline(**_text_parts(), unet=unet(), motion_adapter=adapter)


def _ddpm() -> DiffusionPipeline:
    net = UNet2DModel(
        sample_size=PIXELS, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    return DDPMPipeline(net, DDPMScheduler())


def ip_adapter_weights(net: UNet2DConditionModel) -> dict[str, dict[str, torch.Tensor]]:
    """What a file of IP-Adapter holds, random: a projection of the picture, and keys and values per cross-attention."""
    tokens, draw = 4, functools.partial(torch.randn, generator=torch.Generator().manual_seed(5))
    projection = {
        "proj.weight": draw(tokens * WIDTH, WIDTH), "proj.bias": draw(tokens * WIDTH),
        "norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH),
    }  # fmt: skip
    keys = {}
    crossed = [m for n, m in net.named_modules() if n.endswith("attn2")]
    for i, attention in enumerate(crossed):
        for name in ("k", "v"):
            keys[f"{2 * i + 1}.to_{name}_ip.weight"] = draw(attention.inner_dim, WIDTH) / WIDTH**0.5
    return {"image_proj": projection, "ip_adapter": keys}


def picture(seed: int = 3, channels: int = 3) -> torch.Tensor:
    """``[1, channels, PIXELS, PIXELS]`` in 0..1."""
    return torch.rand(1, channels, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def _mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, PIXELS, PIXELS)
    mask[..., : PIXELS // 2] = 1
    return mask


def _embeds() -> list[torch.Tensor]:
    """Of a picture for an IP-adapter, with the guidance's zeros first: ``[2, 1, WIDTH]``."""
    return [torch.cat([torch.zeros(1, 1, WIDTH), picture().flatten()[:WIDTH].reshape(1, 1, WIDTH)])]


@dataclass(frozen=True)
class Family:
    """``build()`` makes the pipeline; ``arguments()`` those of a call beside prompt, steps and seed.

    ``steps`` is how many of :data:`STEPS` the U-Net is called for.
    """

    build: Callable[[], DiffusionPipeline]
    arguments: Callable[[], dict[str, Any]] = dict
    prompted: bool = True
    output: str = "latent"
    steps: int = STEPS
    settings: dict[str, Any] = field(default_factory=dict)


SIZE = {"height": PIXELS, "width": PIXELS}
FAMILIES = {
    "sd": Family(_sd, lambda: dict(SIZE)),
    "img2img": Family(_img2img, lambda: {"image": picture(), "strength": 1.0}),
    "inpaint": Family(_inpaint, lambda: {"image": picture(), "mask_image": _mask(), "strength": 1.0, **SIZE}),
    "controlnet": Family(_controlnet, lambda: {"image": picture(), **SIZE}, settings={"controlnet": "keep"}),
    "t2i": Family(_t2i, lambda: {"image": picture(), **SIZE}),
    "ip": Family(_ip, lambda: {"ip_adapter_image_embeds": _embeds(), **SIZE}),
    "sdxl": Family(_sdxl, lambda: dict(SIZE)),
    "t2i xl": Family(_t2i_xl, lambda: {"image": picture(), **SIZE}),
    "refiner": Family(_refiner, lambda: {"image": picture(), "strength": 1.0}),
    "svd": Family(_svd, lambda: {"image": picture(), "num_frames": 2, **SIZE}, prompted=False),
    "animatediff": Family(_animatediff, lambda: {"num_frames": 2, **SIZE}),
    "ddpm": Family(_ddpm, dict, prompted=False, output="np"),
}


def fresh(name: str) -> Any:
    """A new pipeline with the same weights as any other of the family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = FAMILIES[name].build()
    pipe.set_progress_bar_config(disable=True)
    pipe.family = name
    return pipe


@functools.cache
def shared(name: str) -> Any:
    """The pipeline of the family that all tests share: to be left as it was."""
    return fresh(name)


def call(pipe: Any, prompt: str = "a red square", steps: int = STEPS, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Latents of a call, or the picture where the pipeline gives no latents."""
    family = FAMILIES[getattr(pipe, "family", "sd")]
    arguments = family.arguments() | {"num_inference_steps": steps, "output_type": family.output}
    if family.prompted:
        arguments["prompt"] = prompt
    generator = torch.Generator().manual_seed(seed)
    out = pipe(**arguments | changes, generator=generator, return_dict=False)[0]
    return torch.as_tensor(out)
