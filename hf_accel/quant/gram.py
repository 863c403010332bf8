"""The second moments of a layer's inputs, gathered token by token: what GPTQ calls its Hessian."""

from __future__ import annotations

import torch

from hf_accel.errors import QuantizationError


class Gram:
    """Running mean ``(2 / tokens) * sum x x^T`` over the tokens that were added.

    It is the Hessian of ``mean |W x|^2`` in a row of ``W``. The released GPTQ code averages over sequences, which for
    sequences of one length is the same but for a factor; everything that uses it is relative to its diagonal. A mean
    over tokens weighs short texts by what they hold.

    Args:
        features: n, the length of an input.
        name: of the layer, for the words of errors.
        dtype: of the sum: fp32, or fp64, whatever the inputs are in.
        device: where the matrix lies. Inputs are brought there.

    Attributes:
        tokens: how many were added.
    """

    def __init__(
        self,
        features: int,
        name: str = "layer",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if dtype not in (torch.float32, torch.float64):
            raise QuantizationError(f"Gram of {name}: sums must be float32 or float64; got {dtype}, which overflows.")
        self.features, self.name, self.tokens = features, name, 0
        self._mean = torch.zeros(features, features, dtype=dtype, device=device)

    def add(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Take in tokens.

        Args:
            x: ``[..., n]`` in any float dtype.
            keep: bool ``[...]``, or any shape with as many elements: False for pads, which have no part.

        Raises:
            QuantizationError: another number of features, a mask that does not fit, or tokens with NaN or infinity.
        """
        if x.shape[-1] != self.features:
            raise QuantizationError(f"Gram of {self.name}: inputs must be [..., {self.features}]; got {list(x.shape)}.")
        rows = x.detach().reshape(-1, self.features)
        if keep is not None:
            if keep.dtype != torch.bool or keep.numel() != rows.shape[0]:
                raise QuantizationError(
                    f"Gram of {self.name}: keep must be bool with {rows.shape[0]} elements, one per token of "
                    f"{list(x.shape)}; got {keep.dtype} {list(keep.shape)}."
                )
            rows = rows[keep.reshape(-1).to(rows.device)]
        rows = rows.to(self._mean.device, self._mean.dtype)
        count = rows.shape[0]
        if count == 0:
            return
        bad = int((~torch.isfinite(rows)).any(-1).sum())
        if bad:
            raise QuantizationError(
                f"Gram of {self.name}: {bad} of {count} input tokens hold NaN or infinity. A model in float16 may "
                "overflow before this layer: calibrate in bfloat16 or float32. If these tokens are padding, give the "
                "attention mask."
            )
        total = self.tokens + count
        self._mean.addmm_(rows.t(), rows, beta=self.tokens / total, alpha=2 / total)
        self.tokens = total

    def matrix(self) -> torch.Tensor:
        """``[n, n]``, symmetric to rounding. Not a copy: whoever writes to it clones it first.

        Raises:
            QuantizationError: no tokens, or a sum that overflowed.
        """
        if self.tokens == 0:
            raise QuantizationError(
                f"Gram of {self.name}: no token reached this layer. Calibrate on more or other texts (an expert may "
                "see none), or leave the layer out."
            )
        if not bool(torch.isfinite(self._mean).all()):
            raise QuantizationError(
                f"Gram of {self.name}: the sum over {self.tokens} tokens overflowed {self._mean.dtype}. "
                "Use dtype=torch.float64, and look for inputs that are too large."
            )
        return self._mean

    def __repr__(self) -> str:
        return f"Gram({self.name!r}, features={self.features}, tokens={self.tokens})"
