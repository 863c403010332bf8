"""Video tokens in another order throughout a denoiser: moved once on the way in, moved back once on the way out.

Between the attentions a diffusion transformer treats every token alike, so a method that wants neighbouring tokens side
by side need not sort queries, keys and values in every layer. Patches of latents are embedded one by one, so moving
patches of the *input* moves tokens at a hundredth of the memory traffic; the output is moved back the same way. All
else that belongs to single tokens moves along: rotary tables, per-token timesteps, control residuals.

What moves is one table entry per class (:data:`DOORS`). The hooks stand on the model's root and on parameter-free or
container modules, never on a layer that an adapter may wrap later. Attention calls see the order in
``AttentionCall.order``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_accel.attention.call import TokenGrid
from hf_accel.attention.layout import inverse_order
from hf_accel.attention.static import Recent
from hf_accel.hosts.denoisers import DENOISERS, Denoiser, Dims
from hf_accel.hosts.foreign import reader_of_places
from hf_accel.ledger import Ledger
from hf_accel.requests import by_key
from hf_accel.sites.attention.seam import AttentionSeam, AttentionSeams, Moved

OrderOf = Callable[[TokenGrid], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a tensor stand: along ``axis``; ``last``: behind text, in a longer axis; ``item``: only in
    this element of a tuple (other elements belong to text)."""

    axis: int
    last: bool = False
    item: int | None = None


@dataclass(frozen=True)
class Door:
    """What must move when the tokens of one class of denoiser move.

    Attributes:
        latents: arguments that are latents of the grid, moved patch by patch.
        arguments: arguments that hold one row per token, or lists of such tensors, by token axis. A tensor with one
            row, or without that axis, holds for all tokens and stays.
        modules: submodules whose output holds one row per token.
        frames_at: axis of the frames in latents with five axes.
        refuse: ``(module, arguments) -> reason`` why a forward cannot be moved, or None.
    """

    latents: tuple[str, ...] = ()
    arguments: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, Rows] = field(default_factory=dict)
    frames_at: int = 2
    refuse: Callable[[Any, Mapping[str, Any]], str | None] = lambda module, arguments: None


def _skyreels(module: Any, arguments: Mapping[str, Any]) -> str | None:
    if arguments.get("enable_diffusion_forcing") or module.config.num_frame_per_block > 1:
        return "diffusion forcing builds masks and timesteps per token inside the forward"
    return None


def _hunyuan(module: Any, arguments: Mapping[str, Any]) -> str | None:
    if module.config.image_condition_type == "token_replace":
        return "the blocks take the first tokens for those of the first frame (token_replace)"
    return None


def _pixart(module: Any, arguments: Mapping[str, Any]) -> str | None:
    return None if arguments.get("attention_mask") is None else "an attention mask over image tokens"


_WAN = Door(latents=("hidden_states",), arguments={"timestep": 1}, modules={"rope": Rows(1)})

DOORS: dict[str, Door] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": Door(
        latents=("hidden_states", "control_hidden_states"), arguments=_WAN.arguments, modules=_WAN.modules
    ),
    "SkyReelsV2Transformer3DModel": Door(latents=("hidden_states",), modules=_WAN.modules, refuse=_skyreels),
    "HunyuanVideoTransformer3DModel": Door(latents=("hidden_states",), modules={"rope": Rows(0)}, refuse=_hunyuan),
    "HunyuanVideo15Transformer3DModel": Door(latents=("hidden_states",), modules={"rope": Rows(0)}),
    # Position embeddings may be added within the patch embedding, so the tokens move behind it.
    "CogVideoXTransformer3DModel": Door(
        arguments={"image_rotary_emb": 0}, modules={"patch_embed": Rows(1, last=True)}, frames_at=1
    ),
    "SD3Transformer2DModel": Door(
        arguments={"block_controlnet_hidden_states": 1}, modules={"pos_embed": Rows(1)}
    ),
    "PixArtTransformer2DModel": Door(modules={"pos_embed": Rows(1)}, refuse=_pixart),
    "MochiTransformer3DModel": Door(latents=("hidden_states",), modules={"rope": Rows(0)}),
    "LTXVideoTransformer3DModel": Door(
        arguments={"hidden_states": 1, "timestep": 1}, modules={"rope": Rows(1)}
    ),
    "FluxTransformer2DModel": Door(
        arguments={
            "hidden_states": 1, "img_ids": -2, "controlnet_block_samples": 1, "controlnet_single_block_samples": 1,
        },
    ),
    "QwenImageTransformer2DModel": Door(
        arguments={"hidden_states": 1, "controlnet_block_samples": 1},
        modules={"pos_embed": Rows(0, item=0)},
    ),
}  # fmt: skip


def why_not(module: torch.nn.Module) -> str | None:
    """Why the tokens of this class of model cannot be moved at the door, in words; None if they can."""
    if _door(module) is not None:
        return None
    return f"what belongs to single tokens inside {type(module).__name__} is not known"


def hoist(module: torch.nn.Module, seams: AttentionSeams, order_of: OrderOf, ledger: Ledger) -> TokenOrder:
    """Let every forward of ``module`` work on tokens in the order that ``order_of`` names.

    Args:
        module: a denoiser for which :func:`why_not` is None, with a seam (``sites/attention/diffusers.py``).
        seams: of it; they know the grid of each forward.
        order_of: ``grid -> int [grid.tokens]`` on the CPU: place r of the sequence holds raster token ``order[r]``.
            Asked once per grid. A bound method of the owner, so that a deep copy of the model asks the owner's copy.
        ledger: takes the hooks.

    Returns:
        The state of the order; its ``reason`` says why the latest forward stayed in raster order, or is None.

    Raises:
        ValueError: the class cannot (:func:`why_not`).
    """
    door = _door(module)
    if door is None:
        raise ValueError(f"{why_not(module)}; ask why_not() first")
    state = TokenOrder(seams, order_of)
    seams.shared.token_order = state
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    ledger.pre_hook(module, EntryHook(state, door, names))
    for path, rows in door.modules.items():
        ledger.post_hook(module.get_submodule(path), RowsHook(state, rows))
    ledger.post_hook(module, ExitHook(state, door))
    return state


class TokenOrder:
    """Moves the tokens of the forwards of one model, in all requests."""

    def __init__(self, seams: AttentionSeams, order_of: OrderOf):
        self.seams, self.order_of = seams, order_of
        self._made: Recent[tuple[torch.Tensor, torch.Tensor]] = Recent()
        self._traced = Moved()  # in a graph there is one forward, whoever runs it

    @property
    def spec(self) -> Denoiser:
        return self.seams.shared.spec

    @property
    def moved(self) -> Moved:
        """How the tokens of the forward that runs now are moved."""
        return self._traced if torch.compiler.is_compiling() else self.seams.now().moved

    @property
    def reason(self) -> str | None:
        """Why the latest forward of this request stayed in raster order, or None."""
        return self.moved.reason or self._traced.reason

    def make(self, seam: AttentionSeam, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Order and inverse for the grid of the forward that has begun; None if the grid is not that of ``tokens``.

        From here on the seam's attention calls carry the order.
        """
        grid = seam.grid
        if grid is None or grid.tokens != tokens:
            return None
        made = self._made.get((grid, device), lambda: self._both_ways(grid, device))
        seam.order = made[0]
        return made

    def _both_ways(self, grid: TokenGrid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        order = self.order_of(grid).long()
        return order.to(device), inverse_order(order).to(device)


class EntryHook:
    """Forward pre-hook of the root: moves the arguments."""

    def __init__(self, state: TokenOrder, door: Door, names: tuple[str, ...]):
        self.state, self.door, self.names = state, door, names

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        state, moved = self.state, self.state.moved
        moved.order = moved.inverse = None
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        moved.dims = None if state.spec.packed else state.spec.dims(module, arguments)
        latents = arguments[state.spec.latents]
        tokens = latents.shape[1] if moved.dims is None else math.prod(moved.dims)
        moved.reason = self._cannot(module, arguments, tokens, moved.dims)
        if moved.reason is not None:
            return None
        if torch.compiler.is_compiling():
            moved.order, moved.inverse = torch.ops.hf_accel.token_order(latents.detach(), tokens, state.seams.key)
        elif (made := state.make(state.seams.now(), tokens, latents.device)) is not None:
            moved.order, moved.inverse = made
        else:
            moved.reason = "the token grid of this forward is unknown"
            return None
        changed = {
            name: move_patches(arguments[name], moved.order, _known(moved.dims), self.door.frames_at)
            for name in self.door.latents
        }
        for name, axis in self.door.arguments.items():
            changed[name] = _move(arguments.get(name), Rows(axis), moved.order)
        values = [changed.get(name, value) for name, value in zip(self.names, args, strict=False)]
        return tuple(values), {name: changed.get(name, value) for name, value in kwargs.items()}

    def _cannot(self, module: Any, arguments: Mapping[str, Any], tokens: int, dims: Dims | None) -> str | None:
        """Why this forward stays in raster order, or None."""
        if (reason := self.door.refuse(module, arguments)) is not None:
            return reason
        for name in ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"):
            if masks := [key for key in arguments.get(name) or () if "mask" in key]:
                return f"{name} hold {masks[0]}, which may be of single tokens"
        if getattr(module, "_parallel_config", None) is not None:
            return "parallelism is on"
        if (reader := reader_of_places(module)) is not None:
            return f"{reader} computes on where tokens stand"
        if self.door.latents:
            patch = _patch(module.config)
            for name in self.door.latents:
                size = arguments[name].shape[2:]
                if any(n != d * p for n, d, p in zip(size, dims or (), patch, strict=True)):
                    return f"{name} of {tuple(size)} are not whole patches of {patch} on the grid {dims}"
        for name, axis in self.door.arguments.items():
            sizes = {x.shape[axis] for x in _tensors(arguments.get(name)) if -x.ndim <= axis < x.ndim}
            if sizes - {1, tokens}:
                return f"{name} has {max(sizes - {1, tokens})} rows for {tokens} tokens"
        return None


class RowsHook:
    """Forward hook of a submodule whose output has one row per token."""

    def __init__(self, state: TokenOrder, rows: Rows):
        self.state, self.rows = state, rows

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        order = self.state.moved.order
        if order is None or output is None:
            return None
        if self.rows.item is None:
            return _move(output, self.rows, order)
        return tuple(
            _move(value, self.rows, order) if place == self.rows.item else value for place, value in enumerate(output)
        )


class ExitHook:
    """Forward hook of the root, called after exceptions too: moves the output back."""

    def __init__(self, state: TokenOrder, door: Door):
        self.state, self.door = state, door

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        moved = self.state.moved
        inverse = moved.inverse
        moved.order = moved.inverse = None
        if inverse is None or output is None:
            return None
        if isinstance(output, tuple):
            return (self._back(output[0], inverse, moved.dims), *output[1:])
        return type(output)(sample=self._back(output.sample, inverse, moved.dims))

    def _back(self, sample: torch.Tensor, inverse: torch.Tensor, dims: Dims | None) -> torch.Tensor:
        inverse = inverse.to(sample.device)  # offloading may leave the output elsewhere
        if self.state.spec.packed:
            return sample.index_select(1, inverse)
        return move_patches(sample, inverse, _known(dims), self.door.frames_at)


def move_patches(latents: torch.Tensor, order: torch.Tensor, dims: Dims, frames_at: int = 2) -> torch.Tensor:
    """Put the patches of latents into another order on their grid: patch r becomes the former patch ``order[r]``.

    Args:
        latents: ``[B, C, F, H, W]`` (``[B, F, C, H, W]`` with ``frames_at=1``) or ``[B, C, H, W]``.
        order: int ``[f * h * w]``.
        dims: ``(f, h, w)``, the grid of patches; divides F, H and W.
        frames_at: axis of the frames.

    Returns:
        Like ``latents``.
    """
    if latents.ndim == 4:
        return move_patches(latents.unsqueeze(2), order, dims).squeeze(2)
    if frames_at == 1:
        return move_patches(latents.transpose(1, 2), order, dims).transpose(1, 2).contiguous()
    frames, height, width = dims
    parts = latents.unflatten(4, (width, -1)).unflatten(3, (height, -1)).unflatten(2, (frames, -1))
    patches = parts.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(5).index_select(5, order)
    back = patches.unflatten(5, (frames, height, width)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return back.reshape(latents.shape)


def _move(value: Any, rows: Rows, order: torch.Tensor) -> Any:
    """``value`` with the rows of its tensors in another order; lists and tuples of tensors item by item."""
    if isinstance(value, list | tuple):
        return type(value)(_move(item, rows, order) for item in value)
    if value is None or not -value.ndim <= rows.axis < value.ndim or value.shape[rows.axis] == 1:
        return value
    order = order.to(value.device)
    if not rows.last:
        return value.index_select(rows.axis, order)
    text = value.shape[rows.axis] - order.shape[0]
    before, tokens = value.split([text, order.shape[0]], dim=rows.axis)
    return torch.cat([before, tokens.index_select(rows.axis, order)], dim=rows.axis)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def _known(dims: Dims | None) -> Dims:
    if dims is None:
        raise ValueError("latents without the size of their grid")
    return dims


def _patch(config: Any) -> tuple[int, int, int]:
    """Latents of a patch along frames, height, width."""
    p = config.patch_size
    if isinstance(p, list | tuple):
        return p[0], p[1], p[2]
    return getattr(config, "patch_size_t", None) or 1, p, p


def _door(module: torch.nn.Module) -> Door | None:
    """The entry of a model's class, or of the nearest class it derives from that has a reader of its grid."""
    for cls in type(module).__mro__:
        if cls.__name__ in DENOISERS:
            return DOORS.get(cls.__name__)
    return None


@torch.library.custom_op("hf_accel::token_order", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _token_order(latents: torch.Tensor, tokens: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and inverse for a forward of a compiled model. ``latents`` come from ``hf_accel::begin_forward``, so the
    grid is known by now. Identity where the forward stays in raster order."""
    seams = by_key(key)
    owner = seams.shared.token_order if seams is not None else None
    made = owner.make(seams.now(), tokens, latents.device) if seams is not None and owner is not None else None
    if made is None:
        raster = torch.arange(tokens, device=latents.device)
        return raster, raster.clone()
    return made[0].clone(), made[1].clone()


@_token_order.register_fake
def _(latents, tokens, key):
    return latents.new_empty(tokens, dtype=torch.int64), latents.new_empty(tokens, dtype=torch.int64)
