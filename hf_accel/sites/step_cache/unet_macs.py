"""Multiply-accumulates of a U-Net and of its partial view, counted without computing anything.

A twin of the U-Net is made from its configuration on the meta device, where forwards cost nothing, and torch's own
counter watches one forward of each view. Counted is the architecture: LoRA, IP-adapters and what an attention method
saves are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hf_accel.sites.step_cache.unet_views import UNetViews

# Arguments that change no number of multiplications, or belong to modules that a configuration does not hold.
_LEFT_OUT = ("cross_attention_kwargs", "attention_mask", "encoder_attention_mask", "return_dict")


@dataclass(frozen=True)
class _TensorShape:
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ForwardShape:
    """Shapes, dtypes and devices of a forward's arguments, and which are given: equal for calls of one graph."""

    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec = field(hash=False)  # with the names

    def __deepcopy__(self, memo: dict) -> ForwardShape:
        return self  # values only; torch warns users when its TreeSpec is copied

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> ForwardShape:
        """Of the arguments by name. The timestep's value is no part of it; other numbers are not either."""
        given = {k: v for k, v in sorted(arguments.items()) if v is not None and k != "timestep"}
        leaves, structure = pytree.tree_flatten(given)
        kinds = tuple(
            _TensorShape(tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x) for x in leaves
        )
        return cls(kinds, structure)

    def on_meta(self) -> dict[str, Any]:
        """The arguments again, tensors empty on the meta device, anything else left out."""
        leaves = [
            # in float32, as the twin's weights are; the count does not depend on it
            torch.empty(x.shape, dtype=torch.float32 if x.dtype.is_floating_point else x.dtype, device="meta")
            if isinstance(x, _TensorShape)
            else None
            for x in self.leaves
        ]
        arguments = pytree.tree_unflatten(leaves, self.structure)
        return {name: value for name, value in arguments.items() if name not in _LEFT_OUT}


class MacShares:
    """MACs of full and partial forwards of one U-Net, per shape of their arguments, counted when asked for."""

    def __init__(self, unet: Any, branch: int):
        self._class, self._config, self._branch = type(unet), dict(unet.config), branch
        self._known: dict[ForwardShape, tuple[float, float] | None] = {}

    def of(self, shape: ForwardShape) -> tuple[float, float] | None:
        """(full, partial) in MACs for the whole batch; None if the architecture cannot be run without its weights."""
        if shape not in self._known:
            self._known[shape] = self._count(shape)
        return self._known[shape]

    def _count(self, shape: ForwardShape) -> tuple[float, float] | None:
        config = dict(self._config)
        arguments = shape.on_meta()
        if config.get("encoder_hid_dim_type") == "ip_image_proj" and config.get("encoder_hid_dim") is None:
            config["encoder_hid_dim_type"] = None  # set by load_ip_adapter; its projection is not in the configuration
        try:
            with torch.device("meta"), torch.no_grad():
                # SVD's blenders make their weight by a constructor that does not heed the device context
                twin: Any = self._class.from_config(config).to("meta")
                views = UNetViews(twin, self._branch)
                full = self._watch(twin, views.full, arguments)
                views.splice.inner = views.tap.inner
                partial = self._watch(twin, views.partial, views.partial_arguments(twin, arguments))
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError):
            return None  # parts that the configuration does not build
        return full, partial

    @staticmethod
    def _watch(twin: Any, view: torch.nn.Module, arguments: dict[str, Any]) -> float:
        from torch.utils.flop_counter import FlopCounterMode  # imports Triton where it is installed

        timestep = torch.zeros((), dtype=torch.float32, device="meta")
        with FlopCounterMode(display=False) as counter:
            type(twin).forward(view, timestep=timestep, return_dict=False, **arguments)
        return counter.get_total_flops() / 2
