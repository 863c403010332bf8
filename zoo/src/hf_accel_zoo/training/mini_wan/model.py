"""The parts of `mini-wan` and the forms of their forwards that training needs.

Two forwards are written out here because the stock ones do not serve training:

* the Wan VAE walks a clip in chunks with a feature cache; :func:`encode_clip` and :func:`decode_clip` compute
  the same numbers over the whole clip at once (a ninth of the kernel launches);
* :func:`predict` is `WanTransformer3DModel.forward` with the self-attention handed in as a function, so that
  training can look at attention rows (:class:`RowSample`) and a study can replace the attention.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from .grammar import EOS, PAD, vocabulary

TILE = (3, 4, 4)  # frames, height, width of a key tile in tokens: the unit in which attention is kept local
FLOW_SHIFT = 3.0
# diffusers types its models too loosely for a checker to know their submodules.
Vae: TypeAlias = Any
Transformer: TypeAlias = Any
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Video and network sizes. Latents are `[B, channels, (frames + 1) / 2, side / 4, side / 4]`."""

    frames: int = 17
    side: int = 64
    channels: int = 12
    vae_dim: int = 24
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    ffn: int = 384
    text_dim: int = 64

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, height, width; their product is the number of video tokens."""
        return (self.frames + 1) // 2, self.side // 4, self.side // 4


FULL = Size()
TOY = Size(frames=5, side=32, vae_dim=8, layers=2, heads=2, ffn=64, text_dim=16)


def build_vae(size: Size) -> Vae:
    """Compression 2 in time and 4 in space, of which 2 by patching (as the Wan 2.2 VAE does)."""
    return AutoencoderKLWan(
        base_dim=size.vae_dim,
        z_dim=size.channels,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * size.channels,
        latents_std=[1.0] * size.channels,
    )


def build_text_encoder(size: Size) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(vocabulary()),
            d_model=size.text_dim,
            d_kv=16,
            d_ff=2 * size.text_dim,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=40,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )
    )


def build_transformer(size: Size, qk_gain: float = 1.5) -> Transformer:
    """One token per latent. The query and key norms start at `qk_gain`, so that attention starts sharp."""
    model: Transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=size.channels,
        out_channels=size.channels,
        text_dim=size.text_dim,
        freq_dim=128,
        ffn_dim=size.ffn,
        num_layers=size.layers,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.fill_(qk_gain)
            block.attn1.norm_k.weight.fill_(qk_gain)
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


# --- VAE over a whole clip ---


def _resample_clip(module: WanResample, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
    """`WanResample.forward` for all frames: as there, the first is neither merged nor doubled."""
    if module.mode == "upsample3d" and x.shape[2] > 1:
        b, c, t, h, w = x.shape
        pairs = module.time_conv(x[:, :, 1:]).reshape(b, 2, c, t - 1, h, w)
        doubled = torch.stack((pairs[:, 0], pairs[:, 1]), 3).reshape(b, c, 2 * (t - 1), h, w)
        x = torch.cat([x[:, :, :1], doubled], 2)
    b, c, t, h, w = x.shape
    x = module.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
    x = x.view(b, t, *x.shape[1:]).transpose(1, 2)
    if module.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], module.time_conv(x)], 2)
    return x


def over_whole_clips(vae: Vae) -> Vae:
    """Make this VAE ready for :func:`encode_clip` and :func:`decode_clip`; its own encode, decode break."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            vars(module)["forward"] = types.MethodType(_resample_clip, module)
    return vae


def encode_clip(vae: Vae, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents of `video` `[B, 3, F, H, W]`."""
    moments = vae.quant_conv(vae.encoder(patchify(video, vae.config.patch_size)))
    mean, log_variance = moments.chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode_clip(vae: Vae, latents: Tensor) -> Tensor:
    """Video `[B, 3, F, H, W]`, not clamped, so that training sees gradients outside -1..1."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents)), vae.config.patch_size)


# --- transformer ---


def encode_text(encoder: UMT5EncoderModel, ids: Tensor, length: int) -> Tensor:
    """Text states `[B, length, text_dim]`, zero after each caption's `</s>`: what `WanPipeline` feeds."""
    mask = ids != PAD
    states = encoder(ids, mask.long()).last_hidden_state * mask[..., None]
    return F.pad(states, (0, 0, 0, length - ids.shape[1]))


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def tile_index(grid: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """Which :data:`TILE` each token of the grid lies in, `[S]` int64; a ragged last tile counts."""
    f, h, w = (torch.arange(n, device=device) // t for n, t in zip(grid, TILE, strict=True))
    tiles_h, tiles_w = int(h[-1]) + 1, int(w[-1]) + 1
    return ((f[:, None, None] * tiles_h + h[None, :, None]) * tiles_w + w[None, None, :]).flatten()


@dataclass
class RowSample:
    """Which attention rows a training step looks at, and in which key tiles it pools them.

    rows: `[R]` int64, a random box of tokens. tiles: `[S, N]` one-hot float32. items: clips looked at.
    """

    rows: Tensor
    tiles: Tensor
    items: int


def row_entropies(query: Tensor, key: Tensor, sample: RowSample) -> tuple[Tensor, Tensor]:
    """Entropies in nats `[items, H]`: mean of each row's own, and that of the rows' mean pooled in key tiles.

    query, key `[B, H, S, D]`. The first says how many tokens a row needs, the second how many blocks the rows
    of a box need together, which is what block-sparse attention pays for.
    """
    query, key = query[: sample.items, :, sample.rows], key[: sample.items]
    logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    rows = -(p * log_p).sum(-1).mean(-1)
    pooled = p.mean(-2) @ sample.tiles
    return rows, -(pooled * (pooled + 1e-8).log()).sum(-1)


def _rms(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + float(norm.eps or 0)) * norm.weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[B, S, H, D]` by the tables of `WanRotaryPosEmbed`, `[1, S, 1, D]`."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).flatten(-2)


def block_forward(
    block: Any,
    x: Tensor,
    text: Tensor,
    modulation: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    sample: RowSample | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """One `WanTransformerBlock` on `x` `[B, S, d]` float32, and the entropies of the sampled rows."""

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (block.attn1.heads, -1))

    def normalised(norm: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)

    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + modulation).chunk(6, 1)
    attn = block.attn1
    h = normalised(block.norm1) * (1 + scale) + shift
    value = heads(attn.to_v(h)).transpose(1, 2)
    kind = value.dtype  # what autocast chose
    query = _rotate(heads(_rms(attn.to_q(h), attn.norm_q)), cos, sin).to(kind).transpose(1, 2)
    key = _rotate(heads(_rms(attn.to_k(h), attn.norm_k)), cos, sin).to(kind).transpose(1, 2)
    entropies = None if sample is None else row_entropies(query, key, sample)
    x = x + attn.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2)) * gate

    attn = block.attn2
    query = heads(_rms(attn.to_q(normalised(block.norm2)), attn.norm_q)).to(kind).transpose(1, 2)
    key = heads(_rms(attn.to_k(text), attn.norm_k)).to(kind).transpose(1, 2)
    value = heads(attn.to_v(text)).transpose(1, 2)
    x = x + attn.to_out[0](dense(query, key, value).transpose(1, 2).flatten(2))

    h = normalised(block.norm3) * (1 + ffn_scale) + ffn_shift
    return x + block.ffn(h).float() * ffn_gate, entropies


def predict(
    model: Transformer,
    latents: Tensor,
    sigma: Tensor,
    text: Tensor,
    attend: Attend = dense,
    sample: RowSample | None = None,
    block_step: Callable = block_forward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity `[B, C, F, H, W]`, and the row entropies of tokens and of tiles, each `[L, items, H]`.

    `sigma` `[B]` in 0..1; `block_step` is :func:`block_forward` or its compiled form. Without `sample` the
    entropies are empty.
    """
    cos, sin = model.rope(latents)
    temb, modulation, text, _ = model.condition_embedder(sigma * 1000, text)
    modulation = modulation.unflatten(1, (6, -1)).float()
    x = model.patch_embedding(latents).flatten(2).transpose(1, 2).float().contiguous()
    tokens, tiles = [], []
    for block in model.blocks:
        x, entropies = block_step(block, x, text, modulation, cos, sin, attend, sample)
        if entropies is not None:
            tokens.append(entropies[0])
            tiles.append(entropies[1])
    shift, scale = (model.scale_shift_table + temb.float()[:, None]).chunk(2, 1)
    x = F.layer_norm(x, x.shape[-1:], eps=model.norm_out.eps) * (1 + scale) + shift
    out = model.proj_out(x).transpose(1, 2).unflatten(2, latents.shape[2:])
    empty = x.new_zeros(0)
    return out, torch.stack(tokens) if tokens else empty, torch.stack(tiles) if tiles else empty


def sample_latents(
    model: Transformer,
    text: Tensor,
    no_text: Tensor,
    noise: Tensor,
    steps: int = 20,
    guidance: float = 3.0,
    attend: Callable[[int], Attend] = lambda step: dense,
) -> Tensor:
    """Euler integration of the flow from `noise` with classifier-free guidance; `attend(step)` per step."""
    times = torch.linspace(1, 0, steps + 1)
    sigmas = (FLOW_SHIFT * times / (1 + (FLOW_SHIFT - 1) * times)).tolist()
    x, both = noise.float(), torch.cat([text, no_text])
    for step, (now, after) in enumerate(pairwise(sigmas)):
        sigma = torch.full((2 * len(x),), now, device=x.device)
        velocity = predict(model, torch.cat([x, x]), sigma, both, attend(step))[0].float()
        told, untold = velocity.chunk(2)
        x = x + (after - now) * (untold + guidance * (told - untold))
    return x
