"""Thresholds of single heads from what attention really saw.

The paper tunes a head by bisection, input after input, for a day and more. Here every probed call is replayed at a grid
of thresholds at once, on a sample of its query blocks, and only the curves are kept: error and density of each head
over the grid. Fitting is a walk over curves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_accel.attention.call import AttentionCall
from hf_accel.patches.sparge.thresholds import HeadSettings

if TYPE_CHECKING:
    from hf_accel.patches.sparge import Sparge

MASSES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0)
BARS = (-1.0, 0.3, 0.6)
SAMPLED_BLOCKS = 24
# A head that keeps more than this gains nothing: it runs dense (0.9 in the paper).
MOST_DENSITY = 0.9


@dataclass(frozen=True)
class Curves:
    """Of one call: fp32 ``[bars, masses, H]`` on the CPU, over :data:`BARS` and :data:`MASSES`.

    ``error`` is the relative L1 error ``sum|O - O'| / sum|O|`` against exact attention; 0 where every head keeps more
    than :data:`MOST_DENSITY`.
    """

    error: torch.Tensor
    density: torch.Tensor


def measure(method: Sparge, call: AttentionCall) -> Curves:
    """Replay a call at every threshold. The arithmetic is the method's, the reference is exact."""
    plan, config = method.plan(call), method.config
    tokens = method.tokens(call, plan)
    seen = method.predict(tokens, plan)
    blocks, places = _sample(tokens.query.shape[2], config.block_q, call)
    sampled = dataclasses.replace(tokens, query=tokens.query.index_select(2, places))
    everything = seen.visible.expand(seen.scores.shape)[:, :, blocks]
    exact = method.attend_blocks(sampled, everything).float()
    size = exact.abs().sum((0, 2, 3)).clamp(min=1e-12)
    errors, densities = [], []
    for bar in BARS:
        for mass in MASSES:
            keep = method.choose(seen, plan, HeadSettings("cdf", mass, bar, None))
            density = method.density(keep, plan, tokens.valid).mean(0)
            error = torch.zeros_like(density)
            if bool((density <= MOST_DENSITY).any()):  # else all heads would run dense: nothing to compute
                out = method.attend_blocks(sampled, keep[:, :, blocks], config.pvthreshd, config.numerics)
                error = (out.float() - exact).abs().sum((0, 2, 3)) / size
            errors.append(error)
            densities.append(density)
    shape = (len(BARS), len(MASSES), -1)
    return Curves(torch.stack(errors).view(shape).cpu(), torch.stack(densities).view(shape).cpu())


def _sample(queries: int, block: int, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Query blocks spread over the sequence, and the places of their tokens.

    A causal mask counts queries from the end of the keys, so that they cannot be taken out of their row: then all.
    """
    device = call.query.device
    full = queries // block
    if call.causal or full <= SAMPLED_BLOCKS:
        return torch.arange(-(-queries // block), device=device), torch.arange(queries, device=device)
    blocks = ((torch.arange(SAMPLED_BLOCKS, device=device) + 0.5) * full / SAMPLED_BLOCKS).long()
    return blocks, (blocks[:, None] * block + torch.arange(block, device=device)).flatten()


def fit(
    records: Mapping[int, Sequence[Curves]], heads: Sequence[int], *, l1: float | None, density: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per head the thresholds of least density whose error is below a bound on every sample.

    With ``l1`` the bound is given. With ``density`` it is the smallest bound, one for all heads, at which the mean
    density is at most the one asked for: heads that lose little pay for those that lose much.

    Args:
        records: layer -> curves of its calls; a layer that is absent stays dense.
        heads: number of heads of every layer.

    Returns:
        settings and evidence: the density expected, mean and worst error of the heads that are sparse, the bound,
        and how many heads stay dense.
    """
    widths = [heads[layer] for layer in records]
    # Layers may differ in their number of heads: side by side they are one long row.
    error = torch.cat([torch.stack([c.error for c in curves]).amax(0).flatten(0, 1) for curves in records.values()], 1)
    dense = torch.cat(
        [torch.stack([c.density for c in curves]).mean(0).flatten(0, 1) for curves in records.values()], 1
    )
    bound = l1 if l1 is not None else _bound_for(error, dense, density if density is not None else 1.0)
    choice, reached = _pick(error, dense, bound)
    sparse = reached < 1
    found = error.gather(0, choice[None])[0][sparse]
    rows = dict(zip(records, zip(choice.split(widths), sparse.split(widths), strict=True), strict=True))
    table: dict[str, list[list[Any]]] = {"cdfthreshd": [], "simthreshd1": [], "is_sparse": []}
    for layer, count in enumerate(heads):
        chosen, flags = rows[layer] if layer in rows else (torch.zeros(count).long(), torch.zeros(count).bool())
        table["cdfthreshd"].append([MASSES[i % len(MASSES)] for i in chosen.tolist()])
        table["simthreshd1"].append([BARS[i // len(MASSES)] for i in chosen.tolist()])
        table["is_sparse"].append(flags.tolist())
    evidence = {
        "density": float(reached.mean()),
        "l1_mean": float(found.mean()) if len(found) else 0.0,
        "l1_worst": float(found.max()) if len(found) else 0.0,
        "l1_bound": float(bound),
        "sparse_heads": int(sparse.sum()),
        "dense_heads": int((~sparse).sum()),
    }
    return {"mode": "cdf", "density": None, "thresholds": table}, evidence


def _pick(error: torch.Tensor, density: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Per head, of ``[thresholds, heads]``: which thresholds, int64, and at what density; 1 for dense heads."""
    reached, choice = density.masked_fill(error > bound, float("inf")).min(0)
    return choice, torch.where(reached > MOST_DENSITY, 1.0, reached)


def _bound_for(error: torch.Tensor, density: torch.Tensor, wanted: float) -> float:
    """The smallest bound at which the mean density is at most ``wanted``; the largest error if none is."""
    bounds = error.flatten().sort().values
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if _pick(error, density, float(bounds[middle]))[1].mean() <= wanted:
            high = middle
        else:
            low = middle + 1
    return float(bounds[low])
