"""What a run of a weight quantiser did: layer by layer, and in sum."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_accel.quant.packed_linear import PackedLinear


@dataclass
class LayerRecord:
    """One linear.

    Attributes:
        loss: of GPTQ, see :attr:`~hf_accel.quant.gptq_solver.Solution.loss`; NaN without calibration.
        output_error: ``|(W - Q) X| / |W X|`` over the calibration tokens; NaN without.
        weight_error: ``|W - Q| / |W|``.
        tokens: that it was calibrated on.
        retries: how often damping was raised.
        why_nearest: why it was rounded to nearest though GPTQ was asked for, or empty.
    """

    name: str
    role: str
    bits: int
    loss: float = math.nan
    output_error: float = math.nan
    weight_error: float = math.nan
    tokens: int = 0
    damping: float = 0.0
    retries: int = 0
    dead: int = 0
    why_nearest: str = ""

    def __str__(self) -> str:
        words = f"{self.name}: {self.bits} bits, weight error {self.weight_error:.4f}"
        if self.tokens:
            words += f", output error {self.output_error:.4f}, loss {self.loss:.4g}, {self.tokens} tokens"
        for note in (
            f"damping {self.damping:g} after {self.retries} retries" if self.retries and self.damping else "",
            f"{self.dead} dead inputs" if self.dead else "",
            f"to nearest: {self.why_nearest}" if self.why_nearest else "",
        ):
            words += f", {note}" if note else ""
        return words


@dataclass
class QuantizationStatistics:
    """What was quantised, and how well."""

    layers: list[LayerRecord] = field(default_factory=list)
    weights: int = 0  # how many numbers
    dense_bytes: int = 0
    packed_bytes: int = 0
    kernel: tuple[str, str] | None = None

    def count(self, packed: PackedLinear) -> None:
        """Add a layer to the sums. Dense it would be in the dtype of its scales."""
        stored = (packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
        weights = packed.in_features * packed.out_features
        self.weights += weights
        self.dense_bytes += weights * packed.scales.element_size()
        self.packed_bytes += sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "bits_per_weight": self.bits_per_weight,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
            "kernels": {"quantized_linear": dict(zip(("backend", "reason"), self.kernel, strict=True))}
            if self.kernel
            else {},
        }

    @property
    def bits_per_weight(self) -> float:
        """With scales, zeros and group indices."""
        return 8 * self.packed_bytes / self.weights if self.weights else math.nan

    def lines(self, method: str) -> list[str]:
        """For the printed report."""
        lines = [
            f"  weights   {self.weights} in {self.bits_per_weight:.2f} bits each, all told; {self.packed_bytes} bytes, "
            f"{self.dense_bytes} before"
        ]
        fallen = Counter(layer.why_nearest for layer in self.layers if layer.why_nearest)
        lines += [f"  nearest   {n} x {why}" for why, n in fallen.most_common()]
        if self.kernel is not None:
            lines.append(f"  kernel    quantized_linear: {self.kernel[0]} ({self.kernel[1]})")
        return lines + [f"  layer     {layer}" for layer in self.layers]


__all__ = ["LayerRecord", "QuantizationStatistics"]
