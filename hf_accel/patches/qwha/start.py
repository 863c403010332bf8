"""QWHA on a model: every layer's full weight, quantised weight and inputs brought together, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.errors import NotApplicable, QuantizationError, WeightsMismatch
from hf_accel.hosts.target import unwrap
from hf_accel.kernels.hadamard import hadamard
from hf_accel.ledger import AttributeChange, Ledger, changes_on
from hf_accel.patches.qwha.correction import DAMPING, sparse_correction, spectral_gram
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.linear.places import LinearSite, find_linears
from hf_accel.sites.linear.samples import calibration_from
from hf_accel.sites.linear.stream import LayerStream

if TYPE_CHECKING:
    from hf_accel.sites.adapter.peft import QWHAConfig as AdapterConfig
    from hf_accel.sites.adapter.peft import QWHALinear


@dataclass(frozen=True)
class LayerStart:
    """How one layer begins.

    Attributes:
        name: of the layer.
        coefficients: p.
        quantised: error of the output without the adapter, relative to the full layer's, in the Frobenius norm over
            the calibration tokens.
        repaired: with it.
        tokens: that reached the layer; 0: the weights' own error was made small instead.
        unsolved: outputs without a least-squares solution.
    """

    name: str
    coefficients: int
    quantised: float
    repaired: float
    tokens: int
    unsolved: int = 0


def initialize_qwha(
    model: torch.nn.Module,
    calibration: Any,
    reference: Any = None,
    *,
    tokenizer: Any = None,
    adapter_name: str = "default",
    samples: int = 128,
    sequence_length: int | None = None,
    refine: bool = True,
    damping: float = DAMPING,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[LayerStart]:
    """Choose places and values of a QWHA adapter so that it repairs what quantisation did to its base.

    Needs, for every layer, the full weight, the quantised one and the layer's calibration inputs in the full model.
    What the adapter held is overwritten. ``selection``, ``allocation`` and ``temperature`` are those of its config.

    Args:
        model: a ``PeftModel`` with a QWHA adapter, or a model with an injected one.
        calibration: texts, token ids, forwards, or a function that runs the model; see
            ``hosts.calibration.calibration_from``. Not the texts on which you will measure.
        reference: the full model, or the folder or Hub id it came from. None: the full weights that
            ``apply(model, "gptq", original="keep")`` left on the model.
        tokenizer: for texts.
        adapter_name: of the adapter.
        samples: sequences at most.
        sequence_length: tokens of each at most.
        refine: least squares after selection.
        damping: of the Gram matrices, as a share of the mean diagonal.
        device: where to compute; None: where the reference is.
        seed: of the draw of sequences.
        progress: a bar, if tqdm is installed.

    Returns:
        One entry per layer.

    Raises:
        NotApplicable: no such adapter on the model, no full weights, or a base that cannot be dequantised.
        WeightsMismatch: the reference has other layers.
        InvalidSetting: nothing to calibrate on.
    """
    from hf_accel.sites.adapter.peft import QWHALinear

    inner = unwrap(model)
    layers = {
        plain(name): module
        for name, module in inner.named_modules()
        if isinstance(module, QWHALinear) and adapter_name in module.qwha_values
    }
    if not layers:
        raise NotApplicable(
            f"{type(inner).__name__} has no QWHA adapter {adapter_name!r} to initialise. Add one: "
            "peft.get_peft_model(model, hf_accel.QWHAConfig(...))."
        )
    if any(layer.merged for layer in layers.values()):
        raise NotApplicable("Adapters are merged into the base. Take them out first: model.unmerge_adapter().")
    settings: AdapterConfig = inner.peft_config[adapter_name]  # type: ignore[assignment, index]
    options = {
        "allocation": settings.allocation, "selection": settings.selection, "temperature": settings.temperature,
        "refine": refine, "damping": damping,
    }  # fmt: skip
    with _full_model(inner, reference, layers, device) as (full, place):
        found = calibration_from(
            calibration, full, tokenizer, owner="qwha", samples=samples, sequence_length=sequence_length, seed=seed
        )
        sites = [site for site in find_linears(full, list(layers)) if site.name in layers]
        _check_sites(layers, sites, full)
        stream = LayerStream(
            full, found.samples, sites, device=place, gram_dtype=torch.float64, progress=progress, title="qwha"
        )
        starts = dict(_starts(stream, layers, adapter_name, options))
    return [starts[name] for name in layers]


def _starts(
    stream: LayerStream, layers: Mapping[str, QWHALinear], adapter_name: str, options: Mapping[str, Any]
) -> Iterator[tuple[str, LayerStart]]:
    with stream:
        for unit in stream:
            for stage in unit.stages():
                for gathered in stage:
                    gram, spectra = gathered.gram, {}
                    for site in gathered.sites:
                        layer = layers[site.name]
                        if layer.block not in spectra:
                            moments = gram.matrix() if gram.tokens else torch.eye(gram.features, dtype=torch.float64)
                            spectra[layer.block] = spectral_gram(moments, layer.block)
                        start = _start(site, layer, adapter_name, spectra[layer.block], gram.tokens, options)
                        yield site.name, start


@torch.no_grad()
def _start(
    site: LinearSite,
    layer: QWHALinear,
    adapter_name: str,
    gram: torch.Tensor,
    tokens: int,
    options: Mapping[str, Any],
) -> LayerStart:
    from hf_accel.sites.adapter.peft.qwha.coefficients import from_places

    held = layer.qwha_values[adapter_name]
    full = site.weight.to(gram)
    error = full - layer.dense_base_weight().to(gram)
    try:
        found = sparse_correction(error, gram, len(held), layer.block, **options)
    except QuantizationError as problem:
        raise QuantizationError(f"{site.name}: {problem}") from problem
    rows, columns = found.kept.nonzero(as_tuple=True)
    coefficients = from_places(rows, columns, found.values, *error.shape)
    layer.set_coefficients(adapter_name, coefficients)
    spectrum = hadamard(full, blocks=layer.block)
    size = max(float(((spectrum @ gram) * spectrum).sum()), 1e-300)
    quantised, repaired = ((part / size) ** 0.5 for part in (found.before, found.after))
    return LayerStart(site.name, len(held), quantised, repaired, tokens, found.unsolved)


def _check_sites(layers: Mapping[str, QWHALinear], sites: list[LinearSite], full: torch.nn.Module) -> None:
    sizes = {site.name: (site.out_features, site.in_features, site.kind) for site in sites}
    for name, layer in layers.items():
        expected = (layer.out_features, layer.in_features)
        if name not in sizes or sizes[name][:2] != expected:
            found = f"is {list(sizes[name][:2])}" if name in sizes else "has no linear there that can be read"
            raise WeightsMismatch(
                f"qwha: {name} is {list(expected)}, but the reference, a {type(full).__name__}, {found}. Give the full "
                "model that was quantised, or its folder."
            )
        if sizes[name][2] == "packed":
            raise NotApplicable(f"qwha: the reference is quantised too: {name} is packed. Give the full model.")


@contextmanager
def _full_model(
    inner: torch.nn.Module, reference: Any, layers: Mapping[str, QWHALinear], device: Any
) -> Iterator[tuple[torch.nn.Module, Any]]:
    """The model with full weights, and where to compute: the one given, one that is loaded, or ``inner`` itself, with
    the linears that gptq kept put back for the while."""
    if isinstance(reference, torch.nn.Module):
        yield unwrap(reference), device
    elif reference is not None:
        if not hasattr(type(inner), "from_pretrained"):
            raise NotApplicable(
                f"qwha: {type(inner).__name__} cannot be loaded from {reference!r}: it has no from_pretrained. Give "
                "the full model itself as reference."
            )
        yield type(inner).from_pretrained(reference).eval(), device  # type: ignore[attr-defined]
    else:
        replaced = _replaced_by_gptq(inner)
        kept = {id(change.new): change.old for change in replaced}
        lost = [name for name, layer in layers.items() if not _has_weight(kept.get(id(layer.get_base_layer())))]
        if lost:
            raise NotApplicable(
                f"qwha: no full weights for {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}. Give "
                "reference=the full model or the folder or Hub id it came from, or quantise with "
                'hf_accel.apply(model, "gptq", original="keep").'
            )
        here = next(iter(layers.values())).qwha_values.values()
        place = next(iter(here)).device
        away = any(change.old.weight.device != place for change in replaced)
        put_back = Ledger()
        try:
            for change in replaced:
                put_back.set(change.target, change.name, change.old)
            yield inner, place if away and device is None else device
        finally:
            put_back.undo()


def _replaced_by_gptq(inner: torch.nn.Module) -> list[AttributeChange]:
    """The linears that gptq put packed ones in the place of, everywhere in the model."""
    return [
        change
        for change in changes_on(inner)
        if isinstance(change, AttributeChange) and isinstance(change.new, PackedLinear) and _has_weight(change.old)
    ]


def _has_weight(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and not weight.is_meta and not isinstance(module, PackedLinear)


def plain(name: str) -> str:
    """As users and checkpoints call a layer, without the wrappers of peft and ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))
