"""The parts of `mini-sd`, all of stock classes."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from .grammar import END, START, TOKENS, vocabulary

TEXT_DIM = 64
PREDICTION = "v_prediction"


def build_vae() -> Any:
    """Compression 4 per side: 64 x 64 pixels to 16 x 16 latents of 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 40),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def build_unet() -> Any:
    """The layout of Stable Diffusion 1.x: cross-attention at three of four levels, two layers per block.

    `attention_head_dim` is the number of heads, here as there.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 48, 56, 48),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT_DIM,
    )


def build_text_encoder(tokens: int | None = None) -> CLIPTextModel:
    """`tokens`: size of the vocabulary; training needs the grammar's words only."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens or len(vocabulary()),
            hidden_size=TEXT_DIM,
            intermediate_size=4 * TEXT_DIM,
            projection_dim=TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def build_scheduler() -> Any:
    """The noise of Stable Diffusion 1.x and its DDIM settings."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTION,
    )
