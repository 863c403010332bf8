"""A linear layer whose weight is packed codes, in the buffers of the GPTQ checkpoint layout.

``weight[o, i] = scales[g, o] * (code[o, i] - zero[g, o])`` with ``g = g_idx[i]``. Names, shapes and packing of the
buffers are those that AutoGPTQ's successors read and write, in the version that holds true zeros (``gptq_v2``).
:mod:`hf_accel.quant.packing` converts the zeros of the older one.

What the layout allows, and what it does not: the numbers of inputs and of outputs must be multiples of 32, because
inputs are packed in runs of 32 in ``qweight`` and outputs in ``qzeros``; other sizes are refused and stay dense.
Padding would be no help, because readers elsewhere take the sizes from the model. The last group may be smaller than
the others, and the inputs of a group need not lie together: ``g_idx`` says to which group an input belongs.

Such scattered groups (act-order without static groups) are computed as they are stored. On a GPU that costs few tokens
a scale and a zero per weight instead of per group: at 4 bits 0.5 bytes from memory, and 2 to 6 from the cache. With the
inputs sorted by group only x would be gathered, 2 bytes per input and token against ``bits / 8`` per weight: a
thousandth at 4,096 outputs. But ``qweight`` can be sorted only in the place of the stored one, or held twice, which
gives up the memory that packing is for. Sorted in place, these buffers would not be the checkpoint any more for anybody
who goes by their names: loaders and offloading that set one buffer after another (accelerate, at every forward),
adapters that add to the weight in the order of the inputs, and a state dict would make every weight of the model anew.
``static_groups`` keeps act-order's gain and its groups together; it is the default there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_accel.errors import InvalidSetting, NotApplicable, QuantizationError
from hf_accel.kernels.quantized_linear import dequantize_packed, quantized_linear
from hf_accel.quant.grid import Grid, group_index
from hf_accel.quant.packing import CODES_PER_RUN, PACKED_BITS, pack_codes, pack_zeros, unpack_codes, unpack_zeros


def why_not_packable(in_features: int, out_features: int) -> str | None:
    """Why a linear of this size has no place in the layout, or None."""
    wrong = [
        f"{size} {name}"
        for name, size in (("inputs", in_features), ("outputs", out_features))
        if size < 1 or size % CODES_PER_RUN
    ]
    return f"{' and '.join(wrong)}: the layout packs runs of {CODES_PER_RUN}" if wrong else None


class PackedLinear(nn.Module):
    """``y = x W^T + bias`` with ``W`` in 2, 3, 4 or 8 bits. Nothing in it is trained; a gradient flows to ``x``.

    A new one holds NaN scales until codes or a state dict are put in: what was never loaded shows.

    Attributes:
        qweight: int32 ``[in * bits / 32, out]``.
        qzeros: int32 ``[groups, out * bits / 32]``, true zeros.
        scales: ``[groups, out]``; fp16 in most checkpoints. Moves of dtype round them, and never touch the words.
        g_idx: int32 ``[in]``: the group of every input.
        bias: ``[out]`` or None.
        group_size: inputs of a group; -1 is the whole row.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = -1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        groups = _groups(in_features, out_features, bits, group_size)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        dtype = dtype or torch.float16
        empty = torch.zeros(0, dtype=torch.int32, device=device)
        self.register_buffer("qweight", empty.new_zeros(in_features * bits // 32, out_features))
        self.register_buffer("qzeros", empty.new_zeros(groups, out_features * bits // 32))
        self.register_buffer("scales", torch.full((groups, out_features), math.nan, dtype=dtype, device=device))
        self.register_buffer("g_idx", group_index(in_features, group_size, device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self._inspected: torch.Tensor | None = None
        self._inspected_version, self._neighbours = -1, False

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> PackedLinear:
        """One to load a state dict into."""
        return cls(in_features, out_features, bits, group_size, bias, dtype, device)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        g_idx: torch.Tensor | None,
        bits: int,
        group_size: int,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> PackedLinear:
        """Pack what a quantiser found, on the codes' device.

        Args:
            codes: uint8 ``[out, in]``.
            scale: ``[out, groups]``. Rounded to ``dtype``: make codes with a scale that already is
                (``fit_grid(scale_dtype=)``), and the module is exactly what was measured.
            zero: ``[out, groups]``, whole numbers in ``0 .. 2**bits - 1``.
            g_idx: integers ``[in]``; None: neighbours, ``group_size`` together.
            group_size: -1 is the whole row.
            bias: ``[out]``.

        Raises:
            QuantizationError: sizes that the layout has no place for, or parts that do not fit together.
        """
        if codes.dim() != 2:
            raise QuantizationError(f"PackedLinear: codes must be [out, in]; got {list(codes.shape)}.")
        out, inputs = codes.shape
        packed = cls(inputs, out, bits, group_size, bias is not None, dtype, codes.device)
        groups = packed.scales.shape[0]
        for name, tensor in (("scale", scale), ("zero", zero)):
            if tuple(tensor.shape) != (out, groups):
                raise QuantizationError(
                    f"PackedLinear: {name} must be [out={out}, groups={groups}] for {inputs} inputs in groups of "
                    f"{group_size}; got {list(tensor.shape)}."
                )
        stored = scale.detach().t().to(dtype)
        if not bool((torch.isfinite(stored) & (stored > 0)).all()):
            raise QuantizationError(
                f"PackedLinear: scales from {float(scale.min()):.3g} to {float(scale.max()):.3g} are not all positive "
                f"and finite in {dtype}. Fit the grid with scale_dtype={dtype}, or store torch.float32."
            )
        whole = zero.detach().t().round()
        if not bool(((whole == zero.t()) & (whole >= 0) & (whole < 1 << bits)).all()):
            raise QuantizationError(f"PackedLinear: zeros must be whole numbers in 0..{(1 << bits) - 1}.")
        packed.qweight.copy_(pack_codes(codes.t(), bits))
        packed.qzeros.copy_(pack_zeros(whole.to(torch.uint8), bits))
        packed.scales.copy_(stored)
        if g_idx is not None:
            if tuple(g_idx.shape) != (inputs,) or not bool(((g_idx >= 0) & (g_idx < groups)).all()):
                raise QuantizationError(f"PackedLinear: g_idx must be [{inputs}] with values in 0..{groups - 1}.")
            packed.g_idx.copy_(g_idx)
        if bias is not None:
            if packed.bias is None or bias.shape != packed.bias.shape:
                raise QuantizationError(f"PackedLinear: bias must be [{out}]; got {list(bias.shape)}.")
            packed.bias.copy_(bias.detach())
        return packed

    @property
    def weight(self) -> torch.Tensor:
        """Tells shape, dtype and device of the weight to those who ask a linear for them (T5's feed-forward, peft); its
        numbers are NaN and it takes no memory. The weight is :meth:`dequantize_weight`."""
        told = self.scales.new_full((1, 1), math.nan).expand(self.out_features, self.in_features)
        told._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers: not to be filled at loading
        return told

    @weight.setter
    def weight(self, told: torch.Tensor) -> None:
        """peft gives a layer its own weight back when it takes an adapter off. Nothing else can be put here.

        Raises:
            NotApplicable: a weight with numbers.
        """
        if told.shape != self.weight.shape or any(told.stride()):
            raise NotApplicable(
                f"A packed linear holds codes; a weight {list(told.shape)} cannot be put into it. Make a dense linear "
                "of it (dequantize_weight), or pack the weight anew (PackedLinear.from_codes)."
            )

    @property
    def infeatures(self) -> int:
        """``in_features`` by AutoGPTQ's name, which is how peft asks packed layers."""
        return self.in_features

    @property
    def outfeatures(self) -> int:
        """``out_features``, likewise."""
        return self.out_features

    def codes(self) -> torch.Tensor:
        """uint8 ``[out, in]``."""
        return unpack_codes(self.qweight, self.bits, self.in_features).t()

    def grid(self) -> Grid:
        """Scale and zero ``[out, groups]``, in the scales' dtype."""
        zero = unpack_zeros(self.qzeros, self.bits, self.out_features)
        return Grid(self.scales.t(), zero.t().to(self.scales.dtype))

    def dequantize_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight ``[out, in]``, in ``dtype`` or that of the scales."""
        parts = self.qweight, self._kernel_scales(), self.qzeros, self.g_idx, self.bits
        return dequantize_packed(*parts, dtype or self.scales.dtype, group_size=self.run_length())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` -> ``[..., out]`` in x's dtype; under autocast in autocast's, as a dense linear."""
        where = x.device.type
        if torch.amp.is_autocast_available(where) and torch.is_autocast_enabled(where) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(where))
        parts = self.qweight, self._kernel_scales(), self.qzeros, self.g_idx, self.bits
        return quantized_linear(x, *parts, self.bias, group_size=self.run_length())

    def run_length(self) -> int | None:
        """How many neighbouring inputs make a group, or None if ``g_idx`` says otherwise: what kernels may rely on.

        Looked up once for every ``g_idx`` that this module comes to hold, because on a GPU it waits for the device. A
        compiled graph has what was true when it was traced, and is traced anew for another ``g_idx``; numbers written
        into the same one it notices once a call without compilation, or ``load_state_dict``, has.
        """
        # An exporter that traces with tensors without values gets what is known by then.
        if torch.compiler.is_dynamo_compiling() or not torch.compiler.is_compiling():
            self._inspect()
            if self._inspected is not self.g_idx:  # never at this point, which is what a compiled graph checks
                return None
        if not self._neighbours:
            return None
        return self.in_features if self.group_size == -1 else self.group_size

    def _inspect(self) -> None:
        """Look at ``g_idx`` if it is another one than last time; while a graph is traced, at the real one."""
        version = -1 if self.g_idx.is_inference() else self.g_idx._version
        if self._inspected is not self.g_idx or self._inspected_version != version:
            expected = group_index(self.in_features, self.group_size, self.g_idx.device)
            self._neighbours = self.g_idx.is_meta or torch.equal(self.g_idx, expected)
            self._inspected, self._inspected_version = self.g_idx, version

    # All that torch.compiler.assume_constant_result does; the decorator itself loads dynamo, two seconds that whoever
    # compiles nothing need not wait.
    _inspect._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _kernel_scales(self) -> torch.Tensor:
        """Kernels take no fp64 scales, which a module that was moved to fp64 holds; they came from fewer bits."""
        return self.scales.float() if self.scales.dtype == torch.float64 else self.scales

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._inspected, self._neighbours = None, False

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """``.to(dtype)`` leaves integers alone by itself; ``.type(dtype)`` and others that convert whatever there is
        would read words as numbers. Of those only the change of device is kept."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype or tensor.is_floating_point() else tensor.to(new.device)

        return super()._apply(moved, recurse)


def _groups(in_features: int, out_features: int, bits: int, group_size: int) -> int:
    if bits not in PACKED_BITS:
        raise InvalidSetting("PackedLinear", "bits", bits, f"one of {', '.join(map(str, PACKED_BITS))}")
    if group_size != -1 and group_size < 1:
        raise InvalidSetting("PackedLinear", "group_size", group_size, "positive, or -1 for the whole row")
    why = why_not_packable(in_features, out_features)
    if why:
        raise QuantizationError(
            f"PackedLinear: {why}. Leave this layer dense, or pad its weight and its inputs and cut its outputs."
        )
    return 1 if group_size == -1 else -(-in_features // group_size)
