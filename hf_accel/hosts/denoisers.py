"""What differs between diffusers denoisers: which attentions are self-attention over video or image tokens, how
the token grid is read from a forward call, where text stands. One small table entry per class, nothing else per model.

Sequence layouts and argument shapes: see ``docs/hosts.md``. A class that is not in the table has no token grid for us.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_accel.attention.call import TextPlace
from hf_accel.facts import Medium
from hf_accel.hosts.walk import named_modules

Arguments = Mapping[str, Any]
Dims = tuple[int, int, int]


@dataclass(frozen=True)
class Denoiser:
    """How to read one class of denoiser.

    Attributes:
        self_attention: patterns of the dotted names of its video self-attention modules, in execution order.
        dims: ``(module, arguments) -> (frames, height, width)`` in tokens, or None if this call does not tell.
        text: where text tokens stand in the self-attention's sequence.
        order: position of the forward's first arguments, for calls that pass them without names.
        ids: name of a tensor argument with the lattice coordinates of every token (packed image models).
        mask: ``"keys"``: the mask hides keys only. ``"outer"``: it is valid_i & valid_j, so that its first row
            (a video token, always valid) is the key mask.
        per_item: attention is called once per batch item.
        medium: what the tokens show.
        packed: the latents are ``[B, S, C]``, one row per token, so that the number of tokens is known without a grid.
        levels: attention runs at several resolutions, each half the one before (U-Nets); ``dims`` is of the finest.
    """

    self_attention: tuple[str, ...]
    dims: Callable[[Any, Arguments], Dims | None]
    text: TextPlace = "none"
    order: tuple[str, ...] = ("hidden_states", "timestep", "encoder_hidden_states")
    ids: str | None = None
    mask: Literal["keys", "outer"] = "keys"
    per_item: bool = False
    medium: Medium = "video"
    packed: bool = False
    levels: bool = False

    @property
    def latents(self) -> str:
        """Name of the forward's first argument, the noisy latents."""
        return self.order[0]

    def arguments(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Positional and named arguments of a forward as one mapping."""
        return {**dict(zip(self.order, args, strict=False)), **kwargs}

    def attentions(self, module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
        """Video self-attention modules in execution order."""
        patterns = [re.compile(pattern + r"\Z") for pattern in self.self_attention]
        named = list(named_modules(module))
        return [(name, sub) for pattern in patterns for name, sub in named if pattern.match(name)]


def _patches(size: torch.Size, patch: tuple[int, int, int], frames_at: int = 2) -> Dims:
    frames, height, width = size[frames_at], size[3], size[4]
    return frames // patch[0], height // patch[1], width // patch[2]


def _triple(module: Any, arguments: Arguments) -> Dims:
    """``[B, C, F, H, W]`` with ``config.patch_size`` a triple (Wan, SkyReels-V2, Cosmos)."""
    return _patches(arguments["hidden_states"].shape, tuple(module.config.patch_size))


def _hunyuan(module: Any, arguments: Arguments) -> Dims:
    """``[B, C, F, H, W]`` with ``patch_size_t`` and ``patch_size``."""
    p = module.config.patch_size
    return _patches(arguments["hidden_states"].shape, (module.config.patch_size_t, p, p))


def _cogvideox(module: Any, arguments: Arguments) -> Dims:
    """``[B, F, C, H, W]``; CogVideoX 1.5 also patches frames."""
    p = module.config.patch_size
    return _patches(arguments["hidden_states"].shape, (module.config.patch_size_t or 1, p, p), frames_at=1)


def _mochi(module: Any, arguments: Arguments) -> Dims:
    """``[B, C, F, H, W]``, frames not patched."""
    p = module.config.patch_size
    return _patches(arguments["hidden_states"].shape, (1, p, p))


def _ltx(module: Any, arguments: Arguments) -> Dims | None:
    """Packed ``[B, S, C]``; the sizes of the latent lattice come as arguments (absent with ``video_coords``)."""
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        return None
    p, p_t = module.config.patch_size, module.config.patch_size_t
    return frames // p_t, height // p, width // p


def _from_ids(module: Any, arguments: Arguments) -> None:
    """The lattice comes from token coordinates; see :func:`dims_from_ids`."""
    return None


def dims_from_ids(ids: torch.Tensor, tokens: int) -> Dims | None:
    """Lattice of an image from its token coordinates ``[S, 3]`` (frame or image id, row, column).

    Control and Kontext pipelines append the tokens of further images with their own coordinates: then the ids are
    no full rectangle and there is no grid; nor where they stand in another order, or differ between the items of a
    batch ``[B, S, 3]``. Reads the tensor (two device syncs).
    """
    items = ids if ids.ndim == 3 else ids[None]
    low, high = items[0].amin(0).tolist(), items[0].amax(0).tolist()
    height, width = int(high[1] - low[1]) + 1, int(high[2] - low[2]) + 1
    if not height * width == tokens == items.shape[1]:
        return None
    place = torch.arange(tokens, device=ids.device)
    lattice = torch.stack([torch.zeros_like(place), place // width, place % width], 1)
    lattice = (lattice + torch.tensor(low, device=ids.device)).to(ids.dtype)  # large ones are rounded in bf16
    return (1, height, width) if bool((items == lattice).all()) else None


def _image(module: Any, arguments: Arguments) -> Dims:
    """``[B, C, H, W]`` with ``config.patch_size`` (SD3, PixArt)."""
    p = module.config.patch_size
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // p, width // p


def _qwen(module: Any, arguments: Arguments) -> Dims | None:
    """Packed ``[B, S, C]``; ``img_shapes`` has (frames, height, width) per item, or a list of them per item. Edit
    pipelines append the tokens of further images, and items may differ in size: then there is no grid."""
    shapes = [tuple(item) if isinstance(item, tuple) else item for item in arguments.get("img_shapes") or ()]
    firsts = {tuple(s) if isinstance(s, tuple) else tuple(s[0]) if len(s) == 1 else () for s in shapes}
    if len(firsts) != 1:
        return None
    dims = firsts.pop()
    return (dims[0], dims[1], dims[2]) if len(dims) == 3 else None


def _unet(module: Any, arguments: Arguments) -> Dims:
    """``[B, C, H, W]``, or with frames, which a U-Net's spatial attention sees as batch items."""
    height, width = arguments["sample"].shape[-2:]
    return 1, height, width


def level_of(dims: Dims, tokens: int) -> Dims | None:
    """The resolution of a U-Net at which there are so many tokens, or None: each level halves, rounding up."""
    frames, height, width = dims
    while frames * height * width > tokens and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    return (frames, height, width) if frames * height * width == tokens else None


_WAN_BLOCKS = (r"blocks\.\d+\.attn1",)
_HUNYUAN_BLOCKS = (r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn")
_DIT_BLOCKS = (r"transformer_blocks\.\d+\.attn1",)
# In execution order; `mid_block` comes after `up_blocks` among a U-Net's children.
_UNET_BLOCKS = tuple(
    part + r"\.attentions\.\d+\.transformer_blocks\.\d+\.attn1"
    for part in (r"down_blocks\.\d+", r"mid_block", r"up_blocks\.\d+")
)
_UNET = Denoiser(
    _UNET_BLOCKS, _unet, order=("sample", "timestep", "encoder_hidden_states"), medium="image", levels=True
)

DENOISERS: dict[str, Denoiser] = {
    "WanTransformer3DModel": Denoiser(_WAN_BLOCKS, _triple),
    "WanVACETransformer3DModel": Denoiser((r"vace_blocks\.\d+\.attn1", *_WAN_BLOCKS), _triple),
    "SkyReelsV2Transformer3DModel": Denoiser(_WAN_BLOCKS, _triple),
    "HunyuanVideoTransformer3DModel": Denoiser(_HUNYUAN_BLOCKS, _hunyuan, text="last"),
    "HunyuanVideo15Transformer3DModel": Denoiser(_HUNYUAN_BLOCKS[:1], _hunyuan, text="last", mask="outer"),
    "CogVideoXTransformer3DModel": Denoiser(
        _DIT_BLOCKS, _cogvideox, text="first", order=("hidden_states", "encoder_hidden_states", "timestep")
    ),
    "LTXVideoTransformer3DModel": Denoiser(
        _DIT_BLOCKS, _ltx, order=("hidden_states", "encoder_hidden_states", "timestep"), packed=True
    ),
    "MochiTransformer3DModel": Denoiser(
        _DIT_BLOCKS,
        _mochi,
        text="last",
        order=("hidden_states", "encoder_hidden_states", "timestep"),
        per_item=True,
    ),
    "CosmosTransformer3DModel": Denoiser(_DIT_BLOCKS, _triple),
    "FluxTransformer2DModel": Denoiser(
        _HUNYUAN_BLOCKS,
        _from_ids,
        text="first",
        order=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        ids="img_ids",
        packed=True,
        medium="image",
    ),
    "SD3Transformer2DModel": Denoiser(
        (r"transformer_blocks\.\d+\.attn2?",),
        _image,
        text="last",
        order=("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        medium="image",
    ),
    "QwenImageTransformer2DModel": Denoiser(
        _HUNYUAN_BLOCKS[:1],
        _qwen,
        text="first",
        order=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes"),
        packed=True,
        medium="image",
    ),
    "PixArtTransformer2DModel": Denoiser(
        _DIT_BLOCKS, _image, order=("hidden_states", "encoder_hidden_states", "timestep"), medium="image"
    ),
    "UNet2DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
}


def describe(module: torch.nn.Module) -> Denoiser | None:
    """The table entry of a model: by its class, or by a diffusers class it derives from."""
    for cls in type(module).__mro__:
        if cls.__name__ in DENOISERS:
            return DENOISERS[cls.__name__]
    return None
