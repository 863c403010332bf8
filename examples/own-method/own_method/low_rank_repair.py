"""Weights in 8 bits with a low-rank pair beside them that repairs the rounding.

LoRC of ZeroQuant-V2 (arXiv 2303.08302): what a weight loses by rounding has a few large singular values; a pair of thin
matrices gives those back. Here a row of the weight is rounded with a scale of its own. A linear of ``[out, in]`` takes
``out x in`` bytes and ``2 x rank x (out + in)`` in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_accel.config import Config, setting
from hf_accel.method import Facts, LinearMethod, LinearSite


@dataclass(frozen=True)
class LowRankRepairConfig(Config):
    METHOD = "low-rank-repair"
    rank: int = setting(32, "singular values of the rounding error that are kept", ge=1)
    # The base class honours these two by their names: roles, names or patterns of linears.
    targets: tuple[str, ...] | None = setting(None, "linears to replace; None: all inside the model's blocks")
    exclude: tuple[str, ...] = setting((), "linears to leave alone")


class RepairedLinear(torch.nn.Module):
    """``x @ (codes * scale + up @ down).T + bias``: ``[..., in]`` -> ``[..., out]``, in the dtype of ``x``.

    All of it are buffers, so that ``.to(device)`` takes them along and no optimizer finds them.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rank: int):
        super().__init__()
        self.out_features, self.in_features = weight.shape  # hf_accel compares them with the linear's
        exact = weight.float()
        largest = exact.abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, 1).to(weight.dtype)
        codes = (exact / scale.float()).round().clamp(-127, 127).to(torch.int8)
        left, values, right = torch.linalg.svd(exact - codes.float() * scale.float(), full_matrices=False)
        root = values[:rank].sqrt()  # half to each side: products of half types with tiny numbers would vanish
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("up", (left[:, :rank] * root).to(weight.dtype))
        self.register_buffer("down", (root[:, None] * right[:rank]).to(weight.dtype))
        self.register_buffer("bias", None if bias is None else bias.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A kernel that reads int8 would multiply without making the weight whole; this is the plain form.
        return F.linear(x, self.codes * self.scale, self.bias) + F.linear(F.linear(x, self.down), self.up)


class LowRankRepair(LinearMethod):
    name, paper = "low-rank-repair", "ZeroQuant-V2, LoRC (arXiv 2303.08302)"
    summary = "linears in 8 bits with a low-rank pair that repairs the rounding"
    facts = Facts(
        site="linear",
        media=frozenset({"video", "image", "text"}),
        backward=True,
        full_budget={"rank": 10**6},  # all singular values: what was lost is given back
        budget="rank",
    )
    Config = LowRankRepairConfig
    verb = "repaired"

    def replacement(self, site: LinearSite) -> torch.nn.Module:
        return RepairedLinear(site.weight, site.bias, self.config.rank)
