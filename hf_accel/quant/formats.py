"""Element formats: what a code of a few bits means before it is scaled.

Integers are unsigned codes ``0 .. 2**bits - 1``; their grid brings the zero. Floats are bit patterns, sign bit first:

========  =====  ====================================  ========  ================================
name      bits   sign, exponent, mantissa (bias)       largest   beyond it
========  =====  ====================================  ========  ================================
``e4m3``  8      1, 4, 3 (7), the "fn" of OCP, torch   448       no infinity; NaN is ``S1111111``
``e5m2``  8      1, 5, 2 (15), as IEEE                 57344     infinity, NaN
``e2m1``  4      1, 2, 1 (1), FP4 of OCP MX            6         nothing: every code is a number
========  =====  ====================================  ========  ================================

Source: OCP 8-bit Floating Point Specification 1.0, OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch

from hf_accel.errors import InvalidSetting


@dataclass(frozen=True)
class Format:
    """An element format.

    Attributes:
        name: lower case, as :data:`FORMATS` lists it.
        bits: bits of a code.
        exponent_bits, mantissa_bits, bias: of a float; 0 exponent bits is an integer.
        largest_code: the code of the largest finite magnitude.
        infinity: whether the code after the largest is infinity; all codes beyond are NaN.
    """

    name: str
    bits: int
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    largest_code: int = 0
    infinity: bool = False

    @property
    def is_float(self) -> bool:
        return self.exponent_bits > 0

    @property
    def levels(self) -> int:
        """Number of codes, ``2**bits``."""
        return 1 << self.bits

    @property
    def nan_code(self) -> int | None:
        """All bits below the sign, where that is no number."""
        last = self.levels // 2 - 1
        return last if self.is_float and last > self.largest_code else None

    @property
    def largest(self) -> float:
        """The largest finite value; of an integer the largest code, ``2**bits - 1``."""
        return self._magnitude(self.largest_code) if self.is_float else float(self.levels - 1)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value of a float. Below it the spacing stays what it is there."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value of a float: ``floor(log2(largest))``."""
        return (self.largest_code >> self.mantissa_bits) - self.bias

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The value of every code, fp32 ``[2**bits]``: of an integer the code itself."""
        if not self.is_float:
            return torch.arange(self.levels, dtype=torch.float32, device=device)
        half = [self._magnitude(code) for code in range(self.levels // 2)]
        return torch.tensor(half + [-value for value in half], dtype=torch.float32, device=device)

    def _magnitude(self, code: int) -> float:
        if code > self.largest_code:
            return float("inf") if self.infinity and code == self.largest_code + 1 else float("nan")
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return mantissa * 2.0 ** (max(exponent, 1) - self.bias - self.mantissa_bits)

    def __repr__(self) -> str:
        return self.name.upper()


INT2 = Format("int2", 2)
INT3 = Format("int3", 3)
INT4 = Format("int4", 4)
INT8 = Format("int8", 8)
E4M3 = Format("e4m3", 8, exponent_bits=4, mantissa_bits=3, bias=7, largest_code=0x7E)
E5M2 = Format("e5m2", 8, exponent_bits=5, mantissa_bits=2, bias=15, largest_code=0x7B, infinity=True)
E2M1 = Format("e2m1", 4, exponent_bits=2, mantissa_bits=1, bias=1, largest_code=0x7)

FORMATS: dict[str, Format] = {f.name: f for f in (INT2, INT3, INT4, INT8, E4M3, E5M2, E2M1)}


def format_of(name: str | int | Format) -> Format:
    """The format called ``name``; a number of bits is the integer of so many bits.

    Raises:
        InvalidSetting: no such format.
    """
    if isinstance(name, Format):
        return name
    key = f"int{name}" if isinstance(name, int) and not isinstance(name, bool) else str(name).lower()
    if key in FORMATS:
        return FORMATS[key]
    near = difflib.get_close_matches(key, FORMATS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InvalidSetting("quant", "format", name, f"one of {', '.join(FORMATS)}{hint}")
