"""The linear layers of a network: which there are, what they do in their block, and another one put in their place.

A replaced linear keeps its place in the module tree, so that everything that goes by name keeps working: state-dict
prefixes, peft's target modules, and the entries of transformers' tensor-parallel plan (``_tp_plan`` names modules, not
weights; the plan itself is not touched). Its hooks belong to the place: the hook dictionaries are shared by the old and
the new module, so a handle that was given out earlier removes its hook from both, and a hook that is registered while
the new module stands is there after undo.

What is refused, in words: a linear with a parametrization (its weight is computed anew at every access), with weights
that accelerate keeps elsewhere, with a sharded weight, and one that shares its weight with something that is no linear
(a tied head and its embedding).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_accel.errors import Conflict, InvalidSetting, NotApplicable, WeightsMismatch
from hf_accel.hosts.blocks import block_names, is_linear
from hf_accel.hosts.linear_roles import ROLES, role_of
from hf_accel.hosts.target import is_a
from hf_accel.ledger import Ledger

__all__ = ["ROLES", "LinearSite", "Survey", "find_linears", "replace", "survey"]

# Where hooks of a module live. Handles hold these dictionaries weakly, hence they are shared, not copied.
_HOOK_STORES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One linear layer in its place.

    Attributes:
        name: dotted name, without the wrappers of peft: what users and checkpoints call it.
        module: the linear; inside a peft wrapper its ``base_layer``.
        parent: the module that holds it, as ``attribute``.
        role: one of :data:`ROLES`.
        kind: ``"linear"`` (``nn.Linear``), ``"conv1d"`` (transformers' ``Conv1D``, weight ``[in, out]``) or
            ``"packed"`` (our :class:`~hf_accel.quant.packed_linear.PackedLinear`).
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        tied: the other places whose linear has the very same weight; :func:`replace` serves them too.
        shared_with: names of modules that are no linears and have the same weight: an embedding.
    """

    name: str
    module: torch.nn.Module
    parent: torch.nn.Module
    attribute: str
    role: str
    kind: str
    in_features: int
    out_features: int
    tied: tuple[LinearSite, ...] = ()
    shared_with: tuple[str, ...] = ()

    @property
    def weight(self) -> torch.Tensor:
        """The weight as ``[out, in]``, a view where the layer stores it; dequantised where it is packed."""
        module: Any = self.module
        if self.kind == "packed":
            return module.dequantize_weight()
        return module.weight.detach().t() if self.kind == "conv1d" else module.weight.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        """``[out]``, or None."""
        bias: torch.Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()


@dataclass(frozen=True)
class Survey:
    """Linears that were asked for: those that can be worked with, and why others cannot (name to reason)."""

    sites: list[LinearSite]
    skipped: dict[str, str]


def find_linears(
    root: torch.nn.Module,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> list[LinearSite]:
    """The linears of a network, in the order of its modules. Of linears that share a weight the first is listed.

    Args:
        root: a transformers or diffusers model, or any part of one.
        targets: what to look for; None is every linear inside the model's blocks but the routers of experts (all
            linears, if ``root`` has no blocks). Each text is a role (:data:`ROLES`; inside the blocks, ``"head"``
            anywhere), a dotted name, the end of one (``"q_proj"``, ``"mlp.fc1"``), or a regular expression for a whole
            name.
        exclude: names, ends of names, regular expressions or roles to leave out.

    Raises:
        InvalidSetting: a target that no linear of the model answers to; names the nearest.
    """
    return survey(root, targets, exclude).sites


def survey(
    root: torch.nn.Module,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Survey:
    """:func:`find_linears`, with the linears that cannot be worked with and the reasons.

    Experts that are stored as one 3-D weight are no linears and are named among the skipped.
    """
    wanted = (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets)
    unwanted = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    blocks = block_names(root)
    found = _all_linears(root)
    inside = {site.name for site, _ in found if not blocks or _is_inside(_raw_name(site), blocks)}
    chosen: list[tuple[LinearSite, str | None]] = []
    answered: Counter[str] = Counter()
    for site, reason in found:
        if wanted is None:
            hit = site.name in inside and site.role != "router"
        else:
            hits = [text for text in wanted if _matches(site, text, site.name in inside)]
            answered.update(hits)
            hit = bool(hits)
        if hit and not any(_matches(site, text, True) for text in unwanted):
            chosen.append((site, reason))
    for text in wanted or ():
        if not answered[text]:
            raise _unanswered(text, [site for site, _ in found])
    skipped = {site.name: reason for site, reason in chosen if reason is not None}
    sites = _without_raw_names(_joined([site for site, reason in chosen if reason is None], root))
    if wanted is None:
        skipped |= _stacked_experts(root, blocks)
    return Survey(sites, skipped)


def replace(site: LinearSite, module: torch.nn.Module, ledger: Ledger) -> None:
    """Put ``module`` in the place of a linear, and in the places tied to it; undone by the ledger, exactly.

    The new module is moved to the device of the old one, takes its training flag and its hooks, and those of accelerate
    that only move inputs between devices. Its dtype is its own. Places that are tied to the first get a module of their
    own that shares the parameters and buffers (moving a model to another device makes copies of shared buffers).

    Args:
        module: with ``in_features`` and ``out_features`` of the site, without hooks.

    Raises:
        WeightsMismatch: it has another shape.
        NotApplicable: the linear cannot be replaced; says why and what to do.
        Conflict: the linear does not stand there any more.
    """
    new: Any = module
    sizes = (getattr(new, "in_features", None), getattr(new, "out_features", None))
    if sizes != (site.in_features, site.out_features):
        raise WeightsMismatch(
            f"{site.name} maps {site.in_features} features to {site.out_features}; its replacement, a "
            f"{type(module).__name__}, maps {sizes[0]} to {sizes[1]}."
        )
    places = (site, *site.tied)
    for place in places:
        if getattr(place.parent, place.attribute, None) is not place.module:
            raise Conflict(
                f"{place.name} is not the linear any more that was found there: another method or library replaced "
                "it. Undo that, or find the linears again."
            )
        reason = why_irreplaceable(place)
        if reason is not None:
            raise NotApplicable(f"{place.name} cannot be replaced: {reason}.")
    module.to(_device(site.module))
    for place in places:
        standing = module if place is site else _twin(module)
        _carry_over(place.module, standing)
        ledger.set(place.parent, place.attribute, standing)


def why_irreplaceable(site: LinearSite) -> str | None:
    """Why :func:`replace` refuses this linear, in words; None if it does not."""
    module: Any = site.module
    if site.shared_with:
        return (
            f"its weight is also that of {' and '.join(site.shared_with)}, which is no linear. Leave it out of the "
            "targets, or untie the two first (a copy of the weight, and tie_word_embeddings=False in the config)"
        )
    if torch.nn.utils.parametrize.is_parametrized(module):
        return (
            "it has a parametrization; make the computed weight its own first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if any(hasattr(hook, "recompute") or type(hook).__name__ == "WeightNorm" for hook in _pre_hooks(module)):
        return "its weight is normalised by a hook; torch.nn.utils.remove_weight_norm first"
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and not _only_aligns(hook):
        return (
            f"accelerate keeps its weights elsewhere ({type(hook).__name__}); load the model without offloading, or "
            "take the hooks off (pipe.remove_all_hooks(), accelerate.hooks.remove_hook_from_module)"
        )
    parameters = list(module.parameters(recurse=False))
    if any(hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id") for parameter in parameters):
        return "its weight is sharded over devices; replace before the model is distributed"
    if any(parameter.is_meta for parameter in parameters):
        return "its weight is on the meta device: the model is not loaded, or offloaded"
    return None


def _all_linears(root: torch.nn.Module) -> list[tuple[LinearSite, str | None]]:
    """Every linear below ``root`` with the reason why it cannot be worked with, under its name in the module tree."""
    found: list[tuple[LinearSite, str | None]] = []
    head = _output_head(root)
    modules = dict(root.named_modules(remove_duplicate=False))
    for raw, module in modules.items():
        if not raw or not is_linear(module):
            continue
        holder, _, attribute = raw.rpartition(".")
        parent = modules[holder]
        kind, reason = _kind(module, parent)
        if reason is None and kind == "" or _is_adapter(holder, modules):
            continue
        role = "head" if module is head else role_of(_plain(raw, modules), module, parent)
        rows, columns = _features(module, kind)
        site = LinearSite(raw, module, parent, attribute, role, kind, columns, rows)
        found.append((site, reason))
    return found
