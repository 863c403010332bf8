"""The linear layers of a network: which there are, what they do in their block, and another one put in their place.

A replaced linear keeps its place in the module tree, so that everything that goes by name keeps working: state-dict
prefixes, peft's target modules, and the entries of transformers' tensor-parallel plan (``_tp_plan`` names modules, not
weights; the plan itself is not touched). Its hooks belong to the place: the hook dictionaries are shared by the old and
the new module, so a handle that was given out earlier removes its hook from both, and a hook that is registered while
the new module stands is there after undo.

What is refused, in words: a linear whose weight is computed (a parametrization, weight norm), kept elsewhere
(offloading by accelerate or diffusers), sharded over devices, or shared with something that is no linear (a tied head
and its embedding).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.modules.conv import _ConvNd

from hf_accel.errors import Conflict, InvalidSetting, NotApplicable, WeightsMismatch
from hf_accel.hosts.layer_lists import is_linear, layer_names
from hf_accel.hosts.target import is_a
from hf_accel.ledger import Ledger
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.linear.roles import ROLES, role_of

# Where hooks of a module live. Handles refer to these dictionaries, hence they are shared, not copied.
_HOOK_STORES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearSite:
    """One linear layer in its place.

    Attributes:
        name: dotted name, without the wrappers of peft and ``torch.compile``: what users and checkpoints call it.
        module: the linear; inside a peft wrapper its ``base_layer``.
        parent: the module that holds it, as ``attribute``.
        role: one of :data:`~hf_accel.sites.linear.roles.ROLES`.
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
        """The weight as ``[out, in]``: a view of the layer's own; where it is packed, dequantised anew."""
        module: Any = self.module
        if self.kind == "packed":
            return module.dequantize_weight()
        return module.weight.detach().t() if self.kind == "conv1d" else module.weight.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        """``[out]``, or None."""
        bias: torch.Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()


class Survey(NamedTuple):
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
        targets: what to look for; None is every linear inside the model's blocks (all, if ``root`` has none) but a
            head and the routers of experts. Each text is a role (inside the blocks; ``"head"`` anywhere), a dotted
            name, the end of one (``"q_proj"``, ``"mlp.fc1"``), or a regular expression for a whole name.
        exclude: roles, names, ends of names or regular expressions to leave out. Where one of several linears that
            share a weight is left out, all are.

    Raises:
        InvalidSetting: a target that no linear of the model answers to; names the nearest.
    """
    return survey(root, targets, exclude).sites


def survey(
    root: torch.nn.Module,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> Survey:
    """:func:`find_linears`, and the linears that cannot be worked with, with the reasons.

    Experts that are stored as one 3-D weight are no linears and are named among the skipped.
    """
    wanted = _texts("targets", targets)
    unwanted = _texts("exclude", exclude) or ()
    blocks = layer_names(root)
    found = list(_all_linears(root, blocks))
    for text in wanted or ():
        if not any(_answers(entry, text) for entry in found):
            raise _unanswered(text, found)
    groups = _groups(found)
    owners = _other_owners(root)
    sites: list[LinearSite] = []
    skipped: dict[str, str] = {}
    for group in groups:
        if any(_answers(entry, text) for entry in group for text in unwanted):
            continue
        if not any(_asked_for(entry, wanted) for entry in group):
            continue
        if (reason := group[0].reason) is not None:
            skipped |= {entry.site.name: reason for entry in group}
            continue
        first, *others = (entry.site for entry in group)
        shared = owners.get(_identity(group[0].site), ())
        sites.append(dataclasses.replace(first, tied=tuple(others), shared_with=tuple(shared)))
    if wanted is None:
        skipped |= _stacked_experts(root, blocks)
    return Survey(sites, skipped)


def convolutions(root: torch.nn.Module) -> list[str]:
    """Names of the convolutions of a network, which are linears over patches and none of :func:`find_linears`."""
    return [name for name, module in root.named_modules() if isinstance(module, _ConvNd)]


def replace(site: LinearSite, module: torch.nn.Module, ledger: Ledger) -> None:
    """Put ``module`` in the place of a linear, and in the places tied to it; undone by the ledger, exactly.

    The new module is moved to the device of the old one and takes its training flag, its hooks, and those hooks of
    accelerate that only move inputs between devices. Its dtype is its own. A place that is tied to the first gets a
    module of its own with the same parameters and buffers.

    Args:
        site: from :func:`find_linears`.
        module: has ``in_features`` and ``out_features`` of the site, and no hooks.
        ledger: of the model.

    Raises:
        WeightsMismatch: it has another shape.
        NotApplicable: the linear cannot be replaced; says why and what to do.
        Conflict: the linear does not stand there any more, or ``module`` has hooks.
    """
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if sizes != (site.in_features, site.out_features):
        raise WeightsMismatch(
            f"{site.name} maps {site.in_features} features to {site.out_features}; its replacement, a "
            f"{type(module).__name__}, maps {sizes[0]} to {sizes[1]}."
        )
    if any(getattr(module, store) for store in _HOOK_STORES):
        raise Conflict(f"The {type(module).__name__} for {site.name} has hooks. Register them after the replacement.")
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
    old = _stored_weight(site.module)
    if old is not None:
        module.to(old.device)
    for place in places:
        standing = module if place.module is site.module else _twin(module)
        if standing is not module or place is site:
            _take_over(place.module, standing)
        ledger.set(place.parent, place.attribute, standing)


def why_irreplaceable(site: LinearSite) -> str | None:
    """Why :func:`replace` refuses this linear, in words; None if it does not."""
    module: Any = site.module
    if site.shared_with:
        return (
            f"its weight is also that of {' and '.join(site.shared_with)}, which is no linear. Leave it out of the "
            "targets, or untie the two first (a copy of the weight, and tie_word_embeddings=False in the config)"
        )
    if site.kind != "packed" and "weight" not in module._parameters:
        return (
            "its weight is computed from others. Make the result its own first "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm)"
        )
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and not _only_aligns(hook):
        return (
            f"accelerate keeps its weights elsewhere ({type(hook).__name__}). Load the model without offloading, or "
            "take the hooks off (pipe.remove_all_hooks(), accelerate.hooks.remove_hook_from_module)"
        )
    if (registry := module.__dict__.get("_diffusers_hook")) is not None:
        return f"hooks of diffusers stand on it ({', '.join(registry.hooks)}). Take them off, or apply before them"
    weight = _stored_weight(module)
    if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
        return "its weight is sharded over devices. Replace before the model is distributed"
    if weight is not None and weight.is_meta:
        return "its weight is on the meta device: the model is not loaded, or offloaded"
    return None


class _Found(NamedTuple):
    """A linear, whether it stands inside a block, and why it cannot be worked with (None if it can)."""

    site: LinearSite
    inside: bool
    reason: str | None


def _all_linears(root: torch.nn.Module, blocks: list[str]) -> Iterator[_Found]:
    """Every linear below ``root`` but those that belong to adapters, also where a module stands in several places."""
    modules: dict[str, Any] = dict(root.named_modules(remove_duplicate=False))
    head = _output_head(root)
    prefixes = tuple(f"{block}." for block in blocks)
    for path, module in modules.items():
        if not path or not is_linear(module) or _of_adapter(path, modules):
            continue
        holder, _, attribute = path.rpartition(".")
        outer = holder.rpartition(".")[0] if attribute == "base_layer" else holder
        name = ".".join(part for part in path.split(".") if part not in ("base_layer", "_orig_mod"))
        role = "head" if module is head else role_of(name, module, modules[outer])
        kind, reason = _kind(module, modules[holder])
        rows, columns = _features(module, kind)
        site = LinearSite(name, module, modules[holder], attribute, role, kind, columns, rows)
        yield _Found(site, not blocks or path.startswith(prefixes), reason)


# Tuners of peft whose layers compute with the weight of the linear below them, which a packed one does not show.
_READERS = tuple(f"peft.tuners.{name}." for name in ("glora", "hira", "hra", "peanut", "supertuning"))


def _kind(module: Any, parent: torch.nn.Module) -> tuple[str, str | None]:
    """The kind of a linear, and why it cannot be worked with."""
    if isinstance(module, PackedLinear):
        return "packed", None
    if is_a(module, "transformers.pytorch_utils", "Conv1D"):
        return "conv1d", None
    name = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    if not isinstance(module, torch.nn.Linear):
        return "foreign", f"quantised or replaced by another library: {name}"
    if isinstance(parent, torch.nn.MultiheadAttention):
        return "linear", "nn.MultiheadAttention reads its weight and does not call it"
    if type(parent).__module__.startswith(_READERS):
        return "linear", f"the adapter on it reads its weight and does not call it: peft's {type(parent).__module__}"
    weight = module._parameters.get("weight")
    if weight is not None and (type(weight.data) is not torch.Tensor and not hasattr(weight, "device_mesh")):
        return "foreign", f"its weight is a {type(weight.data).__name__}: quantised by another library"
    if weight is not None and (not weight.is_floating_point() or weight.ndim != 2):
        return "foreign", f"quantised by another library: {name}"
    if type(module).forward is not torch.nn.Linear.forward:
        return "foreign", f"{name} has a forward of its own"
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__ and "_diffusers_hook" not in module.__dict__:
        return "foreign", "its forward was replaced on the instance"
    return "linear", None


def _features(module: Any, kind: str) -> tuple[int, int]:
    """``(out, in)``."""
    if kind == "conv1d":
        return int(module.nf), int(module.nx)
    return int(module.out_features), int(module.in_features)


def _of_adapter(path: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Whether a module is a part of what peft wraps around a layer, and not the layer itself."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        wrapper = modules[".".join(parts[:depth])]
        if "base_layer" in wrapper._modules and parts[depth] != "base_layer":
            return True
        if "modules_to_save" in wrapper._modules and "original_module" in wrapper._modules:
            return True
    return False


def _output_head(root: torch.nn.Module) -> torch.nn.Module | None:
    if not is_a(root, "transformers", "PreTrainedModel"):
        return None
    model: Any = root
    return model.get_output_embeddings()


def _texts(field: str, given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    texts = (given,) if isinstance(given, str) else tuple(given)
    for text in texts:
        try:
            re.compile(text)
        except (re.error, TypeError) as error:
            raise InvalidSetting(
                "linears", field, text, f"a role, a name, the end of one, or a regular expression ({error})"
            ) from error
    return texts


def _asked_for(entry: _Found, wanted: tuple[str, ...] | None) -> bool:
    if wanted is None:
        return entry.inside and entry.site.role not in ("router", "head")
    return any(_answers(entry, text) for text in wanted)


def _answers(entry: _Found, text: str) -> bool:
    """Whether a linear is meant by a text; see :func:`find_linears`."""
    site = entry.site
    if text in ROLES and site.role == text:
        return entry.inside or text == "head"
    return site.name == text or site.name.endswith(f".{text}") or re.fullmatch(text, site.name) is not None


def _unanswered(text: str, found: list[_Found]) -> InvalidSetting:
    roles = sorted({entry.site.role for entry in found if entry.inside or entry.site.role == "head"})
    ends = {entry.site.name.rpartition(".")[2]: None for entry in found}
    near = difflib.get_close_matches(text, [*roles, *ends], n=3, cutoff=0.5)
    allowed = f"a linear of this model (roles: {', '.join(roles)}; ends of names: {', '.join(ends)})"
    return InvalidSetting("linears", "targets", text, f"{allowed}{f'; did you mean {near}' if near else ''}")


def _stored_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """What a linear stores for its weight, whatever its form; None if it stores nothing."""
    stored: dict[str, Any] = {**module._buffers, **module._parameters}
    for name in ("weight", "qweight"):
        if stored.get(name) is not None:
            return stored[name]
    return next(itertools.chain(module.parameters(), module.buffers()), None)


def _identity(site: LinearSite) -> Hashable:
    """Equal for linears that have one weight."""
    weight = _stored_weight(site.module)
    return id(site.module) if weight is None else _tensor_identity(weight)


def _tensor_identity(tensor: torch.Tensor) -> Hashable:
    if tensor.is_meta or not tensor.numel() or type(tensor.data) is not torch.Tensor:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _groups(found: list[_Found]) -> list[list[_Found]]:
    """Linears by weight, in the order of the first of each."""
    groups: dict[Hashable, list[_Found]] = {}
    for entry in found:
        groups.setdefault(_identity(entry.site), []).append(entry)
    return list(groups.values())


def _other_owners(root: torch.nn.Module) -> dict[Hashable, list[str]]:
    """By weight, the modules that have it and are no linears."""
    owners: dict[Hashable, list[str]] = {}
    for name, module in root.named_modules():
        if is_linear(module):
            continue
        for parameter in module.parameters(recurse=False):
            owners.setdefault(_tensor_identity(parameter), []).append(f"{name} ({type(module).__name__})")
    return owners


def _stacked_experts(root: torch.nn.Module, blocks: list[str]) -> dict[str, str]:
    prefixes = tuple(f"{block}." for block in blocks)
    return {
        name: f"{tuple(parameter.shape)}: the weights of {parameter.shape[0]} experts in one tensor, no linears"
        for name, parameter in root.named_parameters()
        if parameter.ndim == 3 and "expert" in name.lower() and name.startswith(prefixes)
    }


def _only_aligns(hook: Any) -> bool:
    """Whether a hook of accelerate moves inputs to the device of the weights and does nothing else."""
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def _take_over(old: torch.nn.Module, new: torch.nn.Module) -> None:
    new.train(old.training)
    for store in _HOOK_STORES:
        new.__dict__[store] = old.__dict__[store]
    new._is_full_backward_hook = old._is_full_backward_hook
    hook: Any = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, copy.copy(hook))


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """Another module with the same parameters and buffers: their dictionaries are shared, so a move moves both."""
    return copy.copy(module)
