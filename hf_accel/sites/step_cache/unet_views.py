"""Shallow views of a U-Net: the same modules in another arrangement, which diffusers' own ``forward`` then runs.

A U-Net of diffusers is a loop over ``down_blocks``, ``mid_block`` and ``up_blocks``, each a list of stages (a resnet
with its attention and, in motion models, its motion module), with one skip connection per stage and sampler. A view is
a copy of the outer shell (:func:`_shell`) whose lists are cut elsewhere; every parameter belongs to the original. So
none of diffusers' forwards is written again here, and ControlNet residuals, FreeU, IP-adapters, added conditions, LoRA
and odd sizes are handled by diffusers.

Branch ``c`` names a skip connection, counted from ``conv_in`` (0) along the down path, as in DeepCache (2312.00858) and
its public package. The *inner* hidden state is what enters the up stage that takes skip ``c``:

    view      down path            middle                    up path
    full      all                  mid_block                 all, with a tap where the inner hidden state passes
    partial   first ``c`` entries  the stored inner state    last ``c + 1`` stages
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_accel.errors import Conflict
from hf_accel.hosts.patching.forward_override import replaced_forward

# Lists that advance together, one item per stage.
_STAGES = ("resnets", "attentions", "motion_modules")
_UNETS = ("UNet2DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel", "UNet2DModel")


def why_not(module: Any) -> str | None:
    """Why a network has no skip connections to cut at, in words; None if it has."""
    names = {cls.__name__ for cls in type(module).__mro__}
    if not names & set(_UNETS):
        return f"it is no U-Net of {', '.join(_UNETS)}"
    odd = [type(block).__name__ for block in (*module.down_blocks, *module.up_blocks) if not _is_plain(block)]
    if odd:
        return f"its {odd[0]} is no list of stages with one skip connection each"
    if _skips(module) != sum(len(block.resnets) for block in module.up_blocks):
        return "its up path does not take one skip connection per stage"
    return None


def _is_plain(block: Any) -> bool:
    # K-blocks share one skip among their resnets; blocks with a skip_conv pass a second picture along.
    return hasattr(block, "resnets") and not hasattr(block, "skip_conv") and not type(block).__name__.startswith("K")


def _skips(unet: Any) -> int:
    return 1 + sum(_length(block) for block in unet.down_blocks)


def deepest_branch(unet: Any) -> int:
    """The largest branch id: all of the U-Net but ``mid_block`` is computed anew."""
    return _skips(unet) - 1


class Tap(nn.Module):
    """Up block that keeps what enters it."""

    def __init__(self, block: Any):
        super().__init__()
        self.block = block
        self.resnets = block.resnets  # U-Nets ask for their number
        self.has_cross_attention = getattr(block, "has_cross_attention", False)
        self.inner: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.inner = _unshared(hidden_states, self.block)
        return self.block(hidden_states, *args, **kwargs)


class Splice(nn.Module):
    """Stands for everything between the kept down and up paths: gives the stored hidden state."""

    def __init__(self, entry: nn.Module):
        super().__init__()
        self.entry = entry
        self.inner: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.inner is None:
            raise RuntimeError("a partial forward of a U-Net without a stored hidden state")
        return _unshared(self.inner, self.entry)


def _unshared(hidden: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """FreeU scales what enters a block in place: a copy where it is on."""
    return hidden.clone() if getattr(block, "b1", None) else hidden


class UNetViews:
    """The two views of one U-Net for one branch.

    Attributes:
        full, partial: shells for ``type(unet).forward``.
        tap: keeps the inner hidden state of a full forward.
        splice: gives it to a partial one.

    Raises:
        Conflict: a block that must be cut has a forward of its own (offloading hooks, another library), which would
            run the whole block.
    """

    def __init__(self, unet: Any, branch: int):
        self.branch = branch
        down, up = _kept_down(unet, branch), _kept_up(unet, branch + 1)
        self._cut = [block for block, count in (*down[-1:], *up[:1]) if count < _length(block)]
        for block in self._cut:
            if replaced_forward(block) is not None:
                kind = type(block).__name__
                raise Conflict(
                    f"{kind}.forward was replaced (by offloading hooks or another library), and branch {branch} cuts "
                    f"this block in two. Take that off first, or choose a branch at the border of a block: "
                    f"{', '.join(map(str, _borders(unet)))}."
                )
        entry, stages = up[0]
        head, tail = _up_parts(entry, stages)
        self.tap = Tap(tail)
        self.splice = Splice(tail)
        deeper = list(unet.up_blocks)[: -len(up)]
        shallower = [block for block, _ in up[1:]]
        heads = [] if head is None else [head]
        self.full = _shell(unet, up_blocks=nn.ModuleList([*deeper, *heads, self.tap, *shallower]))
        self.partial = _shell(
            unet,
            down_blocks=nn.ModuleList([_down_part(block, count) for block, count in down]),
            mid_block=self.splice,
            up_blocks=nn.ModuleList([tail, *shallower]),
        )
        self._witnesses = list(_witnesses(unet, self._cut))

    def stale(self, unet: nn.Module) -> bool:
        """Whether the U-Net or a block that is cut changed since (FreeU, ``train()``, replaced children)."""
        now = list(_witnesses(unet, self._cut))
        return len(now) != len(self._witnesses) or any(a is not b for a, b in zip(now, self._witnesses, strict=True))

    def partial_arguments(self, unet: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The forward's arguments for the partial view: residuals of what it does not run are left out.

        ControlNet adds to skips, in order, and to the output of ``mid_block``; the latter is in the stored state.
        T2I-adapters add to the last stage of a down block, or after a block without cross-attention.
        """
        out = dict(arguments)
        mid = out.get("mid_block_additional_residual")
        down = out.get("down_block_additional_residuals")
        if mid is not None:
            out["mid_block_additional_residual"] = torch.zeros((), dtype=mid.dtype, device=mid.device)
        legacy = down is not None and mid is None and type(unet).__name__ == "UNet2DConditionModel"
        name = "down_block_additional_residuals" if legacy else "down_intrablock_additional_residuals"
        if out.get(name) is not None:
            out[name] = list(out[name])[: self._adapted_blocks(unet)]
        return out

    def _adapted_blocks(self, unet: nn.Module) -> int:
        """Number of down blocks of which the stage runs that a T2I-adapter adds to."""
        count = 0
        for block, entries in _kept_down(unet, self.branch):
            crossed = getattr(block, "has_cross_attention", False)
            count += entries >= (len(block.resnets) if crossed else _length(block))
        return count


def _kept_down(unet: Any, entries: int) -> list[tuple[Any, int]]:
    """The down blocks that hold the first ``entries`` entries after ``conv_in``, and how many of each block."""
    out = []
    for block in unet.down_blocks:
        if entries <= 0:
            break
        out.append((block, min(entries, _length(block))))
        entries -= _length(block)
    return out


def _kept_up(unet: Any, stages: int) -> list[tuple[Any, int]]:
    """The up blocks that hold the last ``stages`` stages, in order of execution, and how many of each block."""
    out: list[tuple[Any, int]] = []
    for block in reversed(list(unet.up_blocks)):
        if stages <= 0:
            break
        out.insert(0, (block, min(stages, len(block.resnets))))
        stages -= len(block.resnets)
    return out


def _length(block: Any) -> int:
    """Entries of a down block (stages and samplers), or stages of an up block."""
    return len(block.resnets) + len(getattr(block, "downsamplers", None) or ())


def _borders(unet: Any) -> list[int]:
    """Branches that cut no block."""
    downs, ups = {0}, set()
    for block in unet.down_blocks:
        downs.add(max(downs) + _length(block))
    stages = 0
    for block in reversed(list(unet.up_blocks)):
        stages += len(block.resnets)
        ups.add(stages - 1)
    return sorted(downs & ups)


def _down_part(block: Any, entries: int) -> nn.Module:
    """The first ``entries`` entries of a down block; the block itself if that is all of it."""
    if entries >= _length(block):
        return block
    part = _shell(block, "_forward_pre_hooks", **_stages(block, slice(0, entries)))
    part._modules["downsamplers"] = None
    return part


def _up_parts(block: Any, stages: int) -> tuple[nn.Module | None, nn.Module]:
    """An up block in two: all but the last ``stages`` stages, and those with the upsamplers. The block itself if that
    is all of it."""
    if stages == len(block.resnets):
        return None, block
    head = _shell(block, "_forward_pre_hooks", **_stages(block, slice(0, -stages)))
    head._modules["upsamplers"] = None
    return head, _shell(block, "_forward_hooks", **_stages(block, slice(-stages, None)))


def _stages(block: Any, part: slice) -> dict[str, nn.Module]:
    lists = {name: getattr(block, name, None) for name in _STAGES}
    return {name: nn.ModuleList(list(items)[part]) for name, items in lists.items() if items is not None}


def _shell(module: nn.Module, hooks: str = "", **children: nn.Module) -> nn.Module:
    """A copy of the module's own attributes, with other children in places.

    Of the module's hooks only those in stores whose name begins with ``hooks`` go along: a shell of the root runs
    inside the root's own call, and of two parts of a block the first is entered and the last is left.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, dict) and "_hooks" in name and not (hooks and name.startswith(hooks)):
            twin.__dict__[name] = type(value)()
    twin.__dict__.pop("forward", None)
    for name in children:
        twin.__dict__.pop(name, None)  # a place that was None in __init__ is an attribute, and would hide the child
    twin.__dict__["_modules"] = OrderedDict({**module._modules, **children})
    return twin


def _witnesses(unet: Any, cut: list[Any]) -> Iterator[Any]:
    """Everything that a shell copied, by identity."""
    yield from unet._modules.values()
    yield from (*unet.down_blocks, *unet.up_blocks)
    for module in (unet, *cut):
        yield from (value for name, value in module.__dict__.items() if not name.startswith("_"))
    for block in cut:
        for child in block._modules.values():
            yield child
            if isinstance(child, nn.ModuleList):
                yield from child._modules.values()
