"""Models with packed linears on disk, in the GPTQ layout of the ecosystem: what a checkpoint says, and loading it.

A checkpoint holds, in the place of a linear's ``weight``, the buffers of
:class:`~hf_accel.quant.packed_linear.PackedLinear`, and its config a ``quantization_config`` whose ``quant_method`` is
``gptq``. That name is chosen so that a process which cannot read the weights says so: transformers asks for optimum and
GPTQModel, which read them, and diffusers knows no ``gptq``; a name that transformers does not know it would skip with a
warning, and leave the layers random.

Two versions of the layout differ in the zeros: ``checkpoint_format`` ``gptq`` (v1) stores ``zero - 1``, ``gptq_v2`` the
zero itself. We write v1, which everything reads, wherever no zero is 0.

Which layers are packed is taken from the tensors in the files, not from the config, which different tools fill
differently. Reading is switched on in ``loading.py``; saving needs nothing but :func:`.declare.declare`.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import hf_accel
from hf_accel.errors import QuantizationError
from hf_accel.hosts.layer_lists import is_linear, layer_list, layer_names
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.quant.packing import PACKED_BITS, fits_v1, from_v1, to_v1
from hf_accel.sites.linear.places import LinearSite, find_linears

QUANT_METHOD = "gptq"
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")

_BUFFERS = ("qweight", "qzeros", "scales")  # g_idx may be absent: older tools leave it out where groups are neighbours
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


@dataclass(frozen=True)
class GPTQSettings:
    """The ``quantization_config`` of a checkpoint.

    Attributes:
        bits: of most layers; layers tell their own by their shapes.
        group_size: inputs of a group in most layers; -1 is the whole row.
        desc_act: columns were quantised in the order of their activations: groups need not be neighbours.
        sym: zeros are all ``2 ** (bits - 1)``.
        checkpoint_format: ``"gptq"`` (v1) or ``"gptq_v2"``.
        damp_percent: damping of the Gram matrix, a record.
        true_sequential: a record.
        static_groups: grids were fixed before the first rounding, a record.
        lm_head: the head is packed too.
        dynamic: GPTQModel's exceptions by regular expression: ``"-:EXPRESSION"`` is not packed, ``"+:EXPRESSION"`` has
            other settings.
        modules_in_block_to_quantize: optimum's list of the names inside a block that are packed, where some are not.
    """

    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = False
    checkpoint_format: str = "gptq"
    damp_percent: float = 0.01
    true_sequential: bool = False
    static_groups: bool = False
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules_in_block_to_quantize: list[list[str]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``."""
        told: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "checkpoint_format": self.checkpoint_format,
            "damp_percent": self.damp_percent,
            "true_sequential": self.true_sequential,
            "static_groups": self.static_groups,
            "lm_head": self.lm_head,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"hf_accel:{hf_accel.__version__}"]},
        }
        if self.dynamic:
            told["dynamic"] = {key: dict(value) for key, value in self.dynamic.items()}
        if self.modules_in_block_to_quantize:
            told["modules_in_block_to_quantize"] = self.modules_in_block_to_quantize
        return told


def read_settings(config: Mapping[str, Any]) -> GPTQSettings:
    """A ``quantization_config``, of whichever tool.

    Raises:
        QuantizationError: another method, or a layout that is not read here.
    """
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method") or ""))
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    words = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if method != QUANT_METHOD or layout not in CHECKPOINT_FORMATS or words != "int32":
        raise QuantizationError(
            f"This checkpoint is {method or 'of no method'}, {layout}, packed in {words}. Read here: gptq, "
            f"{' or '.join(CHECKPOINT_FORMATS)}, packed in int32. Convert it with the tool that made it."
        )
    return GPTQSettings(
        bits=int(config["bits"]),
        group_size=int(config.get("group_size", -1)),
        desc_act=bool(config.get("desc_act", False)),
        sym=bool(config.get("sym", True)),
        checkpoint_format=layout,
        damp_percent=float(config.get("damp_percent") or 0.01),
        true_sequential=bool(config.get("true_sequential", True)),
        static_groups=bool(config.get("static_groups", False)),
        lm_head=bool(config.get("lm_head", False)),
        dynamic=dict(config.get("dynamic") or {}),
        modules_in_block_to_quantize=config.get("modules_in_block_to_quantize"),
    )


def settings_of(model: torch.nn.Module, **told: Any) -> GPTQSettings:
    """Settings that describe the packed layers of a model.

    Args:
        model: holds :class:`PackedLinear`.
        **told: fields of :class:`GPTQSettings` that layers do not tell.
    """
    sites = _all_sites(model)
    packed = {site.name: _packed(site.module) for site in sites if site.kind == "packed"}
    if not packed:
        raise QuantizationError(f"{type(model).__name__} holds no packed linear; apply gptq first.")
    prefixes = tuple(f"{block}." for block in layer_names(model))
    dense = [site.name for site in sites if site.kind != "packed" and site.name.startswith(prefixes)]
    (bits, group_size), _ = Counter((p.bits, p.group_size) for p in packed.values()).most_common(1)[0]
    dynamic: dict[str, dict[str, Any]] = {f"-:{text}": {} for text in _expressions(dense, packed)}
    for other in dict.fromkeys((p.bits, p.group_size) for p in packed.values()):
        if other != (bits, group_size):
            chosen = [name for name, p in packed.items() if (p.bits, p.group_size) == other]
            rest = [name for name in (*packed, *dense) if name not in chosen]
            setting = {"bits": other[0], "group_size": other[1]}
            dynamic |= {f"+:{text}": setting for text in _expressions(chosen, rest)}
    v1 = all(fits_v1(p.qzeros, p.bits) for p in packed.values())
    return GPTQSettings(
        bits=bits,
        group_size=group_size,
        checkpoint_format="gptq" if v1 else "gptq_v2",
        lm_head=any(site.role == "head" for site in sites if site.kind == "packed"),
        dynamic=dynamic,
        modules_in_block_to_quantize=[_names_in_blocks(model, packed)] if dense else None,
        **told,
    )


def checkpoint_state(state: Mapping[str, torch.Tensor], checkpoint_format: str) -> dict[str, torch.Tensor]:
    """A state dict as it is written: zeros in the version of the format, packed layers that are tied only once.

    Raises:
        QuantizationError: a zero of 0 under v1.
    """
    out: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, torch.Size], str] = {}
    dropped: set[str] = set()
    for key, tensor in state.items():
        owner, _, leaf = key.rpartition(".")
        is_weight = leaf == "qweight" and not tensor.is_meta
        if is_weight and seen.setdefault((tensor.data_ptr(), tensor.shape), owner) != owner:
            dropped.add(owner)
    for key, tensor in state.items():
        owner, _, leaf = key.rpartition(".")
        if owner in dropped and f"{owner}.qweight" in state:
            continue
        if leaf == "qzeros" and checkpoint_format == "gptq" and f"{owner}.qweight" in state:
            bits = _bits(state[f"{owner}.qweight"].shape, tensor.shape, f"{owner}.qweight")
            try:
                tensor = to_v1(tensor, bits)
            except QuantizationError as error:
                raise QuantizationError(f"{owner}: {error}") from error
        out[key] = tensor
    return out


class Header(NamedTuple):
    """What a file says of a tensor without reading it."""

    shape: torch.Size
    dtype: torch.dtype


def read_headers(files: Iterable[str | Path]) -> dict[str, Header]:
    """Names, shapes and dtypes of the tensors in checkpoint files (safetensors, or torch's own)."""
    out: dict[str, Header] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118, it is no mapping
                    part = opened.get_slice(key)
                    dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
                    out[key] = Header(torch.Size(part.get_shape()), dtype)
        else:
            loaded = torch.load(file, map_location="meta", weights_only=True)
            out |= {key: Header(tensor.shape, tensor.dtype) for key, tensor in loaded.items()}
    return out


def packed_parts(headers: Mapping[str, Header]) -> dict[str, dict[str, Header]]:
    """By module, the tensors of every packed linear in a checkpoint, under their names in it.

    Raises:
        QuantizationError: none is there, or a part of one is missing.
    """
    found: dict[str, dict[str, Header]] = {}
    for key in headers:
        owner, _, leaf = key.rpartition(".")
        if leaf == "qweight":
            found[owner] = {
                name: headers[f"{owner}.{name}"]
                for name in (*_BUFFERS, "g_idx", "bias")
                if f"{owner}.{name}" in headers
            }
    if not found:
        raise QuantizationError(
            "The config says that linears are packed (gptq), and the files hold none (no key ends in .qweight). It was "
            "saved from a model that is not quantised, or by another tool; take quantization_config out of config.json."
        )
    for owner, parts in found.items():
        missing = [name for name in _BUFFERS if name not in parts]
        if missing:
            raise QuantizationError(f"The checkpoint has {owner}.qweight and no {', '.join(missing)}: a part is lost.")
    return found


def put_packed(model: torch.nn.Module, name: str, parts: Mapping[str, Header], settings: GPTQSettings) -> PackedLinear:
    """An empty packed linear, on the meta device, in the place of a linear of a model that is being loaded.

    Raises:
        QuantizationError: the model has no such linear, or one of another size.
    """
    holder, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(holder)
        linear: Any = parent.get_submodule(attribute)
    except AttributeError as error:
        raise QuantizationError(
            f"The checkpoint has a packed {name}, and {type(model).__name__} no such layer ({error}). If these are "
            "experts, this version of the host library holds them as one tensor, in which packed layers have no place."
        ) from error
    stored = parts["qweight"].shape
    rows, out = stored
    if not is_linear(linear):
        raise QuantizationError(f"The checkpoint has a packed {name}; here it is a {type(linear).__name__}, no linear.")
    sizes = (int(linear.nf), int(linear.nx)) if hasattr(linear, "nf") else (linear.out_features, linear.in_features)
    bits = rows * 32 / sizes[1]
    if out != sizes[0] or bits not in PACKED_BITS:
        raise QuantizationError(
            f"{name} maps {sizes[1]} features to {sizes[0]}; its qweight in the checkpoint is "
            f"{list(stored)}, which is no packed form of that at {', '.join(map(str, PACKED_BITS))} bits."
        )
    groups = parts["scales"].shape[0]
    group_size = settings.group_size if settings.group_size > 0 else sizes[1]
    if -(-sizes[1] // group_size) != groups:  # settings of its own
        group_size = -(-sizes[1] // groups)
    packed = PackedLinear(
        sizes[1],
        sizes[0],
        int(bits),
        -1 if groups == 1 else group_size,
        "bias" in parts,
        parts["scales"].dtype,
        "meta",
    )
    if "bias" in parts:
        packed.bias = torch.empty(sizes[0], dtype=parts["bias"].dtype, device="meta")
    if "g_idx" not in parts:  # out of the state dict while loading: nothing misses it
        packed.register_buffer("g_idx", _neighbours(packed, "cpu"), persistent=False)
    for leaf, part in parts.items():
        if getattr(packed, leaf).shape != part.shape:
            raise QuantizationError(
                f"{name}.{leaf} should be {list(getattr(packed, leaf).shape)} at {int(bits)} bits in groups of "
                f"{group_size}; the checkpoint has {list(part.shape)}."
            )
    packed.train(linear.training)
    setattr(parent, attribute, packed)
    return packed


def check_complete(model: torch.nn.Module, keys: Iterable[str], tied: Mapping[str, str]) -> None:
    """Refuse a checkpoint that leaves a linear of a block random.

    Args:
        model: with packed linears in their places, before loading.
        keys: what the checkpoint has, in the model's names.
        tied: parameters of the model that are one, by name.
    """
    known = set(keys)
    known |= {a for a, b in tied.items() if b in known} | {b for a, b in tied.items() if a in known}
    lost = [site.name for site in find_linears(model) if site.kind != "packed" and f"{site.name}.weight" not in known]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise QuantizationError(
            f"The checkpoint has neither packed nor dense weights of {', '.join(lost[:5])}{more}: they would be "
            "random. It belongs to another model, or a part of it is lost."
        )


def finish(layers: Mapping[str, PackedLinear], had_groups: Mapping[str, bool], checkpoint_format: str) -> None:
    """Bring loaded layers into the form that is computed with: true zeros, and groups where the file has none.

    Args:
        layers: by name.
        had_groups: whether the file had ``g_idx`` for them.
        checkpoint_format: of the file.

    Raises:
        QuantizationError: a layer that was not loaded, or has numbers that are none.
    """
    for name, layer in layers.items():
        if any(buffer.is_meta for buffer in layer.buffers()) or not bool(layer.scales.isfinite().all()):
            raise QuantizationError(f"{name}: its scales are not finite or were not loaded; the checkpoint is damaged.")
        if not had_groups[name]:  # transformers fills what it does not load with whatever is there
            layer.register_buffer("g_idx", _neighbours(layer, layer.scales.device))
        if checkpoint_format == "gptq":
            layer.qzeros = from_v1(layer.qzeros, layer.bits)


def dequantize(model: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Dense linears in the places of all packed ones, with the weights that those compute with.

    Args:
        dtype: of the weights; None: that of the scales.
    """
    for site in find_linears(model, ".*"):
        if site.kind == "packed":
            dense = dense_linear(_packed(site.module), dtype)
            for place in (site, *site.tied):
                setattr(place.parent, place.attribute, dense if place is site else copy.copy(dense))


def dense_linear(packed: PackedLinear, dtype: torch.dtype | None = None) -> torch.nn.Linear:
    """The same layer with a dense weight that wants no gradient."""
    weight = packed.dequantize_weight(dtype)
    linear = torch.nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, "meta", weight.dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if packed.bias is not None:
        linear.bias = torch.nn.Parameter(packed.bias.to(weight.dtype), requires_grad=False)
    return linear.train(packed.training)


def _neighbours(layer: PackedLinear, device: torch.device | str) -> torch.Tensor:
    """``g_idx`` of groups that are neighbours."""
    size = layer.group_size if layer.group_size > 0 else layer.in_features
    return torch.arange(layer.in_features, dtype=torch.int32, device=device) // size


def _packed(module: torch.nn.Module) -> PackedLinear:
    if not isinstance(module, PackedLinear):
        raise QuantizationError(f"Expected a PackedLinear, got a {type(module).__name__}.")
    return module


def _all_sites(model: torch.nn.Module) -> list[LinearSite]:
    """Every linear, each place of a tied one for itself."""
    return [place for site in find_linears(model, ".*") for place in (site, *site.tied)]


def _bits(qweight: torch.Size, qzeros: torch.Size, name: str) -> int:
    bits = qzeros[1] * 32 / qweight[1]
    if bits not in PACKED_BITS:
        raise QuantizationError(f"{name}: {list(qweight)} words and {list(qzeros)} zeros are no packed layer.")
    return int(bits)


def _expressions(chosen: Iterable[str], rest: Iterable[str]) -> list[str]:
    """Regular expressions for whole names that fit all of ``chosen`` and none of ``rest``; blocks in one where all of
    them are alike."""
    others = list(rest)
    out: dict[str, None] = {}
    for name in chosen:
        for text in (re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)), re.escape(name)):
            if not any(re.fullmatch(text, other) for other in others):
                out[f"^{text}$"] = None
                break
    return list(out)


def _names_in_blocks(model: torch.nn.Module, packed: Iterable[str]) -> list[str]:
    """Names of packed linears inside a block, each once."""
    prefixes = tuple(f"{name}." for name, _ in layer_list(model))
    found: dict[str, None] = {}
    for name in packed:
        for prefix in prefixes:
            if name.startswith(prefix):
                found[name.removeprefix(prefix).partition(".")[2]] = None
    return list(found)
