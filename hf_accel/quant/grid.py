"""Grids: where the values lie that a block of a matrix may take, and rounding to them.

An integer code means ``scale * (code - zero)``, a float code ``scale * value(code)``. One scale, and for integers one
zero, serve a block of ``rows x columns`` of a matrix ``[out, in]``. A block at the edge may be smaller. Zero is always
on the grid, and a block of zeros has the range [-1, 1], as in GPTQ (arXiv 2210.17323).

Two rules for the scale. ``"float"``: the range fills the codes. ``"power_of_two"``: of floats as OCP MX has it, the
exponent of the largest magnitude less that of the format, so that magnitudes between the format's largest value and the
next power of two saturate; of integers the smallest power of two that holds the range, which is MXINT's but for
magnitudes within ``2**-bits`` of the next power of two, where MX saturates.

Where the released GPTQ code differs: its symmetric range is one-sided for a block without a negative value, while its
zero stays in the middle, so that half of the range is clipped. Here a symmetric range is ``+-max|w|`` always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hf_accel.errors import InvalidSetting, QuantizationError
from hf_accel.quant.formats import Format

SCALE_RULES = ("float", "power_of_two")
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Scheme:
    """How a matrix ``[out, in]`` is cut into blocks with a grid each.

    Attributes:
        format: of the elements.
        rows, columns: of a block; None is the whole axis.
        symmetric: zero in the middle of the codes; floats always are.
        scale_rule: ``"float"`` or ``"power_of_two"``.
    """

    format: Format
    rows: int | None
    columns: int | None
    symmetric: bool = False
    scale_rule: str = "float"

    def __post_init__(self) -> None:
        for field in ("rows", "columns"):
            size = getattr(self, field)
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise InvalidSetting("Scheme", field, size, "a positive int, or None for the whole axis")
        if self.scale_rule not in SCALE_RULES:
            raise InvalidSetting("Scheme", "scale_rule", self.scale_rule, f"one of {', '.join(SCALE_RULES)}")

    @classmethod
    def per_tensor(cls, format: Format, *, symmetric: bool = False, scale_rule: str = "float") -> Scheme:
        """One grid."""
        return cls(format, None, None, symmetric, scale_rule)

    @classmethod
    def per_row(cls, format: Format, *, symmetric: bool = False, scale_rule: str = "float") -> Scheme:
        """A grid for every output channel."""
        return cls(format, 1, None, symmetric, scale_rule)

    @classmethod
    def grouped(
        cls, format: Format, group: int | None, *, symmetric: bool = False, scale_rule: str = "float"
    ) -> Scheme:
        """A grid for every ``group`` neighbouring inputs of an output channel: 1 x g. -1 or None: the whole row."""
        return cls(format, 1, None if group == -1 else group, symmetric, scale_rule)

    @classmethod
    def by_column(
        cls, format: Format, group: int | None, *, symmetric: bool = False, scale_rule: str = "float"
    ) -> Scheme:
        """A grid for every ``group`` neighbouring outputs of an input: g x 1. -1 or None: the whole column."""
        return cls(format, None if group == -1 else group, 1, symmetric, scale_rule)

    @classmethod
    def blocks(
        cls, format: Format, rows: int, columns: int, *, symmetric: bool = False, scale_rule: str = "float"
    ) -> Scheme:
        """A grid for every tile of ``rows x columns``."""
        return cls(format, rows, columns, symmetric, scale_rule)

    def block(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a block of a matrix of this shape, never more than the matrix has."""
        out, inputs = shape
        return min(self.rows or out, out), min(self.columns or inputs, inputs)

    def grid_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Number of blocks along both axes of a matrix of this shape."""
        rows, columns = self.block(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of the blocks, both ``[ceil(out / rows), ceil(in / columns)]``.

    Attributes:
        scale: positive.
        zero: the code that means 0, whole numbers in the scale's dtype; None for floats.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None


def group_index(inputs: int, group_size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """int32 ``[inputs]``: which group an input belongs to, if neighbours make a group. -1: one group for all."""
    index = torch.arange(inputs, dtype=torch.int32, device=device)
    return torch.zeros_like(index) if group_size == -1 else index // group_size


@dataclass(frozen=True)
class ShrinkSearch:
    """Try smaller ranges and keep, block by block, the one with the least ``sum |Q(w) - w| ** norm``.

    The shares tried are ``1 - i / steps`` for ``i < most * steps``; 1 is among them, so the result is never worse than
    without. Defaults are GPTQ's.
    """

    norm: float = 2.4
    steps: int = 100
    most: float = 0.8

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise InvalidSetting("ShrinkSearch", "norm", self.norm, "positive")
        if self.steps < 1:
            raise InvalidSetting("ShrinkSearch", "steps", self.steps, "at least 1")
        if not 0 <= self.most < 1:
            raise InvalidSetting("ShrinkSearch", "most", self.most, "at least 0 and below 1")

    def shares(self) -> list[float]:
        return [1 - i / self.steps for i in range(1, round(self.most * self.steps))]


def fit_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    search: ShrinkSearch | None = None,
    *,
    shrink: float = 1.0,
    scale_dtype: torch.dtype | None = None,
) -> Grid:
    """The grid that holds the range of every block.

    Args:
        weight: ``[out, in]``, finite. Computed in fp32, or in fp64 if it is fp64.
        scheme: blocks and format.
        search: look for smaller ranges with less error.
        shrink: factor of every range (``beta`` of MagR's grids); below 1 the outermost values are clipped.
        scale_dtype: what the scale will be stored in. It is rounded to that before the zero is found and before codes
            are made with it, so that storing changes nothing.

    Returns:
        Grid: in fp32 (fp64), whatever ``scale_dtype`` is.

    Raises:
        QuantizationError: not a matrix, not finite, or a scale that ``scale_dtype`` cannot hold.
    """
    blocks = _blocked(_computable(weight), scheme)
    if not bool(torch.isfinite(blocks).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise QuantizationError(
            f"fit_grid: {bad} of {weight.numel()} weights are NaN or infinite. Leave this layer out."
        )
    low, high = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
    nothing = (low == 0) & (high == 0)
    low, high = low.masked_fill(nothing, -1.0) * shrink, high.masked_fill(nothing, 1.0) * shrink
    best = _grid_of_range(low, high, scheme, scale_dtype)
    if search is None:
        return best
    scale, zero = best.scale, best.zero
    least = _block_errors(blocks, best, scheme.format, search.norm)
    for share in search.shares():
        candidate = _grid_of_range(low * share, high * share, scheme, scale_dtype)
        error = _block_errors(blocks, candidate, scheme.format, search.norm)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate.scale, scale)
        if zero is not None and candidate.zero is not None:
            zero = torch.where(better, candidate.zero, zero)
    return Grid(scale, zero)


def encode(
    weight: torch.Tensor,
    grid: Grid,
    scheme: Scheme,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Codes uint8 ``[out, in]`` of ``weight`` ``[out, in]``; what is outside of the range takes its end (saturates),
    infinity too. NaN stays NaN in E4M3 and E5M2; the others have no code for it, and it becomes any.

    Args:
        rounding: ``"nearest"``, halves to even; ``"stochastic"``, up with the probability of the part cut off, so that
            the mean of a value inside the range is the value.
        generator: for stochastic rounding, on the weight's device. There is no default: nobody's global random state
            moves.
    """
    blocks = _blocked(_computable(weight), scheme)
    scale, zero = _over_blocks(grid, scheme, weight.shape)
    codes = codes_of(blocks, scale, zero, scheme.format, _noise(blocks, rounding, generator))
    return _unblocked(codes, scheme, weight.shape)


def decode(codes: torch.Tensor, grid: Grid, scheme: Scheme, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values ``[out, in]`` in ``dtype`` of codes ``[out, in]``."""
    scale, zero = _over_blocks(grid, scheme, codes.shape)
    return _unblocked(values_of(_blocked(codes, scheme), scale, zero, scheme.format), scheme, codes.shape).to(dtype)


def round_to_grid(
    weight: torch.Tensor,
    grid: Grid,
    scheme: Scheme,
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """``decode(encode(weight))``: the values on the grid, in the grid's dtype."""
    return decode(encode(weight, grid, scheme, rounding, generator), grid, scheme, grid.scale.dtype)


def codes_of(
    values: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    format: Format,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes uint8 of ``values``, with ``scale`` and ``zero`` that broadcast to them: for loops that have their own
    blocks. ``noise``: uniform in [0, 1), of the shape of ``values``, makes rounding stochastic."""
    scaled = values / scale
    if format.is_float:
        return _float_codes(scaled, format, noise)
    rounded = _round(scaled, noise)
    return (rounded if zero is None else rounded + zero).clamp_(0, format.levels - 1).to(torch.uint8)


def values_of(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, format: Format) -> torch.Tensor:
    """Values of ``codes`` in the scale's dtype, with ``scale`` and ``zero`` that broadcast to them."""
    if format.is_float:
        return format.table(codes.device).to(scale.dtype)[codes.int()] * scale
    whole = codes.to(scale.dtype)
    return (whole if zero is None else whole - zero) * scale


def _float_codes(scaled: torch.Tensor, format: Format, noise: torch.Tensor | None) -> torch.Tensor:
    """Bit patterns. In a binade the values are evenly spaced, so rounding is that of integers in units of the
    spacing; a carry runs over into the exponent as it should, because the codes of magnitudes are consecutive."""
    magnitude = scaled.abs().clamp(max=format.largest)
    exponent = torch.frexp(magnitude.clamp(min=2.0**format.min_exponent)).exponent - 1
    spacing = power_of_two(exponent - format.mantissa_bits)
    units = _round(magnitude / spacing, noise).int()
    code = ((exponent - format.min_exponent) << format.mantissa_bits) + units
    if format.nan_code is not None:
        code = code.masked_fill(scaled.isnan(), format.nan_code)
    return (code + (torch.signbit(scaled).int() << (format.bits - 1))).to(torch.uint8)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """``2.0 ** exponent`` in fp32, exact, of int32 clamped to -126..127: what an E8M0 scale holds but for its smallest.
    Made of bits, because the vectorised ``pow`` may miss by a unit."""
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)


def _round(scaled: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    if noise is None:
        return scaled.round()
    below = scaled.floor()
    return below + (noise < scaled - below)


def _noise(blocks: torch.Tensor, rounding: str, generator: torch.Generator | None) -> torch.Tensor | None:
    if rounding not in ROUNDINGS:
        raise InvalidSetting("encode", "rounding", rounding, f"one of {', '.join(ROUNDINGS)}")
    if rounding == "nearest":
        return None
    if generator is None:
        raise InvalidSetting("encode", "generator", None, "a torch.Generator on the weight's device: stochastic draws")
    return torch.rand(blocks.shape, generator=generator, dtype=blocks.dtype, device=blocks.device)


def _grid_of_range(low: torch.Tensor, high: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype | None) -> Grid:
    format = scheme.format
    if format.is_float or scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if format.is_float and scheme.scale_rule == "power_of_two":
        scale = power_of_two(torch.frexp(high).exponent - 1 - format.max_exponent).to(high.dtype)
    elif format.is_float:
        scale = high / format.largest
    else:
        scale = (high - low) / (format.levels - 1)
        if scheme.scale_rule == "power_of_two":
            mantissa, exponent = torch.frexp(scale)
            scale = power_of_two(exponent - (mantissa == 0.5).int()).to(high.dtype)
    scale = _as_stored(scale, scale_dtype or scale.dtype)
    if format.is_float:
        return Grid(scale)
    if scheme.symmetric:
        return Grid(scale, torch.full_like(scale, format.levels // 2))
    return Grid(scale, (-low / scale).round_().clamp_(0, format.levels - 1))


def _as_stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as ``dtype`` holds it; one that would vanish becomes the smallest positive number."""
    limits = torch.finfo(dtype)
    stored = scale.clamp(min=limits.smallest_normal * limits.eps).to(dtype).to(scale.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise QuantizationError(
            f"fit_grid: a scale of {float(scale.max()):.3g} does not fit {dtype}, whose largest is {limits.max:.3g}. "
            "Store scales in torch.bfloat16 or torch.float32."
        )
    return stored


def _block_errors(blocks: torch.Tensor, grid: Grid, format: Format, norm: float) -> torch.Tensor:
    scale, zero = _spread(grid.scale), None if grid.zero is None else _spread(grid.zero)
    rounded = values_of(codes_of(blocks, scale, zero, format), scale, zero, format)
    return (rounded - blocks).abs_().pow_(norm).sum((1, 3))


def _computable(weight: torch.Tensor) -> torch.Tensor:
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise QuantizationError(
            f"quant: weight must be a float matrix [out, in]; got {weight.dtype} {list(weight.shape)}. "
            "Flatten a convolution's kernel to [out, in * height * width] first."
        )
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()


def _blocked(matrix: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """``[out, in]`` as ``[R, rows, C, columns]``, filled up with zeros, which are on every grid and in every range."""
    rows, columns = scheme.block(matrix.shape)
    down, right = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    if down or right:
        matrix = F.pad(matrix, (0, right, 0, down))
    return matrix.reshape(matrix.shape[0] // rows, rows, matrix.shape[1] // columns, columns)


def _unblocked(blocks: torch.Tensor, scheme: Scheme, shape: torch.Size) -> torch.Tensor:
    R, rows, C, columns = blocks.shape
    return blocks.reshape(R * rows, C * columns)[: shape[0], : shape[1]].contiguous()


def _over_blocks(grid: Grid, scheme: Scheme, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor | None]:
    wanted = scheme.grid_shape(shape)
    for name, tensor in (("scale", grid.scale), ("zero", grid.zero)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise QuantizationError(
                f"quant: {name} must be {list(wanted)} for a matrix {list(shape)} in blocks of "
                f"{scheme.block(shape)}; got {list(tensor.shape)}. Fit the grid with the same scheme."
            )
    if grid.zero is None and not scheme.format.is_float:
        raise QuantizationError("quant: an integer grid needs its zero. Fit the grid with the same scheme.")
    return _spread(grid.scale), None if grid.zero is None else _spread(grid.zero)


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """``[R, C]`` as ``[R, 1, C, 1]``."""
    return tensor[:, None, :, None]
