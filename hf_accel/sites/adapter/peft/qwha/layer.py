"""A linear layer with QWHA adapters: peft's wrapper around it."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr
from torch import nn

from hf_accel.errors import NotApplicable, WeightsMismatch
from hf_accel.hosts.target import is_a
from hf_accel.kernels.quantized_linear import Packed
from hf_accel.kernels.qwha_weight import qwha_activation, qwha_weight
from hf_accel.quant.packed_linear import PackedLinear
from hf_accel.sites.adapter.peft.backends import ALTERNATIVES, backend_of, packed_parts
from hf_accel.sites.adapter.peft.qwha.batches import check_names
from hf_accel.sites.adapter.peft.qwha.coefficients import Coefficients, check_positions, combine, spread
from hf_accel.sites.adapter.peft.qwha.config import QWHAConfig
from hf_accel.sites.adapter.peft.qwha.linear import updated_linear

# What a gathered multiplication costs in terms of one in a transform; see :meth:`QWHALinear.side`.
_GATHER = 8

# What an adapter's file has of every layer.
PARTS = ("qwha_values", "qwha_indptr", "qwha_columns", "qwha_factor")


class QWHALinear(nn.Module, BaseTunerLayer):
    """A linear with adapters ``dW = factor * F H / block``, several of which sum.

    Of an adapter there are, by its name: ``qwha_values``, the trained coefficients ``[p]``; ``qwha_indptr`` and
    ``qwha_columns``, their places by rows; and ``qwha_factor``, the bits of a float32 kept as int32, so that no change
    of the model's dtype rounds it. All are in the adapter's file: chosen positions cannot be had from a seed.

    Attributes:
        base_layer: the linear, or another tuner's wrapper of it.
        block: length of the transform: n, or of the blocks of a block-diagonal one.
        offered: by adapter, the parts that the file now being loaded has.
    """

    adapter_layer_names = ("qwha_values",)
    other_param_names = ("qwha_indptr", "qwha_columns", "qwha_factor", "qwha_path")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: QWHAConfig, layer_name: str, **options: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        base: Any = self.get_base_layer()
        self.quantization_backend = backend_of(base, **options)
        self.in_features, self.out_features = _sizes(base)
        self.block = config.block(layer_name, self.in_features)
        self.qwha_values = nn.ParameterDict()
        self.qwha_indptr = BufferDict(persistent=True)
        self.qwha_columns = BufferDict(persistent=True)
        self.qwha_factor = BufferDict(persistent=True)
        self.qwha_path: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unchecked: set[str] = set()
        self.offered: dict[str, set[str]] = {}
        self._active_adapter = adapter_name
        self.layer_name = layer_name
        self.update_layer(adapter_name, config)

    # -- adapters ------------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's. peft tells packed words where there are some, and T5 casts activations to this dtype."""
        base: Any = self.get_base_layer()
        return base.weight if hasattr(base, "weight") else base.qweight

    def update_layer(self, adapter_name: str, config: QWHAConfig) -> None:
        """Add an adapter, or put a new one in its place.

        Places come from the configuration's ``seed`` and the layer's name, random values (``init_weights=False``) from
        torch's global generator, as those of peft's other tuners do.

        Raises:
            InvalidSetting: the layer has fewer weights than the adapter would have coefficients, or no whole transform
                where the configuration asks for one.
        """
        m, n = self.out_features, self.in_features
        count = config.coefficients(self.layer_name, m, n)
        config.block(self.layer_name, n)
        generator = torch.Generator().manual_seed(config.seed + zlib.crc32(self.layer_name.encode()))
        indptr, columns = spread(m, n, count, generator)
        values = torch.zeros(count) if config.init_weights else torch.randn(count)
        self.qwha_values[adapter_name] = nn.Parameter(values)
        self.qwha_indptr[adapter_name] = indptr
        self.qwha_columns[adapter_name] = columns
        self.qwha_factor[adapter_name] = factor_bits(config.factor(m, self.block))
        self.qwha_path[adapter_name] = config.path
        self._unchecked.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factor(self, adapter_name: str) -> torch.Tensor:
        """What multiplies ``F H / block``: fp32, one element."""
        return self.qwha_factor[adapter_name].view(torch.float32)

    def set_coefficients(self, adapter_name: str, coefficients: Coefficients) -> None:
        """Put an F with ``dW = F H / block`` in the place of an adapter's, divided by its factor.

        Args:
            coefficients: as many as the adapter has, values in any float dtype.

        Raises:
            WeightsMismatch: another number, or places that are none of this layer's.
        """
        indptr, columns, values = coefficients
        held = self.qwha_values[adapter_name]
        if values.shape != held.shape:
            raise WeightsMismatch(
                f"{self.layer_name}: adapter {adapter_name!r} has {len(held)} coefficients, {len(values)} were given."
            )
        check_positions(self.layer_name, indptr, columns, self.out_features, self.in_features)
        with torch.no_grad():
            self.qwha_indptr[adapter_name].copy_(indptr)
            self.qwha_columns[adapter_name].copy_(columns)
            held.copy_(values / self.factor(adapter_name).to(values))

    def coefficients(self, adapter_names: Sequence[str], sign: float = 1.0) -> Coefficients:
        """The sum of adapters as one F with ``dW = F H / block``, factors in the values. Differentiable."""
        parts = []
        for name in adapter_names:
            values = self.qwha_values[name]
            scaled = values.to(torch.promote_types(values.dtype, torch.float32)) * (sign * self.factor(name))
            parts.append(Coefficients(self.qwha_indptr[name], self.qwha_columns[name], scaled))
        return combine(parts)

    def dense_base_weight(self) -> torch.Tensor:
        """The base's weight as ``[out, in]``, dequantised where it is packed.

        Raises:
            NotApplicable: a base of a library that does not dequantise.
        """
        base: Any = self.get_base_layer()
        if isinstance(base, PackedLinear):
            return base.dequantize_weight(torch.float32)
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise NotApplicable(f"{self.layer_name}: {backend.backend_name} layers do not show their weight.")
        weight = self.get_base_weight()
        return weight.T if _is_conv1d(base) else weight

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """dW of one adapter, ``[out, in]``, in fp32 (fp64 for fp64 values)."""
        return qwha_weight(None, *self.coefficients([adapter]), 1.0, in_features=self.in_features, blocks=self.block)

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output with the active adapters, ``[..., n]`` -> ``[..., m]``.

        Args:
            x: in any float dtype.
            args, kwargs: for the base. ``adapter_names``, one per sample, chooses the adapter of each ("__base__":
                none) in place of the active ones; :class:`QWHAModel` hands it to every layer.

        Raises:
            ValueError: ``adapter_names`` of another number than there are samples, or while adapters are merged.
        """
        mixed = kwargs.pop("adapter_names", None)
        if mixed is not None:
            check_names(mixed, x, self.merged)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in mixed or self.active_adapters if name in self.qwha_values]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self._unchecked and not torch.compiler.is_compiling():
            self._check_positions()
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        whole = self._own_weight() if mixed is None and not args and not kwargs else None
        if whole is not None and self.side(x, names) == "weight":
            if isinstance(whole, torch.Tensor) and not autocast and whole.dtype != x.dtype:
                dtype = whole.dtype  # the product then says that they do not fit, as without an adapter
            base: Any = self.base_layer
            bias = None if base.bias is None else base.bias.to(dtype)
            x = x.to(dtype) if autocast else x
            return updated_linear(x, self.coefficients(names), self.block, whole, bias, dtype)
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if mixed is None:
            return result + self._update(x, names, dtype).to(result.dtype)
        for name in dict.fromkeys(names):
            places = torch.tensor([i for i, chosen in enumerate(mixed) if chosen == name], device=x.device)
            result = result.index_add(0, places, self._update(x[places], [name], dtype).to(result.dtype))
        return result

    def _update(self, x: torch.Tensor, names: Sequence[str], dtype: torch.dtype) -> torch.Tensor:
        """What adapters add to the output, by the cheaper side."""
        coefficients = self.coefficients(names)
        if self.side(x, names) == "weight":
            return updated_linear(x.to(dtype), coefficients, self.block)
        return qwha_activation(x, *coefficients, 1.0, blocks=self.block)

    def side(self, x: torch.Tensor, adapter_names: Sequence[str]) -> str:
        """Where the update is applied to input ``x``: to the "weight" or to the "activation".

        Beside the product with the base, which both have, the weight's side transforms m rows whatever the number of
        tokens; the other side transforms a row and gathers p values per token.
        """
        path = self.qwha_path[adapter_names[0]]
        if path != "auto":
            return path
        m, n = self.out_features, self.in_features
        count = sum(len(self.qwha_values[name]) for name in adapter_names)
        passes = self.block.bit_length()
        tokens = x.numel() // n
        return "activation" if tokens * (n * passes + _GATHER * count) < m * n * passes else "weight"

    def _own_weight(self) -> torch.Tensor | Packed | None:
        """The base's weight where its product may be computed here in the base's place, None elsewhere: another
        library's layer may multiply otherwise, and whoever hangs hooks on a layer wants it called."""
        base: Any = self.base_layer
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return None
        if "forward" in base.__dict__:
            return None
        if type(base) is PackedLinear:
            return packed_parts(base)
        plain = type(base) is nn.Linear and self.quantization_backend is None
        if plain and type(base.weight.data) is torch.Tensor and base.weight.dtype.is_floating_point:
            return base.weight
        return None

    def _check_positions(self) -> None:
        for name in self._unchecked & set(self.qwha_values):
            owner = f"{self.layer_name}, adapter {name!r}"
            parts = self.qwha_indptr[name], self.qwha_columns[name]
            check_positions(owner, *parts, self.out_features, self.in_features)
        self._unchecked.clear()

    # -- merging -------------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of adapters (None: the active ones) to the weight of the base, rounded once.

        Raises:
            NotApplicable: the base is packed in few bits, or of a library whose weights cannot be written.
            ValueError: ``safe_merge``, and the merged weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.qwha_values]
        if names:
            self._write_base(names, 1.0, safe_merge)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base's weight again, to the rounding of its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names = [name for name in self.merged_adapters if name in self.qwha_values]
        if names:
            self._write_base(names, -1.0)
        self.merged_adapters.clear()

    @torch.no_grad()
    def merged_weight(self, adapter_names: Sequence[str], sign: float = 1.0, dtype: torch.dtype | None = None) -> Any:
        """The base's weight with adapters, ``[out, in]`` in ``dtype`` (None: the base's), rounded once."""
        base: Any = self.get_base_layer()
        coefficients = self.coefficients(adapter_names, sign)
        if isinstance(base, PackedLinear):
            packed = packed_parts(base)
            return qwha_weight(None, *coefficients, 1.0, packed=packed, blocks=self.block, dtype=dtype)
        return qwha_weight(self.dense_base_weight().contiguous(), *coefficients, 1.0, blocks=self.block, dtype=dtype)

    def _write_base(self, names: Sequence[str], sign: float, safe: bool = False) -> None:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise NotApplicable(
                f"{self.layer_name} is packed ({backend.backend_name}); nothing can be merged into it. {ALTERNATIVES}."
            )
        weight = self.merged_weight(names, sign)
        if safe and not bool(torch.isfinite(weight).all()):
            # A sentence of peft's, which tools match.
            broken = [name for name in names if not bool(torch.isfinite(self.get_delta_weight(name)).all())] or names
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(broken)} seems to be broken")
        self.set_base_weight(weight.T.contiguous() if _is_conv1d(self.get_base_layer()) else weight)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Check what is about to be loaded: sizes, and positions, which no later step would miss."""
        for name in self.qwha_values:
            held = {part: getattr(self, part)[name] for part in PARTS}
            keys = {part: f"{prefix}{part}.{name}" for part in held}
            missing = [part for part, key in keys.items() if key not in state_dict]
            dropped = self.offered.pop(name, set()) & set(missing)
            if dropped:
                # ignore_mismatched_sizes=True took some parts out; the others alone would be another adapter.
                for key in keys.values():
                    state_dict.pop(key, None)
            if dropped or len(missing) == len(held):
                continue
            owner = f"{self.layer_name}, adapter {name!r}"
            if missing:
                raise WeightsMismatch(f"{owner}: {', '.join(missing)} missing beside the rest. Save the adapter again.")
            for part, tensor in held.items():
                found = state_dict[keys[part]]
                if found.shape != tensor.shape or (part != "qwha_values" and found.dtype != tensor.dtype):
                    raise WeightsMismatch(
                        f"{owner}: {part} is {found.dtype} {list(found.shape)} in the file, {tensor.dtype} "
                        f"{list(tensor.shape)} here. The adapter was saved with other settings (r, n_coefficients) "
                        "or from another model: load it with its own adapter_config.json, on its own base."
                    )
            positions = state_dict[keys["qwha_indptr"]], state_dict[keys["qwha_columns"]]
            check_positions(owner, *positions, self.out_features, self.in_features)
            self._unchecked.discard(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """peft turns any dense update into a LoRA by its largest singular values; ours has full rank."""
        return not _is_conv1d(self.get_base_layer())

    def __repr__(self) -> str:
        return "qwha." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def factor_bits(factor: float) -> torch.Tensor:
    """int32 ``[1]``: a float32 by its bits."""
    return torch.tensor([factor], dtype=torch.float32).view(torch.int32)


def why_unsupported(base: torch.nn.Module, backend: Any) -> str | None:
    """Why a layer cannot have an adapter, in words; None if it can."""
    if isinstance(base, nn.Linear | PackedLinear) or _is_conv1d(base):
        return None
    if backend is not None:
        return None if backend.layer_type == "linear" else f"it is a quantised {backend.layer_type}"
    if hasattr(base, "qweight") or hasattr(base, "quant_state"):
        return "it is quantised by a library that neither peft nor hf_accel knows"
    return "it is no linear layer"


def _is_conv1d(layer: torch.nn.Module) -> bool:
    return is_a(layer, "transformers.pytorch_utils", "Conv1D")


def _sizes(base: Any) -> tuple[int, int]:
    """(in, out) of a linear of any library."""
    if _is_conv1d(base):
        return int(base.nx), int(base.nf)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if all(hasattr(base, name) for name in names):
            return int(getattr(base, names[0])), int(getattr(base, names[1]))
    raise NotApplicable(f"{type(base).__name__} does not say how many features it takes and gives; no adapter fits it.")


__all__ = ["PARTS", "QWHALinear", "factor_bits", "why_unsupported"]
